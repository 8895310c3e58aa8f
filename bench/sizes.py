"""Networks of the published sizes, for speed alone.

    python -m bench.sizes chatglm3-6b FOLDER                # in the published format
    python -m bench.sizes chatglm3-6b FOLDER --gguf q8_0    # and FOLDER.q8_0.gguf, for llama.cpp

Their numbers are random, because speed does not depend on them, and all layers have the same ones,
which saves time here and nowhere else. The vocabulary is the bundled one, filled up. As in
weights.py, no answer ever stops early.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor

from bench import weights
from chatglm.checkpoint.files import TINY, read_json
from chatglm.text.tokenizer import COMMON_SPECIALS, ROLE_SPECIALS

# config.json of the published ChatGLM3-6B, as far as its network goes
CHATGLM3_6B: dict[str, Any] = {
    "padded_vocab_size": 65024,
    "hidden_size": 4096,
    "ffn_hidden_size": 13696,
    "num_layers": 28,
    "num_attention_heads": 32,
    "multi_query_group_num": 2,
    "kv_channels": 128,
    "seq_length": 8192,
    "layernorm_epsilon": 1e-5,
    "add_qkv_bias": True,
}
HALF = {"hidden_size": 2048, "ffn_hidden_size": 6848, "num_layers": 24, "num_attention_heads": 16}
PRESETS = {"chatglm3-6b": CHATGLM3_6B, "1.5b": CHATGLM3_6B | HALF}
DEVIATION = 0.02  # of the random numbers
LAYER = "transformer.encoder.layers.{}."


def layer_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    hidden, ffn = config["hidden_size"], config["ffn_hidden_size"]
    heads = config["num_attention_heads"] + 2 * config["multi_query_group_num"]
    qkv = heads * config["kv_channels"]
    return {
        "input_layernorm.weight": (hidden,),
        "self_attention.query_key_value.weight": (qkv, hidden),
        "self_attention.query_key_value.bias": (qkv,),
        "self_attention.dense.weight": (hidden, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.dense_h_to_4h.weight": (2 * ffn, hidden),
        "mlp.dense_4h_to_h.weight": (hidden, ffn),
    }


def random_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if "norm" in name:
        return torch.ones(shape, dtype=torch.float16)
    return torch.empty(shape).normal_(0, DEVIATION).half()


def make(preset: str, folder: Path) -> Path:
    """The checkpoint, made where it is not there yet: a file for each layer, one for the rest."""
    if folder.is_dir():
        return folder
    config, unfinished = PRESETS[preset], folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TINY / name, unfinished)
    published = {"model_type": "chatglm", "torch_dtype": "float16", **config}
    (unfinished / "config.json").write_text(json.dumps(published, indent=1), "utf-8")
    torch.manual_seed(0)
    layer = {name: random_tensor(name, shape) for name, shape in layer_shapes(config).items()}
    plan = {"rest.safetensors": ends(config)}
    for number in range(config["num_layers"]):
        tensors = {LAYER.format(number) + name: tensor for name, tensor in layer.items()}
        plan[f"layer-{number}.safetensors"] = tensors
    for file, tensors in plan.items():
        save_file(tensors, unfinished / file, metadata={"format": "pt"})
    places = {name: file for file, tensors in plan.items() for name in tensors}
    index = unfinished / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}), "utf-8")
    return unfinished.rename(folder)


def ends(config: dict) -> dict[str, torch.Tensor]:
    """What is before and behind the layers."""
    shape = (config["padded_vocab_size"], config["hidden_size"])
    output = random_tensor("output", shape)
    pieces = SentencePieceProcessor(model_file=str(TINY / "tokenizer.model")).vocab_size()
    weights.never_stop(output, pieces)
    return {
        "transformer.embedding.word_embeddings.weight": random_tensor("embedding", shape),
        "transformer.encoder.final_layernorm.weight": random_tensor("norm", shape[1:]),
        "transformer.output_layer.weight": output,
    }


# For llama.cpp. Its network of this name has q, k and v in one matrix, and so has it gate and up.
GGUF_ENDS = {
    "transformer.embedding.word_embeddings.weight": "token_embd.weight",
    "transformer.encoder.final_layernorm.weight": "output_norm.weight",
    "transformer.output_layer.weight": "output.weight",
}
GGUF_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attention.query_key_value.weight": "attn_qkv.weight",
    "self_attention.query_key_value.bias": "attn_qkv.bias",
    "self_attention.dense.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.dense_h_to_4h.weight": "ffn_up.weight",
    "mlp.dense_4h_to_h.weight": "ffn_down.weight",
}


def write_gguf(folder: Path, kind: str) -> Path:
    """FOLDER.KIND.gguf, with all matrices in `kind` (q8_0 or q4_0); in q4_0 the output layer is in
    q8_0, as this server has it in 8 bits at int4."""
    import gguf  # here, because only this needs it

    config, file = read_json(folder / "config.json"), folder.with_name(f"{folder.name}.{kind}.gguf")
    writer = gguf.GGUFWriter(file, "chatglm")
    writer.add_context_length(config["seq_length"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["ffn_hidden_size"])
    writer.add_block_count(config["num_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["multi_query_group_num"])
    writer.add_key_length(config["kv_channels"])
    writer.add_value_length(config["kv_channels"])
    writer.add_layer_norm_rms_eps(config["layernorm_epsilon"])
    writer.add_rope_dimension_count(config["kv_channels"] // 2)
    writer.add_rope_freq_base(10000)
    add_vocabulary(writer, gguf.TokenType, config["padded_vocab_size"])
    for name, tensor in gguf_tensors(folder, config["num_layers"]):
        chosen = gguf.GGMLQuantizationType.F32
        if name.endswith("weight") and "norm" not in name:
            chosen = gguf.GGMLQuantizationType[
                ("q8_0" if name == "output.weight" else kind).upper()
            ]
        writer.add_tensor(
            name, gguf.quants.quantize(tensor.float().numpy(), chosen), raw_dtype=chosen
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def gguf_tensors(folder: Path, layers: int) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in load_file(folder / "rest.safetensors").items():
        yield GGUF_ENDS[name], tensor
    for number in range(layers):
        for name, tensor in load_file(folder / f"layer-{number}.safetensors").items():
            yield f"blk.{number}.{GGUF_LAYER[name.removeprefix(LAYER.format(number))]}", tensor


def add_vocabulary(writer, types, size: int) -> None:
    words = SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))
    names = [words.id_to_piece(i) for i in range(words.vocab_size())]
    scores = [words.get_score(i) for i in range(words.vocab_size())]
    kinds = [
        types.UNKNOWN
        if words.is_unknown(i)
        else types.CONTROL
        if words.is_control(i)
        else types.BYTE
        if words.is_byte(i)
        else types.NORMAL
        for i in range(words.vocab_size())
    ]
    specials = [name if name[0] in "[<" else f"<{name}>" for name in COMMON_SPECIALS]
    for name in specials + ROLE_SPECIALS:
        names, scores, kinds = [*names, name], [*scores, 0.0], [*kinds, types.CONTROL]
    blank = range(len(names), size)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*names, *(f"[PAD{i}]" for i in blank)])
    writer.add_token_scores([*scores, *(0.0 for _ in blank)])
    writer.add_token_types([*kinds, *(types.UNUSED for _ in blank)])
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(weights.TEMPLATE)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sizes", description=__doc__.split("\n")[0]
    )
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", choices=["q8_0", "q4_0"], action="append", default=[])
    settings = parser.parse_args()
    print(make(settings.preset, settings.folder))
    for kind in settings.gguf:
        print(write_gguf(settings.folder, kind))


if __name__ == "__main__":
    main()
