"""HTTP/1.1 as clients really speak it, where uvicorn's protocol for httptools falls short.

- `Upgrade: h2c` (Java's HttpClient, `curl --http2`) offers another protocol. A server may go on in
  HTTP/1.1, but httptools takes what follows, the body, for that other protocol's.
- A client of HTTP/1.0 (`ab`, old proxies) knows no chunks: its answer ends with the connection.
- A connection's objects refer to each other, so that each is left for garbage collection to find.

uvicorn's other parser, h11, has neither of the first two faults; it is several times slower.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from typing import Any

import httptools
from uvicorn.protocols.http import httptools_impl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle


class Parser:
    """httptools' parser, for which an offer to upgrade is a header like any other.

    The parser cannot be told to go on, so a request with such an offer is read twice: its head is
    written out again, without the offer, and put in front of the bytes that follow.
    """

    def __init__(self, protocol: HttpToolsProtocol) -> None:
        self.protocol = protocol
        self.unanswered: list[RequestResponseCycle] = []
        self.start()

    def start(self) -> None:
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self.get_method = self.parser.get_method
        self.get_http_version = self.parser.get_http_version
        self.should_keep_alive = self.parser.should_keep_alive
        self.should_upgrade = self.parser.should_upgrade

    def end(self) -> None:
        """Lets go of what refers to this object in turn. Garbage collection holds Python's lock, so
        the less there is for it to find, the less anybody waits."""
        vars(self).clear()

    def feed_data(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if not self.has_offer:  # CONNECT
                raise
            version = self.get_http_version().encode()
            first_line = self.get_method() + b" " + self.url + b" HTTP/" + version + b"\r\n"
            head = first_line + b"".join(self.head) + b"\r\n"
            self.start()
            self.parser.feed_data(head)
            self.feed_data(data[upgrade.args[0] :])  # perhaps with a further request

    # What the parser calls

    def on_message_begin(self) -> None:
        self.head: list[bytes] = []
        self.url, self.has_offer = b"", False
        self.protocol.on_message_begin()

    def on_url(self, url: bytes) -> None:
        self.url += url
        self.protocol.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"upgrade":
            self.has_offer = True
        else:
            self.head.append(name + b": " + value + b"\r\n")
            self.protocol.on_header(name, value)

    def on_headers_complete(self) -> None:
        if not self.is_read_again:
            self.protocol.on_headers_complete()
            cycles = [*self.unanswered, self.protocol.cycle]
            self.unanswered = [cycle for cycle in cycles if not cycle.response_complete]

    def on_body(self, body: bytes) -> None:
        self.protocol.on_body(body)

    def on_message_complete(self) -> None:
        if not self.is_read_again:
            self.protocol.on_message_complete()

    @property
    def is_read_again(self) -> bool:
        return self.has_offer and self.should_upgrade()


class Cycle(RequestResponseCycle):
    """A request and its answer, which has no chunks if the client speaks HTTP/1.0."""

    is_unframed = False

    async def run_asgi(self, app: Any) -> None:
        async def watched(*arguments: Any) -> None:
            await app(*arguments)
            # Without chunks, the end of the connection is the end of the answer. An answer that was
            # broken off ends with a reset instead.
            if self.is_unframed and not self.response_complete and not self.disconnected:
                reset = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
                sock = self.transport.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)

        await super().run_asgi(watched)

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", [])}
            self.is_unframed = (
                self.scope["http_version"] == "1.0" and b"content-length" not in names
            )
            if self.is_unframed:
                self.chunked_encoding = False
        elif self.is_unframed:
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)


def connection_made(self: HttpToolsProtocol, transport: asyncio.Transport) -> None:
    uvicorns_own(self, transport)
    setattr(self, "parser", Parser(self))


def connection_lost(self: HttpToolsProtocol, exc: Exception | None) -> None:
    parser: Any = self.parser
    uvicorns_end(self, exc)
    # uvicorn tells only the last of several requests that came at once.
    for cycle in parser.unanswered:
        if not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
    parser.end()
    self.cycle = None  # type: ignore[assignment]


# Into uvicorn's own class, not a subclass: `uvicorn api:app` has chosen its protocol by the time
# that it imports the app, and would go on without.
uvicorns_own = HttpToolsProtocol.connection_made
uvicorns_end = HttpToolsProtocol.connection_lost
setattr(HttpToolsProtocol, "connection_made", connection_made)
setattr(HttpToolsProtocol, "connection_lost", connection_lost)
setattr(httptools_impl, "RequestResponseCycle", Cycle)
