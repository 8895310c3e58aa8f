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
from server.sse import json_event, to_json

AT_ONCE = 500  # tokens whose log-probabilities are sent in one piece


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
    def choice(self, text: str, last: Delta) -> dict:
        """The choice, without its index and log-probabilities, for a whole answer."""

    COLUMNS: ClassVar[tuple[str, ...]]  # of an answer's log-probabilities, a list each
    BESIDE: ClassVar[dict] = {}

    @abstractmethod
    def row(self, told: TokenLogprob) -> tuple:
        """What each column has of a token."""

    def logprobs(self, some: list[TokenLogprob]) -> dict | None:
        if self.body.alternatives is None:
            return None
        rows = list(map(self.row, some))
        columns = {name: [row[i] for row in rows] for i, name in enumerate(self.COLUMNS)}
        return {**columns, **self.BESIDE}

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

    async def whole(self) -> list[bytes]:
        """The JSON of one object with all answers, in pieces.

        Log-probabilities may be hundreds of times as long as the text. Each is written when it
        comes: all at once, at the end, would hold up the event loop.
        """
        texts = [""] * self.num_answers
        told: list[list[tuple[bytes, ...]]] = [[] for _ in texts]
        choices: dict[int, dict] = {}
        async with aclosing(self.deltas):
            async for i, delta in self.deltas:
                self.last[i] = delta.chunk
                texts[i] += delta.text
                if self.body.alternatives is not None:
                    told[i] += [tuple(map(encoded, self.row(each))) for each in delta.logprobs]
                if delta.finish_reason:
                    choices[i] = {"index": i, **self.choice(texts[i], delta)}
        head = {"object": self.WHOLE, **self.head, "usage": self.usage()}
        pieces = [encoded(head)[:-1], b',"choices":[']
        for i in sorted(choices):
            pieces += [encoded(choices[i])[:-1], b',"logprobs":', *self.written(told[i]), b"},"]
        return [*pieces[:-1], b"}]}"]

    def written(self, told: list[tuple[bytes, ...]]) -> Iterator[bytes]:
        """`logprobs`, from rows that are JSON already."""
        if self.body.alternatives is None:
            yield b"null"
            return
        yield encoded(self.BESIDE)[:-1]
        for i, name in enumerate(self.COLUMNS):
            yield b"%s%s:[" % (b"," if i or self.BESIDE else b"", encoded(name))
            for begin in range(0, len(told), AT_ONCE):
                rows = told[begin : begin + AT_ONCE]
                yield b",".join(row[i] for row in rows) + b"," * (begin + AT_ONCE < len(told))
            yield b"]"
        yield b"}"

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
    COLUMNS, BESIDE = ("content",), {"refusal": None}
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

    def choice(self, text: str, last: Delta) -> dict:
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if last.call:
            message["content"] = text or None
            message["tool_calls"] = [call_object(last.call)]
        return {"message": message, "finish_reason": last.finish_reason}

    def row(self, told: TokenLogprob) -> tuple[dict]:
        """Text, log-probability and UTF-8 of a token, and of its alternatives."""
        others = [self.described(*other) for other in told.alternatives]
        return ({**self.described(told.token, told.logprob), "top_logprobs": others},)

    def described(self, token: int, logprob: float) -> dict:
        text = text_of(self.tokenizer, token)
        # A token may be a part of a character: it has no text of its own.
        in_bytes = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": in_bytes}


def encoded(value: object) -> bytes:
    return to_json(value).encode()


def call_object(call: ToolCall) -> dict:
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": call._asdict()}


class CompletionReply(Reply):
    ID, WHOLE, CHUNK = "cmpl", "text_completion", "text_completion"
    COLUMNS = ("tokens", "token_logprobs", "top_logprobs")

    def first(self) -> Iterator[dict]:
        return iter(())

    def pieces(self, delta: Delta) -> Iterator[dict]:
        yield {**self.choice(delta.text, delta), "logprobs": self.logprobs(delta.logprobs)}

    def choice(self, text: str, last: Delta) -> dict:
        return {"text": text, "finish_reason": last.finish_reason}

    def row(self, told: TokenLogprob) -> tuple[str, float, dict]:
        others = {text_of(self.tokenizer, token): value for token, value in told.alternatives}
        return text_of(self.tokenizer, told.token), told.logprob, others
