"""Tool calls: what a model wrote is read, never run; text streams until it must be a call."""

import asyncio
import json
import sys
import time
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from chatglm.engine.sequence import Chunk
from chatglm.text.rounds import to_rounds
from chatglm.text.template import TemplateTokenizer
from chatglm.text.tokenizer import ChatGLMTokenizer
from chatglm.text.tools import (
    INTRODUCTION,
    declare,
    may_be_call,
    published_response,
    read_call,
    tool_names,
    write_call,
)
from server.answers import deltas
from server.openai_chat import ChatCompletionRequest
from server.stops import StopSearch

GOLDEN = Path(__file__).parent / "golden" / "chatglm3"
WEATHER = {
    "name": "get_weather",
    "description": "查询某个城市的天气",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}
CALL = "get_weather\n ```python\ntool_call(city='北京', days=3, unit=None)\n```"


def run(agen):
    async def collect():
        return [item async for item in agen]

    return asyncio.run(collect())


async def chunks(*texts):
    """An answer that grows by these pieces; ChatGLM3's first line is not for the user."""
    for i in range(1, len(texts) + 1):
        raw = "".join(texts[:i])
        yield Chunk(raw.partition("\n")[2], raw, 5, i, "stop" if i == len(texts) else None)


def test_a_call_is_read_as_its_name_and_its_arguments_in_json():
    call = read_call(CALL, ["calculate", "get_weather"])
    assert call.name == "get_weather"
    assert json.loads(call.arguments) == {"city": "北京", "days": 3, "unit": None}


def test_what_is_written_as_a_call_is_read_as_that_call():
    arguments = {"text": 'it\'s "quoted"\n', "list": [1, 2.5, True, None], "nested": {"a": "‘’"}}
    message = write_call("f", arguments)
    raw = message["metadata"] + "\n " + message["content"]
    assert json.loads(read_call(raw, ["f"]).arguments) == arguments


def test_the_form_of_glm_4_is_a_name_and_json():
    call = read_call('get_weather\n{"city": "北京"}', ["get_weather"])
    assert json.loads(call.arguments) == {"city": "北京"}


@pytest.mark.parametrize(
    "code",
    [
        "tool_call(x=__import__('os').system('touch {path}'))",
        "__import__('os').system('touch {path}')",
        "tool_call(x=open('{path}', 'w'))",
        "tool_call(x=[open('{path}', 'w') for _ in '1'])",
        "tool_call(x=(lambda: open('{path}', 'w'))())",
        'tool_call(x=f\'{{open("{path}", "w")}}\')',
        "tool_call(**{{'x': open('{path}', 'w')}})",
        "tool_call(open('{path}', 'w'))",
        "tool_call(x=1) + open('{path}', 'w')",
        "(tool_call := open)('{path}', 'w')",
        "tool_call(x=1)(y=open('{path}', 'w'))",
        "exec(\"open('{path}', 'w')\")",
        "tool_call(x={{1, 2}})",
        "tool_call(x=b'bytes')",
        "tool_call(x=1j)",
        "tool_call(x=9**9**9**9)",
        "tool_call(x=" + "(" * 5000 + ")" * 5000 + ")",
        "tool_call(",
        "",
        "tool_call(x=1); tool_call(x=2)",
        "import os",
        "other(x=1)",
        "tool_call('北京')",
    ],
)
def test_what_is_no_plain_call_stays_text_and_nothing_is_run(code, tmp_path):
    path = tmp_path / "harm"
    raw = f"get_weather\n ```python\n{code.format(path=path)}\n```"
    assert read_call(raw, ["get_weather"]) is None
    assert not path.exists()
    [*_, last] = run(deltas(chunks(raw), ["get_weather"], []))
    assert (last.text, last.call, last.finish_reason) == (raw.partition("\n")[2], None, "stop")


@pytest.mark.parametrize(
    "raw",
    [
        CALL.replace("get_weather", "rm"),
        "get_weather",
        "\n" + CALL,
        'get_weather\n["北京"]',
        "get_weather\nIt is sunny.",
    ],
)
def test_only_a_declared_name_with_arguments_is_a_call(raw):
    assert read_call(raw, ["get_weather"]) is None


def python_call(code: str) -> str:
    return f"f\n ```python\ntool_call({code})\n```"


def cpu_time(function, *args) -> float:
    """The least of some tries: what else the machine does can only add to it."""
    times = []
    for _ in range(5):
        begin = time.thread_time()
        function(*args)
        times.append(time.thread_time() - begin)
    return min(times)


HOSTILE = {
    "keywords": lambda n: python_call(",\n".join(["a=1"] * (n // 8))),
    "keywords on a line": lambda n: python_call(",".join(["a=''"] * (n // 8))),
    "empty lines": lambda n: python_call("\n" * n + ",\n".join(["a=''"] * (n // 100))),
    "a list": lambda n: python_call("a=[" + "1," * n + "]"),
    "an f-string": lambda n: python_call("a=f'" + "{1}" * n + "'"),
    "a string without an end": lambda n: python_call("a='" + r"\'" * n),
    "strings without an end": lambda n: python_call("a=" + r"\'''" * n),
    "escapes": lambda n: python_call("a='" + r"\n" * n + "'"),
    "spaces": lambda n: python_call("a=" + " " * n + "1"),
    "comments": lambda n: python_call("#'\n" * n + "a=1"),
    "brackets": lambda n: python_call("a=" + "[" * n + "]" * n),
    "JSON": lambda n: 'f\n{"a":[' + "1," * n + "1]}",
    "JSON in lists": lambda n: 'f\n{"a":' + "[" * n + "]" * n + "}",
}


@pytest.mark.parametrize("write", HOSTILE.values(), ids=HOSTILE)
def test_reading_a_call_takes_time_in_proportion_to_its_length_at_most(write):
    short, long = (cpu_time(read_call, write(n), ["f"]) for n in (2_000, 16_000))
    assert long < 24 * max(short, 0.0005)  # eight times the length; the square would be 64


@pytest.fixture(scope="module")
def time_for_json():
    return cpu_time(json.loads, "[" + "[1]," * 100_000 + "1]")  # a request may hold as much


@pytest.mark.parametrize("write", HOSTILE.values(), ids=HOSTILE)
def test_the_longest_call_is_read_as_quickly_as_some_json(write, time_for_json):
    assert cpu_time(read_call, write(32_000), ["f"]) < 2 * time_for_json


@pytest.mark.parametrize("quote", [repr, json.dumps, "r'''{}'''".format])
def test_a_file_of_many_kilobytes_may_be_an_argument(quote):
    text = "it's 北京: {\n\t\"a\": f'1'}\\\n" * 1500
    call = read_call(python_call(f"path='a.txt', text={quote(text)}, é=1"), ["f"])
    assert json.loads(call.arguments) == {"path": "a.txt", "text": text, "é": 1}


@pytest.mark.parametrize(
    "raw",
    [
        python_call(r"a='\ud800'"),
        python_call("a='\ud800'"),
        python_call(r"a={'\udfff': 1}"),
        python_call("a='\0'"),
        python_call("a=" + "1" * 5000),
        python_call("a=0x" + "f" * 5000),
        python_call("a=" + "[" * 100 + "]" * 100),
        python_call("a='" + "a" * 2**16 + "'"),
        'f\n{"a": "\\ud800"}',
        'f\n{"a": "\ud800", "a": 1}',
        'f\n{"a": NaN, "a": 1}',
        'f\n{"a": ' + "1" * 5000 + "}",
        'f\n{"a": ' + "[" * 100 + "]" * 100 + "}",
    ],
)
def test_what_could_not_be_written_in_an_answer_is_no_call(raw):
    assert read_call(raw, ["f"]) is None


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("'北京'", "北京"),
        (r'"é\/"', "é/"),  # JSON
        (r'"\ud83d\ude00"', "😀"),
        ("[1,\r\n true]", [1, True]),
        ("[1,\r True]", [1, True]),
        ("'''x\r\n'y'''", "x\n'y"),
        (r"r'\'\n'", r"\'\n"),
        ("'a' # it's\n \"b\"", "ab"),
        ("(1, -2, 0x10, 1.5e-3)", [1, -2, 16, 0.0015]),
        ("[" * 99 + "]" * 99, json.loads("[" * 99 + "]" * 99)),
    ],
)
def test_a_value_is_json_or_any_python_literal_that_json_has(code, value):
    call = read_call(python_call(f"\r\n é='é',\r b=1, a={code},\n c=2"), ["f"])
    assert json.loads(call.arguments) == {"é": "é", "b": 1, "a": value, "c": 2}


@pytest.mark.parametrize("raw", [python_call("a=-1e999"), 'f\n{"a": -1e999}'])
def test_a_number_that_python_takes_for_infinity_is_the_largest_there_is(raw):
    assert read_call(raw, ["f"])
    response = published_response(raw, raw, ["f"]).response
    assert response == {"name": "f", "parameters": {"a": -sys.float_info.max}}


def test_many_messages_of_one_side_are_joined_in_linear_time():
    def conversation(n):
        answers = [{"role": "assistant", "content": "a" * 100}] * n
        return [{"role": "user", "content": "b"}, *answers]

    short, long = (cpu_time(to_rounds, conversation(n), "\n") for n in (1_000, 8_000))
    assert long < 24 * max(short, 0.0002)  # eight times the length; the square would be 64
    assert to_rounds(conversation(3), "|") == [("b", "|".join(["a" * 100] * 3))]


def test_text_streams_while_tools_are_offered_and_a_call_comes_whole():
    pieces = run(deltas(chunks("\n", " It", " is", " fine"), ["get_weather"], []))
    assert [delta.text for delta in pieces] == [" It", " is", " fine"]
    assert pieces[-1].finish_reason == "stop"
    [only] = run(deltas(chunks(*CALL), ["get_weather"], []))
    assert only.call.name == "get_weather" and only.finish_reason == "tool_calls"


def test_a_name_alone_may_still_become_a_call_and_other_words_may_not():
    for raw in ("", "get_w", "get_weather", "get_weather\n", "get_weather\n ``", "get_weather\n{"):
        assert may_be_call(raw, ["get_weather"])
    for raw in ("\n It", "get_wx", "calculate\n", "get_weather\nIt", "get_weather\n`x"):
        assert not may_be_call(raw, ["get_weather"]), raw


def test_tools_stand_in_the_system_message_as_in_the_golden_data():
    tokenizer = ChatGLMTokenizer((GOLDEN / "tokenizer.model").read_bytes(), "chatglm3")
    golden = json.loads((GOLDEN / "expected.json").read_text("utf-8"))["chats"]
    [chat] = [
        chat
        for chat in golden
        if "get_weather" in json.dumps(chat["history"]) and len(chat["history"]) == 1
    ]
    messages = [{"role": "user", "content": chat["query"]}]
    tools = chat["history"][0]["tools"]
    assert tokenizer.encode_chat(declare(messages, tools)) == chat["input_ids"]


def test_a_stop_sequence_ends_the_text_wherever_it_is_cut():
    for cut in range(1, 6):
        text = "a, b; c"
        pieces = [text[i : i + cut] for i in range(0, len(text), cut)]
        got = run(deltas(chunks("\n", *pieces), [], ["; c", "b; d"]))
        assert "".join(delta.text for delta in got) == "a, b"
        assert got[-1].finish_reason == "stop"
    assert StopSearch([";;"]).before_stop("a;", ended=True) == ("a;", False)


TEMPLATE = """{%- if tools %}TOOLS {{ tools | tojson }}{% endif -%}
{%- for m in messages %}<{{ m.role }}>{{ m.metadata }}
{{ m.content }}{% for c in m.get('CALLS', []) %}{{ c.function.name }}:{{ c.function.arguments.city
}}{% endfor %}{% endfor %}<assistant>"""


@pytest.mark.parametrize(
    ("key", "said"),
    [("tool_calls", "\nget_weather:北京"), ("observation", 'get_weather\n{"city": "北京"}')],
)
def test_a_chat_template_gets_tools_and_calls_in_its_own_way(key, said):
    plain = byte_tokenizer()
    plain.chat_template = TEMPLATE.replace("CALLS", key)
    tokenizer = TemplateTokenizer(plain, [0])
    question = [{"role": "user", "content": "天气？"}]
    messages = declare(question, [WEATHER]) + [write_call("get_weather", {"city": "北京"})]
    text = tokenizer.decode(tokenizer.encode_chat(messages))
    assert '"type": "function"' in text and INTRODUCTION not in text
    assert said in text


def byte_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def completion(**fields) -> ChatCompletionRequest:
    messages = [{"role": "user", "content": "hi"}]
    return ChatCompletionRequest.from_fields({"messages": messages, **fields})


def test_tool_choice_says_what_may_and_what_must_be_called():
    tools = [{"type": "function", "function": {**WEATHER, "name": name}} for name in "ab"]
    named = {"type": "function", "function": {"name": "b"}}
    assert completion(tools=tools).callable_names() == ["a", "b"]
    assert completion(tools=tools, tool_choice="none").callable_names() == []
    assert completion(tools=tools, tool_choice=named).callable_names() == ["b"]
    assert [tool.name for tool in completion(tools=tools, tool_choice=named).form().tools] == ["b"]
    required = completion(tools=tools, tool_choice="required").form()
    assert [tool.name for tool in required.tools] == ["a", "b"] and required.required
    assert completion(tools=tools).form() is None
    assert completion(tools=tools, tool_choice="none").to_messages()[0]["role"] == "user"
    unknown = {"type": "function", "function": {"name": "c"}}
    for wrong in ({"tools": tools, "tool_choice": unknown}, {"tool_choice": "required"}):
        with pytest.raises(ValueError, match="tool_choice"):
            completion(**wrong).callable_names()


def test_the_model_is_told_the_name_the_description_and_the_parameters_alone():
    for strict in ({}, {"strict": True}):
        tools = [{"type": "function", "function": {**WEATHER, **strict}}]
        assert completion(tools=tools).to_messages()[0]["tools"] == [WEATHER]


def test_theirs_becomes_ours_role_by_role():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = completion(
        messages=[
            {"role": "developer", "content": "be brief"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "hi "}, {"type": "text", "text": "there"}],
            },
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "3"},
        ]
    ).to_messages()
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "observation"]
    assert messages[1]["content"] == "hi there"
    assert messages[2] == write_call("f", {"x": 1})


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"n": 17}, "n must be"),
        ({"messages": []}, "messages"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"top_p": "1"}, "top_p"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "messages must have"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages.0.role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content"),
        ({"frequency_penalty": 3.0}, "frequency_penalty"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields, word):
    with pytest.raises(ValueError, match=word):
        completion(**fields).to_messages()


@pytest.mark.parametrize("tools", [5, "f", {"f": 1}, [5], [{"function": -1}], [{"name": 5}], [[]]])
def test_tools_of_no_known_form_have_no_names(tools):
    assert tool_names([{"role": "system", "content": "", "tools": tools}]) == []
