"""The load: many clients on one server, in a process of its own, with the standard library only.

    python -m bench.load < plan.json > result.json

A plan has `host`, `port`, `style`, `clients` (for each a list of [path, body], asked one after the
other), and may have `health` (a path that is asked all the while) and `rate` (bytes a second that
each client takes). Times are seconds since the load began.
"""

import asyncio
import json
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

HEALTH_PAUSE = 0.05  # seconds between an answer of GET /health and the next question
PATIENCE = 600  # seconds for one answer: a server that hangs must not hang the benchmark
SLOW_BUFFER = 4096  # bytes that the kernel keeps for a slow reader, or it would not seem slow


@dataclass
class Answer:
    """What a client got: bytes with HTTP's own, the text, and when new text came."""

    started: float
    ended: float = 0.0
    status: int = 0
    bytes: int = 0
    text: str = ""
    arrivals: list[float] = field(default_factory=list)
    complete: bool = False  # the protocol's own end was seen
    error: str = ""


class Wire:
    """Takes an HTTP/1.1 response apart while it comes: `feed` gives the chunks that are whole."""

    def __init__(self) -> None:
        self.buffer, self.status, self.left, self.done = bytearray(), 0, None, False

    def feed(self, data: bytes) -> list[bytes]:
        self.buffer += data
        if not self.status and not self._head():
            return []
        if self.left is not None:  # a Content-Length
            part = bytes(self.buffer[: self.left])
            self.buffer.clear()
            self.left -= len(part)
            self.done = self.left == 0
            return [part] if part else []
        return self._chunks()

    def _head(self) -> bool:
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        lines = self.buffer[:end].decode("latin-1").lower().split("\r\n")
        self.status = int(lines[0].split()[1])
        headers = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
        if "content-length" in headers:
            self.left = int(headers["content-length"])
        del self.buffer[: end + 4]
        return True

    def _chunks(self) -> list[bytes]:
        parts, start = [], 0
        while (line := self.buffer.find(b"\r\n", start)) >= 0:
            size = int(self.buffer[start:line], 16)
            if len(self.buffer) < line + 2 + size + 2:
                break
            if size == 0:
                self.done = True
            else:
                parts.append(bytes(self.buffer[line + 2 : line + 2 + size]))
            start = line + 2 + size + 2
        del self.buffer[:start]
        return parts


class Frames:
    """`<^>` and the whole text so far; ends with the response."""

    text, complete = "", False

    def feed(self, part: bytes) -> None:
        self.text = part.rpartition(b"<^>")[2].decode()


class Events:
    """Server-sent events, of OpenAI's form or of GET /stream: what is new, to a last one."""

    def __init__(self) -> None:
        self.rest, self.text, self.complete = b"", "", False

    def feed(self, part: bytes) -> None:
        *events, self.rest = (self.rest + part).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    self._data(line[5:].strip())

    def _data(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.complete = True
            return
        content = json.loads(data)
        if "choices" not in content:
            self.text += content.get("text") or ""
            return
        for choice in content["choices"]:
            self.text += choice["delta"].get("content") or ""
            self.complete |= bool(choice.get("finish_reason"))


def question(host: str, method: str, path: str, body: bytes = b"") -> bytes:
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def connect(host: str, port: int, rate: float | None = None, source: str = ""):
    """A connection; for a slow reader, one whose buffers hold little. `source` is an address of
    this machine, for the server to see: on Linux, it has all from 127.0.0.1 to 127.255.255.254."""
    if rate is None:
        local = (source, 0) if source else None
        return await asyncio.open_connection(host, port, limit=2**20, local_addr=local)
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_BUFFER)
    raw.setblocking(False)
    await asyncio.get_running_loop().sock_connect(raw, (host, port))
    return await asyncio.open_connection(sock=raw, limit=SLOW_BUFFER)


async def ask(
    host: str,
    port: int,
    path: str,
    body: dict | bytes,
    style: str,
    rate: float | None = None,
    hang_up_after: int | None = None,
    patience: float = PATIENCE,
    source: str = "",
) -> Answer:
    """One question and its answer. `rate`: bytes a second that are taken; `hang_up_after`: bytes
    after which the client goes away without a word; `patience`: seconds; `source`: see connect."""
    answer, wire = Answer(time.perf_counter()), Wire()
    reading = Frames() if style == "frames" else Events()
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    writer = None
    try:
        async with asyncio.timeout(patience):
            reader, writer = await connect(host, port, rate, source)
            writer.write(question(host, "POST", path, body))
            while data := await reader.read(SLOW_BUFFER if rate else 2**16):
                take(answer, wire, reading, data)
                if wire.done or (hang_up_after is not None and answer.bytes > hang_up_after):
                    break
                if rate:
                    await asyncio.sleep(len(data) / rate)
    except (OSError, TimeoutError, ValueError, KeyError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    finally:
        if writer:
            writer.transport.abort()
    answer.ended = time.perf_counter()
    answer.status = wire.status
    answer.complete = wire.done and (style == "frames" or reading.complete)
    return answer


def take(answer: Answer, wire: Wire, reading: Frames | Events, data: bytes) -> None:
    answer.bytes += len(data)
    for part in wire.feed(data):
        if wire.status == 200:
            reading.feed(part)
    if reading.text != answer.text:
        answer.text = reading.text
        answer.arrivals.append(time.perf_counter())


async def get(host: str, port: int, path: str) -> tuple[int, bytes]:
    """Status and body of a GET."""
    reader, writer = await connect(host, port)
    wire, body = Wire(), b""
    try:
        writer.write(question(host, "GET", path))
        while not wire.done and (data := await reader.read(2**16)):
            body += b"".join(wire.feed(data))
    finally:
        writer.transport.abort()
    return wire.status, body


async def watch_health(plan: dict, latencies: list[float]) -> None:
    """Asks again and again; a question still open at the end counts with the time it has taken."""
    while True:
        begun = time.perf_counter()
        try:
            await get(plan["host"], plan["port"], plan["health"])
        finally:
            latencies.append(time.perf_counter() - begun)
        await asyncio.sleep(HEALTH_PAUSE)


async def client(plan: dict, questions: list) -> list[Answer]:
    return [
        await ask(plan["host"], plan["port"], path, body, plan["style"], plan.get("rate"))
        for path, body in questions
    ]


async def carry_out(plan: dict) -> dict:
    latencies: list[float] = []
    watcher = asyncio.create_task(watch_health(plan, latencies)) if plan.get("health") else None
    begun, cpu = time.perf_counter(), time.process_time()
    answers = await asyncio.gather(*(client(plan, questions) for questions in plan["clients"]))
    wall = time.perf_counter() - begun
    cpu = time.process_time() - cpu
    if watcher:
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
    return {
        "wall_s": wall,
        "load_cpu_s": cpu,
        "health_s": latencies,
        "answers": [asdict(answer) for each in answers for answer in each],
    }


def run_apart(plan: dict) -> dict:
    """`carry_out` in a process of its own, which costs neither the caller nor the server time."""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "bench.load"],
        input=json.dumps(plan),
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        check=True,
    )
    return json.loads(done.stdout)


if __name__ == "__main__":
    json.dump(asyncio.run(carry_out(json.load(sys.stdin))), sys.stdout)
