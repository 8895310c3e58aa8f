"""api.py, with a model that a test can hold: see `Server.held` in servers.py.

    HELD=folder python -m tests.held [flags of api.py]

Whether a request waits, goes on or has ended must not depend on who is faster, so the test says how
far the model goes, by files in the folder: while `hold` is there, each step takes a file `step-…`
away, or waits for one. A file that has an exception's name makes one step fail with it.
"""

import os
import runpy
import time
from pathlib import Path

import torch

FAULTS = {"RuntimeError": RuntimeError, "OutOfMemoryError": torch.OutOfMemoryError}


def obey(folder: Path) -> None:
    """Has every step of every model in this process, of which there is one, look into `folder`."""

    def before_step(module: torch.nn.Module, *_: object) -> None:
        if isinstance(module, torch.nn.Embedding):  # each step begins with it
            while (folder / "hold").exists() and not any(map(taken, folder.glob("step-*"))):
                time.sleep(0.005)
            for name, kind in FAULTS.items():
                if taken(folder / name):
                    raise kind("a fault made for a test")

    torch.nn.modules.module.register_module_forward_hook(before_step)


def taken(file: Path) -> bool:
    """Whether the file was there, and is now gone. Two replicas may look at once."""
    try:
        file.unlink()
    except FileNotFoundError:
        return False
    return True


if __name__ == "__main__":
    obey(Path(os.environ["HELD"]))
    runpy.run_module("api", run_name="__main__")
