"""An answer in the objects of OpenAI's format: whole, or as a stream of events.

Formats: https://platform.openai.com/docs/api-reference/chat and …/completions
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any, ClassVar

from fastapi import HTTPException
from fastapi.sse import format_sse_event

from chatglm import Chunk, EngineError
from chatglm.sampling import TokenLogprob
from chatglm.text.tools import ToolCall
from server.answers import Delta, deltas, merged, text_of
from server.http_errors import openai_error
from server.openai_chat import ChatCompletionRequest
from server.openai_request import OpenAIRequest
from server.sse import json_event


class Reply(ABC):
    """The answers to one request. The subclasses have what differs between the two formats."""

    ID: ClassVar[str]
    WHOLE: ClassVar[str]  # what the object is called
    CHUNK: ClassVar[str]

    def __init__(
        self,
        model: str,
        body: OpenAIRequest,
        answers: list[AsyncGenerator[Chunk, None]],
        tokenizer: Any,
    ) -> None:
        self.head = {"id": f"{self.ID}-{uuid.uuid4().hex}", "created": int(time.time())}
        self.head["model"] = model
        self.body, self.tokenizer, self.num_answers = body, tokenizer, len(answers)
        names, stops = self.callable_names(), body.stops
        self.deltas = merged([deltas(chunks, names, stops, tokenizer) for chunks in answers])
        self.last: dict[int, Chunk] = {}  # of each answer, for the usage

    def callable_names(self) -> list[str]:
        """Tools that the model may call."""
        return []

    @abstractmethod
    def first(self) -> Iterator[dict]:
        """The choice with which the stream of an answer begins, if any."""

    @abstractmethod
    def pieces(self, delta: Delta) -> Iterator[dict]:
        """The choices, without their index, for what is new in an answer."""

    @abstractmethod
    def choice(self, text: str, logprobs: list[TokenLogprob], last: Delta) -> dict:
        """The choice, without its index, for a whole answer."""

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Chunk objects with what is new, then how each answer ended, perhaps the usage; [DONE].
        After a failure, an error object is the last."""
        try:
            for i in range(self.num_answers):
                for choice in self.first():
                    yield self.chunk_event([{"index": i, **choice}])
            async with aclosing(self.deltas):
                async for i, delta in self.deltas:
                    self.last[i] = delta.chunk
                    for choice in self.pieces(delta):
                        yield self.chunk_event([{"index": i, **choice}])
            if self.body.stream_options.include_usage:
                yield self.chunk_event([], usage=self.usage())
            yield format_sse_event(data_str="[DONE]")
        except EngineError as error:
            yield json_event(openai_error(HTTPException(503, str(error))))

    def chunk_event(self, choices: list[dict], **more: Any) -> bytes:
        return json_event({"object": self.CHUNK, **self.head, "choices": choices, **more})

    async def whole(self) -> dict:
        """One object with all answers."""
        texts = [""] * self.num_answers
        logprobs: list[list[TokenLogprob]] = [[] for _ in texts]
        choices: dict[int, dict] = {}
        async with aclosing(self.deltas):
            async for i, delta in self.deltas:
                self.last[i] = delta.chunk
                texts[i] += delta.text
                logprobs[i] += delta.logprobs
                if delta.finish_reason:
                    choices[i] = {"index": i, **self.choice(texts[i], logprobs[i], delta)}
        return {
            "object": self.WHOLE,
            **self.head,
            "choices": [choices[i] for i in sorted(choices)],
            "usage": self.usage(),
        }

    def usage(self) -> dict:
        each_prompt = range(0, self.num_answers, self.body.num_answers)
        prompt_tokens = sum(self.last[i].prompt_tokens for i in each_prompt)
        completion_tokens = sum(
            chunk.completion_tokens - chunk.hidden_tokens for chunk in self.last.values()
        )
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }


class ChatCompletionReply(Reply):
    ID, WHOLE, CHUNK = "chatcmpl", "chat.completion", "chat.completion.chunk"
    body: ChatCompletionRequest

    def callable_names(self) -> list[str]:
        return self.body.callable_names()

    def first(self) -> Iterator[dict]:
        yield self.piece({"role": "assistant", "content": ""})

    def pieces(self, delta: Delta) -> Iterator[dict]:
        if delta.text or (delta.logprobs and not delta.call):
            yield self.piece({"content": delta.text}, delta.logprobs)
        if delta.call:
            call = {"index": 0, **call_object(delta.call)}
            yield self.piece({"tool_calls": [call]}, delta.logprobs)
        if delta.finish_reason:
            yield {**self.piece({}), "finish_reason": delta.finish_reason}

    def piece(self, new: dict, logprobs: list[TokenLogprob] | None = None) -> dict:
        told = self.logprobs(logprobs) if logprobs is not None else None
        return {"delta": new, "logprobs": told, "finish_reason": None}

    def choice(self, text: str, logprobs: list[TokenLogprob], last: Delta) -> dict:
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if last.call:
            message["content"] = text or None
            message["tool_calls"] = [call_object(last.call)]
        return {
            "message": message,
            "logprobs": self.logprobs(logprobs),
            "finish_reason": last.finish_reason,
        }

    def logprobs(self, logprobs: list[TokenLogprob]) -> dict | None:
        """Text, log-probability and UTF-8 of each token, with its alternatives."""
        if not self.body.logprobs:
            return None
        content = [
            {
                **self.described(each.token, each.logprob),
                "top_logprobs": [self.described(*other) for other in each.alternatives],
            }
            for each in logprobs
        ]
        return {"content": content, "refusal": None}

    def described(self, token: int, logprob: float) -> dict:
        text = text_of(self.tokenizer, [token])
        # A token may be a part of a character: it has no text of its own.
        in_bytes = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": in_bytes}


def call_object(call: ToolCall) -> dict:
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": call._asdict()}


class CompletionReply(Reply):
    ID, WHOLE, CHUNK = "cmpl", "text_completion", "text_completion"

    def first(self) -> Iterator[dict]:
        return iter(())

    def pieces(self, delta: Delta) -> Iterator[dict]:
        yield self.choice(delta.text, delta.logprobs, delta)

    def choice(self, text: str, logprobs: list[TokenLogprob], last: Delta) -> dict:
        return {
            "text": text,
            "logprobs": self.logprobs(logprobs),
            "finish_reason": last.finish_reason,
        }

    def logprobs(self, logprobs: list[TokenLogprob]) -> dict | None:
        if self.body.alternatives is None:
            return None

        def text(token: int) -> str:
            return text_of(self.tokenizer, [token])

        return {
            "tokens": [text(each.token) for each in logprobs],
            "token_logprobs": [each.logprob for each in logprobs],
            "top_logprobs": [
                {text(token): logprob for token, logprob in each.alternatives} for each in logprobs
            ],
        }
