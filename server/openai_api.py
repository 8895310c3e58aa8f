"""`/v1`: OpenAI's chat completions, with tools, so that clients written for OpenAI can be used.

Format: https://platform.openai.com/docs/api-reference/chat. What a request may hold is in
openai_request.py.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from fastapi.sse import format_sse_event

from chatglm import Chunk, EngineError
from chatglm.errors import preview
from chatglm.sampling import TokenLogprob
from chatglm.text.tools import ToolCall
from server.answers import Delta, deltas, logprobs_object, merged
from server.http_errors import documented, openai_error
from server.incoming import AUTH, admit
from server.openai_request import ChatCompletionRequest
from server.responses import unless_disconnected
from server.sse import EventStream, json_event

# --- 1. The answer ---------------------------------------------------------------------------


class ChatCompletionReply:
    """The objects of one answer."""

    def __init__(
        self,
        model: str,
        body: ChatCompletionRequest,
        answers: list[AsyncGenerator[Chunk, None]],
        tokenizer: Any,
    ) -> None:
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self.body, self.tokenizer = body, tokenizer
        names, stops = body.callable_names(), body.stops
        self.deltas = merged([deltas(chunks, names, stops) for chunks in answers])
        self.last: dict[int, Chunk] = {}  # of each answer, for the usage

    async def events(self) -> AsyncGenerator[bytes, None]:
        """chat.completion.chunk objects with the role, then what is new, then how it ended, perhaps
        the usage; [DONE]. After a failure, an error object is the last."""
        try:
            for i in range(self.body.num_answers):
                yield self.chunk_event(i, {"role": "assistant", "content": ""})
            async with aclosing(self.deltas):
                async for i, delta in self.deltas:
                    self.last[i] = delta.chunk
                    if delta.text or (delta.logprobs and not delta.call):
                        yield self.chunk_event(i, {"content": delta.text}, delta)
                    if delta.call:
                        call = {"index": 0, **call_object(delta.call)}
                        yield self.chunk_event(i, {"tool_calls": [call]}, delta)
                    if delta.finish_reason:
                        yield self.chunk_event(i, {}, finish_reason=delta.finish_reason)
            if self.body.stream_options.include_usage:
                yield self.chunk_event(0, {}, choices=[], usage=self.usage())
            yield format_sse_event(data_str="[DONE]")
        except EngineError as error:
            yield json_event(openai_error(HTTPException(503, str(error))))

    def chunk_event(
        self,
        index: int,
        new: dict,
        delta: Delta | None = None,
        finish_reason: str | None = None,
        **more: Any,
    ) -> bytes:
        logprobs = self.logprobs(delta.logprobs) if delta else None
        choice = {
            "index": index,
            "delta": new,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        return json_event(
            {"object": "chat.completion.chunk", **self.head, "choices": [choice], **more}
        )

    async def whole(self) -> dict:
        """One chat.completion object."""
        texts = [""] * self.body.num_answers
        logprobs: list[list[TokenLogprob]] = [[] for _ in texts]
        choices: dict[int, dict] = {}
        async with aclosing(self.deltas):
            async for i, delta in self.deltas:
                self.last[i] = delta.chunk
                texts[i] += delta.text
                logprobs[i] += delta.logprobs
                if delta.finish_reason:
                    choices[i] = {
                        "index": i,
                        "message": message_object(texts[i], delta.call),
                        "logprobs": self.logprobs(logprobs[i]),
                        "finish_reason": delta.finish_reason,
                    }
        return {
            "object": "chat.completion",
            **self.head,
            "choices": [choices[i] for i in sorted(choices)],
            "usage": self.usage(),
        }

    def logprobs(self, logprobs: list[TokenLogprob]) -> dict | None:
        return logprobs_object(self.tokenizer, logprobs) if self.body.logprobs else None

    def usage(self) -> dict:
        prompt_tokens = self.last[0].prompt_tokens
        completion_tokens = sum(
            chunk.completion_tokens - chunk.hidden_tokens for chunk in self.last.values()
        )
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }


def message_object(text: str, call: ToolCall | None) -> dict:
    if call:
        return {"role": "assistant", "content": text or None, "tool_calls": [call_object(call)]}
    return {"role": "assistant", "content": text}


def call_object(call: ToolCall) -> dict:
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": call._asdict()}


# --- 2. The routes ---------------------------------------------------------------------------

REFUSAL = openai_error(HTTPException(400, "temperature must be less than or equal to 2, not 3"))
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
    body, answers = await admit(request, ChatCompletionRequest)
    name, tokenizer = request.app.state.settings.model_name, request.app.state.engine.tokenizer
    reply = ChatCompletionReply(name, body, answers, tokenizer)
    if body.stream:
        return EventStream(reply.events())
    return JSONResponse(await unless_disconnected(request, reply.whole()))


@router.get("/models")
async def models(request: Request) -> dict:
    """The one model that is served."""
    return {"object": "list", "data": [model_card(request)]}


@router.get("/models/{name:path}", responses={404: {"description": "there is no such model"}})
async def model(request: Request, name: str) -> dict:
    """The same model, by its name."""
    card = model_card(request)
    if name != card["id"]:
        raise HTTPException(404, f"there is no model {preview(name)} here, but {card['id']}")
    return card


def model_card(request: Request) -> dict:
    context = request.app.state.engine.max_request_tokens
    return {
        "id": request.app.state.settings.model_name,
        "object": "model",
        "created": 0,
        "owned_by": "chatglm",
        "max_model_len": context,  # vLLM's name for it, which clients read
    }
