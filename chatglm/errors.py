"""The errors that users of this package may see, and how their messages show a value."""

from __future__ import annotations

from typing import Any


class InvalidField(ValueError):
    """A field of a request that cannot be served. The message names it and says what would do."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field} {problem}")
        self.field = field  # as the caller wrote it, such as `history[2].role`


class PromptTooLong(InvalidField):
    """Prompt and history leave no token for the answer. Fewer turns of history would do."""


class EngineError(RuntimeError):
    """The engine cannot answer: it was stopped, its thread died, or the time was up."""


class QueueFull(EngineError):
    """Too many requests are queued. The same request may be served a little later."""


def preview(value: Any) -> str:
    """A value as an error message shows it: ASCII, 80 characters at most."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
