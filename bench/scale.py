"""What Ray Serve adds to the server, what a second replica brings, and how many a class needs.

    pip install -r deploy/requirements.txt
    python -m bench scale

The server alone, Ray with one replica and Ray with two, with the same load. All of them, and the
load, share this machine's cores: two replicas on two cores show that nothing is lost by spreading,
not what a second machine would bring.
"""

import argparse
import asyncio
import importlib.util
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from bench import weights
from bench.compare import Prompts, machine, measure, median_of, run_load
from bench.contenders import OURS, Contender, Running, our_server, serving
from bench.load import get
from bench.report import shown, table
from chatglm.engine.sequence import MIN_INTERVAL

KNOCKS = 200  # of GET /health one after the other: a request without the model
ANSWERS_ALONE = 4
ONE, TWO = "Ray, 1 replica", "Ray, 2 replicas"

# The plan's assumptions, for ChatGLM3-6B in half precision
WEIGHTS = 12.5e9  # bytes that a step reads
BANDWIDTH = 1.0e12  # bytes a second that a card's memory moves, such as an RTX 4090's
SHARE = 0.5  # of that bandwidth which decoding reaches
KEPT = 2 * 28 * 2 * 128 * 2  # bytes of keys and values that a step reads per token of context
CONTEXT, ANSWER = 1000, 200  # tokens
PLACES = 64  # answers at once in a replica (--max-concurrency)
STUDENTS = [15, 30, 60, 120, 240]


def under_ray(folder: Path, replicas: int) -> Contender:
    """As the README starts it, on a Ray of its own."""
    serve = [sys.executable, "-m", "ray.serve.scripts", "run", "--address", "local"]
    return Contender(
        ONE if replicas == 1 else TWO,
        "frames",
        [
            *serve,
            "deploy.app:deploy",
            "port={port}",
            f"model={folder}",
            f"min-replicas={replicas}",
            f"max-replicas={replicas}",
        ],
        ready="is ready at",
    )


def proxy_seconds(server: Running) -> float:
    """CPU seconds that Ray's proxy has used; 0 where there is none."""
    found = [
        process
        for process in server.process.children(recursive=True)
        if process.name().startswith("ray::Proxy")
    ]
    return sum(sum(process.cpu_times()[:2]) for process in found)


async def knock(server: Running) -> list[float]:
    """Seconds that each GET /health takes."""
    times = []
    for _ in range(KNOCKS):
        begun = time.perf_counter()
        await get(server.host, server.port, "/health")
        times.append(time.perf_counter() - begun)
    return times


def measure_one(
    contender: Contender, prompts: Prompts, settings: argparse.Namespace, figures: dict
) -> None:
    """One start: requests without the model, then each number of clients."""
    with serving(contender) as server:
        asked = [[contender.body(*prompts.make("short"), 20)] for _ in range(8)]
        run_load(server, contender, asked, False)  # a process's first answers are slower
        requests = statistics.median(asyncio.run(knock(server)))
        for clients in settings.clients:
            asked = [
                [
                    contender.body(*prompts.make("short"), settings.tokens)
                    for _ in range(max(1, ANSWERS_ALONE // clients))
                ]
                for _ in range(clients)
            ]
            before = proxy_seconds(server)
            result = run_load(server, contender, asked, False)
            proxy = proxy_seconds(server) - before
            got = measure(result, settings.tokens, own=True)
            frames = sum(len(answer["arrivals"]) for answer in result["answers"])
            got |= {
                "request": requests,
                "frames_per_s": frames / result["wall_s"],
                "proxy_per_token": proxy / (settings.tokens * sum(map(len, asked))),
                "proxy_per_frame": proxy / frames,
            }
            figures.setdefault((contender.name, clients), []).append(got)
            print(
                f"  {contender.name}, {clients} clients: {got['tokens_per_s']:.0f} tokens/s, "
                f"{got['failed']} failed",
                flush=True,
            )


COLUMNS = {
    "tokens_per_s": ("tokens/s", 1, 0),
    "first_median": ("first token, ms", 1000, 0),
    "first_p95": ("p95", 1000, 0),
    "frames_per_s": ("frames/s", 1, 0),
    "cpu_per_token": ("CPU ms/token", 1000, 2),
    "proxy_per_token": ("of it the proxy's", 1000, 2),
    "proxy_per_frame": ("the proxy's ms/frame", 1000, 2),
    "request": ("GET /health, ms", 1000, 1),
    "failed": ("failed", 1, 0),
}


def figures_table(medians: dict) -> str:
    rows = [
        [
            name,
            str(clients),
            *(
                shown(got[figure], factor, digits)
                for figure, (_, factor, digits) in COLUMNS.items()
            ),
        ]
        for (name, clients), got in sorted(medians.items(), key=lambda item: item[0][1])
    ]
    return table(["", "clients", *(heading for heading, _, _ in COLUMNS.values())], rows)


def added(medians: dict, clients: list[int]) -> dict[str, float]:
    """What Ray costs, in seconds: per request and per token of one reader, CPU per token of many,
    and the proxy's part of it, which one process on one core does, also per frame."""
    (alone, ray), (crowd, ray_crowd) = (
        [medians[name, count] for name in (OURS, ONE)] for count in (min(clients), max(clients))
    )
    return {
        "request": ray["request"] - alone["request"],
        "first": ray["first_median"] - alone["first_median"],
        "token": 1 / ray["tokens_per_s"] - 1 / alone["tokens_per_s"],
        "cpu": ray_crowd["cpu_per_token"] - crowd["cpu_per_token"],
        "proxy": ray_crowd["proxy_per_token"],
        "frame": ray_crowd["proxy_per_frame"],
    }


def plan(frame: float) -> list[list[str]]:
    """Rows of the planning table: a whole class asks at the same moment, and nobody waits. A
    `frame` costs the proxy so many seconds."""
    rows = []
    for students in STUDENTS:
        gpus = math.ceil(students / PLACES)
        batch = math.ceil(students / gpus)
        step = (WEIGHTS + batch * CONTEXT * KEPT) / (BANDWIDTH * SHARE)
        frames = students * min(1 / step, 1 / MIN_INTERVAL)  # a second
        rows.append(
            [
                str(students),
                str(gpus),
                str(batch),
                f"{1 / step:.0f}",
                f"{ANSWER * step:.0f} s",
                f"{students / step:,.0f}",
                f"{frames * frame:.1f}",
            ]
        )
    return rows


def markdown(settled: dict, medians: dict, cost: dict) -> str:
    ms = {name: 1000 * seconds for name, seconds in cost.items()}
    return f"""# The server under Ray Serve

Measured {settled["when"]} on {settled["cores"]} cores ({settled["system"]}, Python \
{settled["python"]}), the tiny ChatGLM, {settled["tokens"]} tokens an answer, medians over \
{settled["repeats"]} repeats. Servers, proxy and load share these cores, so the second replica \
takes from the first what it gains.

{figures_table(medians)}

Ray adds, for one reader: {ms["request"]:.1f} ms to a request without the model, \
{ms["first"]:.1f} ms to the first token, {ms["token"]:.2f} ms to each token. With \
{max(settled["clients"])} readers it costs {ms["cpu"]:.2f} ms of CPU time more per token, \
{ms["proxy"]:.2f} ms of it in the proxy, which is {ms["frame"]:.2f} ms per frame: one process on \
one core, so the proxy of one machine passes on at most about {1 / cost["frame"]:,.0f} frames/s, \
and a reader gets at most {1 / MIN_INTERVAL:.0f} of them a second.

## How many GPUs a class needs (an estimate)

{
        table(
            [
                "students",
                "GPUs",
                "in a batch",
                "tokens/s for each",
                f"{ANSWER} tokens take",
                "tokens/s in all",
                "proxies' cores",
            ],
            plan(cost["frame"]),
        )
    }

All ask at the same moment and nobody waits: GPUs = students / {PLACES} places. A step of \
ChatGLM3-6B reads {WEIGHTS / 1e9:.1f} GB of weights and {KEPT / 1000:.1f} KB for each of \
{CONTEXT:,} tokens of each conversation, from a card that moves {BANDWIDTH / 1e9:,.0f} GB/s and \
of which decoding reaches {SHARE:.0%}: that is the estimate; `python -m bench decode --preset \
chatglm3-6b` measures it on your card. Proxies' cores = students × {
        1 / MIN_INTERVAL:.0f} frames/s × \
{ms["frame"]:.2f} ms, as measured here.
"""


def main(settings: argparse.Namespace) -> int:
    """Prints and saves the tables. Returns the exit status: 1 if an answer failed."""
    if not importlib.util.find_spec("ray"):
        raise ValueError("there is no Ray: pip install -r deploy/requirements.txt")
    from chatglm.checkpoint.tokenizers import load_chatglm_tokenizer

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    figures: dict[tuple[str, int], list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        published, _ = weights.make(Path(folder))
        prompts = Prompts(load_chatglm_tokenizer(published, "chatglm3"))
        field = [our_server(published), under_ray(published, 1), under_ray(published, 2)]
        for repeat in range(settings.repeats):
            for contender in field[repeat % 3 :] + field[: repeat % 3]:
                measure_one(contender, prompts, settings, figures)
    medians = {key: median_of(runs) for key, runs in figures.items()}
    settled = {
        "tokens": settings.tokens,
        "repeats": settings.repeats,
        **machine(),
        "clients": settings.clients,
    }
    cost = added(medians, settings.clients)
    text = markdown(settled, medians, cost)
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "scale.md").write_text(text, "utf-8")
    results = [
        {"server": name, "clients": clients, "median": got, "repeats": figures[name, clients]}
        for (name, clients), got in medians.items()
    ]
    (settings.out / "scale.json").write_text(
        json.dumps({"settings": settled, "added by Ray, s": cost, "results": results}, indent=1)
        + "\n",
        "utf-8",
    )
    print(f"\n{text}\nsaved in {settings.out}")
    return int(any(got["failed"] for got in medians.values()))
