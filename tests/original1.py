"""The first ChatGLM-6B's network in plain PyTorch, written from its description, in float64.

The tests hold it against the golden logits, and then judge other shapes by it.
"""

import json

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from tests.original import GOLDEN, write_json

CHATGLM1 = GOLDEN / "chatglm1"
MATRICES = {
    "attention.query_key_value": ("hidden_size", 3, "hidden_size"),
    "attention.dense": ("hidden_size", 1, "hidden_size"),
    "mlp.dense_h_to_4h": ("inner_hidden_size", 1, "hidden_size"),
    "mlp.dense_4h_to_h": ("hidden_size", 1, "inner_hidden_size"),
}


def golden1_config(**changes):
    return json.loads((CHATGLM1 / "config.json").read_text()) | changes


def golden1_state():
    return load_file(CHATGLM1 / "model.safetensors")


def positions(config, ids):
    """[2, T] and which keys [T, T] are hidden, by the original's rules, for one sequence."""
    context = ids.index(config["bos_token_id"])
    mask = ids.index(config["gmask_token_id"])
    places = torch.arange(len(ids))
    first = torch.where(places < context, places, mask)
    second = (places - context + 1).clamp(min=0)
    hidden = places[None] > places[:, None]
    hidden[:, :context] = False
    return torch.stack([first, second]), hidden


def _norm(x, state, name, epsilon):
    return F.layer_norm(x, x.shape[-1:], state[name + ".weight"], state[name + ".bias"], epsilon)


def _rotate(x, positions):
    """x [heads, T, d]: the first half of d by the first position, the second by the second."""
    parts = []
    for part, position in zip(x.chunk(2, -1), positions, strict=True):
        size = part.shape[-1]
        turns = 10000.0 ** -(torch.arange(0, size, 2).float() / size)
        angle = position.double()[:, None] * turns.half().double()
        a, b = part.chunk(2, -1)
        cos, sin = angle.cos(), angle.sin()
        parts += [a * cos - b * sin, b * cos + a * sin]
    return torch.cat(parts, -1)


def logits1(config, state, ids):
    """What the published network answers to one list of ids, [T, V]."""
    state = {name: tensor.double() for name, tensor in state.items()}
    heads, epsilon = config["num_attention_heads"], config["layernorm_epsilon"]
    where, hidden = positions(config, ids)
    words = state.get("transformer.word_embeddings.weight")
    words = state["lm_head.weight"] if words is None else words
    x = words[torch.tensor(ids)]
    for number in range(config["num_layers"]):
        layer = f"transformer.layers.{number}."

        def linear(x, name, layer=layer):
            return F.linear(x, state[f"{layer}{name}.weight"], state[f"{layer}{name}.bias"])

        a = _norm(x, state, layer + "input_layernorm", epsilon)
        qkv = linear(a, "attention.query_key_value").unflatten(-1, (heads, -1)).transpose(0, 1)
        q, k, v = qkv.chunk(3, -1)
        scores = _rotate(q, where) @ _rotate(k, where).transpose(1, 2) / q.shape[-1] ** 0.5
        mixed = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        x = 56**0.5 * a + linear(mixed.transpose(0, 1).flatten(1), "attention.dense")
        m = _norm(x, state, layer + "post_attention_layernorm", epsilon)
        h = F.gelu(linear(m, "mlp.dense_h_to_4h"), approximate="tanh")
        x = 56**0.5 * m + linear(h, "mlp.dense_4h_to_h")
    return F.linear(_norm(x, state, "transformer.final_layernorm", epsilon), words)


def random1_state(config, seed=0):
    """Weights large enough that a mistake anywhere shows in the logits."""
    draw, state = torch.Generator().manual_seed(seed), {}
    hidden = config["hidden_size"]

    def norm(name):
        state[name + ".weight"] = 1 + 0.3 * torch.randn(hidden, generator=draw)
        state[name + ".bias"] = 0.3 * torch.randn(hidden, generator=draw)

    for number in range(config["num_layers"]):
        layer = f"transformer.layers.{number}."
        norm(layer + "input_layernorm")
        norm(layer + "post_attention_layernorm")
        for name, (rows, times, columns) in MATRICES.items():
            shape = config[rows] * times, config[columns]
            state[f"{layer}{name}.weight"] = (
                torch.randn(shape, generator=draw) * 2 * shape[1] ** -0.5
            )
            state[f"{layer}{name}.bias"] = torch.randn(shape[0], generator=draw)
    norm("transformer.final_layernorm")
    words = torch.randn(config["vocab_size"], hidden, generator=draw)
    return state | {"transformer.word_embeddings.weight": words, "lm_head.weight": words.clone()}


def publish1(folder, config, state, ending="safetensors"):
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", config)
    for name in ("ice_text.model", "tokenizer_config.json"):
        (folder / name).write_bytes((CHATGLM1 / name).read_bytes())
    if ending == "safetensors":
        save_file(state, folder / "model.safetensors")
    else:
        torch.save(state, folder / "pytorch_model.bin")
    return folder
