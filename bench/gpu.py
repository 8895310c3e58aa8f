"""Everything that is to be measured on a GPU, by one command that needs nobody.

    python -m bench gpu --out FOLDER                                  # the size of ChatGLM3-6B
    python -m bench gpu --preset tiny --device cpu --out FOLDER       # the rehearsal

The steps are in STEPS below, the most valuable first. Each has a process of its own and a limit of
its own: one that fails, hangs or breaks the device is recorded, and the next goes on.
FOLDER/gpu.json and FOLDER/gpu.md are written anew with every figure, so what came before a cut is
kept. gpu.md beside this file is the recipe for a machine without a network.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import gpu_checks, gpu_profile, gpu_speed, gpu_trial
from bench.compare import machine
from bench.report import table

# A forked process has torch and transformers already: importing them takes seconds, seven times.
# The first process never touches CUDA, which does not survive a fork.
START: Any = multiprocessing.get_context(
    "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
)
GOALS = {  # figure -> at least
    "share of the bandwidth limit at batch 1": 0.7,
    "tokens/s for 64 clients": 8000,
}


@dataclass(frozen=True)
class Size:
    """How much is measured with a preset."""

    batches: dict[int, int]  # size of a batch: tokens of each answer
    crowd: int  # conversations at once, and as many others that are left in the middle
    prompt: int  # tokens of the prompt whose prefill is timed
    clients: list[int]
    tokens: int  # of an answer over HTTP
    held_out: int  # questions that the bundled model is asked
    profiled: list[int]  # sizes of a batch


SIZES = {
    "chatglm3-6b": Size(
        {1: 128, 8: 128, 64: 96, 256: 64}, 16, 1000, [1, 16, 64], 128, 10**6, [1, 64]
    ),
    "tiny": Size({1: 8, 4: 8}, 4, 100, [1, 2], 8, 8, [1, 4]),
}


@dataclass(frozen=True)
class Step:
    """One step, and the seconds after which it is cut."""

    title: str
    run: Callable
    limit: float


STEPS = {
    "machine": Step("The machine", gpu_speed.measure_machine, 30),
    "golden": Step("Golden checkpoints", gpu_checks.check_golden, 75),
    "crowd": Step("A crowd that comes and goes", gpu_checks.check_crowd, 60),
    "full size": Step("The full size, random weights", gpu_speed.measure_full_size, 120),
    "HTTP": Step("Over HTTP", gpu_speed.measure_http, 120),
    "quantised": Step("int8 and int4", gpu_speed.measure_quantised, 100),
    "profile": Step("Ten decode steps", gpu_profile.measure_profile, 60),
    "trial": Step("A trial: block tables and CUDA graphs", gpu_trial.measure_trial, 110),
}


@dataclass
class StepRecord:
    """What one step has found so far: tables of rows, each row a figure by its name."""

    title: str
    state: str = "running"
    seconds: float = 0.0
    error: str = ""
    tables: dict[str, list[dict]] = field(default_factory=dict)


@dataclass
class Record:
    """All steps so far, in a folder as JSON and as Markdown."""

    folder: Path
    about: dict
    steps: dict[str, StepRecord] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "Record":
        content = json.loads((folder / "gpu.json").read_text("utf-8"))
        steps = {name: StepRecord(**step) for name, step in content["steps"].items()}
        return cls(folder, content["about"], steps)

    def save(self) -> None:
        steps = {name: asdict(step) for name, step in self.steps.items()}
        content = {"about": self.about, "goals": self.goals(), "steps": steps}
        replace(self.folder / "gpu.json", json.dumps(content, indent=1) + "\n")
        replace(self.folder / "gpu.md", self.markdown())

    def goals(self) -> dict[str, float | None]:
        """What was reached of each figure that has a goal; None: not measured."""
        decode = self.rows("full size", "decode")
        clients = self.rows("HTTP", "clients")
        found = [
            [row["share"] for row in decode if row["batch"] == 1],
            [row["tokens/s"] for row in clients if (row["server"], row["clients"]) == ("ours", 64)],
        ]
        return {goal: values[0] if values else None for goal, values in zip(GOALS, found)}

    def rows(self, step: str, name: str) -> list[dict]:
        return self.steps[step].tables.get(name, []) if step in self.steps else []

    def markdown(self) -> str:
        text = [f"# One run of `python -m bench gpu`\n\n{lines(self.about)}", "## Goals"]
        for goal, found in self.goals().items():
            told = "not measured" if found is None else shown(found)
            text.append(f"{goal}: {told}, at least {shown(GOALS[goal])} is wanted")
        for step in self.steps.values():
            text.append(f"## {step.title}\n\n{step.state}, {step.seconds:.0f} s")
            text += [f"{name}:\n\n{rows_table(rows)}" for name, rows in step.tables.items()]
            if step.error:
                text.append(f"```\n{step.error}\n```")
        return "\n\n".join(text) + "\n"


class Figures:
    """What a step writes to. Each row is on the disk before the next is measured."""

    def __init__(self, record: Record, name: str) -> None:
        self.record, self.name, self.begun = record, name, time.monotonic()

    def add(self, table: str, **row) -> None:
        step = self.record.steps[self.name]
        step.tables.setdefault(table, []).append(row)
        step.seconds = time.monotonic() - self.begun
        self.record.save()
        told = ", ".join(f"{key} {shown(value)}" for key, value in row.items())
        print(f"  {table}: {told}", flush=True)


def replace(file: Path, text: str) -> None:
    """Writes the file so that there is always a whole one, the old or the new."""
    beside = file.with_suffix(file.suffix + ".new")
    beside.write_text(text, "utf-8")
    os.replace(beside, file)


def shown(value) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "–" if value is None else str(value)


def lines(about: dict) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in about.items())


def rows_table(rows: list[dict]) -> str:
    head = list(dict.fromkeys(name for row in rows for name in row))
    return table(head, [[shown(row.get(name)) for name in head] for row in rows])


def carry_out(name: str, settings: argparse.Namespace) -> None:
    """In a process of its own: runs the step, and leaves its figures or its traceback."""
    os.setpgid(0, 0)  # a step starts processes itself; at its limit all of them end together
    record = Record.read(settings.out)
    step = record.steps[name]
    try:
        STEPS[name].run(Figures(record, name), settings)
        step.state = "done"
    except Exception:
        step.state, step.error = "failed", traceback.format_exc()
        print(step.error, file=sys.stderr, flush=True)
    record.save()


def run_step(name: str, settings: argparse.Namespace, limit: float) -> str:
    """Starts the step's process, ends it at its limit, and returns how it ended."""
    begun = time.monotonic()
    process = START.Process(target=carry_out, args=(name, settings))
    process.start()
    try:
        process.join(limit)
    finally:
        cut = process.is_alive()
        if cut:
            end(process)
    record = Record.read(settings.out)
    step = record.steps[name]
    step.seconds = time.monotonic() - begun
    if cut:
        step.state = f"cut after {limit:.0f} s"
    elif process.exitcode:
        step.state = f"failed: its process ended with {process.exitcode}"
    record.save()
    return step.state


def end(process: Any) -> None:
    """Kills the step with all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has not come as far as to its own group
        process.kill()
    process.join()


def main(settings: argparse.Namespace) -> int:
    """Returns the exit status: 1 if a step was not done."""
    settings.size = SIZES[settings.preset]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the step's process ends as well
    settings.out.mkdir(parents=True, exist_ok=True)
    about = {"preset": settings.preset, "device": settings.device, **machine()}
    Record(settings.out, about).save()
    end, states = time.monotonic() + 60 * settings.minutes, []
    for name, step in STEPS.items():
        print(f"{name}: {step.title}", flush=True)
        limit = min(step.limit, end - time.monotonic())
        record = Record.read(settings.out)
        record.steps[name] = StepRecord(step.title, "running" if limit > 0 else "no time was left")
        record.save()
        if limit > 0:
            record.steps[name].state = run_step(name, settings, limit)
        states.append(record.steps[name].state)
        print(f"{name}: {states[-1]}", flush=True)
    print(f"saved in {settings.out}")
    return int(any(state != "done" for state in states))
