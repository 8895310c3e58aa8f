"""Checkpoints as people have them on their disks: saved, copied and named by many programs."""

import json
import os
import re
import shutil
import struct

import pytest
import torch

import chatglm
from chatglm.errors import preview
from tests.original import (
    GOLDEN,
    golden,
    golden_config,
    golden_state,
    native,
    publish,
    random_state,
    write_json,
)

IDS = torch.randint(700, (2, 29), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(GOLDEN / "chatglm3", tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def load(folder, **options):
    return chatglm.load(folder, **{"device": "cpu", "dtype": "float32"} | options)


def answers(model):
    with torch.inference_mode():
        return model(IDS).logits


def is_golden(folder):
    return torch.equal(answers(load(folder)[1]), answers(golden("chatglm3")[1]))


def refused(folder, *words):
    with pytest.raises(ValueError) as caught:
        load(folder)
    message = str(caught.value)
    assert all(re.search(word, message, re.IGNORECASE) for word in words), message
    assert "\n" not in message.strip()


# JSON


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_json_is_read_in_any_of_its_encodings(folder, name, encoding):
    content = json.loads((folder / name).read_text("utf-8")) | {"comment": "我的模型"}
    text = json.dumps(content, ensure_ascii=False)
    (folder / name).write_bytes(text.encode(encoding))
    assert is_golden(folder)


def test_an_index_with_a_byte_order_mark_is_read(tmp_path):
    publish(tmp_path, golden_config(), golden_state(), shards=3)
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(b"\xef\xbb\xbf" + index.read_bytes())
    assert is_golden(tmp_path)


@pytest.mark.parametrize(
    "field",
    [
        "tie_word_embeddings",
        "eos_token_id",
        "pad_token_id",
        "_name_or_path",
        "torch_dtype",
        "quantization_bit",
        "pre_seq_len",
        "rope_ratio",
        "rmsnorm",
        "add_bias_linear",
        "architectures",
    ],
)
def test_a_field_that_is_null_counts_as_absent(folder, field):
    write_json(folder / "config.json", golden_config(**{field: None}))
    assert is_golden(folder)


@pytest.mark.parametrize("field", ["tie_word_embeddings", "torch_dtype", "eos_token_id"])
def test_a_field_that_is_null_in_a_native_checkpoint_counts_as_absent(tmp_path, field):
    native(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", config | {field: None})
    assert load(tmp_path)[0].stop_ids


def test_a_native_config_in_utf16_is_read(tmp_path):
    native(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_bytes(text.encode("utf-16"))
    assert load(tmp_path)[1].config.hidden_size == 32


# What a stranger may have written. Each of these must end in one line that names the file.

DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000


@pytest.mark.parametrize("text", [DEEP, "[" * 100_000, '{"a": ' + "[" * 500 + "]" * 500 + "}"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_json_that_is_nested_deeply_is_named(folder, name, text):
    (folder / name).write_text(text)
    refused(folder, re.escape(name), "nested")


@pytest.mark.parametrize(
    "field, value",
    [
        ("pad_token_id", "x"),
        ("eos_token_id", [[2]]),
        ("eos_token_id", 10**30),
        ("torch_dtype", ["float16"]),
        ("_name_or_path", 5),
        ("model_type", ["chatglm"]),
        ("model_type", "\ud800" * 10**6),
        ("tie_word_embeddings", {}),
        ("rope_ratio", float("nan")),
        ("rope_ratio", 10**400),
        ("layernorm_epsilon", float("inf")),
        ("num_layers", 10**400),
        ("quantization_bit", 4.5),
    ],
    ids=lambda value: preview(value)[:20].encode("ascii", "backslashreplace").decode(),
)
def test_a_field_of_a_wrong_type_is_named(folder, field, value):
    write_json(folder / "config.json", golden_config() | {field: value})
    refused(folder, "config.json", field)


@pytest.mark.parametrize("field, value", [("name_or_path", ["x"]), ("chat_template", 5)])
def test_a_field_of_a_wrong_type_in_a_tokenizer_is_named(folder, field, value):
    write_json(folder / "tokenizer_config.json", {field: value})
    refused(folder, r"tokenizer_config\.json", field)


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize("content", [3, ["x"], DEEP])
def test_a_tokenizer_file_that_is_no_object_is_named(folder, name, content):
    (folder / name).write_text(content if content is DEEP else json.dumps(content))
    refused(folder, re.escape(name))


@pytest.mark.parametrize(
    "name, content",
    [
        ("generation_config.json", []),
        ("generation_config.json", {"eos_token_id": "x"}),
        ("config.json", {"dtype": []}),
        ("config.json", {"attention_bias": "x"}),
        ("config.json", {"hidden_act": "x"}),
        ("tokenizer_config.json", {"added_tokens_decoder": 5}),
        ("tokenizer_config.json", {"chat_template": [5]}),
        ("tokenizer.json", {"model": 5}),
    ],
)
def test_a_wrong_type_in_a_native_checkpoint_is_told(tmp_path, name, content):
    native(tmp_path)
    if isinstance(content, dict) and (tmp_path / name).is_file():
        content = json.loads((tmp_path / name).read_text("utf-8")) | content
    write_json(tmp_path / name, content)
    refused(tmp_path, re.escape(name.split("_")[0].removesuffix(".json")))


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [-1, 4]},
        {"shape": [2**63, 2]},
        {"data_offsets": [-8, 4]},
        {"data_offsets": [0, float("inf")]},
        {"data_offsets": "x"},
        {"dtype": ["F32"]},
        {"dtype": "F99"},
    ],
)
def test_a_header_that_cannot_be_is_named(folder, changes):
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    [length] = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    next(entry for name, entry in header.items() if name != "__metadata__").update(changes)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    refused(folder, r"model\.safetensors", "damaged")


@pytest.mark.parametrize("depth", [200, 100_000])
def test_a_header_that_is_nested_deeply_is_named(folder, depth):
    text = ('{"a":' * depth + "1" + "}" * depth).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    refused(folder, r"model\.safetensors", "damaged")


@pytest.mark.parametrize(
    "weight_map",
    [
        ["model.safetensors"],
        *({"a": name} for name in ("../x.safetensors", "/etc/passwd", "C:\\x", "a\0", "\ud800", 5)),
    ],
)
def test_an_index_that_names_no_files_beside_it_is_named(tmp_path, weight_map):
    publish(tmp_path, golden_config(), golden_state(), shards=3)
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": weight_map})
    refused(tmp_path, r"model\.safetensors\.index\.json", "weight_map")


def test_a_name_that_counts_too_many_shards_is_not_believed(tmp_path):
    [file] = publish(tmp_path, golden_config(), golden_state())
    file.rename(tmp_path / "model-1-of-99999999999999.safetensors")
    refused(tmp_path, "no weights")


# Weights


@pytest.mark.parametrize("shards", [1, 3])
def test_a_bin_of_before_pytorch_1_6_is_read(tmp_path, monkeypatch, shards):
    save = torch.save

    def save_as_before(content, file):
        save(content, file, _use_new_zipfile_serialization=False)

    monkeypatch.setattr(torch, "save", save_as_before)
    files = publish(tmp_path, golden_config(), golden_state(), shards=shards, ending="bin")
    assert not any(file.read_bytes().startswith(b"PK") for file in files)
    assert is_golden(tmp_path)


@pytest.mark.parametrize("share", [0.001, 0.5, 0.99])
def test_an_old_bin_that_is_cut_off_is_named(tmp_path, share):
    publish(tmp_path, golden_config(), golden_state())
    (tmp_path / "model.safetensors").unlink()
    file = tmp_path / "pytorch_model.bin"
    torch.save(golden_state(), file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    refused(tmp_path, "pytorch_model.bin", "download it again")


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_an_old_bin_is_not_run(tmp_path):
    publish(tmp_path, golden_config(), golden_state())
    (tmp_path / "model.safetensors").unlink()
    state = golden_state() | {"transformer.trap": Trap(str(tmp_path / "sprung"))}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    refused(tmp_path, "pytorch_model.bin", "code")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [{"a": 1}, [torch.zeros(2)], {"model": {"a": torch.zeros(2)}}])
def test_a_bin_of_anything_but_named_tensors_is_named(tmp_path, content):
    publish(tmp_path, golden_config(), golden_state())
    (tmp_path / "model.safetensors").unlink()
    torch.save(content, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin", "tensors")


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_the_empty_tensors_of_zero_3_are_told(tmp_path, ending):
    state = {name: torch.empty(0) for name in golden_state()}
    publish(tmp_path, golden_config(), state, ending=ending)
    refused(tmp_path, "ZeRO-3", "zero_to_fp32.py")


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards_do_without_their_index(tmp_path, ending):
    publish(tmp_path, golden_config(), golden_state(), shards=3, ending=ending)
    next(tmp_path.glob("*.index.json")).unlink()
    assert is_golden(tmp_path)


def test_a_shard_that_is_missing_with_the_index_is_named(tmp_path):
    files = publish(tmp_path, golden_config(), golden_state(), shards=3)
    next(tmp_path.glob("*.index.json")).unlink()
    files[1].unlink()
    refused(tmp_path, re.escape(files[1].name))


def test_precisions_may_be_mixed(tmp_path):
    state = golden_state()
    mixed = {
        name: tensor.bfloat16() if "mlp" in name else tensor.half() if "norm" in name else tensor
        for name, tensor in state.items()
    }
    publish(tmp_path, golden_config(), mixed)
    publish(tmp_path / "full", golden_config(), {name: t.float() for name, t in mixed.items()})
    assert torch.equal(*(answers(load(where)[1]) for where in (tmp_path, tmp_path / "full")))


@pytest.mark.parametrize("tied", [True, False, None])
def test_a_tied_checkpoint_needs_its_words_once(tmp_path, tied):
    config = golden_config(tie_word_embeddings=True)
    state = random_state(config)
    publish(tmp_path / "once", config, state)
    words = state["transformer.embedding.word_embeddings.weight"]
    twice = state | {"transformer.output_layer.weight": words.clone()}
    publish(tmp_path / "twice", config | {"tie_word_embeddings": tied}, twice)
    assert torch.equal(*(answers(load(tmp_path / name)[1]) for name in ("once", "twice")))


# What else lies there


def test_other_files_do_not_matter(folder):
    (folder / "training_args.bin").write_bytes(b"not a checkpoint")
    (folder / "optimizer.pt").write_bytes(b"x")
    (folder / "pytorch_model.bin.index.json").write_text("{")
    (folder / "README.md").write_text("pre_seq_len quantization_bit base")
    (folder / ".cache").mkdir()
    (folder / "modeling_chatglm.py").write_text("raise SystemExit('run')")
    assert is_golden(folder)


@pytest.mark.skipif(os.name == "nt", reason="links need a right on Windows")
def test_links_are_followed(tmp_path, folder):
    """As in the cache of a hub: a folder of links to files named by their hashes."""
    blobs, links = tmp_path / "blobs", tmp_path / "links"
    blobs.mkdir()
    links.mkdir()
    for number, file in enumerate(folder.iterdir()):
        file.rename(blobs / f"{number:064x}")
        (links / file.name).symlink_to(blobs / f"{number:064x}")
    (tmp_path / "link").symlink_to(links, target_is_directory=True)
    assert is_golden(tmp_path / "link")


@pytest.mark.parametrize(
    "name", ["我的 模型", "a.b-c", "chatglm3-6b-base-", "chatglm2-6b-int4", "1", "$HOME & co"]
)
def test_a_folder_may_be_called_anything(tmp_path, folder, name):
    folder.rename(tmp_path / name)
    assert load(tmp_path / name)[0].chat_format == "chatglm3"
    assert is_golden(tmp_path / name)


def test_the_path_may_begin_at_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent))
    assert is_golden("~/checkpoint")
