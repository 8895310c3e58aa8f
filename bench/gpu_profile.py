"""Ten decode steps: what the host does, the dearest operations, and the time between kernels."""

import argparse
import asyncio
import faulthandler
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import aclosing

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import chatglm
from bench import decode
from bench.gpu_checks import manager_of
from bench.gpu_speed import build
from chatglm.hardware.device import pick_device

STEPS = 10
DEAREST = 10  # operations that are listed
PATIENCE = 40  # seconds for the steps to come
ENDLESS = 1000  # tokens of an answer, more than are waited for


class StepWatch:
    """Stands around the library's step, in the model thread: times the parts of ten steps, then
    profiles ten others from the beginning of one to the beginning of another."""

    def __init__(self, engine: chatglm.Engine) -> None:
        self.parts: dict[str, float] = defaultdict(float)  # seconds in all
        self.profile = profile(activities=activities(engine.model.device), acc_events=True)
        self.armed, self.done, self.steps = False, threading.Event(), 0
        manager = manager_of(engine)
        batch = manager.batch_processor
        self._step = manager._generation_step
        manager._generation_step = self.step
        for part, owner, name in (
            ("prepare", batch, "prepare_next_batch"),
            ("launch", batch.model_runner, "compute_batch"),
            ("wait", batch.inputs_and_outputs, "retrieve_device_outputs"),
            ("update", batch, "update_batch"),
        ):
            setattr(owner, name, self.timed(part, getattr(owner, name)))

    def timed(self, part: str, method: Callable) -> Callable:
        def call(*args, **kwargs):
            begun = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                if self.armed and self.steps <= STEPS:
                    self.parts[part] += time.perf_counter() - begun

        return call

    def step(self) -> None:
        self.steps += self.armed
        if self.steps == STEPS + 1:
            self.profile.start()
        elif self.steps == 2 * STEPS + 1:
            self.profile.stop()
            self.armed = False
            self.done.set()
        self._step()


def activities(device: torch.device) -> list[ProfilerActivity]:
    cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    return [ProfilerActivity.CPU, *cuda]


async def watch_steps(engine: chatglm.Engine, batch: int) -> StepWatch:
    """Lets so many requests decode, all of them, while the steps are watched."""
    watch = StepWatch(engine)
    params = chatglm.SamplingParams(
        temperature=0, max_length=engine.max_request_tokens, max_new_tokens=ENDLESS
    )
    started = [asyncio.Event() for _ in range(batch)]

    async def read(number: int) -> None:
        question = [{"role": "user", "content": f"{number} " + "hello " * decode.PROMPT}]
        async with aclosing(await engine.submit(engine.prepare(question, params))) as chunks:
            async for _ in chunks:
                started[number].set()

    readers = [asyncio.create_task(read(number)) for number in range(batch)]
    await asyncio.gather(*(each.wait() for each in started))
    watch.armed = True
    if not await asyncio.to_thread(watch.done.wait, PATIENCE):
        faulthandler.dump_traceback(all_threads=True)
        ended = [reader for reader in readers if reader.done()]
        raise TimeoutError(f"{watch.steps} of {2 * STEPS} steps in {PATIENCE} s; ended: {ended}")
    for reader in readers:
        reader.cancel()
    await asyncio.wait(readers)
    return watch


def measure_profile(figures, settings: argparse.Namespace) -> None:
    device = pick_device(settings.device)
    tokenizer, model = build(settings)
    with profile(
        activities=activities(device), acc_events=True
    ):  # the first takes seconds, and this thread
        torch.ones(1, device=device).add_(1)
    for batch in settings.size.profiled:
        with chatglm.Engine(tokenizer, model, batch, batch) as engine:
            watch = asyncio.run(watch_steps(engine, batch))
        parts = {f"{part}, ms": 1000 * spent / STEPS for part, spent in watch.parts.items()}
        figures.add("parts of a step on the host", batch=batch, **parts)
        events = [event for event in watch.profile.events() if is_work(event, device)]
        figures.add("between kernels", batch=batch, **gaps(events))
        for row in dearest(events):
            figures.add("dearest operations", batch=batch, **row)


def is_work(event, device: torch.device) -> bool:
    """Whether it is a kernel or a copy; without a GPU, whether it is an operation of torch's."""
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    return event.device_type == kind


def own_ms(event) -> float:
    if event.device_type == DeviceType.CPU:
        return event.self_cpu_time_total / 1000
    return event.time_range.elapsed_us() / 1000


def gaps(events: list) -> dict:
    """Milliseconds of a step in which something runs, and in which nothing does."""
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    begin, reached, busy = spans[0][0], spans[0][0], 0
    for start, end in spans:
        busy += max(0, end - max(start, reached))
        reached = max(reached, end)
    whole = reached - begin
    return {
        "kernels": len(events) / STEPS,
        "ms/step": whole / 1000 / STEPS,
        "busy ms": busy / 1000 / STEPS,
        "between ms": (whole - busy) / 1000 / STEPS,
        "busy share": busy / whole,
    }


def dearest(events: list) -> list[dict]:
    """The operations that take most of a step, with how often each is called in it."""
    spent: dict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    for event in events:
        spent[event.name] += own_ms(event)
        calls[event.name] += 1
    whole = sum(spent.values())
    return [
        {
            "operation": name[:100],
            "calls": calls[name] / STEPS,
            "ms/step": ms / STEPS,
            "share": ms / whole,
        }
        for name, ms in sorted(spent.items(), key=lambda item: -item[1])[:DEAREST]
    ]
