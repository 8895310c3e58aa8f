"""Sixty honest conversations among strangers who send what should stop everybody.

Each honest client has an address of its own, as in a class; the strangers share four (Linux takes
any address from 127.0.0.1 on as its own). GET /health is asked all the while by a process of its
own, so that its times are the server's.

    python -m bench.hostile health 127.0.0.1 8000     # that process; it ends with its input
    python -m bench.hostile strangers 127.0.0.1 8000  # those who attack
"""

import argparse
import asyncio
import itertools
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sentencepiece import SentencePieceProcessor

from bench.contenders import ROOT, Running, our_server, serving
from bench.load import ask, connect, get, question
from bench.report import MIB
from bench.soak import FAULTS, STUCK, Soak, come_to_rest, make_questions, put

HONEST, STRANGERS = 60, 12
PAUSE = 0.5  # seconds, on average, that a stranger rests between two attacks
IDLE = 150  # connections on which nothing is asked
ENOUGH = 30  # seconds after which a stranger gives up
LATEST = 100  # milliseconds in which GET /health must answer
GROWTH = 100  # MiB by which memory may have grown: the allocator keeps some
ALONE = 0.25  # share of the time in which the honest are among themselves
V1, HI = "/v1/chat/completions", b'{"messages": [{"role": "user", "content": "hi"}], '
TOOL = HI + b'"tools": [{"type": "function", "function": {"name": "f", '
VOCABULARY = SentencePieceProcessor(model_file=str(ROOT / "chatglm" / "tiny" / "tokenizer.model"))
FORCED = b'"logit_bias": {"%d": 100}}' % VOCABULARY.encode("aa")[-1]  # an a, over and over
ENDLESS = {"prompt": "Count", "temperature": 0, "repetition_penalty": 0.5, "max_length": 8192}

BODIES = [
    ("/", b'{"prompt": "hi", "history": [' + b"[]," * 340_000 + b"0]}"),
    ("/", b'{"prompt": "' + b" " * 1_000_000 + b'"}'),
    ("/", b'{"prompt": "' + b"a" * 1_000_000 + b'"}'),
    ("/", b'{"prompt": "hi", "temperature": 1e-40, "max_length": 200}'),
    ("/", b'{"prompt": "hi", "repetition_penalty": 1e-40}'),
    (V1, b'{"messages": [' + b"0," * 500_000 + b"0]}"),
    (V1, HI + b'"stop": "' + b"ab" * 500_000 + b'"}'),
    (V1, HI + b'"stop": [' + b'"ab",' * 120_000 + b'"a"]}'),
    (V1, TOOL + b'"description": "\\ud800"}}]}'),
    (V1, TOOL + b'"parameters": {"a": ' + b"[" * 90 + b"]" * 90 + b"}}}]}"),
    (V1, TOOL + b'"parameters": {"a": ' + b"[" * 9000 + b"]" * 9000 + b"}}}]}"),
    (V1, TOOL + b'"parameters": {"a": [' + (b"[" * 90 + b"]" * 90 + b",") * 5000 + b"0]}}}]}"),
    (
        V1,
        HI + b'"logprobs": true, "top_logprobs": 20, "n": 4, "max_tokens": 2000, "temperature": 2}',
    ),
    (V1, HI + b'"logprobs": true, "stop": "' + b"a" * 499 + b'b", "max_tokens": 600, ' + FORCED),
    (V1, HI + b'"max_tokens": 500, "response_format": {"type": "json_object"}, "temperature": 2}'),
]


class Stranger:
    """Attacks one server from one address."""

    def __init__(self, host: str, port: int, number: int) -> None:
        self.host, self.port = host, port
        self.source = f"127.0.0.{2 + number % 4}"
        self.dice = random.Random(number)

    async def attack(self) -> None:
        kinds = [
            self.body,
            self.hang_up,
            self.head,
            self.drip,
            self.pipeline,
            self.page,
            self.greedy,
        ]
        while True:
            try:
                async with asyncio.timeout(ENOUGH):
                    await self.dice.choice(kinds)()
            except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError):
                pass  # refused, cut off, or too slow: what a stranger should expect
            await asyncio.sleep(self.dice.expovariate(1 / PAUSE))

    async def body(self) -> None:
        path, body = self.dice.choice(BODIES)
        await ask(self.host, self.port, path, body, "frames", patience=ENOUGH, source=self.source)

    async def hang_up(self) -> None:
        path, body = self.dice.choice(BODIES)
        await self.send(question(self.host, "POST", path, body), wait=self.dice.random())

    async def head(self) -> None:
        await self.send(b"GET / HTTP/1.1\r\nX: " + b"a" * 20_000_000, wait=5)

    async def drip(self) -> None:
        whole = question(self.host, "POST", "/", b'{"prompt": "hello"}')
        await self.send(*(whole[i : i + 1] for i in range(len(whole))), wait=0, between=0.2)

    async def pipeline(self) -> None:
        await self.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 10_000, wait=2)

    async def page(self) -> None:
        body = b'{"prompt": "hi"}'
        asked = question("evil.example", "POST", "/", body)
        await self.send(asked.replace(b"\r\n", b"\r\nOrigin: http://evil.example\r\n", 1), wait=1)

    async def greedy(self) -> None:
        """Asks for long answers, and reads nothing."""
        asked = question(self.host, "POST", "/", json.dumps(ENDLESS).encode())
        await asyncio.gather(*(self.send(asked, wait=10) for _ in range(20)))

    async def send(self, *parts: bytes, wait: float, between: float = 0) -> None:
        _, writer = await connect(self.host, self.port, source=self.source)
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(between)
            await asyncio.sleep(wait)
        finally:
            writer.transport.abort()


async def idle(host: str, port: int, number: int) -> None:
    """A connection on which nothing is asked; opened again when it is closed."""
    while True:
        try:
            reader, writer = await connect(host, port, source=f"127.0.0.{2 + number % 4}")
            await reader.read()
            writer.close()
        except OSError:
            pass
        await asyncio.sleep(1)


async def strangers(host: str, port: int) -> None:
    attacks = [Stranger(host, port, number).attack() for number in range(STRANGERS)]
    await asyncio.gather(*attacks, *(idle(host, port, number) for number in range(IDLE)))


async def watch_health(host: str, port: int) -> None:
    while True:
        begun = time.perf_counter()
        await get(host, port, "/health")
        print(time.perf_counter() - begun, flush=True)
        await asyncio.sleep(0.02)


@contextmanager
def process(what: str, server: Running) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-m", "bench.hostile", what, server.host, str(server.port)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.wait()


async def honest(soak: Soak, number: int, times: list[float]) -> None:
    """One client after another answer, as in bench/soak.py; `times` gets the seconds of each."""
    for turn in itertools.count(number):
        if time.monotonic() > soak.until:
            return
        chosen = soak.questions[turn % len(soak.questions)]
        answer = await put(soak, chosen, source=f"127.1.0.{number + 1}")
        seconds = answer.ended - answer.started
        if seconds >= STUCK:
            soak.fault("stuck", f"{chosen.body} after {answer.text!r}")
        elif answer.status != 200 or not answer.complete:
            soak.fault("lost", f"{chosen.body}: {answer.status} {answer.error}")
        elif answer.text != chosen.alone:
            soak.fault("mixed up", f"{chosen.body}: {answer.text!r}, alone {chosen.alone!r}")
        times.append(seconds)


async def phase(soak: Soak, seconds: float) -> list[float]:
    """Seconds of each honest answer, sixty clients at once."""
    soak.until, times = time.monotonic() + seconds, []
    await asyncio.gather(*(honest(soak, number, times) for number in range(HONEST)))
    return times


async def run(server: Running, settings: argparse.Namespace) -> tuple[Soak, dict]:
    soak, seconds = Soak(server, make_questions(), 0.0), settings.minutes * 60
    for chosen in soak.questions:
        chosen.alone = (await put(soak, chosen)).text
    with process("health", server) as watcher:
        health: list[float] = []
        threading.Thread(
            target=lambda: health.extend(map(float, watcher.stdout)), daemon=True
        ).start()
        alone = await phase(soak, seconds * ALONE)
        before, quiet = server.memory(), len(health)
        with process("strangers", server):
            beside = await phase(soak, seconds * (1 - ALONE))
        health_alone, health_beside = health[:quiet], health[quiet:]
    after = await come_to_rest(server)
    await asyncio.sleep(15)  # connections on which nothing is asked are closed after 10 s
    return soak, {
        "honest answers": {"alone": len(alone), "beside": len(beside)},
        "seconds of an answer, median": {"alone": median(alone), "beside": median(beside)},
        "health, ms": {"alone": spread(health_alone), "beside": spread(health_beside)},
        "memory, MiB": {"before": round(before / MIB), "after": round(server.memory() / MIB)},
        "left": after["active"] + after["waiting"],
    }


def median(times: list[float]) -> float:
    return round(statistics.median(times), 2)


def spread(times: list[float]) -> dict[str, float]:
    """Percentiles, in milliseconds."""
    ordered = sorted(times)
    at = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "p100": 1}
    return {name: round(ordered[int((len(ordered) - 1) * p)] * 1000, 1) for name, p in at.items()}


def main(settings: argparse.Namespace) -> int:
    """Prints and saves the figures. Returns 1 if an honest answer went wrong, or too slowly."""
    with serving(our_server()) as server:
        soak, figures = asyncio.run(run(server, settings))
    faults = {kind: soak.counts[kind] for kind in FAULTS if kind != "wrongly refused"}
    result = {"minutes": settings.minutes, **faults, **figures, "samples": soak.samples}
    settings.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, ensure_ascii=False, indent=1)
    (settings.out / "hostile.json").write_text(text + "\n", "utf-8")
    print(text)
    times, memory = figures["seconds of an answer, median"], figures["memory, MiB"]
    failed = (
        any(faults.values())
        or figures["left"]
        or times["beside"] > 1.5 * times["alone"]
        or figures["health, ms"]["beside"]["p100"] > LATEST
        or memory["after"] > memory["before"] + GROWTH
    )
    print("FAILED" if failed else "no honest client was lost, mixed up, stuck or much slowed")
    return int(bool(failed))


if __name__ == "__main__":
    act = {"health": watch_health, "strangers": strangers}[sys.argv[1]]
    asyncio.run(act(sys.argv[2], int(sys.argv[3])))
