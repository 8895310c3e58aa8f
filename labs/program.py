"""A student's program, run as its own process: what it reads and writes, and how it ends."""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

from labs.verdict import Wrong

ROOT = Path(__file__).parents[1]
LIMIT = 60  # seconds, after which a program hangs

ENVIRONMENT = {
    **os.environ,
    "PYTHONIOENCODING": "utf-8",
    "PYTHONPATH": str(ROOT),
    "NO_PROXY": "127.0.0.1,localhost",  # http_proxy is the way to other machines
    "no_proxy": "127.0.0.1,localhost",
}
ENVIRONMENT.pop("PYTHONUNBUFFERED", None)  # with it, nobody would learn what flush=True is for


class Program:
    """A running program; `output` is what it has written so far."""

    def __init__(self, file: Path, *arguments: str, stdin: str = "") -> None:
        self.file = file
        self.process = subprocess.Popen(
            [sys.executable, str(file), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
        )
        self._read = {"stdout": b"", "stderr": b""}
        self._threads = [
            threading.Thread(target=self._collect, args=(name,), daemon=True) for name in self._read
        ]
        for thread in self._threads:
            thread.start()
        try:
            self.process.stdin.write(stdin.encode())
            self.process.stdin.close()
        except OSError:
            pass  # it has ended already, and its status says why

    def _collect(self, name: str) -> None:
        while piece := os.read(getattr(self.process, name).fileno(), 4096):
            self._read[name] += piece

    @property
    def output(self) -> str:
        """As text, with Windows' line ends made plain."""
        return self._read["stdout"].decode("utf-8", "replace").replace("\r\n", "\n")

    @property
    def errors(self) -> str:
        return self._read["stderr"].decode("utf-8", "replace")

    def wait(self) -> int:
        """The exit status. Says so if the program hangs."""
        try:
            status = self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            raise Wrong(
                f"你的程序 {LIMIT} 秒还没有结束，它在等什么？",
                f"Your program has not ended after {LIMIT} seconds: what is it waiting for?",
            ) from None
        finally:
            self.kill()
        for thread in self._threads:
            thread.join()
        return status

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def last_error(self) -> str:
        """The last line of a traceback, and the line of the student's file that it leads to."""
        error = (self.errors.strip().splitlines() or ["?"])[-1]
        lines = re.findall(rf'File "{re.escape(str(self.file))}", line (\d+)', self.errors)
        return f"{error} （第 {lines[-1]} 行 · line {lines[-1]}）" if lines else error


def run(file: Path, *arguments: str, stdin: str = "") -> str:
    """What the program writes. Says so if it fails."""
    program = Program(file, *arguments, stdin=stdin)
    if program.wait():
        raise Wrong(
            f"你的程序出错结束了：{program.last_error()}",
            f"Your program ended with an error: {program.last_error()}",
        )
    return program.output


def until(condition, limit: float = LIMIT):
    """Asks again and again, and returns the first true answer, or the last."""
    end = time.monotonic() + limit
    while not (answer := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return answer
