"""Lab 0: a program that asks the server one question."""

import sys
from pathlib import Path

from labs.program import run
from labs.raw_server import RawServer
from labs.verdict import require

QUESTION, ANSWER = "什么是 HTTP？", "HTTP 是通信协议。"


def check(file: Path) -> None:
    require(
        sys.version_info >= (3, 11),
        "需要 Python 3.11 或更新的版本。",
        "Python 3.11 or newer is needed.",
    )

    def answer(exchange) -> None:
        body = exchange.json()
        if exchange.method != "POST" or not isinstance(body, dict):
            return exchange.reply({"detail": "POST a JSON object"}, 400)
        exchange.reply({"response": ANSWER, "history": [[body.get("prompt"), ANSWER]]})

    with RawServer(answer) as server:
        written = run(file, server.url, QUESTION)
    require(
        server.exchanges,
        "你的程序没有向参数里的网址发请求。",
        "Your program sends no request to the URL that it is given.",
    )
    exchange = server.exchanges[0]
    body = exchange.json()
    require(
        exchange.method == "POST" and isinstance(body, dict),
        "请求应该是 POST，请求体是一个 JSON 对象：试试 json=。",
        "The request should be a POST with a JSON object as its body: try json=.",
    )
    require(
        body.get("prompt") == QUESTION,
        f'"prompt" 应该是命令行里的问题，却是 {body.get("prompt")!r}。',
        f'"prompt" should be the question of the command line, and is {body.get("prompt")!r}.',
    )
    require(
        body.get("stream") is False,
        '请求里要有 "stream": false，这样回答才会一次给全。',
        'The request needs "stream": false, or the answer does not come in one piece.',
    )
    require(
        written.strip() == ANSWER,
        f"应该只打印回答的文字，却打印了 {written.strip()!r:.60}。",
        f"It should print the text of the answer alone, and prints {written.strip()!r:.60}.",
    )
