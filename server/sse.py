"""`/stream`: the answer as server-sent events, which browsers read by themselves.

    data: {"text": "Hel", "message_id": "7f…"}      what is new, event by event
    data: {"text": "lo", …, "finish_reason": "stop"}  the last text; "length" if it was cut
    data: [DONE]                                    the end
    event: error                                    the end of a broken one; data has the reason

Format: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from chatglm import Chunk, EngineError
from server.answers import shown
from server.bodies import RequestBody
from server.http_errors import REFUSAL, documented
from server.incoming import AUTH, admit
from server.responses import AnswerResponse

PING_INTERVAL = 15.0  # seconds; proxies close connections that are silent for a minute


class EventStream(AnswerResponse):
    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(with_pings(events))


async def with_pings(events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The events, and comments while none comes, as a request may be queued for long. It gives way
    to the event loop before each, so that a disconnect is noticed (see `process` in api.py)."""
    coming = asyncio.ensure_future(anext(events, None))
    try:
        while True:
            # Not `wait_for`: at its timeout it would cancel, and so end, the generator.
            await asyncio.wait({coming}, timeout=PING_INTERVAL)
            if not coming.done():
                yield KEEPALIVE_COMMENT
                continue
            event = coming.result()
            if event is None:
                return
            yield event
            coming = asyncio.ensure_future(anext(events, None))
    finally:
        if coming.done():
            await events.aclose()
        else:
            coming.cancel()  # which ends the generator that it waits for


def json_event(data: dict, event: str | None = None, id: str | None = None) -> bytes:
    return format_sse_event(data_str=to_json(data), event=event, id=id)


def to_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


async def answer_events(
    chunks: AsyncGenerator[Chunk, None], in_pieces: bool
) -> AsyncGenerator[bytes, None]:
    """What is new of an answer, event by event, or all of it in one; then [DONE]."""
    message_id, sent = uuid.uuid4().hex, ""
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                data = {"text": chunk.text[len(sent) :], "message_id": message_id}
                if chunk.finish_reason:
                    yield json_event({**data, "finish_reason": chunk.finish_reason}, id=message_id)
                elif in_pieces and data["text"]:
                    yield json_event(data, id=message_id)
                    sent = chunk.text
        yield format_sse_event(data_str="[DONE]", id=message_id)
    except EngineError as error:
        yield json_event({"detail": str(error)}, event="error", id=message_id)


def make_router(body_type: type[RequestBody]) -> APIRouter:
    """The routes of `/stream`, which take the body of `POST /`."""
    router = APIRouter(
        dependencies=AUTH,
        responses=documented(REFUSAL, {"text/event-stream": 'data: {"text": "Hel"}'}),
        default_response_class=StreamingResponse,
    )

    @router.post("/stream", openapi_extra=body_type.openapi_body())
    async def stream(request: Request) -> Response:
        """What is new of an answer, event by event; [DONE] at its end."""
        body, chunks = shown(await admit(request, body_type))
        return EventStream(answer_events(chunks, in_pieces=body.stream))

    @router.get("/stream", openapi_extra=body_type.openapi_query())
    async def stream_for_event_source(request: Request) -> Response:
        """The same for a browser's EventSource, which can only GET: the fields in the query."""
        if "last-event-id" in request.headers:
            return Response(status_code=204)  # it reconnects after the end; this stops it
        return await stream(request)

    return router
