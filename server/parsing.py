"""From bytes to JSON that later code can rely on: bounded in depth and number, every string text.

This runs in a thread, and takes time in proportion to the body, whatever the body holds.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any

from chatglm.errors import InvalidField, preview

MAX_DEPTH = 100  # lists and objects within each other; the schemas of tools have about ten
MAX_VALUES = 100_000  # in one body; a conversation of 20,000 turns has 60,000
SEPARATORS = (b",", b"[", b"{")  # in front of each value, but the first of all
# One JSON string, or what there is of it. It never goes back, so its time is linear.
STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)


def parse(body: bytes) -> Any:
    """Raises ValueError if it is not JSON, or holds too many values."""
    # Counted first: reading holds Python's lock to the end, so the event loop would wait for it.
    if has_too_many(body):
        raise ValueError(f"the body holds more than {MAX_VALUES} values; send less")
    try:
        return json.loads(body.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise ValueError(f"the body must be a JSON object, as in /docs: {error}") from error


def has_too_many(body: bytes) -> bool:
    """Whether it holds more than MAX_VALUES; what stands in strings does not count."""
    if sum(map(body.count, SEPARATORS)) <= MAX_VALUES:
        return False
    values = end = 0
    # String by string: one call for all of them would hold Python's lock as well.
    for string in STRING.finditer(body):
        values += sum(body.count(each, end, string.start()) for each in SEPARATORS)
        if values > MAX_VALUES:
            return True
        end = string.end()
    return values + sum(body.count(each, end) for each in SEPARATORS) > MAX_VALUES


def check_values(field: str, value: object) -> None:
    """Raises InvalidField, naming the place, for what a later step could not write out: a lone
    surrogate, an infinite number, or values that are nested too deeply."""
    check([field], value)


def check(path: list[object], value: object) -> None:
    """Checks what lies at `path`."""
    if problem := problem_of(value):
        raise InvalidField(written(path), problem)
    if not isinstance(value, (list, dict)):
        return
    if len(path) > MAX_DEPTH:  # Python's own limit would come later, in whatever code is unlucky
        raise InvalidField(str(path[0]), f"is nested more than {MAX_DEPTH} deep")
    entries: Iterable = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in entries:
        path.append(key)
        if problem := problem_of(key):
            raise InvalidField(written(path[:-1]), f"has a key that {problem}")
        check(path, entry)
        path.pop()


def problem_of(value: object) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be a finite number, not {value}"
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            what = preview(value[error.start])
            return f"contains an unpaired surrogate, which no encoding can express: {what}"
    return ""


def written(path: list[object]) -> str:
    """A path as messages name it: messages.0.content. A client chooses its keys, so each is cut."""
    cut = [preview(str(key)).strip("'")[:40] for key in path[1:9]]
    return ".".join([str(path[0]), *cut])
