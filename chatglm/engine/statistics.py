"""What an engine has done: counts and times, for the log and for whoever watches a server."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

logger = logging.getLogger("chatglm")

RECENT = 100  # requests that are kept after their end
WINDOW = 10  # seconds over which the speed is told
WORDS = {"stop": "finished", "error": "failed", None: "cancelled"}  # by finish_reason


class RequestStats:
    """Counts and times of one request. `trace_id` is the client's own name for it."""

    def __init__(self, request_id: str, prompt_tokens: int, trace_id: str = "") -> None:
        self.request_id, self.trace_id = request_id, trace_id
        self.prompt_tokens, self.completion_tokens = prompt_tokens, 0
        self.finish_reason: str | None = None  # None: the reader left before the end
        self.hidden_tokens: int | None = None  # before the first visible one; None: not yet known
        self.arrived = self.first_token = self.last_token = time.perf_counter()

    def record(self, completion_tokens: int) -> None:
        self.last_token = time.perf_counter()
        if not self.completion_tokens:
            self.first_token = self.last_token
        self.completion_tokens = completion_tokens

    @property
    def end(self) -> str:
        """How it ended, in a word."""
        return WORDS.get(self.finish_reason) or str(self.finish_reason)

    @property
    def seconds_to_first_token(self) -> float | None:
        return self.first_token - self.arrived if self.completion_tokens else None

    @property
    def seconds_per_token(self) -> float | None:
        """Of those after the first."""
        if self.completion_tokens < 2:
            return None
        return (self.last_token - self.first_token) / (self.completion_tokens - 1)

    def __str__(self) -> str:
        speed = 1 / self.seconds_per_token if self.seconds_per_token else 0
        trace = f", X-Request-Id {self.trace_id}" if self.trace_id else ""
        return (
            f"{self.request_id}: {self.end}, "
            f"{self.prompt_tokens} + {self.completion_tokens} tokens, "
            f"first after {self.first_token - self.arrived:.2f} s, {speed:.0f} tokens/s{trace}"
        )


class EngineStatistics:
    """Used on the event loop. `observers` are called with each request that has ended."""

    def __init__(self) -> None:
        self.recent: deque[RequestStats] = deque(maxlen=RECENT)
        self.observers: list[Callable[[RequestStats], None]] = []
        self._seconds: deque[list[int]] = deque(maxlen=WINDOW + 1)  # [second, tokens in it]

    def count(self, stats: RequestStats, completion_tokens: int) -> None:
        """Its answer has so many tokens now."""
        now = int(time.monotonic())
        if not self._seconds or self._seconds[-1][0] != now:
            self._seconds.append([now, 0])
        self._seconds[-1][1] += completion_tokens - stats.completion_tokens
        stats.record(completion_tokens)

    def finish(self, stats: RequestStats) -> None:
        logger.info("%s", stats)
        self.recent.append(stats)
        for observer in self.observers:
            observer(stats)

    def tokens_per_second(self) -> float:
        """Of all answers together, over the last WINDOW whole seconds."""
        now = int(time.monotonic())
        return (
            sum(tokens for second, tokens in self._seconds if now - WINDOW <= second < now) / WINDOW
        )
