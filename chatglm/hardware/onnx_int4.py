"""Products with 4-bit matrices on a CPU, by onnxruntime's operator MatMulNBits.

It has kernels for AVX2, AVX-512 and ARM; the one that comes with torch takes five times as long on
AVX2. onnxruntime has its own pool of threads, which all matrices share.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import onnxruntime
import torch
from onnx import ModelProto, TensorProto, helper
from torch import Tensor
from torch.nn.functional import pad

from chatglm.hardware.cpu_linear import THREADS

INT8_INPUTS = 4  # an accuracy level of the operator: each group of inputs has 8 bits and a scale
PROVIDERS = ["CPUExecutionProvider"]

# All sessions share these threads; without, each would have its own. It must be said once, before
# the first session. Here, and not in a function: several threads make matrices small at once, and
# only one of them imports a module.
onnxruntime.set_global_thread_pool_sizes(THREADS, 1)


def int4_kernel(weight: Tensor, scale: Tensor) -> Callable[[Tensor], Tensor]:
    """`weight` [out, in / 2], two numbers a byte, and `scale` [out, groups], as a function of
    float32 rows [M, in] that gives [M, out]."""
    product = multiplication(weight, scale)
    multiple = rows_at_once(2 * weight.shape[1] // scale.shape[1])

    def kernel(rows: Tensor) -> Tensor:
        count = len(rows)
        out = product(pad(rows, (0, 0, 0, -count % multiple)))[:count]
        # The operator makes a number of a NaN or infinity: 0 times their sum is NaN again.
        return out.add_(rows.sum(1, keepdim=True).mul_(0))

    return kernel


@functools.cache
def rows_at_once(group: int) -> int:
    """The numbers of rows that have to be multiples of this, so that a row's result is always the
    same. The operator takes some rows at a time, and those left over in another order of sums."""
    matrix = torch.randint(256, (64, 4 * group // 2), dtype=torch.uint8)
    product = multiplication(matrix, torch.rand(64, 4))
    rows = torch.randn(32, 4 * group)
    expected = product(rows)
    for multiple in (1, 2, 4, 8, 16):
        some = range(multiple, len(rows), multiple)
        if all(torch.equal(product(rows[:count]), expected[:count]) for count in some):
            return multiple
    raise ValueError("int4: onnxruntime's kernel gives a row other results beside other rows")


def multiplication(weight: Tensor, scale: Tensor) -> Callable[[Tensor], Tensor]:
    """The operator itself."""
    out_features, groups = scale.shape
    group = 2 * weight.shape[1] // groups
    options = session_options()
    values = {
        "weight": weight.reshape(out_features, groups, group // 2),
        "scale": scale.reshape(-1),
    }
    # Given so, and not inside the model, they are let go once the kernel has laid them out anew.
    options.add_external_initializers(
        list(values),
        [onnxruntime.OrtValue.ortvalue_from_numpy(each.numpy()) for each in values.values()],
    )
    model = one_product(group * groups, out_features, group, values).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=PROVIDERS)

    def product(rows: Tensor) -> Tensor:
        rows, out = rows.contiguous(), torch.empty(len(rows), out_features)
        binding = session.io_binding()
        for bind, name, tensor in (
            (binding.bind_input, "rows", rows),
            (binding.bind_output, "out", out),
        ):
            bind(name, "cpu", 0, TensorProto.FLOAT, tuple(tensor.shape), tensor.data_ptr())
        session.run_with_iobinding(binding)
        return out

    return product


def session_options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    options.enable_cpu_mem_arena = False  # it would keep the memory of the largest product
    return options


def one_product(
    in_features: int, out_features: int, group: int, values: dict[str, Tensor]
) -> ModelProto:
    """An ONNX model of one multiplication, whose weights lie elsewhere."""
    node = helper.make_node(
        "MatMulNBits",
        ["rows", *values],
        ["out"],
        domain="com.microsoft",
        K=in_features,
        N=out_features,
        bits=4,
        block_size=group,
        accuracy_level=INT8_INPUTS,
    )
    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["M", in_features])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["M", out_features])
    weights = [placeholder(name, value) for name, value in values.items()]
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "product", [rows], [out], weights)
    return helper.make_model(graph, opset_imports=versions, ir_version=8)


def placeholder(name: str, value: Tensor) -> TensorProto:
    """Stands for a tensor of this shape and type that the session is given beside the model."""
    tensor = TensorProto(
        name=name,
        dims=value.shape,
        data_type=TensorProto.UINT8 if value.dtype == torch.uint8 else TensorProto.FLOAT,
        data_location=TensorProto.EXTERNAL,
    )
    tensor.external_data.add(key="location", value="memory")
    return tensor
