"""Whether a checkpoint fits: the bytes that its weights need, and those that a device has free."""

from __future__ import annotations

import math
from contextlib import suppress

import torch

from chatglm.checkpoint.cpu_quantizer import replace_matrices
from chatglm.checkpoint.fields import blaming
from chatglm.checkpoint.quantize import BLOCK, KINDS, SCALES
from chatglm.hardware.cpu_linear import PackedLinear
from chatglm.hardware.device import GIB, free_memory
from chatglm.hardware.tensor_parallel import check_divisible, is_sharded

# Published models have 80 layers at most, and contexts of 2**20 tokens.
LARGEST = {"num_hidden_layers": 1000, "max_position_embeddings": 2**24}
STORED = torch.float16  # of the embedding, which a CPU keeps as the file has it


def check_memory(
    model_class,
    config,
    device: torch.device,
    dtype: torch.dtype,
    quantize: str | None = None,
    devices: int = 1,
) -> None:
    """Raises ValueError if the weights alone are more than the device has free, with the choices
    that fit."""

    check_sizes(config)

    def needed(kind: str | None, dtype: torch.dtype) -> int:
        # On "meta" there are shapes only, and nothing is allocated.
        with blaming("no network has the sizes in config.json"), torch.device("meta"):
            skeleton = model_class(config)
        if devices == 1:
            return needed_bytes(skeleton, kind, dtype, device)
        check_divisible(skeleton, devices)
        shared = (
            sum(p.numel() for name, p in skeleton.named_parameters() if is_sharded(skeleton, name))
            * dtype.itemsize
        )
        return needed_bytes(skeleton, kind, dtype, device) - shared + shared // devices

    free = free_memory(device)
    if (wanted := needed(quantize, dtype)) <= free:
        return
    choices: dict[str, tuple[str | None, torch.dtype]]
    choices = {"--dtype bfloat16": (None, torch.bfloat16)}
    choices |= {f"--quantize {kind}": (kind, dtype) for kind in KINDS if device.type != "mps"}
    fitting = []
    for name, choice in choices.items():
        with suppress(ValueError):  # rows that this kind cannot hold
            if devices == 1 and (size := needed(*choice)) <= free:
                fitting.append(f"{name} ({size / GIB:.1f} GiB)")
    advice = f"it fits with {' or '.join(fitting)}" if fitting else "choose a smaller model"
    raise ValueError(
        f"the weights take {wanted / GIB:.1f} GiB in {quantize or str(dtype)[6:]}, but {device} "
        f"has {free / GIB:.1f} GiB free; close other programs, or {advice}"
    )


def check_sizes(config) -> None:
    """Raises ValueError for sizes with which even a network of shapes alone would take for ever."""
    for field, largest in LARGEST.items():
        value = getattr(config, field, None)
        if type(value) is int and not 0 < value <= largest:
            raise ValueError(f"config.json: {field} is {value}; it must be from 1 to {largest}")


def needed_bytes(
    skeleton, kind: str | None, dtype: torch.dtype, device: torch.device | None = None
) -> int:
    """Memory for the weights of a network of which only the shapes are there. Raises ValueError if
    its rows cannot be cut into blocks."""
    if kind is None:
        return sum(p.numel() for p in skeleton.parameters()) * dtype.itemsize
    if device is not None and device.type == "cpu":
        return needed_on_cpu(skeleton, kind)
    needed = sum(p.numel() for p in skeleton.parameters()) * dtype.itemsize
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


def needed_on_cpu(skeleton, kind: str) -> int:
    replace_matrices(skeleton, kind)
    packed = [module for module in skeleton.modules() if isinstance(module, PackedLinear)]
    matrices = {id(module.weight) for module in packed} | {
        id(module.weight_scale) for module in packed
    }
    others = sum(p.nbytes for p in skeleton.parameters() if id(p) not in matrices)
    embedding = skeleton.get_input_embeddings().weight
    others += embedding.numel() * STORED.itemsize - embedding.nbytes
    return others + sum(
        module.held_bytes(module.in_features, module.out_features) for module in packed
    )
