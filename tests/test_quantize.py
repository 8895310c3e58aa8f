"""Weights made smaller on the way: how small, how near, and what is refused."""

import asyncio
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import chatglm
from bench.sizes import CHATGLM3_6B
from bench.weights import held_bytes
from chatglm.checkpoint import load as loading
from chatglm.checkpoint import quantize, shrink
from chatglm.checkpoint.conversion import ChatGLMForConditionalGeneration, translate_config
from chatglm.checkpoint.memory import check_memory, needed_bytes
from chatglm.hardware.cpu_linear import PackedLinear
from chatglm.text.messages import to_messages
from chatglm.tiny.evaluation import answer
from tests.original import GOLDEN, KINDS, golden_config, native, publish, random_state, shapes
from tests.servers import LIMIT
from tests.test_tiny import lines

# Of the length of the full network's logits. The golden networks' numbers are random, which is
# coarser than trained ones; a matrix in the wrong place would give over 1.
NEAR = {"int8": 0.02, "int4": 0.10}
NEAR_GOLDEN = {"int8": 0.04, "int4": 0.35}
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def load(folder=None, kind=None, **options):
    return chatglm.load(folder, **{"device": "cpu", "quantize": kind} | options)


def answers(model, ids):
    with torch.inference_mode():
        return model(ids).logits


def distance(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def skeleton(published):
    with torch.device("meta"):
        return ChatGLMForConditionalGeneration(translate_config(published, "here"))


@pytest.fixture
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoint")


@pytest.fixture
def as_for_a_gpu(monkeypatch):
    """bitsandbytes, which is used on GPUs, works on a CPU as well."""
    monkeypatch.setattr(
        loading, "pick_quantization", lambda kind, _, dtype, __: quantize.for_gpu(kind, dtype)
    )


@pytest.fixture(scope="module")
def full():
    return load()[1]


@pytest.fixture(scope="module", params=KINDS)
def small(request):
    """(kind, tokenizer, the bundled model)"""
    return request.param, *load(kind=request.param)


# On a GPU, by bitsandbytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, {"hidden_size": 192}], ids=str)
def test_the_bytes_told_before_loading_are_those_taken(as_for_a_gpu, folder, kind, changes):
    config = golden_config(ffn_hidden_size=320, **changes)
    publish(folder, config, random_state(config))
    model = load(folder, kind, dtype="bfloat16")[1]
    assert needed_bytes(skeleton(config), kind, torch.bfloat16, GPU) == held_bytes(model)


@pytest.mark.parametrize("kind", KINDS)
def test_its_logits_are_near_and_those_of_the_layers_are_small(as_for_a_gpu, full, kind):
    tokenizer, model = load(kind=kind)
    ids = torch.tensor([tokenizer.encode_chat(to_messages("什么是流式输出？"))])
    assert (
        0 < distance(answers(model, ids), answers(full, ids)) < {"int8": 0.02, "int4": 0.15}[kind]
    )
    for name, parameter in model.named_parameters():
        is_matrix = ".layers." in name and name.endswith("proj.weight")
        assert (parameter.dtype in (torch.int8, torch.uint8)) == is_matrix, name


@pytest.mark.parametrize("kind", KINDS)
def test_it_refuses_weights_of_another_network(as_for_a_gpu, folder, kind):
    config = golden_config(ffn_hidden_size=192)
    publish(folder, config | {"ffn_hidden_size": 128}, random_state(config))
    refused("proj", "another shape", folder=folder, kind=kind)


@pytest.mark.parametrize("kind, least, most", [("int8", 6.7e9, 6.9e9), ("int4", 3.9e9, 4.1e9)])
def test_chatglm3_6b_fits_small_gpus(kind, least, most):
    assert least < needed_bytes(skeleton(CHATGLM3_6B), kind, torch.bfloat16, GPU) < most


def test_rows_that_cannot_be_cut_into_its_blocks_are_refused_at_int4():
    config = golden_config(hidden_size=96)
    with pytest.raises(ValueError, match="multiple of 64.*int8"):
        needed_bytes(skeleton(config), "int4", torch.bfloat16, GPU)


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_that_is_neither_is_refused(kind):
    with pytest.raises(ValueError, match="mps"):
        quantize.pick_quantization(kind, torch.device("mps"), torch.float16)


# On a CPU: how small


def test_every_matrix_is_small_and_what_is_left_is_float32(small):
    kind, _, model = small
    assert not [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    matrices = {
        n: type(m).__name__ for n, m in model.named_modules() if isinstance(m, PackedLinear)
    }
    assert matrices.pop("lm_head") == "Int8Linear" and len(matrices) == 6 * 4
    assert set(matrices.values()) == {f"{kind.capitalize()}Linear"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.get_input_embeddings().weight.dtype == torch.float16  # as the file has it


# The published sizes, in bytes, with 0.6 GB for Python, torch and what a step needs.
@pytest.mark.parametrize("kind, most", [("int8", 8.0e9 - 0.6e9), ("int4", 5.5e9 - 0.6e9)])
def test_chatglm3_6b_fits_small_laptops(kind, most):
    assert most - 1e9 < needed_bytes(skeleton(CHATGLM3_6B), kind, torch.float32, CPU) < most


PEAK = """
import sys, threading, time
import chatglm
from chatglm.checkpoint.memory import needed_bytes
from chatglm.checkpoint.cpu_quantizer import give_back_memory

def resident():
    with open("/proc/self/status") as file:
        return int(dict(line.split(":") for line in file)["VmRSS"].split()[0]) * 1024

def watch():
    global most
    while True:
        most = max(most, resident())
        time.sleep(0.001)

chatglm.load(device="cpu", quantize=sys.argv[2])
give_back_memory()
most = before = resident()
threading.Thread(target=watch, daemon=True).start()
model = chatglm.load(sys.argv[1], device="cpu", quantize=sys.argv[2])[1]
print(most - before, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc here")
@pytest.mark.parametrize("kind", KINDS)
def test_loading_takes_the_small_weights_and_a_few_matrices(folder, kind):
    config = golden_config(
        num_layers=10,
        hidden_size=1024,
        ffn_hidden_size=3328,
        num_attention_heads=16,
        kv_channels=64,
        padded_vocab_size=768,
    )
    layer = random_state(config | {"num_layers": 1})
    state = {name: layer[re.sub(r"layers\.\d", "layers.0", name)].half() for name in shapes(config)}
    publish(folder, config, state, shards=6)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, folder, kind],
        cwd=GOLDEN.parent.parent,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=True,
    )
    shutil.rmtree(folder)
    peak, held = map(int, done.stdout.split())
    told = needed_bytes(skeleton(config), kind, torch.float32, CPU)
    kernels = 40 * 500_000  # bytes beside the weights
    # Bytes of the largest in the file: one is read, and takes twice that in float32; pages of the
    # file itself count until the system takes them back.
    matrix = 2 * 2 * 3328 * 1024
    assert held < 1.05 * told + kernels, (held, told)
    assert peak < 1.05 * told + kernels + 6 * matrix, (peak, told)
    assert peak < sum(tensor.nbytes for tensor in state.values())


# How near


def test_logits_stay_near_those_of_the_full_network(full, small):
    kind, tokenizer, model = small
    ids = torch.tensor([tokenizer.encode_chat(to_messages("什么是流式输出？"))])
    assert 0 < distance(answers(model, ids), answers(full, ids)) < NEAR[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["chatglm2", "chatglm3"])
def test_logits_stay_near_the_golden_ones(name, kind):
    golden = load_file(GOLDEN / name / "expected_logits.safetensors")
    ours = answers(load(GOLDEN / name, kind)[1], golden["input_ids"])
    assert 0 < distance(ours, golden["logits"]) < NEAR_GOLDEN[kind]


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
        assert most > 45 and asyncio.run(right(model, **settings)) >= most - 2


# In a crowd


async def told(engine, i, after=0.0):
    """Everything that the engine says to a question that no other has, asked a little later."""
    await asyncio.sleep(after)
    question = to_messages(f"{'hello ' * (7 * i % 40)}什么是 HTTP {i}？")
    async for chunk in engine.generate(question, temperature=1, seed=i, max_new_tokens=5 + 3 * i):
        pass
    return chunk.raw


def test_conversations_that_come_and_go_answer_as_if_each_were_alone(small):
    _, tokenizer, model = small

    async def alone(engine):
        return [await told(engine, i) for i in range(16)]

    async def together(engine):
        return await asyncio.gather(*(told(engine, i, 0.02 * (5 * i % 16)) for i in range(16)))

    with chatglm.Engine(tokenizer, model) as engine:
        expected = asyncio.run(alone(engine))
        assert len(set(expected)) > 12
        assert asyncio.run(together(engine)) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_of_the_network_scores_as_transformers_own_does(kind):
    tokenizer, model = load(kind=kind)
    steps = []
    with chatglm.Engine(tokenizer, model) as engine:
        hook = model.register_forward_hook(lambda _, inputs, output: steps.append(output.logits))
        asyncio.run(told(engine, 1))
        hook.remove()
        assert model.products  # or both would be the library's
    ids = torch.tensor([tokenizer.encode_chat(to_messages("hello " * 7 + "什么是 HTTP 1？"))])
    torch.testing.assert_close(
        steps[0][0, -1],
        answers(model, ids)[0, -1],
        rtol=1e-3,
        atol={"int8": 1e-2, "int4": 0.2}[kind],
    )


# Which checkpoints


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_the_published_format_in_shards_is_made_small(folder, kind, ending):
    config = golden_config(ffn_hidden_size=128)
    state = {name: tensor.half() for name, tensor in random_state(config).items()}
    publish(folder, config, state, shards=3, ending=ending)
    ids = torch.arange(20, 40)[None]
    ours, theirs = answers(load(folder, kind)[1], ids), answers(load(folder)[1], ids)
    assert 0 < distance(ours, theirs) < NEAR_GOLDEN[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", ["Glm", "Qwen2"])
def test_what_transformers_knows_by_itself_is_made_small(folder, kind, network):
    larger_native(folder, network)
    ids = torch.tensor([[5, 6, 7]])
    ours, theirs = answers(load(folder, kind)[1], ids), answers(load(folder)[1], ids)
    assert 0 < distance(ours, theirs) < NEAR_GOLDEN[kind]


def larger_native(folder, network):
    native(folder, network)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


# Made small once, and saved


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", [None, "Qwen2"])
def test_a_saved_small_checkpoint_answers_to_the_last_bit_as_one_made_small_while_loading(
    folder, kind, network
):
    source, out = GOLDEN / "chatglm3", folder / "small"
    if network:
        larger_native(source := folder / "full", network)
    assert shrink.main([str(source), "--quantize", kind, "--out", str(out)]) == 0
    ids = torch.tensor([[5, 6, 7, 8]])
    tokenizer, model = load(out)
    assert torch.equal(answers(model, ids), answers(load(source, kind)[1], ids))
    assert tokenizer.encode_chat(to_messages("hi"))


def test_nothing_with_the_name_is_there_unless_it_is_whole(folder, monkeypatch, capsys):
    out = folder / "small"

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(shrink, "write_shards", full_disk)
    assert shrink.main([str(GOLDEN / "chatglm3"), "--quantize", "int8", "--out", str(out)]) == 2
    assert "No space left" in capsys.readouterr().err and not list(folder.iterdir())


def test_a_folder_that_is_there_already_is_not_written_over(folder, capsys):
    assert shrink.main([str(GOLDEN / "chatglm3"), "--quantize", "int8", "--out", str(folder)]) == 2
    assert str(folder) in capsys.readouterr().err and not list(folder.iterdir())


def test_a_small_folder_that_is_cut_off_or_of_another_version_says_so(folder):
    out = folder / "small"
    shrink.shrink(str(GOLDEN / "chatglm3"), "int8", out)
    refused("int8 already", folder=out, kind="int4")
    config = json.loads((out / "config.json").read_text("utf-8"))
    config["quantization_config"]["version"] = 99
    (out / "config.json").write_text(json.dumps(config), "utf-8")
    refused("another version", "chatglm.checkpoint.shrink", folder=out)
    (shard,) = out.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    config["quantization_config"]["version"] = 1
    (out / "config.json").write_text(json.dumps(config), "utf-8")
    refused("cut off", shard.name, folder=out)


# Refusals


def refused(*words, **options):
    with pytest.raises(ValueError) as caught:
        load(**options)
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message, message


def test_the_refusal_for_lack_of_memory_names_the_choices_that_fit(monkeypatch):
    config = translate_config(CHATGLM3_6B, "here")

    def refusal(gib, kind=None):
        monkeypatch.setattr("chatglm.checkpoint.memory.free_memory", lambda _: gib * 2**30)
        with pytest.raises(ValueError) as caught:
            check_memory(ChatGLMForConditionalGeneration, config, CPU, torch.float32, kind)
        return str(caught.value)

    # 6.2 billion numbers of 4, 2 or 1 bytes, or of half a byte with scales
    assert re.search(r"take 23.3 GiB in float32, but cpu has 8.0", refusal(8))
    assert re.search(r"fits with --quantize int8 \(6.\d GiB\) or --quantize int4 \(3.9", refusal(8))
    assert re.search(r"fits with --dtype bfloat16 \(11.6 GiB\) or --quantize int8", refusal(12))
    assert re.search(r"in int8.*fits with --quantize int4", refusal(5, "int8"))
    assert "choose a smaller model" in refusal(2)


def test_another_precision_is_refused():
    refused("'int2'", "int8", "int4", kind="int2")


def test_a_dtype_that_would_not_count_is_refused():
    refused("float32", "--dtype", kind="int8", dtype="bfloat16")


@pytest.mark.parametrize("device, file", [("cpu", "int4"), ("cuda", "quantize")])
def test_without_the_packages_one_line_says_what_to_install(monkeypatch, device, file):
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: None)
    device = torch.device(device)
    dtype = torch.float32 if device == CPU else torch.float16
    with pytest.raises(
        ValueError, match=f"pip install -r chatglm/checkpoint/requirements-{file}.txt"
    ):
        quantize.pick_quantization("int4", device, dtype)
    assert quantize.pick_quantization("int8", CPU, torch.float32)  # needs none
    assert (Path(quantize.__file__).parent / f"requirements-{file}.txt").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_another_network_than_the_config_says_are_refused(folder, kind):
    config = golden_config(ffn_hidden_size=192)
    publish(folder, config | {"ffn_hidden_size": 128}, random_state(config))
    refused("proj", "another shape", folder=folder, kind=kind)
    publish(folder, config | {"padded_vocab_size": 832}, random_state(config))
    refused("another shape", folder=folder, kind=kind)


def test_rows_that_cannot_be_cut_into_groups_are_refused_at_int4(folder):
    config = golden_config(ffn_hidden_size=80)
    publish(folder, config, random_state(config))
    refused("multiple of 32", "int8", folder=folder, kind="int4")
