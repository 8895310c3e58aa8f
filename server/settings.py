"""The server's settings. Each is a flag, and an environment variable of the same name:

    python api.py --max-waiting 8
    CHATGLM_MAX_WAITING=8 uvicorn api:app

A flag wins over an environment variable, and that over the default.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn


def is_on(text: str) -> bool:
    return text.lower() not in ("", "0", "false", "no", "off")


def flag(default: Any, text: str, least: float | None = None, **options: Any) -> Any:
    """A field of `Settings`: its default, what --help says, its smallest value, and what else
    argparse should know."""
    options = {"help": text, "type": str, **options}
    return field(default=default, metadata={"least": least, "options": options})


@dataclass
class Settings:
    """Raises ValueError, naming the flag, if a value cannot be used."""

    model: str | None = flag(
        None, "a folder or a hub id (default: the tiny ChatGLM in chatglm/tiny)"
    )
    served_model_name: str | None = flag(None, "what clients see (default: the folder's name)")
    device: str = flag("auto", "auto, cuda, cuda:1, mps or cpu")
    dtype: str = flag("auto", "auto, bfloat16, float16 or float32")
    quantize: str | None = flag(None, "int8 or int4: smaller weights, for a small GPU")
    devices: int = flag(1, "GPUs of this machine to share the network out over", 1, type=int)
    chat_format: str | None = flag(None, "chatglm2 or chatglm3, where the checkpoint does not say")
    host: str = flag("127.0.0.1", "0.0.0.0 lets other machines in")
    port: int = flag(8000, "the port to listen on", 0, type=int)
    api_key: str | None = flag(None, "the key that clients must send, or a file with one a line")
    cors_origin: str = flag("", "pages that browsers let in: https://a.example,https://b.org")
    max_concurrency: int = flag(64, "answers under way at once", 1, type=int)
    max_waiting: int = flag(
        256, "requests that wait for a place; more are refused with 429", 0, type=int
    )
    max_length: int | None = flag(
        None, "ceiling for a request's max_length (default: the context)", 1, type=int
    )
    max_body: int = flag(2**20, "bytes of a request", 1, type=int)
    timeout: float = flag(600.0, "seconds one answer may take", 0.1, type=float)
    grace: float = flag(30.0, "seconds for answers under way to end, after SIGTERM", 0, type=float)
    log_prompts: bool = flag(False, "log what users ask", type=is_on, nargs="?", const="1")

    def __post_init__(self) -> None:
        for setting in fields(self):
            least, value = setting.metadata["least"], getattr(self, setting.name)
            if least is None or value is None:
                continue
            if not value >= least:  # unlike `value < least`, this also refuses NaN
                name = setting.name.replace("_", "-")
                raise ValueError(f"argument --{name}: must be at least {least}, not {value}")
        self.keys = read_keys(self.api_key)
        if self.api_key is not None and not self.keys:
            raise ValueError("argument --api-key: contains no key")

    @property
    def origins(self) -> list[str]:
        return self.cors_origin.replace(",", " ").split()

    @property
    def model_name(self) -> str:
        """What clients see: not the server's folders."""
        if self.served_model_name:
            return self.served_model_name
        model = self.model or "chatglm3-tiny"
        return Path(model).absolute().name if Path(model).exists() else model


def read_keys(api_key: str | None) -> list[bytes]:
    """The keys in a file of that name; if there is no such file, it is a key itself."""
    if api_key is None:
        return []
    text = api_key
    if os.path.isfile(api_key):
        text = Path(api_key).read_text("utf-8", "replace")
    return [key.encode() for key in text.split()]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Ends the process with one line; argparse itself would print its usage before."""
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def parse_settings(arguments: list[str]) -> Settings:
    """Settings from flags and the environment. Ends the process if they cannot be used."""
    parser = Parser(prog="api.py", description="A ChatGLM chat server", allow_abbrev=False)
    for setting in fields(Settings):
        options = dict(setting.metadata["options"])
        variable = f"CHATGLM_{setting.name.upper()}"
        options["default"] = os.environ.get(variable) or setting.default
        options["help"] += f" [{variable}]"
        parser.add_argument("--" + setting.name.replace("_", "-"), **options)
    try:
        return Settings(**vars(parser.parse_args(arguments)))
    except (OSError, ValueError) as error:
        parser.error(str(error))
