"""The server's tests: a real server on a free port, real HTTP.

    pytest test_api.py

One server answers most of them, started once. What an answer should be comes from the claims of
the interface (a frame holds the whole text so far, temperature 0 is greedy, ...) and from the
corpus, never from a copy of what the model said: the tests outlive its weights.
"""

import inspect
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.client import HTTPResponse

import pytest
import requests
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

import api
import chatglm
from tests.servers import (
    API,
    BARE,
    HERE,
    LIMIT,
    busy,
    health,
    refuses_connections,
    shared,
    started,
    until,
)

TINY = HERE / "chatglm" / "tiny"
COUNT, FRAME = "Count from 1 to 100", "给我看一帧带标记的流式数据"
WILD = {"temperature": 2, "top_p": 1}  # every token can come, so two answers are never alike
# A penalty under 1 is a reward for saying it again: the answer goes on until the context is full.
ENDLESS = {"prompt": COUNT, "temperature": 0, "repetition_penalty": 0.5, "max_length": 8192}


@pytest.fixture(scope="module")
def server():
    with shared(*API, "--log-prompts") as server:
        yield server


def ask(url, prompt="Hello", **fields):
    """The answer in one piece."""
    body = {"prompt": prompt, "stream": False, **fields}
    reply = requests.post(url, json=body, timeout=LIMIT)
    assert reply.status_code == 200, reply.text
    return reply.json()["response"]


def at_once(url, bodies):
    with ThreadPoolExecutor(64) as pool:
        return list(pool.map(lambda body: ask(url, **body), bodies))


def chunks(url, prompt, **fields):
    """The HTTP chunks of the streamed answer as they come: with None, requests joins none."""
    body = {"prompt": prompt, **fields}
    with requests.post(url, json=body, stream=True, timeout=LIMIT) as reply:
        assert reply.status_code == 200, reply.text
        for chunk in reply.iter_content(chunk_size=None):
            yield chunk.decode("utf-8")  # raises where a chunk ends inside a character


def unescape(text):
    return re.sub("<\\^(\u200b*)\u200b>", "<^\\1>", text)


def textbook_client(url, prompt, **fields):
    """The textbook's: of each chunk, what follows the last marker is the answer so far."""
    text = ""
    for chunk in chunks(url, prompt, **fields):
        if (position := chunk.rfind("<^>")) >= 0:
            text = chunk[position + 3 :]
    return text


def questions():
    """The first wording of each question of the corpus that is asked out of the blue."""
    for line in (TINY / "corpus.jsonl").read_text("utf-8").splitlines():
        line = json.loads(line)
        messages = line.get("messages", [])
        roles = [message["role"] for message in messages]
        if roles == ["user", "assistant"] and "tool" not in line:
            wording = messages[0]["content"]
            yield wording if isinstance(wording, str) else wording[0]


# --- 1. The stream -----------------------------------------------------------------------------


def test_an_answer_is_chunked_text_that_nobody_may_keep_or_hold_back(url):
    reply = requests.post(url, json={"prompt": "Hello"}, timeout=LIMIT)
    assert reply.status_code == 200
    assert reply.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert reply.headers["Transfer-Encoding"] == "chunked"
    assert reply.headers["Cache-Control"] == "no-cache"
    assert reply.headers["X-Accel-Buffering"] == "no"


@pytest.mark.parametrize(
    "prompt, holds",
    [
        ("Hello", "[a-z]"),
        (COUNT, "1 2 3"),
        (FRAME, "<\\^>"),
        ("发一个表情符号", "[\U00010000-\U0010ffff]"),
    ],
)
def test_each_chunk_is_one_frame_and_each_frame_begins_with_the_one_before(url, prompt, holds):
    frames = list(chunks(url, prompt, temperature=0))
    assert all(frame.startswith("<^>") and frame.count("<^>") == 1 for frame in frames)
    assert all(after.startswith(before) for before, after in zip(frames, frames[1:]))
    assert frames[0][3:].strip()  # the first leaves with something to see
    assert len(frames) > 1 or prompt != COUNT
    assert not any("\ufffd" in frame for frame in frames)  # what stands for half a character
    answer = ask(url, prompt, temperature=0)
    assert unescape(frames[-1][3:]) == answer and re.search(holds, answer)


def test_the_first_frames_come_while_the_answer_is_still_being_made(server, url):
    with (
        server.held(),
        requests.post(url, json=ENDLESS, stream=True, timeout=LIMIT) as reply,
    ):
        server.let(10)
        frames = reply.iter_content(chunk_size=None)
        assert len(next(frames)) < len(next(frames)) < 100


def test_the_textbook_client_gets_the_whole_answer_to_every_question_of_the_corpus(url):
    def both(question):
        streamed = unescape(textbook_client(url, question, temperature=0))
        return question, streamed, ask(url, question, temperature=0)

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(both, questions()))
    assert len(answers) > 100 and [answer for answer in answers if answer[1] != answer[2]] == []


def test_a_seed_and_nothing_else_gives_the_same_answer_alone_and_among_16_others(url):
    request = {"prompt": "你好", "seed": 7, **WILD}
    others = [{"prompt": COUNT, "seed": seed, **WILD} for seed in range(16)]
    alone = ask(url, **request)
    assert at_once(url, [*others, request])[-1] == alone
    assert len({alone, *(ask(url, "你好", seed=seed, **WILD) for seed in (8, None, None))}) == 4


PAIRS = [["Count from 1 to 10", "1 2 3 4 5 6 7 8 9 10"]]
ROLES = [{"role": "user", "content": PAIRS[0][0]}, {"role": "assistant", "content": PAIRS[0][1]}]
SYSTEM = [{"role": "system", "content": "Be short."}]


def test_64_conversations_at_once_are_answered_as_one_by_one_while_others_come_and_go(url):
    crowd = [
        {
            "prompt": prompt,
            "history": [[], PAIRS][i % 2],
            "temperature": [0, 0.7, 1.5][i % 3],
            "top_p": [0.5, 0.9][i % 2],
            "repetition_penalty": [1.0, 1.2][i % 5 == 0],
            "seed": i,
        }
        for i, prompt in enumerate(list(questions())[:64])
    ]

    def come_and_go(bytes_read):
        with send(url, **ENDLESS) as reader:
            reader.recv(bytes_read)

    with ThreadPoolExecutor(16) as pool:
        others = pool.map(come_and_go, range(1, 200))
        together = at_once(url, crowd)
        assert len(list(others)) == 199
    assert together == [ask(url, **request) for request in crowd]


@pytest.mark.parametrize("history", [[], PAIRS, ROLES, SYSTEM, SYSTEM + ROLES])
def test_the_history_comes_back_in_its_form_with_this_turn_added(url, history):
    body = {"prompt": "你好", "history": history, "stream": False}
    reply = requests.post(url, json=body, timeout=LIMIT).json()
    turn = [["你好", reply["response"]]]
    if history and isinstance(history[0], dict):
        turn = [
            {"role": "user", "content": "你好"},
            {"role": "assistant", "content": reply["response"]},
        ]
    assert reply["history"] == history + turn
    assert reply["status"] == 200 and time.strptime(reply["time"], "%Y-%m-%d %H:%M:%S")
    assert set(reply) == {"response", "history", "status", "time", "finish_reason"}


def test_pairs_and_roles_are_two_ways_to_say_the_same(url):
    prompt = "Say that in Chinese"
    answer = ask(url, prompt, history=PAIRS, temperature=0)
    assert answer == ask(url, prompt, history=ROLES, temperature=0)
    assert answer != ask(url, prompt, temperature=0)  # else the history would not be read at all


def test_max_length_counts_prompt_and_answer(url):
    body = {"prompt": COUNT, "max_length": 1}
    refusal = requests.post(url, json=body, timeout=LIMIT).json()["detail"]
    used = max(map(int, re.findall(r"\d+", refusal)))  # the other count is the 1
    reply = requests.post(url, json={**body, "max_length": used}, timeout=LIMIT)
    assert reply.status_code == 400 and reply.json()["detail"].count(str(used)) >= 2
    answers = [ask(url, COUNT, temperature=0, max_length=used + room) for room in range(1, 12)]
    whole = ask(url, COUNT, temperature=0)
    assert all(whole.startswith(answer) and answer != whole for answer in answers)
    assert all(after.startswith(before) for before, after in zip(answers, answers[1:]))
    assert len(answers[-1]) > len(answers[0])
    assert ask(url, COUNT, temperature=0, max_length=20_000) == whole  # the context has no more


def test_null_counts_as_absent_and_so_does_0_for_max_length_and_top_p(url):
    nothing = dict.fromkeys("history max_length top_p temperature repetition_penalty".split())
    plain = ask(url, COUNT, seed=7)
    assert plain == ask(url, COUNT, seed=7, **nothing)
    assert plain == ask(url, COUNT, seed=7, max_length=0, top_p=0)
    assert plain == textbook_client(url, COUNT, seed=7, stream=None)
    assert ask(url, seed=None)


@pytest.mark.parametrize("type_", [None, "application/x-www-form-urlencoded", "text/plain", "?"])
def test_the_body_is_read_as_json_whatever_its_content_type_says(url, type_):
    body = json.dumps({"prompt": "你好", "stream": False, "temperature": 0}, ensure_ascii=False)
    reply = requests.post(url, body.encode(), headers={"Content-Type": type_}, timeout=LIMIT)
    assert reply.status_code == 200
    assert reply.json()["response"] == ask(url, "你好", temperature=0)


def test_the_repetition_penalty_changes_the_answer(url):
    plain = ask(url, COUNT, temperature=0)
    assert plain == ask(url, COUNT, temperature=0, repetition_penalty=1)
    assert plain != ask(url, COUNT, temperature=0, repetition_penalty=2)


# --- 2. Hanging up -----------------------------------------------------------------------------


def send(url, **body):
    """Sends it over a bare socket, for a reader who reads as late as it likes, or never. With
    small segments and a small buffer here, the system keeps little of what waits to be read."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    if hasattr(socket, "TCP_MAXSEG"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    connection.settimeout(LIMIT)
    connection.connect((host, int(port)))
    content = json.dumps(body).encode()
    head = f"POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("way", ["in the middle", "before reading anything", "not streaming"])
def test_readers_that_hang_up_free_their_places(server, url, way):
    with server.held():
        with ExitStack() as stack:
            readers = [
                stack.enter_context(send(url, **ENDLESS, stream=way != "not streaming"))
                for _ in range(20)
            ]
            until(lambda: busy(url) == 20)
            server.let(10)
            if way == "in the middle":
                until(lambda: b"<^>" in readers[0].recv(4096))
        until(lambda: busy(url) == 0)  # by themselves they would not end while the model is held


def test_a_slow_reader_holds_up_nobody_and_is_spared_overtaken_frames(server, url):
    body = {**ENDLESS, "prompt": "从一数到一百", "max_length": 1024}  # 3 bytes a character
    with send(url, **body) as slow, ThreadPoolExecutor() as pool:
        with server.held():
            until(lambda: busy(url) == 1)
            all_of_it = pool.submit(lambda: list(chunks(url, **body)))
            # No faster than frames are sent, or there would be few frames to be spared.
            until(lambda: server.step(2) or all_of_it.done())
        awake = all_of_it.result()  # begun later: when it has all, so could the slow one
        response = HTTPResponse(slow)
        response.begin()
        late = response.read().decode().split("<^>")[1:]
    assert late[-1] == awake[-1][3:]
    assert len(late) < len(awake)


def test_a_reader_that_never_reads_keeps_no_place_once_its_answer_is_made(server, url):
    with server.held():
        reader = send(url, **{**ENDLESS, "max_length": 700})
        until(lambda: busy(url) == 1)
    with reader:
        until(lambda: busy(url) == 0)


# --- 3. Bad input ------------------------------------------------------------------------------

DEEP = b"[" * 100_000
NAN, INF = float("nan"), float("inf")
BAD = {  # a word that must be in the refusal, and bodies
    "body": [
        b"",
        b"hello",
        b"{",
        b"prompt=hello",
        b"{'prompt': 'hi'}",
        b'{"prompt": "hi"} {}',
        b'{"prompt": "caf\xe9"}',
        '{"prompt": "hi"}'.encode("utf-16"),
        DEEP,
        b'{"prompt": "hi", "history": ' + DEEP + b"]" * len(DEEP) + b"}",
        b'{"prompt": "hi", "seed": 1' + b"0" * 5000 + b"}",  # too long for Python to read
        [],
        ["hi"],
        "hi",
        5,
        None,
        True,
    ],
    "prompt": [
        {},
        *[
            {"prompt": prompt}
            for prompt in (
                None,
                "",
                " \n\t",
                "\u3000",
                "\u200b",
                "\ufeff\u2060\u200d",
                "\x00\x01\x1b\x7f",
                "\ud800",
                "hi \udfff",
                5,
                0,
                True,
                False,
                [],
                ["hi"],
                {"text": "hi"},
                10**4000,
            )
        ],
    ],
    "2048": [{"prompt": "你" * 100_000}, {"prompt": "hi", "history": PAIRS * 9000}],
    "history": [
        "",
        "hi",
        5,
        0,
        True,
        {},
        ROLES[0],
        "x" * 100_000,
        [1],
        [None],
        ["hi"],
        ["hi", "there"],
        [[]],
        [["hi"]],
        [["hi", "there", "you"]],
        [["hi", 5]],
        [[5, "hi"]],
        [["hi", None]],
        [[["hi"], "there"]],
        [["\ud800", "there"]],
        [["hi", "\udfff"]],
        PAIRS + ROLES,
        ROLES + PAIRS,
        [{}],
        [{"role": "user"}],
        [{"content": "hi"}],
        [{"role": "user", "content": 5}],
        [{"role": None, "content": "hi"}],
        [{"role": "user", "content": "\ud800"}],
        [{"role": "robot", "content": "hi"}],
        SYSTEM * 2 + ROLES,
        ROLES + SYSTEM,
        ROLES[1:],
        [{"role": "observation", "content": "42"}],
    ],
    "max_length": [-1, 20.5, "20", "", True, False, [], {}, INF, NAN, -(10**30)],
    "top_p": [-0.1, 1.01, 2, "0.7", True, False, [0.7], NAN, -INF, 10**30],
    "temperature": [-0.1, 2.01, "1", True, {}, NAN, INF, -INF, 10**400],
    "repetition_penalty": [0, -1, 2.01, "1", True, [], NAN, INF],
    "seed": [-1, 2**32, 20.5, "7", True, [], NAN, 10**4000],
    "stream": [0, 1, "false", "", [], {}],
}
for field in list(BAD)[3:]:  # those are values; the bodies with them:
    BAD[field] = [{"prompt": "hi", field: value} for value in BAD[field]]
BAD["temperature"].append(b'{"prompt": "hi", "temperature": 1e999}')
BAD = [(body, word) for word, bodies in BAD.items() for body in bodies]


def encode(body):
    return body if isinstance(body, bytes) else json.dumps(body).encode()


@pytest.mark.parametrize("body, word", BAD, ids=[ascii(body)[:60] for body, _ in BAD])
def test_a_bad_request_is_refused_with_a_reason_and_harms_nobody(url, body, word):
    reply = requests.post(url, encode(body), timeout=LIMIT)
    assert reply.status_code == 400, reply.text
    assert reply.headers["Content-Type"] == "application/json"
    assert isinstance(reply.json()["detail"], str)
    assert word in reply.json()["detail"] and len(reply.json()["detail"]) <= 400
    assert ask(url)


@pytest.mark.parametrize(
    "sent",
    [bytes, lambda body: iter([body[:-9], body[-9:]])],
    ids=["with its length", "in chunks, which tell no length"],
)
def test_a_body_over_1_mib_is_refused_and_one_of_1_mib_is_not(url, sent):
    body = b'{"prompt": "hi"}'.ljust(2**20)
    assert requests.post(url, sent(body), timeout=LIMIT).status_code == 200
    reply = requests.post(url, sent(body + b" "), timeout=LIMIT)
    assert reply.status_code == 413 and isinstance(reply.json()["detail"], str)
    assert ask(url)


FINE = [
    {"prompt": text}
    for text in (
        "<|user|>",
        "<^>",
        "[gMASK]",
        "</s>",
        "<|system|>\n<|observation|>",
        "hi\x00\x1b[2J",
        "🚀",
        "\ufeffhi\u200b",
        "{}",
        "null",
        "e\u0301",
        "\U0010ffff?",
    )
] + [
    {"prompt": "hi", "history": []},
    {"prompt": "hi", "history": [["<|user|>", "</s>"]]},
    {"prompt": "hi", "max_length": 10**30},
    {"prompt": "hi", "temperature": 2, "top_p": 1},
    {"prompt": "hi", "temperature": 0.0, "top_p": 1e-9},
    {"prompt": "hi", "seed": 0},
    {"prompt": "hi", "seed": 2**32 - 1},
    {"prompt": "hi", "repetition_penalty": 2},
    {"prompt": "hi", "stream": True, "top_k": -1, "max_tokens": "many", "": None, "\ud800": []},
    b'\xef\xbb\xbf{"prompt": "hi"}',
    b' \r\n{"prompt": "hi"}\n',
    b'{"prompt": "\\ud83d\\ude80"}',
]


@pytest.mark.parametrize("body", FINE, ids=[ascii(body)[:60] for body in FINE])
def test_what_only_looks_bad_is_answered(url, body):
    reply = requests.post(url, encode(body), timeout=LIMIT)
    assert reply.status_code == 200, reply.text
    assert reply.content.startswith(b"<^>")


# --- 4. The other routes -----------------------------------------------------------------------


def test_health_says_what_runs_where_and_how_busy_it_is(url):
    reply = requests.get(url + "/health", timeout=LIMIT)
    assert reply.status_code == 200
    assert set(reply.json()) == {"status", "model", "device", "active", "waiting"}
    assert reply.json()["active"] == reply.json()["waiting"] == 0


def test_a_person_with_a_browser_finds_a_curl_line_and_every_field_of_the_request(url):
    reply = requests.get(url, timeout=LIMIT)
    assert reply.status_code == 200 and reply.headers["Content-Type"].startswith("text/plain")
    assert len(re.findall(f"^curl {url}", reply.text, re.M)) == 1
    assert requests.get(url + "/docs", timeout=LIMIT).status_code == 200
    post = requests.get(url + "/openapi.json", timeout=LIMIT).json()["paths"]["/"]["post"]
    schema = post["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["properties"]) == {
        "prompt",
        "history",
        "max_length",
        "top_p",
        "temperature",
        "repetition_penalty",
        "seed",
        "stop",
        "stream",
    }
    assert schema["required"] == ["prompt"]


@pytest.mark.parametrize(
    "method, path, status",
    [("GET", "/nothing", 404), ("POST", "/chat", 404), ("PUT", "/", 405), ("POST", "/health", 405)],
)
def test_a_wrong_address_or_method_is_refused_as_json(url, method, path, status):
    reply = requests.request(method, url + path, timeout=LIMIT)
    assert reply.status_code == status and isinstance(reply.json()["detail"], str)


# --- 5. Starting and stopping ------------------------------------------------------------------


def says_why_it_cannot_start(word, *flags, **environment):
    result = subprocess.run(
        [sys.executable, "api.py", *flags],
        cwd=HERE,
        timeout=LIMIT,
        text=True,
        encoding="utf-8",
        capture_output=True,
        env={**BARE, **environment},
    )
    assert result.returncode != 0 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and word in result.stderr, result.stderr


def test_a_start_that_fails_says_why_in_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken, ThreadPoolExecutor() as pool:
        port = str(taken.getsockname()[1])
        starts = [
            pool.submit(says_why_it_cannot_start, *start)
            for start in [
                ("no-such-folder", "--model", "./no-such-folder"),
                ("99999", "--port", "99999"),
                (port, "--port", port),
            ]
        ]
        starts += [
            pool.submit(says_why_it_cannot_start, word, **environment)
            for word, environment in [
                ("many", {"CHATGLM_PORT": "many"}),
                ("no-such-folder", {"CHATGLM_MODEL": "./no-such-folder", "CHATGLM_PORT": "0"}),
            ]
        ]
        for start in starts:
            start.result()


@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C cannot be sent to one process there")
def test_ctrl_c_ends_it_at_once_and_no_half_answer_looks_whole():
    with started(*API) as server:
        with server.held():
            replies = [
                requests.post(server.url, json=ENDLESS, stream=True, timeout=LIMIT)
                for _ in range(8)
            ]
            readers = [reply.iter_content(chunk_size=None) for reply in replies]
            server.let(10)
            for reader in readers:
                next(reader)
            server.interrupt()
            until(lambda: refuses_connections(server.url))
        server.wait()  # 8,000 steps before the answers would end
        for reader in readers:
            with pytest.raises(
                (requests.exceptions.ChunkedEncodingError, requests.exceptions.ConnectionError)
            ):
                list(reader)
        assert "Traceback" not in server.log() and COUNT not in server.log()


def test_prompts_are_logged_where_that_was_asked_for(server, url):
    ask(url, "May this be logged?")
    assert "May this be logged?" in server.log()


def test_uvicorn_serves_it_with_the_settings_of_the_environment():
    settings = {"CHATGLM_MODEL": str(TINY), "CHATGLM_LOG_PROMPTS": "1"}
    with started("-m", "uvicorn", "api:app", **settings) as server:
        assert health(server.url)["model"] == TINY.name  # not where it lies
        assert ask(server.url, "May this be logged?")
        assert "May this be logged?" in server.log() and "Traceback" not in server.log()


# --- 6. What `await asyncio.sleep(0)` in `process` buys ----------------------------------------

READY, FIRST = 2_000, 10  # chunks that wait to be sent; those that are before the reader leaves
LINE = "await asyncio.sleep(0)"


def taken_after_leaving(process):
    """How many of the ready chunks `process` takes once its reader has left."""
    taken, left, ended, app = [0], threading.Event(), threading.Event(), FastAPI()

    async def source():
        try:
            for number in range(READY):
                if number == FIRST:
                    left.wait(LIMIT)  # and the event loop with it: it cannot know yet
                taken[0] = number + 1
                yield chatglm.Chunk(
                    text=f"{number}",
                    raw=f"{number}",
                    prompt_tokens=1,
                    completion_tokens=number,
                    finish_reason="stop" if number == READY - 1 else None,
                )
        finally:
            ended.set()

    app.get("/")(lambda: StreamingResponse(process(source())))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        address = server.servers[0].sockets[0].getsockname()
        with socket.create_connection(address) as reader:
            reader.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
            until(lambda: b"<^>" in reader.recv(4096))
        left.set()
        assert ended.wait(LIMIT)
        return taken[0] - FIRST
    finally:
        left.set()
        server.should_exit = True
        thread.join(LIMIT)


def test_with_the_line_a_reader_that_leaves_stops_the_answer():
    assert taken_after_leaving(api.process) < 10  # it takes a moment until the news is here


def test_without_the_line_the_answer_goes_on_to_its_end_for_nobody(caplog):
    caplog.set_level(logging.CRITICAL, "asyncio")  # it warns of each frame that reaches no one
    code = inspect.getsource(api.process)
    assert code.count(LINE) == 1
    names = dict(vars(api))
    exec(code.replace(LINE, ""), names)
    assert taken_after_leaving(names["process"]) == READY - FIRST
