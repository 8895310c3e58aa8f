"""`--devices`: one network on several GPUs of a machine, by transformers' tensor parallelism.

Each GPU has a process, with its share of the large matrices. The first is the one that was
started; it starts the others (`run_worker`), and its continuous batching tells theirs
what was asked, so that all take the same steps. device_map="auto" would not do: the paged cache
lies on one device.
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

import torch

RANK = "RANK"  # torch's name for the number of a process, from 0


def check_devices(count: int, name: str, device: torch.device, quantize: str | None) -> None:
    """Raises ValueError for what `count` devices cannot be combined with. `name` is what was asked
    for, `device` what that is here."""
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
        return  # slower than one process, but it shows how the processes work together
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
    """Raises ValueError if the network cannot be divided. `model` needs to have shapes only."""
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
    """Whether each device has only a part of the parameter."""
    return re.sub(r"\.\d+\.", ".*.", name).rpartition(".")[0] in model.tp_plan


def launch(count: int, device: torch.device, settings: dict) -> None:
    """Starts the other processes, each to load with `settings`. In one of them it does nothing."""
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
        # Of its own session, so that Ctrl-C reaches the first alone.
        process = subprocess.Popen(
            [sys.executable, "-m", "chatglm.hardware.tensor_parallel"],
            stdin=subprocess.PIPE,
            text=True,
            env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,
        )
        name = f"cuda:{rank}" if device.type == "cuda" else "cpu"
        process.stdin.write(json.dumps({**settings, "device": name, "devices": count}) + "\n")
        process.stdin.flush()
        atexit.register(process.kill)
        threading.Thread(target=exit_with, args=(process,), daemon=True).start()


def exit_with(process: subprocess.Popen) -> None:
    """Ends this process if another does, whose share of the network is lost."""
    process.wait()
    print(f"a process of --devices has ended, status {process.returncode}", file=sys.stderr)
    os._exit(1)


def broadcast_from_rank0(*values):
    """What the first process says the values are."""
    if torch.distributed.is_initialized():
        values = list(values)
        torch.distributed.broadcast_object_list(values, src=0)
    return values


def run_worker() -> None:
    """The life of a process other than the first: to load, and to take the engine's steps."""
    import chatglm

    settings = json.loads(sys.stdin.readline())

    def leave() -> None:
        sys.stdin.read()  # to its end, which comes when the first process ends, however it does
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
