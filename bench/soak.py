"""Does every answer arrive, and is it the right one, among clients of every kind?

Good and slow clients ask at temperature 0 what was asked alone beforehand: their answers must be
the same. Others send what is refused, or vanish in the middle of an answer or of their question.
"""

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field

from bench.contenders import Running, our_server, serving
from bench.load import Answer, ask, connect, get, question
from bench.report import MIB

STUCK = 120  # seconds after which an answer counts as stuck; a good one takes a few
SETTLE = 60  # seconds for the server to come to rest at the end
SLOW_RATE = 1500  # bytes a second: an answer of some 50 frames then takes several seconds
SETTLED_AFTER = 0.2  # share of the time after which memory is first looked at
QUESTIONS = 24  # different ones
FAULTS = ("lost", "mixed up", "stuck", "wrongly refused")  # none of these may happen
KINDS = {"good": 60, "slow": 10, "vanish": 15, "half": 5, "bad": 10}  # of 100 clients

# path, body, status: what must be refused, and how
BAD = [
    ("/", b"{", 400),
    ("/", b"[]", 400),
    ("/", b'{"prompt": 5}', 400),
    ("/", b"\xff\xfe", 400),
    ("/", b'{"prompt": "hi", "top_p": 7}', 400),
    ("/stream", b'{"prompt": " "}', 400),
    ("/", b'{"prompt": "hi", "history": [[1]]}', 400),
    ("/nowhere", b"{}", 404),
    ("/", b'{"prompt": "' + b"a" * 2**20 + b'"}', 413),
    ("/", b'{"prompt": "hi", "max_length": 1}', 400),
    ("/v1/chat/completions", b'{"messages": []}', 400),
]


@dataclass
class Question:
    """A request at temperature 0, and what was answered when nobody else asked."""

    path: str
    body: dict
    style: str
    alone: str = ""


@dataclass
class Soak:
    """What the workers share."""

    server: Running
    questions: list[Question]
    until: float  # time.monotonic() at which no more is asked
    dice: random.Random = field(default_factory=lambda: random.Random(0))
    counts: Counter = field(default_factory=Counter)
    samples: list[str] = field(default_factory=list)  # what went wrong, the first few

    def fault(self, kind: str, what: str) -> None:
        self.counts[kind] += 1
        if len(self.samples) < 5:
            self.samples.append(f"{kind}: {what[:400]}")


def make_questions() -> list[Question]:
    """In each of the three formats, with and without turns before."""
    asked = [
        "你好",
        "hello",
        "你是谁？",
        "What is streaming?",
        "什么是流式输出？",
        "谢谢",
        "再见",
        "What can you do?",
    ]
    turns = [[], [["你好", "你好！"]], [["Hi", "Hello!"], ["thanks", "You are welcome."]]]
    found = []
    for i in range(QUESTIONS):
        prompt, history = asked[i % len(asked)], turns[i // len(asked) % len(turns)]
        settings = {"temperature": 0, "stream": True}
        if i % 3 == 0:
            found.append(
                Question(
                    "/",
                    {"prompt": prompt, "history": history, "max_length": 400, **settings},
                    "frames",
                )
            )
        elif i % 3 == 1:
            found.append(
                Question(
                    "/stream",
                    {"prompt": prompt, "history": history, "max_length": 400, **settings},
                    "events",
                )
            )
        else:
            messages = [
                {"role": role, "content": text}
                for turn in history
                for role, text in zip(("user", "assistant"), turn)
            ]
            messages.append({"role": "user", "content": prompt})
            found.append(
                Question(
                    "/v1/chat/completions",
                    {"messages": messages, "max_tokens": 300, **settings},
                    "events",
                )
            )
    return found


async def put(
    soak: Soak,
    chosen: Question,
    rate: float | None = None,
    hang_up_after: int | None = None,
    source: str = "",
) -> Answer:
    return await ask(
        soak.server.host,
        soak.server.port,
        chosen.path,
        chosen.body,
        chosen.style,
        rate,
        hang_up_after,
        STUCK,
        source,
    )


async def good(soak: Soak, rate: float | None = None) -> None:
    chosen = soak.dice.choice(soak.questions)
    answer = await put(soak, chosen, rate)
    if answer.ended - answer.started >= STUCK:
        soak.fault("stuck", f"{chosen.body} after {answer.text!r}")
    elif answer.status != 200 or not answer.complete:
        soak.fault("lost", f"{chosen.body}: {answer.status} {answer.error}")
    elif answer.text != chosen.alone:
        soak.fault("mixed up", f"{chosen.body}: {answer.text!r}, alone {chosen.alone!r}")


async def vanish(soak: Soak) -> None:
    """Goes away after some bytes of the answer: of its head, or of its text."""
    await put(soak, soak.dice.choice(soak.questions), None, soak.dice.randrange(1500))


async def half(soak: Soak) -> None:
    """Goes away in the middle of its question."""
    whole = question(soak.server.host, "POST", "/", b'{"prompt": "hello", "max_length": 100}')
    _, writer = await connect(soak.server.host, soak.server.port)
    writer.write(whole[: soak.dice.randrange(len(whole))])
    await asyncio.sleep(soak.dice.random())
    writer.transport.abort()


async def bad(soak: Soak) -> None:
    path, body, status = soak.dice.choice(BAD)
    answer = await ask(soak.server.host, soak.server.port, path, body, "frames", patience=STUCK)
    if answer.status != status:
        soak.fault("wrongly refused", f"{path} {body[:60]!r}: {answer.status} {answer.error}")


async def worker(soak: Soak) -> None:
    """One client after the other, each of a kind by the dice."""
    acts = {
        "good": good,
        "slow": lambda soak: good(soak, SLOW_RATE),
        "vanish": vanish,
        "half": half,
        "bad": bad,
    }
    while time.monotonic() < soak.until:
        (kind,) = soak.dice.choices(list(KINDS), KINDS.values())
        await acts[kind](soak)
        soak.counts[kind] += 1


async def health(server: Running) -> dict:
    _, body = await get(server.host, server.port, "/health")
    return json.loads(body)


async def come_to_rest(server: Running) -> dict:
    """GET /health once nothing is under way, or when it should long have been so."""
    deadline = time.monotonic() + SETTLE
    while True:
        state = await health(server)
        if (not state["active"] and not state["waiting"]) or time.monotonic() > deadline:
            return state
        await asyncio.sleep(0.2)


async def run(server: Running, settings: argparse.Namespace) -> tuple[Soak, dict]:
    """The whole of it: alone, all together, and the state afterwards."""
    soak = Soak(server, make_questions(), 0.0)
    for chosen in soak.questions:
        answer = await put(soak, chosen)
        if answer.status != 200 or not answer.complete:
            raise ValueError(f"{chosen.body} alone: {answer.status} {answer.error}")
        chosen.alone = answer.text
    state = {"health before": await health(server)}
    seconds = settings.minutes * 60
    soak.until = time.monotonic() + seconds
    workers = asyncio.gather(*(worker(soak) for _ in range(settings.clients)))
    # Threads and buffers come with the first crowd; what is added after that is a leak.
    await asyncio.sleep(seconds * SETTLED_AFTER)
    state["memory early, MiB"] = round(server.memory() / MIB, 1)
    state["health under way"] = await health(server)
    await workers
    state["health after"] = await come_to_rest(server)
    state["memory at the end, MiB"] = round(server.memory() / MIB, 1)
    return soak, state


def main(settings: argparse.Namespace) -> int:
    """Prints and saves the counts. Returns the exit status: 1 if a single answer went wrong."""
    if settings.hostile:
        from bench import hostile  # which needs what is above

        return hostile.main(settings)
    with serving(our_server()) as server:
        soak, state = asyncio.run(run(server, settings))
    counts = {kind: soak.counts[kind] for kind in (*KINDS, *FAULTS)}
    busy = state["health after"]["active"] + state["health after"]["waiting"]
    result = {
        "minutes": settings.minutes,
        "clients": settings.clients,
        "counts": counts,
        **state,
        "samples": soak.samples,
    }
    settings.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, ensure_ascii=False, indent=1)
    (settings.out / "soak.json").write_text(text + "\n", "utf-8")
    print(text)
    failed = busy or any(counts[kind] for kind in FAULTS)
    print("FAILED" if failed else "every answer arrived, and was the right one")
    return int(bool(failed))
