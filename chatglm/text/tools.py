"""Tools: how they are declared to a model, and how a call is read from its answer.

What a model wrote is parsed and never run: the published ChatGLM3 code passes it to `eval()`, so
that a prompt could make the server execute anything.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import Any, NamedTuple

from chatglm.text.tokenizer import (
    ANOTHER_MESSAGE,
    content_of,
    fill_in_year,
    split_messages,
    without_metadata,
)

# The system message of the published openai_api.py; the declarations follow as JSON.
INTRODUCTION = (
    "Answer the following questions as best as you can. You have access to the following tools:"
)


# A call beyond these limits stays text: reading it would hold all others up.
MAX_CALL = 2**16  # characters; a file's contents may be an argument
MAX_TOKENS = 3000  # of Python, whose parser takes its time for each; a whole string is one
MAX_DEPTH = 100  # lists and objects within each other, as in requests

# One token of Python, or a part of one, and the space behind it. `refused` is a quote that begins
# an f-string, in which more code may stand, or a string that does not end.
TOKEN = re.compile(
    r"""(?:[bru]{0,2}(?:('{3}|"{3})(?:[^\\]|\\.)*?\1|(?!'{3}|"{3})(['"])(?:[^\\\n]|\\.)*?\2)"""
    r"""|(?P<refused>\w{0,2}['"])|\#[^\n]*|\d\w*(?:\.\d\w*)?|\w+|[^\w\s])\s*""",
    re.DOTALL | re.IGNORECASE,
)


class ToolCall(NamedTuple):
    name: str
    arguments: str  # a JSON object


def declare(messages: list[dict], tools: list[dict]) -> list[dict]:
    """The messages with `tools` in their system message, which is added where there is none.

    A tool is `{"name", "description", "parameters"}`, `parameters` being a JSON schema.
    """
    system, rest = "", messages
    if messages and messages[0]["role"] == "system":
        system, rest = messages[0]["content"] + "\n", messages[1:]
    return [{"role": "system", "content": system + INTRODUCTION, "tools": tools}, *rest]


def write_call(name: str, arguments: dict) -> dict:
    """The assistant message of a call, in ChatGLM3's format; chat templates take `arguments`.

    >>> write_call("get_weather", {"city": "Paris"})["content"]
    "```python\\ntool_call(city='Paris')\\n```"
    """
    written = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return {
        "role": "assistant",
        "metadata": name,
        "arguments": arguments,
        "content": f"```python\ntool_call({written})\n```",
    }


def read_call(raw: str, names: Collection[str]) -> ToolCall | None:
    """The call in an answer with its metadata line, or None if it is no call of one of `names`.

    Two formats: ChatGLM3's, as above, and GLM-4's, the name and then the arguments as JSON.
    """
    name, content = last_message(raw)
    if name not in names or len(content) > MAX_CALL:
        return None
    is_python = content.startswith("```")
    try:
        arguments = parse_python(content) if is_python else parse_json(content)
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        # Raises for an unpaired surrogate, which an escape in the content may stand for.
        (content + written).encode()
    except (
        ValueError,
        TypeError,
        SyntaxError,
        RecursionError,
        MemoryError,
    ):  # ast raises any of these
        return None
    if not isinstance(arguments, dict) or is_deep(arguments):
        return None
    return ToolCall(name, written if is_python else content)


def is_deep(value: object) -> bool:
    """Whether it is nested so deeply that writing it in an answer might fail."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inside: list[Iterable] = [each for each in level if isinstance(each, (list, tuple))]
        inside += [each.values() for each in level if isinstance(each, dict)]
        level = [entry for each in inside for entry in each]
    return any(isinstance(each, (list, tuple, dict)) for each in level)


def last_message(raw: str) -> tuple[str, str]:
    """The first line of an answer's last message, and the rest. Words begin with an empty line."""
    name, _, content = split_messages(raw)[-1].partition("\n")
    return name.strip(), content.strip()


def parse_python(block: str) -> dict:
    """Keyword arguments of `tool_call(…)` in a fenced block; only literals count as values."""
    _, _, code = block.removesuffix("```").partition("\n")  # after ```python
    code = code.strip().replace("\r\n", "\n").replace("\r", "\n")  # as the parser reads them
    check_tokens(code)
    call = ast.parse(code, mode="eval").body
    if not (
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id == "tool_call"
        and not call.args
    ):
        raise ValueError("not of the form tool_call(key=value, …)")
    source = code.encode()  # the parser counts bytes, within a line
    starts = [0, *(newline.end() for newline in re.finditer(b"\n", source))]
    arguments = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise ValueError("**arguments have no names")
        written = source_of(keyword.value, source, starts)
        arguments[keyword.arg] = parse_value(written, keyword.value)
    return arguments


def check_tokens(code: str) -> None:
    """Raises ValueError for code that takes long to parse, or that is surely no plain call."""
    for number, token in enumerate(TOKEN.finditer(code)):
        if token["refused"] or number == MAX_TOKENS:
            raise ValueError("an f-string, a string without an end, or too many tokens")


def source_of(node: ast.expr, source: bytes, starts: list[int]) -> bytes:
    """What a value was parsed from. `ast` has this too, but takes all lines apart each time."""
    assert node.end_lineno is not None and node.end_col_offset is not None
    begin = starts[node.lineno - 1] + node.col_offset
    return source[begin : starts[node.end_lineno - 1] + node.end_col_offset]


def parse_value(written: bytes, node: ast.expr) -> object:
    """JSON, which an answer of a given form has, or a Python literal."""
    with suppress(ValueError):
        return parse_json(written.decode())
    return ast.literal_eval(node)


def parse_json(text: str) -> Any:
    """Raises ValueError for NaN and Infinity, which are no JSON."""
    return json.loads(text, parse_constant=int, parse_float=finite)


def finite(number: str) -> float:
    """1e999 is JSON, but Python reads it as infinity, which cannot be written again."""
    largest = sys.float_info.max
    return max(-largest, min(float(number), largest))


def may_be_call(raw: str, names: Collection[str]) -> bool:
    """Whether an answer so far may still become a call."""
    name, newline, content = split_messages(raw)[-1].partition("\n")
    if not newline:
        return any(known.startswith(name) for known in names)
    content = content.lstrip()
    return name.strip() in names and (content[:1] == "{" or content[:3] == "```"[: len(content)])


class Published(NamedTuple):
    """An answer as the published `model.chat` gives it, and as its history has it."""

    response: str | dict  # text, or a call's name and parameters
    messages: list[tuple[str, str]]  # metadata and content of each


def published_response(raw: str, text: str, names: list[str]) -> Published:
    call = read_call(raw, names)
    if call is None:
        return Published(text, [("", text)])
    messages = [("", content_of(each, finished=True)) for each in split_messages(raw)[:-1]]
    messages.append(last_message(raw))
    return Published({"name": call.name, "parameters": parse_json(call.arguments)}, messages)


def words_before_call(raw: str) -> str:
    """What an answer that ends in a call says before, as `visible` shows it."""
    words = fill_in_year(raw.rpartition(ANOTHER_MESSAGE)[0], finished=True)
    return without_metadata(words, finished=True)


def tool_names(messages: list) -> list[str]:
    """Of the tools that a history's system message declares, in either published form."""
    first = messages[0] if messages else None
    tools = first.get("tools") if isinstance(first, dict) else None
    described = [
        tool.get("function", tool)
        for tool in (tools if isinstance(tools, list) else [])
        if isinstance(tool, dict)
    ]
    names = [tool.get("name") for tool in described if isinstance(tool, dict)]
    return [name for name in names if isinstance(name, str)]
