"""What server/ adds to the textbook's server: settings, refusals, events, disconnects.

pytest tests/test_server.py
"""

import asyncio
import re
import socket
import threading
from contextlib import aclosing, contextmanager

import pytest
import requests
import uvicorn
from fastapi import FastAPI

import chatglm
from api import Chat, process
from server import sse
from server.openai_chat import ChatCompletionRequest
from server.responses import AnswerResponse
from server.settings import Settings, parse_settings
from server.sse import EventStream, answer_events
from tests.servers import LIMIT, started, until

V1 = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}

# --- 1. Settings -------------------------------------------------------------------------------


def test_a_flag_wins_over_the_environment_and_that_over_the_default(monkeypatch):
    assert parse_settings([]).max_waiting == 256
    monkeypatch.setenv("CHATGLM_MAX_WAITING", "7")
    assert parse_settings([]).max_waiting == 7
    assert parse_settings(["--max-waiting", "8"]).max_waiting == 8


@pytest.mark.parametrize(
    "flags, value, on",
    [([], "", False), ([], "0", False), ([], "false", False), ([], "1", True)]
    + [(["--log-prompts"], "", True), (["--log-prompts=0"], "1", False)],
)
def test_prompts_are_logged_only_if_that_is_asked_for(monkeypatch, flags, value, on):
    monkeypatch.setenv("CHATGLM_LOG_PROMPTS", value)
    assert parse_settings(flags).log_prompts is on


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--timeout", "nan"], "argument --timeout: must be at least 0.1, not nan"),
        (["--max-length", "0"], "argument --max-length: must be at least 1, not 0"),
        (["--port", "many"], "argument --port: invalid int value: 'many'"),
        (["--api-key", " "], "argument --api-key: contains no key"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_a_setting_that_cannot_be_used_ends_the_start_with_one_line(capsys, flags, told):
    with pytest.raises(SystemExit) as end:
        parse_settings(flags)
    assert end.value.code == 2
    assert capsys.readouterr().err == f"api.py: {told} (--help lists the flags)\n"


def test_a_key_is_itself_or_a_file_of_keys(tmp_path):
    (tmp_path / "keys").write_text("one\n\n two \n", "utf-8")
    assert Settings(api_key=str(tmp_path / "keys")).keys == [b"one", b"two"]
    assert Settings(api_key="one").keys == [b"one"] and Settings().keys == []


def has_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        return True
    except OSError:
        return False


@pytest.mark.skipif(not has_ipv6(), reason="there is no IPv6 here")
def test_an_ipv6_address_is_printed_as_clients_take_it():
    with started("api.py", "--host", "::1") as server:
        assert server.url.startswith("http://[::1]:")
        assert requests.get(server.url, timeout=LIMIT).ok


# --- 2. Refusals -------------------------------------------------------------------------------

LIST_OF_PARTS = 'a string or a list of {"type": "text", "text": …} parts'
CHOICES = '"none", "auto", "required" or {"type": "function", "function": {"name": …}}'
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}
WRONG = [  # a body of /v1, the field that is named in `param`, and the message
    ([], None, "the body must be a JSON object, not []"),
    ({}, "messages", "messages is required"),
    ({"messages": []}, "messages", "messages must not be empty"),
    ({"messages": "hi"}, "messages", "messages must be a list, not 'hi'"),
    ({"messages": ["hi"]}, "messages.0", "messages.0 must be a JSON object, not 'hi'"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages.0.content",
        f"messages.0.content must be {LIST_OF_PARTS}, not [{{'type': 'text'}}]",
    ),
    ({"tool_choice": 3}, "tool_choice", f"tool_choice must be {CHOICES}, not 3"),
    ({"stop": [1]}, "stop", "stop must be a string or a list of strings, not [1]"),
    ({"top_p": 2}, "top_p", "top_p must be less than or equal to 1, not 2"),
    ({"seed": 2**32}, "seed", "seed must be less than 4294967296, not 4294967296"),
    ({"max_tokens": 2.5}, "max_tokens", "max_tokens must be an integer, not 2.5"),
    ({"stream": 1}, "stream", "stream must be true or false, not 1"),
    ({"functions": [{}]}, "functions", "functions [{}] is not supported; use tools"),
    (
        {"messages": [USER, CALL, USER]},
        "messages.1.tool_calls.0.function.arguments",
        "messages.1.tool_calls.0.function.arguments must be a JSON object, not '['",
    ),
]


@pytest.mark.parametrize("body, field, message", WRONG, ids=[message for *_, message in WRONG])
def test_a_refusal_of_v1_names_the_field_for_people_and_for_programs(url, body, field, message):
    if body and "messages" not in body:
        body = {"messages": [USER], **body}
    reply = requests.post(url + V1, json=body, timeout=LIMIT)
    assert reply.status_code == 400
    error = {"message": message, "type": "invalid_request_error", "param": field, "code": None}
    assert reply.json() == {"error": error}


def test_a_body_that_is_no_json_names_no_field(url):
    error = requests.post(url + V1, b"{", timeout=LIMIT).json()["error"]
    assert error["param"] is None and error["message"].startswith("the body must be a JSON object")


@pytest.mark.parametrize("path", ["/", "/stream", V1])
def test_a_conversation_that_is_too_long_has_a_code(url, path):
    body = {"prompt": "hi " * 9000, "messages": [{**USER, "content": "hi " * 9000}]}
    reply = requests.post(url + path, json=body, timeout=LIMIT)
    assert reply.status_code == 400
    refusal = reply.json()["error"] if path == V1 else reply.json()
    assert refusal["code"] == "context_length_exceeded"
    assert set(refusal) == (
        {"message", "type", "param", "code"} if path == V1 else {"detail", "code"}
    )
    assert path != V1 or refusal["param"] == "messages"


@pytest.mark.parametrize("path", ["/", "/stream"])
def test_another_refusal_is_a_detail_alone(url, path):
    reply = requests.post(url + path, json={"prompt": "hi", "top_p": 2}, timeout=LIMIT)
    assert reply.json() == {"detail": "top_p must be less than or equal to 1, not 2"}


VALUES = [5, -1, 2.5, 1e9, float("nan"), 10**400, "x", True, [], [1], [[]], {}, {"x": 1}]


@pytest.mark.parametrize("body_type", [Chat, ChatCompletionRequest])
def test_no_wrong_value_is_refused_in_pydantics_words(body_type):
    fine = {"prompt": "hi", "messages": [USER]}
    for field in body_type.model_fields:
        for value in VALUES:
            try:
                body_type.from_fields({**fine, field: value})
            except ValueError as error:
                assert re.match(rf"{field}[\w.]* (must |is required)", str(error))
                assert "/docs" not in str(error)  # what is said where we have no words of our own


# --- 3. Events ---------------------------------------------------------------------------------


def test_the_events_are_readable_on_the_wire(url):
    body = {"prompt": "什么是 HTTP？", "temperature": 0, "stream": False}
    lines = requests.post(url + "/stream", json=body, timeout=LIMIT).content.decode().split("\n")
    text, message_id = requests.post(url, json=body, timeout=LIMIT).json()["response"], lines[1][4:]
    data = f'{{"text": "{text}", "message_id": "{message_id}", "finish_reason": "stop"}}'
    assert lines[0] == f"data: {data}"
    assert lines[1:] == [f"id: {message_id}", "", "data: [DONE]", f"id: {message_id}", "", ""]


@contextmanager
def quick_pings():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sse, "PING_INTERVAL", 0.02)
        yield


@pytest.mark.parametrize("moment", ["after an event", "after a ping", "while it waits"])
def test_comments_fill_a_silence_and_closing_the_stream_closes_its_events(moment):
    closed = []

    async def events():
        try:
            yield b"one"
            await asyncio.Event().wait()  # a request that is queued for long
        finally:
            closed.append(True)

    async def read():
        async with aclosing(sse.with_pings(events())) as stream:
            assert await anext(stream) == b"one"
            if moment == "after a ping":
                assert await anext(stream) == await anext(stream) == b": ping\n\n"
            if moment == "while it waits":
                waiting = asyncio.ensure_future(anext(stream))
                await asyncio.sleep(0)
                waiting.cancel()
                await asyncio.wait([waiting])
        await asyncio.sleep(0)  # what was cancelled ends in the loop's next round
        assert closed == [True]

    with quick_pings():
        asyncio.run(read())


# --- 4. Disconnects ----------------------------------------------------------------------------


def test_a_disconnect_is_noticed_while_no_text_comes():
    """Starlette listens for it only where the server declares an ASGI version before 2.4. If this
    fails after an upgrade of uvicorn or starlette, AnswerResponse must listen itself."""
    started_, closed, app = threading.Event(), threading.Event(), FastAPI()

    async def silence():
        try:
            yield "begins"
            started_.set()
            await asyncio.Event().wait()
        finally:
            closed.set()

    app.get("/")(lambda: AnswerResponse(silence()))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        with socket.create_connection(server.servers[0].sockets[0].getsockname()) as reader:
            reader.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
            assert started_.wait(LIMIT)
        assert closed.wait(LIMIT)
    finally:
        server.should_exit = True
        thread.join(LIMIT)


def test_a_client_that_is_gone_before_the_answer_begins_frees_its_place():
    closed = []

    async def chunks():
        try:
            yield None  # as in the engine: once it has started, closing it runs what follows
            yield chatglm.Chunk("text", "text", 1, 1, "stop")
        finally:
            closed.append(True)

    async def gone():
        return {"type": "http.disconnect"}

    async def send(message):
        await asyncio.Event().wait()

    async def answer(response_of):
        source = chunks()
        await anext(source)
        response = response_of(source)
        del source
        await response({"type": "http", "asgi": {"spec_version": "2.3"}}, gone, send)
        del response
        await asyncio.sleep(0.01)  # the loop closes a generator that was dropped
        return closed.pop()

    assert asyncio.run(answer(lambda source: AnswerResponse(process(source))))
    assert asyncio.run(answer(lambda source: EventStream(answer_events(source, in_pieces=True))))
