"""The other end of host.py: a student's server, as a check sees it."""

import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

from labs.program import ENVIRONMENT, ROOT, until
from labs.verdict import Wrong

PATIENCE = 8  # seconds
SESSION = requests.Session()
SESSION.trust_env = False  # http_proxy is the way to other machines


class HostProcess:
    """A process that runs one student's server after another."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()
        # One thread for torch: what is measured is then the server, not the number of cores.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "labs.host"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        )

    def __call__(self, command: str, **options) -> dict:
        try:
            self._process.stdin.write((json.dumps([command, options]) + "\n").encode())
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except OSError:
            answer = b""
        if answer:
            return json.loads(answer)
        self._errors.seek(0)
        last = (self._errors.read().decode("utf-8", "replace").strip().splitlines() or ["?"])[-1]
        raise Wrong(f"服务器进程结束了：{last}", f"The server's process has ended: {last}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._errors.close()


SHARED: list[HostProcess] = []  # the tests run many checks with one process


@contextmanager
def hosted(file: Path, model: bool = False) -> Iterator["Hosted"]:
    """The student's server, running. `model`: it uses the tiny ChatGLM, which can be held."""
    host = SHARED[0] if SHARED else HostProcess()
    try:
        loaded = host("load", file=os.fspath(file), model=model)
        if "error" in loaded:
            raise Wrong(
                f"你的服务器启动不了：{loaded['error']}",
                f"Your server does not start: {loaded['error']}",
            )
        yield Hosted(host, loaded["url"])
        host("unload")
    finally:
        if not SHARED:
            host.close()


class Hosted:
    def __init__(self, host: HostProcess, url: str) -> None:
        self.host, self.url = host, url

    def state(self) -> dict:
        return self.host("state")

    def error(self, is_broken: bool) -> str:
        """Why the last request failed, if it did. A client may know sooner that it did."""
        return until(lambda: self.state()["error"], PATIENCE if is_broken else 0)

    def request(self, method: str, path: str, **options) -> requests.Response:
        return SESSION.request(method, self.url + path, timeout=60, **options)

    def require_status(self, response: requests.Response, status: int, what: str) -> None:
        if response.status_code != status:
            error = self.error(response.status_code == 500)
            because_zh, because_en = (
                (f"，因为 {error}", f", because of {error}") if error else ("", "")
            )
            raise Wrong(
                f"{what} 应该得到 {status}，却得到 {response.status_code}{because_zh}。",
                f"{what} should get {status}, and got {response.status_code}{because_en}.",
            )


class Reader:
    """A client that reads a streamed answer in a thread, and can hang up."""

    def __init__(self, url: str, **body) -> None:
        self.data, self.pieces, self.ended, self.whole = b"", 0, False, False
        self._connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=120)
        self._thread = threading.Thread(target=self._read, args=(body,), daemon=True)
        self._thread.start()

    def _read(self, body: dict) -> None:
        try:
            headers = {"Content-Type": "application/json"}
            self._connection.request("POST", "/", json.dumps(body), headers)
            response = self._connection.getresponse()
            while piece := response.read1():
                self.data += piece
                self.pieces += 1
            self.whole = response.status == 200
        except (OSError, http.client.HTTPException):
            pass  # broken off
        finally:
            self.ended = True

    @property
    def text(self) -> str:
        return self.data.decode("utf-8", "replace")

    @property
    def answer(self) -> str:
        """The text of the last frame."""
        return self.text.rpartition("<^>")[2]

    def hang_up(self) -> None:
        self._connection.sock.shutdown(socket.SHUT_RDWR)

    def wait(self) -> "Reader":
        until(lambda: self.ended, 120)
        return self
