"""Weights made smaller on the way: how small, how near, and what is refused."""

import asyncio
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import transformers

import chatglm
from bench.decode import CHATGLM3_6B
from bench.weights import held_bytes
from chatglm.checkpoint import quantize
from chatglm.checkpoint.conversion import ChatGLMForConditionalGeneration, translate_config
from chatglm.checkpoint.memory import check_memory, needed_bytes
from chatglm.text.messages import to_messages
from chatglm.tiny.evaluation import answer
from tests.original import GOLDEN, golden_config, native, publish, random_state, shapes
from tests.servers import LIMIT
from tests.test_tiny import lines

KINDS = ["int8", "int4"]
NEAR = {"int8": 0.02, "int4": 0.15}  # of the length of the full network's logits
GPU = torch.device("cuda", 0)


def load(folder=None, kind=None, **options):
    return chatglm.load(folder, **{"device": "cpu", "quantize": kind} | options)


def answers(model, ids):
    with torch.inference_mode():
        return model(ids).logits


def skeleton(published):
    with torch.device("meta"):
        return ChatGLMForConditionalGeneration(translate_config(published, "here"))


@pytest.fixture
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoint")


@pytest.fixture(scope="module")
def full():
    return load()[1]


@pytest.fixture(scope="module", params=KINDS)
def small(request):
    """(kind, tokenizer, the bundled model)"""
    return request.param, *load(kind=request.param)


# How small


def test_every_matrix_of_the_layers_is_quantised_and_nothing_else(small):
    kind, _, model = small
    for name, parameter in model.named_parameters():
        matrix = ".layers." in name and name.endswith("proj.weight")
        assert parameter.dtype == (
            {"int8": torch.int8, "int4": torch.uint8}[kind] if matrix else torch.float32
        ), name


@pytest.mark.parametrize("kind, share", [("int8", 0.26), ("int4", 0.135)])
def test_the_matrices_take_a_quarter_and_an_eighth_of_float32(full, kind, share):
    model = load(kind=kind)[1]  # on a CPU the first answer lays int4 out anew
    saved = held_bytes(full) - held_bytes(model)
    matrices = sum(p.nbytes for name, p in full.named_parameters() if name.endswith("proj.weight"))
    assert matrices * (1 - share) < saved < matrices * (1 - share + 0.01)


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("changes", [{}, {"hidden_size": 192}], ids=str)
def test_the_bytes_told_before_loading_are_those_taken(folder, kind, changes):
    config = golden_config(ffn_hidden_size=320, **changes)
    publish(folder, config, random_state(config))
    model = load(folder, kind, dtype="bfloat16")[1]
    told = needed_bytes(skeleton(config), kind, torch.bfloat16)
    assert told == held_bytes(model)


@pytest.mark.parametrize("kind, least, most", [("int8", 6.7e9, 6.9e9), ("int4", 3.9e9, 4.1e9)])
def test_chatglm3_6b_fits_small_gpus(kind, least, most):
    assert least < needed_bytes(skeleton(CHATGLM3_6B), kind, torch.bfloat16) < most


def test_the_refusal_for_lack_of_memory_counts_what_quantising_saves():
    wide = {"hidden_size": 2**17, "ffn_hidden_size": 3 * 2**17}
    config = translate_config(CHATGLM3_6B | wide, "here")
    told = {}
    for kind in (None, *KINDS):
        with pytest.raises(ValueError, match=f"GiB in {kind or 'bfloat16'}, but cpu") as caught:
            check_memory(
                ChatGLMForConditionalGeneration, config, torch.device("cpu"), torch.bfloat16, kind
            )
        told[kind] = float(re.search(r"take ([\d.]+) GiB", str(caught.value))[1])
    assert told["int8"] == pytest.approx(0.51 * told[None], rel=0.02)
    assert told["int4"] == pytest.approx(0.26 * told[None], rel=0.02)


# How near


def test_logits_stay_near_those_of_the_full_network(full, small):
    kind, tokenizer, model = small
    ids = torch.tensor([tokenizer.encode_chat(to_messages("什么是流式输出？"))])
    ours, theirs = answers(model, ids), answers(full, ids)
    assert 0 < (ours - theirs).norm() < NEAR[kind] * theirs.norm()


def test_known_questions_are_answered_nearly_as_well_as_by_the_full_network(full, small):
    _, tokenizer, model = small
    known = [line for line in lines("heldout.jsonl") if line["kind"] == "known"][:60]

    async def right(model, **settings):
        with chatglm.Engine(tokenizer, model) as engine:
            given = await asyncio.gather(
                *(answer(engine, to_messages(line["question"]), **settings) for line in known)
            )
        return sum(a.text == line["answer"] for a, line in zip(given, known, strict=True))

    for settings in ({"temperature": 0}, {"seed": 0}):
        most = asyncio.run(right(full, **settings))
        assert most > 45 and asyncio.run(right(model, **settings)) >= most - 3


def test_an_answer_at_int8_does_not_depend_on_its_neighbours():
    model = load(kind="int8")[1]
    ids = torch.randint(3, 3000, (4, 20))
    ids[1:] = 5
    together, alone = answers(model, ids)[0], answers(model, ids[:1])[0]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


# Which checkpoints


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_the_published_format_in_shards_is_quantised(folder, kind, ending):
    config = golden_config(ffn_hidden_size=128)
    state = {name: tensor.half() for name, tensor in random_state(config).items()}
    publish(folder, config, state, shards=3, ending=ending)
    ids = torch.randint(768, (1, 20))
    ours, theirs = answers(load(folder, kind)[1], ids), answers(load(folder)[1], ids)
    # Random numbers are coarser than trained ones; a matrix in the wrong place would give over 1.
    assert 0 < (ours - theirs).norm() < {"int8": 0.05, "int4": 0.5}[kind] * theirs.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", ["Glm", "Qwen2"])
def test_what_transformers_knows_by_itself_is_quantised(folder, kind, network):
    native(folder, network)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    model = load(folder, kind)[1]
    assert model.model.layers[0].mlp.down_proj.weight.dtype in (torch.int8, torch.uint8)
    assert answers(model, torch.tensor([[5, 6, 7]])).isfinite().all()


PEAK = """
import sys, threading, time
import chatglm
from bench.weights import held_bytes

def resident():
    with open("/proc/self/status") as file:
        return int(dict(line.split(":") for line in file)["RssAnon"].split()[0]) * 1024

def watch():
    global most
    while True:
        most = max(most, resident())
        time.sleep(0.001)

chatglm.load(device="cpu", quantize=sys.argv[2])
most = before = resident()
threading.Thread(target=watch, daemon=True).start()
model = chatglm.load(sys.argv[1], device="cpu", dtype="bfloat16", quantize=sys.argv[2])[1]
print(most - before, held_bytes(model))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc here")
def test_loading_takes_the_small_weights_and_one_matrix(folder):
    config = golden_config(
        num_layers=10,
        hidden_size=1024,
        ffn_hidden_size=3328,
        num_attention_heads=16,
        kv_channels=64,
        padded_vocab_size=768,
    )
    layer = random_state(config | {"num_layers": 1})
    state = {
        name: layer[re.sub(r"layers\.\d", "layers.0", name)].bfloat16() for name in shapes(config)
    }
    publish(folder, config, state, shards=6)
    # The C library would keep what is given back for later, and it is that which counts here.
    own = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, folder, "int4"],
        cwd=GOLDEN.parent.parent,
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=True,
    )
    shutil.rmtree(folder)
    peak, held = map(int, done.stdout.split())
    largest = 4 * 2 * 3328 * 1024  # bytes of a float32 copy; bitsandbytes makes some on a CPU
    assert peak < held + 4 * largest < sum(t.nbytes for t in state.values())


# Refusals


def refused(*words, **options):
    with pytest.raises(ValueError) as caught:
        load(**options)
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message, message


def test_another_precision_is_refused():
    refused("'int2'", "int8", "int4", kind="int2")


@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_that_the_library_is_not_tried_on_is_refused(kind):
    with pytest.raises(ValueError, match="mps"):
        quantize.pick_quantization(kind, torch.device("mps"), torch.float16)


def test_without_the_library_one_line_says_what_to_install():
    code = (
        "import chatglm, importlib.util; importlib.util.find_spec = lambda name: None; "
        "chatglm.load(quantize='int4')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=GOLDEN.parent.parent,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    needed = "pip install -r chatglm/checkpoint/requirements-quantize.txt"
    assert done.stderr.splitlines()[-1].endswith(needed)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_another_network_than_the_config_says_are_refused(folder, kind):
    config = golden_config(ffn_hidden_size=192)
    publish(folder, config | {"ffn_hidden_size": 128}, random_state(config))
    refused("proj", "another shape", folder=folder, kind=kind)
    publish(folder, config | {"padded_vocab_size": 832}, random_state(config))
    refused("another shape", folder=folder, kind=kind)


def test_rows_that_cannot_be_cut_into_blocks_are_refused_at_int4(folder):
    native(folder)
    refused("multiple of 64", "int8", folder=folder, kind="int4")


def test_a_checkpoint_that_is_quantised_already_is_refused_with_the_way_out(folder):
    config = golden_config(quantization_bit=4)
    publish(folder, config, random_state(golden_config()))
    refused("full-precision", "--quantize int4", folder=folder)
