"""Admission control: who runs and who waits, within the KV cache, fairly shared among clients.

A client is whoever the server says: an API key, or an address. Alone, a client may have every
place. As soon as others ask too, each has the same share. What a greedy client has over its share
is paused, and continues later from its last token.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable

from chatglm.engine.sequence import Sequence
from chatglm.errors import EngineError, QueueFull

TOO_LARGE = "the KV cache is too small for this request"  # after a restart that found less memory
RECENT = 5.0  # seconds for which a client counts after its last request


class AdmissionQueue:
    """At most `max_running` sequences run at once, and together they fill at most `num_blocks`
    blocks of the KV cache. At most `max_waiting` more are queued for a client that is alone.

    `join` is called with a sequence that may run, `leave` with one that is paused. Used on the
    event loop only.
    """

    def __init__(
        self,
        max_running: int,
        max_waiting: int,
        join: Callable[[Sequence], None],
        leave: Callable[[Sequence], None],
    ) -> None:
        self.max_running, self.max_waiting = max_running, max_waiting
        self._join, self._leave = join, leave
        self.num_blocks = 0  # before the cache is built
        self.running: list[Sequence] = []  # in the order in which they joined
        self.waiting: deque[Sequence] = deque()  # first come, first served
        self._last_seen: dict[str, float] = {}  # by client, in seconds

    def resize(self, num_blocks: int) -> None:
        """Of a new cache. Whoever waits and needs more gets an error."""
        self.num_blocks = num_blocks
        for sequence in [each for each in self.waiting if each.num_blocks > num_blocks]:
            self.waiting.remove(sequence)
            sequence.latest.fail(EngineError(TOO_LARGE))

    def enqueue(self, sequence: Sequence) -> None:
        """Queues it, and lets it join if there is room. Raises QueueFull if too many wait, and
        EngineError if its `num_blocks` are more than there are."""
        if sequence.num_blocks > self.num_blocks:
            raise EngineError(TOO_LARGE)
        self._last_seen[sequence.client] = time.monotonic()
        self.waiting.append(sequence)
        self._admit()
        waiting = Counter(each.client for each in self.waiting)
        too_many = waiting[sequence.client] > self.max_waiting // max(1, len(waiting))
        if too_many and sequence in self.waiting:
            self.waiting.remove(sequence)
            raise QueueFull(
                f"{len(self.running)} answers are under way and {len(self.waiting)} requests wait "
                "already; try again in a few seconds"
            )

    def release(self, sequence: Sequence) -> None:
        """Takes it out, whether it runs or waits, and lets others join. Idempotent."""
        for group in (self.running, self.waiting):
            if sequence in group:
                group.remove(sequence)
                self._last_seen[sequence.client] = time.monotonic()
                self._admit()

    @property
    def reserved_blocks(self) -> int:
        return sum(sequence.num_blocks for sequence in self.running)

    def _admit(self) -> None:
        clients = self._active_clients()
        share = math.ceil(self.max_running / clients)
        self._pause_excess(share)
        while (sequence := self._next(share)) is not None:
            if not self._make_room(sequence, self.num_blocks / clients):
                return
            self.waiting.remove(sequence)
            self.running.append(sequence)
            self._join(sequence)

    def _active_clients(self) -> int:
        """How many clients have asked for something a moment ago, or still wait or run."""
        now = time.monotonic()
        busy = {sequence.client for sequence in (*self.running, *self.waiting)}
        self._last_seen = {
            client: seen
            for client, seen in self._last_seen.items()
            if client in busy or now - seen < RECENT
        }
        return max(1, len(self._last_seen))

    def _next(self, share: int) -> Sequence | None:
        """The first in line of the client that runs least, if that is below its share."""
        running = Counter(sequence.client for sequence in self.running)
        allowed = [sequence for sequence in self.waiting if running[sequence.client] < share]
        if len(self.running) >= self.max_running or not allowed:
            return None
        return min(allowed, key=lambda sequence: running[sequence.client])  # min keeps the order

    def _pause_excess(self, share: int) -> None:
        for client, number in Counter(sequence.client for sequence in self.running).items():
            for _ in range(number - share):
                self._pause_newest(client)

    def _make_room(self, sequence: Sequence, share: float) -> bool:
        """Whether its blocks are free. If not, they are taken from clients that hold more than
        their share, as long as its own client does not come to hold more than that itself."""
        while sequence.num_blocks > self.num_blocks - self.reserved_blocks:
            held: Counter[str] = Counter()
            for each in self.running:
                held[each.client] += each.num_blocks
            greedy, most = held.most_common(1)[0]
            if most <= share or held[sequence.client] + sequence.num_blocks > share:
                return False
            self._pause_newest(greedy)
        return True

    def _pause_newest(self, client: str) -> None:
        sequence = [each for each in self.running if each.client == client][-1]
        self.running.remove(sequence)
        if not sequence.latest.is_finished:
            self._leave(sequence)
            self.waiting.appendleft(sequence)
