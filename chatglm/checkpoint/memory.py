"""Whether a checkpoint fits: the bytes that its weights need, and those that a device has free."""

from __future__ import annotations

import math

import torch

from chatglm.checkpoint.quantize import BLOCK, SCALES
from chatglm.hardware.device import GIB, free_memory
from chatglm.hardware.tensor_parallel import check_divisible, is_sharded


def check_memory(
    model_class,
    config,
    device: torch.device,
    dtype: torch.dtype,
    quantize: str | None = None,
    devices: int = 1,
) -> None:
    """Raises ValueError if the weights alone are more than the device has free."""
    with torch.device("meta"):  # shapes only, nothing is allocated
        skeleton = model_class(config)
    needed = needed_bytes(skeleton, quantize, dtype)
    if devices > 1:
        check_divisible(skeleton, devices)
        shared = (
            sum(p.numel() for name, p in skeleton.named_parameters() if is_sharded(skeleton, name))
            * dtype.itemsize
        )
        needed -= shared - shared // devices
    free = free_memory(device)
    if needed > free:
        name = quantize or str(dtype).removeprefix("torch.")
        raise ValueError(
            f"the weights take {needed / GIB:.1f} GiB in {name}, but {device} has "
            f"{free / GIB:.1f} GiB free; close other programs, or choose a narrower "
            "dtype, --quantize, another device or a smaller model"
        )


def needed_bytes(skeleton, kind: str | None, dtype: torch.dtype) -> int:
    """Memory for the weights of a network of which only the shapes are there. Raises ValueError if
    its rows cannot be cut into blocks."""
    needed = sum(p.numel() for p in skeleton.parameters()) * dtype.itemsize
    if kind is None:
        return needed
    for name, module in skeleton.named_modules():
        if type(module) is torch.nn.Linear and module is not skeleton.get_output_embeddings():
            if kind == "int4" and module.in_features % BLOCK:  # it would fail at the first token
                raise ValueError(
                    f"int4 needs rows of a multiple of {BLOCK} numbers, and those of "
                    f"{name} have {module.in_features}; use int8"
                )
            count = module.weight.numel()
            blocks = math.ceil(count / BLOCK)
            needed -= count * dtype.itemsize
            needed += (
                count + 4 * module.out_features
                if kind == "int8"
                else math.ceil(count / 2) + blocks + 4 * math.ceil(blocks / SCALES)
            )
    return needed
