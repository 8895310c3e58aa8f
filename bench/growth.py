"""What a longer answer and more clients cost, and what the protocol's bytes come to.

Frames hold the whole text so far, so the bytes of `POST /` grow with the square of the answer for
a reader that takes them all: that is the protocol. Nothing else may: CPU time and memory are held
against the answer's length, and OpenAI's format shows the bytes without the protocol's part.
"""

import argparse
import asyncio
import json
import math
import tempfile
import time
from pathlib import Path

from bench import weights
from bench.compare import LONG, Prompts
from bench.contenders import Contender, PeakMemory, Running, our_server, serving
from bench.load import Answer, ask
from bench.report import MIB, shown, table

LENGTHS, QUICK_LENGTHS = [256, 1024, 4096], [64, 256, 1024]  # tokens of an answer
CLIENTS, QUICK_CLIENTS = [1, 4, 16, 64], [1, 16]
SLOW_RATE = 20_000  # bytes a second that a slow reader takes
REPEATS = 3  # medians of so many, where an answer is short
# Attention looks back at all there is, so CPU time may grow a little faster than the answer.
STEEPEST = 1.35  # exponent of the answer's length; 1 is linear, 2 is a square


def load(
    server: Running,
    contender: Contender,
    prompts: Prompts,
    tokens: int,
    clients: int,
    rate: float | None = None,
) -> dict:
    """One answer each for so many clients at once; CPU seconds and bytes are per answer."""
    questions = [contender.body(*prompts.make("short"), tokens) for _ in range(clients)]

    async def all_at_once() -> list[Answer]:
        return await asyncio.gather(
            *(
                ask(server.host, server.port, path, body, contender.style, rate)
                for path, body in questions
            )
        )

    before, begun = server.cpu_seconds(), time.perf_counter()
    with PeakMemory(server) as memory:
        answers = asyncio.run(all_at_once())
    bad = [answer for answer in answers if not answer.complete or answer.status != 200]
    if bad:
        raise ValueError(f"an answer of {tokens} tokens failed: {bad[0].status} {bad[0].error}")
    return {
        "tokens": tokens,
        "clients": clients,
        "rate": rate,
        "style": contender.style,
        "cpu": (server.cpu_seconds() - before) / clients,
        "memory": memory.peak,
        "wall": time.perf_counter() - begun,
        "bytes": sum(answer.bytes for answer in answers) / clients,
    }


def middle(runs: list[dict]) -> dict:
    """The run whose CPU time is the median."""
    return sorted(runs, key=lambda run: run["cpu"])[len(runs) // 2]


def exponent(runs: list[dict], figure: str) -> float:
    """k where the figure grows as the k-th power of the answer's length."""
    first, last = runs[0], runs[-1]
    return math.log(last[figure] / first[figure]) / math.log(last["tokens"] / first["tokens"])


def row(run: dict, style: str) -> list[str]:
    tokens = run["tokens"]
    return [
        style,
        str(run["clients"]),
        f"{tokens:,}",
        shown(run["cpu"] / tokens, 1000, 2),
        shown(run["wall"] / tokens, 1000, 2),
        shown(run["bytes"], 1, 0),
        shown(run["bytes"] / tokens, 1, 0),
        shown(run["memory"], 1 / MIB, 0),
    ]


def rounds(server: Running, prompts: Prompts, quick: bool) -> dict[str, list[dict]]:
    """What is measured: by length in both formats, by number of clients, and read slowly."""
    frames, lengths = our_server(), QUICK_LENGTHS if quick else LENGTHS
    openai = Contender("", "openai", model="any")
    load(server, frames, prompts, 16, 1)  # the first answer of a process is slower
    found: dict[str, list[dict]] = {}

    def several(label: str, count: int, *given) -> None:
        print(f"  {label}: tokens, clients: {given[2:4]}", flush=True)
        runs = [load(server, *given) for _ in range(count)]
        found.setdefault(label, []).append(middle(runs))

    for tokens in lengths:
        count = REPEATS if tokens <= 1024 else 1
        several("POST /", count, frames, prompts, tokens, 1)
        several("/v1", count, openai, prompts, tokens, 1)
    for clients in QUICK_CLIENTS if quick else CLIENTS:
        several("POST /, together", REPEATS, frames, prompts, lengths[0], clients)
    for tokens in lengths[:2] if quick else lengths:  # the longest takes minutes
        several(f"POST /, at {SLOW_RATE // 1000} KB/s", 1, frames, prompts, tokens, 1, SLOW_RATE)
    return found


def next_turn(server: Running, prompts: Prompts) -> dict[str, float]:
    """Seconds to the first token of a question after a long history, the median of several: of a
    history that the server has just answered to, and of one that it has never seen."""
    times: dict[str, list[float]] = {"known": [], "new": []}
    for _ in range(REPEATS):
        for kind, found in times.items():
            history = [[prompts.make("long")[0], "ok"]]
            turns = [("…", history)] if kind == "known" else []
            for prompt, before in [*turns, ("go on", history)]:
                body = {"prompt": prompt, "history": before, "max_length": LONG + 200}
                answer = asyncio.run(ask(server.host, server.port, "/", body, "frames"))
            found.append(answer.arrivals[0] - answer.started)
    return {kind: sorted(found)[REPEATS // 2] for kind, found in times.items()}


def main(settings: argparse.Namespace) -> int:
    """Prints and saves one table. Returns the exit status: 1 if something grows too fast."""
    from chatglm.checkpoint.tokenizers import load_chatglm_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        published, _ = weights.make(Path(folder))
        prompts = Prompts(load_chatglm_tokenizer(published, "chatglm3"))
        with serving(our_server(published)) as server:
            found = rounds(server, prompts, settings.quick)
            first = next_turn(server, prompts)
    cpu = {label: exponent(found[label], "cpu") for label in ("POST /", "/v1")}
    size = {label: exponent(found[label], "bytes") for label in ("POST /", "/v1")}
    together = [{**run, "tokens": run["clients"]} for run in found["POST /, together"]]
    each = exponent(together, "cpu")
    verdict = (
        f"An answer's cost grows as its length to the power of: CPU {cpu['POST /']:.2f} "
        f"(/v1 {cpu['/v1']:.2f}), bytes {size['POST /']:.2f} (/v1 {size['/v1']:.2f}); "
        f"its CPU time as the number of clients to the power of {each:.2f}.\n\n"
        f"The first token after a history of {LONG:,} tokens comes within "
        f"{1000 * first['known']:.0f} ms where the history is still in the cache, and "
        f"{1000 * first['new']:.0f} ms where it is new."
    )
    text = table(
        [
            "",
            "clients",
            "tokens",
            "CPU ms/token",
            "ms/token",
            "bytes/answer",
            "bytes/token",
            "peak MiB",
        ],
        [row(run, label) for label, runs in found.items() for run in runs],
    )
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "growth.md").write_text(f"{text}\n\n{verdict}\n", "utf-8")
    result = {**found, "first token": first}
    (settings.out / "growth.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(f"\n{text}\n\n{verdict}\nsaved in {settings.out}")
    # Clients together must not cost more each than alone; OpenAI's bytes must follow the text.
    return int(max(cpu.values()) > STEEPEST or size["/v1"] > 1.1 or each > 0.1)
