"""A server whose answers are written byte by byte, to see what a client makes of every cut."""

import json
import socket
import threading
from collections.abc import Callable
from urllib.parse import parse_qs, unquote, urlsplit


class Exchange:
    """One request, and the pieces of its answer."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.hung_up = False
        head, _, rest = self._receive(b"", until=b"\r\n\r\n").partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        self.method, target, _ = first.split(" ", 2)
        self.target = target
        self.path = unquote(urlsplit(target).path)
        self.query = {name: values[-1] for name, values in parse_qs(urlsplit(target).query).items()}
        self.headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        length = int(self.headers.get("content-length", 0))
        self.body = self._receive(rest, length=length)

    def _receive(self, data: bytes, until: bytes = b"", length: int = 0) -> bytes:
        while (until and until not in data) or len(data) < length:
            piece = self._connection.recv(65536)
            if not piece:
                raise ConnectionError("the client left before its request was complete")
            data += piece
        return data

    def json(self):
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    def write(self, data: bytes) -> None:
        try:
            self._connection.sendall(data)
        except OSError:
            self.hung_up = True

    def begin(self, status: int = 200, kind: str = "text/plain") -> None:
        head = f"HTTP/1.1 {status} -\r\nContent-Type: {kind}\r\nConnection: close\r\n"
        self.write(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")

    def chunk(self, data: bytes) -> None:
        self.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def end(self) -> None:
        self.write(b"0\r\n\r\n")

    def whole(self, data: bytes, status: int = 200, kind: str = "application/json") -> None:
        head = f"HTTP/1.1 {status} -\r\nContent-Type: {kind}\r\nConnection: close\r\n"
        self.write(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)

    def reply(self, value: object, status: int = 200) -> None:
        self.whole(json.dumps(value, ensure_ascii=False).encode(), status)


class RawServer:
    """Answers each request with `answer(exchange)`, in a thread of its own."""

    def __init__(self, answer: Callable[[Exchange], None]) -> None:
        self.answer = answer
        self.exchanges: list[Exchange] = []

    def __enter__(self) -> "RawServer":
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                exchange = Exchange(connection)
            except (ConnectionError, ValueError):
                return
            self.exchanges.append(exchange)
            self.answer(exchange)
