"""OpenAI's chat completions: what a request may hold, and the objects of an answer.

Format: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from typing import Any, Literal, NamedTuple

from pydantic import ConfigDict, Field

from chatglm.engine.sequence import Chunk
from chatglm.errors import EngineError, preview
from chatglm.text.messages import check_text
from chatglm.text.tools import ToolCall, declare, may_be_call, read_call, write_call
from server.bodies import Sampling, Strict

ROLES = {"developer": "system", "tool": "observation", "function": "observation"}  # our names

# What would change the answer and is not supported, with the values that ask for nothing.
UNSUPPORTED = {
    "n": [1],
    "logprobs": [False],
    "top_logprobs": [0],
    "logit_bias": [{}],
    "functions": [[]],
    "frequency_penalty": [0],
    "presence_penalty": [0],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
}


# 1. The request


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Named(Strict):
    name: str
    arguments: str = Field("", description="a JSON object")


class Call(Strict):
    function: Named


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    tool_calls: list[Call] | None = None


class Function(Strict):
    name: str = Field(pattern=r"^[\w.-]{1,64}$")
    description: str = ""
    parameters: dict[str, Any] = Field({}, description="a JSON schema")


class Tool(Strict):
    type: Literal["function"]
    function: Function


class Choice(Call):
    type: Literal["function"]


class StreamOptions(Strict):
    include_usage: bool = False


class Completion(Sampling):
    """A conversation to go on with. Fields that are not listed are ignored, but for those that
    would change the answer (n, logprobs, response_format, …): they are refused."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "example": {"model": "chatglm", "messages": [{"role": "user", "content": "你好"}]}
        },
    )
    model: str = Field("", description="any name: the server has one model")
    messages: list[Message] = Field(min_length=1, description="the last one not the assistant's")
    max_tokens: int | None = Field(None, ge=1, description="tokens of the answer")
    max_completion_tokens: int | None = Field(None, ge=1, description="the same, newer name")
    stop: str | list[str] = Field([], description="texts that end the answer; not part of it")
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    tools: list[Tool] = []
    tool_choice: Literal["none", "auto", "required"] | Choice = "auto"

    def callable_names(self) -> list[str]:
        """The tools that the model may call. Raises ValueError for one that is not declared."""
        names = [tool.function.name for tool in self.tools]
        if self.tool_choice == "none":
            return []
        if isinstance(self.tool_choice, Choice):
            wanted = self.tool_choice.function.name
            if wanted not in names:
                raise ValueError(f"tool_choice names {preview(wanted)}, which is not among tools")
            return [wanted]
        if self.tool_choice == "required" and len(names) != 1:
            raise ValueError("tool_choice 'required' needs exactly one tool; name the function")
        return names

    def to_messages(self) -> list[dict]:
        """As the tokenizer takes them. Raises ValueError, naming the field."""
        for field, value in (self.model_extra or {}).items():
            if field in UNSUPPORTED and value not in UNSUPPORTED[field]:
                raise ValueError(f"{field} {preview(value)} is not supported; leave it out")
        if self.messages[-1].role == "assistant":
            raise ValueError("messages must not end with the assistant's; add the user's")
        messages = []
        for i, message in enumerate(self.messages):
            content = message.content or ""
            content = content if isinstance(content, str) else "".join(p.text for p in content)
            check_text(content, f"messages.{i}.content")
            if content or not message.tool_calls:
                role = ROLES.get(message.role, message.role)
                messages.append({"role": role, "content": content})
            messages += [
                write_call(
                    call.function.name,
                    read_arguments(call.function.arguments, f"messages.{i}.tool_calls: arguments"),
                )
                for call in message.tool_calls or []
            ]
        names = self.callable_names()
        tools = [tool.function.model_dump() for tool in self.tools if tool.function.name in names]
        return declare(messages, tools) if tools else messages

    def settings(self) -> dict:
        """What `Engine.prepare` takes; a call that must come is begun for the model."""
        limits = [n for n in (self.max_tokens, self.max_completion_tokens) if n is not None]
        forced = self.tool_choice == "required" or isinstance(self.tool_choice, Choice)
        return {
            **self.sampling(),
            "max_new_tokens": min(limits, default=None),
            "beginning": self.callable_names()[0] + "\n" if forced else "",
        }


def read_arguments(text: str, where: str) -> dict:
    with suppress(ValueError, RecursionError):
        if isinstance(arguments := json.loads(text or "{}"), dict):
            return arguments
    raise ValueError(f"{where} must be a JSON object, not {preview(text)}")


# 2. The answer


class Part(NamedTuple):
    """What is new in an answer: text, or a call."""

    text: str
    call: ToolCall | None
    finish_reason: str | None
    chunk: Chunk


async def parts(
    chunks: AsyncIterator[Chunk], names: list[str], stops: list[str]
) -> AsyncIterator[Part]:
    """Text as it comes, up to a stop sequence; a call of one of `names`, when it is complete."""
    sent = 0
    async with aclosing(chunks):
        async for chunk in chunks:
            reason = chunk.finish_reason
            if not reason and names and may_be_call(chunk.raw, names):
                continue
            if reason and (call := read_call(chunk.raw, names)):
                yield Part("", call, "tool_calls", chunk)
                return
            text, stopped = before_stop(chunk.text, stops, bool(reason))
            reason = "stop" if stopped else reason
            if len(text) > sent or reason:
                yield Part(text[sent:], None, reason, chunk)
                sent = len(text)
                await asyncio.sleep(0)  # so that a hang-up is noticed where chunks are ready
            if reason:
                return


def before_stop(text: str, stops: list[str], ended: bool) -> tuple[str, bool]:
    """The text before the first stop sequence, and whether there is one. While more may come, an
    end that one could begin with is held back.

    >>> before_stop("a, b", [", b"], False), before_stop("a, ", [", b"], False)
    (('a', True), ('a', False))
    """
    if found := [text.find(stop) for stop in stops if stop in text]:
        return text[: min(found)], True
    held = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return text[: len(text) - max(held, default=0)] if not ended else text, False


class Reply:
    """The objects of one answer."""

    def __init__(self, model: str, body: Completion, chunks: AsyncIterator[Chunk]) -> None:
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        stops = [body.stop] if isinstance(body.stop, str) else body.stop
        self.parts = parts(chunks, body.callable_names(), [stop for stop in stops if stop])
        self.usage = body.stream_options.include_usage

    async def stream(self) -> AsyncIterator[str]:
        """Data of events: chat.completion.chunk objects with the role, then what is new, then how
        it ended, perhaps the usage; [DONE]. After a failure, an error object is the last."""

        def data(delta: dict, finish_reason: str | None = None, **more) -> str:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
            return json.dumps(
                {"object": "chat.completion.chunk", **self.head, "choices": [choice], **more},
                ensure_ascii=False,
            )

        try:
            yield data({"role": "assistant", "content": ""})
            async with aclosing(self.parts):
                async for part in self.parts:
                    if part.call:
                        yield data({"tool_calls": [{"index": 0, **call_object(part.call)}]})
                    elif part.text:
                        yield data({"content": part.text})
            yield data({}, part.finish_reason)
            if self.usage:
                yield data({}, choices=[], usage=usage(part.chunk))
            yield "[DONE]"
        except EngineError as error:
            yield json.dumps(error_object(503, str(error)))

    async def whole(self) -> AsyncIterator[str]:
        """One chat.completion object, as JSON."""
        message: dict = {"role": "assistant", "content": ""}
        async with aclosing(self.parts):
            async for part in self.parts:
                message["content"] += part.text
        if part.call:
            message |= {"content": None, "tool_calls": [call_object(part.call)]}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": part.finish_reason,
        }
        yield json.dumps(
            {
                "object": "chat.completion",
                **self.head,
                "choices": [choice],
                "usage": usage(part.chunk),
            },
            ensure_ascii=False,
        )


def call_object(call: ToolCall) -> dict:
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": call._asdict()}


def usage(chunk: Chunk) -> dict:
    return {
        "prompt_tokens": chunk.prompt_tokens,
        "completion_tokens": chunk.completion_tokens,
        "total_tokens": chunk.prompt_tokens + chunk.completion_tokens,
    }


def error_object(status: int, message: str) -> dict:
    """How OpenAI's clients want to be refused; the status decides which exception they raise."""
    usual = "server_error" if status >= 500 else "invalid_request_error"
    kind, code = {
        401: ("authentication_error", "invalid_api_key"),
        429: ("rate_limit_error", "queue_full"),
    }.get(status, (usual, None))
    param = message.split(" ", 1)[0] if status == 400 else None
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
