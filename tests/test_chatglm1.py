"""ChatGLM-6B, the first generation: its network, its tokenizer, and its place in the engine."""

import asyncio
import json
import random
import time
from contextlib import aclosing

import pytest
import torch
from safetensors.torch import load_file, save_file

import chatglm
from chatglm.hardware.cpu_linear import PackedLinear
from chatglm.text.chatglm1 import CLEANED, ChatGLM1Tokenizer, clean_up
from chatglm.text.detokenizer import Detokenizer
from chatglm.text.messages import to_messages
from tests.original import KINDS, golden, write_json
from tests.original1 import (
    CHATGLM1,
    golden1_config,
    golden1_state,
    logits1,
    positions,
    publish1,
    random1_state,
)

EXPECTED = json.loads((CHATGLM1 / "expected.json").read_text())
SPECIAL = EXPECTED["special_tokens"]
LONG = "从前有座山，山里有座庙。\n" * 60  # over 512 tokens, which other prompts are cut into


@pytest.fixture(scope="module")
def tokenizer():
    return golden("chatglm1")[0]


@pytest.fixture
def engine():
    with chatglm.Engine(*golden("chatglm1")[:2]) as engine:
        yield engine


def load(folder, **options):
    return chatglm.load(folder, **{"device": "cpu", "dtype": "float32"} | options)


def answers(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]


def random_ids(length=29):
    ids = torch.randint(20, 400, (length,)).tolist()
    ids[length - 10 : length - 8] = [SPECIAL["[gMASK]"], SPECIAL["<sop>"]]
    return ids


def is_original(model, config, state):
    ids = random_ids()
    theirs = logits1(config, state, ids)
    ours = answers(model, ids).double()
    return torch.allclose(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


# The network


def test_the_reference_in_these_tests_is_the_published_network():
    expected = load_file(CHATGLM1 / "expected_logits.safetensors")
    for row, ids in enumerate(expected["input_ids"].tolist()):
        where, hidden = positions(golden1_config(), ids)
        assert torch.equal(where, expected["position_ids"][row])
        assert torch.equal(hidden, expected["hidden_from"][row, 0])
        theirs = logits1(golden1_config(), golden1_state(), ids).float()
        torch.testing.assert_close(theirs, expected["logits"][row], rtol=0, atol=1e-5)


SHAPES = {
    "one layer": {"num_layers": 1},
    "five layers": {"num_layers": 5},
    "one head": {"num_attention_heads": 1},
    "heads of 4": {"num_attention_heads": 8},
    "uneven": {"hidden_size": 48, "inner_hidden_size": 52},
    "coarse epsilon": {"layernorm_epsilon": 1e-2},
    "many words": {"vocab_size": 1000},
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_other_shapes_are_computed_as_published(tmp_path, changes, ending):
    config = golden1_config(**{"num_layers": 2} | changes)
    state = random1_state(config)
    publish1(tmp_path, config, state, ending)
    assert is_original(load(tmp_path)[1], config, state)


@pytest.mark.parametrize("name", ["transformer.word_embeddings.weight", "lm_head.weight"])
def test_either_end_of_the_network_is_enough(tmp_path, name):
    config = golden1_config(num_layers=2)
    state = random1_state(config)
    whole = dict(state)
    del state[name]
    model = load(publish1(tmp_path, config, state))[1]
    assert is_original(model, config, whole)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight


def test_a_prompt_may_be_padded_on_its_left():
    _, model, expected = golden("chatglm1")
    chat = expected["chats"][1]
    ids = torch.tensor([[3, 3, 3, *chat["input_ids"]]])
    out = model.generate(
        ids, attention_mask=(ids != 3).long(), do_sample=False, max_new_tokens=24, pad_token_id=3
    )
    assert out[0, ids.shape[1] :].tolist() == chat["greedy_next_24"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_matrices_of_the_layers_can_be_made_small(tmp_path, kind):
    config = golden1_config(num_layers=2, hidden_size=64, inner_hidden_size=128)
    state = random1_state(config)
    tokenizer, model = load(publish1(tmp_path, config, state), quantize=kind)
    small = [
        name
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear) and ".layers." in name
    ]
    assert len(small) == 2 * 4
    ids = random_ids()
    ours, theirs = answers(model, ids), logits1(config, state, ids).float()
    assert 0 < (ours - theirs).norm() < {"int8": 0.1, "int4": 0.6}[kind] * theirs.norm()
    with chatglm.Engine(tokenizer, model) as engine:
        assert asyncio.run(ask(engine, "你好", max_new_tokens=5)).completion_tokens > 0


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"position_encoding_2d": False}, "position_encoding_2d"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_layers": 27}, "belong to no layer"),
        ({"inner_hidden_size": 65}, "shape"),
    ],
)
def test_what_is_not_this_network_is_refused(tmp_path, changes, word):
    config = {k: v for k, v in golden1_config(**changes).items() if v is not None}
    publish1(tmp_path, config, golden1_state())
    with pytest.raises(ValueError, match=word):
        load(tmp_path)


# Text


@pytest.mark.parametrize("case", EXPECTED["encode"], ids=lambda case: ascii(case["text"])[:30])
def test_text_becomes_the_ids_of_the_original(tokenizer, case):
    assert tokenizer.encode(case["text"]) == case["ids"]


@pytest.mark.parametrize("case", EXPECTED["decode"], ids=lambda case: str(case["ids"])[:30])
def test_ids_become_the_text_of_the_original(tokenizer, case):
    assert tokenizer.decode(case["ids"]) == case["text"]


@pytest.mark.parametrize(
    "case", EXPECTED["responses"], ids=lambda case: ascii(case["decoded"])[:30]
)
def test_an_answers_punctuation_is_put_right_as_by_the_original(tokenizer, case):
    assert tokenizer.visible(case["decoded"], finished=True) == case["response"]


@pytest.mark.parametrize("case", EXPECTED["special_names_typed"]["cases"], ids=lambda c: c["text"])
def test_a_special_name_that_a_user_typed_is_text(tokenizer, case):
    assert not set(tokenizer.encode(case["text"])) & {*SPECIAL.values(), 0, 1, 2, 3}


def without_later_pieces(model: bytes) -> bytes:
    """The file as it was first published: all before [MASK], and no bytes to fall back to."""
    kept, at = b"", 0
    while at < len(model):
        start, field = at, model[at] >> 3
        size, shift, at = 0, 0, at + 1
        while True:
            size, shift, at = size | (model[at] & 127) << shift, shift + 7, at + 1
            if model[at - 1] < 128:
                break
        at += size
        if field == 1 and b"[MASK]" in model[start:at]:
            break
        kept += model[start:at]
    while model[at] >> 3 == 1:  # the rest of the pieces, each under 128 bytes
        at += 2 + model[at + 1]
    return kept + model[at:].replace(b"\x98\x02\x01", b"\x98\x02\x00")  # byte_fallback


def test_the_first_files_get_the_pieces_that_the_published_code_added(tokenizer, tmp_path):
    model = (CHATGLM1 / "ice_text.model").read_bytes()
    first = without_later_pieces(model)
    assert len(first) < len(model) - 256 * 10
    old = ChatGLM1Tokenizer(first, num_image_tokens=20000, sop=20415)
    assert old.specials == {name: i + 20000 for name, i in ({"<pad>": 3} | SPECIAL).items()}
    for case in EXPECTED["encode"]:
        assert old.encode(case["text"]) == [20000 + i for i in case["ids"]]
    for case in EXPECTED["decode"]:
        assert old.decode([20000 + i for i in case["ids"]]) == case["text"]
    assert old.decode([5, 19999]) == ""


def test_the_first_checkpoint_of_all_loads(tmp_path):
    config = golden1_config(num_layers=1, vocab_size=20768, bos_token_id=20415, eos_token_id=20416)
    del config["gmask_token_id"], config["mask_token_id"]
    state = random1_state(config)
    publish1(tmp_path, config, state)
    model = (CHATGLM1 / "ice_text.model").read_bytes()
    (tmp_path / "ice_text.model").write_bytes(without_later_pieces(model))
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "ChatGLMTokenizer"})
    tokenizer, model = load(tmp_path)
    ids = tokenizer.encode_chat(to_messages("你好"))
    assert ids == [20000 + i for i in EXPECTED["chats"][0]["input_ids"]]
    theirs = logits1(config | {"gmask_token_id": 20412}, state, ids)
    torch.testing.assert_close(answers(model, ids).double(), theirs, rtol=0, atol=1e-4)


def test_a_system_message_stands_in_front_of_the_first_question(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert tokenizer.encode_chat(messages)[:-2] == tokenizer.encode("Be brief.\nhi")


def test_tools_have_no_place(tokenizer):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ValueError, match="observation"):
        tokenizer.encode_chat([*messages, {"role": "observation", "content": "c"}])


# Answers while they come

PIECES = [*"  '''ntmsver.?!,:;中a[", "[[训练时间]]", "训", "\n", " '", "n't"]


def texts_while_they_come(pieces):
    """The text after each of the pieces, and at the end."""
    words = [*pieces, "a"]
    detokenizer = Detokenizer(lambda ids: "".join(words[i] for i in ids), len(pieces), CLEANED)
    texts = []
    for i in range(len(pieces)):
        detokenizer.push([i])
        texts.append(detokenizer.text)
    return [*texts, detokenizer.finish()]


def only_grows(texts):
    return all(late.startswith(early) for early, late in zip(texts, texts[1:], strict=False))


def test_the_text_only_grows_and_ends_as_the_whole(tokenizer):
    draw = random.Random(0)
    for _ in range(3000):
        pieces = draw.choices(PIECES, k=draw.randrange(1, 30))
        texts = texts_while_they_come(pieces)
        seen = [tokenizer.visible(text, finished=False) for text in texts[:-1]]
        seen.append(tokenizer.visible(texts[-1], finished=True))
        assert texts[-1] == clean_up("".join(pieces))
        assert only_grows(texts) and only_grows(seen), pieces


def test_a_long_text_of_what_is_cleaned_up_comes_as_the_whole():
    """Each text is of few pieces, so that it is often one long run of what may still change."""
    draw = random.Random(0)
    for _ in range(300):
        few = draw.sample([*PIECES, *(spaced for spaced, _ in CLEANED)], 3)
        pieces = draw.choices(few, k=200)
        texts = texts_while_they_come(pieces)
        assert texts[-1] == clean_up("".join(pieces)), few
        assert only_grows(texts), few
        assert len(texts[-1]) - len(texts[-2]) < 20, few  # no more than this is ever held back


def seconds(tokenizer, ids):
    """Computing time of this thread for an answer of these ids."""
    detokenizer, start = tokenizer.detokenizer(), time.thread_time()
    for one in ids:
        detokenizer.push([one])
    assert detokenizer.finish() == tokenizer.decode(ids)
    return time.thread_time() - start


# In each run, something may always still change. The last is one that decoding drops at the start.
RUNS = {
    "quotes": ["▁", "'"],
    "quotes and n": ["▁", "'", "▁", "n"],
    "spaces behind text": ["a", *["▁"] * 999],
    "spaces": ["▁"],
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_an_answer_of_four_times_the_tokens_takes_no_eight_times_the_time(tokenizer, run):
    ids = [tokenizer.sp.piece_to_id(piece) for piece in run] * 400
    # Of several tries, as a busy machine slows down now the one, now the other.
    tries = ((seconds(tokenizer, ids[:100]), seconds(tokenizer, ids[:400])) for _ in range(5))
    assert any(long < 8 * short for short, long in tries)


def test_whatever_the_ids_the_text_only_grows(tokenizer):
    draw = random.Random(0)
    for _ in range(200):
        ids = draw.choices(range(tokenizer.vocab_size + 20), k=40)
        detokenizer, texts = tokenizer.detokenizer(), [""]
        for one in ids:
            detokenizer.push([one])
            texts.append(detokenizer.text)
        texts.append(detokenizer.finish())
        assert texts[-1] == tokenizer.decode(ids)
        assert all(b.startswith(a) for a, b in zip(texts, texts[1:], strict=False)), ids


def test_only_what_may_change_is_held_back(tokenizer):
    held = {"你好,": "你好，", "good,": "good", "好，": "好，", "[[训练": "", "a [b": "a [b"}
    for raw, seen in held.items():
        assert tokenizer.visible(raw, finished=False) == seen
    detokenizer = tokenizer.detokenizer()
    detokenizer.push(tokenizer.encode("It is"))
    assert detokenizer.text == "It is"


@pytest.mark.parametrize("number", range(len(EXPECTED["stops"])))
def test_an_answer_is_streamed_as_by_the_original(number):
    tokenizer, model, expected = golden("chatglm1")
    stop = expected["stops"][number]
    steps = model.stream_chat(tokenizer, stop["query"], stop["history"], temperature=0)
    texts = [text for text, _ in steps]
    assert list(dict.fromkeys(texts)) == list(dict.fromkeys(stop["streamed"]))


# The engine


async def ask(engine, question, history=None, **settings):
    messages = to_messages(question, history)
    async for chunk in engine.generate(messages, **{"temperature": 0} | settings):
        pass
    return chunk


def alone(question, history=None, tokens=20):
    tokenizer, model, _ = golden("chatglm1")
    ids = tokenizer.encode_chat(to_messages(question, history))
    return model.chat(tokenizer, question, history, temperature=0, max_length=len(ids) + tokens)[0]


def test_a_prompt_longer_than_others_are_cut_is_read_whole(engine):
    tokens = len(engine.tokenizer.encode_chat(to_messages(LONG)))
    assert 512 < tokens < 2000
    settings = {"max_new_tokens": 20, "max_length": 2048}
    assert asyncio.run(ask(engine, LONG, **settings)).text == alone(LONG)


def test_prompts_that_together_fill_several_steps_wait_for_each_other(engine):
    questions = [LONG[i:] for i in range(6)] + ["你好"]

    async def together():
        return await asyncio.gather(
            *(ask(engine, q, max_new_tokens=20, max_length=2048) for q in questions)
        )

    assert [c.text for c in asyncio.run(together())] == [alone(q) for q in questions]


def test_prompts_that_begin_alike_share_nothing(engine):
    """A context sees itself whole: the same beginning has other keys before another end."""
    shared = LONG[:400]
    questions = [shared + end for end in ("一", "二", "三", "", "四" * 40)]
    one_by_one = [asyncio.run(ask(engine, q, max_new_tokens=20)).text for q in questions]

    async def together():
        return await asyncio.gather(*(ask(engine, q, max_new_tokens=20) for q in questions))

    expected = [alone(q) for q in questions]
    assert one_by_one == expected
    assert [c.text for c in asyncio.run(together())] == expected
    turns = [[questions[0], expected[0]]]
    assert asyncio.run(ask(engine, "然后呢", turns, max_new_tokens=20)).text == alone(
        "然后呢", turns
    )


def test_a_reader_may_leave_at_any_moment(engine):
    async def leave(question, after):
        async with aclosing(engine.generate(to_messages(question), temperature=0)) as chunks:
            async for chunk in chunks:
                if chunk.completion_tokens >= after:
                    return

    async def crowd():
        leaving = [leave(question, after) for question in ("你好", LONG) for after in (0, 1, 5)]
        staying = [ask(engine, question, max_new_tokens=20) for question in ("你好", "天气")]
        return (await asyncio.gather(*leaving, *staying))[-2:]

    assert [c.text for c in asyncio.run(crowd())] == [alone("你好"), alone("天气")]
    assert not engine.active


def test_broken_numbers_reach_nobody_else(tmp_path):
    state = golden1_state()
    state["transformer.word_embeddings.weight"][EXPECTED["chats"][0]["input_ids"][1]] = torch.nan
    del state["lm_head.weight"]
    config = golden1_config(tie_word_embeddings=False)
    state["lm_head.weight"] = golden1_state()["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors")
    publish1(tmp_path, config, state)

    async def both(engine):
        return await asyncio.gather(
            ask(engine, "你好", max_new_tokens=20),
            ask(engine, "天气", max_new_tokens=20),
            return_exceptions=True,
        )

    with chatglm.Engine(*load(tmp_path)) as engine:
        broken, whole = asyncio.run(both(engine))
    assert isinstance(broken, chatglm.EngineError)
    assert whole.text == alone("天气")
