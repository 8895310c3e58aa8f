"""Loading checkpoints: the network is the published one, and what cannot be loaded is refused."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import chatglm
from chatglm.text.messages import to_messages
from tests.original import (
    GOLDEN,
    golden,
    golden_config,
    golden_state,
    logits,
    native,
    publish,
    random_state,
    shapes,
    write_json,
)
from tests.servers import LIMIT

NAMES = ["chatglm2", "chatglm3"]
LFS = (
    "version https://git-lfs.github.com/spec/v1\n"
    f"oid sha256:{'0123456789abcdef' * 4}\nsize 1980372312\n"
)


@pytest.fixture
def folder(tmp_path_factory):
    """tmp_path would carry the name of the test, and some of these tests are about names."""
    return tmp_path_factory.mktemp("checkpoint")


@pytest.fixture
def copy_of(folder):
    """A golden checkpoint in a folder of its own, with changes to its config."""

    def make(name="chatglm3", remove=(), **changes):
        shutil.copytree(GOLDEN / name, folder, dirs_exist_ok=True)
        config = golden_config(name, **changes)
        write_json(folder / "config.json", {k: v for k, v in config.items() if k not in remove})
        return folder

    return make


def load(folder, **options):
    return chatglm.load(str(folder), **{"device": "cpu", "dtype": "float32"} | options)


def refused(folder, *words, **options):
    """Loading is refused in one line that has each of these patterns in it."""
    with pytest.raises(ValueError) as caught:
        load(folder, **options)
    message = str(caught.value)
    for word in words:
        assert re.search(word, message, re.IGNORECASE), message
    assert "\n" not in message.strip()
    return message


def answers(model, input_ids):
    with torch.inference_mode():
        return model(input_ids).logits


def same_as_published(config, state, folder, **options):
    input_ids = torch.randint(config["padded_vocab_size"], (2, 29))
    ours = answers(load(folder, **options)[1], input_ids)
    theirs = logits(config, state, input_ids)
    return torch.allclose(ours.double(), theirs, rtol=0, atol=1e-5 * theirs.abs().max())


# Golden data


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_in_these_tests_is_the_published_network(name):
    expected = load_file(GOLDEN / name / "expected_logits.safetensors")
    ours = logits(golden_config(name), golden_state(name), expected["input_ids"])
    torch.testing.assert_close(ours.float(), expected["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_streamed_answer_grows_into_that_of_chat(name):
    tokenizer, model, _ = golden(name)
    options = {"temperature": 0, "max_length": 60}
    steps = list(model.stream_chat(tokenizer, "Tell me 🚀", [["a", "b"]], **options))
    texts = [text for text, _ in steps]
    assert all(late.startswith(early) for early, late in zip(texts, texts[1:], strict=False))
    assert steps[-1] == model.chat(tokenizer, "Tell me 🚀", [["a", "b"]], **options)


ROLES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize("history", [[["a", "b"]], ROLES], ids=["pairs", "roles"])
def test_the_history_of_a_chat_is_that_of_the_next(history):
    tokenizer, model, _ = golden("chatglm3")
    before = json.dumps(history)
    response, after = model.chat(tokenizer, "c", history, temperature=0, max_length=40)
    said = [message["content"] for message in to_messages("d", after)]
    assert said == ["a", "b", "c", response, "d"]
    assert json.dumps(history) == before
    assert type(after[-1]) is type(history[-1])


def test_transformers_own_glm_loads_as_if_we_were_not_here(folder):
    golden("chatglm3")
    native(folder, "Glm")
    model, report = transformers.GlmForCausalLM.from_pretrained(folder, output_loading_info=True)
    saved = load_file(folder / "model.safetensors")
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


def test_transformers_own_glm_does_not_come_to_know_the_published_names(folder):
    golden("chatglm3")
    native(folder, "Glm")
    save_file(golden_state(), folder / "model.safetensors")
    _, report = transformers.GlmForCausalLM.from_pretrained(
        folder, output_loading_info=True, ignore_mismatched_sizes=True
    )
    assert any("encoder.layers" in name for name in report["unexpected_keys"])


# Other shapes

SHAPES = {
    "golden": {},
    "one group": {"multi_query_group_num": 1},
    "as many groups as heads": {"multi_query_group_num": 4},
    "heads of 8": {"kv_channels": 8},
    "heads of 20": {"kv_channels": 20},
    "heads of 10": {"kv_channels": 10},
    "five heads": {"num_attention_heads": 5, "multi_query_group_num": 1, "kv_channels": 12},
    "coarse epsilon": {"layernorm_epsilon": 1e-3},
    "long context": {"rope_ratio": 50},
    "no bias": {"add_qkv_bias": False},
    "tied": {"tie_word_embeddings": True},
    "one layer": {"num_layers": 1},
    "twelve layers": {"num_layers": 12},
    "many words": {"padded_vocab_size": 1000},
    "uneven": {"hidden_size": 40, "ffn_hidden_size": 52},
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_other_shapes_are_computed_as_published(folder, changes):
    config = golden_config(**changes)
    state = random_state(config)
    publish(folder, config, state)
    assert same_as_published(config, state, folder)


@pytest.mark.parametrize("name", ["coarse epsilon", "long context"])
def test_the_reference_tells_these_apart(name):
    """The shapes stay as they are here, so the test above might pass without the change."""
    state, input_ids = random_state(golden_config()), torch.randint(768, (2, 29))
    plain, changed = (
        logits(golden_config(**SHAPES[which]), state, input_ids) for which in ("golden", name)
    )
    assert (plain - changed).abs().max() > 1e-2 * plain.abs().max()


def test_chatglm2_with_a_long_context_is_computed_as_published_or_refused(folder):
    # chatglm2-6b-32k squeezes the positions by rope_ratio, which chatglm3-6b-32k does not
    config = golden_config("chatglm2", rope_ratio=16, _name_or_path="THUDM/chatglm2-6b-32k")
    state = random_state(config)
    publish(folder, config, state, "chatglm2")
    try:
        assert same_as_published(config, state, folder)
    except ValueError as refusal:
        assert "rope_ratio" in str(refusal)


FILES = {
    "one": (1, "safetensors"),
    "shards": (3, "safetensors"),
    "bin shards": (2, "bin"),
    "one bin": (1, "bin"),
}


@pytest.mark.parametrize("inv_freq", [True, False])
@pytest.mark.parametrize("shards, ending", FILES.values(), ids=FILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_published_kind_of_file_is_read(folder, shards, ending, dtype, inv_freq):
    config = golden_config(torch_dtype=str(dtype).removeprefix("torch."))
    state = {name: tensor.to(dtype) for name, tensor in random_state(config).items()}
    extra = {"transformer.rotary_pos_emb.inv_freq": torch.rand(4).to(dtype)} if inv_freq else {}
    publish(folder, config, extra | state, shards=shards, ending=ending)
    assert same_as_published(config, state, folder)


def test_safetensors_are_enough_where_a_bin_is_broken(folder):
    config, state = golden_config(), golden_state()
    publish(folder, config, state)
    (folder / "pytorch_model.bin").write_bytes(b"rubbish")
    assert same_as_published(config, state, folder)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_dtype_asked_for_is_the_one_loaded(dtype):
    model = load(GOLDEN / "chatglm3", dtype=dtype)[1]
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert answers(model, torch.tensor([[701, 703]])).isfinite().all()


def test_a_half_precision_checkpoint_chats_when_nothing_is_asked_for(folder):
    state = {name: tensor.half() for name, tensor in golden_state().items()}
    publish(folder, golden_config(torch_dtype="float16"), state)
    tokenizer, model = chatglm.load(str(folder))
    assert isinstance(model.chat(tokenizer, "你好", max_length=20)[0], str)


def test_a_config_saved_by_a_fine_tuning_means_the_same(copy_of):
    folder = copy_of(
        quantization_bit=0,
        pre_seq_len=None,
        prefix_projection=False,
        classifier_dropout=None,
        vocab_size=768,
        rope_ratio=1,
    )
    assert same_as_published(golden_config(), golden_state(), folder)


# A config may ask for another network; to compute the usual one instead would be gibberish.
OTHER_NETWORKS = {
    "rmsnorm": False,
    "post_layer_norm": False,
    "add_bias_linear": True,
    "apply_residual_connection_post_layernorm": True,
    "multi_query_attention": False,
}


@pytest.mark.parametrize("field", OTHER_NETWORKS)
def test_a_network_that_is_not_the_published_one_is_refused(copy_of, field):
    refused(copy_of(**{field: OTHER_NETWORKS[field]}), field)


# Which chat format

NAMELESS = {"_name_or_path": ""}


def nameless(folder, tokenizer_config=None):
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "ChatGLMTokenizer"} | (tokenizer_config or {}),
    )
    return folder


@pytest.mark.parametrize("name", ["chatglm2", "chatglm3"])
@pytest.mark.parametrize("path", ["THUDM/{}-6b", "zai-org/{}-6b-32k", "models/{}", "my-{}-tuned"])
def test_the_chat_format_is_told_by_the_name_in_the_config(copy_of, name, path):
    folder = nameless(copy_of("chatglm3", _name_or_path=path.format(name)))
    assert load(folder)[0].chat_format == name


@pytest.mark.parametrize("name", ["chatglm2", "chatglm3"])
def test_the_chat_format_is_told_by_the_name_in_the_tokenizer_config(copy_of, name):
    folder = nameless(copy_of(remove=NAMELESS), {"name_or_path": f"THUDM/{name}-6b"})
    assert load(folder)[0].chat_format == name


@pytest.mark.parametrize("name", ["chatglm2", "chatglm3"])
def test_the_name_of_the_folder_counts_where_the_files_name_no_generation(folder, name):
    shutil.copytree(GOLDEN / "chatglm3", folder / f"my-{name}")
    write_json(
        folder / f"my-{name}" / "config.json", golden_config(_name_or_path="./output/checkpoint-9")
    )
    assert load(nameless(folder / f"my-{name}"))[0].chat_format == name


CODE = {
    "chatglm2": """
class ChatGLMTokenizer(PreTrainedTokenizer):
    def build_prompt(self, query, history=None):
        prompt = ""
        for i, (old_query, response) in enumerate(history or []):
            prompt += "[Round {}]\\n\\n问：{}\\n\\n答：{}\\n\\n".format(i + 1, old_query, response)
        return prompt
""",
    "chatglm3": """
class SPTokenizer:
    def __init__(self, model_path):
        role_special_tokens = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
        special_tokens = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"] + role_special_tokens

class ChatGLMTokenizer(PreTrainedTokenizer):
    def build_single_message(self, role, metadata, message):
        assert role in ["system", "user", "assistant", "observation"], role
        role_tokens = [self.get_command(f"<|{role}|>")] + self.tokenizer.encode(f"{metadata}\\n")
""",
}


@pytest.mark.parametrize("name", ["chatglm2", "chatglm3"])
def test_the_chat_format_is_told_by_code_that_is_never_run(copy_of, name):
    folder = nameless(
        copy_of(remove=NAMELESS),
        {"auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}},
    )
    for part in ("tokenization", "modeling", "configuration"):
        code = CODE[name] if part == "tokenization" else ""
        (folder / f"{part}_chatglm.py").write_text("raise SystemExit('run')\n" + code, "utf-8")
    assert load(folder)[0].chat_format == name


@pytest.mark.parametrize("name", ["chatglm2", "chatglm3"])
def test_a_chat_format_asked_for_overrides_every_name(name):
    other = golden(name)[2]["chats"][0]
    folder = GOLDEN / ("chatglm2" if name == "chatglm3" else "chatglm3")
    tokenizer = load(folder, chat_format=name)[0]
    assert tokenizer.chat_format == name
    assert tokenizer.encode_chat(to_messages(other["query"], [])) == other["input_ids"]


def test_without_any_name_a_chat_format_must_be_given(copy_of):
    folder = nameless(copy_of(remove=NAMELESS))
    refused(folder, "chat.format", "chatglm2", "chatglm3")
    assert load(folder, chat_format="chatglm2")[0].chat_format == "chatglm2"


def test_an_unknown_chat_format_is_refused():
    refused(GOLDEN / "chatglm3", "chatml", "chatglm3", chat_format="chatml")


# Refusals: files


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def test_a_path_that_does_not_exist_is_refused(folder):
    refused(folder / "nowhere", "nowhere")


def test_a_file_is_no_checkpoint(folder):
    refused(GOLDEN / "chatglm3" / "config.json", "config.json")


def test_a_folder_without_a_checkpoint_is_refused(folder):
    (folder / "holiday.jpg").write_bytes(b"x")
    refused(folder, re.escape(str(folder)), "config.json")


def test_a_checkpoint_without_weights_is_refused(copy_of):
    folder = copy_of()
    (folder / "model.safetensors").unlink()
    refused(folder, re.escape(str(folder)), "safetensors|weights")


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_missing_shard_is_named(folder, ending):
    shard = publish(folder, golden_config(), golden_state(), shards=3, ending=ending)[1]
    shard.unlink()
    refused(folder, re.escape(shard.name))


@pytest.mark.parametrize("share", [0, 0.0001, 0.002, 0.5, 0.999])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_file_cut_short_is_named(folder, ending, shards, share):
    file = publish(folder, golden_config(), golden_state(), shards=shards, ending=ending)[-1]
    cut(file, share)
    refused(folder, re.escape(file.name))


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("text", ["", "rubbish", "[]", "{}", '{"weight_map": 5}'])
def test_a_broken_index_is_named(folder, ending, text):
    publish(folder, golden_config(), golden_state(), shards=3, ending=ending)
    index = next(folder.glob("*.index.json"))
    index.write_text(text)
    refused(folder, re.escape(index.name))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "tokenizer.model"])
def test_a_git_lfs_pointer_is_recognised(copy_of, file):
    folder = copy_of()
    if file == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / file).write_text(LFS)
    refused(folder, re.escape(file), "lfs")


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_git_lfs_pointer_among_shards_is_recognised(folder, ending):
    shard = publish(folder, golden_config(), golden_state(), shards=3, ending=ending)[2]
    shard.write_text(LFS)
    refused(folder, re.escape(shard.name), "lfs")


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_bin_with_code_in_it_is_refused_and_its_code_not_run(folder):
    state = golden_state() | {"transformer.trap": Trap(str(folder / "sprung"))}
    publish(folder, golden_config(), state, ending="bin")
    refused(folder, "pytorch_model.bin")
    assert not (folder / "sprung").exists()


def test_a_missing_tokenizer_is_named(copy_of):
    folder = copy_of()
    (folder / "tokenizer.model").unlink()
    refused(folder, "tokenizer.model")


@pytest.mark.parametrize("content", [b"", b"rubbish\n" * 100, bytes(range(256)) * 40])
def test_a_rubbish_tokenizer_is_named(copy_of, content):
    folder = copy_of()
    (folder / "tokenizer.model").write_bytes(content)
    refused(folder, "tokenizer.model")


@pytest.mark.parametrize("text", ["", "not json", '{"model_type": "chatglm"', "[]", "5", "\xff"])
def test_a_config_that_is_no_json_object_is_named(copy_of, text):
    folder = copy_of()
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    refused(folder, "config.json")


@pytest.mark.parametrize("text", ["not json", "[]"])
def test_a_tokenizer_config_that_is_no_json_object_is_named(copy_of, text):
    folder = copy_of(_name_or_path="")
    (folder / "tokenizer_config.json").write_text(text)
    refused(folder, "tokenizer_config.json")


# Refusals: what is in the files


@pytest.mark.parametrize(
    "field",
    [
        "model_type",
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "kv_channels",
        "padded_vocab_size",
    ],
)
def test_a_config_without_a_field_is_refused(copy_of, field):
    refused(copy_of(remove=[field]), field)


@pytest.mark.parametrize("value", ["three", None, -1, 0, 2.5])
@pytest.mark.parametrize("field", ["num_layers", "hidden_size", "num_attention_heads"])
def test_a_size_that_is_no_size_is_refused(copy_of, field, value):
    refused(copy_of(**{field: value}), field + "|config.json")


def test_groups_that_do_not_divide_the_heads_are_refused(folder):
    config = golden_config(multi_query_group_num=3)
    publish(folder, config, random_state(config))
    refused(folder, "multi_query_group_num|groups|config.json")


def test_an_unknown_model_type_is_named(copy_of):
    refused(copy_of(model_type="parrot"), "parrot")


@pytest.mark.parametrize("changes", [{"quantization_bit": 2}, {"quantization_config": {"bits": 4}}])
def test_a_checkpoint_quantised_in_another_way_is_refused(copy_of, changes):
    refused(copy_of(**changes), "quantised", "--quantize int4")


@pytest.mark.parametrize("name", ["chatglm3-6b-knowledgebase", "chatglm3-6b-databases", "base"])
def test_a_name_that_only_has_these_letters_in_it_is_not_a_base_model(copy_of, name):
    assert load(copy_of(_name_or_path=f"me/{name}"))[0].chat_format == "chatglm3"


@pytest.mark.parametrize("both", [True, False])
def test_a_base_model_is_recognised(copy_of, both):
    name = "THUDM/chatglm3-6b-base"
    folder = nameless(copy_of(_name_or_path=name), {"name_or_path": name} if both else {})
    refused(folder, "base")


def test_a_tensor_of_another_shape_is_named(copy_of):
    folder = copy_of()
    state = golden_state()
    state["transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"] = torch.zeros(64, 97)
    save_file(state, folder / "model.safetensors")
    refused(folder, r"layers\.1\.mlp\.(dense_4h_to_h|down_proj)", "97", "96")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 128},
        {"ffn_hidden_size": 95},
        {"padded_vocab_size": 769},
        {"multi_query_group_num": 1},
        {"multi_query_group_num": 4},
        {"kv_channels": 8},
        {"num_attention_heads": 8},
        {"add_qkv_bias": False},
        {"num_layers": 4},
        {"num_layers": 2},
    ],
    ids=str,
)
def test_weights_of_another_network_than_the_config_says_are_refused(copy_of, changes):
    folder = copy_of(**changes)
    refused(folder, "shape|size|missing|lacks|tensor|config.json|" + next(iter(changes)))


@pytest.mark.parametrize(
    "changes", [{"kv_channels": 8}, {"num_layers": 4}, {"hidden_size": 128}], ids=str
)
def test_a_refusal_says_all_there_is_to_say(copy_of, changes):
    """Whoever starts a server with it is to read one line, not a library's report."""
    said, handler = [], logging.Handler()
    handler.emit = said.append
    transformers.logging.add_handler(handler)
    try:
        refused(copy_of(**changes))
    finally:
        transformers.logging.remove_handler(handler)
    assert not said, said[0].getMessage()


@pytest.mark.parametrize("name", shapes(golden_config(num_layers=1)))
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_missing_tensor_is_refused(folder, name, ending):
    state = golden_state()
    del state[name]
    publish(folder, golden_config(), state, shards=2, ending=ending)
    refused(folder, re.escape(str(folder)) + "|" + re.escape(name))


# Refusals: this machine


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_weights_that_do_not_fit_are_refused_before_they_are_loaded(folder, ending):
    config = golden_config(
        num_layers=200,
        hidden_size=65536,
        ffn_hidden_size=250000,
        num_attention_heads=512,
        kv_channels=128,
        padded_vocab_size=65024,
    )
    publish(folder, config, golden_state(), ending=ending)
    message = refused(folder, "needs?|takes?", "free|available")
    assert len(re.findall(r"\d[\d.,]* ?[KMGT]i?B", message)) >= 2, message


@pytest.mark.parametrize("device", ["gpu", "tpu", "", "cpu:banana", "cuda:99"])
def test_device_nonsense_is_refused(device):
    refused(GOLDEN / "chatglm3", "device", device.partition(":")[0] or "''", device=device)


@pytest.mark.parametrize("dtype", ["float7", "int8", "float64x", "", "cpu"])
def test_dtype_nonsense_is_refused(dtype):
    refused(GOLDEN / "chatglm3", "dtype", dtype, "float32", dtype=dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there_is_refused(device):
    refused(GOLDEN / "chatglm3", "cuda", "cpu", device=device)


# What loading takes


def run_python(code, *arguments):
    """In a process of its own, without the switches that would keep it off the network."""
    env = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE")}
    env["OMP_NUM_THREADS"] = "1"  # see original.py
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=env,
        text=True,
        capture_output=True,
        timeout=LIMIT,
        cwd=GOLDEN.parent.parent,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


NO_NETWORK = """
import socket, sys
asked = []
def refuse(*arguments, **more):
    asked.append(arguments)
    raise OSError("there is no network here")
socket.getaddrinfo = socket.gethostbyname = socket.create_connection = refuse
socket.socket.connect = socket.socket.connect_ex = refuse
import chatglm
for path in [None, *sys.argv[1:]]:
    tokenizer, model = chatglm.load(path, device="cpu")
    model.chat(tokenizer, "hello", max_length=40)
print("asked:", asked)
"""


def test_nothing_is_asked_of_the_network(folder):
    native(folder)
    out = run_python(NO_NETWORK, GOLDEN / "chatglm2", GOLDEN / "chatglm3", folder)
    assert out.splitlines()[-1] == "asked: []"


MEMORY = """
import gc, sys, threading, time
import chatglm, torch

def resident():
    # ru_maxrss would not do: it begins with what the process that started this one had
    with open("/proc/self/status") as file:
        sizes = dict(line.split(":") for line in file)
    return [int(sizes[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS")]

def watch():
    global most
    while True:
        most = [max(pair) for pair in zip(most, resident())]
        time.sleep(0.001)

# what the first load brings in besides weights is not what this is about
chatglm.load(sys.argv[1], device="cpu", dtype="float32")
most = resident()
threading.Thread(target=watch, daemon=True).start()
for path in sys.argv[2:]:
    most = before = resident()
    model = chatglm.load(path, device="cpu", dtype="float32")[1]
    # what is only mapped from the file takes nothing until it is used
    model(torch.tensor([[5, 6, 7]]))
    most = [max(pair) for pair in zip(most, resident())]  # `watch` may not have had its turn
    print(*(peak - was for peak, was in zip(most, before)),
          sum(p.numel() * p.itemsize for p in model.parameters()))
    del model
    gc.collect()
"""


@pytest.fixture
def large(folder):
    """A state of some 300 MB and its config; every layer has the same weights, to save time."""
    config = golden_config(
        num_layers=6, hidden_size=1024, ffn_hidden_size=3300, num_attention_heads=16, kv_channels=64
    )
    layer = random_state(config | {"num_layers": 1})
    yield config, {name: layer[re.sub(r"layers\.\d", "layers.0", name)] for name in shapes(config)}
    shutil.rmtree(folder)  # pytest keeps what tests leave, three runs of it


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc here")
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_loading_takes_the_weights_and_one_shard(folder, large, ending):
    config, state = large
    files = {
        dtype: publish(
            folder / str(dtype),
            config,
            {name: tensor.to(dtype, copy=True) for name, tensor in state.items()},
            shards=6,
            ending=ending,
        )
        for dtype in (torch.float32, torch.float16)
    }
    out = run_python(MEMORY, GOLDEN / "chatglm3", *(folder / str(dtype) for dtype in files))
    for line, (dtype, shards) in zip(out.splitlines(), files.items(), strict=True):
        own, resident, weights = map(int, line.split())
        sizes = [shard.stat().st_size for shard in shards]
        allowed = weights + max(sizes) + 64 * 2**20
        # pages of a mapped file are resident too, as long as nobody else needs the room
        mapped = 0 if dtype == torch.float32 else sum(sizes)
        assert 250e6 < weights < 350e6 and max(sizes) < 70e6
        assert own < allowed and 0.5 * weights < resident < allowed + mapped, (own, resident)
