"""Who is compared, how each is started, and what its process costs."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import psutil

ROOT = Path(__file__).resolve().parent.parent
START_LIMIT = 300  # seconds for a server to come up
LOOK_EVERY = 0.05  # seconds between two looks at a process's memory
OURS, TEXTBOOK = "this server", "textbook"
# As many tokens of cache (512 pages of 256) and as many a step as this server has on a CPU. Left
# to itself it takes 60 % of the machine's memory, which others need.
CONTINUOUS = ["--continuous-batching", "--cb-num-blocks", "512", "--cb-max-batch-tokens", "512"]


@dataclass
class Contender:
    """A server that is started for the benchmark, or one that runs already (`url`)."""

    name: str
    style: str  # frames or openai
    command: list[str] = field(default_factory=list)  # {port} stands for the port
    model: str = ""  # the name it serves the weights by
    url: str = ""
    ready: str = ""  # what its log says when all of it is up

    def body(self, prompt: str, prompt_tokens: int, tokens: int) -> list:
        """[path, body] of a question whose answer has `tokens` tokens, sampled as by default."""
        sampling = {"top_p": 0.7, "temperature": 0.95, "stream": True}
        if self.style == "frames":
            return ["/", {"prompt": prompt, "max_length": prompt_tokens + tokens, **sampling}]
        path = urlsplit(self.url).path.rstrip("/") + "/v1/chat/completions"
        return [
            path,
            {
                "model": self.model,
                "max_tokens": tokens,
                **sampling,
                "messages": [{"role": "user", "content": prompt}],
            },
        ]


@dataclass
class Running:
    """A server that answers. `process` is None where it is not ours to look into."""

    host: str
    port: int
    process: psutil.Process | None = None

    def cpu_seconds(self) -> float:
        """Of the process and its children, since they began."""
        return sum(sum(each.cpu_times()[:2]) for each in self._family())

    def memory(self) -> int:
        """Resident bytes at this moment."""
        return sum(each.memory_info().rss for each in self._family())

    def _family(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)] if self.process else []


class PeakMemory:
    """The most resident memory seen, in bytes, while the `with` block runs."""

    def __init__(self, server: Running) -> None:
        self.server, self.peak, self._over = server, 0, threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._over.wait(LOOK_EVERY):
            try:
                self.peak = max(self.peak, self.server.memory())
            except psutil.NoSuchProcess:  # a child that ended while it was looked at
                continue

    def __enter__(self) -> "PeakMemory":
        self._watcher.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._watcher.join()


def our_server(folder: Path | None = None, quantize: str | None = None) -> Contender:
    model = ["--model", str(folder)] if folder else []
    model += ["--quantize", quantize] if quantize else []
    return Contender(OURS, "frames", [sys.executable, "api.py", "--port", "{port}", *model])


def contenders(published: Path, native: Path, running: list[str]) -> list[Contender]:
    """All that can run here; a line says what cannot, and why."""
    found = [
        our_server(published),
        Contender(
            TEXTBOOK, "frames", [sys.executable, "-m", "bench.textbook", str(published), "{port}"]
        ),
    ]
    # By its module, because the script may not be on the PATH of a virtual environment.
    serve = [
        sys.executable,
        "-m",
        "transformers.cli.transformers",
        "serve",
        str(native),
        "--host",
        "127.0.0.1",
        "--port",
        "{port}",
    ]
    if importlib.util.find_spec("openai"):
        found += [
            Contender("transformers serve", "openai", serve, str(native)),
            Contender(
                "transformers serve, continuous batching",
                "openai",
                [*serve, *CONTINUOUS],
                str(native),
            ),
        ]
    else:
        print("left out: transformers serve (pip install 'transformers[serving]' adds it)")
    return found + peers(running)


def peers(running: list[str]) -> list[Contender]:
    """Servers that run already, each given as NAME=URL."""
    found = []
    for peer in running:
        name, _, url = peer.partition("=")
        found.append(Contender(name, "openai", model=served_model(url), url=url))
    return found


def served_model(url: str) -> str:
    """The name of the first model that an OpenAI-compatible server has."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/v1/models", timeout=10) as response:
            return json.load(response)["data"][0]["id"]
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"--peer: {url} lists no model at /v1/models ({error})") from error


@contextmanager
def serving(contender: Contender) -> Iterator[Running]:
    """The contender, up and answering. Raises RuntimeError, with its last words, if it does not
    come up."""
    if contender.url:
        parts = urlsplit(contender.url)
        yield Running(parts.hostname or "", parts.port or 80)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [part.replace("{port}", str(port)) for part in contender.command]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )  # nothing may wait for the network
        try:
            if not comes_up(port, process, log, contender.ready):
                log.seek(0)
                raise RuntimeError(f"{contender.name} did not start: {log.read()[-600:].strip()}")
            yield Running("127.0.0.1", port, psutil.Process(process.pid))
        finally:
            end(process)


def comes_up(port: int, process: subprocess.Popen, log: IO[str], ready: str) -> bool:
    """Waits until GET /health says 200 and the log says `ready`, or the process has ended, or the
    time is up."""
    deadline = time.monotonic() + START_LIMIT
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                # pread leaves the place alone at which the server writes on
                if not ready or ready.encode() in os.pread(log.fileno(), 2**24, 0):
                    return True
        except (OSError, urllib.error.URLError):
            pass
        time.sleep(0.2)
    return False


def end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
