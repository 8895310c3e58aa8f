"""Lab 3: POST with a pydantic body, from a server that remembers nothing."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from labs.hosted import hosted
from labs.verdict import require


def check(file: Path) -> None:
    with hosted(file) as server:

        def post(status: int, what: str, **body) -> dict:
            response = server.request("POST", "/", json=body)
            server.require_status(response, status, f"POST / {what}")
            return response.json()

        reply = post(200, '{"prompt": "你好"}', prompt="你好")
        expected = {"response": "你说：你好", "history": [["你好", "你说：你好"]]}
        require(
            reply == expected,
            f"应该得到 {expected}，却得到 {reply}。",
            f"The reply should be {expected}, and is {reply}.",
        )
        post(422, "{}", history=[])
        post(422, '{"prompt": 7}', prompt=7)
        for temperature, status in ((0, 200), (2, 200), (-0.1, 422), (3, 422)):
            sent = {"prompt": "hi", "temperature": temperature}
            post(status, json.dumps(sent), **sent)
        check_memory(post)


def check_memory(post) -> None:
    """Two clients at once, each with a conversation of its own."""

    def converse(name: str) -> list:
        history: list = []
        for turn in range(3):
            history = post(200, "…", prompt=f"{name}{turn}", history=history)["history"]
        return history

    with ThreadPoolExecutor() as threads:
        talks = dict(zip("AB", threads.map(converse, "AB"), strict=True))
    for name, history in talks.items():
        expected = [[f"{name}{turn}", f"你说：{name}{turn}"] for turn in range(3)]
        require(
            history == expected,
            "两个客户端的对话混在一起了：服务器什么都不该记住，历史只来自请求。",
            "Two clients' conversations are mixed up: the server should remember nothing; the "
            "history comes with the request alone.",
        )
