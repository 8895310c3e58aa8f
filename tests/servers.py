"""The servers that the tests talk with: real processes, real HTTP, and a model that can be held.

A test waits for states (`until`), never for a time. Where something must still be under way while
the test does something else, it holds the model, and lets as many steps through as it wants. So no
test depends on how fast the machine is, or on what else runs there.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

HERE = Path(__file__).parents[1]
BARE = {name: value for name, value in os.environ.items() if not name.startswith("CHATGLM_")}
LIMIT = 600  # seconds, for whatever must come at some time: a slow, busy machine is no failure
API = ("-m", "tests.held")  # api.py, with a model that can be held
SHARED = []  # the servers that run for more than one test


def until(condition, limit=LIMIT):
    """Asks again and again, and returns the first answer that is true; fails after `limit` s."""
    end = time.monotonic() + limit
    while not (answer := condition()):
        assert time.monotonic() < end, f"not within {limit} s"
        time.sleep(0.02)
    return answer


def health(url):
    return requests.get(url + "/health", timeout=LIMIT).json()


def busy(url):
    return health(url)["active"] + health(url)["waiting"]


def refuses_connections(url):
    try:
        socket.create_connection(url.removeprefix("http://").split(":"), LIMIT).close()
    except ConnectionRefusedError:
        return True


class Server:
    """A process with a url and a log, in which a test finds no Traceback unless it says so."""

    may_fail = False

    def __init__(self, *command, **environment):
        self.command, self.environment = command, environment

    def start(self):
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        with open(self.folder / "log", "wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *self.command, "--port", "0"],
                cwd=HERE,
                stdout=file,
                stderr=file,
                env={**BARE, "HELD": str(self.folder), **self.environment},
            )
        until(lambda: " on http" in self.log() or not self.runs())
        assert self.runs(), self.log()
        self.url = re.search(r" on (http://\S+)", self.log())[1]
        until(lambda: health(self.url))

    def log(self):
        return (self.folder / "log").read_text("utf-8", errors="replace")

    def runs(self):
        return self.process.poll() is None

    def send_signal(self, number):
        self.process.send_signal(number)

    def interrupt(self):
        if self.runs():
            self.send_signal(signal.SIGINT) if os.name == "posix" else self.process.terminate()

    def wait(self):
        """The exit status, as soon as there is one."""
        return self.process.wait(LIMIT)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def close(self):
        """Nothing is left of it, whatever it does."""
        self.kill()
        self._folder.cleanup()

    def restart(self):
        self.close()
        self.start()

    def check(self):
        """No test leaves a request behind; one that does has failed."""
        try:
            until(lambda: busy(self.url) == 0)
            assert self.may_fail or "Traceback" not in self.log()
        except (AssertionError, requests.RequestException):
            self.restart()
            raise

    @contextmanager
    def held(self):
        """Meanwhile the model makes the steps alone that are let through."""
        hold = self.folder / "hold"
        hold.touch()
        try:
            yield
        finally:
            for file in [hold, *self.folder.glob("step-*")]:
                file.unlink(missing_ok=True)

    def let(self, steps):
        """Lets so many steps through, and returns when the model has begun the last of them."""
        for number in range(steps):
            (self.folder / f"step-{number}").touch()
        until(lambda: not any(self.folder.glob("step-*")))

    def step(self, most=1):
        """Lets some steps through, if there are any to make: for a condition of `until`, which
        looks fifty times a second."""
        for number in range(most):
            (self.folder / f"step-{number}").touch()


@contextmanager
def started(*command, **environment):
    """A server of one's own, ended by Ctrl-C if it still runs."""
    server = Server(*command, **environment)
    try:
        server.start()
        yield server
        server.interrupt()
        server.wait()  # raises where it does not end
    finally:
        server.close()


@contextmanager
def shared(*command, **environment):
    """The same for many tests: started anew when one of them has failed."""
    with started(*command, **environment) as server:
        SHARED.append(server)
        try:
            yield server
        finally:
            SHARED.remove(server)


def started_with(*options):
    """For a test in tests/: the server that it gets has these flags."""
    return pytest.mark.parametrize("server", [options], indirect=True, ids=[" ".join(options)])
