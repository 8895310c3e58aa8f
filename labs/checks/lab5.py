"""Lab 5: a server that answers others while the model computes."""

import threading
from pathlib import Path

import requests

from labs.checks.lab4 import ask, check_hang_up, ends_soon, held_in_an_answer
from labs.hosted import PATIENCE, SESSION, Hosted, Reader, hosted
from labs.program import until
from labs.verdict import require


def check(file: Path) -> None:
    with hosted(file, model=True) as server:
        ask(server, "What is JSON?")
        check_health(server)
        check_second_client(server)
        check_hang_up(server)


def check_health(server: Hosted) -> None:
    response = server.request("GET", "/health")
    server.require_status(response, 200, "GET /health")
    reader = held_in_an_answer(server)
    answered = threading.Event()

    def look() -> None:
        try:
            SESSION.get(server.url + "/health", timeout=PATIENCE)
            answered.set()
        except requests.RequestException:
            pass

    looking = threading.Thread(target=look)
    looking.start()
    looking.join()
    reader.hang_up()
    server.host("hold", holding=False)
    until(lambda: not server.state()["open"])
    require(
        answered.is_set(),
        "模型正在算一步，/health 就没有回答：事件循环在等模型。sleep(0) 帮不了它，"
        "模型要在另一个线程里算。",
        "While the model computes a step, /health gets no answer: the event loop waits for the "
        "model. sleep(0) does not help; the model must compute in another thread.",
    )


def check_second_client(server: Hosted) -> None:
    first = held_in_an_answer(server)
    second = Reader(server.url, prompt="What is JSON?", temperature=0)
    until(lambda: server.state()["open"] == 2)
    while not second.answer and not first.ended and not second.ended:
        steps = server.state()["steps"]
        server.host("allow", steps=1)
        until(lambda: server.state()["steps"] > steps or first.ended)
    in_turn = not first.ended
    first.hang_up()
    ends_soon(server)
    server.host("hold", holding=False)
    second.wait()
    until(lambda: not server.state()["open"])
    require(
        in_turn,
        "第二个客户端要等第一个的回答全部结束，才得到第一帧。",
        "The second client gets its first frame only when the first one's answer has ended.",
    )
