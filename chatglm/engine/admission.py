"""Admission control: first come, first served, within the KV cache."""

from __future__ import annotations

import asyncio
from collections import deque

from chatglm.engine.sequence import Sequence
from chatglm.errors import EngineError, QueueFull


class AdmissionQueue:
    """At most `max_running` sequences run at once, and together they fill at most `num_blocks`
    blocks of the KV cache. At most `max_waiting` more are queued. Used on the event loop only."""

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self.max_running, self.max_waiting = max_running, max_waiting
        self.num_blocks = 0  # set when the cache is built
        self.num_running = self.reserved_blocks = 0
        self.waiting: deque[Sequence] = deque()

    def enqueue(self, sequence: Sequence) -> None:
        """Queues it; `sequence.admitted` is done when it may run. Raises QueueFull if too many
        wait, EngineError if its `num_blocks` are more than there are."""
        if sequence.num_blocks > self.num_blocks:  # after a restart that found less memory
            raise EngineError("the KV cache is too small for this request")
        sequence.admitted = asyncio.get_running_loop().create_future()
        self.waiting.append(sequence)
        self._admit()
        if len(self.waiting) > self.max_waiting:
            self.waiting.pop()
            raise QueueFull(
                f"{self.num_running} answers are under way and {len(self.waiting)} requests wait "
                "already; try again in a few seconds"
            )

    def release(self, sequence: Sequence) -> None:
        """Gives its place to the next, whether it runs or waits. Idempotent."""
        if sequence.released:
            return
        sequence.released = True
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            self.num_running -= 1
            self.reserved_blocks -= sequence.num_blocks
        self._admit()

    def _admit(self) -> None:
        while self.waiting and self._fits(self.waiting[0]):
            sequence = self.waiting.popleft()
            self.num_running += 1
            self.reserved_blocks += sequence.num_blocks
            if not sequence.admitted.done():  # it is cancelled if the reader just disconnected
                sequence.admitted.set_result(None)

    def _fits(self, sequence: Sequence) -> bool:
        free_blocks = self.num_blocks - self.reserved_blocks
        return self.num_running < self.max_running and sequence.num_blocks <= free_blocks
