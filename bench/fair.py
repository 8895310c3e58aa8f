"""How long two clients wait for their first token, among themselves and beside a greedy one.

The greedy one opens hundreds of connections, and asks for a long answer on each. On Linux, each
client has an address of its own (127.0.0.2 and so on), by which the server shares out its places.
"""

import argparse
import asyncio
import json
import statistics

from bench.contenders import Running, our_server, serving
from bench.load import ask

GREEDY, HONEST = "127.0.0.2", ("127.0.0.3", "127.0.0.4")
LONG = {"prompt": "Count from 1 to 100", "temperature": 0, "repetition_penalty": 0.5}


async def greedy(server: Running) -> None:
    """One connection that asks without an end. It is cancelled."""
    while True:
        body = {**LONG, "max_length": 2000}
        await ask(server.host, server.port, "/", body, "frames", source=GREEDY)


async def honest(server: Running, source: str, questions: int) -> list[float]:
    """Seconds to the first token, question by question."""
    waits = []
    for number in range(questions):
        body = {"prompt": "hello", "seed": number, "max_length": 200}
        answer = await ask(server.host, server.port, "/", body, "frames", source=source)
        waits.append(answer.arrivals[0] - answer.started if answer.arrivals else float("inf"))
    return waits


async def both(server: Running, questions: int) -> list[float]:
    return sum(await asyncio.gather(*(honest(server, each, questions) for each in HONEST)), [])


async def measure(server: Running, settings: argparse.Namespace) -> dict:
    await both(server, 2)  # warms up
    alone = await both(server, settings.questions)
    crowd = [asyncio.create_task(greedy(server)) for _ in range(settings.connections)]
    await asyncio.sleep(5)
    beside = await both(server, settings.questions)
    for task in crowd:
        task.cancel()
    await asyncio.gather(*crowd, return_exceptions=True)
    times = {"among themselves": alone, "beside the greedy one": beside}
    return {
        who: {"median": round(statistics.median(each), 3), "longest": round(max(each), 3)}
        for who, each in times.items()
    }


def main(settings: argparse.Namespace) -> int:
    """Prints and saves the seconds. Returns 1 if the two wait more than twice as long."""
    with serving(our_server()) as server:
        waits = asyncio.run(measure(server, settings))
    result = {"greedy connections": settings.connections, "seconds to the first token": waits}
    text = json.dumps(result, indent=1)
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "fair.json").write_text(text + "\n", "utf-8")
    print(text)
    alone, beside = (each["median"] for each in waits.values())
    return int(beside > 2 * alone)
