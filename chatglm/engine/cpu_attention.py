"""Attention over the paged cache on a CPU: each request with its own keys only.

transformers' continuous batching lays all requests of a step in one row and masks what is not a
request's own. With 64 requests, 63 of 64 products are thrown away; and since 0 times NaN is NaN, a
request whose numbers are broken breaks its neighbours'. Under its own name, this attention gets no
mask: the library then makes none. A GPU takes the library's way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.generation.continuous_batching.cache_allocators import SLIDING_ATTENTION
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Bytes of keys that are copied out of the cache for one product: with half a megabyte, the copy
# is still in the core's own cache when the product reads it.
COPIED_AT_ONCE = 2**19


class Prefill(NamedTuple):
    """A request with several new tokens."""

    new: slice  # which they are of the T of the step
    keys: torch.Tensor  # [K], where its keys are kept
    mask: torch.Tensor | None  # [new, K], where not just causal


class Decode(NamedTuple):
    """Requests with one new token each, as many as are taken at once."""

    keys: torch.Tensor  # [B, L], where theirs are kept, filled up with the first
    mask: torch.Tensor | None  # [B, 1, 1, L], where some have fewer than L


class Plan(NamedTuple):
    """Where the requests of a step lie; the same for all layers with the same window."""

    prefills: list[Prefill]
    decodes: list[Decode]
    tokens: torch.Tensor | None  # the T' new ones of `decodes`, in turn; None for all T
    write: torch.Tensor  # [T], where the new keys are to be kept


# Where the keys `steps` [B, L] of the requests [B, 1] are kept, [B, L].
Where = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def hide(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to scores so that those that are `hidden` do not count."""
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -torch.inf)


def plan_decodes(
    alone: torch.Tensor, counts: torch.Tensor, where: Where, at_once: int, dtype: torch.dtype
) -> tuple[torch.Tensor, list[Decode]]:
    """The requests `alone` in the order in which they are taken, about `at_once` keys a time; each
    request has counts[request] keys."""
    if len(alone) * int(counts.max()) > at_once:  # then those of like length side by side
        alone = alone[counts[alone].argsort(descending=True)]
    lengths, decodes, begin = counts[alone].tolist(), [], 0
    while begin < len(alone):
        longest = max(lengths[begin:])
        some = alone[begin : begin + max(1, at_once // longest), None]  # [B, 1]
        steps, mask = torch.arange(longest)[None], None  # [1, L]
        if len(some) > 1:
            own = steps < counts[some]  # [B, L]
            steps, mask = torch.where(own, steps, 0), hide(~own, dtype)[:, None, None]
        decodes.append(Decode(where(some, steps), mask))
        begin += len(some)
    return alone, decodes


def make_plan(
    q_ends: torch.Tensor,
    k_ends: torch.Tensor,
    write: torch.Tensor | None,
    where: Where,
    window: int | None,
    at_once: int,
    dtype: torch.dtype,
) -> Plan:
    """From the cumulative numbers of new tokens and of keys, both with a 0 in front. A token looks
    at the last `window` keys up to itself, or at all of these."""
    counts, prefills = k_ends.diff(), []
    if write is None:  # each request has one new token, its last key
        alone, several = torch.arange(len(counts)), []
        write = where(alone[:, None], counts[:, None] - 1).squeeze(1)
    else:
        is_alone = q_ends.diff() == 1
        alone, several = is_alone.nonzero().squeeze(1), (~is_alone).nonzero().squeeze(1)
    alone, decodes = plan_decodes(alone, counts, where, at_once, dtype)
    for i in several:
        (begin, end), count = q_ends[i : i + 2].tolist(), int(counts[i])
        new, mask = end - begin, None
        reach = count if window is None else window
        if new < count or reach < count:
            hidden = torch.ones(new, count, dtype=torch.bool)
            hidden = hidden.triu(count - new + 1) | hidden.tril(count - new - reach)
            mask = hide(hidden, dtype)
        keys = where(i[None, None], torch.arange(count)[None]).squeeze(0)
        prefills.append(Prefill(slice(begin, end), keys, mask))
    in_order = not prefills and len(decodes) == 1
    return Plan(prefills, decodes, None if in_order else q_ends[alone], write)


def plan_step(step: dict, allocator, key: torch.Tensor) -> Plan:
    """The plan for what the library says of a step to layers whose keys `allocator` places, `key`
    [1, G, T, d] being such."""
    q_ends, k_ends = (
        ends.long() for ends in (step["cu_seq_lens_q"], step["cu_seq_lens_k"][allocator.layer_type])
    )
    page, at_once = allocator.tokens_per_page, COPIED_AT_ONCE // key[0, :, 0].nbytes
    if step.get("block_table") is not None:  # of pages, for requests with one new token each
        table, write = step["block_table"][allocator.index].long(), None

        def where(requests: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
            return table[requests, steps // page] * page + steps % page
    else:
        read, write = (step[name][allocator.index] for name in ("read_index", "write_index"))
        kept = read if len(read) else write  # nothing to read: all keys are new
        if allocator.layer_type == SLIDING_ATTENTION:  # the library has read them by then
            kept = torch.arange(int(k_ends[-1]))

        def where(requests: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
            return kept[k_ends[requests] + steps]

    return make_plan(q_ends, k_ends, write, where, step.get("sliding_window"), at_once, key.dtype)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **step,
) -> tuple[torch.Tensor, None]:
    """Attention of `query` [1, H, T, d], the T new tokens of all requests one after the other, to
    their own keys: those in the paged cache, and the new `key` and `value` [1, G, T, d]."""
    cache = step.get("cache")
    if cache is None or query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, attention_mask, **step)
    allocator = cache.layer_to_allocator[module.layer_idx]
    ends = step["cu_seq_lens_k"][allocator.layer_type]
    if getattr(cache, "plan_for", None) is not ends:  # a new step, or a layer of another window
        cache.plan_for, cache.plan = ends, plan_step(step, allocator, key)
    plan, scale = cache.plan, step.get("scaling")
    if allocator.layer_type == SLIDING_ATTENTION:  # new keys take old ones' places: read first
        read = cache.update(key, value, module.layer_idx, step)
        keys, values = (states[0].transpose(0, 1) for states in read)  # [K, G, d]
    else:
        keys, values = (
            pages.flatten(0, 1) for pages in allocator.get_cache_for_block_table(module.layer_idx)
        )
        for kept, new in ((keys, key), (values, value)):
            kept.index_copy_(0, plan.write, new[0].transpose(0, 1))
    rows = query[0].transpose(0, 1)  # [T, H, d]
    # The heads of a group share keys, so they stand where several queries of a head would.
    alone = rows if plan.tokens is None else rows[plan.tokens]
    alone, done = alone.unflatten(1, (key.shape[1], -1)), []  # [T', G, H / G, d]
    for where, mask in plan.decodes:
        some, alone = alone[: len(where)], alone[len(where) :]
        done.append(
            scaled_dot_product_attention(
                some, gather(keys, where), gather(values, where), attn_mask=mask, scale=scale
            )
        )
    if plan.tokens is None:
        return done[0].flatten(1, 2)[None], None
    out = torch.empty(rows.shape, dtype=rows.dtype)
    if done:
        out[plan.tokens] = torch.cat(done).flatten(1, 2)
    for new, where, mask in plan.prefills:
        out[new] = prefill(
            rows[new], gather(keys, where[None]), gather(values, where[None]), mask, scale
        )
    return out[None], None


def gather(kept: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """What is kept [K, G, d] at `where` [B, L], as [B, G, L, d]."""
    return kept.index_select(0, where.flatten()).unflatten(0, where.shape).transpose(1, 2)


def prefill(
    rows: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """Attention [T, H, d] within one request, causal, by `mask` where there are older keys. What
    comes before a NaN stays whole: its pages may be shared with a prompt that begins alike."""
    query = rows.transpose(0, 1)[None]  # [1, H, T, d]

    def attend(queries: slice, last: int, mask: torch.Tensor | None, causal: bool) -> torch.Tensor:
        return scaled_dot_product_attention(
            query[:, :, queries],
            key[:, :, :last],
            value[:, :, :last],
            attn_mask=mask,
            is_causal=causal,
            scale=scale,
            enable_gqa=True,
        )

    new, count = query.shape[2], key.shape[2]
    out = attend(slice(new), count, mask, mask is None)
    if not torch.isfinite(out.sum()):
        out = torch.cat(
            [attend(slice(i, i + 1), count - new + i + 1, None, False) for i in range(new)], dim=2
        )
    return out[0].transpose(0, 1)


NAME = "paged_by_request"
ALL_ATTENTION_FUNCTIONS.register(NAME, paged_attention)
