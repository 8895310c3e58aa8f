"""A KV cache in host memory that takes no more of it than has been written to."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode


class MemoryOnFirstUse(TorchFunctionMode):
    """Within it, torch.zeros(bytes, dtype=torch.uint8) has no memory behind it yet.

    torch itself writes the zeros, so a cache for 64 conversations takes the memory of 64 from the
    start. numpy asks the operating system for zeroed memory, which gives each page of it when it
    is first written to; and transformers hands out blocks again before it takes new ones.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_cache = func is torch.zeros and kwargs.get("dtype") is torch.uint8
        if is_cache and len(args) == 1 and isinstance(args[0], int):
            return torch.from_numpy(np.zeros(args[0], dtype=np.uint8))
        return func(*args, **kwargs)
