"""`--quantize`: the matrices of the layers in 8 or 4 bits, for GPUs that the full ones do not fit.

bitsandbytes does it, through transformers' loading: each matrix is read, made small on the device
and let go before the next comes, so the full network is never there. Embedding and output layer
stay as they are.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from transformers import BitsAndBytesConfig

BLOCK = 64  # weights that share a scale, at int4
SCALES = 256  # scales of a byte each that share a scale, at int4


def pick_quantization(
    kind: str | None, device: torch.device, dtype: torch.dtype
) -> BitsAndBytesConfig | None:
    """How to load: int8, int4 or None for in full. Raises ValueError for what cannot be.

    int8 is LLM.int8 (Dettmers et al. 2022), one scale a row; int4 is NF4 with scales that are
    quantised too (Dettmers et al. 2023, "QLoRA").
    """
    if kind is None:
        return None
    if kind not in ("int8", "int4"):
        raise ValueError(f"quantize must be one of int8, int4, not {kind!a}")
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"quantize {kind} works on cuda and cpu, not on {device.type}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"quantize {kind} needs an extra package: pip install -r "
            "chatglm/checkpoint/requirements-quantize.txt"
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
        state: Any = getattr(weight, "quant_state", None)
        if state is not None:
            shape = tuple(state.shape)
        elif hasattr(weight, "SCB"):
            shape = tuple(weight.shape)
        else:
            continue
        if shape != (module.out_features, module.in_features):
            found.append((f"{name}.weight", shape, (module.out_features, module.in_features)))
    return found
