"""The published ChatGLM2 and ChatGLM3 checkpoints, on transformers' own GLM network.

It is the same network under other names: RMSNorm, rotary embedding on half of each head,
grouped-query attention with fused q/k/v, SwiGLU. So nothing is computed here; this file only
translates the configuration and says where each published tensor goes.
"""

from __future__ import annotations

from transformers import GlmConfig, GlmForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Split, WeightConverter, WeightRenaming

ROPE_BASE = 10000.0  # the base of the rotary embedding; the 32k variants multiply it by rope_ratio

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

# The original has switches that every published checkpoint sets alike. GLM has only that setting.
FIXED_SETTINGS = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "multi_query_attention": True,
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "fp32_residual_connection": False,
}


class ChatGLMForConditionalGeneration(GlmForCausalLM):
    """GLM under its published ChatGLM name, so that the table below leaves `glm` itself alone."""

    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq$"]  # recomputed from the config


WEIGHTS = [
    WeightRenaming("transformer.embedding.word_embeddings", "model.embed_tokens"),
    WeightRenaming("transformer.encoder.final_layernorm", "model.norm"),
    WeightRenaming("transformer.output_layer", "lm_head"),
    WeightRenaming(r"transformer.encoder.layers.(\d+).self_attention.dense", r"model.layers.\1.self_attn.o_proj"),
    WeightRenaming(r"transformer.encoder.layers.(\d+).mlp.dense_h_to_4h", r"model.layers.\1.mlp.gate_up_proj"),
    WeightRenaming(r"transformer.encoder.layers.(\d+).mlp.dense_4h_to_h", r"model.layers.\1.mlp.down_proj"),
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


def translate_config(published: dict, where: str) -> GlmConfig:
    """The `GlmConfig` of a published ChatGLM2/3 `config.json`.

    Raises ValueError, naming `where` and the field, for a field that is missing or a setting that
    GLM does not have.
    """
    missing = [field for field in CONFIG_FIELDS if field not in published]
    if missing:
        raise ValueError(f"{where}: the ChatGLM configuration lacks {', '.join(missing)}")
    for field, wanted in FIXED_SETTINGS.items():
        if published.get(field, wanted) != wanted:
            raise ValueError(f"{where}: {field} is {published[field]}, but only {wanted} can be served "
                             "(every published ChatGLM2 and ChatGLM3 has that)")
    return GlmConfig(
        **{ours: published[theirs] for theirs, ours in CONFIG_FIELDS.items()},
        rope_parameters={
            "rope_type": "default",
            "rope_theta": ROPE_BASE * published.get("rope_ratio", 1),
            "partial_rotary_factor": 0.5,
        },
        tie_word_embeddings=published.get("tie_word_embeddings", False),
        eos_token_id=published.get("eos_token_id", 2),
        pad_token_id=published.get("pad_token_id", 0),
        architectures=["ChatGLMForConditionalGeneration"],
    )
