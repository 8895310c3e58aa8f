"""What the headers of all answers have in common, and requests for headers alone.

    X-Request-Id        the one that the client sent, or a new one; it is in the log of the answer
    X-Unknown-Fields    fields of the request that mean nothing here: probably mistyped

`HEAD` (`curl -I`, `wget --spider`) is answered as GET, without a body.
"""

from __future__ import annotations

import logging
import re
import uuid

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.bodies import RequestBody

REQUEST_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)  # what may stand in a header and the log
logger = logging.getLogger("chatglm")


class Heads:
    """A layer around the routes and their refusals."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["trace_id"] = trace_id_of(scope)

        async def send_with_head(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = state["trace_id"]
                if names := state.get("unknown_fields"):
                    headers["X-Unknown-Fields"] = names
            await send(message)

        # uvicorn leaves the body out, as it knows the method. An answer that streams would be
        # generated for nobody: /stream refuses HEAD.
        if scope["method"] == "HEAD" and not scope["path"].endswith("/stream"):
            scope = {**scope, "method": "GET"}
        await self.app(scope, receive, send_with_head)


def trace_id_of(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def notice_unknown_fields(request: Request, body: RequestBody) -> None:
    """A mistyped field, such as `topp`, would be ignored silently otherwise. It is not refused:
    real clients send fields of their own."""
    if body.unknown_fields:
        names = [
            re.sub(r"[^\w.-]", "?", name[:40], flags=re.ASCII) for name in body.unknown_fields[:10]
        ]
        shown = ", ".join(names)
        request.state.unknown_fields = shown
        logger.warning("unknown fields are ignored: %s (%s)", shown, request.state.trace_id)
