"""Chat programs with a window: what they send when this server is their "OpenAI compatible" one.

pytest tests/test_windowed.py

The bodies (tests/clients/windowed.json) have the fields, the order and the defaults that the public
source of each program has: NextChat 706a18b, Open WebUI 0.12.4, LobeChat 5e912a4, Dify's plugin
7af2283, one-api 8df4a26, AnythingLLM 72aabbd, Chatbox 0d3139e, Cherry Studio 0482167. The words of
long prompts are cut short. What is asked of an answer is what the programs read of it.
"""

import json
from pathlib import Path

import pytest
import requests

from tests.servers import LIMIT, busy, started_with, until

V1 = "/v1/chat/completions"
BODIES = json.loads((Path(__file__).parent / "clients" / "windowed.json").read_text("utf-8"))
short = started_with("--max-length", "900")  # the tiny model may go on and on with a strange tool
REFUSED = {
    "nextchat-picture": "this model reads text alone",
    "chatbox-test-picture": "this model reads text alone",
    "dify-functions": "use tools",
    "dify-web-search": "tools.0.type",
}
UNKNOWN = {  # what the header names
    "openwebui-advanced": "repeat_last_n, num_ctx",
    "dify-validate-thinking": "thinking",
    "dify-extended": "thinking, enable_thinking",
}
JSON = {"Content-Type": "application/json"}
STAINLESS = {"X-Stainless-Lang": "js", "X-Stainless-OS": "Linux", "x-stainless-retry-count": "0"}
HEADERS = {
    "nextchat": {**JSON, "Accept": "*/*", "Authorization": "", "Cache-Control": "no-store"},
    "openwebui": {**JSON, "Accept": "*/*", "X-OpenWebUI-User-Name": "%E7%8E%8B"},
    "lobechat": {**JSON, "Accept": "*/*", "Authorization": "Bearer sk-none", **STAINLESS},
    "dify": {**JSON, "Accept": "*/*", "Accept-Charset": "utf-8", "Authorization": "Bearer x"},
    "oneapi": {**JSON, "Accept": "", "Authorization": "Bearer x", "Accept-Encoding": "gzip"},
    "anythingllm": {**JSON, "Accept": "application/json", "Authorization": "Bearer null"},
    "chatbox": {**JSON, "Accept": "*/*", "Authorization": "Bearer "},
    "cherry": {**JSON, "Authorization": "Bearer x", "X-Api-Key": "x", "X-Title": "Cherry Studio"},
}


def go_escaped(text):
    """JSON as Go writes it."""
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def sent(name):
    """The headers and the bytes of a request, in the form that its program gives them."""
    program, body = name.split("-")[0], BODIES[name]
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    if program == "anythingllm":  # OpenAI's SDK 4
        text = json.dumps(body, ensure_ascii=False, indent=2)
    if program == "oneapi":
        text = go_escaped(text)
    content = text.encode()
    chunked = program in ("oneapi", "nextchat")  # without Content-Length
    return HEADERS[program], iter([content[:40], content[40:]]) if chunked else content


def send(url, name):
    headers, content = sent(name)
    return requests.post(url + V1, content, headers=headers, timeout=LIMIT)


def events(reply):
    """As the strictest of the readers takes them: two line ends, comments, `data: ` with the space,
    JSON, `choices` in each, [DONE] at the end, no event over 64 KiB."""
    assert reply.headers["Content-Type"].startswith("text/event-stream")
    *blocks, rest = reply.content.decode().split("\n\n")
    assert rest == ""
    blocks = [block for block in blocks if not block.startswith(":")]
    assert blocks.pop() == "data: [DONE]"
    assert all(block.startswith("data: ") and len(block) < 2**16 for block in blocks)
    parts = [json.loads(block[6:]) for block in blocks]
    assert all(isinstance(part["choices"], list) for part in parts)
    return parts


@short
@pytest.mark.parametrize("name", [name for name in BODIES if name not in REFUSED])
def test_what_a_program_sends_is_answered_as_it_reads(url, name):
    reply = send(url, name)
    assert reply.status_code == 200, reply.text
    assert reply.headers.get("X-Unknown-Fields", "") == UNKNOWN.get(name, "")
    if not BODIES[name].get("stream"):
        answer = reply.json()
        (choice,) = answer["choices"]
        assert answer["object"] == "chat.completion" and answer["usage"]["total_tokens"]
        calls = choice["message"].get("tool_calls")
        assert choice["message"]["content"] or calls
        assert choice["finish_reason"] in ("tool_calls" if calls else "stop", "length")
        return
    parts = events(reply)
    choices = [part["choices"][0] for part in parts if part["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    assert text or calls
    assert all(call["id"] and call["index"] == 0 and call["function"]["name"] for call in calls)
    assert choices[-1]["finish_reason"] in ("tool_calls" if calls else "stop", "length")
    assert not any(choice["finish_reason"] for choice in choices[:-1])
    wants_usage = BODIES[name].get("stream_options", {}).get("include_usage", False)
    assert bool(parts[-1].get("usage")) == wants_usage


@short
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_in_the_form_that_programs_read(url, name):
    reply = send(url, name)
    assert reply.status_code == 400
    assert REFUSED[name] in reply.json()["error"]["message"]


@short
def test_an_object_that_lobechat_wants_fits_its_schema(url):
    made = json.loads(send(url, "lobechat-object").json()["choices"][0]["message"]["content"])
    assert set(made) == {"description", "summary"}
    message = send(url, "lobechat-object-by-tool").json()["choices"][0]["message"]
    (call,) = message["tool_calls"]
    assert set(json.loads(call["function"]["arguments"])) == {"description", "summary"}


@short
def test_anythingllm_hangs_up_at_the_finish_and_cherry_at_the_first_part(server, url):
    log = len(server.log())
    for name, is_last in [
        ("anythingllm-question", lambda part: part["choices"][0]["finish_reason"]),
        ("cherry-check", lambda part: True),
    ]:
        headers, content = sent(name)
        with requests.post(url + V1, content, headers=headers, stream=True, timeout=LIMIT) as reply:
            lines = (line for line in reply.iter_lines(chunk_size=1) if line.startswith(b"data: {"))
            next(line for line in lines if is_last(json.loads(line[6:])))
        until(lambda: busy(url) == 0)
    until(lambda: server.log()[log:].count("first after") == 2)
    assert ": finished, " in server.log()[log:].splitlines()[0]  # it has all of its answer


@short
@pytest.mark.parametrize("program", HEADERS)
def test_the_list_of_models_is_as_programs_read_it(url, program):
    reply = requests.get(url + "/v1/models", headers=HEADERS[program], timeout=LIMIT)
    (card,) = reply.json()["data"]
    assert card["id"] and card["object"] == "model" and isinstance(card["created"], int)
    assert card["context_length"] == card["max_model_len"] > 0


@short
def test_what_dify_lets_an_author_type_for_a_schema_is_not_lost_without_a_word(url):
    bare = {"type": "object", "properties": {"name": {"type": "string"}}}
    form = {"type": "json_schema", "json_schema": bare}
    body = {"messages": [{"role": "user", "content": "hi"}], "response_format": form}
    reply = requests.post(url + V1, json=body, timeout=LIMIT)
    assert reply.status_code == 400
    assert "response_format.json_schema.schema is required" in reply.json()["error"]["message"]


@short
def test_open_webuis_name_for_the_repetition_penalty_counts(url):
    asked = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 60}
    texts = [
        requests.post(url + V1, json={**asked, **fields}, timeout=LIMIT).json()["choices"]
        for fields in ({"repeat_penalty": 0.5}, {"repetition_penalty": 0.5}, {})
    ]
    assert texts[0] == texts[1] != texts[2]


@short
@pytest.mark.parametrize("origin", ["null", "file://"])
def test_a_program_that_is_a_page_is_told_which_origin_to_allow(url, origin):
    asked = {"json": {"messages": [{"role": "user", "content": "hi"}]}, "timeout": LIMIT}
    reply = requests.post(url + V1, headers={"Origin": origin}, **asked)
    assert reply.status_code == 403
    assert f"--cors-origin '{origin}'" in reply.json()["error"]["message"]


@started_with("--cors-origin", "null,file://")
@pytest.mark.parametrize("origin", ["null", "file://"])
def test_it_is_served_once_it_is_allowed(url, origin):
    headers = {"Origin": origin, "Sec-Fetch-Site": "cross-site"}
    asked = {"json": {"messages": [{"role": "user", "content": "hi"}]}, "timeout": LIMIT}
    reply = requests.post(url + V1, headers=headers, **asked)
    assert reply.status_code == 200 and reply.headers["Access-Control-Allow-Origin"] == origin


@short
@pytest.mark.parametrize("path", ["/v1/responses", "/v1/embeddings", "/api/pricing"])
def test_a_route_that_is_not_there_is_named_and_so_is_the_list(url, path):
    """LobeChat's switch "Responses API" asks for one."""
    reply = requests.post(url + path, json={"model": "chatglm", "input": "hi"}, timeout=LIMIT)
    told = reply.json()
    message = told["error"]["message"] if path.startswith("/v1") else told["detail"]
    assert reply.status_code == 404
    assert message == f"there is no '{path}' here; /docs lists every route"


@short
def test_another_name_of_this_machine_is_refused_in_the_form_of_v1(url):
    """As Docker Desktop calls it."""
    headers = {"Host": "host.docker.internal:8000"}
    refusal = requests.get(url + "/v1/models", headers=headers, timeout=LIMIT)
    assert refusal.status_code == 403
    assert "--allowed-host" in refusal.json()["error"]["message"]
