"""P-Tuning v2 prefixes: learned keys and values, which the attention puts in front of all others.

Two kinds of file hold them: the tensors `prefix_encoder.*` of ChatGLM's own scripts, alone or
beside a whole checkpoint, and peft's PREFIX_TUNING, as ChatGLM3's demo saves it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear
from transformers import PreTrainedModel

from chatglm.checkpoint.tensors import Tensors

ENCODER = "prefix_encoder."
PEFT_NAME = "prompt_embeddings"  # peft saves the rows as they come out of its encoder


def split_off_prefix(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """The tensors of the network, and those of its prefix by the names they have in the encoder."""
    network = {name: tensor for name, tensor in tensors.items() if ENCODER not in name}
    prefix = {
        name.partition(ENCODER)[2]: tensor for name, tensor in tensors.items() if ENCODER in name
    }
    return network, prefix


def compute_rows(parts: Tensors, where: Path) -> torch.Tensor:
    """[n, numbers] of the encoder's parts: an embedding, perhaps with two layers behind it."""
    if PEFT_NAME in parts:
        return parts[PEFT_NAME][...].float()
    try:
        rows = parts["embedding.weight"][...].float()
        if "trans.0.weight" in parts:  # prefix_projection
            first, second = (
                [parts[f"trans.{i}.{kind}"][...].float() for kind in ("weight", "bias")]
                for i in (0, 2)
            )
            rows = linear(torch.tanh(linear(rows, *first)), *second)
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{where}: its P-Tuning prefix is not whole ({error})") from error
    return rows


def add_prefix(model: PreTrainedModel, parts: Tensors, where: Path) -> None:
    """Gives each layer its part of the prefix. Raises ValueError if it is of another model."""
    rows, config = compute_rows(parts, where), model.config
    layers, groups, size = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    needed = layers * 2 * groups * size
    if rows.dim() != 2 or rows.shape[1] != needed:
        raise ValueError(
            f"{where} is a P-Tuning prefix of another model: its rows have {rows.shape[-1]} "
            f"numbers, and the base needs {needed}"
        )
    # Each row is, layer after layer, its keys and then its values.
    prefixes = rows.view(-1, layers, 2, groups, size).permute(1, 2, 3, 0, 4)  # [L, 2, G, n, d]
    network: Any = getattr(model, model.base_model_prefix)
    attentions = [getattr(layer, "self_attn", None) or layer.attention for layer in network.layers]
    for attention, prefix in zip(attentions, prefixes, strict=True):
        own = prefix.contiguous().to(model.device, model.dtype)
        attention.register_buffer("prefix", own, persistent=False)
