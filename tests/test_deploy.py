"""The server on a Ray cluster, as a person starts it: two replicas, a proxy, real HTTP.

    pip install -r deploy/requirements.txt && pytest tests/test_deploy.py

What holds of api.py alone must hold through Ray's proxy, so some tests of test_api.py run here
once more. Without ray the tests skip, but not where CI is set.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from threading import Event

import psutil
import pytest
import requests
from requests.utils import default_headers

if "CI" not in os.environ:
    pytest.importorskip("ray")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="Ray is for Linux and macOS")

from test_api import (  # noqa: F401  (tests that run here as well)
    BARE,
    ENDLESS,
    HERE,
    ask,
    at_once,
    questions,
    test_a_wrong_address_or_method_is_refused_as_json,
    test_an_answer_is_chunked_text_that_nobody_may_keep_or_hold_back,
    test_each_chunk_is_one_frame_and_each_frame_begins_with_the_one_before,
    test_the_history_comes_back_in_its_form_with_this_turn_added,
    until,
)
from tests.test_clients import (  # noqa: F401
    client,
    test_a_stream_of_the_sdk_is_many_parts_with_one_id_and_one_end,
    test_the_sdk_gets_the_answer_that_the_textbook_route_gives,
    test_what_cannot_be_served_is_a_bad_request_that_names_the_field,
)
from tests.test_faults import ROUTES, V1, answer, bearer, hold, how_it_ends, post
from tests.test_readme import README

KEY = "none"  # what the clients of tests/test_clients.py send
# Small, and quick to follow the load: Ray's defaults are half a minute and ten minutes. Nor does
# it start processes beforehand, which would only take from the two cores of a small machine.
FLAGS = [
    "max-concurrency=16",
    "max-waiting=16",
    f"api-key={KEY}",
    "max-replicas=2",
    "target-ongoing-requests=2.5",
    "look-back-period-s=2",
    "upscale-delay-s=0.5",
    "downscale-delay-s=12",
]
QUICK = {
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
}
LONG = {**ENDLESS, "max_length": 400}  # an answer of some seconds


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Cluster:
    """A head, started as the README says, and what is deployed on it."""

    def __init__(self, folder):
        self.folder, self.port, port = folder, free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            **BARE,
            **QUICK,
            "RAY_TMPDIR": str(folder),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": uuid.uuid4().hex,
        }
        with open(folder / "log", "ab") as file:
            self.head = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "ray.scripts.scripts",
                    "start",
                    "--head",
                    "--block",
                    "--num-cpus=2",
                    f"--port={port}",
                    "--include-dashboard=false",
                    "--disable-usage-stats",
                ],
                cwd=HERE,
                stdout=file,
                stderr=file,
                env=self.environment,
            )
        self.environment["RAY_ADDRESS"] = f"127.0.0.1:{port}"

    def serve(self):
        """What the README says to type, with small settings."""
        until(lambda: "Ray runtime started" in self.log() or self.head.poll() is not None)
        with open(self.folder / "log", "ab") as file:
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "ray.serve.scripts",
                    "run",
                    "--non-blocking",
                    "deploy.app:deploy",
                    f"port={self.port}",
                    *FLAGS,
                ],
                cwd=HERE,
                stdout=file,
                stderr=file,
                env=self.environment,
                timeout=180,
            )
        assert f"is ready at {self.url}" in self.log(), self.log()

    def log(self):
        return (self.folder / "log").read_text("utf-8", "replace")

    def proxy_log(self):
        logs = self.folder / "ray" / "session_latest" / "logs" / "serve"
        return "".join(file.read_text("utf-8") for file in logs.glob("proxy*.log"))

    def replicas(self):
        """The processes, by their ids."""
        family = {child.pid for child in psutil.Process(self.head.pid).children(recursive=True)}
        return {
            process.pid
            for process in psutil.process_iter(["cmdline"])
            if process.pid in family
            and "".join(process.info["cmdline"] or []).startswith("ray::ServeReplica")
        }


@pytest.fixture(scope="module")
def server():
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(Path(folder))
        try:
            cluster.serve()
            yield cluster
        finally:
            head = psutil.Process(cluster.head.pid)
            family = [head, *head.children(recursive=True)]
            head.send_signal(signal.SIGINT)
            _, left = psutil.wait_procs(family, 30)
            for process in left:
                process.kill()
        assert left == []


@pytest.fixture(scope="module", autouse=True)
def key():
    """Whatever asks with `requests` here sends the key, unless it says otherwise."""

    def with_key():
        headers = default_headers()
        headers.update(bearer(KEY))
        return headers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(requests.sessions, "default_headers", with_key)
        yield


def busy(url, session):
    """How many answers are under way or waiting at the replica of that session."""
    reply = requests.get(url + "/health", headers={"x-session-id": session}, timeout=60)
    assert reply.status_code == 200
    return reply.json()["active"] + reply.json()["waiting"]


def two_sessions(url):
    """One of each replica, where there are two: what one does, the other knows nothing of."""
    with closing(post(url, headers={"x-session-id": "0"}, **ENDLESS)):
        if busy(url, "0") != 1:  # a replica has just come or gone, and sessions move
            return None
        others = [name for name in map(str, range(1, 20)) if busy(url, name) == 0]
    until(lambda: busy(url, "0") == 0)
    return others and ("0", others[0])


@contextmanager
def crowd(url, count, session=None, **fields):
    """So many requests on each route, of which nothing is read; they hang up at the end."""
    headers = bearer(KEY) | ({"x-session-id": session} if session else {})
    with ExitStack() as stack:
        for path in ROUTES * count:
            stack.enter_context(closing(hold(url, path, headers, **fields)))
        yield


@contextmanager
def readers(url, *sessions):
    """Readers who ask again and again: a list of what they got, (number, end, text)."""
    got, over = [], Event()

    def read(number):
        while not over.is_set():
            reply = post(url, headers={"x-session-id": sessions[number]}, **LONG)
            end = how_it_ends(reply)
            got.append((number, end, answer(reply) if end == "whole" else ""))

    with ThreadPoolExecutor() as pool:
        reading = [pool.submit(read, number) for number in range(len(sessions))]
        try:
            yield got
        finally:
            over.set()
    assert not any(future.result() for future in reading)  # none of them raised anything


# --- 1. One replica ----------------------------------------------------------------------------


def test_the_ten_lines_of_the_readme_print_the_whole_answer(url):
    code = re.search(r"```python\n(import requests\n.*?)```", README, re.S)[1]
    for old, new in [
        ("http://127.0.0.1:8000", url),
        ('"history": []', '"temperature": 0'),
        ("stream=True", f"stream=True, headers={bearer(KEY)}"),
    ]:
        assert old in code
        code = code.replace(old, new)
    screen = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", code], timeout=60, check=True, stdout=subprocess.PIPE
    ).stdout.decode()
    assert screen.rpartition("\r")[2].strip() == ask(url, "什么是 HTTP？", temperature=0)


@pytest.mark.parametrize("path", ROUTES)
def test_the_first_of_an_answer_comes_long_before_the_last(url, path):
    begin, arrivals = time.monotonic(), []
    with closing(post(url, path, **LONG)) as reply:
        for _ in reply.iter_content(chunk_size=None):
            arrivals.append(time.monotonic() - begin)
    assert len(arrivals) > 20 and arrivals[0] < arrivals[-1] / 4
    apart = [later - sooner > 0.01 for sooner, later in zip(arrivals, arrivals[1:])]
    assert sum(apart) > len(arrivals) / 4  # nor do they come in a few lumps


@pytest.mark.parametrize("path", ROUTES)
def test_each_route_wants_a_key(url, path):
    for headers in {"Authorization": None}, bearer("wrong"):
        reply = post(url, path, headers=headers)
        assert reply.status_code == 401 and reply.headers["WWW-Authenticate"] == "Bearer"
        assert set(reply.json()) == ({"error"} if path == V1 else {"detail"})


def test_ray_says_that_the_way_in_is_open(url):
    assert requests.get(url + "/-/healthz", timeout=60).status_code == 200


# --- 2. Two replicas ---------------------------------------------------------------------------


def test_a_second_replica_comes_with_the_load_and_no_answer_is_lost(server):
    alone = answer(post(server.url, **LONG))
    assert len(server.replicas()) == 1
    with readers(server.url, "0", "0", "0") as got:
        until(lambda: "2 replicas, 200 vnodes" in server.proxy_log())  # requests go to both
    assert len(got) > 3 and {result[1:] for result in got} == {("whole", alone)}


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_frees_the_place_at_the_replica(url, stream):
    one, other = until(lambda: two_sessions(url))
    with crowd(url, 2, one, **{**ENDLESS, "max_length": 4000, "stream": stream}):
        until(lambda: busy(url, one) == 6)
        assert busy(url, other) == 0
    until(lambda: busy(url, one) == 0, limit=5)  # to their ends it would be much longer


def test_a_full_replica_refuses_as_it_does_alone_and_the_other_goes_on(url):
    one, other = until(lambda: two_sessions(url))
    with crowd(url, 11, one, **LONG):  # one more than there are places
        until(lambda: busy(url, one) == 32)
        for path in ROUTES:
            reply = post(url, path, headers={"x-session-id": one})
            assert reply.status_code == 429 and reply.headers["Retry-After"] == "5"
            assert set(reply.json()) == ({"error"} if path == V1 else {"detail"})
        assert answer(post(url, headers={"x-session-id": other}))
    until(lambda: busy(url, one) == 0)


def test_32_clients_are_spread_over_both_replicas_and_get_what_they_would_alone(url):
    one, other = until(lambda: two_sessions(url))
    bodies = [{"prompt": prompt, "temperature": 0} for prompt in list(questions())[:8]] * 4
    alone = [ask(url, **body) for body in bodies[:8]] * 4
    assert at_once(url, bodies) == alone
    with crowd(url, 11, **LONG):
        until(lambda: busy(url, one) + busy(url, other) >= 24)
        assert busy(url, one) >= 4 and busy(url, other) >= 4
    until(lambda: busy(url, one) + busy(url, other) == 0)


def test_a_replica_killed_under_load_breaks_its_own_answers_only_and_comes_back(server):
    url, before, sessions = server.url, server.replicas(), until(lambda: two_sessions(server.url))
    alone = answer(post(url, **LONG))
    with readers(url, *sessions * 2) as got:
        until(lambda: [busy(url, session) for session in sessions] == [2, 2])
        killed = len(got)
        os.kill(min(before), signal.SIGKILL)
        until(lambda: len(server.replicas() - before) == 1)
        until(
            lambda: {number for number, end, _ in got[killed:] if end == "whole"} == {0, 1, 2, 3}
        )  # they go on all four
    broken = [number for number, end, _ in got if end != "whole"]
    assert sorted(broken) in ([0, 2], [1, 3])  # those of one session, once
    assert {text for _, end, text in got if end == "whole"} == {alone}
    until(lambda: two_sessions(url))


def test_a_replica_goes_when_the_load_is_gone_and_no_answer_is_lost(server):
    alone = answer(post(server.url, **LONG))
    with readers(server.url, *until(lambda: two_sessions(server.url))) as got:
        until(lambda: len(server.replicas()) == 1)
    assert {number for number, *_ in got} == {0, 1}
    assert {result[1:] for result in got} == {("whole", alone)}
