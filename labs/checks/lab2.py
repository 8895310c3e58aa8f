"""Lab 2: a GET route with a path and a query parameter, and a client for it."""

from pathlib import Path

from labs.hosted import hosted
from labs.program import run
from labs.raw_server import RawServer
from labs.verdict import require

TEXT = "你 & 我 = 50%"


def check(file: Path) -> None:
    with hosted(file) as server:
        check_server(server)
    check_client(file)


def check_server(server) -> None:
    def get(path: str, status: int, **query):
        response = server.request("GET", path, params=query)
        server.require_status(response, status, f"GET {path} {query or ''}".strip())
        return response.json()

    reply = get("/repeat/3", 200, text="hi")
    require(
        reply == {"number": 3, "result": "hihihi"},
        f'GET /repeat/3?text=hi 应该得到 {{"number": 3, "result": "hihihi"}}，却得到 {reply}。',
        f'GET /repeat/3?text=hi should get {{"number": 3, "result": "hihihi"}}, and got {reply}.',
    )
    reply = get("/repeat/2", 200)
    require(
        reply.get("result") == "haha",
        f"没有 text 时，它应该是 ha：结果应为 haha，却是 {reply.get('result')!r}。",
        f"Without text, it should be ha: the result haha, and is {reply.get('result')!r}.",
    )
    get("/repeat/many", 422)


def check_client(file: Path) -> None:
    def answer(exchange) -> None:
        exchange.reply({"number": 2, "result": "seen by the client"})

    with RawServer(answer) as server:
        written = run(file, server.url, "2", TEXT)
    require(
        server.exchanges,
        "作为客户端运行时，你的程序没有发请求。",
        "Run as a client, your program sends no request.",
    )
    exchange = server.exchanges[0]
    require(
        (exchange.method, exchange.path) == ("GET", "/repeat/2"),
        f"客户端应该请求 GET /repeat/2，却请求了 {exchange.method} {exchange.path}。",
        f"The client should ask GET /repeat/2, and asks {exchange.method} {exchange.path}.",
    )
    require(
        exchange.query.get("text") == TEXT,
        f"text 应该是 {TEXT!r}，到服务器却成了 {exchange.query.get('text')!r}：用 params= 传它。",
        f"text should be {TEXT!r}, and reaches the server as {exchange.query.get('text')!r}: "
        "pass it with params=.",
    )
    require(
        written.strip() == "seen by the client",
        "客户端应该只打印回答里的 result。",
        "The client should print the result of the answer alone.",
    )
