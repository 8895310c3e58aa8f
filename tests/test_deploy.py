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
    ENDLESS,
    ask,
    at_once,
    questions,
    test_a_wrong_address_or_method_is_refused_as_json,
    test_an_answer_is_chunked_text_that_nobody_may_keep_or_hold_back,
    test_each_chunk_is_one_frame_and_each_frame_begins_with_the_one_before,
    test_the_history_comes_back_in_its_form_with_this_turn_added,
)
from tests.servers import BARE, HERE, LIMIT, SHARED, Server, until
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
    "downscale-delay-s=1",
]
QUICK = {
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
}
# On a slow machine the way in is not dead because it takes more than 5 or 10 seconds to say that it
# lives: Ray would end it, and with it what is under way.
PATIENT = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": str(LIMIT),
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": str(LIMIT),
    # Nor is a replica full because it takes more than 0.1 s to say how much it has. What belongs
    # there would be sent to another.
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": str(LIMIT),
    "RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S": str(LIMIT),
}
LONG = {**ENDLESS, "max_length": 200}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Cluster(Server):
    """A head, started as the README says, and what is deployed on it."""

    def start(self):
        self._folder = tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True)
        self.folder, self.port, port = Path(self._folder.name), free_port(), free_port()
        self.url, self.is_fixed = f"http://127.0.0.1:{self.port}", False
        self.environment = {
            **BARE,
            **QUICK,
            **PATIENT,
            "HELD": str(self.folder),
            "RAY_TMPDIR": str(self.folder),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": uuid.uuid4().hex,
        }
        options = [
            "--head",
            "--block",
            "--num-cpus=2",
            f"--port={port}",
            f"--ray-client-server-port={free_port()}",
            "--min-worker-port=0",  # any that are free: there may be another cluster here
            "--max-worker-port=0",
            "--include-dashboard=false",
            "--disable-usage-stats",
        ]
        with open(self.folder / "log", "ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", *options],
                cwd=HERE,
                stdout=file,
                stderr=file,
                env=self.environment,
            )
        self.environment["RAY_ADDRESS"] = f"127.0.0.1:{port}"
        until(lambda: "Ray runtime started" in self.log() or not self.runs())
        self.serve()

    def serve(self, *flags):
        """What the README says to type, with small settings."""
        command = ["run", "--non-blocking", "tests.held_deploy:deploy", f"port={self.port}"]
        for _ in range(5):
            before = self.log()
            with open(self.folder / "log", "ab") as file:
                subprocess.run(
                    [sys.executable, "-m", "ray.serve.scripts", *command, *FLAGS, *flags],
                    cwd=HERE,
                    stdout=file,
                    stderr=file,
                    env=self.environment,
                    timeout=2 * LIMIT,
                )
            told = self.log().removeprefix(before)
            if "HTTP proxies not available after" not in told:  # Ray gives up after 60 s
                break
        assert f"is ready at {self.url}" in told, told

    def check(self):
        """No test leaves a request behind, at any replica."""
        sessions = map(str, range(10))
        until(lambda: not any(busy(self.url, session) for session in sessions))

    def close(self):
        head = psutil.Process(self.process.pid)
        family = [head, *head.children(recursive=True)]
        head.send_signal(signal.SIGINT)
        _, left = psutil.wait_procs(family, LIMIT)
        for process in left:
            process.kill()
        self._folder.cleanup()
        assert left == []

    def known(self):
        """How many replicas the way in sends requests to, as it last said."""
        logs = self.folder / "ray" / "session_latest" / "logs" / "serve"
        text = "".join(file.read_text("utf-8") for file in logs.glob("proxy*.log"))
        return int(re.findall(r"(\d+) replicas, \d+ vnodes", text)[-1])

    def replicas(self):
        """The processes, by their ids."""
        family = {child.pid for child in psutil.Process(self.process.pid).children(recursive=True)}
        return {
            process.pid
            for process in psutil.process_iter(["cmdline"])
            if process.pid in family
            and "".join(process.info["cmdline"] or []).startswith("ray::ServeReplica")
        }


@pytest.fixture(scope="module")
def server():
    cluster = Cluster()
    cluster.start()
    SHARED.append(cluster)
    yield cluster
    SHARED.remove(cluster)
    cluster.close()


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
    reply = requests.get(url + "/health", headers={"x-session-id": session}, timeout=LIMIT)
    assert reply.status_code == 200
    return reply.json()["active"] + reply.json()["waiting"]


def one_of_each(url):
    """Sessions of a replica that has something to do and of one that has not, if there are both:
    what one does, the other knows nothing of."""
    names = {bool(busy(url, name)): name for name in map(str, range(20))}
    return len(names) == 2 and (names[True], names[False])


@pytest.fixture
def sessions(server):
    """One of each replica, of which there are two whatever the load."""
    if not server.is_fixed:  # it may have been started anew
        before = server.replicas()
        server.serve("min-replicas=2")
        until(lambda: len(server.replicas() - before) == 2 and not server.replicas() & before)
        until(lambda: server.known() == 2)
        server.is_fixed = True
    with server.held(), crowd(server.url, 1, "0", **LONG):
        until(lambda: busy(server.url, "0") == 3)
        return until(lambda: one_of_each(server.url))


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


def test_the_sample_of_the_readme_prints_the_whole_answer(url):
    code = re.search(r"```python\n(import requests\n.*?)```", README, re.S)[1]
    for old, new in [
        ("http://127.0.0.1:8000", url),
        ('"history": []', '"temperature": 0'),
        ("stream=True", f"stream=True, headers={bearer(KEY)}"),
    ]:
        assert old in code
        code = code.replace(old, new)
    screen = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", code],
        timeout=LIMIT,
        check=True,
        stdout=subprocess.PIPE,
    ).stdout.decode()
    assert screen.strip() == ask(url, "什么是 HTTP？", temperature=0)


@pytest.mark.parametrize("path", ROUTES)
def test_an_answer_comes_while_it_is_made(server, url, path):
    with server.held(), closing(post(url, path, **LONG)) as reply:
        parts = reply.iter_content(chunk_size=None)
        for _ in range(3):
            server.let(20)
            assert next(parts)


@pytest.mark.parametrize("path", ROUTES)
def test_each_route_wants_a_key(url, path):
    for headers in {"Authorization": None}, bearer("wrong"):
        reply = post(url, path, headers=headers)
        assert reply.status_code == 401 and reply.headers["WWW-Authenticate"] == "Bearer"
        assert set(reply.json()) == ({"error"} if path == V1 else {"detail"})


def test_ray_says_that_the_way_in_is_open(url):
    assert requests.get(url + "/-/healthz", timeout=LIMIT).status_code == 200


# --- 2. As many replicas as the load wants -------------------------------------------------------


def test_replicas_come_and_go_with_the_load_and_no_answer_is_lost(server):
    url, alone = server.url, answer(post(server.url, **LONG))
    assert len(server.replicas()) == 1
    with ExitStack() as stack:
        with server.held():
            with crowd(url, 1, "0", **LONG):  # three requests are too many for one replica
                until(lambda: busy(url, "0") == 3)  # else one that is not there yet looks like none
                sessions = until(lambda: one_of_each(url))
                got = stack.enter_context(readers(url, *sessions))
                until(lambda: [busy(url, session) for session in sessions] == [4, 1])
            until(lambda: [busy(url, session) for session in sessions] == [1, 1])
        until(lambda: len(server.replicas()) == 1)  # two are few enough
    assert {number for number, *_ in got} == {0, 1}
    assert {result[1:] for result in got} == {("whole", alone)}


# --- 3. Two replicas ---------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_frees_the_place_at_the_replica(server, url, sessions, stream):
    one, other = sessions
    with server.held():
        with crowd(url, 2, one, **{**LONG, "stream": stream}):
            until(lambda: busy(url, one) == 6)
            assert busy(url, other) == 0
        until(lambda: busy(url, one) == 0)


def test_a_full_replica_refuses_as_it_does_alone_and_the_other_goes_on(server, url, sessions):
    one, other = sessions
    with server.held(), ExitStack() as stack:
        with crowd(url, 11, one, **LONG):  # one more than there are places
            until(lambda: busy(url, one) == 32)
            for path in ROUTES:
                reply = post(url, path, headers={"x-session-id": one})
                assert reply.status_code == 429 and reply.headers["Retry-After"] == "5"
                assert set(reply.json()) == ({"error"} if path == V1 else {"detail"})
            reply = stack.enter_context(closing(post(url, headers={"x-session-id": other})))
            assert reply.status_code == 200 and busy(url, other) == 1
        until(lambda: busy(url, one) == 0)
    assert answer(post(url, headers={"x-session-id": one}))


def test_32_clients_are_spread_over_both_replicas_and_get_what_they_would_alone(
    server, url, sessions
):
    one, other = sessions
    bodies = [{"prompt": prompt, "temperature": 0} for prompt in list(questions())[:8]] * 4
    alone = [ask(url, **body) for body in bodies[:8]] * 4
    assert at_once(url, bodies) == alone
    with server.held(), crowd(url, 11, **LONG):
        until(lambda: busy(url, one) + busy(url, other) >= 32)
        assert busy(url, one) >= 4 and busy(url, other) >= 4


def test_a_replica_killed_under_load_breaks_its_own_answers_only_and_comes_back(server, sessions):
    url, before = server.url, server.replicas()
    alone = answer(post(url, **LONG))
    with ExitStack() as stack:
        with server.held():
            got = stack.enter_context(readers(url, *sessions * 2))
            until(lambda: [busy(url, session) for session in sessions] == [2, 2])
            os.kill(min(before), signal.SIGKILL)
            until(lambda: len(server.replicas() - before) == 1)
            until(lambda: len(got) >= 2)
        until(lambda: {number for number, end, _ in got if end == "whole"} == {0, 1, 2, 3})
    broken = [number for number, end, _ in got if end != "whole"]
    # Those of one replica, once. They are of one session, unless the way in found a replica slow.
    assert len(broken) == len(set(broken)) == 2
    assert {text for _, end, text in got if end == "whole"} == {alone}
