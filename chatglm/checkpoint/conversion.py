"""The published ChatGLM2 and ChatGLM3 checkpoints, on transformers' own GLM network.

It is the same network under other names: RMSNorm, rotary embedding on half of each head,
grouped-query attention with fused q/k/v, SwiGLU. So nothing is computed here; this file only
translates the configuration and says where each published tensor goes.
"""

from __future__ import annotations

from collections.abc import Iterable

from transformers import GlmConfig, GlmForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Split, WeightConverter, WeightRenaming

from chatglm.checkpoint.chatglm1 import ChatGLM1Config
from chatglm.checkpoint.fields import is_number
from chatglm.engine.cpu_glm import FusedGlmMixin
from chatglm.errors import preview

ROPE_BASE = 10000.0  # of the rotary embedding

# published field -> GlmConfig field
CONFIG_FIELDS = {
    "padded_vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "multi_query_group_num": "num_key_value_heads",
    "kv_channels": "head_dim",
    "seq_length": "max_position_embeddings",
    "layernorm_epsilon": "rms_norm_eps",
    "add_qkv_bias": "attention_bias",
}

# The first generation's fields.
CHATGLM1_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "inner_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "layernorm_epsilon": "layer_norm_eps",
    "max_sequence_length": "max_position_embeddings",
}

# The original has switches that every published checkpoint sets alike. GLM has only that setting.
FIXED_SETTINGS = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "multi_query_attention": True,
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "fp32_residual_connection": False,
}


class ChatGLMForConditionalGeneration(FusedGlmMixin, GlmForCausalLM):  # type: ignore[misc]
    """GLM under its published ChatGLM name, so that the table below leaves `glm` itself alone."""

    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq$"]  # computed from the config


WEIGHTS: list[WeightRenaming | WeightConverter] = [
    WeightRenaming("transformer.embedding.word_embeddings", "model.embed_tokens"),
    WeightRenaming("transformer.encoder.final_layernorm", "model.norm"),
    WeightRenaming("transformer.output_layer", "lm_head"),
    WeightRenaming(
        r"transformer.encoder.layers.(\d+).self_attention.dense",
        r"model.layers.\1.self_attn.o_proj",
    ),
    WeightRenaming(
        r"transformer.encoder.layers.(\d+).mlp.dense_h_to_4h", r"model.layers.\1.mlp.gate_up_proj"
    ),
    WeightRenaming(
        r"transformer.encoder.layers.(\d+).mlp.dense_4h_to_h", r"model.layers.\1.mlp.down_proj"
    ),
    WeightRenaming("transformer.encoder.layers", "model.layers"),
]
WEIGHTS += [
    WeightConverter(  # rows: all of q, then k, then v; one k and v per key/value group
        f"self_attention.query_key_value.{kind}",
        [f"self_attn.{name}_proj.{kind}" for name in "qkv"],
        operations=[Split(dim=0)],
    )
    for kind in ("weight", "bias")
]
register_checkpoint_conversion_mapping("ChatGLMForConditionalGeneration", WEIGHTS)


def translate_config(published: dict, where: str, chat_format: str = "chatglm3") -> GlmConfig:
    """The `GlmConfig` of a published ChatGLM2/3 `config.json`.

    Raises ValueError, naming `where` and the field, for a field that is missing, a size that
    cannot be, and a setting that GLM does not have.
    """
    check_fields(published, CONFIG_FIELDS, where)
    for field, wanted in FIXED_SETTINGS.items():
        if published.get(field, wanted) != wanted:
            raise ValueError(
                f"{where}: {field} is {preview(published[field])}, but only {wanted} can be "
                "served (every published ChatGLM2 and ChatGLM3 has that)"
            )
    check_groups(published, where)
    config = GlmConfig(
        **{ours: published[theirs] for theirs, ours in CONFIG_FIELDS.items()},
        rope_parameters=rope_parameters(published, chat_format),
        tie_word_embeddings=published.get("tie_word_embeddings", False),
        eos_token_id=published.get("eos_token_id", 2),
        pad_token_id=published.get("pad_token_id", 0),
        architectures=["ChatGLMForConditionalGeneration"],
    )
    # With several GPUs, each has all of the attention. In the files, q, k and v are one tensor, and
    # transformers would take a GPU's share of it before it splits them.
    config.base_model_tp_plan = {  # type: ignore[misc]
        name: style for name, style in config.base_model_tp_plan.items() if ".mlp." in name
    }
    return config


def rope_parameters(published: dict, chat_format: str) -> dict:
    """The two published ways to a longer context. ChatGLM3-6B-32k multiplies the base by
    rope_ratio; ChatGLM2-6B-32k, the only ChatGLM2 to have one, divides the positions by it."""
    ratio = published.get("rope_ratio") or 1
    is_32k = published["seq_length"] >= 32768 or "32k" in str(published.get("_name_or_path"))
    rope = {"rope_type": "default", "rope_theta": ROPE_BASE, "partial_rotary_factor": 0.5}
    if chat_format == "chatglm2" and is_32k and ratio != 1:
        return {**rope, "rope_type": "linear", "factor": float(ratio)}
    return {**rope, "rope_theta": ROPE_BASE * ratio}


def check_fields(published: dict, fields: Iterable[str], where: str) -> None:
    """Raises ValueError for a field that is missing, or that is not a size."""
    missing = [field for field in fields if field not in published]
    if missing:
        raise ValueError(f"{where}: the ChatGLM configuration lacks {', '.join(missing)}")
    for field in fields:
        value = published[field]
        kinds = {"layernorm_epsilon": (int, float), "add_qkv_bias": (bool,)}.get(field, (int,))
        if type(value) not in kinds or (field != "add_qkv_bias" and not is_number(value)):
            wanted = "true or false" if field == "add_qkv_bias" else "a number over 0"
            raise ValueError(f"{where}: {field} must be {wanted}, not {preview(value)}")


def check_groups(published: dict, where: str) -> None:
    """Raises ValueError for heads that no division into groups fits."""
    heads, groups = published["num_attention_heads"], published["multi_query_group_num"]
    if heads % groups:
        raise ValueError(
            f"{where}: num_attention_heads {heads} cannot be divided among "
            f"multi_query_group_num {groups}"
        )


def translate_chatglm1_config(
    published: dict, where: str, specials: dict[str, int]
) -> ChatGLM1Config:
    """The configuration of a first ChatGLM-6B, whose special tokens have these ids. Raises
    ValueError as above."""
    check_fields(published, CHATGLM1_FIELDS, where)
    hidden, heads = published["hidden_size"], published["num_attention_heads"]
    if hidden % heads or hidden // heads % 4:
        raise ValueError(
            f"{where}: hidden_size {hidden} cannot be divided among num_attention_heads {heads} "
            "in multiples of 4"
        )
    if not published.get("position_encoding_2d", True):
        raise ValueError(f"{where}: position_encoding_2d is False, but only True can be served")
    return ChatGLM1Config(
        **{ours: published[theirs] for theirs, ours in CHATGLM1_FIELDS.items()},
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        tie_word_embeddings=published.get("tie_word_embeddings", True),
        mask_token_id=specials["[MASK]"],
        gmask_token_id=specials["[gMASK]"],
        bos_token_id=specials["<sop>"],
        eos_token_id=specials["<eop>"],
        pad_token_id=specials["<pad>"],
        architectures=["ChatGLM1ForConditionalGeneration"],
    )
