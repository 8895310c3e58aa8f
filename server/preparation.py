"""Work on one request's data, such as reading its JSON and tokenising it: a few threads of its own.

On the event loop, such work would hold up every answer under way. In asyncio's own pool, one client
with a hundred large requests would hold up all others. Here the clients take turns.
"""

from __future__ import annotations

import asyncio
import sys
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import chatglm

Result = TypeVar("Result")
THREADS = 2  # more would only wait for each other: most of the work holds Python's lock
# Seconds after which these threads give Python's lock to the event loop, or to the model. Python's
# own 5 ms, for each of the hundred operations of a step, would slow every answer down.
SWITCH_INTERVAL = 0.0005
MAX_WAITING = 400  # pieces of work of one client; more than all places and the queue have


class FairPool:
    """At most THREADS pieces of work at once; of those that wait, each client's in turn. Used on
    the event loop only."""

    def __init__(self) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL)
        self._threads = ThreadPoolExecutor(THREADS, "prepare")
        self._free = THREADS
        self._waiting: OrderedDict[str, deque[asyncio.Future]] = OrderedDict()

    async def run(self, client: str, work: Callable[..., Result], *arguments: Any) -> Result:
        """The result of `work`. If this is cancelled, work that has not begun never will. Raises
        QueueFull for a client that has too much waiting."""
        await self._turn(client)
        running = asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
        # What runs cannot be stopped: its thread is taken until it ends, also if nobody waits.
        running.add_done_callback(self._release)
        return await asyncio.shield(running)

    async def _turn(self, client: str) -> None:
        """Waits for a free thread, and takes it."""
        turn = asyncio.get_running_loop().create_future()
        mine = self._waiting.setdefault(client, deque())
        if len(mine) >= MAX_WAITING:
            raise chatglm.QueueFull("too many of your requests wait already; try again later")
        mine.append(turn)
        self._next()
        try:
            await turn
        except asyncio.CancelledError:
            if turn in mine:
                mine.remove(turn)
            elif not turn.cancelled():  # it had just been given a thread
                self._release()
            raise

    def _release(self, running: asyncio.Future | None = None) -> None:
        if running is not None and not running.cancelled():
            running.exception()  # looked at, or asyncio would report an error that nobody awaits
        self._free += 1
        self._next()

    def _next(self) -> None:
        while self._free and self._waiting:
            client, turns = self._waiting.popitem(last=False)
            while turns and turns[0].done():  # its client has left, and will take it out later
                turns.popleft()
            if turns:  # there are none where all have disconnected
                self._free -= 1
                turns.popleft().set_result(None)
                self._waiting[client] = turns  # at the end: the others come first
