"""Matrix products on a CPU, each by the fastest kernel that was found for its precision.

    HalfLinear   weights in float16, inputs and sums in float32: a float16 file loses nothing
    Int8Linear   weights in 8 bits with a scale for each row of the matrix; inputs in 8 bits
    Int4Linear   weights in 4 bits with a scale for each group of numbers; inputs in 8 bits

The first two use FBGEMM, which torch brings along on x86. The third uses onnxruntime, which also
has kernels for ARM. All of them lay out the weights anew for the processor, once.

Continuous batching puts the tokens of many conversations into one product, as its rows. Here each
row of the result depends on its own row of the input alone, to the last bit: every row has its
own scale, and its sums are made in the same order whatever the number of rows.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

ROWS_AT_ONCE = 256  # of a matrix that is made small: they stay in the processor's own cache
GROUPS = (128, 64, 32)  # numbers that share a scale at int4: as many as divide a row
THREADS = torch.get_num_threads()  # as torch chose; while a network is loaded it has only one
Weights = dict[str, Tensor]  # `weight`, and where there are scales `weight_scale`
Product = Callable[[Tensor], Tensor]  # float32 rows [M, in] -> [M, out]


class PackedLinear(nn.Module):
    """What torch.nn.Linear computes, from weights in a smaller form.

    Its parameters `weight` and `weight_scale` are places for what a file holds. `pack` hands that
    to the kernel, and the parameters go.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        for name, (shape, dtype) in self.stored(in_features, out_features).items():
            self.register_parameter(name, frozen(torch.empty(shape, dtype=dtype)))
        self.bias = frozen(torch.empty(out_features)) if bias else None
        self.kernel: Product | None = None  # without the bias

    @staticmethod
    def stored(in_features: int, out_features: int) -> dict[str, tuple[tuple, torch.dtype]]:
        """Name, shape and type of each tensor that holds the matrix."""
        raise NotImplementedError

    @classmethod
    def held_bytes(cls, in_features: int, out_features: int) -> int:
        """Memory that the kernel takes for the matrix."""
        stored = cls.stored(in_features, out_features).values()
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in stored)

    @staticmethod
    def shrink(matrix: Tensor) -> Weights:
        """A matrix [out, in] of any float type in the form of `stored`."""
        raise NotImplementedError

    @staticmethod
    def make_kernel(weights: Weights) -> Product:
        raise NotImplementedError

    def pack(self, weights: Weights) -> None:
        """Hands `weights` to the kernel; what stood for them here goes."""
        self.kernel = self.make_kernel(weights)
        for name in self.stored(0, 0):
            setattr(self, name, None)

    def hold(self, weights: Weights) -> None:
        """Keeps `weights` as they are, to be saved."""
        for name, tensor in weights.items():
            setattr(self, name, frozen(tensor))

    def product(self, rows: Tensor) -> Tensor:
        """[M, in] -> [M, out], both float32."""
        assert self.kernel is not None, "pack comes first"
        out = self.kernel(rows)
        return out if self.bias is None else out.add_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x.flatten(0, -2).float()).unflatten(0, x.shape[:-1])

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class HalfLinear(PackedLinear):
    @staticmethod
    def stored(in_features, out_features):
        return {"weight": ((out_features, in_features), torch.float16)}

    @staticmethod
    def shrink(matrix):
        return {"weight": matrix.half()}

    @staticmethod
    def make_kernel(weights):
        packed = torch.ops.quantized.linear_prepack_fp16(weights["weight"].float(), None)
        return lambda rows: torch.ops.quantized.linear_dynamic_fp16(rows, packed)


class Int8Linear(PackedLinear):
    @staticmethod
    def stored(in_features, out_features):
        return {
            "weight": ((out_features, in_features), torch.int8),
            "weight_scale": ((out_features,), torch.float32),
        }

    @staticmethod
    def shrink(matrix):
        """The largest number of each row becomes 127 or -127."""
        weight, scale = torch.empty(matrix.shape, dtype=torch.int8), torch.empty(len(matrix))
        for rows in row_slices(len(matrix)):
            part = matrix[rows].to(torch.float32, copy=True)
            scale[rows] = part.abs().amax(1).div_(127).clamp_(min=torch.finfo().tiny)
            weight[rows] = part.div_(scale[rows, None]).round_()
        return {"weight": weight, "weight_scale": scale}

    @staticmethod
    def make_kernel(weights):
        if not has_fbgemm():
            return weight_only_int8(weights)
        packed, levels = fbgemm_int8(**weights), input_levels()
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32

        def kernel(rows: Tensor) -> Tensor:
            # The operator takes one scale for all rows, so each is brought to [-1, 1] before.
            # A NaN or infinity in a row passes through `largest` into all of that row's result.
            largest = rows.abs().amax(1, keepdim=True).clamp_(min=torch.finfo().tiny)
            return multiply(rows / largest, 1 / levels, levels + 1, packed).mul_(largest)

        return kernel


class Int4Linear(PackedLinear):
    @staticmethod
    def stored(in_features, out_features):
        return {
            "weight": ((out_features, in_features // 2), torch.uint8),
            "weight_scale": ((out_features, in_features // group_size(in_features)), torch.float32),
        }

    @classmethod
    def held_bytes(cls, in_features, out_features):
        """onnxruntime's kernel keeps two numbers more for each scale."""
        scales = out_features * in_features // group_size(in_features)
        return super().held_bytes(in_features, out_features) + 8 * scales

    @staticmethod
    def shrink(matrix):
        """The largest number of each group becomes -8, as in llama.cpp's Q4_0: so all 16 levels
        count. 8 is added to make them positive; the even columns are in the lower half bytes."""
        shapes = Int4Linear.stored(matrix.shape[1], matrix.shape[0])
        weight, scale = (torch.empty(shape, dtype=dtype) for shape, dtype in shapes.values())
        for rows in row_slices(len(matrix)):
            groups = matrix[rows].to(torch.float32, copy=True).unflatten(1, (scale.shape[1], -1))
            at = groups.abs().argmax(-1, keepdim=True)
            scale[rows] = groups.gather(-1, at).squeeze(-1).div_(-8)
            inverse = (1 / scale[rows]).nan_to_num_(posinf=0, neginf=0)
            levels = groups.mul_(inverse[..., None]).add_(8.5).clamp_(0, 15).byte().flatten(1)
            weight[rows] = levels[:, ::2] | (levels[:, 1::2] << 4)
        return {"weight": weight, "weight_scale": scale}

    @staticmethod
    def make_kernel(weights):
        from chatglm.hardware.onnx_int4 import int4_kernel

        return int4_kernel(weights["weight"], weights["weight_scale"])


KINDS: dict[str, type[PackedLinear]] = {
    "float16": HalfLinear,
    "int8": Int8Linear,
    "int4": Int4Linear,
}


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def group_size(in_features: int) -> int:
    """Raises ValueError for rows that no group divides."""
    for size in GROUPS:
        if in_features % size == 0:
            return size
    raise ValueError(
        f"int4 needs rows of a multiple of {GROUPS[-1]} numbers, not {in_features}; use int8"
    )


def row_slices(count: int) -> Iterator[slice]:
    for begin in range(0, count, ROWS_AT_ONCE):
        yield slice(begin, begin + ROWS_AT_ONCE)


def has_fbgemm() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines


def fbgemm_int8(weight: Tensor, weight_scale: Tensor) -> Any:
    """The matrix as FBGEMM's int8 kernel wants it."""
    with warnings.catch_warnings():  # this type of tensor is to leave torch; its version is pinned
        warnings.simplefilter("ignore", UserWarning)
        quantized = torch._make_per_channel_quantized_tensor(
            weight, weight_scale.double(), torch.zeros(len(weight), dtype=torch.long), 0
        )
    return torch.ops.quantized.linear_prepack(quantized, None)


@functools.cache
def input_levels() -> int:
    """To how many steps on each side of 0 an input is rounded: 127, or 63 where the processor
    needs it. Without VNNI it adds two products of bytes in 16 bits, which hold the sum of
    2 x 255 x 127 only as 32767. So the kernel is asked for just that sum."""
    ones = {"weight": torch.full((16, 64), 127, dtype=torch.int8), "weight_scale": torch.ones(16)}
    packed = fbgemm_int8(**ones)
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    return 127 if multiply(torch.ones(1, 64), 1 / 127, 128, packed)[0, 0] == 64 * 127 else 63


def weight_only_int8(weights: Weights) -> Product:
    """Where there is no FBGEMM: torch's kernel for ARM, which leaves the inputs as they are."""
    weight, scale = weights["weight"], weights["weight_scale"]
    return lambda rows: torch.ops.aten._weight_int8pack_mm(rows, weight, scale)


def is_half(weight: Tensor) -> bool:
    """Whether HalfLinear computes the same as torch.nn.Linear with this matrix."""
    is_float = weight.dtype == torch.float32
    return is_float and has_fbgemm() and torch.equal(weight.half().float(), weight)


def use_half_weights(model: nn.Module) -> None:
    """Puts a HalfLinear in place of each float32 torch.nn.Linear that it computes the same as."""
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and is_half(layer.weight):
            with torch.device("meta"):  # nothing is allocated
                half = HalfLinear(layer.in_features, layer.out_features, bias=False)
            half.bias = layer.bias
            half.pack(HalfLinear.shrink(layer.weight.data))
            model.set_submodule(name, half)


def joined_product(*layers: nn.Module) -> Product:
    """One product with the matrices of all `layers`, one below the other, torch.nn.Linear's or
    small ones. A float32 matrix whose numbers are all float16 numbers, as the published ones are,
    is packed as such: 4 to 64 rows then take less time for each than one."""
    products = [layer.product for layer in layers if isinstance(layer, PackedLinear)]
    if len(products) == 1:
        return products[0]
    if products:
        return lambda rows: torch.cat([product(rows) for product in products], dim=-1)
    weight = join_rows([layer.weight for layer in layers])
    bias = join_rows([layer.bias for layer in layers])
    if not is_half(weight):
        return lambda rows: linear(rows, weight, bias)
    kernel = HalfLinear.make_kernel({"weight": weight})
    return kernel if bias is None else lambda rows: kernel(rows).add_(bias)


def join_rows(parts: list[Any]) -> Any:
    """The matrices one below the other, as the published files have them, or None where there are
    none. The parts become views of the same memory."""
    present = [part for part in parts if part is not None]
    if len(present) < 2:
        return present[0].data if present else None
    joined = torch.cat([part.data for part in present])
    for part, rows in zip(present, joined.split([len(part) for part in present]), strict=True):
        part.data = rows
    return joined


def count_numbers(model: nn.Module) -> int:
    """Of all matrices, in whatever form they are."""
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    held = sum(parameter.numel() for parameter in model.parameters())
    return held + sum(module.in_features * module.out_features for module in packed)
