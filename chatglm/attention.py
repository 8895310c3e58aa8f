"""Attention over the paged cache on a CPU: each request with its own keys only.

transformers' continuous batching lays all requests of a step in one row and masks what is not a
request's own. With 64 requests, 63 of 64 products are thrown away; and since 0 times NaN is NaN, a
request whose numbers are broken breaks its neighbours'. Under its own name, this attention gets no
mask: the library then makes none. A GPU takes the library's way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class Plan(NamedTuple):
    """Where the requests of a step lie; the same for all layers with the same window."""

    # New tokens, and keys, of each request with several new; a mask [n, K], where not just causal.
    prefill: list[tuple[slice, slice, torch.Tensor | None]]
    tokens: torch.Tensor                # [B], the token of each request with one new
    keys: torch.Tensor                  # [B, L], its keys, filled up with its first
    own: torch.Tensor                   # [B, 1, 1, L], which of them count
    last: torch.Tensor                  # [B], the key of the new token


def make_plan(q_ends: torch.Tensor, k_ends: torch.Tensor, table: torch.Tensor | None,
              page: int, window: int | None) -> Plan:
    """From the cumulative numbers of new tokens and of keys, both with a 0 in front. With a
    `table` [B, pages], of where each request's pages of `page` tokens lie, its keys are where they
    are in the cache; else where they are in what has been read from it. A token looks at the last
    `window` keys up to itself, or at all of these."""
    alone = q_ends.diff() == 1                                        # of all requests
    starts, lengths = k_ends[:-1][alone, None], k_ends.diff()[alone, None]            # [B, 1]
    steps = torch.arange(int(lengths.max()) if len(lengths) else 0)                   # [L]
    own = steps < lengths
    keys = torch.where(own, steps, 0)                                                 # [B, L]
    if table is None:
        keys = keys + starts
    else:
        keys = table.long().gather(1, keys // page) * page + keys % page
    spans = []
    for i in (~alone).nonzero().squeeze(1).tolist():
        (q, q_end), (k, k_end) = q_ends[i : i + 2].tolist(), k_ends[i : i + 2].tolist()
        new, count = q_end - q, k_end - k
        mask, reach = None, count if window is None else window
        if new < count or reach < count:
            hidden = torch.ones(new, count, dtype=torch.bool)
            hidden = hidden.triu(count - new + 1) | hidden.tril(count - new - reach)
            mask = torch.zeros(new, count).masked_fill(hidden, -torch.inf)
        spans.append((slice(q, q_end), slice(k, k_end), mask))
    return Plan(spans, q_ends[:-1][alone], keys, own[:, None, None],
                keys.gather(1, lengths - 1).squeeze(1))


def paged_attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor,
                    value: torch.Tensor, attention_mask: torch.Tensor | None,
                    **kwargs) -> tuple[torch.Tensor, None]:
    """Attention of `query` [1, H, T, d], the T new tokens of all requests one after the other, to
    their own keys: those in the paged cache, and the new `key` and `value` [1, G, T, d]."""
    cache = kwargs.get("cache")
    if cache is None or query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    key, value = cache.update(key, value, module.layer_idx, kwargs)             # [1, G, K, d]
    scale, table = kwargs.get("scaling"), kwargs.get("block_table")
    ends = kwargs["cu_seq_lens_k"]
    if getattr(cache, "plan_for", None) is not ends:  # a new step, or a layer of another window
        page = kwargs["k_cache"].shape[1] if table is not None else 0
        cache.plan_for, cache.plan = ends, make_plan(
            kwargs["cu_seq_lens_q"].long(), ends.long(), table, page, kwargs.get("sliding_window"))
    plan = cache.plan
    if table is not None:  # every request has one new token, and no key has been written or read
        tokens = [kept.flatten(0, 1) for kept in (kwargs["k_cache"], kwargs["v_cache"])]
        for kept, new in zip(tokens, (key, value), strict=True):
            kept.index_copy_(0, plan.last, new[0].transpose(0, 1))
        key, value = (gather(kept, plan.keys) for kept in tokens)
        return decode(query, key, value, plan, scale).flatten(1, 2)[None], None
    out = torch.empty_like(query[0].transpose(0, 1))                                  # [T, H, d]
    for q, k, mask in plan.prefill:
        mask = mask if mask is None else mask.to(query.dtype)
        mine = prefill(query[:, :, q], key[:, :, k], value[:, :, k], mask, scale)
        out[q] = mine[0].transpose(0, 1)
    if len(plan.tokens):
        key, value = (gather(read[0].transpose(0, 1), plan.keys) for read in (key, value))
        out[plan.tokens] = decode(query[:, :, plan.tokens], key, value, plan, scale).flatten(1, 2)
    return out[None], None


def gather(kept: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The `keys` [B, L] of `kept` [K, G, d], as [B, G, L, d]."""
    return kept.index_select(0, keys.flatten()).unflatten(0, keys.shape).transpose(1, 2)


def decode(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan,
           scale: float | None) -> torch.Tensor:
    """Attention [B, G, h, d] of one token of each request, `query` [1, H, B, d]."""
    # The heads of a group share keys, so they stand where several queries of a head would.
    rows = query[0].transpose(0, 1).unflatten(1, (key.shape[1], -1))                # [B, G, h, d]
    mask = None if len(rows) == 1 else plan.own  # of one request, all keys are its own
    return scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)


def prefill(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
            mask: torch.Tensor | None, scale: float | None) -> torch.Tensor:
    """Attention within one request, causal, by `mask` where there are older keys. What comes
    before a NaN stays whole: its pages of the cache may be shared with a prompt that begins alike.
    """
    def attend(queries: slice, last: int, mask: torch.Tensor | None, causal: bool) -> torch.Tensor:
        return scaled_dot_product_attention(
            query[:, :, queries], key[:, :, :last], value[:, :, :last], attn_mask=mask,
            is_causal=causal, scale=scale, enable_gqa=True)
    new, count = query.shape[2], key.shape[2]
    if torch.isfinite(value.sum()):
        return attend(slice(new), count, mask, mask is None)
    return torch.cat([attend(slice(i, i + 1), count - new + i + 1, None, False)
                      for i in range(new)], dim=2)


NAME = "paged_by_request"
ALL_ATTENTION_FUNCTIONS.register(NAME, paged_attention)
