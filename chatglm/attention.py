"""Attention over the paged cache on a CPU: each request with its own keys only.

transformers' continuous batching lays all requests of a step in one row and masks what is not a
request's own. With 64 requests, 63 of 64 products are thrown away; and since 0 times NaN is NaN, a
request whose numbers are broken breaks its neighbours'. A GPU takes the library's way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class Plan(NamedTuple):
    """Where the requests of a step lie; the same for every layer."""

    prefill: list[tuple[slice, slice]]  # new tokens, and keys, of each request with several new
    tokens: torch.Tensor                # [B], the token of each request with one new
    keys: torch.Tensor                  # [B, L], its keys, filled up with its first
    own: torch.Tensor                   # [B, 1, 1, L], which of them count


def make_plan(q_ends: list[int], k_ends: list[int]) -> Plan:
    """From the cumulative numbers of new tokens and of keys, both with a 0 in front."""
    spans = [(slice(*q_ends[i : i + 2]), slice(*k_ends[i : i + 2]))
             for i in range(len(q_ends) - 1)]
    single = [(q.start, k) for q, k in spans if q.stop - q.start == 1]
    starts = torch.tensor([k.start for _, k in single])[:, None]                      # [B, 1]
    lengths = torch.tensor([k.stop - k.start for _, k in single])[:, None]
    steps = torch.arange(max((k.stop - k.start for _, k in single), default=0))       # [L]
    own = steps < lengths
    return Plan([(q, k) for q, k in spans if q.stop - q.start > 1],
                torch.tensor([token for token, _ in single]),
                torch.where(own, starts + steps, starts), own[:, None, None])


def install() -> None:
    """Makes it what continuous batching finds as "sdpa"; all else goes the library's own way."""
    ALL_ATTENTION_FUNCTIONS["sdpa"] = paged_attention


def paged_attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor,
                    value: torch.Tensor, attention_mask: torch.Tensor | None,
                    **kwargs) -> tuple[torch.Tensor, None]:
    """Attention of `query` [1, H, T, d], the T new tokens of all requests one after the other, to
    their own keys: those in the paged cache, and the new `key` and `value` [1, G, T, d]."""
    cache = kwargs.get("cache")
    if cache is None or query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    key, value = cache.update(key, value, module.layer_idx, kwargs)             # [1, G, K, d]
    scale = kwargs.get("scaling")
    if query.shape[2] == 1:  # one request, one new token: all keys are its own
        alone = scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True)
        return alone.transpose(1, 2), None
    if module.layer_idx == 0:
        cache.plan = make_plan(kwargs["cu_seq_lens_q"].tolist(), kwargs["cu_seq_lens_k"].tolist())
    plan = cache.plan
    out = torch.empty_like(query[0].transpose(0, 1))                                  # [T, H, d]
    for q, k in plan.prefill:
        mask = attention_mask[..., q, k]
        mine = prefill(query[:, :, q], key[:, :, k], value[:, :, k], mask, scale)
        out[q] = mine[0].transpose(0, 1)
    if len(plan.tokens):
        # The heads of a group share keys, so they stand where several queries of a head would.
        tokens = query[0].transpose(0, 1)[plan.tokens]                                # [B, H, d]
        rows = tokens.unflatten(1, (key.shape[1], -1))                          # [B, G, h, d]
        mine = scaled_dot_product_attention(
            rows, key[0][:, plan.keys].transpose(0, 1), value[0][:, plan.keys].transpose(0, 1),
            attn_mask=plan.own, scale=scale)                                    # [B, G, h, d]
        out[plan.tokens] = mine.flatten(1, 2)
    return out[None], None


def prefill(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor,
            scale: float | None) -> torch.Tensor:
    """Attention within one request, causal by `mask`. What comes before a NaN stays whole: its
    pages of the cache may be shared with a prompt that begins alike."""
    def attend(last: int | None = None, step: slice = slice(None)) -> torch.Tensor:
        return scaled_dot_product_attention(
            query[:, :, step], key[:, :, :last], value[:, :, :last],
            attn_mask=mask[..., step, :last], scale=scale, enable_gqa=True)
    if torch.isfinite(value.sum()):
        return attend()
    past = key.shape[2] - query.shape[2]
    return torch.cat([attend(past + i + 1, slice(i, i + 1)) for i in range(query.shape[2])], dim=2)
