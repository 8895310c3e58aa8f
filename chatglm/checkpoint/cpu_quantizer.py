"""Makes a network's matrices small for a CPU while transformers loads it.

transformers reads one tensor after the other and hands each matrix to `Shrink`. A few threads make
them small and lay them out for their kernels (hardware/cpu_linear.py); a matrix is there in full
only meanwhile. A folder that shrink.py has written has them small already (`Restore`).
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from chatglm.hardware.cpu_linear import KINDS, PackedLinear, Weights

METHOD = "chatglm-cpu"  # the name in a config.json
VERSION = 1  # of the form in which shrink.py writes
WORKERS = 2  # matrices that are made small at once, and so are there in full at once


@register_quantization_config(METHOD)
class CpuQuantizationConfig(QuantizationConfigMixin):
    pack = True  # False: the small weights stay as a file holds them

    def __init__(self, kind: str, version: int = VERSION, quant_method: str = METHOD) -> None:
        self.kind, self.version = kind, version
        self.quant_method: Any = quant_method

    def to_dict(self) -> dict[str, Any]:
        return dict(kind=self.kind, version=self.version, quant_method=self.quant_method)


class StoredEmbedding(nn.Embedding):
    """Keeps the rows as the file has them, and gives float32."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).float()


@register_quantizer(METHOD)
class CpuQuantizer(HfQuantizer):
    quantization_config: Any  # a CpuQuantizationConfig
    serialized_names: dict[str, list[str]] = {"weight": ["weight", "weight_scale"]}

    def __init__(self, quantization_config: CpuQuantizationConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self._workers = ThreadPoolExecutor(WORKERS)
        self._free = threading.Semaphore(WORKERS)
        self._jobs: list[Future] = []

    def __deepcopy__(self, _: dict) -> CpuQuantizer:
        """transformers copies the operations for each tensor; what they share stays one."""
        return self

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        replace_matrices(model, self.quantization_config.kind)

    def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
        module, _, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(module), PackedLinear)

    def get_quantize_ops(self) -> ConversionOps:
        return Shrink(self)

    def get_load_operations(self) -> dict:
        return {"deserialize": Restore}

    def give(self, module: PackedLinear, weights: Callable[[], Weights]) -> None:
        """Has a worker put into `module` what `weights` gives; waits while all are busy."""
        put = module.pack if self.quantization_config.pack else module.hold

        def job() -> None:
            try:
                put(weights())
                give_back_memory()
            finally:
                self._free.release()

        self._free.acquire()
        self._jobs.append(self._workers.submit(job))

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        self._workers.shutdown()
        for job in self._jobs:
            job.result()  # raises what went wrong

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


class ToWorkers(ConversionOps):
    """An operation of transformers' loading that leaves the model's matrices to the workers."""

    def __init__(self, quantizer: CpuQuantizer) -> None:
        self.hf_quantizer = quantizer


def module_of(name: str, about: dict[str, Any]) -> Any:
    return about["model"].get_submodule(name.rpartition(".")[0])


def count_as_found(name: str, about: dict[str, Any]) -> None:
    """What a worker puts into the model is not missing."""
    about["missing_keys"].difference_update(f"{name}{suffix}" for suffix in ("", "_scale"))


class Shrink(ToWorkers):
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **about: Any,
    ) -> dict[str, Any]:
        """Gives each matrix to a worker. What is left for transformers to put into the model: one
        of another shape than the model's, which load_weights then finds there."""
        left = {}
        for name, value in input_dict.items():
            matrix = value[0] if isinstance(value, list) else value
            module = module_of(name, about)
            count_as_found(name, about)
            if matrix.shape != (module.out_features, module.in_features):
                left[name] = matrix  # load_weights finds it there, and says so
            else:
                self.hf_quantizer.give(module, functools.partial(module.shrink, matrix))
        return left


class Restore(ToWorkers):
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **about: Any,
    ) -> dict[str, Any]:
        """As Shrink does, from `weight` and `weight_scale` as they were saved."""
        name = about["full_layer_name"]
        module = module_of(name, about)
        if not isinstance(module, PackedLinear):
            return input_dict
        weights = {part: value[0] for part, value in input_dict.items()}
        count_as_found(name, about)
        expected = module.stored(module.in_features, module.out_features)
        if any(weights[part].shape != shape for part, (shape, _) in expected.items()):
            return {name: weights["weight"]}
        self.hf_quantizer.give(module, lambda: weights)
        return {}


@functools.cache
def c_library() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def give_back_memory() -> None:
    """The C library of Linux keeps blocks of up to 32 MB that were let go, for later: three times
    what an int4 matrix takes in the end."""
    if hasattr(c_library(), "malloc_trim"):
        c_library().malloc_trim(0)


def replace_matrices(model: Any, kind: str) -> None:
    """The layers' matrices by those of `kind`, the output layer's by those of 8 bits, unless it is
    the embedding's; the embedding by one that stays as the file has it."""
    output = model.get_output_embeddings()
    tied = model.config.get_text_config().tie_word_embeddings
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and not (module is output and tied):
            chosen = output_kind(kind) if module is output else KINDS[kind]
            with torch.device("meta"):  # nothing is allocated
                small = chosen(module.in_features, module.out_features, module.bias is not None)
            model.set_submodule(name, small)
    embedding = model.get_input_embeddings()
    if type(embedding) is not nn.Embedding:
        raise ValueError(f"--quantize on a CPU: a {type(embedding).__name__} is no plain embedding")
    embedding.__class__ = StoredEmbedding


def output_kind(kind: str) -> type[PackedLinear]:
    """At int4 the output layer has 8 bits: its errors go straight into the choice of words."""
    return KINDS["int8" if kind == "int4" else kind]


def finish(model: Any, kind: str) -> None:
    """What the kernels do not hold goes to float32, except for the embedding, which is a table to
    look up. As a buffer: the type of the first parameter is that of the KV cache."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    table = embedding.weight.data
    if type(output) is nn.Linear:  # it shares the embedding's numbers
        small = output_kind(kind)(output.in_features, output.out_features, False)
        small.pack(small.shrink(table))
        model.set_output_embeddings(small)
    del embedding.weight
    embedding.register_buffer("weight", table)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    model.config.dtype = torch.float32
