"""Checkpoints as people have them on their disks: saved, copied and named by many programs."""

import json
import os
import re
import shutil

import pytest
import torch

import chatglm
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
