"""What goes into the engine and what comes out of it."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass

from transformers.generation.continuous_batching.requests import GenerationOutput

logger = logging.getLogger("chatglm")


@dataclass
class Chunk:
    """An answer so far. The first one is empty: the request is checked and stands in line."""

    text: str  # what a user sees
    raw: str  # the same with the metadata line that ChatGLM3 begins with
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
    beginning: str = ""  # of the answer, given and not generated


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
        words = {"stop": "finished", "error": "failed", None: "cancelled"}
        ended = words.get(self.reason, self.reason)
        speed = (self.count - 1) / (self.last - self.first) if self.last > self.first else 0
        return (
            f"{self.id}: {ended}, {self.prompt_tokens} + {self.count} tokens, "
            f"first after {self.first - self.arrived:.2f} s, {speed:.0f} tokens/s"
        )


def finish_reason(
    output: GenerationOutput, read: int, stop_ids: list[int], stopping: bool
) -> str | None:
    """How an answer ended, or None; `read` of its tokens were looked at before."""
    if any(map(math.isnan, output.logprobs[read:])):  # the sampler's sign for a broken row
        logger.error("%s: the model's scores are not finite", output.request_id)
        return "error"
    if not output.is_finished():
        return None
    if output.error is not None:
        if stopping:
            return "cancelled"
        logger.error("%s: %s", output.request_id, output.error)
        return "error"
    return "stop" if output.generated_tokens[-1] in stop_ids else "length"
