"""What real clients send, from public reports: each test is the sample of a kind.

pytest tests/test_cases.py
"""

import json
import re

import pytest
import requests

import chatglm
import client
from chatglm.tiny.evaluation import TOOLS
from server.openai_chat import ChatCompletionRequest
from server.settings import Settings
from tests.servers import LIMIT
from tests.test_client import run
from tests.test_readme import README

V1 = "/v1/chat/completions"
COUNT = "Count to thirty"


def user(text):
    return [{"role": "user", "content": text}]


def complete(url, content="hello", **fields):
    body = {"messages": user(content), "temperature": 0, **fields}
    return requests.post(url + V1, json=body, timeout=LIMIT)


def choice(url, content="hello", **fields):
    return complete(url, content, **fields).json()["choices"][0]


def ask(url, prompt="hello", **fields):
    body = {"prompt": prompt, "temperature": 0, "stream": False, **fields}
    return requests.post(url, json=body, timeout=LIMIT).json()


# --- 1. How long an answer may be, and how a reader knows that it was cut ------------------------


def test_without_a_limit_an_answer_of_v1_may_fill_the_context(url):
    turn = ["What is HTTP?", "HTTP is the protocol of web pages and APIs. " * 12]
    history, messages = [turn] * 25, []
    for question, response in history:
        messages += [*user(question), {"role": "assistant", "content": response}]
    assert ask(url, history=history)["detail"].startswith("max_length 2048 leaves no room: prompt")
    reply = complete(url, messages=[*messages, *user("hello")]).json()
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"]["prompt_tokens"] > 2048


@pytest.mark.parametrize("limit", [{}, {"max_tokens": 5}])
def test_what_is_too_long_for_v1_is_refused_without_a_word_of_fields_it_has_not(url, limit):
    error = complete(url, "hello " * 9000, **limit).json()["error"]
    assert error["code"] == "context_length_exceeded" and error["param"] == "messages"
    assert error["message"].startswith("the conversation takes ")
    assert "max_length" not in error["message"] and "8192" in error["message"]


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_the_first_visible_token_is_the_first_that_counts(url, tokens):
    reply = complete(url, COUNT, max_tokens=tokens).json()
    text = reply["choices"][0]["message"]["content"]
    assert text and choice(url, COUNT)["message"]["content"].startswith(text)
    assert reply["usage"]["completion_tokens"] == tokens
    assert reply["choices"][0]["finish_reason"] == "length"
    longer = choice(url, COUNT, max_tokens=tokens + 2)["message"]["content"]
    assert longer.startswith(text) and len(longer) > len(text)


def read(url, **fields):
    """The answer of POST / in frames, and whether it was cut, as the README tells to find out."""
    body = {"prompt": COUNT, "temperature": 0, **fields}
    told = {"stream": requests.post(url, json=body, timeout=LIMIT).content.decode()}
    exec(re.search(r"`(frames = .*?)`", README)[1], told)
    return told["frames"][-1], told["cut"]


def test_the_last_frame_comes_twice_where_max_length_cut_the_answer(url):
    whole, cut = read(url)
    assert not cut and whole == ask(url, COUNT)["response"]
    assert ask(url, COUNT)["finish_reason"] == "stop"
    half, cut = read(url, max_length=40)
    assert cut and whole.startswith(half) and half
    assert ask(url, COUNT, max_length=40)["finish_reason"] == "length"
    assert read(url, stop=whole[0]) == ("", False)  # an empty answer that is whole


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("fields, reason", [({}, "stop"), ({"max_length": 40}, "length")])
def test_the_last_event_says_how_the_answer_ended(url, stream, fields, reason):
    body = {"prompt": COUNT, "temperature": 0, "stream": stream, **fields}
    lines = requests.post(url + "/stream", json=body, timeout=LIMIT).content.decode().splitlines()
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    reasons = [json.loads(event).get("finish_reason") for event in events]
    assert reasons == [None] * (len(events) - 1) + [reason]


def test_the_terminal_client_says_that_an_answer_was_cut(url):
    done = run(url, "--temperature", "0", "--max-length", "40", COUNT)
    assert done.returncode == 1 and "cut off" in done.stderr.decode()
    assert done.stdout.decode().strip() == read(url, max_length=40)[0]


@pytest.mark.parametrize("text, cut", [(["a", "ab"], False), (["a", "ab", "ab"], True)])
def test_the_client_sees_a_repeated_frame_wherever_the_bytes_are_cut(text, cut):
    stream = "".join(f"<^>{each}" for each in text).encode()
    for at in range(len(stream)):
        frames = client.frames([stream[:at], stream[at:]])
        with pytest.raises(StopIteration) as end:
            while True:
                next(frames)
        assert end.value.value is cut


# --- 2. Text in other encodings ------------------------------------------------------------------

ENCODED = {
    "GBK": "什么是 HTTP？".encode("gbk"),
    "UTF-8 with a mark": "什么是 HTTP？".encode("utf-8-sig"),
    "UTF-16 with a mark": b"\xff\xfe" + "什么是 HTTP？".encode("utf-16-le"),
    "UTF-8": "什么是 HTTP？".encode(),
}


@pytest.mark.parametrize("stdin", ENCODED.values(), ids=ENCODED)
def test_a_pipe_is_read_right_whatever_its_encoding(url, stdin):
    done = run(url, "--temperature", "0", stdin=stdin)
    assert done.stdout.decode().strip() == ask(url, "什么是 HTTP？")["response"]


def test_the_encoding_that_the_environment_names_is_obeyed(url):
    done = run(
        url, "--temperature", "0", stdin="你好".encode("big5"), PYTHONIOENCODING="big5:replace"
    )
    assert done.stdout.decode("big5").strip()[:4] == ask(url, "你好")["response"][:4]


# --- 3. What is refused is named, readably -------------------------------------------------------


def test_chinese_is_readable_in_a_refusal(url):
    assert ask(url, top_p="什么")["detail"] == "top_p must be a number, not '什么'"
    assert ask(url, top_p="a\u202eb\x1b")["detail"] == r"top_p must be a number, not 'a\u202eb\x1b'"


def test_a_picture_is_refused_as_what_it_is(url):
    picture = {"type": "image_url", "image_url": {"url": "data:,"}}
    reply = complete(url, [{"type": "text", "text": "What is this?"}, picture])
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == "messages.0.content"
    assert error["message"].startswith("messages.0.content has a part of type 'image_url'")
    assert "text" in error["message"]


# --- 4. Fields: not set, mistyped, not supported -------------------------------------------------

NOT_SET = [
    {"seed": -1},
    {"max_tokens": -1},
    {"max_tokens": 0},
    {"max_completion_tokens": 0},
    {"n": 0},
    {"response_format": {"type": ""}},
    {"stop": ""},
    {"stop": [""]},
    {"top_k": -1},
    {"top_p": 0},
    {"tool_choice": ""},
    {"tools": None},
    {"logit_bias": None},
    {"function_call": "none"},
    {"response_format": {"type": "text"}},
]


@pytest.mark.parametrize("fields", NOT_SET, ids=str)
def test_values_that_mean_not_set_count_as_absent(url, fields):
    reply = complete(url, **fields)
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"] == [choice(url)]
    assert "x-unknown-fields" not in reply.headers


@pytest.mark.parametrize(
    "field, value",
    [
        ("guided_json", {"type": "object"}),
        ("structured_outputs", {"json": {}}),
        ("grammar", "root ::= 'a'"),
        ("bad_words", ["no"]),
        ("num_beams", 4),
        ("function_call", {"name": "f"}),
        ("functions", [{"name": "f"}]),
        ("best_of", 2),
        ("seed", -2),
        ("max_tokens", -3),
    ],
)
def test_a_field_that_would_change_the_answer_is_refused_by_name(url, field, value):
    reply = complete(url, **{field: value})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == field


@pytest.mark.parametrize("path", ["/", "/stream", V1])
def test_a_mistyped_field_is_noticed(server, path):
    body = {"prompt": "hello", "messages": user("hello"), "topp": 0.5, "temprature": 0, "x y\n": 1}
    del body["messages" if path != V1 else "prompt"]
    reply = requests.post(server.url + path, json=body, timeout=LIMIT)
    assert reply.status_code == 200
    assert reply.headers["x-unknown-fields"] == "topp, temprature, x?y?"
    told = f"unknown fields are ignored: topp, temprature, x?y? ({reply.headers['x-request-id']})\n"
    assert told in server.log()


def test_what_openai_has_besides_is_no_mistake(url):
    reply = complete(url, user="me", metadata={"a": "b"}, store=False, parallel_tool_calls=True)
    assert reply.status_code == 200 and "x-unknown-fields" not in reply.headers


def test_a_call_in_its_older_form_reaches_the_prompt():
    call = {"name": "get_time", "arguments": '{"zone": "UTC"}'}
    older = {"role": "assistant", "content": None, "function_call": call}
    newer = {"role": "assistant", "content": None, "tool_calls": [{"function": call}]}
    said = [
        ChatCompletionRequest.from_fields({"messages": [*user("hi"), turn, *user("?")]})
        for turn in (older, newer)
    ]
    assert said[0].to_messages() == said[1].to_messages()
    assert "zone" in said[0].to_messages()[1]["content"]


# --- 5. Heads: of answers, and alone -------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/health", "/docs", "/v1/models", "/openapi.json"])
def test_head_is_as_get_without_a_body(url, path):
    head, get = (requests.request(m, url + path, timeout=LIMIT) for m in ("HEAD", "GET"))
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == get.headers["content-length"]


def test_head_generates_nothing(url):
    assert requests.head(url + "/stream?prompt=hi", timeout=LIMIT).status_code == 405


@pytest.mark.parametrize("path", ["/", "/stream", V1, "/health", "/nowhere"])
def test_an_answer_has_the_request_id_that_was_sent_or_a_new_one(server, path):
    body = {"prompt": "hello", "messages": user("hello"), "max_tokens": 1, "max_length": 30}
    for sent in ("course-7/a.b", "no\u00e9", None):
        headers = {"X-Request-Id": sent.encode("latin-1")} if sent else {}
        send = requests.get if path in ("/health", "/nowhere") else requests.post
        reply = send(server.url + path, json=body, headers=headers, timeout=LIMIT)
        told = reply.headers["x-request-id"]
        assert told == sent if sent == "course-7/a.b" else len(told) == 32
        if send is requests.post:
            assert f"tokens/s, X-Request-Id {told}\n" in server.log()


def test_docs_need_no_other_server(url):
    page = requests.get(url + "/docs", timeout=LIMIT).text
    sources = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
    assert len(sources) >= 3 and "/openapi.json" in page
    for source in sources:
        assert source.startswith("/")
        reply = requests.get(url + source, timeout=LIMIT)
        assert reply.ok and len(reply.content) > 1000
        if source.endswith(".js"):  # nor does what it loads
            assert "cdn.jsdelivr.net" not in reply.text


# --- 6. Tools in the published form --------------------------------------------------------------

WEATHER = TOOLS[0]
SYSTEM = (
    "Answer the following questions as best as you can. You have access to the following tools:"
)
QUESTION = "上海现在天气怎么样？"
CALL = {"name": "get_weather", "parameters": {"city": "上海"}}
WRITTEN = "```python\ntool_call(city='上海')\n```"


@pytest.mark.parametrize("tool", [WEATHER, {"type": "function", "function": WEATHER}])
def test_a_call_on_post_has_its_name_and_its_arguments_in_the_published_form(url, tool):
    history = [{"role": "system", "content": SYSTEM, "tools": [tool]}]
    reply = ask(url, QUESTION, history=history)
    assert reply["response"] == CALL
    assert reply["history"][1:] == [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "metadata": "get_weather", "content": WRITTEN},
    ]
    frames, _ = read(url, prompt=QUESTION, history=history)
    assert frames == "get_weather\n" + WRITTEN
    said = requests.post(
        url + "/stream",
        json={"prompt": QUESTION, "history": history, "temperature": 0},
        timeout=LIMIT,
    )
    assert json.loads(said.text.split("\n")[0][6:])["text"] == frames


def test_model_chat_returns_a_call_as_the_published_one_does():
    tokenizer, model = chatglm.load()
    history = [{"role": "system", "content": SYSTEM, "tools": [WEATHER]}]
    response, history = model.chat(tokenizer, QUESTION, history=history, temperature=0)
    assert response == CALL
    assert history[-1] == {"role": "assistant", "metadata": "get_weather", "content": WRITTEN}
    result = "晴，25 度"
    response, history = model.chat(
        tokenizer, result, history=history, role="observation", temperature=0
    )
    assert isinstance(response, str) and "25" in response
    words, history = model.chat(tokenizer, "你好", history=history, temperature=0)
    assert isinstance(words, str) and len(history) == 7


# --- 7. Sampling ---------------------------------------------------------------------------------


def test_stop_ends_an_answer_on_every_route(url):
    whole = ask(url, COUNT)["response"]
    before = whole.partition(" 7")[0]
    for stop in (" 7", [" 7", "nowhere in it"]):
        assert ask(url, COUNT, stop=stop)["response"] == before != whole
        assert ask(url, COUNT, stop=stop)["finish_reason"] == "stop"
        assert read(url, stop=stop) == (before, False)


def test_several_answers_are_what_their_seeds_give_alone(url):
    fields = {"temperature": 2, "top_p": 1.0, "max_tokens": 12}
    reply = complete(url, n=3, seed=5, **fields).json()
    alone = [choice(url, seed=seed, **fields)["message"]["content"] for seed in (5, 6, 7)]
    assert [each["index"] for each in reply["choices"]] == [0, 1, 2]
    assert [each["message"]["content"] for each in reply["choices"]] == alone
    assert len(set(alone)) > 1
    streamed = complete(url, n=3, seed=5, stream=True, **fields).content.decode()
    texts, ends = ["", "", ""], 0
    for line in streamed.split("\n\n")[:-2]:
        (part,) = json.loads(line[6:])["choices"]
        texts[part["index"]] += part["delta"].get("content", "")
        ends += part["finish_reason"] is not None
    assert texts == alone and ends == 3


def test_logprobs_are_told_whole_and_streamed(url):
    fields = {"logprobs": True, "top_logprobs": 2, "max_tokens": 6}
    (whole,) = complete(url, COUNT, **fields).json()["choices"]
    content = whole["logprobs"]["content"]
    assert len(content) == 6
    assert "".join(each["token"] for each in content).strip() == whole["message"]["content"]
    for each in content:
        assert each["logprob"] <= 0 and each["bytes"] == list(each["token"].encode())
        assert each["top_logprobs"][0]["token"] == each["token"]  # greedy
        assert len(each["top_logprobs"]) == 2
    streamed = complete(url, COUNT, stream=True, **fields).content.decode()
    parts = [json.loads(line[6:])["choices"][0] for line in streamed.split("\n\n")[:-2]]
    told = [each for part in parts if part["logprobs"] for each in part["logprobs"]["content"]]
    assert [each["token"] for each in told] == [each["token"] for each in content]
    assert choice(url, COUNT, max_tokens=6)["logprobs"] is None


@pytest.mark.parametrize("stop", [" 7", "7 8", "5"])
@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_end_with_the_text_where_a_stop_sequence_ends_it(url, stop, stream):
    fields = {"logprobs": True, "stop": stop, "max_tokens": 60}
    (whole,) = complete(url, COUNT, **fields).json()["choices"]
    parts = [whole["message"] | {"logprobs": whole["logprobs"]}]
    if stream:
        streamed = complete(url, COUNT, stream=True, **fields).content.decode()
        choices = [json.loads(line[6:])["choices"][0] for line in streamed.split("\n\n")[:-2]]
        parts = [part["delta"] | {"logprobs": part["logprobs"]} for part in choices]
    text = "".join(part.get("content", "") for part in parts)
    told = [each for part in parts if part["logprobs"] for each in part["logprobs"]["content"]]
    assert text and stop not in text and whole["finish_reason"] == "stop"
    assert "".join(each["token"] for each in told).rstrip() == text.rstrip()


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 1.0},
        {"frequency_penalty": 1.0},
        {"temperature": 1.5, "top_k": 1},
        {"temperature": 1.5, "min_p": 1.0, "top_p": 1},
        {"logit_bias": {"5": -100}},
    ],
    ids=str,
)
def test_sampling_fields_are_served(url, fields):
    reply = complete(url, **fields)
    assert reply.status_code == 200 and "x-unknown-fields" not in reply.headers
    if "temperature" in fields:  # only the likeliest token is left
        assert reply.json()["choices"] == [choice(url)]


@pytest.mark.parametrize(
    "field, value",
    [
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"99999999": 1}),
        ("logit_bias", {"5": 101}),
        ("n", 17),
        ("top_logprobs", 21),
        ("presence_penalty", 3),
        ("min_p", 2),
        ("top_k", 1.5),
    ],
)
def test_a_sampling_field_out_of_its_bounds_is_refused_by_name(url, field, value):
    reply = complete(url, **{field: value})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"].startswith(field)


# --- 8. Answers begun by the client; models ------------------------------------------------------


@pytest.mark.parametrize("characters", [3, 9, 15])
def test_an_answer_that_is_begun_is_continued(url, characters):
    whole = choice(url, COUNT)["message"]["content"]
    begun = whole[: whole.index(" ", characters)]
    messages = [*user(COUNT), {"role": "assistant", "content": begun}]
    assert begun + choice(url, messages=messages)["message"]["content"] == whole


def test_an_empty_last_answer_is_none(url):
    messages = [*user("hello"), {"role": "assistant", "content": ""}]
    assert choice(url, messages=messages) == choice(url)


def test_a_model_is_found_by_its_name_and_has_its_context(url):
    (card,) = requests.get(url + "/v1/models", timeout=LIMIT).json()["data"]
    assert card["max_model_len"] == 8192 and card["id"] == "chatglm3-tiny"
    assert requests.get(url + "/v1/models/chatglm3-tiny", timeout=LIMIT).json() == card
    missing = requests.get(url + "/v1/models/gpt-4", timeout=LIMIT)
    assert missing.status_code == 404 and "chatglm3-tiny" in missing.json()["error"]["message"]


def test_strangers_see_a_models_name_and_not_the_servers_folders(tmp_path):
    (tmp_path / "chatglm3-6b").mkdir()
    assert Settings(model=str(tmp_path / "chatglm3-6b")).model_name == "chatglm3-6b"
    assert Settings(model=str(tmp_path / "chatglm3-6b") + "/").model_name == "chatglm3-6b"
    assert Settings(model="THUDM/chatglm3-6b").model_name == "THUDM/chatglm3-6b"
    assert Settings(model=str(tmp_path), served_model_name="glm").model_name == "glm"
