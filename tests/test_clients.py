"""Other people's clients, as they are published, against a real server.

    pytest tests/test_clients.py

What an answer should be comes from what the interface promises, or from asking the same another
way: at temperature 0 every client has to get what `POST /` says in one piece. One server runs at
a time; a test that needs other settings says so with `started_with`.
"""

import asyncio
import json
import re
import subprocess
import sys
import uuid
from typing import Literal

import httpx
import httpx_sse
import openai
import pydantic
import pytest
import requests
from langchain_community.llms.chatglm import ChatGLM
from langchain_community.llms.chatglm3 import ChatGLM3
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool as langchain_tool
from langchain_openai import ChatOpenAI, OpenAI

from tests.servers import LIMIT, busy, started_with, until

COUNT = "Count from 1 to 100"
PROMPTS = ["Hello", "What is HTTP?", "什么是 HTTP？", COUNT]
# A penalty under 1 is a reward for saying it again: the answer goes on until the context is full.
ENDLESS = {"temperature": 0, "extra_body": {"repetition_penalty": 0.5}, "stream": True}
WEATHER, SUM = "上海现在天气怎么样？", "What is 12 plus 30?"
# The question, the tool it is for, the argument it has, and what the tool says then.
ROUNDS = [(WEATHER, "get_weather", "上海", "晴，25 度"), (SUM, "calculate", "12+30", "42")]


def sdk(url, **settings):
    settings = {"api_key": "none", "timeout": LIMIT, "max_retries": 0, **settings}
    return openai.OpenAI(base_url=url + "/v1", **settings)


@pytest.fixture
def client(url):
    with sdk(url) as client:
        yield client


def user(text):
    return [{"role": "user", "content": text}]


def plain(url, prompt, **fields):
    """What `POST /` answers in one piece: the other way to ask, without any client."""
    body = {"prompt": prompt, "stream": False, "temperature": 0, **fields}
    reply = requests.post(url, json=body, timeout=LIMIT)
    assert reply.status_code == 200, reply.text
    return reply.json()["response"]


def create(client, messages, **fields):
    messages = user(messages) if isinstance(messages, str) else messages
    return client.chat.completions.create(
        **{"model": "chatglm", "temperature": 0, "messages": messages, **fields}
    )


def whole(client, messages, **fields):
    return create(client, messages, **fields).choices[0]


def streamed(client, messages, **fields):
    """The same from a stream, put together by the SDK itself."""
    messages = user(messages) if isinstance(messages, str) else messages
    with client.chat.completions.stream(
        model="chatglm", temperature=0, messages=messages, **fields
    ) as stream:
        return stream.get_final_completion().choices[0]


both_ways = pytest.mark.parametrize("choice", [whole, streamed])
rounds = pytest.mark.parametrize("question, name, argument, result", ROUNDS)


# --- 1. openai ---------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_sdk_gets_the_answer_that_the_textbook_route_gives(client, url, choice, prompt):
    answer = choice(client, prompt)
    assert answer.message.content == plain(url, prompt)
    assert answer.message.role == "assistant" and not answer.message.tool_calls
    assert answer.finish_reason == "stop"


def test_a_stream_of_the_sdk_is_many_parts_with_one_id_and_one_end(client):
    parts = list(create(client, COUNT, stream=True))
    assert len({(part.id, part.created, part.object) for part in parts}) == 1
    assert parts[0].object == "chat.completion.chunk"
    choices = [part.choices[0] for part in parts]
    assert choices[0].delta.role == "assistant"
    assert len([choice for choice in choices if choice.delta.content]) > 10
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["stop"]
    assert choices[-1].finish_reason == "stop"


def test_the_first_part_comes_before_the_answer_is_whole_and_a_closed_stream_frees_its_place(
    client, server, url
):
    with server.held():
        stream = create(client, COUNT, **ENDLESS)
        server.let(10)
        assert next(part for part in stream if part.choices[0].delta.content)
        assert busy(url) == 1
        stream.close()
        until(lambda: busy(url) == 0)


def test_eight_answers_at_once_from_the_async_sdk_are_each_what_they_are_alone(url):
    async def all_of(prompts):
        settings = {"api_key": "none", "timeout": LIMIT, "max_retries": 0}
        async with openai.AsyncOpenAI(base_url=url + "/v1", **settings) as client:
            return await asyncio.gather(*(create(client, prompt) for prompt in prompts))

    answers = [answer.choices[0].message.content for answer in asyncio.run(all_of(PROMPTS * 2))]
    assert answers == [plain(url, prompt) for prompt in PROMPTS] * 2


def test_earlier_messages_count(client, url):
    history = [
        {"role": "system", "content": "Be short."},
        *user("What is HTTP?"),
        {"role": "assistant", "content": whole(client, "What is HTTP?").message.content},
    ]
    answer = whole(client, history + user("Say that in Chinese")).message.content
    assert answer == plain(url, "Say that in Chinese", history=history)
    assert answer != whole(client, "Say that in Chinese").message.content


def test_a_seed_repeats_an_answer_and_another_seed_gives_another(client):
    def answer(seed):
        return whole(client, COUNT, temperature=2, top_p=1, max_tokens=20, seed=seed)

    assert answer(7).message.content == answer(7).message.content
    assert answer(7).message.content != answer(8).message.content


def test_usage_counts_and_a_stream_tells_it_when_asked(client):
    answer = create(client, COUNT)
    assert answer.usage.prompt_tokens > 0 and answer.usage.completion_tokens > 10
    together = answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.total_tokens == together
    *parts, last = create(client, COUNT, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage == answer.usage
    assert all(part.choices and part.usage is None for part in parts)
    assert all(part.usage is None for part in create(client, "Hello", stream=True))


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_the_most_tokens_an_answer_may_have_end_it_with_the_reason_length(client, field):
    everything = whole(client, COUNT).message.content
    answers = [create(client, COUNT, **{field: tokens}) for tokens in (1, 2, 20)]
    assert [answer.usage.completion_tokens for answer in answers] == [1, 2, 20]
    assert {answer.choices[0].finish_reason for answer in answers} == {"length"}
    assert all(everything.startswith(answer.choices[0].message.content) for answer in answers)
    parts = list(create(client, COUNT, stream=True, **{field: 20}))
    said = "".join(part.choices[0].delta.content or "" for part in parts)
    assert said == answers[-1].choices[0].message.content
    assert parts[-1].choices[0].finish_reason == "length"


@both_ways
@pytest.mark.parametrize("stop", [" 7", ["nowhere in it", "15", "12 13"]], ids=["one", "many"])
def test_an_answer_ends_before_the_first_stop(client, choice, stop):
    everything = whole(client, COUNT).message.content
    stops = [stop] if isinstance(stop, str) else stop
    before = min((everything.partition(one)[0] for one in stops), key=len)
    assert 0 < len(before) < len(everything)
    answer = choice(client, COUNT, stop=stop)
    assert answer.message.content == before and answer.finish_reason == "stop"


def test_the_raw_response_is_openai_s_json_and_the_raw_stream_ends_with_done(client, url):
    completions = client.chat.completions
    asked = {"model": "chatglm", "temperature": 0, "messages": user("Hello")}
    raw = completions.with_raw_response.create(**asked)
    assert raw.status_code == 200 and raw.headers["content-type"] == "application/json"
    assert raw.parse().choices[0].message.content == plain(url, "Hello")
    assert json.loads(raw.text)["object"] == "chat.completion"
    with completions.with_streaming_response.create(stream=True, **asked) as raw:
        assert raw.headers["content-type"].partition(";")[0] == "text/event-stream"
        lines = [line for line in raw.iter_lines() if line]
    assert all(line.startswith("data: {") for line in lines[:-1]) and lines[-1] == "data: [DONE]"


def test_the_one_model_is_listed_and_answers_under_its_name(client):
    (model,) = client.models.list().data
    assert model.object == "model" and model.id
    assert create(client, "Hello", model=model.id).model == model.id


# --- 2. openai: tools --------------------------------------------------------------------------


def tool(name, argument, description):
    parameters = {
        "type": "object",
        "properties": {argument: {"type": "string"}},
        "required": [argument],
    }
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


TOOLS = [
    tool("get_weather", "city", "The weather in a city"),
    tool("get_time", "city", "The time in a city"),
    tool("calculate", "expression", "The value of an expression"),
]


def called(choice):
    """The one call in an answer, as a name and its argument without blanks."""
    assert choice.finish_reason == "tool_calls" and choice.message.role == "assistant"
    (call,) = choice.message.tool_calls
    assert call.type == "function" and call.id
    (argument,) = json.loads(call.function.arguments).values()
    return call.function.name, argument.replace(" ", "")


@both_ways
@rounds
def test_a_question_for_a_tool_calls_it_and_its_result_is_the_answer(
    client, choice, question, name, argument, result
):
    call = choice(client, question, tools=TOOLS)
    assert called(call) == (name, argument) and not call.message.content
    told = {"role": "tool", "tool_call_id": call.message.tool_calls[0].id, "content": result}
    answer = choice(client, [*user(question), call.message, told], tools=TOOLS)
    assert result in answer.message.content and not answer.message.tool_calls
    assert answer.finish_reason == "stop"


@rounds
def test_a_streamed_call_says_its_name_and_id_once_and_its_arguments_in_order(
    client, question, name, argument, result
):
    choices = [part.choices[0] for part in create(client, question, tools=TOOLS, stream=True)]
    calls = [call for choice in choices for call in choice.delta.tool_calls or []]
    assert {call.index for call in calls} == {0} and choices[-1].finish_reason == "tool_calls"
    assert [call.function.name for call in calls if call.function.name] == [name]
    assert len([call.id for call in calls if call.id]) == 1 and calls[0].id
    arguments = "".join(call.function.arguments or "" for call in calls)
    call = whole(client, question, tools=TOOLS).message.tool_calls[0]
    assert json.loads(arguments) == json.loads(call.function.arguments)
    assert not any(choice.delta.content for choice in choices)


@both_ways
def test_tools_do_not_get_in_the_way_of_a_question_that_needs_none(client, choice):
    answer = choice(client, "什么是 HTTP？", tools=TOOLS)
    assert answer.finish_reason == "stop" and not answer.message.tool_calls
    assert "HTTP" in answer.message.content


@both_ways
@pytest.mark.parametrize("question", [WEATHER, SUM])
def test_with_the_tool_choice_none_no_tool_is_called(client, choice, question):
    answer = choice(client, question, tools=TOOLS, tool_choice="none")
    assert answer.finish_reason == "stop" and not answer.message.tool_calls
    assert answer.message.content


@both_ways
def test_a_tool_chosen_by_name_is_the_one_that_is_called(client, choice):
    chosen = {"type": "function", "function": {"name": "get_time"}}
    (call,) = choice(client, WEATHER, tools=TOOLS, tool_choice=chosen).message.tool_calls
    assert call.function.name == "get_time" and json.loads(call.function.arguments) is not None


@pytest.mark.parametrize("prompt", ["白日依山尽，", ["1, 2, 3,", "你好"]], ids=["one", "two"])
def test_the_sdk_goes_on_with_a_text_whole_and_streamed(client, prompt):
    asked = {"model": "chatglm", "prompt": prompt, "max_tokens": 20, "temperature": 0}
    whole = client.completions.create(**asked)
    parts = list(client.completions.create(**asked, stream=True))
    assert len(whole.choices) == (1 if isinstance(prompt, str) else 2)
    for choice in whole.choices:
        mine = [part.choices[0] for part in parts if part.choices[0].index == choice.index]
        assert "".join(part.text for part in mine) == choice.text != ""
        assert mine[-1].finish_reason == choice.finish_reason
    assert client.completions.create(**asked).choices == whole.choices


# --- 3. openai: refusals -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value",
    [
        ("n", 17),
        ("messages", []),
        ("messages", [{"role": "assistant", "content": "Hello"}]),
        ("messages", [{"role": "nobody", "content": "Hello"}]),
        ("temperature", 3),
        ("top_p", 1.5),
        ("max_tokens", -2),
        ("seed", -2),
        ("stop", [1]),
        ("tools", "get_time"),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_what_cannot_be_served_is_a_bad_request_that_names_the_field(client, field, value, stream):
    fields = {"messages": user("Hello"), field: value}
    with pytest.raises(openai.BadRequestError) as refusal:
        create(client, fields.pop("messages"), stream=stream, **fields)
    assert set(refusal.value.body) == {"message", "type", "param", "code"}
    assert re.search(rf"\b{field}\b", refusal.value.body["message"])


# --- 4. langchain ------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
def test_langchain_s_chatglm_gets_the_answer_of_the_textbook_route(url, prompt):
    llm = ChatGLM(endpoint_url=url, model_kwargs={"stream": False}, temperature=0)
    assert llm.invoke(prompt) == plain(url, prompt)
    assert ChatGLM(endpoint_url=url, model_kwargs={"stream": False}).invoke(prompt)


def test_langchain_s_chatglm_keeps_the_history_it_is_given(url):
    llm = ChatGLM(
        endpoint_url=url, model_kwargs={"stream": False}, temperature=0, with_history=True
    )
    first = llm.invoke("What is HTTP?")
    assert llm.history == [["What is HTTP?", first]]
    history = list(llm.history)
    assert llm.invoke("Say that in Chinese") == plain(url, "Say that in Chinese", history=history)
    assert len(llm.history) == 2


@pytest.mark.parametrize("prompt", PROMPTS)
def test_langchain_s_chatglm3_gets_the_answer_of_the_textbook_route(url, prompt):
    endpoint = url + "/v1/chat/completions"
    assert ChatGLM3(endpoint_url=endpoint, temperature=0).invoke(prompt) == plain(url, prompt)
    system = ChatGLM3(
        endpoint_url=endpoint, temperature=0, prefix_messages=[SystemMessage("Be short.")]
    )
    history = [{"role": "system", "content": "Be short."}]
    assert system.invoke(prompt) == plain(url, prompt, history=history)


@pytest.fixture
def chat(url):
    return ChatOpenAI(
        base_url=url + "/v1",
        api_key="none",
        model="chatglm",
        temperature=0,
        stream_usage=True,
        max_retries=0,
        timeout=LIMIT,
    )


def in_parts(model, messages):
    """The answer from a stream, put together by langchain itself."""
    first, *others = model.stream(messages)
    return sum(others, first)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_langchain_openai_invokes_and_streams_the_same_answer_and_usage(chat, url, prompt):
    answer, parts = chat.invoke(prompt), in_parts(chat, prompt)
    assert answer.content == parts.content == plain(url, prompt)
    assert answer.response_metadata["finish_reason"] == "stop"
    assert parts.response_metadata["finish_reason"] == "stop"
    count = answer.usage_metadata
    assert count["input_tokens"] + count["output_tokens"] == count["total_tokens"] > 2
    for name in ("input_tokens", "output_tokens", "total_tokens"):
        assert parts.usage_metadata[name] == count[name]


def test_langchain_openai_goes_on_with_texts(url, client):
    llm = OpenAI(
        base_url=url + "/v1", api_key="none", model="chatglm", temperature=0, max_tokens=20
    )
    texts = ["白日依山尽，", "1, 2, 3,"]
    wanted = client.completions.create(model="", prompt=texts, temperature=0, max_tokens=20).choices
    assert llm.batch(texts) == [choice.text for choice in wanted]
    assert "".join(llm.stream(texts[0])) == llm.invoke(texts[0]) == wanted[0].text


@langchain_tool
def get_weather(city: str) -> str:
    """The weather in a city"""
    return "晴，25 度" if city == "上海" else "?"


@langchain_tool
def get_time(city: str) -> str:
    """The time in a city"""
    return "?"


@langchain_tool
def calculate(expression: str) -> str:
    """The value of an expression"""
    return str(sum(map(int, expression.split("+"))))


@pytest.mark.parametrize(
    "answer", [lambda model, messages: model.invoke(messages), in_parts], ids=["invoke", "stream"]
)
@rounds
def test_langchain_openai_calls_python_functions_and_tells_their_results(
    chat, answer, question, name, argument, result
):
    tools = {tool.name: tool for tool in (get_weather, get_time, calculate)}
    model = chat.bind_tools(list(tools.values()))
    messages = [HumanMessage(question)]
    messages.append(answer(model, messages))
    (call,) = messages[-1].tool_calls
    assert call["name"] == name
    told = tools[name].invoke(call)
    assert isinstance(told, ToolMessage) and told.content == result
    final = answer(model, [*messages, told])
    assert result in final.content and not final.tool_calls


class Forecast(pydantic.BaseModel):
    city: Literal["Paris", "上海"]
    sky: Literal["clear", "rain"]
    days: int = pydantic.Field(ge=1, le=9)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_openai_gets_an_object_of_a_class(chat, method):
    model = chat.with_structured_output(Forecast, method=method)
    for question in ("上海今天天气怎么样？", "Who are you?"):
        assert isinstance(model.invoke(question), Forecast)


# --- 5. httpx-sse ------------------------------------------------------------------------------


def connect(client, method, url, **fields):
    """The stream of events, asked for by `POST` in the body or by `GET` in the query."""
    where = {"json": fields} if method == "POST" else {"params": fields}
    return httpx_sse.connect_sse(client, method, url + "/stream", **where)


def events(method, url, **fields):
    with httpx.Client(timeout=LIMIT) as client, connect(client, method, url, **fields) as source:
        assert source.response.status_code == 200
        return list(source.iter_sse())


both_methods = pytest.mark.parametrize("method", ["POST", "GET"])


@both_methods
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_texts_of_the_events_are_the_answer_and_done_ends_them(url, method, prompt):
    *parts, last = events(method, url, prompt=prompt, temperature=0)
    assert last.data == "[DONE]" and len(parts) > 3
    assert {event.event for event in (*parts, last)} <= {"", "message"}  # no error among them
    said = [json.loads(event.data) for event in parts]
    assert "".join(part["text"] for part in said) == plain(url, prompt)
    assert {part["message_id"] for part in said} == {event.id for event in (*parts, last)}
    assert len({event.id for event in parts}) == 1 and parts[0].id


@both_methods
def test_two_answers_have_two_ids(url, method):
    first, second = (events(method, url, prompt="Hello", temperature=0)[0].id for _ in "ab")
    assert first != second


@pytest.mark.parametrize("method, stream", [("POST", False), ("GET", "false")])
def test_an_answer_in_one_piece_is_one_event_and_done(url, method, stream):
    only, done = events(method, url, prompt=COUNT, temperature=0, stream=stream)
    assert json.loads(only.data)["text"] == plain(url, COUNT) and done.data == "[DONE]"


@both_methods
def test_events_answer_with_the_history_in_mind(url, method):
    history = [["What is HTTP?", plain(url, "What is HTTP?")]]
    asked = {"prompt": "Say that in Chinese", "temperature": 0}
    given = json.dumps(history, ensure_ascii=False) if method == "GET" else history
    *parts, _ = events(method, url, history=given, **asked)
    assert "".join(json.loads(part.data)["text"] for part in parts) == plain(
        url, asked["prompt"], history=history
    )


@both_methods
def test_the_first_event_comes_before_the_answer_is_whole_and_hanging_up_ends_it(
    server, url, method
):
    asked = {"prompt": COUNT, "temperature": 0, "repetition_penalty": 0.5, "max_length": 8192}
    with server.held(), httpx.Client(timeout=LIMIT) as client:
        with connect(client, method, url, **asked) as source:
            server.let(10)
            parts = source.iter_sse()  # kept: without it, the connection would be closed
            assert json.loads(next(parts).data)["text"] and busy(url) == 1
        until(lambda: busy(url) == 0)


def test_a_browser_that_comes_back_after_the_end_is_told_to_stop(url):
    last = events("GET", url, prompt="Hello")[-1]
    for identifier in (last.id, str(uuid.uuid4())):
        reply = httpx.get(
            url + "/stream",
            params={"prompt": "Hello"},
            timeout=LIMIT,
            headers={"Last-Event-ID": identifier},
        )
        assert reply.status_code == 204 and reply.content == b""


@both_methods
def test_a_refusal_is_no_stream_of_events(url, method):
    with httpx.Client(timeout=LIMIT) as client, connect(client, method, url, prompt="") as source:
        with pytest.raises(httpx_sse.SSEError):
            next(source.iter_sse())
        assert source.response.status_code == 400
        assert "prompt" in json.loads(source.response.read())["detail"]


# --- 6. Servers with other settings -------------------------------------------------------------


@started_with("--api-key", "secret")
def test_a_wrong_key_is_an_authentication_error_and_the_right_one_gets_an_answer(server):
    with sdk(server.url, api_key="wrong") as client:
        for attempt in (
            lambda: create(client, "Hello"),
            client.models.list,
            lambda: create(client, "Hello", stream=True),
        ):
            with pytest.raises(openai.AuthenticationError) as refusal:
                attempt()
            assert set(refusal.value.body) == {"message", "type", "param", "code"}
    with sdk(server.url, api_key="secret") as client:
        assert whole(client, "Hello").message.content
        assert streamed(client, "Hello").message.content and client.models.list().data


@started_with("--max-concurrency", "1", "--max-waiting", "0")
def test_a_full_queue_is_a_rate_limit_error_until_there_is_room_again(client, server, url):
    with server.held():
        stream = create(client, COUNT, **ENDLESS)
        with pytest.raises(openai.RateLimitError) as refusal:
            create(client, "Hello")
        assert int(refusal.value.response.headers["Retry-After"]) > 0
        assert set(refusal.value.body) == {"message", "type", "param", "code"}
        stream.close()
        until(lambda: busy(url) == 0)
    assert whole(client, "Hello").message.content == plain(url, "Hello")


# --- 7. schemathesis ---------------------------------------------------------------------------


@started_with("--max-length", "64")
def test_every_answer_to_generated_requests_is_one_that_the_schema_announces(server, tmp_path):
    paths = requests.get(server.url + "/openapi.json", timeout=LIMIT).json()["paths"]
    assert {"/", "/stream", "/v1/chat/completions", "/v1/models", "/health"} <= set(paths)
    checks = "not_a_server_error,status_code_conformance,content_type_conformance"
    command = [
        sys.executable,
        "-m",
        "schemathesis.cli",
        "run",
        server.url + "/openapi.json",
        "--checks",
        checks,
        "--phases",
        "examples,coverage,fuzzing",
        "--max-examples",
        "30",
        "--generation-deterministic",
        "--continue-on-failure",
        "--no-shrink",
        "--no-color",
    ]
    run = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=2 * LIMIT, encoding="utf-8"
    )
    assert run.returncode == 0, run.stdout + run.stderr
    until(lambda: busy(server.url) == 0)
    assert "Traceback" not in server.log()
