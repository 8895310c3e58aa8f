"""`/v1/completions`: a text goes on, in no conversation.

pytest tests/test_completions.py
"""

import asyncio
import json

import pytest
import requests
import torch

import chatglm
from tests.original import golden, native
from tests.servers import LIMIT, busy, started_with, until

V1 = "/v1/completions"
POEM = "白日依山尽，"
ENGLISH = "The answer is"


def go_on(url, prompt, **fields):
    reply = requests.post(url + V1, json={"prompt": prompt, **fields}, timeout=LIMIT)
    return reply.json()


def texts(url, prompt, **fields):
    return [choice["text"] for choice in go_on(url, prompt, temperature=0, **fields)["choices"]]


def in_the_engine(tokenizer, model, prompt, number):
    """(The ids of a prompt, the text that goes on with it.)"""

    async def first():
        with chatglm.Engine(tokenizer, model) as engine:
            sequence = engine.prepare(prompt, chatglm.SamplingParams(temperature=0))
            async for chunk in engine.generate(prompt, temperature=0, max_new_tokens=number):
                last = chunk
        return sequence.input_ids, last.text

    return asyncio.run(first())


# --- 1. What the model sees and says -------------------------------------------------------------


@pytest.mark.parametrize("name, number", [("chatglm1", 0), ("chatglm1", 2), ("chatglm2", 0)])
def test_the_chat_formats_that_are_one_text_go_on_as_the_original_does(name, number):
    """Their chats are plain texts to the model, so the original tells how one of these goes on."""
    tokenizer, model, expected = golden(name)
    chat = expected["chats"][number]
    text = chat.get("prompt", f"[Round 1]\n\n问：{chat['query']}\n\n答：")
    ids, made = in_the_engine(tokenizer, model, text, 24)
    assert ids == chat["input_ids"]
    assert made.lstrip() == chat["greedy_text"].lstrip()


@pytest.mark.parametrize("name", ["chatglm3", "glm4"])
def test_a_text_goes_on_as_transformers_itself_goes_on_with_its_ids(name):
    tokenizer, model, expected = golden(name)
    beginning = expected["chats"][0]["input_ids"][:2]  # [gMASK] and sop, as the original has them
    ids = [*beginning, *tokenizer.encode("你好 <|user|>")]
    prompt = torch.tensor([ids])
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=24,
        pad_token_id=0,
        eos_token_id=tokenizer.stop_ids,
    )[0, len(ids) :].tolist()
    made = [i for i in made if i not in tokenizer.stop_ids]
    wanted = tokenizer.decode(ids + made).removeprefix(tokenizer.decode(ids))
    assert in_the_engine(tokenizer, model, "你好 <|user|>", 24) == (ids, wanted)


def test_a_tokenizer_of_the_library_puts_its_own_tokens_before_a_text(tmp_path):
    tokenizer, _ = chatglm.load(native(tmp_path), device="cpu")
    assert tokenizer.encode_plain("hi") == tokenizer.hf("hi")["input_ids"]


@pytest.mark.parametrize("said", [" is", "\n", "。"])
def test_nothing_of_a_text_is_dropped(url, said):
    """A chat's answer loses spaces at both ends, and a first line that is empty."""
    (token,) = chatglm.load(device="cpu")[0].encode("a" + said)[1:]
    bias = {"logit_bias": {token: 100}}
    assert texts(url, ENGLISH, max_tokens=2, **bias) == [said * 2]
    assert texts(url, f"\n{ENGLISH}\n", max_tokens=1, **bias) == [said]


# --- 2. The protocol -----------------------------------------------------------------------------


def test_a_stream_says_piece_by_piece_what_a_whole_answer_says(url):
    asked = {"max_tokens": 30, "temperature": 0}
    whole = go_on(url, POEM, **asked)
    streamed = {**asked, "stream": True, "stream_options": {"include_usage": True}}
    reply = requests.post(url + V1, json={"prompt": POEM, **streamed}, timeout=LIMIT)
    *events, end = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
    parts = [json.loads(event) for event in events]
    assert end == "[DONE]" and {part["object"] for part in parts} == {"text_completion"}
    choices = [part["choices"][0] for part in parts if part["choices"]]
    assert len(choices) > 3
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"] != ""
    reasons = [choice["finish_reason"] for choice in choices]
    assert reasons[-1] == whole["choices"][0]["finish_reason"] and not any(reasons[:-1])
    usage = whole["usage"]
    assert parts[-1]["usage"] == usage
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_sixteen_tokens_if_nothing_else_is_said(url):
    answer = go_on(url, ENGLISH, repetition_penalty=0.5)
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"


def test_several_texts_have_several_answers_each_in_their_order(url):
    prompts = [POEM, ENGLISH, "你好"]
    answer = go_on(url, prompts, n=2, temperature=0, max_tokens=8)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3, 4, 5]
    alone = [texts(url, prompt, max_tokens=8)[0] for prompt in prompts]
    assert [choice["text"] for choice in answer["choices"]] == [t for t in alone for _ in "12"]
    counts = [go_on(url, prompt)["usage"]["prompt_tokens"] for prompt in prompts]
    assert answer["usage"]["prompt_tokens"] == sum(counts)


def test_a_seed_makes_each_answer_repeatable(url):
    asked = {"seed": 7, "temperature": 1.5, "n": 3, "top_p": 1, "max_tokens": 12}
    once, again = (go_on(url, ENGLISH, **asked)["choices"] for _ in "12")
    assert once == again
    assert len({choice["text"] for choice in once}) > 1


def test_an_answer_ends_before_a_stop_sequence(url):
    (text,) = texts(url, ENGLISH, max_tokens=20)
    stop = text[4:6]
    answer = go_on(url, ENGLISH, max_tokens=20, temperature=0, stop=[stop])["choices"][0]
    assert answer["text"] == text[: text.index(stop)]
    assert answer["finish_reason"] == "stop"


def test_log_probabilities_in_the_older_form(url):
    asked = {"max_tokens": 6, "temperature": 0}
    with_three = go_on(url, POEM, logprobs=3, **asked)["choices"][0]
    told = with_three["logprobs"]
    assert "".join(told["tokens"]) == with_three["text"]
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["top_logprobs"]) == 6
    for chosen, likeliest in zip(told["token_logprobs"], told["top_logprobs"], strict=True):
        assert chosen == max(likeliest.values()) <= 0 and len(likeliest) == 3
    alone = go_on(url, POEM, logprobs=0, **asked)["choices"][0]["logprobs"]
    # Sums over other numbers of threads are rounded differently.
    assert alone["token_logprobs"] == pytest.approx(told["token_logprobs"], abs=1e-4)
    assert alone["top_logprobs"] == [{}] * 6
    assert go_on(url, POEM, **asked)["choices"][0]["logprobs"] is None


def test_who_hangs_up_frees_all_places(server, url):
    with server.held():
        asked = {"prompt": [POEM, ENGLISH], "n": 2, "max_tokens": 300, "stream": True}
        asked |= {"temperature": 0, "repetition_penalty": 0.5}  # says the same again and again
        reply = requests.post(url + V1, json=asked, stream=True, timeout=LIMIT)
        server.let(3)
        lines = reply.iter_lines()
        assert next(lines)
        assert busy(url) == 4
        reply.close()
        until(lambda: busy(url) == 0)


@pytest.mark.parametrize(
    "fields, told",
    [
        ({}, "prompt is required"),
        ({"prompt": ""}, "prompt must be a text or a list of texts"),
        ({"prompt": []}, "prompt must be a text or a list of texts"),
        ({"prompt": ["a", ""]}, "none of them empty"),
        ({"prompt": [[1, 2]]}, "token ids are not supported"),
        ({"prompt": "a\ud800"}, "prompt contains an unpaired surrogate"),
        ({"prompt": ["a"] * 65}, "prompt must have at most 64 entries"),
        ({"prompt": ["a"] * 5, "n": 16}, "n must not ask for over 64 answers in all"),
        ({"prompt": "a", "n": 17}, "n must be less than or equal to 16"),
        ({"prompt": "a", "echo": True}, "echo True is not supported"),
        ({"prompt": "a", "suffix": "b"}, "suffix 'b' is not supported"),
        ({"prompt": "a", "best_of": 3}, "best_of 3 is not supported"),
        ({"prompt": "a", "logprobs": True}, "logprobs must be an integer"),
        ({"prompt": "a", "logprobs": 21}, "logprobs must be less than or equal to 20"),
        ({"prompt": "a", "tools": [{"type": "function"}]}, "send it to /v1/chat/completions"),
        ({"prompt": "a", "response_format": {"type": "json_object"}}, "/v1/chat/completions"),
        ({"prompt": "a " * 9000}, "takes 9003 tokens"),
    ],
    ids=lambda value: ascii(value)[:40] if isinstance(value, dict) else "",
)
def test_what_cannot_be_served_is_refused_by_name(url, fields, told):
    reply = requests.post(url + V1, json=fields, timeout=LIMIT)
    assert reply.status_code == 400
    assert told in reply.json()["error"]["message"]


def test_what_programs_send_without_meaning_anything_is_served(url):
    unset = {"suffix": None, "echo": False, "best_of": 1, "logprobs": None, "user": "me"}
    answer = requests.post(url + V1, json={"prompt": POEM, **unset, "n": 1}, timeout=LIMIT)
    assert answer.status_code == 200
    assert "X-Unknown-Fields" not in answer.headers


@started_with("--log-prompts")
def test_each_text_is_logged_where_that_is_asked_for(server, url):
    go_on(url, [POEM, ENGLISH])
    until(lambda: all(f"prompt: {each}" in server.log() for each in (ENGLISH, POEM)))
