"""How many threads torch uses on a CPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from transformers import PreTrainedModel

SMALL_MODEL_PARAMETERS = (
    20_000_000  # parameters; a smaller network gains little from more than two cores
)
LOOK_EVERY = 0.25  # seconds from one look at what other processes do to the next


@contextmanager
def single_threaded() -> Iterator[None]:
    """Keeps what is done here from starting threads of torch's, which would stay. Once those of
    several callers are more than the cores, OpenMP sends all of them to sleep after every
    operation, and to wake them takes longer than they work."""
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(cores)


class FreeCores:
    """How many cores other processes have left free, as of a moment ago."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._seen, self._free = self._look(), float(psutil.cpu_count())

    def _look(self) -> tuple[float, float]:
        """Seconds: the time, and what other processes have had of all cores."""
        everyone, own = psutil.cpu_times(), self._process.cpu_times()
        return time.monotonic(), everyone.user + everyone.system - own.user - own.system

    def __call__(self) -> float:
        if time.monotonic() - self._seen[0] > LOOK_EVERY:
            before, self._seen = self._seen, self._look()
            used = (self._seen[1] - before[1]) / (self._seen[0] - before[0])
            self._free = psutil.cpu_count() - used
        return self._free


def install_thread_policy(model: PreTrainedModel) -> None:
    """Lets a small network run on two cores while they are free, else on one, in whatever thread
    it is called. Where another program wants the second core, its half of every operation comes
    late, and a step takes several times as long as on one."""
    cores, free = min(2, torch.get_num_threads()), FreeCores()

    def choose(*_) -> None:
        torch.set_num_threads(cores if free() > cores - 0.75 else 1)

    if (
        model.device.type == "cpu"
        and model.num_parameters() < SMALL_MODEL_PARAMETERS
        and not hasattr(model, "chooses_threads")
    ):
        model.chooses_threads = model.register_forward_pre_hook(choose)
