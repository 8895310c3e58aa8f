"""The tensors of a checkpoint under their published names, each read when it is wanted.

What has to happen to them before the network sees them happens here, one tensor at a time:
published int4 and int8 weights are unpacked, and an adapter's changes are added (lora.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from transformers.modeling_utils import load_state_dict

from chatglm.checkpoint.fields import reason
from chatglm.checkpoint.files import how_to_get


class Readable(Protocol):
    """As transformers' loading needs a tensor: a slice of a safetensors file, or one of these."""

    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...
    def __getitem__(self, index: Any) -> torch.Tensor: ...


class Computed:
    """A float32 tensor that is made when it is read. Nothing is kept of it here."""

    def __init__(self, shape: list[int], compute: Callable[[], torch.Tensor]) -> None:
        self._shape, self._compute = shape, compute

    def get_shape(self) -> list[int]:
        return self._shape

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._compute()[index]


Tensors = dict[str, "torch.Tensor | Readable"]


def shape_of(tensor: torch.Tensor | Readable) -> list[int]:
    return list(tensor.shape) if isinstance(tensor, torch.Tensor) else list(tensor.get_shape())


def stored_dtype(tensors: Tensors) -> torch.dtype:
    """The type that all tensors have, if it is one half precision, else float32."""
    types = {
        str(tensor.dtype if isinstance(tensor, torch.Tensor) else tensor.get_dtype())
        for tensor in tensors.values()
    }
    if types <= {"F16", "torch.float16"}:
        return torch.float16
    return torch.bfloat16 if types <= {"BF16", "torch.bfloat16"} else torch.float32


def open_tensors(files: list[Path]) -> Tensors:
    """Name -> tensor, of all files; only their headers are read. Raises ValueError for a file that
    holds anything but tensors, and for tensors without content."""
    tensors: Tensors = {}
    for file in files:
        tensors |= open_bin(file) if file.suffix == ".bin" else open_safetensors(file)
    empty = [name for name, tensor in tensors.items() if math.prod(shape_of(tensor)) == 0]
    if empty:
        raise ValueError(
            f"{files[0].parent}: {len(empty)} tensors are empty, such as {empty[0]}: it was saved "
            "under DeepSpeed's ZeRO-3 without gathering the weights; gather them with the "
            "zero_to_fp32.py that lies beside such a checkpoint"
        )
    return tensors


def open_safetensors(file: Path) -> Tensors:
    # By position: through a memory map, the whole file counts as this process's memory in the end.
    try:
        opened = safe_open(file, framework="pt", backend="pread")
        return {name: opened.get_slice(name) for name in opened.keys()}
    except SafetensorError as error:
        advice = how_to_get(file)
        raise ValueError(f"{file} is damaged ({reason(error)}); {advice}") from error


def open_bin(file: Path) -> Tensors:
    """Tensors of torch.save, read by torch's weights_only loader, which runs no code."""
    try:
        tensors = load_state_dict(file)  # mapped, but for files of before PyTorch 1.6
    except UnpicklingError as error:
        raise ValueError(
            f"{file} holds more than tensors, perhaps code, and is not read; use the "
            "model's safetensors files"
        ) from error
    except Exception as error:  # the loader follows a stranger's instructions into anything
        raise ValueError(f"{file} is cut off or damaged; {how_to_get(file)}") from error
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise ValueError(f"{file} is not a checkpoint: it must hold tensors by name, nothing else")
    return dict(tensors)


def unpack(tensors: Tensors, bits: int) -> Tensors:
    """The same with full matrices in place of packed ones, as the published int4 and int8
    checkpoints have them: `X.weight` as integers and `X.weight_scale`, a number for each row."""
    packed = [name for name in tensors if f"{name}_scale" in tensors]
    replaced = {*packed, *(f"{name}_scale" for name in packed)}
    full = {name: tensor for name, tensor in tensors.items() if name not in replaced}
    for name in packed:
        if len(shape_of(tensors[name])) != 2:
            raise ValueError(f"{name} has {bits} bits and a scale, but is no matrix")
        full[name] = unpacked(tensors[name], tensors[f"{name}_scale"], bits)
    return full


def unpacked(
    weight: torch.Tensor | Readable, scale: torch.Tensor | Readable, bits: int
) -> Computed:
    rows, width = shape_of(weight)
    return Computed([rows, width * 8 // bits], lambda: unpack_rows(weight[...], scale[...], bits))


def unpack_rows(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers [rows, columns] of int8 [rows, columns] or, at 4 bits, [rows, columns / 2].

    A byte has the even column in its high half and the odd one in its low half, both signed.

    >>> unpack_rows(torch.tensor([[-11]], dtype=torch.int8), torch.tensor([0.5]), bits=4)
    tensor([[-0.5000,  2.5000]])
    """
    if bits == 8:
        full = weight.float()
    else:
        full = torch.empty(len(weight), 2 * weight.shape[1])
        full[:, ::2] = weight >> 4  # which keeps the sign of a signed byte
        full[:, 1::2] = (weight << 4) >> 4
    return full.mul_(scale.float()[:, None])
