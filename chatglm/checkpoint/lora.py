"""LoRA adapters as peft saves them, added to the weights while these are read.

An adapter holds, for each matrix W [out, in] that it was trained for, A [r, in] and B [out, r];
the tuned matrix is W + alpha / r * B A (Hu et al. 2021, "LoRA"). Merged, the network is as fast as
without, and `--quantize` can pack the result.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch

from chatglm.checkpoint.files import how_to_get, is_whole, read_json
from chatglm.checkpoint.tensors import Computed, Readable, Tensors, open_tensors, shape_of
from chatglm.errors import preview

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# Ways to begin that change the base's weights as well, so that the published base does not fit.
OTHER_BASES = ("pissa", "olora", "loftq", "corda")
# Settings that compute something else than the formula above.
UNSERVED = (
    "layer_replication",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "use_qalora",
    "lora_bias",
)


def merge_lora(tensors: Tensors, folder: Path) -> Tensors:
    """The base's `tensors` with the adapter in `folder` added. Raises ValueError if the adapter is
    of another kind or of another base."""
    settings = read_settings(folder)
    merged = dict(tensors)
    changes = open_tensors([find_adapter_weights(folder)])
    for name, parts in group_by_target(changes).items():
        check_fit(folder, settings, name, parts, tensors.get(name))
        whole = parts.get("whole")
        merged[name] = whole if whole is not None else add(tensors[name], parts, name, settings)
    return merged


def find_adapter_weights(folder: Path) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            if not is_whole(folder / name):
                raise ValueError(
                    f"{folder / name} is cut off or damaged; {how_to_get(folder / name)}"
                )
            return folder / name
    raise ValueError(f"{folder} has no weights: none of {', '.join(WEIGHT_FILES)}")


def read_settings(folder: Path) -> dict:
    settings = read_json(folder / "adapter_config.json")
    kind, begun = settings.get("peft_type"), str(settings.get("init_lora_weights")).lower()
    if kind != "LORA":
        raise ValueError(
            f"{folder}: peft_type {preview(kind)} is not served; LORA and PREFIX_TUNING are"
        )
    for field in UNSERVED:
        if settings.get(field):
            raise ValueError(f"{folder}: {field} {preview(settings[field])} is not served")
    if begun.startswith(OTHER_BASES):
        raise ValueError(
            f"{folder}: init_lora_weights {preview(begun)} has changed the base's weights too; "
            "have peft save it as an ordinary LoRA (path_initial_model_for_weight_conversion)"
        )
    for field in ("r", "lora_alpha"):
        if settings.get(field) is None:
            raise ValueError(f"{folder}: {field} must be a number over 0, not None")
    return settings


def group_by_target(tensors: Tensors) -> dict[str, dict[str, torch.Tensor | Readable]]:
    """Name of a tensor of the base -> the adapter's parts for it: A, B and perhaps a magnitude,
    or a whole tensor that takes its place (modules_to_save, biases).

    >>> group_by_target({"base_model.model.layers.0.dense.lora_A.weight": a})
    {'layers.0.dense.weight': {'lora_A': a}}
    """
    groups: dict[str, dict] = {}
    for name, tensor in tensors.items():
        wrapping = r"^(base_model\.model\.)+|\.modules_to_save(\.default)?(?=\.)|\.base_layer(?=\.)"
        name = re.sub(wrapping, "", name)
        part = re.fullmatch(
            r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(\.default)?(\.weight)?", name
        )
        if part:
            groups.setdefault(f"{part[1]}.weight", {})[part[2]] = tensor
        else:
            groups.setdefault(name, {})["whole"] = tensor
    return groups


def check_fit(
    folder: Path, settings: dict, name: str, parts: dict, base: torch.Tensor | Readable | None
) -> None:
    """Raises ValueError if the base has no such tensor, or one of another shape."""
    shapes = {part: shape_of(tensor) for part, tensor in parts.items()}
    for_whom = settings.get("base_model_name_or_path")
    if base is None:
        raise ValueError(
            f"{folder} is an adapter of another model ({for_whom!a}): the base has no {name}"
        )
    expected = shape_of(base)
    if "whole" in parts:
        found = shapes["whole"]
    elif {"lora_A", "lora_B"} <= set(parts) and len(shapes["lora_A"]) == len(shapes["lora_B"]) == 2:
        found = [shapes["lora_B"][0], shapes["lora_A"][1]]
        if settings.get("fan_in_fan_out"):
            found.reverse()
    else:
        raise ValueError(f"{folder}: half of the change to {name} is missing")
    if found != expected:
        raise ValueError(
            f"{folder} is an adapter of another model ({for_whom!a}): its {name} is "
            f"{found}, and the base's {expected}"
        )


def add(base: torch.Tensor | Readable, parts: dict, name: str, settings: dict) -> Computed:
    """The base's matrix with B A added, and with DoRA each row brought to a length of its own."""
    scale = scale_of(name, shape_of(parts["lora_A"])[0], settings)

    def compute() -> torch.Tensor:
        a, b = (parts[part][...].float() for part in ("lora_A", "lora_B"))
        change = scale * (b @ a)
        weight = base[...].float() + (change.T if settings.get("fan_in_fan_out") else change)
        if "lora_magnitude_vector" in parts:  # Liu et al. 2024, "DoRA"
            length = parts["lora_magnitude_vector"][...].float()
            weight *= (length / weight.norm(dim=1))[:, None]
        return weight

    return Computed(shape_of(base), compute)


def scale_of(name: str, rank: int, settings: dict) -> float:
    """alpha / r, or with use_rslora alpha / √r; alpha_pattern may give a module its own alpha."""
    module, alpha = name.removesuffix(".weight"), settings["lora_alpha"]
    for pattern, own in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = own
            break
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
