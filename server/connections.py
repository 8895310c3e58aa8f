"""Connections that cost their client as much as they cost the server: limits that uvicorn lacks.

    a request's line and headers    64 KiB, and 10 s to arrive; else 431, or 408
    a body nobody waits for         30 s
    an answer nobody reads          300 s
    connections                     --max-connections. One more takes the place of one that is idle,
                                    of the client that has most; if all are busy, only GET /health
                                    is answered. One client never has them all.

`uvicorn api:app` has none of these, see docs/safety.md. hypercorn and granian limit a
request's headers too, but nobody's share of the connections, and keep none for GET /health.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from typing import Any, cast
from weakref import WeakKeyDictionary

import httptools
import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
)
from uvicorn.server import ServerState

from server import uvicorn_http1  # noqa: F401  (mends uvicorn's protocol, also for `uvicorn api:app`)
from server.clients import network_of
from server.settings import Settings

MAX_HEAD = 2**16  # bytes of a request's line and headers
HEAD_TIMEOUT = 10.0  # seconds for them to arrive
REST_TIMEOUT = 30.0  # seconds for the rest of a body whose request is answered already
READ_TIMEOUT = 300.0  # seconds in which a client must take some of its answer
MAX_PIPELINED = 16  # requests that are sent before the answer to the first
FOR_HEALTH = 16  # connections beyond the limit, for GET /health
OTHER_FILES = 100  # that the process has open: weights, libraries, the log
FOR_OTHERS = 64  # connections that no client can take from all others


# How many connections each client has, of each server. To count them anew for each that is opened
# would take longer the more there are.
connections_held: WeakKeyDictionary[ServerState, Counter[str]] = WeakKeyDictionary()


class LimitedProtocol(HttpToolsProtocol):
    """One connection. uvicorn makes it, and calls its methods on the event loop."""

    max_connections = 512  # set by `limit_connections`

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.answering = self.app  # what answers the connection's requests
        self.address = ""
        self.since = time.monotonic()
        self.overhead = 0  # bytes received that are neither body nor part of a finished request
        self.received = 0  # bytes of the request's body
        self.head_is_open = True  # a request's line and headers are awaited, or under way
        self.deadline: asyncio.TimerHandle | None = None  # for the client to send
        self.reading_deadline: asyncio.TimerHandle | None = None
        self.end_deadline: asyncio.TimerHandle | None = None

    # 1. How many there are

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = network_of(self.client[0]) if self.client else ""
        self.held = connections_held.setdefault(self.server_state, Counter())
        self.held[self.address] += 1
        mine = self.held[self.address] > max(1, self.max_connections - FOR_OTHERS)
        if mine or self.held.total() > self.max_connections:
            self.make_room(only_mine=mine)
        self.wait(HEAD_TIMEOUT)

    def make_room(self, only_mine: bool) -> None:
        """Closes the oldest idle connection of the client that has most. If there is none, this
        connection may ask for /health only, or nothing."""
        idle = [
            each
            for each in self.everyone
            if each is not self and each.is_idle and not each.transport.is_closing()
        ]
        full = [each for each in idle if not each.is_limited]
        if only_mine:
            full = [each for each in full if each.address == self.address]
        if full:
            max(full, key=lambda each: (self.held[each.address], -each.since)).transport.abort()
            return
        self.app = health_only(self.answering)
        self.let_go()
        if len(self.connections) > self.max_connections + FOR_HEALTH:
            limited = [each for each in idle if each.is_limited]
            min(limited, key=lambda each: each.since, default=self).transport.abort()

    @property
    def everyone(self) -> set[LimitedProtocol]:
        return cast("set[LimitedProtocol]", self.connections)

    @property
    def is_limited(self) -> bool:
        """Whether it may ask for /health only. Such connections do not count against the limit."""
        return self.app is not self.answering

    def let_go(self) -> None:
        self.held[self.address] -= 1
        if not self.held[self.address]:
            del self.held[self.address]

    @property
    def is_idle(self) -> bool:
        """Whether no request has come in whole that is still to be answered."""
        return not self.is_answering or self.cycle.more_body

    @property
    def is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if not self.is_limited:
            self.let_go()
        self.wait(None)
        self.resume_writing()
        if self.end_deadline is not None:
            self.end_deadline.cancel()

    # 2. How much a client sends, and how fast

    def data_received(self, data: bytes) -> None:
        self.overhead += len(data)
        if self.head_is_open and self.deadline is None:  # the first bytes of a further request
            self.wait(HEAD_TIMEOUT)
        super().data_received(data)
        # What is left is the head, or what frames the body: chunk sizes, trailers.
        if self.overhead > MAX_HEAD + 4 * self.received and not self.transport.is_closing():
            self.refuse(431, f"the request's line and headers have over {MAX_HEAD} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if len(self.pipeline) >= MAX_PIPELINED:
            raise httptools.HttpParserError("too many requests at once")
        self.received = 0

    def on_headers_complete(self) -> None:
        self.wait(None)
        self.head_is_open = False
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        usual = self.app
        try:
            if size > MAX_HEAD:
                self.app = refusal(431, f"the request's line and headers have {size} bytes")
            super().on_headers_complete()
        finally:
            self.app = usual
        self.overhead = 0

    def on_body(self, body: bytes) -> None:
        self.overhead = max(0, self.overhead - len(body))
        self.received += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.overhead = 0
        self.head_is_open = True
        # Where the answer has been sent before all of the request came, a further one is awaited.
        self.wait(None if self.is_answering else HEAD_TIMEOUT)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.is_answering and not self.head_is_open:  # refused before all the body has come
            self.wait(REST_TIMEOUT)
        self.end_in_time()

    def wait(self, seconds: float | None) -> None:
        """Closes the connection if the client does not send what is awaited in so many seconds."""
        if self.deadline is not None:
            self.deadline.cancel()
        self.deadline = self.loop.call_later(seconds, self.too_slow) if seconds else None

    def too_slow(self) -> None:
        self.deadline = None
        if self.is_answering:  # after the request came a stray line end; the answer goes on
            return
        if self.overhead and self.head_is_open:
            self.refuse(408, f"the request's line and headers took more than {HEAD_TIMEOUT:g} s")
        else:
            self.transport.abort()

    def refuse(self, status: int, problem: str) -> None:
        """Says so where no request has begun that the app could answer, and closes."""
        if not self.is_answering:
            body = json.dumps({"detail": problem}).encode()
            head = b"content-type: application/json\r\nconnection: close\r\n"
            self.transport.write(
                STATUS_LINE[status] + head + b"content-length: %d\r\n\r\n" % len(body) + body
            )
        self.transport.close()
        self.end_in_time()

    # 3. How fast it reads

    def end_in_time(self) -> None:
        """A connection that was closed stays until the client has read all: not for ever."""
        is_ending = self.transport.is_closing() and self.transport.get_write_buffer_size()
        if is_ending and self.end_deadline is None:
            self.end_deadline = self.loop.call_later(READ_TIMEOUT, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.end_in_time()

    def send_400_response(self, msg: str) -> None:
        super().send_400_response(msg)
        self.end_in_time()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.reading_deadline = self.loop.call_later(READ_TIMEOUT, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.reading_deadline is not None:
            self.reading_deadline.cancel()
            self.reading_deadline = None


def uvicorn_config(app: ASGIApp, settings: Settings) -> uvicorn.Config:
    """How uvicorn serves the app. It takes a proxy's word for who asks only from --trusted-proxy;
    left to itself, it would take that of every program on this machine."""
    limit_connections(settings.max_connections)
    return uvicorn.Config(
        app,
        http=LimitedProtocol,
        log_level="warning",
        access_log=False,
        proxy_headers=bool(settings.proxies),
        forwarded_allow_ips=settings.proxies,
    )


def limit_connections(wanted: int) -> None:
    """Sets --max-connections, or as many as the system lets a process have files open."""
    try:
        import resource
    except ImportError:  # Windows, where sockets are no files
        LimitedProtocol.max_connections = wanted
        return
    needed = wanted + FOR_HEALTH + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    LimitedProtocol.max_connections = min(wanted, max(1, soft - FOR_HEALTH - OTHER_FILES))


def refusal(status: int, problem: str) -> ASGIApp:
    return JSONResponse({"detail": problem}, status, {"Connection": "close"})


def health_only(app: ASGIApp) -> ASGIApp:
    """What answers while all connections are taken: someone must be able to see that."""
    full = refusal(503, "all connections are taken; try again later")

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await (app if scope["path"] == "/health" else full)(scope, receive, send)

    return answer
