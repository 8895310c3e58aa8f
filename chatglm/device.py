"""Where a model runs, in which precision, whether it fits, and what is left for its cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from transformers import ContinuousBatchingConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from chatglm.devices import check_shares, is_shared
from chatglm.quantize import needed_bytes

CPU_CACHE_SHARE = 0.4   # of the free host memory, the most that the key/value cache may take
CPU_BATCH_TOKENS = 512  # prompt tokens a step takes in: a long prompt must not hold up the others
SMALL = 20_000_000      # parameters; a smaller network gains little from more than two cores
LOOK_EVERY = 0.25       # seconds from one look at what other processes do to the next
PAGE = 32               # tokens in a page of the cache: prefixes are shared by whole pages
GIB = 2**30


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!a} is none of auto, cuda, cuda:1, mps, cpu") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch sees no NVIDIA GPU. Without one use --device cpu; "
                         "with one, install a CUDA build of torch (see PyTorch's start page)")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name}: this machine has {torch.cuda.device_count()} GPU(s), "
                         "counted from 0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps: this machine or torch has no Apple GPU; use --device cpu")
    if device.type not in ("cuda", "mps", "cpu"):
        raise ValueError(f"device {name!a} is none of auto, cuda, cuda:1, mps, cpu")
    return torch.device("cuda", 0) if device.type == "cuda" and device.index is None else device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name in dtypes:
        return dtypes[name]
    if name != "auto":
        raise ValueError(f"dtype {name!a} is none of auto, {', '.join(dtypes)}")
    if device.type == "cuda":       # emulated bfloat16 does not count
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    return torch.float16 if device.type == "mps" else torch.float32


def check_memory(model_class, config, device: torch.device, dtype: torch.dtype,
                 quantize: str | None = None, devices: int = 1) -> None:
    """Raises ValueError if the weights alone are more than the device has free."""
    with torch.device("meta"):      # shapes only, nothing is allocated
        skeleton = model_class(config)
    needed = needed_bytes(skeleton, quantize, dtype)
    if devices > 1:
        check_shares(skeleton, devices)
        shared = sum(p.numel() for name, p in skeleton.named_parameters()
                     if is_shared(skeleton, name)) * dtype.itemsize
        needed -= shared - shared // devices
    free = free_memory(device)
    if needed > free:
        name = quantize or str(dtype).removeprefix("torch.")
        raise ValueError(f"the weights take {needed / GIB:.1f} GiB in {name}, but {device} has "
                         f"{free / GIB:.1f} GiB free; close other programs, or choose a narrower "
                         "dtype, --quantize, another device or a smaller model")


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = psutil.virtual_memory().available
    if device.type == "mps":
        limit = torch.mps.recommended_max_memory()
        return min(available, limit - torch.mps.driver_allocated_memory())
    return available


@contextmanager
def one_core() -> Iterator[None]:
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


def use_threads(model: PreTrainedModel) -> None:
    """Lets a small network run on two cores while they are free, else on one, in whatever thread
    it is called. Where another program wants the second core, its half of every operation comes
    late, and a step takes several times as long as on one."""
    cores, free = min(2, torch.get_num_threads()), FreeCores()

    def choose(*_) -> None:
        torch.set_num_threads(cores if free() > cores - 0.75 else 1)
    if model.device.type == "cpu" and model.num_parameters() < SMALL and not hasattr(
            model, "chooses_threads"):
        model.chooses_threads = model.register_forward_pre_hook(choose)


def cache_config(model: PreTrainedModel, max_requests: int,
                 tokens_each: int) -> ContinuousBatchingConfig:
    """The key/value cache and the batch: as large as a GPU allows; in host memory, what
    `max_requests` of `tokens_each` tokens need."""
    settings = dict(max_requests_per_batch=max_requests, return_logprobs=True,
                    use_async_batching=False, max_memory_percent=0.8)
    if model.device.type == "cuda" and is_flash_attn_2_available():
        return ContinuousBatchingConfig(**settings)  # flash attention wants its own page size
    # auto_switch_to_flash would fetch a flash attention from the hub by itself.
    settings |= dict(page_size=PAGE, auto_switch_to_flash=False)
    if model.device.type == "cpu":
        config = model.config
        page_bytes = (2 * PAGE * config.num_key_value_heads * config.head_dim
                      * config.num_hidden_layers * model.dtype.itemsize)
        affordable = int(CPU_CACHE_SHARE * free_memory(model.device) / page_bytes)
        wanted = max_requests * (tokens_each // PAGE + 1)
        settings |= dict(num_blocks=max(2, min(wanted, affordable)),
                         max_batch_tokens=CPU_BATCH_TOKENS)
    return ContinuousBatchingConfig(**settings)
