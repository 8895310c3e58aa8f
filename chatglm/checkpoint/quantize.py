"""`--quantize`: the matrices of the layers in 8 or 4 bits, for machines that the full ones do not
fit, and on a CPU for speed.

Either way transformers' loading does it: each matrix is read, made small and let go before the
next comes, so the full network is never there. On a CPU cpu_quantizer.py makes them small, the
output layer as well. On a GPU bitsandbytes does; embedding and output layer stay as they are.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from chatglm.checkpoint.cpu_quantizer import METHOD, VERSION, CpuQuantizationConfig
from chatglm.errors import preview
from chatglm.hardware.cpu_linear import PackedLinear

KINDS = ("int8", "int4")
BLOCK = 64  # weights that share a scale, at int4 on a GPU
SCALES = 256  # scales of a byte each that share a scale, at int4 on a GPU
FOLDER = "pip install -r chatglm/checkpoint/"


def pick_quantization(
    kind: str | None, device: torch.device, dtype: torch.dtype, pack: bool = True
) -> BitsAndBytesConfig | CpuQuantizationConfig | None:
    """How to load: int8, int4 or None for in full. Raises ValueError for what cannot be."""
    if kind is None:
        return None
    if kind not in KINDS:
        raise ValueError(f"quantize must be one of int8, int4, not {kind!a}")
    if device.type == "cpu":
        return for_cpu(kind, dtype, pack)
    if device.type != "cuda":
        raise ValueError(f"quantize {kind} works on cuda and cpu, not on {device.type}")
    return for_gpu(kind, dtype)


def is_shrunk(published: dict) -> bool:
    """Whether shrink.py wrote the folder."""
    method = published.get("quantization_config")
    return isinstance(method, dict) and method.get("quant_method") == METHOD


def quantize_as_stored(quantize: str | None, published: dict, folder: Path) -> str | None:
    """How small the matrices of the folder are, if they are; else `quantize` as it is."""
    if not is_shrunk(published):
        return quantize
    stored = published["quantization_config"]
    if stored.get("version") != VERSION or stored.get("kind") not in KINDS:
        raise ValueError(
            f"{folder} was made small by another version of this program ({preview(stored)}); "
            "make it again with python -m chatglm.checkpoint.shrink"
        )
    if quantize not in (None, stored["kind"]):
        raise ValueError(f"{folder} is {stored['kind']} already, so quantize cannot be {quantize}")
    return stored["kind"]


def for_cpu(kind: str, dtype: torch.dtype, pack: bool) -> CpuQuantizationConfig:
    if dtype != torch.float32:
        raise ValueError(
            f"quantize {kind} on a CPU computes in float32, not in {str(dtype)[6:]}; "
            "leave out --dtype"
        )
    if kind == "int4" and not all(map(importlib.util.find_spec, ("onnxruntime", "onnx"))):
        raise ValueError(
            f"quantize int4 on a CPU needs extra packages: {FOLDER}requirements-int4.txt; "
            "int8 needs none"
        )
    config = CpuQuantizationConfig(kind)
    config.pack = pack
    return config


def for_gpu(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """int8 is LLM.int8 (Dettmers et al. 2022), one scale a row; int4 is NF4 with scales that are
    quantised too (Dettmers et al. 2023, "QLoRA")."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"quantize {kind} on a GPU needs an extra package: {FOLDER}requirements-quantize.txt"
        )
    # It warns of its own conversions, and of a kernel that it would fetch from the network.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if kind == "int8":
        # A threshold would treat outlying columns apart, found in the whole batch: an answer would
        # depend on its neighbours, and a CUDA graph could not be captured.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def wrong_shapes(model) -> list[tuple]:
    """Quantised matrices of another shape than the network's: transformers lets these pass."""
    found = []
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if weight is None:  # it has none, or a kernel has it
            continue
        expected = (
            (module.out_features, module.in_features) if hasattr(module, "in_features") else ()
        )
        state: Any = getattr(weight, "quant_state", None)
        if state is not None:
            shape = tuple(state.shape)
        elif hasattr(weight, "SCB"):
            shape = tuple(weight.shape)
        elif isinstance(module, PackedLinear):
            shape = tuple(weight.shape)
            if not weight.is_floating_point():  # small already
                expected = module.stored(module.in_features, module.out_features)["weight"][0]
        else:
            continue
        if shape != expected:
            found.append((f"{name}.weight", shape, expected))
    return found
