"""Downloading a checkpoint: from the Hugging Face hub, or from ModelScope, which China can reach.

Both clients keep what they downloaded, go on with a download that broke off, and do without the
network when all of it is there. Code files are left out.

HF_ENDPOINT is a mirror of the one hub, MODELSCOPE_ENDPOINT of the other; HF_HUB_OFFLINE=1 asks
nothing of the network. The caches are in HF_HOME and MODELSCOPE_CACHE.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

MODELSCOPE = "modelscope:"  # before an id that is meant there
MODELSCOPE_OWNERS = ("ZhipuAI/",)  # they publish nothing on the other hub
SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
SAFETENSORS = ["model*.safetensors", "adapter_model.safetensors"]
BINS = ["pytorch_model*.bin", "adapter_model.bin"]


def is_hub_id(name: str) -> bool:
    return re.fullmatch(rf"({MODELSCOPE})?[\w.-]+/[\w.-]+", name) is not None


def download(name: str) -> Path:
    """The folder that `name`, such as THUDM/chatglm3-6b or modelscope:ZhipuAI/chatglm3-6b, was
    downloaded to. Raises ValueError if neither the hub nor the cache gives it."""
    if name.startswith((MODELSCOPE, *MODELSCOPE_OWNERS)):
        return fetch(name.removeprefix(MODELSCOPE), "ModelScope", from_modelscope)
    return fetch(name, "the model hub", from_hugging_face)


def fetch(repo_id: str, hub: str, get: Callable[[str, list[str]], str]) -> Path:
    try:
        folder = Path(get(repo_id, SMALL_FILES + SAFETENSORS))
        if not any(list(folder.glob(pattern)) for pattern in SAFETENSORS):
            folder = Path(get(repo_id, SMALL_FILES + BINS))
    except OSError as error:  # what both clients raise, and requests
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"there is no folder {repo_id}, and it could not be downloaded from {hub} "
            f"({lines[0]}); download it elsewhere and pass its folder"
        ) from error
    return folder


def from_hugging_face(repo_id: str, patterns: list[str]) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(repo_id, allow_patterns=patterns)


def from_modelscope(repo_id: str, patterns: list[str]) -> str:
    try:
        from modelscope_hub.compat.snapshot_download import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"{repo_id} is on ModelScope, whose client is missing: pip install modelscope-hub"
        ) from error
    try:
        return snapshot_download(repo_id, allow_patterns=patterns)
    except OSError:
        try:  # without a network, what was downloaded before will do
            return snapshot_download(repo_id, allow_patterns=patterns, local_files_only=True)
        except Exception:
            pass
        raise
