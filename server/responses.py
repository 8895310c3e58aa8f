"""An answer on its way to a client, who may disconnect at any time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import HTTPException, Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

import chatglm

Answer = TypeVar("Answer")
UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the latter is for nginx
logger = logging.getLogger("chatglm")


class AnswerResponse(StreamingResponse):
    """Streams an answer, and closes its generator at the end, which frees its place in the engine.

    Starlette also listens for a disconnect while no text comes, as long as uvicorn speaks a version
    of ASGI before 2.4 (a test says so, should that change). If the engine fails, the response is
    left without its end: uvicorn then closes the connection, so that no client takes half an answer
    for a whole one.
    """

    media_type = "text/plain"

    def __init__(self, content: AsyncGenerator[str | bytes, None]) -> None:
        super().__init__(content, headers=UNBUFFERED)
        self.content = content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self.content):
                await super().__call__(scope, receive, send)
        except chatglm.EngineError as error:
            logger.error("%s", error)


class PiecesOfJSON(StreamingResponse):
    """A whole answer that is too long to be copied at once. It waits for a slow reader after each
    piece; its length is known."""

    media_type = "application/json"

    def __init__(self, pieces: list[bytes]) -> None:
        super().__init__(each(pieces), headers={"Content-Length": str(sum(map(len, pieces)))})


async def each(pieces: list[bytes]) -> AsyncGenerator[bytes, None]:
    for piece in pieces:
        yield piece


async def unless_disconnected(request: Request, answer: Coroutine[Any, Any, Answer]) -> Answer:
    """The awaited answer, for a route that sends it in one piece. If the client disconnects, the
    answer is cancelled: FastAPI itself would let it run to its end for nobody."""
    answering = asyncio.create_task(answer)
    disconnecting = asyncio.create_task(disconnected(request))
    try:
        await asyncio.wait({answering, disconnecting}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise HTTPException(400, "the client disconnected")  # nobody reads this
        return answering.result()
    finally:
        answering.cancel()
        disconnecting.cancel()


async def disconnected(request: Request) -> None:
    """Returns when the client disconnects. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
