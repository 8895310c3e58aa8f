"""The published ChatGLM2 and ChatGLM3 network in plain PyTorch, and checkpoints to try it on.

`logits` is written from the published description, without regard to speed, and works on a state
dict and a config as they lie in a published checkpoint. The tests hold it against the golden
logits first, and then use it to judge shapes of which there is no golden data.
"""

import functools
import importlib.util
import json
import os
import pathlib
import shutil

import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

import chatglm

# Matrices as small as these are no work to share: threads would spend their time waiting for each
# other, twenty times as long on a busy machine.
torch.set_num_threads(1)

GOLDEN = pathlib.Path(__file__).parent / "golden"
INT4_IS_MISSING = "CI" not in os.environ and not importlib.util.find_spec("onnxruntime")
# What parametrises a test of small weights: int4 needs a package that a person may lack.
KINDS = [
    "int8",
    pytest.param("int4", marks=pytest.mark.skipif(INT4_IS_MISSING, reason="no onnxruntime here")),
]


def _norm(x, weight, epsilon):
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)


def _angles(config, length):
    """ChatGLM2-32k squeezes the positions by rope_ratio; ChatGLM3-32k raises the base by it."""
    ratio = config.get("rope_ratio", 1)
    squeezed = "chatglm2" in config.get("_name_or_path", "")
    size = config["kv_channels"] // 2
    base = 10000 if squeezed else 10000 * ratio
    turns = 1 / base ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    places = torch.arange(length, dtype=torch.float64) / (ratio if squeezed else 1)
    return torch.outer(places, turns)[:, None]  # length, 1 for the heads, pairs


def _rotate(x, angles):
    """Turn the pairs (0, 1), (2, 3), ... of each head; what is left of the head passes."""
    width = 2 * angles.shape[-1]
    even, odd = x[..., 0:width:2], x[..., 1:width:2]
    cos, sin = angles.cos(), angles.sin()
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
    return torch.cat([turned.flatten(-2), x[..., width:]], -1)


def _attention(x, config, weights):
    """x: batch, length, hidden. The fused projection holds all queries, all keys, all values."""
    heads, groups = config["num_attention_heads"], config["multi_query_group_num"]
    size = config["kv_channels"]
    fused = F.linear(x, weights("query_key_value.weight"), weights("query_key_value.bias"))
    widths = [size * heads, size * groups, size * groups]
    q, k, v = (part.unflatten(-1, (-1, size)) for part in fused.split(widths, -1))
    angles = _angles(config, x.shape[1])
    q, k = _rotate(q, angles), _rotate(k, angles)
    k, v = (part.repeat_interleave(heads // groups, 2) for part in (k, v))
    scores = torch.einsum("bqhs,bkhs->bhqk", q, k) / size**0.5
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    mixed = torch.einsum("bhqk,bkhs->bqhs", scores.masked_fill(future, -torch.inf).softmax(-1), v)
    return F.linear(mixed.flatten(2), weights("dense.weight"))


def logits(config, state, input_ids):
    """What the published network answers, in float64."""
    state = {name: tensor.double() for name, tensor in state.items()}
    epsilon = config["layernorm_epsilon"]
    words = state["transformer.embedding.word_embeddings.weight"]
    x = words[input_ids]
    for number in range(config["num_layers"]):
        layer = f"transformer.encoder.layers.{number}."
        y = _norm(x, state[layer + "input_layernorm.weight"], epsilon)
        x = x + _attention(y, config, lambda name: state.get(layer + "self_attention." + name))
        y = _norm(x, state[layer + "post_attention_layernorm.weight"], epsilon)
        gate, up = F.linear(y, state[layer + "mlp.dense_h_to_4h.weight"]).chunk(2, -1)
        x = x + F.linear(F.silu(gate) * up, state[layer + "mlp.dense_4h_to_h.weight"])
    x = _norm(x, state["transformer.encoder.final_layernorm.weight"], epsilon)
    return F.linear(x, state.get("transformer.output_layer.weight", words))


def shapes(config):
    """The tensors of a published checkpoint: name -> shape."""
    hidden, ffn, size = (config[k] for k in ("hidden_size", "ffn_hidden_size", "kv_channels"))
    own = size * config["num_attention_heads"]
    fused = own + 2 * size * config["multi_query_group_num"]
    layer = {
        "input_layernorm.weight": [hidden],
        "self_attention.query_key_value.weight": [fused, hidden],
        "self_attention.query_key_value.bias": [fused],
        "self_attention.dense.weight": [hidden, own],
        "post_attention_layernorm.weight": [hidden],
        "mlp.dense_h_to_4h.weight": [2 * ffn, hidden],
        "mlp.dense_4h_to_h.weight": [hidden, ffn],
    }
    if not config["add_qkv_bias"]:
        del layer["self_attention.query_key_value.bias"]
    words = [config["padded_vocab_size"], hidden]
    ends = {
        "transformer.embedding.word_embeddings.weight": words,
        "transformer.encoder.final_layernorm.weight": [hidden],
    }
    if not config["tie_word_embeddings"]:
        ends["transformer.output_layer.weight"] = words
    return ends | {
        f"transformer.encoder.layers.{number}.{name}": shape
        for number in range(config["num_layers"])
        for name, shape in layer.items()
    }


def random_state(config, seed=0):
    """Weights large enough that a mistake anywhere shows in the logits."""
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(config).items():
        noise = torch.randn(shape, generator=draw)
        if len(shape) == 2:
            state[name] = noise * (0.2 if "embedding" in name else shape[1] ** -0.5)
        else:
            state[name] = noise * 0.3 + ("norm" in name)
    return state


def golden_config(name="chatglm3", **changes):
    return json.loads((GOLDEN / name / "config.json").read_text()) | changes


def golden_state(name="chatglm3"):
    return load_file(GOLDEN / name / "model.safetensors")


@functools.cache
def golden(name):
    """(tokenizer, model, what the published implementation answered). An adapter is loaded on top
    of the checkpoint that it belongs to."""
    expected = json.loads((GOLDEN / name / "expected.json").read_text())
    base = expected.get("base")
    adapter = {"adapter": GOLDEN / name} if base else {}
    loaded = chatglm.load(GOLDEN / (base or name), device="cpu", dtype="float32", **adapter)
    return *loaded, expected


def write_json(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")


def publish(folder, config, state, name="chatglm3", shards=1, ending="safetensors"):
    """Lay a checkpoint down as it would be published; returns the weight files."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", config)
    for part in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(GOLDEN / name / part, folder / part)
    stem = "model" if ending == "safetensors" else "pytorch_model"
    if shards == 1:
        plan = {f"{stem}.{ending}": list(state)}
    else:
        plan = {
            f"{stem}-{part + 1:05}-of-{shards:05}.{ending}": list(state)[part::shards]
            for part in range(shards)
        }
        write_json(
            folder / f"{stem}.{ending}.index.json",
            {
                "metadata": {"total_size": sum(t.numel() * t.itemsize for t in state.values())},
                "weight_map": {key: file for file, keys in plan.items() for key in keys},
            },
        )
    for file, keys in plan.items():
        save = save_file if ending == "safetensors" else torch.save
        save({key: state[key] for key in keys}, str(folder / file))
    return [folder / file for file in plan]


TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]


LINES = ["hello there, you there", "你好，你们好。", "one\n\n\ntwo\n\n\nthree  four", "user"] * 4


def byte_level():
    """Words as GLM-4 and Qwen have them: every token is a run of bytes."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(
        LINES,
        tokenizers.trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIAL,
            show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return bpe


def byte_fallback():
    """Words as Llama 2 has them: characters, and bytes only for those that are not among them."""
    characters = sorted(set("".join(LINES)) - {" ", "\n"}) + ["▁"]
    words = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)] + characters
    bpe = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {word: place for place, word in enumerate(words)}, [], byte_fallback=True
        )
    )
    bpe.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    bpe.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    return bpe


def native(folder, kind="Glm", template=TEMPLATE, words=byte_level):
    """A small checkpoint of transformers' own, random."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words(),
        eos_token=SPECIAL[0],
        pad_token=SPECIAL[0],
        additional_special_tokens=SPECIAL[1:],
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>"])
    config = getattr(transformers, kind + "Config")(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        bos_token_id=None,
        pad_token_id=ends[0],
        eos_token_id=ends,
    )
    torch.manual_seed(0)
    model = getattr(transformers, kind + "ForCausalLM")(config)
    model.generation_config.eos_token_id = ends
    model.save_pretrained(folder)
    return folder
