"""Decode attention over the paged cache as Triton kernels, for gpu_trial.py.

Every length is read from the device, so a CUDA graph of them serves any lengths. With the variable
TRITON_INTERPRET=1 they run on a CPU too, slowly: that is how they are tested.
"""

import importlib.util
import os

import torch

BLOCK = 64  # keys that are multiplied at once
SPLITS = 16  # the most parts of one sequence that are computed beside each other
LEAST = 16  # rows of a matrix product

if importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl

    @triton.jit
    def write_kernel(
        new_keys, new_values, keys, values, table, ends,
        key_row, key_head, value_row, value_head, page_size, token_size, table_row,
        PAGE: tl.constexpr, NUMBERS: tl.constexpr, D: tl.constexpr,
    ):  # fmt: skip
        """Puts the new key and value of one sequence, G × D numbers each, into its last place."""
        row = tl.program_id(0)
        count = tl.load(ends + row + 1) - tl.load(ends + row)
        if count > 0:
            page = tl.load(table + row * table_row + (count - 1) // PAGE).to(tl.int64)
            place = page * page_size + ((count - 1) % PAGE) * token_size
            numbers = tl.arange(0, NUMBERS)
            head, within = numbers // D, numbers % D
            key = tl.load(new_keys + row * key_row + head * key_head + within)
            value = tl.load(new_values + row * value_row + head * value_head + within)
            tl.store(keys + place + numbers, key)
            tl.store(values + place + numbers, value)

    @triton.jit
    def attend_kernel(
        query, keys, values, table, ends, sums, tops, totals,
        scale, query_row, query_head, page_size, token_size, table_row,
        PAGE: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
        BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    ):  # fmt: skip
        """One part of one sequence, for the H heads of one group: the sum of values, weighted by
        exp(score - top), with the weights' total and their top."""
        row, group, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        count = tl.load(ends + row + 1) - tl.load(ends + row)
        size = tl.cdiv(tl.cdiv(count, SPLITS), BLOCK) * BLOCK
        begin = part * size
        end = tl.minimum(count, begin + size)
        heads, within, one = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, BLOCK)
        place = row * query_row + (group * H + heads[:, None]) * query_head + within[None, :]
        q = tl.load(query + place, mask=heads[:, None] < H, other=0.0)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        mixed = tl.zeros([ROWS, D], tl.float32)
        for start in range(begin, end, BLOCK):
            steps = start + one
            own = steps < end
            page = tl.load(table + row * table_row + steps // PAGE, mask=own, other=0)
            places = page.to(tl.int64) * page_size + (steps % PAGE) * token_size + group * D
            places = places[:, None] + within[None, :]
            k = tl.load(keys + places, mask=own[:, None], other=0.0)
            scores = tl.dot(q, tl.trans(k)) * scale
            scores = tl.where(own[None, :], scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp(scores - higher[:, None])
            shrink = tl.exp(top - higher)
            v = tl.load(values + places, mask=own[:, None], other=0.0)
            mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v)
            total = total * shrink + tl.sum(weights, 1)
            top = higher
        slot = ((row * tl.num_programs(1) + group) * SPLITS + part) * ROWS + heads
        tl.store(sums + slot[:, None] * D + within[None, :], mixed)
        tl.store(tops + slot, top)
        tl.store(totals + slot, total)

    @triton.jit
    def join_kernel(
        sums, tops, totals, out,
        H: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
    ):  # fmt: skip
        """The parts of one sequence, for the heads of one group, to one result."""
        row, group = tl.program_id(0), tl.program_id(1)
        heads, within = tl.arange(0, ROWS), tl.arange(0, D)
        first = (row * tl.num_programs(1) + group) * SPLITS * ROWS
        top = tl.full([ROWS], float("-inf"), tl.float32)
        for part in range(SPLITS):
            top = tl.maximum(top, tl.load(tops + first + part * ROWS + heads))
        total = tl.zeros([ROWS], tl.float32)
        mixed = tl.zeros([ROWS, D], tl.float32)
        for part in range(SPLITS):
            slot = first + part * ROWS + heads
            weights = tl.load(totals + slot)
            share = tl.where(weights > 0, tl.exp(tl.load(tops + slot) - top), 0.0)
            total += weights * share
            mixed += tl.load(sums + slot[:, None] * D + within[None, :]) * share[:, None]
        mixed = tl.where(total[:, None] > 0, mixed / total[:, None], 0.0)  # padding has no keys
        place = ((row * tl.num_programs(1) + group) * H + heads[:, None]) * D + within[None, :]
        tl.store(out + place, mixed.to(out.dtype.element_ty), mask=heads[:, None] < H)


def ready(device: torch.device) -> bool:
    """Whether the kernels run on this device."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return bool(importlib.util.find_spec("triton")) and (device.type == "cuda" or interpreted)


def write(new_keys, new_values, keys, values, table, ends) -> None:
    """Puts `new_keys` and `new_values` [B, G, d] into the pages [pages, tokens, G, d], each into
    the last place of its sequence. `table` [B, pages] has a sequence's pages, `ends` [B + 1] the
    cumulative numbers of keys, the new ones counted."""
    page, groups, size = keys.shape[1:]
    write_kernel[(len(table),)](
        new_keys, new_values, keys, values, table, ends,
        *new_keys.stride()[:2], *new_values.stride()[:2], keys.stride(0), keys.stride(1),
        table.stride(0), PAGE=page, NUMBERS=groups * size, D=size,
    )  # fmt: skip


def attend(query, keys, values, table, ends, scale: float) -> torch.Tensor:
    """Attention [B, H, d] of one token of each sequence, `query` [B, H, d], to all its keys."""
    page, groups, size = keys.shape[1:]
    count, heads = len(table), query.shape[1] // groups
    rows = max(LEAST, triton.next_power_of_2(heads))
    splits = max(1, min(SPLITS, 4 * SPLITS // count))
    sums = query.new_empty(count, groups, splits, rows, size, dtype=torch.float32)
    tops, totals = (torch.empty_like(sums[..., 0]) for _ in range(2))
    out = query.new_empty(count, groups * heads, size)
    shape = {"H": heads, "ROWS": rows, "D": size, "SPLITS": splits}
    attend_kernel[(count, groups, splits)](
        query, keys, values, table, ends, sums, tops, totals,
        scale, *query.stride()[:2], keys.stride(0), keys.stride(1), table.stride(0),
        PAGE=page, BLOCK=BLOCK, **shape,
    )  # fmt: skip
    join_kernel[(count, groups)](sums, tops, totals, out, **shape)
    return out
