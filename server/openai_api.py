"""`/v1`: OpenAI's chat completions, with tools, so that clients written for OpenAI can be used.

Format: https://platform.openai.com/docs/api-reference/chat. What a request may hold is in
openai_request.py.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, NamedTuple

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from fastapi.sse import format_sse_event

from chatglm import Chunk, EngineError
from chatglm.text.tools import ToolCall, may_be_call, read_call
from server.admission import AUTH, admit
from server.openai_request import ChatCompletionRequest
from server.refusals import documented, openai_error
from server.responses import unless_disconnected
from server.sse import EventStream, json_event
from server.stops import StopSearch

# --- 1. The answer ---------------------------------------------------------------------------


class Delta(NamedTuple):
    """What is new in an answer: text, or a call."""

    text: str
    call: ToolCall | None
    finish_reason: str | None
    chunk: Chunk


async def deltas(
    chunks: AsyncGenerator[Chunk, None], names: list[str], stops: list[str]
) -> AsyncGenerator[Delta, None]:
    """Text as it comes, up to a stop sequence; a call of one of `names` once it is complete. The
    last one has a `finish_reason`."""
    sent, search = 0, StopSearch(stops)
    async with aclosing(chunks):
        async for chunk in chunks:
            reason = chunk.finish_reason
            if not reason and names and may_be_call(chunk.raw, names):
                continue
            if reason and (call := read_call(chunk.raw, names)):
                yield Delta("", call, "tool_calls", chunk)
                return
            text, stopped = search.before_stop(chunk.text, ended=reason is not None)
            reason = "stop" if stopped else reason
            if len(text) > sent or reason:
                yield Delta(text[sent:], None, reason, chunk)
                sent = len(text)
            if reason:
                return


class ChatCompletionReply:
    """The objects of one answer."""

    def __init__(
        self, model: str, body: ChatCompletionRequest, chunks: AsyncGenerator[Chunk, None]
    ) -> None:
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        stops = [body.stop] if isinstance(body.stop, str) else body.stop
        self.deltas = deltas(chunks, body.callable_names(), [stop for stop in stops if stop])
        self.include_usage = body.stream_options.include_usage

    async def events(self) -> AsyncGenerator[bytes, None]:
        """chat.completion.chunk objects with the role, then what is new, then how it ended, perhaps
        the usage; [DONE]. After a failure, an error object is the last."""
        try:
            yield self.chunk_event({"role": "assistant", "content": ""})
            async with aclosing(self.deltas):
                async for delta in self.deltas:
                    if delta.call:
                        call = {"index": 0, **call_object(delta.call)}
                        yield self.chunk_event({"tool_calls": [call]})
                    elif delta.text:
                        yield self.chunk_event({"content": delta.text})
            yield self.chunk_event({}, delta.finish_reason)
            if self.include_usage:
                yield self.chunk_event({}, choices=[], usage=usage(delta.chunk))
            yield format_sse_event(data_str="[DONE]")
        except EngineError as error:
            yield json_event(openai_error(HTTPException(503, str(error))))

    def chunk_event(self, delta: dict, finish_reason: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return json_event(
            {"object": "chat.completion.chunk", **self.head, "choices": [choice], **more}
        )

    async def whole(self) -> dict:
        """One chat.completion object."""
        message: dict[str, Any] = {"role": "assistant", "content": ""}
        async with aclosing(self.deltas):
            async for delta in self.deltas:
                message["content"] += delta.text
        if delta.call:
            message |= {"content": None, "tool_calls": [call_object(delta.call)]}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
        }
        return {
            "object": "chat.completion",
            **self.head,
            "choices": [choice],
            "usage": usage(delta.chunk),
        }


def call_object(call: ToolCall) -> dict:
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": call._asdict()}


def usage(chunk: Chunk) -> dict:
    return {
        "prompt_tokens": chunk.prompt_tokens,
        "completion_tokens": chunk.completion_tokens,
        "total_tokens": chunk.prompt_tokens + chunk.completion_tokens,
    }


# --- 2. The routes ---------------------------------------------------------------------------

REFUSAL = openai_error(HTTPException(400, "n 2 is not supported; leave it out"))
COMPLETION = {
    "application/json": {"object": "chat.completion"},
    "text/event-stream": "data: [DONE]",
}
router = APIRouter(prefix="/v1", dependencies=AUTH, responses=documented(REFUSAL))


@router.post(
    "/chat/completions",
    responses=documented(REFUSAL, COMPLETION),
    openapi_extra=ChatCompletionRequest.openapi_body(),
)
async def complete(request: Request) -> Response:
    """An answer in OpenAI's format, with tools, streamed or whole."""
    body, chunks = await admit(request, ChatCompletionRequest)
    reply = ChatCompletionReply(request.app.state.settings.model_name, body, chunks)
    if body.stream:
        return EventStream(reply.events())
    return JSONResponse(await unless_disconnected(request, reply.whole()))


@router.get("/models")
async def models(request: Request) -> dict:
    """The one model that is served."""
    name = request.app.state.settings.model_name
    model = {"id": name, "object": "model", "created": 0, "owned_by": "chatglm"}
    return {"object": "list", "data": [model]}
