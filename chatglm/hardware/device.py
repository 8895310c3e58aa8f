"""On which device a model runs, and in which precision."""

from __future__ import annotations

import psutil
import torch

GIB = 2**30
DEVICES = "auto, cuda, cuda:1, mps, cpu"


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be one of {DEVICES}, not {name!a}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device cuda: torch sees no NVIDIA GPU. Without one use --device cpu; "
            "with one, install a CUDA build of torch (see PyTorch's start page)"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name}: this machine has {torch.cuda.device_count()} GPU(s), counted from 0"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps: this machine or torch has no Apple GPU; use --device cpu")
    if device.type not in ("cuda", "mps", "cpu"):
        raise ValueError(f"device must be one of {DEVICES}, not {name!a}")
    return torch.device("cuda", 0) if device.type == "cuda" and device.index is None else device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name in dtypes:
        return dtypes[name]
    if name != "auto":
        raise ValueError(f"dtype must be one of auto, {', '.join(dtypes)}, not {name!a}")
    if device.type == "cuda":  # emulated bfloat16 does not count
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    return torch.float16 if device.type == "mps" else torch.float32


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = psutil.virtual_memory().available
    if device.type == "mps":
        limit = torch.mps.recommended_max_memory()
        return min(available, limit - torch.mps.driver_allocated_memory())
    return available
