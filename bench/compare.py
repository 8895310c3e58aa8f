"""The comparison: the same weights and the same load for each contender in turn."""

import argparse
import platform
import random
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil

from bench import load, report
from bench.contenders import (
    OURS,
    Contender,
    PeakMemory,
    Running,
    contenders,
    our_server,
    peers,
    serving,
)

LONG = 1000  # tokens of a long prompt, unless told otherwise
ANSWERS_ALONE = 4  # answers that a single client asks for, one after the other
LOAD_LIMIT = 0.5  # of a core: a load that takes more may itself be what is slow
SENTENCES = [
    "今天我们学习流式输出，也就是一个字一个字地把回答送给读者。",
    "服务器要同时照顾很多人，谁也不能等太久。",
    "The server sends what it has as soon as it has it.",
    "A reader may be slow or go away.",
    "每一步，模型为每个请求算出一个新的词。",
    "What is the marker between two frames for?",
]


class Prompts:
    """Questions of a given length, each another one: no cache may help where it would not in
    earnest."""

    def __init__(self, tokenizer, long: int = LONG) -> None:
        self.tokenizer, self.long, self.dice = tokenizer, long, random.Random(0)

    def count(self, prompt: str) -> int:
        return len(self.tokenizer.encode_chat([{"role": "user", "content": prompt}]))

    def make(self, kind: str) -> tuple[str, int]:
        """A prompt, and its tokens."""
        prompt = f"{self.dice.randrange(10**6)}：请详细介绍流式输出。"
        while kind == "long" and self.count(prompt) < self.long:
            prompt += self.dice.choice(SENTENCES)
        return prompt, self.count(prompt)


def run_load(server: Running, contender: Contender, clients: list[list], health: bool) -> dict:
    """Lets bench.load carry out a plan, and adds what the server's process has used."""
    plan = {
        "host": server.host,
        "port": server.port,
        "style": contender.style,
        "clients": clients,
        "health": "/health" if health else None,
    }
    before = server.cpu_seconds()
    with PeakMemory(server) as memory:
        result = load.run_apart(plan)
    result["cpu_s"] = server.cpu_seconds() - before
    result["memory"] = memory.peak
    return result


def percentile(values: list[float], share: float) -> float | None:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))] if ordered else None


def measure(result: dict, tokens: int, own: bool) -> dict:
    """The figures of one run: times in seconds, sizes in bytes. `own` if there is a process to
    look into."""
    good = [a for a in result["answers"] if a["complete"] and a["arrivals"] and a["status"] == 200]
    first = [a["arrivals"][0] - a["started"] for a in good]
    gaps = [later - sooner for a in good for sooner, later in zip(a["arrivals"], a["arrivals"][1:])]
    made = tokens * len(good)
    return {
        "tokens_per_s": made / result["wall_s"],
        "first_median": percentile(first, 0.5),
        "first_p95": percentile(first, 0.95),
        "between_median": percentile(gaps, 0.5),
        "between_p95": percentile(gaps, 0.95),
        "bytes_per_answer": statistics.median([a["bytes"] for a in good]) if good else None,
        "cpu_per_token": result["cpu_s"] / made if own and made else None,
        "peak_memory": result["memory"] if own else None,
        "health_median": percentile(result["health_s"], 0.5),
        "health_p95": percentile(result["health_s"], 0.95),
        "load_share": result["load_cpu_s"] / result["wall_s"],
        "failed": len(result["answers"]) - len(good),
    }


def measure_contender(
    contender: Contender, prompts: Prompts, settings: argparse.Namespace, figures: dict
) -> None:
    """One start of the contender: each kind of prompt and each number of clients once."""
    with serving(contender) as server:
        own = server.process is not None
        kinds = ("short", "long") if settings.long else ("short",)
        for kind in kinds:  # the first answer of a process is slower than any other
            run_load(server, contender, [[contender.body(*prompts.make(kind), 8)]], False)
        for kind in kinds:
            for clients in settings.clients:
                each = max(1, ANSWERS_ALONE // clients)
                asked = [
                    [contender.body(*prompts.make(kind), settings.tokens) for _ in range(each)]
                    for _ in range(clients)
                ]
                result = run_load(server, contender, asked, own)
                got = measure(result, settings.tokens, own)
                figures[contender.name, kind, clients].append(got)
                print(
                    f"  {contender.name}, {kind} prompt, {clients} clients: "
                    f"{got['tokens_per_s']:.0f} tokens/s, {got['failed']} failed",
                    flush=True,
                )
                for answer in result["answers"]:
                    if answer["error"] or answer["status"] != 200:
                        print(f"    {answer['status']} {answer['error']}")
                        break


def median_of(runs: list[dict]) -> dict:
    """Of each figure, the median over the repeats; None where there was none."""

    def middle(values: list) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    figures = {name: middle([run[name] for run in runs]) for name in runs[0]}
    figures["failed"] = sum(run["failed"] for run in runs)
    figures["load_share"] = max(run["load_share"] for run in runs)
    return figures


def machine() -> dict:
    return {
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "cores": psutil.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "processor": processor(),
    }


def processor() -> str:
    """Its name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def make_field(folder: Path, settings: argparse.Namespace) -> tuple[Path, list[Contender]]:
    """The weights in the published format, and who is compared. A large network is not given to
    the servers that would take hours: only to this one and the peers."""
    from bench import sizes, weights

    if settings.preset == "tiny":
        published, native = weights.make(folder)
        return published, contenders(published, native, settings.peer)
    published = sizes.make(settings.preset, folder / settings.preset)
    return published, [our_server(published, settings.quantize), *peers(settings.peer)]


def main(settings: argparse.Namespace) -> int:
    """Measures, prints and saves. Returns the exit status: 1 if this server failed an answer."""
    from bench import canned  # here, because torch takes seconds to import
    from chatglm.checkpoint.tokenizers import load_chatglm_tokenizer

    begun = time.monotonic()
    ceiling = canned.ceiling()
    print(f"The load by itself, with frames that are there already: {ceiling:,.0f} frames/s")
    figures = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        published, field = make_field(Path(settings.weights or folder), settings)
        prompts = Prompts(load_chatglm_tokenizer(published, "chatglm3"), settings.long)
        for repeat in range(settings.repeats):
            turn = repeat % len(field)  # another one begins each time: machines warm and slow down
            for contender in list(field[turn:] + field[:turn]):
                print(f"repeat {repeat + 1} of {settings.repeats}: {contender.name}", flush=True)
                try:
                    measure_contender(contender, prompts, settings, figures)
                except (RuntimeError, OSError, psutil.Error) as error:
                    print(f"left out: {error}")
                    field.remove(contender)
    medians = {key: median_of(runs) for key, runs in figures.items()}
    settled = {
        "tokens": settings.tokens,
        "repeats": settings.repeats,
        "long_prompt": settings.long,
        "weights": "the same weights"
        if settings.preset == "tiny"
        else f"random weights of {settings.preset}, here {settings.quantize or 'in float32'}",
        "load_ceiling": ceiling,
        "seconds": round(time.monotonic() - begun),
        **machine(),
    }
    parts = [settings.preset, settings.quantize] if settings.preset != "tiny" else ["compare"]
    report.save(settings.out, "-".join(filter(None, parts)), settled, medians, figures)
    slow = [key for key, got in medians.items() if got["load_share"] > LOAD_LIMIT]
    if slow:
        print(f"The load itself took over {LOAD_LIMIT:.0%} of a core in: {slow}")
    return int(any(got["failed"] for key, got in medians.items() if key[0] == OURS))
