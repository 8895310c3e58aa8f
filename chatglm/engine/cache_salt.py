"""Keeps the cached prefixes of one client apart from those of others.

Prompts that begin alike share blocks of the KV cache, so the second is answered sooner. That tells
whether somebody has sent such a prompt. With a salt, only requests with the same salt share. The
word is vLLM's.

transformers knows a block by a hash of its tokens and of the blocks before it. So it is enough to
change the tokens of the first block, where they are hashed and nowhere else. The salt travels in
the request's id, which reaches all processes of `--devices`.
"""

from __future__ import annotations

import hashlib
from array import array
from functools import lru_cache
from typing import Any

WORDS = 16  # numbers of 31 bits; the first block has at least as many tokens


def salted_id(salt: str, request_id: str) -> str:
    """The request's id in the batch; without a salt, the id itself."""
    return f"{hashlib.sha256(salt.encode()).hexdigest()}/{request_id}" if salt else request_id


def separate_prefixes(paged_cache: Any) -> None:
    """From now on this cache of transformers minds the salts of its requests."""
    search = paged_cache.search_prefix_match

    def search_prefix_match(request_id: str, prompt_ids: list[int]) -> int:
        return search(request_id, salted(request_id, prompt_ids))

    paged_cache.search_prefix_match = search_prefix_match
    for allocator in paged_cache.cache_allocators.values():
        allocator.mark_complete_blocks = with_salt(allocator.mark_complete_blocks)


def with_salt(mark: Any) -> Any:
    """`mark_complete_blocks` of an allocator, which hashes what a request has filled."""

    def mark_complete_blocks(request_id: str, token_ids: list[int], new_blocks: int) -> None:
        mark(request_id, salted(request_id, token_ids), new_blocks)

    return mark_complete_blocks


def salted(request_id: str, token_ids: list[int]) -> list[int]:
    """The tokens as they are to be hashed: the first ones changed as the salt says."""
    salt, separator, _ = request_id.partition("/")
    if not separator:
        return token_ids
    changed = [token ^ word for token, word in zip(token_ids, words(salt))]
    return changed + token_ids[len(changed) :]


@lru_cache(maxsize=1024)
def words(salt: str) -> list[int]:
    """Numbers that no other salt has, none negative: they are hashed as int32."""
    digest = hashlib.blake2b(salt.encode(), digest_size=4 * WORDS).digest()
    return [word & 0x7FFFFFFF for word in array("I", digest)]
