"""What strangers on the network may send, and that it harms nobody else.

pytest tests/test_strangers.py
"""

import asyncio
import json
import logging
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from array import array
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from types import SimpleNamespace

import pytest
import requests
from fastapi import Request
from prometheus_client import Counter as Counted
from starlette.testclient import TestClient
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import api
import chatglm
from api import Chat
from chatglm.checkpoint.files import is_whole
from chatglm.sampling import SamplingParams, TokenLogprob, check_params
from chatglm.text.template import TemplateTokenizer
from chatglm.text.time_limit import time_limit
from chatglm.text.tokenizer import ChatGLMTokenizer, is_tool_name
from server import bodies
from server.answers import shown_logprobs
from server.browsers import is_served
from server.clients import client_of, network_of
from server.connections import FOR_OTHERS
from server.keys import read_keys
from server.logs import CleanFormatter
from server.openai_chat import ChatCompletionRequest
from server.openai_replies import ChatCompletionReply, CompletionReply
from server.openai_text import CompletionRequest
from server.parsing import STRING, has_too_many, parse
from server.preparation import THREADS, FairPool
from server.settings import Settings, parse_settings
from server.static import PageFiles
from server.stops import StopSearch
from test_api import ENDLESS, ask
from tests.servers import BARE, HERE, LIMIT, busy, started, until
from tests.test_tools import byte_tokenizer

V1, TEXT = "/v1/chat/completions", "/v1/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}
CROSS = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}


def address_of(url):
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def deep(levels):
    """A tool whose schema has that many levels."""
    return {"a": "[" * levels + "]" * levels}


# --- 1. Bodies ---------------------------------------------------------------------------------

LARGE = {  # nearly as large as a body may be, each dear in its own way
    "zeros for messages": (V1, b'{"messages": [' + b"0," * 500_000 + b"0]}"),
    "lists for history": ("/", b'{"prompt": "hi", "history": [' + b"[]," * 340_000 + b"0]}"),
    "many stop sequences": (V1, json.dumps({**HI, "stop": ["ab"] * 120_000}).encode()),
    "a long stop sequence": (V1, json.dumps({**HI, "stop": "ab" * 500_000}).encode()),
    "keys that nobody knows": ("/", json.dumps({f"k{i}": 0 for i in range(80_000)}).encode()),
    "many texts": (TEXT, json.dumps({"prompt": ["a"] * 200_000}).encode()),
    "sixty long texts": (TEXT, json.dumps({"prompt": ["a" * 16_000] * 60}).encode()),
    "spaces": ("/", b'{"prompt": "' + b" " * 1_000_000 + b'"}'),
    "one word": ("/", b'{"prompt": "' + b"a" * 1_000_000 + b'"}'),
    "deep schemas": (
        V1,
        b'{"messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function",'
        b'"function": {"name": "f", "parameters": {"a": ' + b"[" * 900 + b"]" * 900 + b"}}}]}",
    ),
}


@contextmanager
def slowest_health(url):
    """A list that gets the longest time GET /health took while the block ran."""
    ended, times = threading.Event(), []

    def watch():
        with requests.Session() as session:
            while not ended.is_set():
                begun = time.perf_counter()
                session.get(url + "/health", timeout=LIMIT)
                times.append(time.perf_counter() - begun)

    watcher, worst = threading.Thread(target=watch), []
    watcher.start()
    try:
        yield worst
    finally:
        ended.set()
        watcher.join()
        worst.append(max(times))


@pytest.mark.parametrize("path, body", LARGE.values(), ids=LARGE)
def test_a_large_body_is_refused_by_name_while_others_are_answered(url, path, body):
    with slowest_health(url) as worst:
        reply = requests.post(url + path, body, timeout=LIMIT)
    assert reply.status_code == 400 and len(reply.text) < 600, reply.text
    assert worst[0] < 1  # of a busy machine; `python -m bench soak --hostile` has the figures


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"messages": HI["messages"] * 20_001}, "messages must have at most 20000 entries"),
        ({**HI, "stop": ["a"] * 33}, "stop must have at most 32 entries"),
        ({**HI, "stop": ["a" * 501]}, "stop must have at most 500 characters each"),
        ({**HI, "stop": "a" * 501}, "stop must have at most 500 characters each"),
        ({**HI, "tools": [{}] * 1001}, "tools.0"),
        (
            {**HI, "logit_bias": {str(i): 0 for i in range(1025)}},
            "logit_bias must have at most 1024",
        ),
    ],
)
def test_what_is_too_much_is_refused_by_name_with_the_limit(fields, told):
    with pytest.raises(chatglm.InvalidField, match=told):
        ChatCompletionRequest.from_fields(fields)


@pytest.mark.parametrize("more", [[0] * 100_001, [[]] * 100_001, [{}] * 100_001])
def test_a_body_of_too_many_values_is_refused_before_it_is_read(more):
    content = json.dumps({**HI, "messages": more}).encode()
    with pytest.raises(ValueError, match="the body holds more than 100000 values"):
        ChatCompletionRequest.from_json(content)
    with pytest.raises(chatglm.InvalidField, match="arguments must be a JSON object"):
        ChatCompletionRequest.from_fields(
            {"messages": called(arguments=json.dumps({"a": more}))}
        ).to_messages()


@pytest.mark.parametrize("piece", [b'""', b'"",', b'"" ', b'",",', b'[","],'])
def test_counting_values_gives_way_to_other_threads(piece):
    """It looks at one string at a time: a call for all of them would hold Python's lock."""
    body = piece * (2**20 // len(piece))
    calls = []
    sys.setprofile(lambda frame, event, called: calls.append(event))
    try:
        refused = has_too_many(body)
    finally:
        sys.setprofile(None)
    values = STRING.sub(b"", body).count(b",") + body.count(b"[")
    assert refused == (values > 100_000)
    assert len(calls) > 10_000 or not refused


@pytest.mark.parametrize("text", [", [ {" * 200_000, '"' * 60_000, "\\" * 90_000, '",' * 90_000])
def test_what_a_text_holds_is_no_value(text):
    assert Chat.from_json(json.dumps({"prompt": text}).encode()).prompt == text


@pytest.mark.parametrize(
    "body", [b'"' * 10**6, b'"\\' * 300_000, b'"\\"' * 300_000, b'"' + b"\\" * 10**6, b"\\" * 10**6]
)
def test_counting_values_takes_time_in_proportion(body):
    begun = time.thread_time()
    with pytest.raises(ValueError, match="the body must be a JSON object"):
        parse(body)
    assert time.thread_time() - begun < 5  # minutes, if it went back at each quotation mark


def test_what_is_too_deep_is_refused_and_what_no_field_uses_may_be_as_deep_as_it_likes():
    body = b'{"prompt": "hi", "%s": ' + b"[" * 200 + b"]" * 200 + b"}"
    with pytest.raises(chatglm.InvalidField, match="history is nested more than 100 deep"):
        Chat.from_json(body.replace(b"%s", b"history"))
    assert Chat.from_json(body.replace(b"%s", b"other")).prompt == "hi"


HALF = "a\ud800"


def tool(**fields):
    return {"type": "function", "function": {"name": "f", **fields}}


def called(name="f", arguments="{}"):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [*HI["messages"], {"role": "assistant", "tool_calls": [call]}, HI["messages"][0]]


@pytest.mark.parametrize(
    "path, fields, place",
    [
        (V1, {**HI, "tools": [tool(description=HALF)]}, "tools.0.function.description"),
        (V1, {**HI, "tools": [tool(parameters={HALF: 1})]}, "tools.0.function.parameters"),
        (V1, {"messages": called(name=HALF)}, "messages.1.tool_calls.0.function.name"),
        (V1, {"messages": called(arguments='{"a": "\\ud800"}')}, "arguments"),
        (V1, {"messages": called(arguments='{"a": 1e999}')}, "arguments"),
        (V1, {**HI, "stop": [HALF]}, "stop.0"),
        (V1, {**HI, "logit_bias": {"1": HALF}}, "logit_bias.1"),
        (
            "/",
            {"history": [{"role": "system", "content": "", "tools": [{"a": HALF}]}]},
            "history.0",
        ),
        ("/", {"history": [{"role": "system", "content": "", "tools": "a"}]}, "tools"),
        ("/", {"history": [{"role": "system", "content": "", "more": [HALF]}]}, "history.0.more.0"),
        ("/", {"history": [{"role": "user", "content": "", "x": float("inf")}]}, "history.0.x"),
        ("/stream", {"history": [[HALF, "a"]]}, "history.0.0"),
    ],
)
def test_half_a_character_is_refused_wherever_it_stands(url, path, fields, place):
    body = {"prompt": "hi", "stream": False, **fields}
    reply = requests.post(url + path, json.dumps(body), timeout=LIMIT)
    told = reply.json()
    told = told["error"]["message"] if path == V1 else told["detail"]
    assert reply.status_code == 400 and place in told


@pytest.mark.parametrize(
    "field, value, served",
    [
        ("temperature", 1e-40, True),
        ("temperature", 0.01, True),
        ("repetition_penalty", 1e-40, False),
        ("repetition_penalty", 0.01, False),
        ("top_p", 1e-40, True),
    ],
)
@pytest.mark.parametrize("path", ["/", V1])
def test_tiny_numbers_are_refused_or_give_words(url, path, field, value, served):
    body = {"prompt": "hello", **HI, "stream": False, "max_length": 60, "max_tokens": 40}
    reply = requests.post(url + path, json={**body, field: value}, timeout=LIMIT)
    assert reply.status_code == (200 if served else 400)
    assert served or field in reply.text
    assert not served or "Hello" in reply.text or "Hi" in reply.text or "你好" in reply.text


@pytest.mark.parametrize("top_k", [2**31, 2**32 + 1, 2**63, 10**4000])
def test_an_enormous_top_k_is_all_tokens_and_harms_nobody(server, top_k):
    with server.held():
        other = threading.Thread(target=ask, args=(server.url,))
        other.start()
        until(lambda: busy(server.url) == 1)
        answers = ThreadPoolExecutor(1).submit(
            requests.post, server.url + V1, json={**HI, "top_k": top_k, "max_tokens": 3}
        )
        until(lambda: busy(server.url) == 2)
    assert answers.result(LIMIT).status_code == 200
    other.join(LIMIT)
    assert not other.is_alive()
    with pytest.raises(chatglm.InvalidField, match="top_k must be from 0 to"):
        check_params(SamplingParams(top_k=top_k), 100, True)


def test_a_temperature_that_is_nearly_0_is_greedy():
    assert Chat.from_fields({"prompt": "a", "temperature": 1e-6}).temperature == 0
    assert Chat.from_fields({"prompt": "a", "temperature": 0.01}).temperature == 0.01


# --- 2. Stop sequences -------------------------------------------------------------------------


def by_hand(text, stops):
    """The text before the stop sequence that is complete first; of two, the longer one."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@pytest.mark.parametrize("stops", [["aab"], ["ab", "ba"], ["abab", "bb"], ["aaaa"], ["b", "ab"]])
def test_stop_sequences_are_found_as_by_hand_however_the_text_comes(stops):
    for number in range(2**9):
        text = f"{number:09b}".replace("0", "a").replace("1", "b")
        search, shown = StopSearch(stops), ("", False)
        for end in range(1 + number % 3, len(text) + 1):
            shown = search.before_stop(text[:end], ended=False)
            assert by_hand(text, stops)[0].startswith(shown[0])
            if shown[1]:
                break
        if not shown[1]:
            shown = search.before_stop(text, ended=True)
        assert shown == by_hand(text, stops), text


def test_stop_sequences_are_found_in_much_text_at_once():
    dice = random.Random(0)
    for _ in range(300):
        stops = ["".join(dice.choices("ab", k=dice.randint(9, 14))) for _ in range(3)]
        text = "".join(dice.choices("ab", k=dice.choice([2500, 6000])))
        search, cut = StopSearch(stops), dice.randint(0, 400)
        shown = search.before_stop(text[:cut], ended=False)
        if not shown[1]:
            shown = search.before_stop(text, ended=False)
            if not shown[1]:
                held = len(text) - len(shown[0])
                assert any(stop.startswith(text[len(text) - held :]) for stop in stops)
                shown = search.before_stop(text, ended=True)
        ends = [(text.find(s) + len(s), -len(s)) for s in stops if s in text]
        end, length = min(ends, default=(len(text), 0))
        assert shown == (text[: end + length], bool(ends))


def test_much_text_at_once_costs_little_for_each_stop_sequence():
    text = "a" * 100_000

    def seconds(stops):
        begun = time.thread_time()
        StopSearch(stops).before_stop(text, ended=False)
        return time.thread_time() - begun

    assert seconds(["a" * 499 + "b"] * 32) < seconds(["c"] * 32) + 2  # step by step: twenty


def test_looking_for_a_stop_sequence_takes_as_long_for_each_piece_of_a_long_answer():
    def seconds(length):
        search, begun = StopSearch(["a" * 499 + "b"] * 4), time.process_time()
        for end in range(0, length, 50):
            search.before_stop("a" * end, ended=False)
        return time.process_time() - begun

    assert seconds(40_000) < 8 * seconds(10_000)  # a search from the beginning: 16 times


# --- 3. Log-probabilities: they may be hundreds of times as long as the text --------------------


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = (HERE / "chatglm" / "tiny" / "tokenizer.model").read_bytes()
    return ChatGLMTokenizer(vocabulary, "chatglm3")


def told(tokens, alternatives=20):
    others = array("i", range(1000, 1000 + alternatives))
    return [TokenLogprob(i, -1.0, others, array("d", [-2.0] * alternatives)) for i in tokens]


@pytest.mark.parametrize(
    "body, kind",
    [
        ({**HI, "logprobs": True, "top_logprobs": 20}, ChatCompletionReply),
        ({"prompt": "a", "logprobs": 20}, CompletionReply),
    ],
)
def test_log_probabilities_are_written_as_they_come(tokenizer, monkeypatch, body, kind):
    """A long answer in one piece: between two turns of the event loop a few tokens are written."""
    turn, turns = 0, []

    async def answer():
        for length in range(10, 1510, 10):
            await asyncio.sleep(0)
            reason = "length" if length == 1500 else None
            tokens = told(range(600, 600 + length))
            yield chatglm.Chunk("a" * length, "", 1, length, reason, 0, tokens)

    async def count():
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    def row(self, each, original=kind.row):
        turns.append(turn)
        return original(self, each)

    async def whole():
        counting = asyncio.create_task(count())
        try:
            return await kind("m", type_of[kind].from_fields(body), [answer()], tokenizer).whole()
        finally:
            counting.cancel()

    type_of = {ChatCompletionReply: ChatCompletionRequest, CompletionReply: CompletionRequest}
    monkeypatch.setattr(kind, "row", row)
    pieces = asyncio.run(whole())
    assert len(turns) == 1500 and max(Counter(turns).values()) <= 20
    assert max(map(len, pieces)) < 2**20  # bytes
    logprobs = json.loads(b"".join(pieces))["choices"][0]["logprobs"]
    if kind is CompletionReply:
        assert len(logprobs["tokens"]) == len(logprobs["top_logprobs"]) == 1500
        assert logprobs["token_logprobs"] == [-1.0] * 1500
    else:
        assert [len(each["top_logprobs"]) for each in logprobs["content"]] == [20] * 1500
        assert logprobs["refusal"] is None


def test_what_a_stop_sequence_hides_is_found_by_looking_at_each_token_once(tokenizer):
    """Against the texts of all that follows a token, decoded anew for each."""

    def behind(tokens):
        return tokenizer.decode([tokenizer.anchor, *tokens])[1:]  # the anchor is one letter

    for text in ("什么是 HTTP？ hello, world" * 20, "a b  c\n\n d " * 40, "\n" * 300):
        tokens = tokenizer.encode(text)
        whole = behind(tokens)
        for length in (0, 1, 7, 200):
            hidden = whole[len(whole) - length :] if length else ""
            expected = next(  # from the end, one by one
                number
                for number in range(len(tokens), -1, -1)
                if not number or len(behind(tokens[number - 1 :]).rstrip()) > len(hidden.rstrip())
            )
            count = len(shown_logprobs(told(tokens, 0), hidden, tokenizer))
            assert count == (expected if hidden else len(tokens))
    tokens = tokenizer.encode("a㐀")  # three tokens, each of one byte
    assert len(shown_logprobs(told(tokens, 0), "㐀", tokenizer)) == len(tokens) - 3


def test_an_answer_of_white_space_costs_as_much_for_each_chunk(tokenizer):
    decoded = []

    class Counted:
        anchor = tokenizer.anchor

        def decode(self, tokens):
            decoded.append(tokens)
            return tokenizer.decode(tokens)

    newline, counted = tokenizer.encode("a\n")[-1], Counted()
    for length in range(1, 500):
        assert not shown_logprobs(told([newline] * length, 0), "\n", counted)
    assert len(decoded) < 10


# --- 4. Preparing ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", V1, TEXT, "/stream"])
def test_a_request_is_read_and_prepared_off_the_event_loop(monkeypatch, path):
    """Whatever it holds then keeps nobody else from being answered."""
    seen = {}

    def watch(owner, name):
        original = getattr(owner, name)

        def watched(*arguments, **options):
            seen[name] = threading.current_thread().name
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    watch(bodies, "parse")
    watch(chatglm.Engine, "prepare")
    with TestClient(api.app, "http://localhost") as client:
        asked = HI if path == V1 else {"prompt": "hi"}
        body = {**asked, "max_length": 20, "max_tokens": 2}
        assert client.post(path, json=body).status_code == 200
    assert set(seen) == {"parse", "prepare"}
    assert all(name.startswith("prepare") for name in seen.values())


def test_clients_take_turns_and_one_that_hangs_up_is_passed_over():
    async def run():
        pool, done, gate = FairPool(), [], threading.Event()
        held = [asyncio.create_task(pool.run("greedy", gate.wait)) for _ in range(THREADS)]
        greedy = [asyncio.create_task(pool.run("greedy", done.append, i)) for i in range(50)]
        await asyncio.sleep(0)
        honest = asyncio.create_task(pool.run("honest", done.append, "honest"))
        await asyncio.sleep(0)
        for task in greedy[:10]:
            task.cancel()
        gate.set()
        await asyncio.gather(honest, *held, *greedy[10:])
        await asyncio.gather(*greedy[:10], return_exceptions=True)
        return done

    done = asyncio.run(run())
    assert "honest" in done[:3] and set(range(10, 50)) < set(done) and len(done) == 41


def test_clients_that_leave_in_the_moment_of_their_turn_take_no_thread_with_them():
    async def run():
        pool, gate = FairPool(), threading.Event()
        held = [asyncio.create_task(pool.run("a", gate.wait)) for _ in range(THREADS)]
        leaving = [asyncio.create_task(pool.run("a", int)) for _ in range(4)]
        honest = asyncio.create_task(pool.run("a", int))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for task in leaving:  # their turns are cancelled at once, and taken out later
            task.cancel()
        pool._release()  # as if a piece of work ended just now
        pool._free -= 1
        gate.set()
        await asyncio.gather(honest, *held)
        await asyncio.gather(*leaving, return_exceptions=True)
        await asyncio.sleep(0)
        return pool._free

    assert asyncio.run(asyncio.wait_for(run(), LIMIT)) == THREADS


def test_a_thread_is_free_again_after_an_error_and_after_a_client_that_left():
    async def run():
        pool = FairPool()
        for _ in range(3 * THREADS):
            with pytest.raises(ZeroDivisionError):
                await pool.run("a", lambda: 1 / 0)
            task = asyncio.create_task(pool.run("a", time.sleep, 0.01))
            await asyncio.sleep(0)
            task.cancel()
        return await pool.run("a", lambda: "free")

    assert asyncio.run(run()) == "free"


def test_a_client_with_too_much_waiting_is_told_so():
    async def run():
        pool, gate = FairPool(), threading.Event()
        tasks = [asyncio.create_task(pool.run("greedy", gate.wait)) for _ in range(500)]
        await asyncio.sleep(0)
        gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert 90 < sum(isinstance(result, chatglm.QueueFull) for result in asyncio.run(run())) < 110


def test_a_key_is_one_client_however_it_is_sent():
    def client(*sent):
        state = SimpleNamespace(settings=SimpleNamespace(keys=[b"k"]))
        headers = [(b"authorization", each) for each in sent]
        app = SimpleNamespace(state=state)
        scope = {"type": "http", "headers": headers, "app": app, "client": ("192.0.2.1", 1)}
        return client_of(Request(scope))

    assert (
        client(b"Bearer k") == client(b"bearer k") == client(b"Bearer  k ") != client(b"Bearer j")
    )
    assert client() == "192.0.2.1"


def test_the_rest_of_an_ipv6_address_makes_no_other_client():
    assert network_of("2001:db8::1") == network_of("2001:db8::2") != network_of("2001:db8:0:1::1")
    assert network_of("::ffff:192.0.2.1") == "192.0.2.1" != network_of("192.0.2.2")


# --- 5. Connections ----------------------------------------------------------------------------


def test_a_head_without_end_is_refused(url):
    with socket.create_connection(address_of(url), 30) as line:
        line.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ")
        with pytest.raises(OSError):  # the reply comes, or the connection is closed first
            while True:
                line.sendall(b"a" * 10_000)
                line.settimeout(0.01)
                try:
                    if data := line.recv(4096):
                        assert data.startswith(b"HTTP/1.1 431 ")
                        raise OSError
                except TimeoutError:
                    line.settimeout(30)
    assert ask(url)


@pytest.mark.parametrize("fill, status", [(60_000, 200), (70_000, 431)])
def test_a_head_may_have_64_kib(url, fill, status):
    reply = requests.get(url + "/health", headers={"X": "a" * fill}, timeout=LIMIT)
    assert reply.status_code == status


def test_trailers_without_end_are_refused(url):
    with socket.create_connection(address_of(url), 30) as line:
        line.sendall(
            b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
        )
        with pytest.raises(OSError):
            for _ in range(1000):
                line.sendall(b"X: " + b"a" * 10_000 + b"\r\n")
    assert ask(url)


def test_many_requests_at_once_on_one_connection_end_it(url):
    with socket.create_connection(address_of(url), 30) as line:
        line.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
        received = b""
        with pytest.raises(ConnectionError):
            while data := line.recv(2**16):
                received += data
            raise ConnectionError
    assert received.count(b"HTTP/1.1 200") < 100
    assert ask(url)


@pytest.mark.parametrize("target", [b"http://localhost", b"/\xff"])
def test_a_head_that_is_too_large_and_wrong_leaves_no_connection_behind(small, target):
    head = b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\n"
    for _ in range(100):  # as many as this server takes
        with socket.create_connection(address_of(small), 30) as line:
            line.sendall(head + b"X: " + b"x" * 60_000)
            with suppress(ConnectionError):
                line.sendall(b"x" * 10_000 + b"\r\n\r\n")
                line.recv(4096)
    assert ask(small)


@pytest.mark.parametrize("sent", [b"", b"GET /hea", b"POST / HTTP/1.1\r\nHost: localhost\r\n"])
def test_a_connection_that_asks_nothing_is_closed(url, sent):
    begun = time.monotonic()
    with socket.create_connection(address_of(url), 60) as line:
        line.sendall(sent)
        received = line.recv(4096) if sent else b""
        assert received.startswith(b"HTTP/1.1 408 " if sent else b"")
        with pytest.raises(ConnectionError):
            if not line.recv(4096):
                raise ConnectionError
    assert 5 < time.monotonic() - begun


@pytest.fixture(scope="module")
def small():
    with started("api.py", "--max-connections", "100", "--max-concurrency", "1") as server:
        yield server.url


def test_idle_connections_give_way_to_those_that_ask(small):
    with ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(socket.create_connection(address_of(small), 60))
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(lambda _: ask(small, max_length=40), range(16)))


def test_where_all_connections_are_busy_health_is_answered_still(small):
    content = json.dumps({**ENDLESS, "max_length": 8192}).encode()
    head = f"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
    with ExitStack() as stack:
        for _ in range(60):
            line = stack.enter_context(socket.create_connection(address_of(small), 60))
            line.sendall(head.encode() + content)
        until(lambda: busy(small) == 100 - FOR_OTHERS)  # all that one client may have
        refused = requests.post(small, json={"prompt": "hi"}, timeout=LIMIT)
        assert refused.status_code == 503 and "connections" in refused.json()["detail"]
        assert requests.get(small + "/health", timeout=LIMIT).status_code == 200
    until(lambda: busy(small) == 0)
    assert ask(small)


# --- 6. Browsers -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/stream", V1, TEXT])
@pytest.mark.parametrize(
    "headers",
    [
        CROSS,
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},  # another port of this machine
        {"Origin": "http://localhost:3000"},
        {"Origin": "http://["},
        {"Origin": "http://[evil]"},
    ],
)
def test_what_a_page_of_another_origin_asks_is_refused(url, path, headers):
    body = json.dumps({"prompt": "hi", **HI})
    headers = {"Content-Type": "text/plain", **headers}
    reply = requests.post(url + path, body, headers=headers, timeout=LIMIT)
    assert reply.status_code == 403 and "--cors-origin" in reply.text
    assert ("error" in reply.json()) == (path in (V1, TEXT))


def test_two_names_in_a_request_must_both_be_served(url):
    head = b"GET /health HTTP/1.1\r\nHost: %s\r\nHost: %s\r\nConnection: close\r\n\r\n"
    for hosts, status in (
        ((b"localhost", b"evil.example"), b"403"),
        ((b"evil.example", b"localhost"), b"403"),
        ((b"localhost", b"127.0.0.1"), b"200"),
    ):
        with socket.create_connection(address_of(url), LIMIT) as line:
            line.sendall(head % hosts)
            assert line.recv(4096).split()[1] == status


def test_where_ipv6_is_listened_on_a_rebound_name_is_not_served_over_ipv4():
    scope = {"headers": [(b"host", b"evil.example")], "server": ("::ffff:127.0.0.1", 8000)}
    assert not is_served(scope, [])
    assert is_served({**scope, "server": ("::ffff:192.0.2.1", 8000)}, [])


def test_a_path_of_thousands_of_folders_is_not_looked_up(monkeypatch):
    monkeypatch.setattr("os.path.realpath", None)
    assert PageFiles().lookup_path("a/" * 30_000) == ("", None)


@pytest.mark.parametrize("path, place", [("/", "detail"), (V1, "error")])
def test_a_fault_of_the_server_is_told_in_the_protocols_form(path, place):
    refused = Counted("refused", "", ["status"], registry=None)
    app = SimpleNamespace(state=SimpleNamespace(metrics=SimpleNamespace(refused=refused)))
    request = Request({"type": "http", "path": path, "headers": [], "app": app})
    handler = api.app.exception_handlers[Exception]
    reply = asyncio.run(handler(request, ZeroDivisionError("secret")))
    assert reply.status_code == 500 and place in json.loads(reply.body)
    assert b"secret" not in reply.body


def test_an_image_starts_no_answer(url):
    image = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    reply = requests.get(url + "/stream?prompt=hi", headers=image, timeout=LIMIT)
    assert reply.status_code == 403


@pytest.mark.parametrize("site", ["same-origin", "none", None])
def test_the_servers_own_page_and_scripts_notice_nothing(url, site):
    headers = {"Sec-Fetch-Site": site, "Origin": url} if site else {"Origin": url}
    assert requests.post(url, json={"prompt": "hi"}, headers=headers, timeout=LIMIT).ok
    assert requests.post(url, json={"prompt": "hi"}, timeout=LIMIT).ok
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Accept": "text/html"}
    assert requests.get(url, headers=link, timeout=LIMIT).ok  # a link leads here from any page


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[", "[::1", "[evil]", "[::2]"],
)
@pytest.mark.parametrize("path", ["/health", "/", "/v1/models", "/docs"])
def test_a_name_that_was_made_to_lead_here_is_not_served(url, path, host):
    reply = requests.get(url + path, headers={"Host": host}, timeout=LIMIT)
    assert reply.status_code == 403
    refusal = reply.json()
    told = refusal["error"]["message"] if path.startswith("/v1") else refusal["detail"]
    assert "--allowed-host" in told


@pytest.mark.parametrize(
    "host",
    ["localhost:1", "127.0.0.1", "[::1]:8000", "a.localhost", "127.1.1.1", "[::ffff:127.0.0.1]"],
)
def test_the_names_of_this_machine_are_served(url, host):
    assert requests.get(url + "/health", headers={"Host": host}, timeout=LIMIT).status_code == 200


@pytest.fixture(scope="module")
def open_server():
    flags = "--cors-origin https://a.example --allowed-host chat.example --trusted-proxy 127.0.0.1"
    with started("api.py", *flags.split(), "--log-prompts") as server:
        yield server


def test_an_origin_and_a_host_that_are_allowed_are_served(open_server):
    headers = {
        "Origin": "https://a.example",
        "Sec-Fetch-Site": "cross-site",
        "Host": "Chat.example",
    }
    assert requests.post(open_server.url, json={"prompt": "hi"}, headers=headers, timeout=LIMIT).ok
    headers["Origin"] = "https://b.example"
    reply = requests.post(open_server.url, json={"prompt": "hi"}, headers=headers, timeout=LIMIT)
    assert reply.status_code == 403


def test_a_page_on_the_internet_may_ask_this_machine_if_its_origin_is_allowed(open_server):
    wanted = {
        "Origin": "https://a.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Private-Network": "true",
    }
    reply = requests.options(open_server.url, headers=wanted, timeout=LIMIT)
    assert reply.status_code == 200
    assert reply.headers["Access-Control-Allow-Private-Network"] == "true"
    reply = requests.options(
        open_server.url, headers={**wanted, "Origin": "https://b.example"}, timeout=60
    )
    assert reply.status_code == 400


# --- 7. Keys and the log -----------------------------------------------------------------------


def test_an_empty_key_does_not_open_the_server(monkeypatch, capsys):
    for name in "CHATGLM_API_KEY", "CHATGLM_API_KEY_FILE":
        with monkeypatch.context() as context:
            context.setenv(name, "")
            with pytest.raises(SystemExit):
                parse_settings([])
    with pytest.raises(SystemExit):
        parse_settings(["--api-key", ""])
    assert capsys.readouterr().err.count("contains no key") == 2


@pytest.mark.parametrize(
    "name", ["keys.txt", "./keys", "/no/such/keys", "~/keys", "C:\\keys", "tests/keyz", "@keys"]
)
def test_the_name_of_a_file_that_is_missing_is_no_key(name):
    with pytest.raises(ValueError, match="argument --api-key"):
        read_keys(name, None)
    with pytest.raises(ValueError, match="argument --api-key-file"):
        read_keys(None, name)


def test_a_key_file_has_a_key_a_line_and_comments(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# for the class\none  # of Anna\n\n two#2\n", "utf-8")
    for keys in read_keys(None, str(file)), read_keys(f"@{file}", None), read_keys(str(file), None):
        assert keys == [b"one", b"two#2"]
    file.write_text("anna one\n", "utf-8")
    with pytest.raises(ValueError, match="line 1 of .* has 2 words"):
        read_keys(None, str(file))
    assert read_keys("sk-a/b+c==", None) == [b"sk-a/b+c=="]


def test_a_key_on_the_command_line_is_advised_against(capsys, tmp_path, monkeypatch):
    parse_settings(["--api-key", "one"])
    assert "list of processes" in capsys.readouterr().err
    monkeypatch.setenv("CHATGLM_API_KEY", "one")
    parse_settings([])
    (tmp_path / "keys").write_text("one", "utf-8")
    parse_settings(["--api-key-file", str(tmp_path / "keys")])
    assert capsys.readouterr().err == ""


def test_a_line_of_the_log_stays_one_line_and_moves_nothing():
    record = logging.LogRecord(
        "a", 20, "b", 1, "prompt: %s", ("1\n2\x1b[2J\u202e\u2028👨‍👩‍👧",), None
    )
    assert CleanFormatter("%(message)s").format(record) == (
        "prompt: 1\\n2\\x1b[2J\\u202e\\u2028👨‍👩‍👧"
    )


def test_a_prompt_writes_no_line_of_the_log(open_server):
    ask(open_server.url, "hello\n12:00:00 forged")
    line = until(lambda: [x for x in open_server.log().splitlines() if "forged" in x])
    assert len(line) == 1 and "prompt: hello" in line[0]


def test_where_the_weights_lie_is_told_to_nobody(tmp_path):
    assert Settings(model=str(tmp_path)).model_name == tmp_path.name
    assert Settings(model="THUDM/chatglm3-6b").model_name == "THUDM/chatglm3-6b"


def test_a_missing_key_file_ends_the_start():
    run = subprocess.run(
        [sys.executable, "api.py", "--api-key-file", "nowhere"],
        cwd=HERE, env=BARE, timeout=120, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 2 and "--api-key-file" in run.stderr and run.stderr.count("\n") == 1


# --- 8. Files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [b"[]", b"5", b'{"a": 5}', b'{"a": {"data_offsets": [0]}}', b"[" * 100_000, b'{"a": null}'],
)
def test_a_header_that_is_no_header_means_a_damaged_file(tmp_path, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 9)
    assert not is_whole(file)


def test_a_header_as_large_as_the_file_is_not_read(tmp_path):
    file = tmp_path / "model.safetensors"
    with file.open("wb") as sparse:
        sparse.write((10**11 - 9).to_bytes(8, "little"))
        sparse.truncate(10**11)
    assert not is_whole(file)


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ messages + 1 }}", "{{ messages[9].a.b }}"])
def test_whatever_a_chat_template_raises_is_a_refusal(template):
    plain = byte_tokenizer()
    plain.chat_template = template
    with pytest.raises(ValueError, match="chat template"):
        TemplateTokenizer(plain, [0]).encode_chat([{"role": "user", "content": "hi"}])


ENDLESS_TEMPLATE = "{% for i in range(9999) %}" * 3 + "{% endfor %}" * 3


@pytest.mark.parametrize(
    "template",
    [ENDLESS_TEMPLATE, "{% if messages[0].content != '?' %}" + ENDLESS_TEMPLATE + "{% endif %}"],
)
def test_a_chat_template_that_does_not_end_is_stopped(monkeypatch, template):
    """At start, or if that is harmless, at the first question; the thread is free again."""
    monkeypatch.setattr(TemplateTokenizer, "time_limit", 0.5)
    plain = byte_tokenizer()
    plain.chat_template = template
    with pytest.raises(ValueError, match="the chat template takes over 0.5 s"):
        TemplateTokenizer(plain, [0]).encode_chat([{"role": "user", "content": "hi"}])


def splitting(pattern: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose file brings this regular expression."""
    plain = byte_tokenizer()
    plain.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    steps = plain.backend_tokenizer.pre_tokenizer
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    plain.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, steps])
    return plain


@pytest.mark.parametrize(
    "pattern, said",
    [
        (r"(a+)+$", "cannot read this text.* times 'a'"),  # twice as long for each letter
        (r"( | )+$", "cannot read this text.* times ' '"),
        (r"a+(?=[^a?])", "takes over 1 s for .* times 'a'"),  # four times as long for twice as many
    ],
)
def test_a_tokenizer_that_a_text_makes_slow_is_refused_at_start(pattern, said):
    with pytest.raises(ValueError, match=said):
        TemplateTokenizer(splitting(pattern), [0])


def test_a_text_that_a_tokenizer_gives_up_is_refused_and_the_next_is_read():
    tokenizer = TemplateTokenizer(splitting(r"(z+)+$"), [0])  # harmless at start
    for encode in (
        tokenizer.encode,
        tokenizer.encode_plain,
        lambda text: tokenizer.encode_chat([{"role": "user", "content": text}]),
    ):
        with pytest.raises(ValueError, match="the tokenizer cannot read this text"):
            encode("z" * 40 + "!")
        assert tokenizer.decode(encode("你好")) == "你好"


def test_a_time_limit_never_reaches_what_comes_after():
    stopped = 0
    for number in range(200):
        try:
            with time_limit(0.002):
                end = time.monotonic() + 0.0005 * (number % 20)
                while time.monotonic() < end:
                    pass
        except TimeoutError:
            stopped += 1
        sum(range(20_000))  # it would be raised here
    assert 0 < stopped


def test_a_time_limit_that_strikes_on_the_way_out_of_the_block_ends_too():
    """It is raised between two lines, and one of these may be contextlib's."""
    limit = time_limit(0.001)
    with pytest.raises(TimeoutError):  # in place of `__exit__`, in which it would come
        limit.__enter__()
        while True:
            time.sleep(0.001)
    closing = threading.Thread(target=limit.gen.close, daemon=True)
    closing.start()
    closing.join(10)
    assert not closing.is_alive()


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_layers", 10**9),
        ("seq_length", 10**15),
        ("hidden_size", 10**12),
        ("padded_vocab_size", 2**62),
        ("ffn_hidden_size", 2**40),
        ("kv_channels", 10**18),
    ],
)
def test_sizes_that_no_memory_holds_are_refused_at_once(tmp_path, field, value):
    folder = tmp_path / "foreign"
    shutil.copytree(HERE / "chatglm" / "tiny", folder, ignore=shutil.ignore_patterns("*.py"))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, field: value}), "utf-8")
    with pytest.raises(ValueError, match="config.json|GiB|cannot be divided|hidden_size"):
        chatglm.load(folder)


def test_a_line_of_spaces_is_seen_in_time_to_be_no_name():
    begun = time.process_time()
    assert not is_tool_name(" " * 100_000 + "\u4e00")
    assert time.process_time() - begun < 1
