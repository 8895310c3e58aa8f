"""Lab 4: the chapter's own streaming server, on the tiny model."""

from pathlib import Path

from labs.hosted import Hosted, Reader, hosted
from labs.program import until
from labs.verdict import Wrong, require

FIRST, SECOND = "什么是 HTTP？", "What is JSON?"
LONG = "从一数到一百"
STEPS = 40  # of the model, within which a hang-up must be noticed


def check(file: Path) -> None:
    with hosted(file, model=True) as server:
        alone = {prompt: ask(server, prompt) for prompt in (FIRST, SECOND)}
        check_history(server, alone[FIRST])
        check_two_clients(server, alone)
        check_hang_up(server)
        check_cancelled(server)


def ask(server: Hosted, prompt: str, history: list | None = None) -> str:
    reader = Reader(server.url, prompt=prompt, history=history or [], temperature=0).wait()
    error = server.error(not reader.whole)
    require(
        reader.whole and reader.answer and not error,
        f"回答中断了：{error or '没有一帧完整的回答'}",
        f"The answer broke off: {error or 'there was no whole frame'}",
    )
    require(
        reader.text.startswith("<^>") and reader.text.count("<^>") > 3,
        "回答要一帧一帧地发，每一帧以 <^> 开头。",
        "The answer must come in frames, each of which begins with <^>.",
    )
    frames = reader.text.split("<^>")[1:]
    require(
        all(new.startswith(old) for old, new in zip(frames, frames[1:])),
        "每一帧 <^> 后面应该是到目前为止的全部文字。",
        "After each <^>, the frame should hold the whole text so far.",
    )
    return reader.answer


def check_history(server: Hosted, answer: str) -> None:
    require(
        ask(server, "用英文说", [[FIRST, answer]]) != ask(server, "用英文说"),
        "请求里的 history 没有传给模型。",
        "The history of the request does not reach the model.",
    )


def check_two_clients(server: Hosted, alone: dict[str, str]) -> None:
    """Both requests have arrived before either answer begins."""
    server.host("meet", requests=2)
    readers = {prompt: Reader(server.url, prompt=prompt, temperature=0) for prompt in alone}
    for prompt, reader in readers.items():
        require(
            reader.wait().answer == alone[prompt],
            "两个客户端同时提问时，一个得到了另一个的回答：变量不要放在全局，要作为参数传递。",
            "When two clients ask at once, one gets the other's answer: do not make the variables "
            "global, pass them to process as arguments.",
        )
    server.host("meet", requests=0)


def held_in_an_answer(server: Hosted) -> Reader:
    """A client in the middle of a long answer; the model waits."""
    server.host("hold", holding=True)
    reader = Reader(server.url, prompt=LONG, temperature=0)
    while not reader.answer and not reader.ended:
        server.host("allow", steps=1)
        until(lambda: server.state()["rests"] or reader.ended)
    until(lambda: server.state()["rests"])
    return reader


def ends_soon(server: Hosted) -> bool:
    """Whether the open requests end within a few steps. They do not if the model has made those
    and waits before the next."""
    for _ in range(STEPS):
        server.host("allow", steps=1)
        until(lambda: server.state()["rests"] or not server.state()["open"])
        if not server.state()["open"]:
            return True
    return False


def goes_on(server: Hosted) -> bool:
    """Whether the model makes all the steps that it may, though no request is open. It has not
    stopped before it has made none for three seconds."""
    before, last = server.state()["steps"], -1
    server.host("allow", steps=STEPS)
    while last != (last := server.state()["steps"]) and last < before + STEPS:
        until(lambda last=last: server.state()["steps"] > last, 3)
    return last >= before + STEPS


def check_hang_up(server: Hosted) -> None:
    reader = held_in_an_answer(server)
    reader.hang_up()
    noticed = ends_soon(server) and not goes_on(server)
    server.host("hold", holding=False)
    require(
        noticed,
        f"客户端断开以后，模型又算了 {STEPS} 步还没有停：每一帧之后要让事件循环有机会运行。",
        f"After the client has hung up, the model still goes on {STEPS} steps later: after each "
        "frame, the event loop must get its turn.",
    )
    until(lambda: not server.state()["open"])


def check_cancelled(server: Hosted) -> None:
    reader = held_in_an_answer(server)
    server.host("cancel")
    ends_soon(server)
    server.host("hold", holding=False)
    reader.wait()
    if reader.whole:
        raise Wrong(
            "服务器取消了回答，客户端却以为它是完整的：不要吞掉 CancelledError，让它继续往上抛。",
            "The server cancelled the answer, and the client takes it for whole: do not swallow "
            "CancelledError, let it pass on.",
        )
