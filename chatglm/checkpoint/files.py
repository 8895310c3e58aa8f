"""The files of a checkpoint: where they lie, and whether they are whole."""

from __future__ import annotations

import json
import re
import struct
import zipfile
from pathlib import Path

from chatglm.checkpoint.fields import DEEPEST, check_content
from chatglm.checkpoint.hubs import download, is_hub_id
from chatglm.errors import preview

TINY = Path(__file__).parents[1] / "tiny"
LEGACY_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")  # a number that such files begin with
MAX_HEADER = 100_000_000  # bytes
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def find_folder(path: str | Path | None) -> Path:
    """A local folder, or the one that a hub id was downloaded to, code files left out."""
    if path is None:
        return TINY
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not is_hub_id(str(path)):
        raise ValueError(f"{path} is neither a folder nor a hub id such as THUDM/chatglm3-6b")
    return download(str(path))


def read_config(folder: Path) -> dict:
    """The model's config.json, without the fields that are null there. Raises ValueError if the
    folder is not that of a model."""
    if (folder / "config.json").is_file():
        published = read_json(folder / "config.json")
        return {field: value for field, value in published.items() if value is not None}
    if (folder / "adapter_config.json").is_file():
        named = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or ""
        base = named if named.isprintable() and named else "BASE"
        raise ValueError(
            f"{folder} is an adapter, not a model: pass the model that it was trained on, and "
            f"this as its adapter (--model {base} --adapter {folder})"
        )
    raise ValueError(f"{folder} is not a checkpoint folder: it has no config.json")


def read_json(file: Path) -> dict:
    """The object in a JSON file, in UTF-8, -16 or -32, with a byte order mark or without. Raises
    ValueError, naming the file, if it holds anything else, or a field that cannot be."""
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}; download it again") from error
    except RecursionError as error:
        raise ValueError(f"{file} is nested over {DEEPEST} deep; download it again") from error
    check_content(content, file)
    return content


def check_weights(folder: Path) -> list[Path]:
    """The weight files, each there and whole. Raises ValueError, naming the first that is not."""
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        shards = find_shards(folder)
    elif found.suffix != ".json":
        shards = [found]
    else:
        shards = indexed_shards(found)
    for shard in shards:
        if not shard.is_file():
            raise ValueError(f"{shard} is missing; download it again")
        if not is_whole(shard):
            raise ValueError(
                f"{shard} is cut off or damaged ({shard.stat().st_size:,} bytes); "
                f"{how_to_get(shard)}"
            )
    return shards


def indexed_shards(index: Path) -> list[Path]:
    """The files that an index names. Raises ValueError if it names none, or one elsewhere."""
    weight_map = read_json(index).get("weight_map")
    if not weight_map:
        raise ValueError(f"{index} has no weight_map; download it again")
    for name in weight_map.values():
        # No slash, no drive, no control character: only what lies beside the index is read.
        if not isinstance(name, str) or not re.fullmatch(r"[\w .+-]{1,200}", name):
            raise ValueError(
                f"{index}: weight_map must name files beside it, not {preview(name)}; "
                "download it again"
            )
    return [index.parent / name for name in sorted(set(weight_map.values()))]


def find_shards(folder: Path) -> list[Path]:
    """All shards, present or not, of a checkpoint whose index is missing: their names count them.
    Raises ValueError if there are none."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        for shard in sorted(folder.glob(f"{stem}-*-of-*.{suffix}")):
            if counted := re.fullmatch(rf"{stem}-(\d{{1,5}})-of-(\d{{1,5}})\.{suffix}", shard.name):
                digits, count = len(counted[1]), counted[2]
                return [
                    folder / f"{stem}-{number:0{digits}}-of-{count}.{suffix}"
                    for number in range(1, int(count) + 1)
                ]
    raise ValueError(f"{folder} has no weights: none of {', '.join(WEIGHT_FILES)}")


def is_whole(shard: Path) -> bool:
    size = shard.stat().st_size
    if shard.suffix == ".bin":  # torch.save writes a zip, whose directory is at the end
        return zipfile.is_zipfile(shard) or is_legacy_bin(shard)
    with shard.open("rb") as file:  # 8 bytes: length of a JSON header with each tensor's place
        try:
            [length] = struct.unpack("<Q", file.read(8))
            # MAX_HEADER is safetensors' own limit. To read a longer one would take much memory.
            header = json.loads(file.read(length)) if length < min(size, MAX_HEADER) else {}
            entries = [entry for name, entry in header.items() if name != "__metadata__"]
            ends = [int(entry["data_offsets"][1]) for entry in entries]
        # What is no JSON, or JSON of another form; no int can be made of Infinity.
        except (struct.error, ValueError, TypeError, AttributeError, LookupError):
            return False
        except (RecursionError, OverflowError):
            return False
    return bool(ends) and size == 8 + length + max(ends)


def is_legacy_bin(shard: Path) -> bool:
    """Whether torch.save of before PyTorch 1.6 wrote it. If it is cut off, reading it will tell."""
    with shard.open("rb") as file:
        return LEGACY_MAGIC in file.read(32)


def how_to_get(file: Path) -> str:
    """What to do about a file that is not what it should be."""
    with file.open("rb") as start:
        pointer = start.read(40).startswith(b"version https://git-lfs")
    return "it is only a Git LFS pointer: run git lfs pull" if pointer else "download it again"
