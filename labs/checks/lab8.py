"""Lab 8: the protocol changed on both sides: each frame tells its length."""

from pathlib import Path

from labs.checks.lab6 import sending
from labs.hosted import Reader, hosted
from labs.program import Program
from labs.raw_server import RawServer
from labs.verdict import require

PROMPT = "1 <^>\n2\n你好"
TEXTS = ["1", "1 <^>", "1 <^>\n2\n", "1 <^>\n2\n你好"]


def framed(text: str) -> bytes:
    data = text.encode()
    return str(len(data)).encode() + b"\n" + data


STREAM = b"".join(map(framed, [*TEXTS, ""]))


def check(file: Path) -> None:
    with hosted(file) as server:
        check_server(server)
    for pieces in ([STREAM], [STREAM[i : i + 1] for i in range(len(STREAM))]):
        check_client(file, pieces)
    with RawServer(sending([STREAM[:-2]])) as server:
        program = Program(file, server.url, "hi")
        status = program.wait()
    require(
        status != 0,
        "长度为 0 的一帧没有到，回答就不完整：客户端要以非零状态结束。",
        "Without the frame of length 0, the answer is incomplete: the client should end with a "
        "status that is not 0.",
    )


def check_server(server) -> None:
    reader = Reader(server.url, prompt=PROMPT).wait()
    error = server.error(not reader.whole)
    require(
        reader.whole,
        f"服务器没有发完回答：{error}",
        f"The server does not send its answer to the end: {error}",
    )
    rest, frames = reader.data, []
    while rest:
        length, newline, rest = rest.partition(b"\n")
        require(
            newline and length.isdigit() and int(length) <= len(rest),
            f"一帧是：十进制的长度（字节数），换行，正文，却是 {length + newline + rest!r:.60}。",
            "A frame is its length in decimal (in bytes, not characters), a newline, the text: "
            f"{length + newline + rest!r:.60}.",
        )
        frames.append(rest[: int(length)])
        rest = rest[int(length) :]
    require(
        frames and frames[-1] == b"" and b"" not in frames[:-1],
        "最后一帧的长度应该是 0，也只有它是 0：这样客户端知道回答是完整的。",
        "The last frame, and it alone, has the length 0: so the client knows that it is whole.",
    )
    require(
        frames[-2:-1] == [PROMPT.encode()],
        f"最后一段文字应该是 {PROMPT!r}。",
        f"The last text should be {PROMPT!r}.",
    )


def check_client(file: Path, pieces: list[bytes]) -> None:
    with RawServer(sending(pieces)) as server:
        program = Program(file, server.url, "hi")
        status = program.wait()
    shown = program.output.removesuffix("\n")
    require(
        status == 0 and shown == TEXTS[-1],
        f"客户端应该打印 {TEXTS[-1]!r}，却打印了 {shown!r:.60}：{program.last_error()}",
        f"The client should print {TEXTS[-1]!r}, and prints {shown!r:.60}: {program.last_error()}",
    )
