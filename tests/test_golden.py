"""Every published kind of checkpoint computes what its original implementation computed."""

import asyncio
import json

import pytest
import torch
from safetensors.torch import load_file

import chatglm
from chatglm.text.messages import to_messages
from tests.original import GOLDEN, golden

NAMES = ["chatglm2", "chatglm3", "glm4", "chatglm2-int4", "chatglm3-lora"]
NAMES += ["chatglm1", "chatglm1-int4", "chatglm1-int4-qe", "chatglm1-ptuning", "chatglm2-ptuning"]
EXPECTED = {name: json.loads((GOLDEN / name / "expected.json").read_text()) for name in NAMES}
CHATS = [(name, i) for name in NAMES for i in range(len(EXPECTED[name]["chats"]))]
STOPS = [(name, i) for name in NAMES for i in range(len(EXPECTED[name].get("stops", [])))]
# The original chose ids that stand for nothing there, and they end its text early.
TEXTS = [chat for chat in CHATS if chat != ("chatglm3", 3)]


def messages_of(chat):
    return to_messages(chat["query"], chat["history"], chat.get("role", "user"))


def answers(model, input_ids):
    with torch.inference_mode():
        return model(input_ids).logits


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_original(name):
    expected = load_file(GOLDEN / name / "expected_logits.safetensors")
    ours = answers(golden(name)[1], expected["input_ids"])
    torch.testing.assert_close(ours, expected["logits"], rtol=0, atol=1e-5)


def test_logits_after_a_long_text_are_those_of_the_original():
    expected = load_file(GOLDEN / "glm4" / "expected_logits.safetensors")
    ours = answers(golden("glm4")[1], expected["long_input_ids"])[:, -1:]
    torch.testing.assert_close(ours, expected["long_last_logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, number", CHATS)
def test_prompt_ids_are_those_of_the_original(name, number):
    tokenizer, _, expected = golden(name)
    chat = expected["chats"][number]
    assert tokenizer.encode_chat(messages_of(chat)) == chat["input_ids"]


@pytest.mark.parametrize("name, number", CHATS)
def test_the_next_token_is_that_of_the_original(name, number):
    _, model, expected = golden(name)
    chat = expected["chats"][number]
    last = answers(model, torch.tensor([chat["input_ids"]]))[0, -1]
    assert last[:8].tolist() == pytest.approx(chat["last_logits_first8"], abs=2e-5)
    assert last.sum().item() == pytest.approx(chat["last_logits_sum"], abs=1e-3)
    assert last.argmax() == chat["last_argmax"]


@pytest.mark.parametrize("name, number", CHATS)
def test_greedy_continuations_are_those_of_the_original(name, number):
    _, model, expected = golden(name)
    chat = expected["chats"][number]
    ids = torch.tensor([chat["input_ids"]])
    # min_new_tokens keeps the end token from being chosen; it is in none of the continuations
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=24,
        max_new_tokens=24,
        pad_token_id=0,
    )
    assert made[0, ids.shape[1] :].tolist() == chat["greedy_next_24"]


def text_of(chat):
    """The answer of 24 tokens, as a user of the original sees it."""
    return chat.get("response", chat["greedy_text"].strip())


@pytest.mark.parametrize("name, number", TEXTS)
def test_a_greedy_chat_is_the_answer_of_the_original(name, number):
    tokenizer, model, expected = golden(name)
    chat = expected["chats"][number]
    response, _ = model.chat(
        tokenizer,
        chat["query"],
        chat["history"],
        role=chat.get("role", "user"),
        temperature=0,
        max_length=len(chat["input_ids"]) + 24,
    )
    assert response == text_of(chat)


@pytest.mark.parametrize("name, number", STOPS)
def test_an_answer_ends_where_that_of_the_original_ends(name, number):
    tokenizer, model, expected = golden(name)
    stop = expected["stops"][number]
    assert tokenizer.encode_chat(messages_of(stop)) == stop["input_ids"]
    steps = list(model.stream_chat(tokenizer, stop["query"], stop["history"], temperature=0))
    assert steps[-1][0] == stop["response"]


async def ask(engine, chat, **settings):
    async for chunk in engine.generate(messages_of(chat), temperature=0, **settings):
        last = chunk
    return last


@pytest.mark.parametrize("name", NAMES)
def test_sixteen_at_once_are_answered_as_by_the_original(name):
    tokenizer, model, expected = golden(name)
    chats = [expected["chats"][i] for n, i in TEXTS if n == name]
    chats = (chats * 16)[:16]

    async def all_at_once():
        with chatglm.Engine(tokenizer, model) as engine:
            asked = [ask(engine, chat, max_new_tokens=24) for chat in chats]
            ended = [ask(engine, stop) for stop in expected.get("stops", [])]
            return await asyncio.gather(*asked, *ended)

    made = asyncio.run(all_at_once())
    assert [chunk.text for chunk in made[:16]] == [text_of(chat) for chat in chats]
    assert all(chunk.completion_tokens == 24 for chunk in made[:16])
    assert [chunk.text for chunk in made[16:]] == [s["response"] for s in expected.get("stops", [])]
    assert all(chunk.finish_reason == "stop" for chunk in made[16:])
