"""`--devices`: one network on several GPUs of a machine, by transformers' tensor parallelism.

Each GPU has a process, which holds its share of the large matrices. Rank 0 is the process that was
started. It starts the others (`run_worker`), and its continuous batching sends every request to
theirs, so that all take the same steps. device_map="auto" cannot do this: the paged KV cache lies
on one device.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import torch

RANK = "RANK"  # torch's environment variable for the number of a process, from 0


def check_devices(count: int, name: str, device: torch.device, quantize: str | None) -> None:
    """Raises ValueError for settings that `count` devices cannot be combined with. `name` is what
    the user asked for, `device` is what that name resolved to."""
    if count > 1 and torch.distributed.is_initialized():
        raise ValueError("devices: this process has a network on several GPUs already")
    if count == 1 or RANK in os.environ:
        return
    if count < 1:
        raise ValueError(f"devices must be at least 1, not {count}")
    if quantize:
        raise ValueError(
            "devices: bitsandbytes' matrices cannot be divided among GPUs; "
            "leave out either --quantize or --devices"
        )
    gpus = torch.cuda.device_count()
    if name == "cpu" and not gpus:
        return  # slower than one process, but it can be tried without a GPU
    if device.type != "cuda":
        raise ValueError(
            f"devices {count} needs {count} NVIDIA GPUs, and device {name} is {device.type} here"
        )
    if ":" in name:
        raise ValueError(
            f"devices {count} takes the first {count} GPUs, not {name}; choose them "
            "with the environment variable CUDA_VISIBLE_DEVICES"
        )
    if count > gpus:
        raise ValueError(f"devices {count}: this machine has {gpus} GPU(s)")
    if not torch.distributed.is_nccl_available():
        raise ValueError(
            "devices: this build of torch has no NCCL, by which GPUs work together (Linux has it)"
        )


def check_divisible(model, count: int) -> None:
    """Raises ValueError if the network cannot be divided. `model` may be on the meta device."""
    plan, config = model.tp_plan, model.config
    fields = ["intermediate_size", "vocab_size"]
    if any(name.endswith("k_proj") for name in plan):
        fields += ["num_attention_heads", "num_key_value_heads"]
    if not plan:
        raise ValueError(f"devices: transformers has no plan how to divide a {config.model_type}")
    for field in fields:
        if getattr(config, field, 0) % count:
            raise ValueError(
                f"devices {count}: {field} {getattr(config, field)} cannot be divided by {count}"
            )


def is_sharded(model, name: str) -> bool:
    """Whether each device holds only a part of the parameter."""
    return re.sub(r"\.\d+\.", ".*.", name).rpartition(".")[0] in model.tp_plan


def launch(count: int, device: torch.device, settings: dict) -> None:
    """Starts the other processes, which load with `settings`. In one of these it does nothing."""
    if RANK in os.environ:
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        WORLD_SIZE=str(count),
        LOCAL_RANK="0",
        NCCL_GRAPH_MIXING_SUPPORT="0",
        RANK="0",
    )
    for rank in range(1, count):
        # In its own session, so that Ctrl-C reaches only rank 0.
        process = subprocess.Popen(
            [sys.executable, "-m", "chatglm.hardware.tensor_parallel"],
            stdin=subprocess.PIPE,
            text=True,
            env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,
        )
        name = f"cuda:{rank}" if device.type == "cuda" else "cpu"
        assert process.stdin is not None
        process.stdin.write(json.dumps({**settings, "device": name, "devices": count}) + "\n")
        process.stdin.flush()
        atexit.register(process.kill)
        threading.Thread(target=exit_with, args=(process,), daemon=True).start()


def exit_with(process: subprocess.Popen) -> None:
    """Ends this process when another ends, because its share of the network is lost."""
    process.wait()
    print(f"a process of --devices has ended, status {process.returncode}", file=sys.stderr)
    os._exit(1)


def broadcast_from_rank0(*values: Any) -> list[Any]:
    """The values that the first process passed, in every process."""
    shared = list(values)
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(shared, src=0)
    return shared


def run_worker() -> None:
    """Every process but rank 0: loads its share, then takes the same steps as rank 0."""
    import chatglm

    settings = json.loads(sys.stdin.readline())

    def leave() -> None:
        sys.stdin.read()  # reaches EOF when rank 0 exits, for any reason
        os._exit(0)

    threading.Thread(target=leave, daemon=True).start()
    try:
        engine = chatglm.Engine(*chatglm.load(**settings))
    except ValueError as error:
        sys.exit(f"device {settings['device']}: {error}")
    while True:
        engine.start()
        while engine.running:
            time.sleep(0.1)


if __name__ == "__main__":
    run_worker()
