"""P-Tuning v2 in the attention: learned keys and values in front of all others, in every layer.

They belong to the model and not to a request, so they lie beside the weights of a layer, as its
`prefix` [2, G, n, d], and not in a cache: the tokens keep their places, and requests can share
what they have in common as without a prefix. They are not rotated. (Liu et al. 2022, "P-Tuning v2")
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def with_prefix(
    module: torch.nn.Module,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    num_new: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Keys and values [B, G, K, d] of `num_new` new tokens and those before them, with the layer's
    prefix, if it has one. `mask` [..., K] is boolean or added to the scores; None is causal."""
    prefix = getattr(module, "prefix", None)
    if prefix is None:
        return key, value, mask
    first_key, first_value = prefix.expand(len(key), -1, -1, -1, -1).unbind(1)
    if mask is None and num_new > 1:
        num_keys = key.shape[2]
        sees = torch.ones(num_new, num_keys, dtype=torch.bool, device=key.device)
        mask = sees.tril(num_keys - num_new)[None, None]
    if mask is not None:  # everybody sees the prefix
        mask = pad(mask, (prefix.shape[2], 0), value=True if mask.dtype == torch.bool else 0.0)
    return torch.cat([first_key, key], dim=2), torch.cat([first_value, value], dim=2), mask


def prefixed_sdpa(module, query, key, value, attention_mask, **step):
    """transformers' sdpa attention, which is not changed for layers without a prefix."""
    if getattr(module, "prefix", None) is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **step)
    cache = step.pop("cache", None)
    if cache is not None:  # the engine's, which the library would update later
        key, value = cache.update(key, value, module.layer_idx, step)
    key, value, mask = with_prefix(module, key, value, attention_mask, query.shape[2])
    return sdpa_attention_forward(module, query, key, value, mask, **step)


# Under the library's name, because its batching and its masks go by that name.
ALL_ATTENTION_FUNCTIONS.register("sdpa", prefixed_sdpa)
