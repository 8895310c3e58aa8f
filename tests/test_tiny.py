"""The ChatGLM that comes along: its files, and what it answers to questions it never saw."""

import asyncio
import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from safetensors import safe_open

import chatglm
from chatglm.tiny.batches import DECISION_WEIGHT, batches, encode
from chatglm.tiny.corpus import Corpus
from chatglm.tiny.evaluation import answer, evaluate
from chatglm.tiny.train import BATCHES

TINY = Path(chatglm.__file__).parent / "tiny"


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (TINY / name).read_text("utf-8").splitlines()]


def conversations() -> list[list[dict]]:
    """Those of the corpus without tools."""
    return [
        line["messages"]
        for line in lines("corpus.jsonl")
        if "messages" in line and "tool" not in line
    ]


@pytest.fixture(scope="module")
def shares():
    return evaluate(TINY)


def test_held_out_questions_are_answered_character_for_character(shares):
    assert shares["known, greedy"] >= 0.9
    assert shares["known, sampled"] >= 0.8


def test_what_it_does_not_know_it_says_so(shares):
    assert shares["unknown, greedy"] >= 0.8


def test_a_question_for_a_tool_gets_the_call_and_from_its_result_the_answer(shares):
    assert shares["tool, greedy"] >= 0.9


def test_tools_that_are_declared_and_not_needed_change_nothing(shares):
    assert shares["known, with tools"] >= 0.85


def test_no_held_out_question_is_in_the_corpus():
    def plain(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum())

    trained = set()
    for line in lines("corpus.jsonl"):
        for message in line.get("messages", []):
            content = message["content"]
            trained |= {plain(w) for w in (content if isinstance(content, list) else [content])}
    held_out = lines("heldout.jsonl")
    count = Counter(line["kind"] for line in held_out)
    assert count["known"] >= 80 and count["unknown"] >= 30 and count["tool"] >= 60
    assert not [line for line in held_out if plain(line["question"]) in trained]


def test_no_held_out_question_for_a_tool_is_a_wording_of_the_corpus_filled_in():
    def plain(text: str) -> str:
        return re.sub(r"[\s?？。.!！,，']", "", text.lower())

    wordings = [
        re.escape(plain(w))
        .replace(r"\{city\}", ".+")
        .replace(r"\{a\}", r"\d+")
        .replace(r"\{b\}", r"\d+")
        for line in lines("corpus.jsonl")
        if "tool" in line
        for w in line.get("messages", [{"content": []}])[0]["content"]
    ]
    trained = re.compile("|".join(wordings))
    asked = [line["question"] for line in lines("heldout.jsonl") if line["kind"] == "tool"]
    assert not [question for question in asked if trained.fullmatch(plain(question))]


def test_the_corpus_has_four_hundred_exchanges_in_several_wordings():
    first = [messages for messages in conversations() if len(messages) == 2]
    assert len(first) >= 400
    assert all(len(messages[0]["content"]) >= 5 for messages in first)


def test_the_checkpoint_has_the_published_form_and_is_small():
    files = ["config.json", "tokenizer.model", "tokenizer_config.json", "model.safetensors"]
    assert sum((TINY / name).stat().st_size for name in files) <= 12e6
    assert json.loads((TINY / "config.json").read_text("utf-8"))["seq_length"] == 8192
    with safe_open(TINY / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_tensor(name).dtype.itemsize for name in names} == {2}
    golden = Path(__file__).parent / "golden" / "chatglm3" / "model.safetensors"
    with safe_open(golden, "pt") as file:
        published = {name.replace("layers.2", "layers.3") for name in file.keys()}
    assert published <= names | {"transformer.rotary_pos_emb.inv_freq"}


def test_what_decides_for_a_tool_and_what_it_computes_counts_most_in_training():
    tokenizer, _ = chatglm.load(device="cpu")
    call = {
        "role": "assistant",
        "metadata": "calculate",
        "content": "```python\ntool_call(expression='12+3')\n```",
    }
    ids, counts = encode(tokenizer, [{"role": "user", "content": "12+3?"}, call], random.Random(0))
    most = [
        tokenizer.sp.id_to_piece(id_) for id_, count in zip(ids, counts) if count == DECISION_WEIGHT
    ]
    assert "".join(most) == "▁calculate<0x0A>+"
    begin = ids.index(tokenizer.specials["<|assistant|>"])
    assert not any(counts[: begin + 1]) and all(counts[begin + 1 :])


def test_what_is_trained_on_depends_on_the_seed_alone():
    tokenizer, _ = chatglm.load(device="cpu")

    def first(seed: int) -> list:
        drawn = batches(Corpus(lines("corpus.jsonl"), seed), tokenizer, BATCHES)
        return [ids.tolist() for ids, _ in itertools.islice(drawn, 20)]

    assert first(0) == first(0) != first(1)


def share_of_turns(turns: int) -> float:
    """How many answers of conversations with so many turns are the corpus's, the last counting."""
    corpus = Corpus(lines("corpus.jsonl"), seed=1)
    tokenizer, model = chatglm.load(device="cpu")
    drawn = (corpus.exchange(follow_up=1.0) for _ in itertools.count())
    asked = list(itertools.islice((m for m in drawn if len(m) == 2 * turns), 60))

    async def right() -> int:
        with chatglm.Engine(tokenizer, model) as engine:
            answers = await asyncio.gather(
                *(answer(engine, messages[:-1], seed=0) for messages in asked)
            )
        return sum(
            answer.text == messages[-1]["content"]
            for answer, messages in zip(answers, asked, strict=True)
        )

    return asyncio.run(right()) / len(asked)


def test_turns_that_need_the_one_before_mostly_get_it():
    assert share_of_turns(2) >= 0.6


def test_turns_that_need_such_a_turn_often_get_it():
    assert share_of_turns(3) >= 0.4
