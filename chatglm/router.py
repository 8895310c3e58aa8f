"""From the thread that runs the model to the event loop: what is new of each answer.

While Python runs on the event loop, the thread of the model waits for the interpreter. So a
reader is woken for the first few tokens as they come, then at most 25 times a second, which looks
smooth, and for the last; and the thread rouses the loop only in a step in which some reader is to
be woken.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput

PAUSE = 0.04    # seconds from one chunk to the next, at least
UNHURRIED = 8   # tokens that come without a pause


class Newest:
    """What the thread has last reported of a request, for its reader; older reports are lost, but
    each holds all the tokens. After `timeout` seconds there is only TimeoutError."""

    _resting: asyncio.TimerHandle | None = None  # from one chunk to the next

    def __init__(self, timeout: float | None, at_last: Callable[[], None]) -> None:
        self._output: GenerationOutput | None = None
        self._at_last, self._is_late, self._arrived = at_last, False, asyncio.Event()
        # One timer for all: asyncio.timeout() around each wait would take as long as the wait.
        self.loop = asyncio.get_running_loop()
        self._timer = self.loop.call_later(timeout, self._expire) if timeout else None

    @property
    def is_last(self) -> bool:
        return self._output is not None and self._output.is_finished()

    def put(self, output: GenerationOutput) -> bool:
        """From the thread, once a step. Whether `wake` is to be called on the loop."""
        self._output = output  # first: who ends a rest looks whether there is another by then
        return self._resting is None or output.is_finished()

    def wake(self) -> None:
        if self.is_last:  # a reader that reads no more must not keep others out
            self._at_last()
        self._arrived.set()

    async def get(self) -> GenerationOutput:
        await self._arrived.wait()
        self._arrived.clear()
        output = self._output
        if self.is_last:
            return self._output
        if self._is_late:
            raise TimeoutError
        if len(output.generated_tokens) > UNHURRIED:
            self._resting = self.loop.call_later(PAUSE, self._rested, output)
        return output

    def close(self) -> None:
        for timer in (self._timer, self._resting):
            if timer:
                timer.cancel()

    def _rested(self, read: GenerationOutput) -> None:
        self._resting = None
        if self._output is not read:
            self._arrived.set()

    def _expire(self) -> None:
        self._is_late = True
        self._arrived.set()


class Router(OutputRouter):
    """Hands each of the thread's outputs to its reader; what has none any more is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: dict[str, Newest] = {}  # by request id

    def deliver(self, output: GenerationOutput) -> None:
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        due: dict[asyncio.AbstractEventLoop, list[Newest]] = {}
        for output in outputs:
            reader = self.readers.get(output.request_id)
            if reader is not None and reader.put(output):
                due.setdefault(reader.loop, []).append(reader)
        for loop, readers in due.items():
            loop.call_soon_threadsafe(wake_all, readers)


def wake_all(readers: list[Newest]) -> None:
    for reader in readers:
        reader.wake()
