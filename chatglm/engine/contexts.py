"""For ChatGLM-6B in the engine: what a step tells of prompts that see themselves whole.

`step` is the library's keyword arguments for one step of continuous batching.
"""

from __future__ import annotations

import torch


def first_blocks(step: dict) -> list[int]:
    """The first block of each sequence of a step in the paged cache."""
    if step.get("block_table") is not None:  # each has one new token
        return step["block_table"][0][:, 0].tolist()
    read, write = step["read_index"][0], step["write_index"][0]
    places = read if len(read) else write  # nothing to read: all keys are new
    first = places[step["cu_seq_lens_k"]["full_attention"][:-1].long()]
    return (first // step["cache"].layer_to_allocator[0].tokens_per_page).tolist()


def open_contexts(mask: torch.Tensor | None, step: dict) -> torch.Tensor | None:
    """The library's causal mask [1, 1, T, K] of a step, with each new context open in itself."""
    if mask is None:
        return None
    mask = mask.clone()
    begins = step["cu_seq_lens_q"].tolist(), step["cu_seq_lens_k"]["full_attention"].tolist()
    for query, key, context in zip(*begins, step["context_lengths"]):
        mask[..., query : query + context, key : key + context] = 0
    return mask
