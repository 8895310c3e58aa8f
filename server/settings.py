"""The server's settings. Each is a flag, and an environment variable of the same name:

    python api.py --max-waiting 8
    CHATGLM_MAX_WAITING=8 uvicorn api:app

A flag wins over an environment variable, and that over the default.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from server.keys import read_keys


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
    adapter: str | None = flag(
        None, "a folder or a hub id: LoRA or P-Tuning v2, trained on top of the model"
    )
    served_model_name: str | None = flag(None, "what clients see (default: the folder's name)")
    device: str = flag("auto", "auto, cuda, cuda:1, mps or cpu")
    dtype: str = flag("auto", "auto, bfloat16, float16 or float32")
    quantize: str | None = flag(None, "int8 or int4: smaller weights, for a small GPU")
    devices: int = flag(1, "GPUs of this machine to share the network out over", 1, type=int)
    chat_format: str | None = flag(None, "chatglm2 or chatglm3, where the checkpoint does not say")
    host: str = flag("127.0.0.1", "0.0.0.0 lets other machines in")
    port: int = flag(8000, "the port to listen on", 0, type=int)
    api_key: str | None = flag(None, "the key that clients must send")
    api_key_file: str | None = flag(None, "a file of such keys, one a line; # begins a comment")
    cors_origin: str = flag("", "pages that browsers let in: https://a.example,https://b.org")
    allowed_host: str = flag("", "names of this server, besides localhost: chat.example")
    trusted_proxy: str = flag("", "addresses of proxies that say who asks: 10.0.0.1,10.1.0.0/16")
    max_concurrency: int = flag(64, "answers under way at once", 1, type=int)
    max_waiting: int = flag(
        256, "requests that wait for a place; more are refused with 429", 0, type=int
    )
    max_length: int | None = flag(
        None, "ceiling for a request's max_length (default: the context)", 1, type=int
    )
    max_connections: int = flag(512, "connections at once", 1, type=int)
    max_body: int = flag(2**20, "bytes of a request", 1, type=int)
    separate_caches: bool = flag(
        False, "clients share no cached prefixes", type=is_on, nargs="?", const="1"
    )
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
        self.keys = read_keys(self.api_key, self.api_key_file)

    @property
    def origins(self) -> list[str]:
        return self.cors_origin.replace(",", " ").split()

    @property
    def hosts(self) -> list[str]:
        return self.allowed_host.lower().replace(",", " ").split()

    @property
    def proxies(self) -> list[str]:
        return self.trusted_proxy.replace(",", " ").split()

    @property
    def model_name(self) -> str:
        """As clients see it: of a folder its name alone, as where it lies is nobody's business."""
        if self.served_model_name:
            return self.served_model_name
        if self.model and os.path.isdir(self.model):
            return Path(self.model).resolve().name
        return self.model or "chatglm3-tiny"


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
        given = os.environ.get(variable)
        # An empty variable means the default, but an empty key must not open the server.
        may_be_empty = setting.name in ("api_key", "api_key_file")
        options["default"] = given if given or (given == "" and may_be_empty) else setting.default
        options["help"] += f" [{variable}]"
        parser.add_argument("--" + setting.name.replace("_", "-"), **options)
    parsed = parser.parse_args(arguments)
    try:
        settings = Settings(**vars(parsed))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if parsed.api_key is not None and parsed.api_key != os.environ.get("CHATGLM_API_KEY"):
        print(advice(parsed.api_key), file=sys.stderr)
    return settings


def advice(api_key: str) -> str:
    """What to write instead of a key on the command line."""
    if os.path.isfile(api_key.removeprefix("@")):
        return f"{api_key} is read as a file of keys; write --api-key-file"
    return "the list of processes shows --api-key; CHATGLM_API_KEY or --api-key-file hides a key"
