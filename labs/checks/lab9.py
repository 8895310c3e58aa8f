"""Lab 9: a sampling parameter, from the command line to the model."""

from pathlib import Path

from labs.hosted import hosted
from labs.program import run
from labs.raw_server import RawServer
from labs.verdict import require

PROMPT = "什么是 HTTP？"


def check(file: Path) -> None:
    check_client(file)
    with hosted(file, model=True) as server:

        def ask(**body) -> str:
            response = server.request("POST", "/", json={"prompt": PROMPT, **body})
            server.require_status(response, 200, f"POST / {body}")
            return response.json()["response"]

        for wrong in (0, -1, "many"):
            response = server.request("POST", "/", json={"prompt": PROMPT, "top_k": wrong})
            server.require_status(response, 422, f'"top_k": {wrong!r}')
        best = ask(temperature=0)
        wild = [ask(temperature=2, seed=seed) for seed in range(2)]
        require(
            wild[0] != best or wild[1] != best,
            "没有 top_k 时，温度 2 的回答不该和温度 0 的一样：不给 top_k 就不要限制。",
            "Without top_k, an answer at temperature 2 should not be that of temperature 0: if "
            "top_k is absent, nothing is left out.",
        )
        for seed in range(2):
            require(
                ask(temperature=2, seed=seed, top_k=1) == best,
                "top_k 为 1 时只剩下最可能的 token，应该和温度 0 时一样：它没有到达采样那一步。",
                "With a top_k of 1, the likeliest token alone is left, and the answer should be "
                "that of temperature 0: top_k does not reach the sampling.",
            )
        require(
            ask(temperature=2, seed=0, top_k=100_000) == wild[0],
            "top_k 比词表还大时，什么也不该去掉。",
            "With a top_k beyond the vocabulary, nothing should be left out.",
        )


def check_client(file: Path) -> None:
    def answer(exchange) -> None:
        exchange.reply({"response": "ok"})

    with RawServer(answer) as server:
        run(file, server.url, PROMPT, "--top-k", "5")
        run(file, server.url, PROMPT)
    bodies = [exchange.json() or {} for exchange in server.exchanges]
    require(
        len(bodies) == 2 and bodies[0].get("top_k") == 5,
        '客户端的 --top-k 5 应该成为请求里的 "top_k": 5。',
        'The client\'s --top-k 5 should become "top_k": 5 in the request.',
    )
    require(
        bodies[1].get("top_k") is None,
        "没有 --top-k 时，请求里也不该有 top_k。",
        "Without --top-k, the request should have no top_k.",
    )
