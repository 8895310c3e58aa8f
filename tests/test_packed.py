"""Checkpoints that were published in int4 or int8: unpacked while they are read."""

import asyncio
import json

import pytest
import torch
from safetensors.torch import save_file

import chatglm
from chatglm.checkpoint.tensors import unpack, unpack_rows
from chatglm.text.messages import to_messages
from tests.original import GOLDEN, KINDS, golden_config, publish, random_state

MATRICES = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
NAMES = ["chatglm2-int4"]


def pack(weight, bits):
    """As the original packed: each row by its largest number."""
    most = 2 ** (bits - 1) - 1
    scale = (weight.abs().amax(dim=1) / most).half()
    numbers = (weight / scale.float()[:, None]).round().clamp(-most, most).to(torch.int8)
    if bits == 4:
        numbers = (numbers[:, ::2] << 4) | (numbers[:, 1::2] & 15)
    return numbers, scale


def packed_state(state, bits):
    """(published tensors with the layers' matrices packed, the full ones that they stand for)"""
    packed, full = {}, {}
    for name, tensor in state.items():
        if name.endswith(tuple(f"{matrix}.weight" for matrix in MATRICES)):
            packed[name], packed[name + "_scale"] = pack(tensor, bits)
            full[name] = unpack_rows(packed[name], packed[name + "_scale"], bits)
        else:
            packed[name] = full[name] = tensor.half()
    return packed, full


def load(folder, **options):
    return chatglm.load(folder, **{"device": "cpu", "dtype": "float32"} | options)


def logits(model, ids):
    with torch.inference_mode():
        return model(ids).logits


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_unpacked_as_in_the_worked_example(name):
    example = json.loads((GOLDEN / name / "expected.json").read_text())["example"]
    packed = torch.tensor([example["first_row_first_4_bytes"]], dtype=torch.int8)
    scale = torch.tensor([example["weight_scale"]], dtype=torch.float16)
    row = unpack_rows(packed, scale, bits=4)[0]
    assert row.tolist() == pytest.approx(example["first_row_first_8_weights"], abs=1e-7)


@pytest.mark.parametrize("bits, least", [(4, -8), (8, -128)])
def test_every_number_that_a_byte_can_hold_comes_out_as_it_is(bits, least):
    numbers = torch.arange(least, -least)
    byte = (
        numbers.to(torch.int8)[None]
        if bits == 8
        else torch.tensor([[(a << 4) | (b & 15) for a in numbers for b in numbers]]).to(torch.int8)
    )
    out = unpack_rows(byte, torch.tensor([2.0]), bits)[0] / 2
    expected = numbers if bits == 8 else torch.cartesian_prod(numbers, numbers).flatten()
    assert out.tolist() == expected.tolist()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("ending, shards", [("bin", 1), ("bin", 3), ("safetensors", 2)])
def test_the_full_weights_that_were_packed_are_loaded(tmp_path, bits, ending, shards):
    config = golden_config()
    packed, full = packed_state(random_state(config), bits)
    publish(
        tmp_path / "packed", config | {"quantization_bit": bits}, packed, "chatglm3", shards, ending
    )
    publish(tmp_path / "full", config, full)
    ids = torch.randint(768, (2, 29))
    ours, theirs = (logits(load(tmp_path / name)[1], ids) for name in ("packed", "full"))
    assert torch.equal(ours, theirs)


def test_what_the_config_calls_packed_may_be_full(tmp_path):
    config = golden_config()
    state = random_state(config)
    publish(tmp_path, config | {"quantization_bit": 4}, state)
    publish(tmp_path / "full", config, state)
    ids = torch.randint(768, (2, 29))
    ours, theirs = (logits(load(folder)[1], ids) for folder in (tmp_path, tmp_path / "full"))
    assert torch.equal(ours, theirs)


def test_nothing_is_unpacked_before_it_is_read():
    weight, scale = pack(torch.randn(4, 8), 4)
    full = unpack({"a.weight": weight, "a.weight_scale": scale, "b": scale}, bits=4)
    assert list(full) == ["b", "a.weight"] and full["b"] is scale
    assert full["a.weight"].get_shape() == [4, 8] == list(full["a.weight"][...].shape)


@pytest.mark.parametrize("kind", KINDS)
def test_unpacked_weights_can_be_made_small_again(tmp_path, kind):
    config = golden_config(ffn_hidden_size=128)
    packed, full = packed_state(random_state(config), 4)
    publish(tmp_path / "packed", config | {"quantization_bit": 4}, packed)
    publish(tmp_path / "full", config, full)
    ids = torch.randint(768, (1, 20))
    ours, theirs = (
        logits(load(tmp_path / name, quantize=kind)[1], ids) for name in ("packed", "full")
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_chats(name, dtype):
    tokenizer, model = load(GOLDEN / name, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}

    async def ask():
        with chatglm.Engine(tokenizer, model) as engine:
            async for chunk in engine.generate(to_messages("你好"), max_new_tokens=9):
                pass
        return chunk

    assert asyncio.run(ask()).completion_tokens in range(1, 10)


def test_weights_of_another_width_than_the_config_says_are_refused(tmp_path):
    packed, _ = packed_state(random_state(golden_config()), 4)
    publish(tmp_path, golden_config(quantization_bit=8), packed)
    with pytest.raises(ValueError, match="shape|same model"):
        load(tmp_path)


def test_a_scale_without_its_matrix_is_refused(tmp_path):
    packed, _ = packed_state(random_state(golden_config()), 4)
    name = "transformer.encoder.layers.0.mlp.dense_4h_to_h.weight"
    publish(tmp_path, golden_config(quantization_bit=4), packed)
    del packed[name]
    save_file(packed, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="weight_scale|dense_4h_to_h|down_proj"):
        load(tmp_path)
