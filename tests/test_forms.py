"""Answers of a form: JSON, JSON of a schema, calls of tools. jsonschema judges.

pytest tests/test_forms.py
"""

import asyncio
import json
import random
from contextlib import aclosing, suppress

import jsonschema
import pytest
import requests
import torch
from torch.overrides import TorchFunctionMode

import chatglm
from chatglm import InvalidField, SamplingParams
from chatglm.text import forms
from chatglm.text.constraint import GrammarCompiler, next_biases
from chatglm.text.forms import CallableTool, CallForm, JsonForm
from chatglm.text.tools import declare, read_call
from chatglm.tiny import evaluation
from tests.original import byte_fallback, golden, native
from tests.servers import LIMIT

HELLO = [{"role": "user", "content": "请用 JSON 介绍 HTTP"}]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
NODE = {
    "type": "object",
    "properties": {
        "value": {"type": "number"},
        "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
    },
    "required": ["value", "next"],
}
SCHEMAS = {
    "any object": {"type": "object"},
    "person": PERSON,
    "optional": {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "null"}}},
    "choice": {"enum": ["red", "green", 3, None, {"a": [1]}]},
    "list": {
        "type": "array",
        "items": {"type": "string", "maxLength": 3},
        "minItems": 2,
        "maxItems": 4,
    },
    "bounds": {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": -3, "maximum": 120}},
        "required": ["n"],
    },
    "pattern": {"type": "string", "pattern": "^[a-f]{2}-[0-9]{4}$"},
    "date": {"type": "string", "format": "date"},
    "either": {"anyOf": [PERSON, {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}]},
    "tree": {"$defs": {"node": NODE}, "$ref": "#/$defs/node"},
    "deep": {
        "type": "object",
        "properties": {"a": {"type": "object", "properties": {"b": PERSON}, "required": ["b"]}},
        "required": ["a"],
    },
    "fixed": {"const": {"a": 'ä"\\\n'}},
    "quarters": {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 2},
}
KNOWN = {tool["name"]: tool for tool in evaluation.TOOLS}
TOOLS = [
    KNOWN["get_weather"],
    KNOWN["calculate"],
    {
        "name": "mix.it-1",
        "parameters": {
            "type": "object",
            "properties": {
                "n": {"type": "integer"},
                "on": {"type": "boolean"},
                "unit": {"enum": ["c", None]},
                "node": {"$ref": "#/$defs/node"},
            },
            "required": ["on", "unit"],
            "$defs": {"node": NODE},
        },
    },
    {
        "name": "no_python",
        "parameters": {
            "type": "object",
            "properties": {"a-b": {"type": "string"}},
            "required": ["a-b"],
        },
    },
    {"name": "nothing", "parameters": {}},
]
FUNCTIONS = [{"type": "function", "function": tool} for tool in TOOLS]


def fits(value, schema):
    return not list(jsonschema.Draft202012Validator(schema).iter_errors(value))


def tool_of(tool, **settings):
    return CallableTool(tool["name"], tool["parameters"], "tools.0.function.parameters", **settings)


async def answer(engine, messages=HELLO, form=None, **params):
    sequence = engine.prepare(messages, SamplingParams(**params), form)
    async with aclosing(await engine.submit(sequence)) as chunks:
        return [chunk async for chunk in chunks][-1]


@pytest.fixture(scope="module")
def engine():
    tokenizer, model = chatglm.load()
    with chatglm.Engine(tokenizer, model) as engine:
        yield engine


# Each kind of tokenizer. The golden networks' numbers are random, and so are their answers.

KINDS = ["chatglm1", "chatglm2", "chatglm3", "glm4", "llama"]


@pytest.fixture(scope="module", params=KINDS)
def wild(request, tmp_path_factory):
    if request.param == "llama":
        folder = native(tmp_path_factory.mktemp("llama"), "Llama", words=byte_fallback)
        tokenizer, model = chatglm.load(folder, device="cpu", dtype="float32")
    else:
        tokenizer, model = golden(request.param)[:2]
    with chatglm.Engine(tokenizer, model) as engine:
        yield engine


@pytest.mark.parametrize("name", SCHEMAS)
def test_whatever_the_network_says_the_answer_fits_its_schema(wild, name):
    form = JsonForm(SCHEMAS[name], "response_format", strict=True)

    async def all_at_once():
        asked = [
            answer(wild, form=form, seed=seed, max_new_tokens=100, temperature=2.0, top_p=1.0)
            for seed in range(8)
        ]
        return await asyncio.gather(*asked)

    for chunk in asyncio.run(all_at_once()):
        assert fits(json.loads(chunk.text), SCHEMAS[name]), chunk


def test_whatever_the_network_says_a_call_can_be_read_and_fits(wild):
    form, parameters = (
        CallForm([tool_of(t) for t in TOOLS]),
        {t["name"]: t["parameters"] for t in TOOLS},
    )
    if (
        wild.tokenizer.chat_format.startswith("chatglm")
        and wild.tokenizer.chat_format != "chatglm3"
    ):
        pytest.skip("a format without tools")

    async def all_at_once():
        asked = [
            answer(wild, form=form, seed=seed, max_new_tokens=120, temperature=2.0, top_p=1.0)
            for seed in range(16)
        ]
        return await asyncio.gather(*asked)

    called = set()
    for chunk in asyncio.run(all_at_once()):
        call = read_call(chunk.raw, parameters)
        assert call and fits(json.loads(call.arguments), parameters[call.name]), chunk
        called.add(call.name)
    assert len(called) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_the_tokens_are_their_text(kind, tmp_path):
    if kind == "llama":
        tokenizer, _ = chatglm.load(native(tmp_path, "Llama", words=byte_fallback), device="cpu")
    else:
        tokenizer = golden(kind)[0]
    vocabulary = GrammarCompiler(tokenizer, tokenizer.vocab_size).vocabulary()
    anchor = tokenizer.decode([tokenizer.anchor])
    draw = random.Random(0)
    for _ in range(300):
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(3)]
        if any(vocabulary.is_special_token(i) for i in ids):
            continue
        ours = tokenizer.detokenizer()
        ours.push([tokenizer.anchor, *ids])
        text = ours.finish()[len(anchor) :]
        theirs = vocabulary.decode_str(ids)
        if "\ufffd" not in text + theirs and kind != "chatglm1":  # that one cleans its text
            assert text == theirs, ids
    text = 'a {"b": 1.5}\n\t 你好    x'
    ids = tokenizer.encode("\n" + text)
    assert vocabulary.decode_str(ids).lstrip(" ").endswith(text), vocabulary.decode_str(ids)


# With the tiny model


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", ["any object", "person", "deep"])
def test_the_tiny_model_gives_json_every_time(engine, name, seed):
    form = JsonForm(SCHEMAS[name], "response_format")
    chunk = asyncio.run(answer(engine, form=form, seed=seed, max_new_tokens=150))
    assert fits(json.loads(chunk.text), SCHEMAS[name])


def test_the_right_one_of_several_tools_is_called(engine):
    for question, name in [
        ("上海今天天气怎么样？", "get_weather"),
        ("What is 12+30?", "calculate"),
    ]:
        messages = declare([{"role": "user", "content": question}], TOOLS[:2])
        form = CallForm([tool_of(tool) for tool in TOOLS[:2]])
        chunk = asyncio.run(answer(engine, messages, form, temperature=0))
        assert read_call(chunk.raw, ["get_weather", "calculate"]).name == name


def test_where_no_call_is_required_words_will_do_and_calls_fit(engine):
    form = CallForm([tool_of(tool, strict=True) for tool in TOOLS[:2]], required=False)
    answers = {}
    for question in ("上海今天天气怎么样？", "什么是 HTTP？"):
        messages = declare([{"role": "user", "content": question}], TOOLS[:2])
        formed = asyncio.run(answer(engine, messages, form, temperature=0))
        free = asyncio.run(answer(engine, messages, temperature=0))
        assert formed.text == free.text  # the model does what it would have done
        answers[question] = read_call(formed.raw, ["get_weather", "calculate"])
    assert json.loads(answers["上海今天天气怎么样？"].arguments) == {"city": "上海"}
    assert answers["什么是 HTTP？"] is None


def test_calls_or_json(engine):
    form = CallForm([tool_of(TOOLS[0])], required=False, otherwise=JsonForm(PERSON, "f"))
    messages = declare([{"role": "user", "content": "上海今天天气怎么样？"}], TOOLS[:1])
    chunk = asyncio.run(answer(engine, messages, form, temperature=0))
    assert read_call(chunk.raw, ["get_weather"])
    for seed in range(8):
        asked = answer(
            engine, HELLO, form, seed=seed, max_new_tokens=100, temperature=2.0, top_p=1.0
        )
        chunk = asyncio.run(asked)
        assert read_call(chunk.raw, ["get_weather"]) or fits(json.loads(chunk.text), PERSON)


def test_neighbours_notice_nothing_and_a_crowd_changes_nothing(engine):
    form, plain = JsonForm(PERSON, "f"), {"seed": 5, "max_new_tokens": 40}
    forms = [form, None] * 8

    async def together():
        return await asyncio.gather(*[answer(engine, form=each, **plain) for each in forms])

    alone = [asyncio.run(answer(engine, form=each, **plain)).text for each in (form, None)]
    assert [chunk.text for chunk in asyncio.run(together())] == alone * 8


def test_an_answer_at_its_limit_is_brought_to_an_end_and_says_so(engine):
    for seed in range(5):
        chunk = asyncio.run(
            answer(engine, form=JsonForm(PERSON, "f"), seed=seed, max_new_tokens=24)
        )
        assert fits(json.loads(chunk.text), PERSON) and chunk.completion_tokens <= 24
        assert chunk.finish_reason in ("length", "stop")
    text = JsonForm({"type": "string", "minLength": 500}, "f")
    chunk = asyncio.run(answer(engine, form=text, seed=1, max_new_tokens=24))
    assert chunk.finish_reason == "length"  # there is no end that near


def test_an_answer_that_the_client_has_begun_is_taken_into_account(engine):
    begun = [*HELLO, {"role": "assistant", "content": '{"name": "Ann",'}]
    chunk = asyncio.run(answer(engine, begun, JsonForm(PERSON, "f"), seed=1, max_new_tokens=60))
    whole = json.loads('{"name": "Ann",' + chunk.text)
    assert fits(whole, PERSON) and whole["name"] == "Ann"
    with pytest.raises(InvalidField, match="messages"):
        engine.prepare(
            [*HELLO, {"role": "assistant", "content": "Well,"}], None, JsonForm(PERSON, "f")
        )


class TorchCalls(TorchFunctionMode):
    """Writes down what of torch is called by the thread in this block."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(func)
        return func(*args, **(kwargs or {}))


def test_a_thread_that_prepares_a_request_calls_nothing_of_torch(engine):
    """It would start worker threads, and those of the model would be slower from then on."""
    question = [{"role": "user", "content": "hi"}]
    with TorchCalls() as calls:
        engine.prepare(question, SamplingParams(logit_bias=((5, 1.0),), logprobs=20, seed=1))
        engine.prepare("a text", SamplingParams(repetition_penalty=1.1))
        engine.prepare(declare(question, evaluation.TOOLS), SamplingParams(), JsonForm({}, "f"))
        engine.prepare(question, SamplingParams(), JsonForm(PERSON, "f"))
    assert not calls.names


def test_a_constraint_goes_back_as_after_a_pause(engine):
    compiler = GrammarCompiler(engine.tokenizer, engine.model.config.vocab_size)
    constraint = compiler.compile(JsonForm(PERSON, "f"))
    tokens = engine.tokenizer.encode('{"name": "Ann", "age": 7}')
    vocab_size = engine.model.config.vocab_size

    def biases(n):
        constraint.advance(tokens[:n], 1000)
        return next_biases([constraint], vocab_size)[0]

    in_order = [biases(n) for n in range(len(tokens))]
    for n in (3, len(tokens) - 1, 0):
        assert torch.equal(biases(n), in_order[n])
    assert all(bias[token] == 0 for bias, token in zip(in_order, tokens, strict=True))


# What cannot be kept is refused, before it takes time


def alternatives(depth):
    """Two kilobytes for a grammar of 2 to the power of `depth` alternatives."""
    schemas = {
        f"d{i}": {
            "anyOf": [
                {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}], "properties": {f"{name}{i}": {}}}
                for name in "pq"
            ]
        }
        for i in range(depth)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**schemas, f"d{depth}": {"type": "object"}}}


@pytest.mark.parametrize(
    "schema, word",
    [
        ({"type": "string", "format": "poem"}, "poem"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "string", "pattern": "(?=a)b"}, "regex"),
        ({"type": "sting"}, "sting"),
        ({"enum": ["x" * 100] * (forms.MAX_SCHEMA // 100)}, "longer than"),
        ({"allOf": [{"type": "string", "pattern": f".*a.{{{n}}}"} for n in range(40)]}, "allOf"),
        ({"properties": {"allOf": {"allOf": [{}, {}]}}}, "allOf"),
        ({"type": "integer", "multipleOf": 999983}, "multipleOf"),
        ({"$ref": "#/$defs/a", "pattern": ".*a.{20}", "$defs": {"a": {"type": "string"}}}, "ref"),
        ({"const": "x" * 3000}, "more than 2000"),
        ({"type": "string", "pattern": "(a|" * 1000 + ")" * 1000}, "more than 2000"),
        ({"$ref": "http://127.0.0.1/x.json"}, "127.0.0.1"),
        ({"patternProperties": {"^" + r"\p{L}?" * 400 + "$": {}}}, "more than 2000"),
        ({"patternProperties": 5}, "patternProperties"),
        ({"type": "integer", "multipleOf": True}, "multipleOf"),
        (alternatives(10), "too many alternatives"),
        ({"$ref": "#"}, "nothing can be written"),
        ({"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}, "nothing can be written"),
        (
            {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}},
            "nothing can be written",
        ),
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused_by_name(engine, schema, word):
    with pytest.raises(InvalidField, match=word) as caught:
        engine.prepare(HELLO, None, JsonForm(schema, "response_format", strict=True))
    assert caught.value.field == "response_format" and "\n" not in str(caught.value)


@pytest.mark.parametrize("required", [[[]], [5], [None], ["a", []], {}, "a"])
def test_what_a_tool_requires_may_be_anything(engine, required):
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": required}
    with suppress(InvalidField):
        engine.prepare(HELLO, None, CallForm([CallableTool("f", schema, "tools.0")]))


def test_many_tools_with_many_arguments_are_not_too_many(engine):
    properties = {f"argument{n}": {"type": "string", "description": "..."} for n in range(12)}
    form = CallForm(
        [
            CallableTool(f"t{n}", {"type": "object", "properties": properties}, "f")
            for n in range(64)
        ]
    )
    assert engine.prepare(HELLO, None, form).constraint


def test_the_schemas_of_all_tools_together_are_bounded(engine):
    many = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(250)}}
    form = CallForm([CallableTool(f"t{n}", many, "f") for n in range(20)])
    with pytest.raises(InvalidField, match="tools have schemas of over"):
        engine.prepare(HELLO, None, form)


def test_what_is_not_strict_is_kept_as_far_as_it_goes(engine):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "not": {"const": 1}}},
        "if": {},
    }
    chunk = asyncio.run(answer(engine, form=JsonForm(schema, "f"), seed=1, max_new_tokens=40))
    assert isinstance(json.loads(chunk.text), dict)


def test_names_in_a_schema_are_not_taken_for_its_words(engine):
    inner = {
        "type": "object",
        "properties": {"allOf": {"type": "boolean"}, "type": {"type": "null"}},
    }
    schema = {
        "type": "object",
        "properties": {"properties": inner, "enum": {"const": inner}},
        "required": ["properties", "enum"],
    }
    form = JsonForm(schema, "f", strict=True)
    for seed in range(5):
        chunk = asyncio.run(
            answer(engine, form=form, seed=seed, max_new_tokens=200, temperature=2.0)
        )
        assert fits(json.loads(chunk.text), schema) and json.loads(chunk.text)["enum"] == inner


def test_a_grammar_that_grows_too_costly_breaks_its_own_answer_off(engine):
    schema = {"type": "string", "pattern": "(x|xx|xxx)*a(.|..){300}b.{300}c"}

    async def both():
        bad = answer(engine, form=JsonForm(schema, "f"), seed=1, temperature=2.0, top_p=1.0)
        return await asyncio.gather(bad, answer(engine, seed=1), return_exceptions=True)

    bad, good = asyncio.run(both())
    assert isinstance(bad, chatglm.EngineError) and "take too long to keep to" in str(bad)
    assert good.text == asyncio.run(answer(engine, seed=1)).text


# Over HTTP


def ask(url, **fields):
    body = {"messages": HELLO, "seed": 3, "max_tokens": 100, **fields}
    return requests.post(url + "/v1/chat/completions", json=body, timeout=LIMIT)


def test_response_format_over_http(url):
    form = {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON, "strict": True}}
    for fields in ({}, {"n": 3}):
        for choice in ask(url, response_format=form, **fields).json()["choices"]:
            assert fits(json.loads(choice["message"]["content"]), PERSON)
    whole = ask(url, response_format={"type": "json_object"}).json()["choices"][0]
    assert isinstance(json.loads(whole["message"]["content"]), dict)
    assert ask(url, response_format={"type": "text"}, temperature=0).status_code == 200


def test_a_tool_that_is_required_is_called_over_http(url):
    messages = [{"role": "user", "content": "上海今天天气怎么样？"}]
    answered = ask(url, messages=messages, tools=FUNCTIONS, tool_choice="required").json()
    choice = answered["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    call = choice["message"]["tool_calls"][0]["function"]
    parameters = {tool["name"]: tool["parameters"] for tool in TOOLS}
    assert fits(json.loads(call["arguments"]), parameters[call["name"]])


@pytest.mark.parametrize(
    "fields, field",
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
            "response_format.json_schema.schema",
        ),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "strict": True, "parameters": {"not": {}}},
                    }
                ]
            },
            "tools.0.function.parameters",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_what_is_wrong_with_a_form_is_said_by_field(url, fields, field):
    refused = ask(url, **fields)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["param"] == field and error["message"].startswith(field), error
