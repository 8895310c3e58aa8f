"""Conversations: the two published forms of `history`, as a list of messages."""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections.abc import Iterator
from typing import Any

from chatglm.errors import InvalidField, preview

INVISIBLE = ("Zs", "Zl", "Zp", "Cc", "Cf")  # Unicode categories of spaces, controls, formats

INDENTED = json.JSONEncoder(indent=4, ensure_ascii=False)

MESSAGE_KEYS = ("role", "content", "metadata", "tools")

# Which role may follow which; None is the beginning.
FOLLOWS: dict[str, set[str | None]] = {
    "system": {None},
    "user": {None, "system", "assistant"},
    "assistant": {"user", "observation"},
    "observation": {"assistant"},
}


def to_messages(prompt: str, history: list | None = None, role: str = "user") -> list[dict]:
    """`history` in either published form, and the prompt, as messages.

    >>> to_messages("and you?", [["hi", "hello"]])[0]
    {'role': 'user', 'content': 'hi'}

    The forms: `[query, response]` pairs (ChatGLM-6B, ChatGLM2) or `{"role", "content"}` dicts
    (ChatGLM3). Raises ValueError, naming the entry, for anything else, and for a prompt with
    nothing visible in it.
    """
    if not is_visible(prompt):
        raise ValueError(f"prompt must hold something visible, not {preview(prompt)}")
    if history is not None and not isinstance(history, (list, tuple)):
        raise ValueError(f"history must be a list, not {preview(history)}")
    messages: list[dict] = []
    history = list(history or [])
    for i, turn in enumerate(history):
        if isinstance(turn, dict) != isinstance(history[0], dict):
            raise ValueError(
                f"history[{i}]: use one form throughout, [query, response] pairs or "
                '{"role": …, "content": …} dicts'
            )
        if isinstance(turn, dict):
            messages.append(check_message(turn, f"history[{i}]"))
        else:
            query, response = check_pair(turn, f"history[{i}]")
            messages += [
                {"role": "user", "content": query},
                {"role": "assistant", "content": response},
            ]
    messages.append(check_message({"role": role, "content": prompt}, "prompt"))
    check_order(messages)
    return messages


def check_pair(turn: Any, where: str) -> tuple[str, str]:
    two = isinstance(turn, (list, tuple)) and len(turn) == 2
    if not two or not all(isinstance(text, str) for text in turn):
        raise ValueError(
            f"{where} must be a [query, response] pair of two strings or a "
            f'{{"role": …, "content": …}} dict, not {preview(turn)}'
        )
    for text in turn:
        check_text(text, where)
    return turn[0], turn[1]


def check_message(turn: dict, where: str) -> dict:
    if not isinstance(turn.get("role"), str) or turn["role"] not in FOLLOWS:
        raise ValueError(
            f"{where}.role must be one of {', '.join(FOLLOWS)}, not {preview(turn.get('role'))}"
        )
    for field in ("content", "metadata"):
        text = turn.get(field, "" if field == "metadata" else None)
        if not isinstance(text, str):
            raise ValueError(f"{where}.{field} must be a string, not {preview(text)}")
        check_text(text, f"{where}.{field}")
    tools = turn.get("tools")
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"{where}.tools must be a list of objects, not {preview(tools)}")
    # Other keys are ignored, as a call's `arguments`, which only `write_call` may give.
    return {key: turn[key] for key in MESSAGE_KEYS if key in turn}


def check_order(messages: list[dict]) -> None:
    before: str | None = None
    for i, role in enumerate(m["role"] for m in messages):
        if before not in FOLLOWS[role]:
            place = f"history[{i}]" if i + 1 < len(messages) else "prompt"
            after = f"after {before!r}" if before else "at the beginning"
            raise ValueError(
                f"{place}: role {role!r} cannot stand {after}; system may come "
                "first, then user and assistant, observation after assistant"
            )
        before = role


def check_text(text: str, where: str) -> None:
    """Raises ValueError for an unpaired surrogate: it cannot be encoded as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} contains an unpaired surrogate, which no encoding can express: "
            f"{preview(text[error.start])}"
        ) from error


def is_visible(text: str) -> bool:
    """Whether anything is left when it is printed. Each character is looked at once in a part: a
    million spaces would take a tenth of a second."""
    parts = (text[begin : begin + 4096] for begin in range(0, len(text), 4096))
    return any(unicodedata.category(c) not in INVISIBLE for part in parts for c in set(part))


def texts_of(prompt: list[dict] | str) -> Iterator[str]:
    """All that a text says, or messages, piece by piece.

    Tools are written as the chat formats do, indented: nested deeply, they grow with the square of
    the depth. Raises InvalidField for tools that are nested too deeply to be written.
    """
    if isinstance(prompt, str):
        yield prompt
        return
    for message in prompt:
        yield message["content"]
        yield message.get("metadata", "")
        if not message.get("tools"):
            continue
        pieces = INDENTED.iterencode(message["tools"])
        try:
            while some := "".join(itertools.islice(pieces, 1000)):
                yield some
        except RecursionError:
            raise InvalidField("tools", "are nested too deeply") from None


def extend_history(
    history: list | None, prompt: str, messages: list[tuple[str, str]], role: str = "user"
) -> list:
    """`history` with this turn added, in the form it came in (pairs when it was empty). `messages`
    are the metadata and the content of those that the response consists of: one, as a rule. The
    metadata is the name of the tool that it calls."""
    history = list(history or [])
    if not (history and isinstance(history[0], dict)):
        return [*history, [prompt, "\n".join(content for _, content in messages)]]
    has_metadata = any("metadata" in turn for turn in history) or any(name for name, _ in messages)
    answered = [
        {"role": "assistant", **({"metadata": metadata} if has_metadata else {}), "content": text}
        for metadata, text in messages
    ]
    return [*history, {"role": role, "content": prompt}, *answered]
