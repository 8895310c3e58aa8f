"""The errors that users of this package may see, and how their messages show a value."""

from __future__ import annotations

import reprlib
from typing import Any


class InvalidField(ValueError):
    """A field of a request that cannot be served. The message names it and says what would do."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field} {problem}")
        self.field = field  # as the caller wrote it, such as `history[2].role`


class PromptTooLong(InvalidField):
    """Prompt and history leave no token for the answer. Fewer turns of history would do."""

    def __init__(self, prompt_tokens: int, max_length: int, advice: str, exact: bool) -> None:
        count = f"{prompt_tokens}" if exact else f"at least {prompt_tokens}"
        taken = f"prompt and history take {count} tokens"
        super().__init__("max_length", f"{max_length} leaves no room: {taken}; {advice}")
        self.prompt_tokens, self.max_length = prompt_tokens, max_length


class EngineError(RuntimeError):
    """There is no answer, or no whole one. `finish_reason` says how it ended: "error" (the model
    failed), "cancelled" (the engine was stopped) or "timeout"."""

    def __init__(self, message: str, finish_reason: str = "error") -> None:
        super().__init__(message)
        self.finish_reason = finish_reason


class QueueFull(EngineError):
    """Too many requests are queued. The same request may be served a little later."""


SHORT = reprlib.Repr()  # of a large or deep value, Python's own repr would write out all
SHORT.maxlist = SHORT.maxdict = SHORT.maxstring = SHORT.maxlong = SHORT.maxother = 80


def preview(value: Any) -> str:
    """A value as an error message shows it: ASCII, 80 characters at most."""
    if isinstance(value, str):
        text = ascii(value[:80])
    elif isinstance(value, (list, tuple, dict)):
        text = SHORT.repr(value).encode("ascii", "backslashreplace").decode()
    else:
        text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
