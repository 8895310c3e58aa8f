"""Lab 6: a client of one's own, right for every cut of the bytes."""

from collections.abc import Callable
from pathlib import Path

from labs.program import Program, until
from labs.raw_server import Exchange, RawServer
from labs.verdict import Wrong, require

QUESTION = "什么是流？"
TEXTS = ["你", "你好，", "你好，世界", "你好，世界 1 < 2。"]
FRAMES = [("<^>" + text).encode() for text in TEXTS]
STREAM = b"".join(FRAMES)


def check(file: Path) -> None:
    check_live(file)
    for zh, en, pieces in cuts():
        check_pieces(file, zh, en, pieces)
    check_end(file)
    check_broken(file)
    check_refusal(file)


def cuts() -> list[tuple[str, str, list[bytes]]]:
    marks = [STREAM[i : i + 1] for i in range(len(STREAM))]
    thirds = [STREAM[i : i + 3] for i in range(1, len(STREAM), 3)]
    return [
        (
            "几帧连在一起到达时，屏幕上应该只有最新的文字",
            "When several frames arrive together, the newest text alone should be shown",
            [STREAM],
        ),
        (
            "一个汉字或 <^> 被切成几段到达时，要等它到齐",
            "When a character or <^> arrives in pieces, it must wait for the rest",
            marks,
        ),
        (
            "网络可以在任何一个字节处切开",
            "The network may cut at any byte",
            [STREAM[:1], *thirds],
        ),
    ]


def start(file: Path, server: RawServer) -> Program:
    return Program(file, server.url, QUESTION)


def check_live(file: Path) -> None:
    """The second frame is not sent before the first is on the screen."""
    program: list[Program] = []
    seen = []

    def answer(exchange: Exchange) -> None:
        exchange.begin()
        exchange.chunk(FRAMES[1])
        until(lambda: program and (TEXTS[1] in program[0].output or program[0].process.poll()), 5)
        seen.append(TEXTS[1] in program[0].output)
        exchange.chunk(FRAMES[3])
        exchange.end()

    with RawServer(answer) as server:
        program.append(start(file, server))
        status = program[0].wait()
    require(
        status == 0 and server.exchanges,
        f"你的程序出错结束了，或者没有发请求：{program[0].last_error()}",
        "Your program ended with an error, or without a request: " + program[0].last_error(),
    )
    body = server.exchanges[0].json()
    require(
        isinstance(body, dict) and body.get("prompt") == QUESTION,
        '请求体应该是 JSON，"prompt" 是命令行里的问题。',
        'The body should be JSON, with the question of the command line as its "prompt".',
    )
    require(
        seen[0],
        "第一帧到了，屏幕上却没有：请求要 stream=True，打印要 flush=True。",
        "The first frame has arrived, and is not on the screen: the request needs stream=True, "
        "and print needs flush=True.",
    )
    require_text(program[0], "最新的一帧要显示出来", "The newest frame must be shown")


def require_text(program: Program, zh: str, en: str, text: str = TEXTS[-1]) -> None:
    shown = program.output.rstrip("\n")
    require(
        shown == text,
        f"{zh}：应该是 {text!r}，却打印了 {shown!r:.70}。（只打印新增的文字，不用 \\r。）",
        f"{en}: {text!r}, and not {shown!r:.70}. (Print what is new alone, without \\r.)",
    )


def sending(pieces: list[bytes], end: bool = True) -> Callable[[Exchange], None]:
    def answer(exchange: Exchange) -> None:
        exchange.begin()
        for piece in pieces:
            exchange.chunk(piece)
        if end:
            exchange.end()

    return answer


def check_end(file: Path) -> None:
    zh = "回答以 < 结尾时，流结束后要把它打印出来"
    en = "An answer may end in <, which is to be printed when the stream ends"
    check_pieces(file, zh, en, [b"<^>1", b"<^>1 <"], "1 <")


def check_pieces(file: Path, zh: str, en: str, pieces: list[bytes], text: str = TEXTS[-1]) -> None:
    with RawServer(sending(pieces)) as server:
        program = start(file, server)
        if program.wait():
            raise Wrong(f"{zh}：{program.last_error()}", f"{en}: {program.last_error()}")
    require_text(program, zh, en, text)


def check_broken(file: Path) -> None:
    with RawServer(sending(FRAMES[:3], end=False)) as server:
        program = start(file, server)
        status = program.wait()
    require(
        status != 0 and "Traceback" not in program.errors,
        "连接中途断了：要说回答不完整，并以非零状态结束（捕获 requests 的异常，sys.exit）。",
        "The connection broke off: it should say that the answer is incomplete, and end with a "
        "status that is not 0 (catch the exception of requests, then sys.exit).",
    )


def check_refusal(file: Path) -> None:
    detail = "temperature must be at most 2"

    def answer(exchange: Exchange) -> None:
        exchange.reply({"detail": detail}, 400)

    with RawServer(answer) as server:
        program = start(file, server)
        status = program.wait()
    require(
        status != 0 and detail in program.output + program.errors,
        "服务器拒绝了请求（400）：要把 detail 打印出来，并以非零状态结束。",
        "The server refused the request (400): it should print the detail, and end with a status "
        "that is not 0.",
    )
