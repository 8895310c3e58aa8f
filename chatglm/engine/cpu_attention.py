"""Attention over the paged KV cache on a CPU: each sequence with its own keys only.

transformers' continuous batching puts all tokens of a step in one row, and masks the keys of other
sequences. With 64 sequences, 63 of 64 products are thrown away. And since 0 times NaN is NaN, one
sequence with broken numbers breaks its neighbours. This attention is registered under its own
name, so the library makes no mask for it. A GPU uses the library's attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.generation.continuous_batching.cache_allocators import SLIDING_ATTENTION
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from chatglm.engine.prefix_attention import prefixed_sdpa, with_prefix

NAME = "paged_by_sequence"
# Bytes of keys that are copied out of the cache for one product. With half a megabyte, the copy is
# still in the core's own cache when the product reads it.
COPIED_AT_ONCE = 2**19


# --- 1. The plan of a step: which tokens and keys belong to which sequence -----------------------


class Prefill(NamedTuple):
    """A sequence with several new tokens."""

    new: slice  # which of the T tokens of the step
    keys: torch.Tensor  # [K], the places of its keys in the cache
    mask: torch.Tensor | None  # [new, K], added to the scores; None: just causal


class Decode(NamedTuple):
    """Sequences with one new token each, as many as are computed at once."""

    keys: torch.Tensor  # [B, L], the places of their keys, padded with the first
    mask: torch.Tensor | None  # [B, 1, 1, L], added to the scores; None: all have L keys


class Plan(NamedTuple):
    """One step. The same plan serves all layers with the same window."""

    prefills: list[Prefill]
    decodes: list[Decode]
    decode_tokens: torch.Tensor | None  # [T'], which tokens `decodes` are, in turn; None: all T
    write: torch.Tensor  # [T], the places for the new keys


# Places [B, L] in the cache of the keys `steps` [B, L] of the sequences [B, 1].
KeyLocations = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def additive_mask(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Added to scores, it takes those that are `hidden` out of the softmax."""
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -torch.inf)


def plan_decodes(
    rows: torch.Tensor,
    num_keys: torch.Tensor,
    locate: KeyLocations,
    at_once: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, list[Decode]]:
    """The sequences `rows` in the order in which they are computed, about `at_once` keys a time."""
    if len(rows) * int(num_keys.max()) > at_once:  # then those of similar length together
        rows = rows[num_keys[rows].argsort(descending=True)]
    lengths, decodes, begin = num_keys[rows].tolist(), [], 0
    while begin < len(rows):
        longest = max(lengths[begin:])
        some = rows[begin : begin + max(1, at_once // longest), None]  # [B, 1]
        steps, mask = torch.arange(longest)[None], None  # [1, L]
        if len(some) > 1:
            own = steps < num_keys[some]  # [B, L]
            steps = torch.where(own, steps, 0)
            mask = additive_mask(~own, dtype)[:, None, None]
        decodes.append(Decode(locate(some, steps), mask))
        begin += len(some)
    return rows, decodes


def plan_prefill(
    row: torch.Tensor,
    new: slice,
    num_keys: int,
    locate: KeyLocations,
    window: int | None,
    context: int,
    dtype: torch.dtype,
) -> Prefill:
    """A token sees itself and the keys before it, at most `window` of them, and in any case the
    first `context` keys."""
    num_new, mask = new.stop - new.start, None
    window = num_keys if window is None else window
    if num_new < num_keys or window < num_keys or context:
        future = torch.ones(num_new, num_keys, dtype=torch.bool)
        too_late, too_old = num_keys - num_new + 1, num_keys - num_new - window
        hidden = future.triu(too_late) | future.tril(too_old)
        hidden[:, :context] = False
        mask = additive_mask(hidden, dtype)
    keys = locate(row[None, None], torch.arange(num_keys)[None]).squeeze(0)
    return Prefill(new, keys, mask)


def make_plan(
    q_ends: torch.Tensor,
    k_ends: torch.Tensor,
    write: torch.Tensor | None,
    locate: KeyLocations,
    window: int | None,
    contexts: list[int],
    at_once: int,
    dtype: torch.dtype,
) -> Plan:
    """From the cumulative numbers of new tokens and of keys, both with a 0 in front. `contexts` has
    for each sequence the number of keys that all of its tokens see."""
    num_keys = k_ends.diff()
    prefill_rows: list[torch.Tensor] = []
    if write is None:  # each sequence has one new token, whose key is its last
        decode_rows = torch.arange(len(num_keys))
        write = locate(decode_rows[:, None], num_keys[:, None] - 1).squeeze(1)
    else:
        has_one = q_ends.diff() == 1
        decode_rows = has_one.nonzero().squeeze(1)
        prefill_rows = list((~has_one).nonzero().squeeze(1))
    decode_rows, decodes = plan_decodes(decode_rows, num_keys, locate, at_once, dtype)
    prefills = []
    for row in prefill_rows:
        begin, end = q_ends[row : row + 2].tolist()
        new = slice(begin, end)
        context = contexts[int(row)]
        prefills.append(plan_prefill(row, new, int(num_keys[row]), locate, window, context, dtype))
    all_in_order = not prefills and len(decodes) == 1
    return Plan(prefills, decodes, None if all_in_order else q_ends[decode_rows], write)


def plan_step(step: dict, allocator: Any, key: torch.Tensor) -> Plan:
    """Builds the plan for one step from the library's keyword arguments, for all layers whose
    keys `allocator` places. `key` [1, G, T, d] shows their shape."""
    layer_type, block_size = allocator.layer_type, allocator.tokens_per_page
    q_ends = step["cu_seq_lens_q"].long()
    k_ends = step["cu_seq_lens_k"][layer_type].long()
    at_once = COPIED_AT_ONCE // key[0, :, 0].nbytes
    if step.get("block_table") is not None:  # only sequences with one new token each
        table, write = step["block_table"][allocator.index].long(), None

        def locate(rows: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
            return table[rows, steps // block_size] * block_size + steps % block_size
    else:
        read, write = (step[name][allocator.index] for name in ("read_index", "write_index"))
        places = read if len(read) else write  # nothing to read: all keys are new
        if layer_type == SLIDING_ATTENTION:  # the library gathers these keys itself, in order
            places = torch.arange(int(k_ends[-1]))

        def locate(rows: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
            return places[k_ends[rows] + steps]

    window = step.get("sliding_window")
    contexts = step.get("context_lengths", [0] * (len(q_ends) - 1))  # as ChatGLM-6B gives them
    return make_plan(q_ends, k_ends, write, locate, window, contexts, at_once, key.dtype)


# The plan of each cache's current step, with the tensor of the library's that tells steps apart.
_plans: WeakKeyDictionary[Any, tuple[torch.Tensor, Plan]] = WeakKeyDictionary()


def current_plan(cache: Any, step: dict, allocator: Any, key: torch.Tensor) -> Plan:
    """Made once a step, and again for a layer with another window."""
    k_ends = step["cu_seq_lens_k"][allocator.layer_type]
    known = _plans.get(cache)
    if known is None or known[0] is not k_ends:
        known = _plans[cache] = (k_ends, plan_step(step, allocator, key))
    return known[1]


# --- 2. The attention ----------------------------------------------------------------------------


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **step,
) -> tuple[torch.Tensor, None]:
    """Attention of `query` [1, H, T, d], the T new tokens of all sequences one after the other, to
    their own keys: those in the paged cache, and the new `key` and `value` [1, G, T, d]."""
    cache = step.get("cache")
    if cache is None or query.device.type != "cpu":
        return prefixed_sdpa(module, query, key, value, attention_mask, **step)
    allocator = cache.layer_to_allocator[module.layer_idx]
    plan, scale = current_plan(cache, step, allocator, key), step.get("scaling")
    if allocator.layer_type == SLIDING_ATTENTION:
        # A sliding window overwrites old places, so the library reads before it writes.
        read = cache.update(key, value, module.layer_idx, step)
        keys, values = (states[0].transpose(0, 1) for states in read)  # [K, G, d]
    else:
        blocks = allocator.get_cache_for_block_table(module.layer_idx)
        keys, values = (part.flatten(0, 1) for part in blocks)  # [places, G, d]
        keys.index_copy_(0, plan.write, key[0].transpose(0, 1))
        values.index_copy_(0, plan.write, value[0].transpose(0, 1))
    rows = query[0].transpose(0, 1)  # [T, H, d]
    decoded = attend_decodes(module, plan, rows, keys, values, scale)
    if plan.decode_tokens is None:
        return decoded[None], None
    out = torch.empty(rows.shape, dtype=rows.dtype)
    out[plan.decode_tokens] = decoded
    for new, places, mask in plan.prefills:
        own_keys, own_values = gather(keys, places[None]), gather(values, places[None])
        num_new = new.stop - new.start
        own_keys, own_values, mask = with_prefix(module, own_keys, own_values, mask, num_new)
        out[new] = attend_prefill(rows[new], own_keys, own_values, mask, scale)
    return out[None], None


def attend_decodes(
    module: torch.nn.Module,
    plan: Plan,
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float | None,
) -> torch.Tensor:
    """Attention [T', H, d] of the sequences with one new token."""
    queries = rows if plan.decode_tokens is None else rows[plan.decode_tokens]  # [T', H, d]
    # The heads of a group share keys. They take the place of several queries of one head.
    grouped = queries.unflatten(1, (keys.shape[1], -1))  # [T', G, H / G, d]
    done, begin = [], 0
    for places, mask in plan.decodes:
        some = grouped[begin : begin + len(places)]
        begin += len(places)
        own_keys, own_values = gather(keys, places), gather(values, places)
        own_keys, own_values, mask = with_prefix(module, own_keys, own_values, mask, num_new=1)
        done.append(
            scaled_dot_product_attention(some, own_keys, own_values, attn_mask=mask, scale=scale)
        )
    return torch.cat(done).flatten(1, 2) if done else queries


def gather(kept: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The rows of `kept` [places, G, d] at `places` [B, L], as [B, G, L, d]."""
    return kept.index_select(0, places.flatten()).unflatten(0, places.shape).transpose(1, 2)


def attend_prefill(
    rows: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """Attention [T, H, d] within one sequence: causal, or by `mask` where there are other keys."""
    query = rows.transpose(0, 1)[None]  # [1, H, T, d]
    num_new, num_keys = query.shape[2], key.shape[2]

    def attend(q: slice, last_key: int, mask: torch.Tensor | None, causal: bool) -> torch.Tensor:
        return scaled_dot_product_attention(
            query[:, :, q],
            key[:, :, :last_key],
            value[:, :, :last_key],
            attn_mask=mask,
            is_causal=causal,
            scale=scale,
            enable_gqa=True,
        )

    out = attend(slice(num_new), num_keys, mask, mask is None)
    if not torch.isfinite(out.sum()):
        # Tokens before a NaN must stay finite: their blocks may be shared with another sequence
        # that begins alike. So each token by itself, with the keys up to its own.
        out = torch.cat(
            [
                attend(slice(i, i + 1), num_keys - num_new + i + 1, None, False)
                for i in range(num_new)
            ],
            dim=2,
        )
    return out[0].transpose(0, 1)


ALL_ATTENTION_FUNCTIONS.register(NAME, paged_attention)
