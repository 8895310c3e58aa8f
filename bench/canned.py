"""Whether the load can be what is slow: a server that has every frame ready."""

import asyncio
import threading

from bench.load import run_apart

CLIENTS, FRAMES = 16, 1000
TEXT = "流式输出 "  # what each frame adds, as much as a token does


def response() -> bytes:
    """A whole answer as `POST /` sends it, repeated from its 100th frame on: at that length the
    benchmark's answers end."""
    frames = [("<^>" + TEXT * (i % 100 + 1)).encode() for i in range(FRAMES)]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(frame), frame) for frame in frames)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


def ceiling() -> float:
    """Frames a second that bench.load takes when it never has to wait."""
    whole, loop, port = response(), asyncio.new_event_loop(), []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(whole)
        await writer.drain()
        await reader.read()  # until the client goes
        writer.close()

    async def listen() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port.append(server.sockets[0].getsockname()[1])

    loop.run_until_complete(listen())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    plan = {
        "host": "127.0.0.1",
        "port": port[0],
        "style": "frames",
        "clients": [[["/", {}]]] * CLIENTS,
    }
    result = run_apart(plan)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    if not all(answer["complete"] for answer in result["answers"]):
        raise RuntimeError("the load did not read answers that were there already")
    return CLIENTS * FRAMES / result["wall_s"]
