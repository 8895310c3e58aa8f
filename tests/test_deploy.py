"""The server on a Ray cluster, as a person starts it: two replicas, a proxy, real HTTP.

    pip install -r deploy/requirements.txt && pytest tests/test_deploy.py

What holds of api.py alone must hold through Ray's proxy, so some tests of test_api.py run here
once more. Without ray the tests skip, but not where CI is set.
"""

import json
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
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from pathlib import Path
from threading import Event

import psutil
import pytest
import requests

if "CI" not in os.environ:
    pytest.importorskip("ray")

from test_api import (  # noqa: F401  (tests that run here as well)
    BARE, ENDLESS, HERE, ask, at_once, questions, until,
    test_a_wrong_address_or_method_is_refused_as_json,
    test_an_answer_is_chunked_text_that_nobody_may_keep_or_hold_back,
    test_each_chunk_is_one_frame_and_each_frame_begins_with_the_one_before,
    test_the_history_comes_back_in_its_form_with_this_turn_added)
from tests.test_clients import (  # noqa: F401
    client, test_a_stream_of_the_sdk_is_many_parts_with_one_id_and_one_end,
    test_the_sdk_gets_the_answer_that_the_textbook_route_gives,
    test_what_cannot_be_served_is_a_bad_request_that_names_the_field)
from tests.test_faults import V1, ROUTES, answer, bearer, body_for, crowd, how_it_ends, post
from tests.test_readme import README

FAST = {  # Ray reports load every 10 s, looks back 30 s and waits 10 minutes; no test could wait
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5"}
SMALL = ["max-concurrency=16", "max-waiting=16"]
LONG = {**ENDLESS, "max_length": 400}  # an answer of some seconds


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Cluster:
    """A head, started as the README says, and what is deployed on it."""

    def __init__(self, folder):
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        gcs = f"127.0.0.1:{free_port()}"
        self.environment = {**BARE, **FAST, "RAY_ADDRESS": gcs, "RAY_TMPDIR": str(folder),
                            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex,
                            "RAY_USAGE_STATS_ENABLED": "0"}
        self.head = self.run("ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=4",
                             f"--port={gcs.split(':')[1]}", "--include-dashboard=false",
                             RAY_ADDRESS="")
        until(lambda: "Ray runtime started" in self.log() or self.head.poll() is not None)
        assert self.head.poll() is None, self.log()

    def run(self, module, *command, **environment):
        with open(self.folder / "log", "ab") as file:
            return subprocess.Popen([sys.executable, "-m", module, *command], cwd=HERE,
                                    stdout=file, stderr=file,
                                    env={**self.environment, **environment})

    def serve(self, *flags):
        """What the README says to type."""
        run = self.run("ray.serve.scripts", "run", "--non-blocking", "deploy.app:deploy",
                       f"port={self.port}", *flags)
        assert run.wait(180) == 0 and "Traceback" not in self.log(), self.log()

    def log(self):
        return (self.folder / "log").read_text("utf-8", "replace")

    def replicas(self):
        """The processes, by their ids."""
        return {process.pid for process in psutil.Process(self.head.pid).children(recursive=True)
                if "".join(process.cmdline()).startswith("ray::ServeReplica")}


@pytest.fixture(scope="module")
def server():
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(Path(folder))
        family = []
        try:
            cluster.serve("min-replicas=2", "max-replicas=2", *SMALL)
            yield cluster
        finally:
            family = psutil.Process(cluster.head.pid).children(recursive=True)
            import shutil; shutil.copy(cluster.folder / "log", "/tmp/w/cluster.log")
            cluster.head.send_signal(signal.SIGINT)
            _, left = psutil.wait_procs([psutil.Process(cluster.head.pid), *family], 30)
            for process in left:
                process.kill()
        assert left == []


def of(session, key="none"):
    """The headers of a request that goes to that session's replica."""
    return {"x-session-id": session, **bearer(key)}


def active(url, session, key="none"):
    """How many answers are under way at the replica of that session."""
    reply = requests.get(url + "/health", headers=of(session, key), timeout=60)
    assert reply.status_code == 200
    return reply.json()["active"]


def two_sessions(url):
    """One of each replica, where both are up: what is under way at one is not at the other."""
    with closing(post(url, headers=of("0"), **ENDLESS)):
        assert active(url, "0") == 1
        others = [name for name in map(str, range(1, 30)) if active(url, name) == 0]
    until(lambda: active(url, "0") == 0)
    return others and ("0", others[0])


def at(session, url, path="/", **fields):
    """A connection with the request sent and nothing read."""
    connection = HTTPConnection(url.removeprefix("http://"), timeout=60)
    connection.request("POST", path, json.dumps(body_for(path, **fields)), of(session))
    return connection


def test_the_ten_lines_of_the_readme_print_the_whole_answer(url):
    code = re.search(r"```python\n(import requests\n.*?)```", README, re.S)[1]
    for old, new in ("http://127.0.0.1:8000", url), ('"history": []', '"temperature": 0'):
        assert old in code
        code = code.replace(old, new)
    screen = subprocess.run([sys.executable, "-X", "utf8", "-c", code], timeout=60, check=True,
                            stdout=subprocess.PIPE).stdout.decode()
    assert screen.rpartition("\r")[2].strip() == ask(url, "什么是 HTTP？", temperature=0)


@pytest.mark.parametrize("path", ROUTES)
def test_the_first_of_an_answer_comes_long_before_the_last(url, path):
    begin, arrivals = time.monotonic(), []
    with closing(post(url, path, **LONG)) as reply:
        for _ in reply.iter_content(chunk_size=None):
            arrivals.append(time.monotonic() - begin)
    assert len(arrivals) > 50 and arrivals[0] < arrivals[-1] / 4
    middle = [arrival for arrival in arrivals if 0.25 < arrival / arrivals[-1] < 0.75]
    assert len(middle) > len(arrivals) / 4  # nor do they come in a few lumps


def test_who_hangs_up_frees_the_place_at_the_replica_streamed_or_whole(url):
    one, other = until(lambda: two_sessions(url))
    with ExitStack() as stack:
        for path in ROUTES:
            for stream in True, False:
                endless = {**ENDLESS, "max_length": 4000, "stream": stream}  # six fit the cache
                stack.enter_context(closing(at(one, url, path, **endless)))
        until(lambda: active(url, one) == 6)
        assert active(url, other) == 0
    until(lambda: active(url, one) == 0, limit=5)  # to their ends it would be much longer


def test_a_full_replica_refuses_as_it_does_alone_and_the_other_goes_on(url):
    one, other = until(lambda: two_sessions(url))
    with ExitStack() as stack:
        for _ in range(32):
            stack.enter_context(closing(at(one, url, **LONG)))
        until(lambda: requests.get(url + "/health", headers=of(one)).json()["waiting"] == 16)
        for path in ROUTES:
            reply = post(url, path, headers=of(one))
            assert reply.status_code == 429 and reply.headers["Retry-After"] == "5"
            assert set(reply.json()) == ({"error"} if path == V1 else {"detail"})
        assert answer(post(url, headers=of(other)))
    until(lambda: active(url, one) == 0)


def test_32_clients_are_spread_over_both_replicas_and_get_what_they_would_alone(url):
    one, other = until(lambda: two_sessions(url))
    bodies = [{"prompt": prompt, "temperature": 0} for prompt in list(questions())[:8]] * 4
    alone = [ask(url, **body) for body in bodies[:8]] * 4
    assert at_once(url, bodies) == alone
    with crowd(url, 32, max_length=400):
        until(lambda: active(url, one) + active(url, other) >= 24)
        assert active(url, one) >= 4 and active(url, other) >= 4
    until(lambda: active(url, one) + active(url, other) == 0)


def test_a_replica_killed_under_load_breaks_its_own_answers_only_and_comes_back(server):
    url, sessions = server.url, until(lambda: two_sessions(server.url))
    before, alone = server.replicas(), [answer(post(url, path, **LONG)) for path in ROUTES * 2]
    with ThreadPoolExecutor(24) as pool:
        replies = {session: [post(url, path, headers=of(session), **LONG) for path in ROUTES * 2]
                   for session in sessions}
        for session in sessions:
            assert active(url, session) == 6
        os.kill(min(before), signal.SIGKILL)
        again = [pool.submit(ask, url, temperature=0) for _ in range(8)]
        ends = {session: [end.result() for end in [pool.submit(how_it_ends, r) for r in got]]
                for session, got in replies.items()}
        assert sorted(set(map(tuple, ends.values()))) == [("broken off",) * 6, ("whole",) * 6]
        survivor = next(session for session in sessions if ends[session][0] == "whole")
        assert [answer(reply) for reply in replies[survivor]] == alone
        assert len({reply.result() for reply in again}) == 1
    until(lambda: len(server.replicas()) == 2)
    assert before & server.replicas() and before != server.replicas()
    until(lambda: two_sessions(url))


def test_replicas_come_and_go_with_the_load_and_no_answer_is_lost(server):
    server.serve("max-replicas=2", "target-ongoing-requests=3", "look-back-period-s=2",
                 "upscale-delay-s=1", "downscale-delay-s=1", "api-key=secret")
    url, over = server.url, Event()
    until(lambda: requests.post(url, json={"prompt": "Hello"}).status_code == 401)
    until(lambda: len(server.replicas()) == 1)
    print("one", time.time())
    def ask_long():
        return answer(post(url, headers=bearer("secret"), **LONG))

    def reader(number):
        """Asks again and again until the load is over; whoever has number 0, a while longer."""
        answers = []
        while not over.is_set() or number == 0 and len(server.replicas()) == 2:
            answers.append(ask_long())
        return answers

    with ThreadPoolExecutor(6) as pool:
        readers = [pool.submit(reader, number) for number in range(6)]
        until(lambda: len(server.replicas()) == 2)
        print("two", time.time())
        until(lambda: 0 < active(url, "0", "secret") < 6)
        over.set()
        print("over", time.time())
        answers = [text for reader in readers for text in reader.result()]
    assert len(server.replicas()) == 1 and len(answers) > 12
    assert set(answers) == {ask_long()}
