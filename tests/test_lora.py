"""LoRA adapters by peft, merged into the base while it is read."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import chatglm
from tests.original import (
    GOLDEN,
    KINDS,
    golden,
    golden_config,
    golden_state,
    logits,
    native,
    publish,
    random_state,
    write_json,
)
from tests.test_packed import packed_state

PREFIX = "base_model.model."
LAYER = "transformer.encoder.layers.{}."
RECIPES = {
    "one": ["self_attention.query_key_value"],
    "all": [
        "self_attention.query_key_value",
        "self_attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    ],
}


def settings_of(**changes):
    return json.loads((GOLDEN / "chatglm3-lora" / "adapter_config.json").read_text()) | changes


def train(state, modules, rank=8):
    """Made-up A and B for these modules of every layer, as they are in an adapter."""
    draw, tensors = torch.Generator().manual_seed(1), {}
    for number in range(3):
        for module in modules:
            rows, columns = state[LAYER.format(number) + module + ".weight"].shape
            name = PREFIX + LAYER.format(number) + module
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, columns, generator=draw) / 8
            tensors[f"{name}.lora_B.weight"] = torch.randn(rows, rank, generator=draw) / 8
    return tensors


def merge(state, tensors, scale):
    """W + scale · B A, by the formula."""
    state = dict(state)
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            target = name.removeprefix(PREFIX).replace("lora_A.weight", "weight")
            state[target] = state[target] + scale * tensors[name.replace("_A.", "_B.")] @ a
    return state


def save(folder, tensors, ending="safetensors", **changes):
    folder.mkdir(exist_ok=True)
    write_json(folder / "adapter_config.json", settings_of(**changes))
    write = save_file if ending == "safetensors" else torch.save
    write(tensors, folder / f"adapter_model.{ending}")
    return folder


def load(base, adapter=None, **options):
    return chatglm.load(base, **{"device": "cpu", "dtype": "float32", "adapter": adapter} | options)


def answers(model, ids):
    with torch.inference_mode():
        return model(ids).logits


def is_network(model, state, config=None):
    ids = torch.randint(768, (2, 29))
    theirs = logits(config or golden_config(), state, ids)
    return torch.allclose(answers(model, ids).double(), theirs, rtol=0, atol=2e-5)


def refused(*words, base=GOLDEN / "chatglm3", adapter=None, **options):
    with pytest.raises(ValueError) as caught:
        load(base, adapter, **options)
    message = str(caught.value)
    assert all(re.search(word, message) for word in words) and "\n" not in message, message


# Merging


@pytest.mark.parametrize("modules", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_an_adapter_of_any_recipe_is_added(tmp_path, modules, ending):
    state = golden_state()
    tensors = train(state, modules)
    folder = save(tmp_path / "adapter", tensors, ending, lora_alpha=16)
    model = load(GOLDEN / "chatglm3", folder)[1]
    assert is_network(model, merge(state, tensors, 16 / 8))
    assert not is_network(model, state)


SCALES = {
    "plain": ({"lora_alpha": 4}, 4 / 8),
    "rslora": ({"lora_alpha": 4, "use_rslora": True}, 4 / 8**0.5),
    "alpha_pattern": ({"alpha_pattern": {"query_key_value": 24}}, 24 / 8),
    "alpha_pattern of others": ({"lora_alpha": 4, "alpha_pattern": {"mlp.dense": 24}}, 4 / 8),
    "rank_pattern": ({"r": 64, "lora_alpha": 4, "rank_pattern": {"query_key_value": 8}}, 4 / 8),
}


@pytest.mark.parametrize("changes, scale", SCALES.values(), ids=SCALES)
def test_the_scale_is_that_of_peft(tmp_path, changes, scale):
    state = golden_state()
    tensors = train(state, RECIPES["one"])
    model = load(GOLDEN / "chatglm3", save(tmp_path / "adapter", tensors, **changes))[1]
    assert is_network(model, merge(state, tensors, scale))


def test_names_with_the_adapter_in_them_are_understood(tmp_path):
    tensors = train(golden_state(), RECIPES["one"])
    named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}
    model = load(GOLDEN / "chatglm3", save(tmp_path / "adapter", named, lora_alpha=8))[1]
    assert is_network(model, merge(golden_state(), tensors, 1))


def test_dora_brings_each_row_to_its_own_length(tmp_path):
    state = golden_state()
    tensors = train(state, RECIPES["one"])
    tuned = merge(state, tensors, 2)
    for number in range(3):
        name = LAYER.format(number) + "self_attention.query_key_value"
        length = torch.rand(128) + 0.5
        tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = length
        weight = tuned[name + ".weight"]
        tuned[name + ".weight"] = weight * (length / weight.norm(dim=1))[:, None]
    folder = save(tmp_path / "adapter", tensors, lora_alpha=16, use_dora=True)
    assert is_network(load(GOLDEN / "chatglm3", folder)[1], tuned)


def test_modules_trained_in_full_take_the_place_of_the_bases(tmp_path):
    state = golden_state()
    tensors = train(state, RECIPES["one"])
    tuned = merge(state, tensors, 1)
    name, bias = "transformer.output_layer.weight", LAYER.format(0) + RECIPES["one"][0] + ".bias"
    tuned[name], tuned[bias] = torch.randn(768, 64), torch.randn(128)
    saved = bias.replace(".bias", ".base_layer.bias")  # as peft names it
    tensors |= {PREFIX + name: tuned[name], PREFIX + saved: tuned[bias]}
    folder = save(
        tmp_path / "adapter",
        tensors,
        lora_alpha=8,
        bias="lora_only",
        modules_to_save=["output_layer"],
    )
    assert is_network(load(GOLDEN / "chatglm3", folder)[1], tuned)


# Bases


def test_an_adapter_is_added_to_a_packed_base(tmp_path):
    packed, full = packed_state(golden_state(), 4)
    publish(tmp_path, golden_config(quantization_bit=4), packed)
    tensors = train(full, RECIPES["all"])
    folder = save(tmp_path / "adapter", tensors, lora_alpha=8)
    full = {name: tensor.float() for name, tensor in full.items()}
    assert is_network(load(tmp_path, folder)[1], merge(full, tensors, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_can_be_made_small(tmp_path, kind):
    config = golden_config(ffn_hidden_size=128)

    state = random_state(config)
    tensors = train(state, RECIPES["all"])
    publish(tmp_path, config, state)
    publish(tmp_path / "merged", config, merge(state, tensors, 1))
    folder = save(tmp_path / "adapter", tensors, lora_alpha=8)
    ids = torch.randint(768, (1, 20))
    ours = answers(load(tmp_path, folder, quantize=kind)[1], ids)
    theirs = answers(load(tmp_path / "merged", quantize=kind)[1], ids)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3 * theirs.abs().max())


def test_an_adapter_of_a_model_that_transformers_knows_is_added(tmp_path):
    native(tmp_path, "Qwen2")
    base = load_file(tmp_path / "model.safetensors")
    a, b = torch.randn(4, 32), torch.randn(32, 4)
    name = "model.layers.1.self_attn.q_proj"
    tensors = {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
    folder = save(tmp_path / "adapter", tensors, r=4, lora_alpha=4)
    weights = load(tmp_path, folder)[1].state_dict()
    torch.testing.assert_close(weights[name + ".weight"], base[name + ".weight"] + b @ a)


# Refusals


def test_an_adapter_given_as_a_model_says_what_to_type():
    refused("--model THUDM/chatglm3-6b --adapter .*chatglm3-lora", base=GOLDEN / "chatglm3-lora")


def test_an_adapter_of_another_model_is_refused_by_names(tmp_path):
    name = PREFIX + "model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {name.format("A"): torch.zeros(8, 64), name.format("B"): torch.zeros(64, 8)}
    folder = save(tmp_path / "adapter", tensors, base_model_name_or_path="Qwen/Qwen2-7B")
    refused("Qwen/Qwen2-7B", "layers.0.self_attn.q_proj", adapter=folder)


def test_an_adapter_of_another_model_is_refused_by_shapes(tmp_path):
    tensors = train(golden_state(), RECIPES["one"])
    wide = {name: torch.cat([t, t], -1) if "_A" in name else t for name, t in tensors.items()}
    folder = save(tmp_path / "adapter", wide)
    refused("query_key_value", r"\[128, 128\]", r"\[128, 64\]", adapter=folder)


def test_an_adapter_with_half_of_its_tensors_is_refused(tmp_path):
    tensors = train(golden_state(), RECIPES["one"])
    del tensors[next(name for name in tensors if "lora_B" in name)]
    refused("half", adapter=save(tmp_path / "adapter", tensors))


KINDS = {
    "peft_type": "IA3",
    "layer_replication": [[0, 2]],
    "lora_bias": True,
    "init_lora_weights": "pissa_niter_4",
    "r": None,
}


@pytest.mark.parametrize("field", KINDS)
def test_what_is_not_an_ordinary_lora_is_refused_by_name(tmp_path, field):
    tensors = train(golden_state(), RECIPES["one"])
    folder = save(tmp_path / "adapter", tensors, **{field: KINDS[field]})
    refused(field, adapter=folder)


def test_an_adapter_without_weights_is_refused(tmp_path):
    folder = save(tmp_path / "adapter", train(golden_state(), RECIPES["one"]))
    (folder / "adapter_model.safetensors").unlink()
    refused("adapter_model.safetensors", adapter=folder)


def test_an_adapter_that_does_not_exist_is_refused(tmp_path):
    refused("nowhere", adapter=tmp_path / "nowhere")


def test_a_model_is_not_an_adapter(tmp_path):
    shutil.copytree(GOLDEN / "chatglm3", tmp_path / "full")
    refused("not an adapter", adapter=tmp_path / "full")


def test_the_golden_adapter_changes_the_answers():
    ids = torch.randint(700, (1, 20))
    assert (
        answers(golden("chatglm3-lora")[1], ids) - answers(golden("chatglm3")[1], ids)
    ).norm() > 1
