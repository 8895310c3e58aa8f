"""What goes into the engine and what comes out of it."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass
class Chunk:
    """An answer so far."""

    text: str                         # what a user sees
    raw: str                          # the same with the metadata line that ChatGLM3 begins with
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str | None = None  # at the end: stop, length, cancelled or error


@dataclass
class Request:
    """A checked and tokenised request, ready for `Engine.stream`."""

    input_ids: list[int]
    max_new_tokens: int
    temperature: float
    top_p: float
    repetition_penalty: float
    seed: int


class Report:
    """What became of a request, for one line in the log."""

    def __init__(self, request_id: str, prompt_tokens: int) -> None:
        self.id, self.prompt_tokens, self.count = request_id, prompt_tokens, 0
        self.reason: str | None = None
        self.arrived = self.first = self.last = time.perf_counter()

    def token(self, count: int) -> None:
        self.last = time.perf_counter()
        self.first = self.first if self.count else self.last
        self.count = count

    def __str__(self) -> str:
        ended = {"stop": "finished", "error": "failed", None: "cancelled"}.get(self.reason, self.reason)
        speed = (self.count - 1) / (self.last - self.first) if self.last > self.first else 0
        return (f"{self.id}: {ended}, {self.prompt_tokens} + {self.count} tokens, "
                f"first after {self.first - self.arrived:.2f} s, {speed:.0f} tokens/s")
