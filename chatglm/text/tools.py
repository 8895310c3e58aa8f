"""Tools: how they are declared to a model, and how a call is read from its answer.

What a model wrote is parsed and never run: the published ChatGLM3 code passes it to `eval()`, so
that a prompt could make the server execute anything.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Collection
from contextlib import suppress
from typing import NamedTuple

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


MAX_CALL = 100_000  # characters; a longer call stays text, or reading it would hold all others up


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
    try:
        if content.startswith("```"):
            content = json.dumps(parse_python(content), ensure_ascii=False, allow_nan=False)
        arguments = json.loads(content, parse_constant=int)  # raises for NaN
        return ToolCall(name, content) if isinstance(arguments, dict) else None
    except (
        ValueError,
        TypeError,
        SyntaxError,
        RecursionError,
        MemoryError,
    ):  # ast raises any of these
        return None


def last_message(raw: str) -> tuple[str, str]:
    """The first line of an answer's last message, and the rest. Words begin with an empty line."""
    name, _, content = split_messages(raw)[-1].partition("\n")
    return name.strip(), content.strip()


def parse_python(block: str) -> dict:
    """Keyword arguments of `tool_call(…)` in a fenced block; only literals count as values."""
    _, _, code = block.removesuffix("```").partition("\n")  # after ```python
    code = code.strip()
    call = ast.parse(code, mode="eval").body
    if not (
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id == "tool_call"
        and not call.args
    ):
        raise ValueError("not of the form tool_call(key=value, …)")
    arguments = {keyword.arg: parse_value(code, keyword.value) for keyword in call.keywords}
    if None in arguments:
        raise ValueError("**arguments have no names")
    return arguments


def parse_value(code: str, node: ast.expr) -> object:
    """JSON, which an answer of a given form has, or a Python literal."""
    with suppress(ValueError):
        return json.loads(ast.get_source_segment(code, node) or "")
    return ast.literal_eval(node)


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
    return Published({"name": call.name, "parameters": json.loads(call.arguments)}, messages)


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
