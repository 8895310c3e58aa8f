"""An answer as each protocol shows it: up to a stop sequence, and with the model's calls of tools.

`visible` is for `POST /` and `/stream`, `deltas` and `merged` for `/v1`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

from chatglm import Chunk
from chatglm.errors import AnswerEnded
from chatglm.sampling import TokenLogprob
from chatglm.text.detokenizer import REPLACEMENT
from chatglm.text.tools import (
    ToolCall,
    last_message,
    may_be_call,
    read_call,
    tool_names,
    words_before_call,
)
from server.incoming import Admitted, Body
from server.stops import StopSearch


def shown(admitted: Admitted[Body]) -> tuple[Body, AsyncGenerator[Chunk, None]]:
    """The body of a request to `POST /` or `/stream`, and its answer as these show it."""
    body = admitted.body
    return body, visible(admitted.answers[0], tool_names(getattr(body, "history", [])), body.stops)


async def until_stop(
    chunks: AsyncGenerator[Chunk, None], names: list[str], stops: list[str], tokenizer: Any = None
) -> AsyncGenerator[tuple[Chunk, ToolCall | None], None]:
    """The chunks up to a stop sequence, which ends the last one's text. What may still become a
    call of one of `names` is held back; a call comes with the last chunk. Log-probabilities, for
    which a `tokenizer` is needed, are those of the text that is shown."""
    search = StopSearch(stops)
    async with aclosing(chunks):
        async for chunk in chunks:
            ended = chunk.finish_reason is not None
            if not ended and names and may_be_call(chunk.raw, names):
                continue
            if ended and (call := read_call(chunk.raw, names)):
                yield chunk, call
                return
            text, stopped = search.before_stop(chunk.text, ended)
            reason = "stop" if stopped else chunk.finish_reason
            logprobs = shown_logprobs(chunk.logprobs, chunk.text[len(text) :], tokenizer)
            yield replace(chunk, text=text, finish_reason=reason, logprobs=logprobs), None
            if stopped:
                with suppress(StopAsyncIteration, AnswerEnded):
                    await chunks.athrow(AnswerEnded)
                return


def shown_logprobs(logprobs: list[TokenLogprob], hidden: str, tokenizer: Any) -> list[TokenLogprob]:
    """Without those of the tokens that have nothing but the end of the text, which is `hidden`.
    White space at its end does not count: until more follows, a chunk's text lacks it."""
    count, length = len(logprobs), 0.0
    if not hidden:
        return logprobs
    # Token by token, of which each was decoded once: a stop sequence, or white space, may hide
    # hundreds of them, and in every chunk the same.
    while count and not text_of(tokenizer, logprobs[count - 1].token).strip():
        count -= 1
    most = len(hidden.rstrip()) + 0.01
    while count:
        text = text_of(tokenizer, logprobs[count - 1].token)
        length += 1 / 3 if text == REPLACEMENT else len(text)  # a byte; most characters have three
        if length > most:
            break
        count -= 1
    return logprobs[:count]


async def visible(
    chunks: AsyncGenerator[Chunk, None], names: list[str], stops: list[str]
) -> AsyncGenerator[Chunk, None]:
    """The chunks up to a stop sequence. A call comes in the model's own form: the name, a line end,
    the arguments."""
    async with aclosing(until_stop(chunks, names, stops)) as until_end:
        async for chunk, call in until_end:
            if call:
                parts = [words_before_call(chunk.raw), *last_message(chunk.raw)]
                chunk = replace(chunk, text="\n".join(filter(None, parts)))
            yield chunk


class Delta(NamedTuple):
    """What is new in an answer: text, or a call."""

    text: str
    call: ToolCall | None
    finish_reason: str | None
    chunk: Chunk
    logprobs: list[TokenLogprob] = []


async def deltas(
    chunks: AsyncGenerator[Chunk, None], names: list[str], stops: list[str], tokenizer: Any = None
) -> AsyncGenerator[Delta, None]:
    """Text as it comes, up to a stop sequence; a call of one of `names` once it is complete. The
    last one has a `finish_reason`."""
    sent = told = 0  # characters, and log-probabilities
    async with aclosing(until_stop(chunks, names, stops, tokenizer)) as until_end:
        async for chunk, call in until_end:
            text = (words_before_call(chunk.raw) if call else chunk.text)[sent:]
            reason = "tool_calls" if call else chunk.finish_reason
            if text or reason:
                yield Delta(text, call, reason, chunk, chunk.logprobs[told:])
                sent, told = len(chunk.text), max(told, len(chunk.logprobs))


async def merged(
    answers: list[AsyncGenerator[Delta, None]],
) -> AsyncGenerator[tuple[int, Delta], None]:
    """The deltas of several answers as they come, each with the number of its answer."""
    coming = {asyncio.ensure_future(anext(each, None)): i for i, each in enumerate(answers)}
    try:
        while coming:
            done, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                i = coming.pop(task)
                if (delta := task.result()) is not None:
                    coming[asyncio.ensure_future(anext(answers[i], None))] = i
                    yield i, delta
    finally:
        for task in coming:
            task.cancel()
        await asyncio.gather(*coming, return_exceptions=True)
        for each in answers:
            await each.aclose()


@lru_cache(maxsize=2**17)
def text_of(tokenizer: Any, token: int) -> str:
    """Of a token behind another: at the beginning, decoders drop a space."""
    anchor = tokenizer.decode([tokenizer.anchor])
    return str(tokenizer.decode([tokenizer.anchor, token]))[len(anchor) :]
