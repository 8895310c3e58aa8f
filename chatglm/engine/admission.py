"""Who may be generated for: first come, first served, and only what the cache can hold."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from chatglm.errors import QueueFull


@dataclass(eq=False)
class Ticket:
    """A request's claim to a place; `turn` is done when it has one."""

    pages: int
    turn: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    left: bool = False


class Places:
    """At most `seats` requests at once, which together fill at most `pages` pages of the cache;
    at most `max_waiting` more wait for a place."""

    def __init__(self, seats: int, max_waiting: int) -> None:
        self.seats, self.max_waiting, self.pages = seats, max_waiting, 0
        self.active = self.reserved = 0  # seats taken; pages promised to them
        self.queue: deque[Ticket] = deque()

    def enter(self, pages: int) -> Ticket:
        """Gets in line. Raises QueueFull if too many wait."""
        ticket = Ticket(pages)
        self.queue.append(ticket)
        self._admit()
        if len(self.queue) > self.max_waiting:
            self.queue.pop()
            raise QueueFull(
                f"{self.active} answers are under way and {len(self.queue)} requests "
                "wait already; try again in a few seconds"
            )
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Gives the place back, or the one in the line; once is enough, more does no harm."""
        if ticket.left:
            return
        ticket.left = True
        if ticket in self.queue:
            self.queue.remove(ticket)
        else:
            self.active -= 1
            self.reserved -= ticket.pages
        self._admit()

    def _admit(self) -> None:
        while (
            self.queue
            and self.active < self.seats
            and self.reserved + self.queue[0].pages <= self.pages
        ):
            ticket = self.queue.popleft()
            self.active += 1
            self.reserved += ticket.pages
            if not ticket.turn.done():
                ticket.turn.set_result(None)
