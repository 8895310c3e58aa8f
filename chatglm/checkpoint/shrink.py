"""Writes a checkpoint whose matrices are small already, for machines without a GPU.

    python -m chatglm.checkpoint.shrink MODEL --quantize int4 --out FOLDER
    python api.py --model FOLDER

`--quantize` gives the same when the server starts, but has to read all of MODEL each time. FOLDER
is half as large (int8) or a third (int4), loads in seconds, and can be handed on as it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from chatglm.checkpoint.cpu_quantizer import CpuQuantizationConfig
from chatglm.checkpoint.files import WEIGHT_FILES, find_folder, read_json
from chatglm.checkpoint.load import load
from chatglm.checkpoint.quantize import KINDS

SHARD_BYTES = 2 * 10**9  # of a file: what a USB stick's file system takes, and an upload resumes at
KEPT = ("*.json", "*.model", "*.jinja", "*.txt")  # configuration and tokenizer


def shrink(path: str, kind: str, out: Path) -> None:
    """Raises ValueError for what cannot be made small, or if `out` is there already."""
    if out.exists():
        raise ValueError(f"{out} is there already; choose another --out, or remove it")
    source = find_folder(path)
    _, model = load(source, device="cpu", quantize=kind, pack=False)
    config = read_json(source / "config.json")
    config["quantization_config"] = CpuQuantizationConfig(kind).to_dict()
    # Under another name until all is there: what has the name is whole.
    unfinished = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        for pattern in KEPT:
            for file in source.glob(pattern):
                if file.name not in WEIGHT_FILES:
                    shutil.copyfile(file, unfinished / file.name)
        (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        write_shards(model.state_dict(), unfinished)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    shards = list(split(tensors))
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {
            key: name for name, shard in zip(names, shards, strict=True) for key in shard
        },
    }
    text = json.dumps(index, indent=1) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, "utf-8")


def split(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if shard and sum(each.nbytes for each in shard.values()) + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m chatglm.checkpoint.shrink", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("model", help="a folder or a hub id, in full precision")
    parser.add_argument("--quantize", choices=KINDS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    settings = parser.parse_args(arguments)
    try:
        shrink(settings.model, settings.quantize, settings.out)
    except (ValueError, OSError) as error:
        print(f"shrink: {error}", file=sys.stderr)
        return 2
    size = sum(file.stat().st_size for file in settings.out.iterdir())
    print(f"{settings.out}: {size / 1e9:.2f} GB; python api.py --model {settings.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
