"""Who may be generated for: first come, first served, and only what the cache can hold."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class Places:
    """At most `seats` requests at once, which together fill at most `pages` pages of the cache."""

    def __init__(self, seats: int) -> None:
        self.seats, self.pages = seats, 0
        self.active = self.reserved = 0  # seats taken; pages promised to them
        self.queue: deque[tuple[int, asyncio.Future]] = deque()

    @asynccontextmanager
    async def take(self, pages: int) -> AsyncIterator[Callable[[], None]]:
        """Waits for a seat; yields what gives it back, perhaps before the reader is through."""
        ticket = (pages, asyncio.get_running_loop().create_future())
        given_back = False

        def give_back() -> None:
            nonlocal given_back
            if not given_back:
                given_back = True
                self.active -= 1
                self.reserved -= pages
                self._admit()

        self.queue.append(ticket)
        self._admit()
        try:
            await ticket[1]
            yield give_back
        finally:
            if ticket in self.queue:
                self.queue.remove(ticket)
                self._admit()
            else:
                give_back()

    def _admit(self) -> None:
        while (self.queue and self.active < self.seats
               and self.reserved + self.queue[0][0] <= self.pages):
            pages, turn = self.queue.popleft()
            self.active += 1
            self.reserved += pages
            if not turn.done():
                turn.set_result(None)
