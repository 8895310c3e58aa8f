"""How many threads torch uses on a CPU, and who comes first."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from chatglm.hardware.cpu_linear import count_numbers

SMALL_MODEL_PARAMETERS = 20_000_000  # a smaller network gains little from more than two cores
NICENESS = 4  # of the model's thread, beside the event loop's
LOOK_EVERY = 0.25  # seconds between two looks at what other processes use


@contextmanager
def single_threaded() -> Iterator[None]:
    """Runs the block single-threaded, so that torch creates no worker threads here.

    They would never exit. Once the worker threads of several callers are more than the cores,
    OpenMP puts all of them to sleep after every operation, and waking them takes longer than the
    operation.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class FreeCores:
    """How many cores other processes leave free. The answer is at most LOOK_EVERY old."""

    def __init__(self) -> None:
        self._process, self._cores = psutil.Process(), psutil.cpu_count() or 1
        self._seen, self._free = self._look(), float(self._cores)

    def _look(self) -> tuple[float, float]:
        """Seconds: the time, and the CPU time that other processes have used."""
        everyone, own = psutil.cpu_times(), self._process.cpu_times()
        # Systems count programs of a low priority apart, and what a virtual machine does not get.
        used = sum(getattr(everyone, kind, 0.0) for kind in ("user", "system", "nice", "steal"))
        return time.monotonic(), used - own.user - own.system

    def __call__(self) -> float:
        if time.monotonic() - self._seen[0] > LOOK_EVERY:
            before, self._seen = self._seen, self._look()
            used = (self._seen[1] - before[1]) / (self._seen[0] - before[0])
            self._free = self._cores - used
        return self._free


def give_way() -> None:
    """Lets the event loop run before this thread, and before the worker threads that it starts from
    now on, where both want a core. Only Linux knows priorities of threads."""
    if sys.platform == "linux" and threading.current_thread() is not threading.main_thread():
        niceness = os.getpriority(os.PRIO_PROCESS, os.getpid()) + NICENESS
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(19, niceness))


def install_thread_policy(model: PreTrainedModel) -> RemovableHandle | None:
    """On a CPU, the thread that runs the model gives way to the event loop, and a small network
    uses two threads while two cores are free, else one.

    If another program wants the second core, its half of every operation comes late, and a step
    takes several times as long as with one thread. Returns what removes the policy, or None where
    there is none.
    """
    if model.device.type != "cpu":
        return None
    is_small = count_numbers(model) < SMALL_MODEL_PARAMETERS
    most, free_cores = min(2, torch.get_num_threads()), FreeCores()

    def before_step(*_) -> None:
        give_way()
        if is_small:
            torch.set_num_threads(most if free_cores() > most - 0.75 else 1)

    return model.register_forward_pre_hook(before_step)
