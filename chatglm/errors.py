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
    """The conversation leaves no token for the answer. Fewer turns of history would do.

    `max_length` is named only if the request set it below the `context`: it may have no such field.
    """

    def __init__(self, prompt_tokens: int, max_length: int, context: int, exact: bool) -> None:
        count = f"{prompt_tokens}" if exact else f"at least {prompt_tokens}"
        if max_length < context:
            taken = f"prompt and history take {count} tokens"
            advice = "shorten the history, or raise max_length"
            super().__init__("max_length", f"{max_length} leaves no room: {taken}; {advice}")
        else:
            super().__init__(
                "the conversation",
                f"takes {count} tokens, and there is room for {context}, its answer included; "
                "shorten it",
            )
            self.field = "history"
        self.prompt_tokens, self.max_length = prompt_tokens, min(max_length, context)


class EngineError(RuntimeError):
    """There is no answer, or no whole one. `finish_reason` says how it ended: "error" (the model
    failed), "cancelled" (the engine was stopped) or "timeout"."""

    def __init__(self, message: str, finish_reason: str = "error") -> None:
        super().__init__(message)
        self.finish_reason = finish_reason


class AnswerEnded(Exception):
    """What a reader throws into the chunks of an answer once it has all that it wants: the answer
    has ended, and was not cancelled."""


class QueueFull(EngineError):
    """Too many requests are queued. The same request may be served a little later."""


SHORT = reprlib.Repr()  # of a large or deep value, Python's own repr would write out all
SHORT.maxlist = SHORT.maxdict = SHORT.maxstring = SHORT.maxlong = SHORT.maxother = 80


def preview(value: Any) -> str:
    """A value as an error message shows it: 80 characters at most. Chinese stays readable; what
    cannot be seen, or cannot be encoded, is written as an escape."""
    if isinstance(value, str):
        text = repr(value[:80])
    elif isinstance(value, (list, tuple, dict)):
        text = SHORT.repr(value)
    else:
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def is_panic(error: BaseException) -> bool:
    """Whether a library's Rust code gave up. pyo3's PanicException is no Exception, and has no
    module to import it from."""
    return type(error).__name__ == "PanicException"
