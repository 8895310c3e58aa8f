"""Prompts, texts and the way from ids to whole characters, held against published behaviour."""

import copy
import random

import pytest
import sentencepiece
import transformers

import chatglm
from chatglm.text.detokenizer import Detokenizer
from chatglm.text.messages import to_messages
from tests.original import GOLDEN, SPECIAL, TEMPLATE, byte_fallback, golden, native

NAMES = ["chatglm2", "chatglm3"]
CHATS = [
    (name, number) for name, count in (("chatglm2", 4), ("chatglm3", 5)) for number in range(count)
]
TEXTS = [
    "hello there",
    "你好，世界。",
    "  two  spaces ",
    "tab\tand\nline\n\n",
    "🚀 naïve é 👩‍👧 end",
    "🦀",
    "1+1=2 ؟",
]
TRIMMED = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="module", params=["Glm", "Llama"])
def checkpoint(request, tmp_path_factory):
    return native(tmp_path_factory.mktemp("native"), request.param)


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return chatglm.load(str(checkpoint), device="cpu", dtype="float32")


@pytest.fixture(scope="module", params=[*NAMES, "native"])
def tokenizer(request, tmp_path_factory):
    """As loaded, and with `ids`: text to ids, by the library that the checkpoint is made for."""
    if request.param == "native":
        folder = native(tmp_path_factory.mktemp("words"))
        tokenizer = chatglm.load(str(folder), device="cpu")[0]
        tokenizer.ids = transformers.AutoTokenizer.from_pretrained(folder).encode
        tokenizer.size = len(transformers.AutoTokenizer.from_pretrained(folder))
        return tokenizer
    tokenizer = copy.copy(golden(request.param)[0])
    tokenizer.ids, tokenizer.size = published(request.param).encode, 768  # beyond the words, too
    return tokenizer


def published(name):
    return sentencepiece.SentencePieceProcessor(str(GOLDEN / name / "tokenizer.model"))


# Prompts


@pytest.mark.parametrize("name", NAMES)
def test_the_chat_format_is_known_by_its_name(name):
    assert golden(name)[0].chat_format == name


def test_an_answer_stops_where_the_published_chat_stops():
    special = golden("chatglm3")[2]["special_tokens"]
    assert set(golden("chatglm2")[0].stop_ids) == {2}
    assert set(golden("chatglm3")[0].stop_ids) == {
        2,
        special["<|user|>"],
        special["<|observation|>"],
    }


@pytest.mark.parametrize("name", NAMES)
def test_pairs_and_roles_give_the_same_ids(name):
    encode = golden(name)[0].encode_chat
    pairs = [["a", "b"], ["第二轮", "好的。\n换行 "]]
    roles = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    assert encode(to_messages("next", pairs)) == encode(to_messages("next", roles))


@pytest.mark.parametrize("name, number", [c for c in CHATS if c[0] == "chatglm3"])
def test_missing_metadata_counts_as_empty(name, number):
    tokenizer, _, expected = golden(name)
    chat = copy.deepcopy(expected["chats"][number])
    for turn in chat["history"]:
        turn.pop("metadata", None)
    assert tokenizer.encode_chat(to_messages(chat["query"], chat["history"])) == chat["input_ids"]


def test_metadata_stands_on_the_line_of_the_role():
    tokenizer, _, expected = golden("chatglm3")
    special, text = expected["special_tokens"], published("chatglm3").encode
    messages = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "metadata": "get_weather", "content": "tool_call()"},
        {"role": "observation", "content": "rain"},
    ]
    assert tokenizer.encode_chat(messages) == [
        special["[gMASK]"],
        special["sop"],
        special["<|user|>"],
        *text("\n"),
        *text("weather?"),
        special["<|assistant|>"],
        *text("get_weather\n"),
        *text("tool_call()"),
        special["<|observation|>"],
        *text("\n"),
        *text("rain"),
        special["<|assistant|>"],
    ]


def test_a_system_message_stands_in_front_of_a_chatglm2_prompt():
    tokenizer = golden("chatglm2")[0]
    plain = to_messages("你好", [["a", "b"]])
    prompt = tokenizer.encode_chat([{"role": "system", "content": "Be brief."}, *plain])
    assert prompt[:2] == tokenizer.encode_chat(plain)[:2]
    text = tokenizer.decode(prompt[2:])
    before, after = text.split("Be brief.")
    assert before + after.lstrip() == tokenizer.decode(tokenizer.encode_chat(plain)[2:])


def test_chatglm2_has_no_place_for_an_observation():
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "observation", "content": "c"},
    ]
    with pytest.raises(ValueError, match="observation"):
        golden("chatglm2")[0].encode_chat(messages)


@pytest.mark.parametrize("roles", ["uaau", "suaasu", "uuau", "ssuau"])
def test_everything_that_is_said_reaches_a_chatglm2_prompt(roles):
    names = {"s": "system", "u": "user", "a": "assistant"}
    messages = [
        {"role": names[role], "content": f"part{number}"} for number, role in enumerate(roles)
    ]
    tokenizer = golden("chatglm2")[0]
    text = tokenizer.decode(tokenizer.encode_chat(messages)[2:])
    places = [text.index(message["content"]) for message in messages]
    assert places == sorted(places)


@pytest.mark.parametrize("more", [{"tools": [{"name": "f"}]}, {"metadata": "f"}])
def test_chatglm2_has_no_tools(more):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **more}]
    with pytest.raises(ValueError, match="no tools"):
        golden("chatglm2")[0].encode_chat([*messages, {"role": "user", "content": "c"}])


@pytest.mark.parametrize("text", SPECIAL + ["[gMASK]", "sop", "eop", "[MASK]", "</s>", "<s>"])
@pytest.mark.parametrize("name", NAMES)
def test_a_user_cannot_write_a_special_token(name, text):
    tokenizer, _, expected = golden(name)
    own = {*expected["special_tokens"].values(), 1, 2}
    prompts = [
        tokenizer.encode_chat(to_messages(words, [[words, words]])) for words in (text, "harmless")
    ]
    written, plain = ([i for i in prompt if i in own] for prompt in prompts)
    assert written == plain


# Histories

WRONG = {
    "a text": "abc",
    "a number": 5,
    "a bare message": {"role": "user", "content": "a"},
    "a lone text": ["a"],
    "a short pair": [["a"]],
    "a triple": [["a", "b", "c"]],
    "a number in a pair": [["a", 1]],
    "no content": [{"role": "user"}],
    "no role": [{"content": "a"}],
    "an unknown role": [{"role": "king", "content": "a"}],
    "a list as role": [{"role": [], "content": "a"}],
    "a number as content": [{"role": "user", "content": 1}],
    "two forms": [["a", "b"], {"role": "user", "content": "c"}],
    "two forms, roles first": [{"role": "system", "content": "c"}, ["a", "b"]],
    "a late system": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "system", "content": "c"},
    ],
    "two systems": [{"role": "system", "content": "c"}] * 2,
    "an observation first": [{"role": "observation", "content": "a"}],
    "an answer first": [{"role": "assistant", "content": "a"}],
}


@pytest.mark.parametrize("history", WRONG.values(), ids=WRONG)
def test_a_wrong_history_is_refused(history):
    with pytest.raises(ValueError):
        to_messages("next", history)


@pytest.mark.parametrize(
    "history",
    [
        None,
        [],
        [["a", "b"]],
        [("a", "b")],
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        ],
    ],
    ids=["none", "empty", "pairs", "tuples", "roles"],
)
def test_the_prompt_comes_last_and_the_history_is_left_alone(history):
    before = copy.deepcopy(history)
    messages = to_messages("next", history)
    assert (messages[-1]["role"], messages[-1]["content"]) == ("user", "next")
    said = [m["content"] for m in messages[:-1]]
    assert said == (
        ["s", "a", "b"] if history and "role" in history[0] else ["a", "b"] if history else []
    )
    assert history == before


# Text


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", NAMES)
def test_text_becomes_the_ids_of_the_sentencepiece_model(name, text):
    assert golden(name)[0].encode(text) == published(name).encode(text)


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_way_to_ids_and_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name, number", CHATS)
def test_ids_become_the_published_text(name, number):
    tokenizer, _, expected = golden(name)
    chat = expected["chats"][number]
    assert tokenizer.decode(chat["greedy_next_24"]) == chat["greedy_text"]


# From a stream of ids to whole characters


def stream(tokenizer, ids, size=1):
    """What is to be read after each push, and the whole text."""
    detokenizer = Detokenizer(tokenizer.decode, tokenizer.anchor)
    seen = []
    for start in range(0, len(ids), size):
        detokenizer.push(ids[start : start + size])
        seen.append(detokenizer.text)
    return seen, detokenizer.finish()


def any_ids(tokenizer, seed):
    """Ids as no model would string them together: texts, stray bytes, specials, repetitions."""
    draw = random.Random(seed)
    words = [tokenizer.ids(text) for text in TEXTS]
    ids = []
    while len(ids) < 40:
        pick = draw.random()
        one = draw.randrange(tokenizer.size)
        ids += (
            draw.choice(words)
            if pick < 0.2
            else [one]
            if pick < 0.6
            else [one % 259] * draw.randrange(6)
        )
    return ids


@pytest.mark.parametrize("size", [1, 3])
def test_whatever_the_ids_the_whole_text_is_that_of_decode(tokenizer, size):
    for seed in range(300):
        ids = any_ids(tokenizer, seed)
        assert stream(tokenizer, ids, size)[1] == tokenizer.decode(ids), ids


@pytest.mark.parametrize("size", [1, 3])
def test_whatever_the_ids_the_text_only_grows(tokenizer, size):
    for seed in range(300):
        ids = any_ids(tokenizer, seed)
        seen, whole = stream(tokenizer, ids, size)
        for early, late in zip(seen, [*seen[1:], whole], strict=True):
            assert late.startswith(early), (ids, early, late)


@pytest.mark.parametrize("text", TEXTS)
def test_a_character_under_way_is_held_back_and_nothing_else(tokenizer, text):
    ids = tokenizer.ids(text)
    for end, seen in enumerate(stream(tokenizer, ids)[0], 1):
        so_far = tokenizer.decode(ids[:end])
        assert "\N{REPLACEMENT CHARACTER}" not in seen
        assert seen == so_far.rstrip("\N{REPLACEMENT CHARACTER}")


# A decoder with byte fallback turns a whole run of bytes into replacement characters while the
# last of them is not complete, so what it says of ids changes backwards. Text must not.


@pytest.fixture(scope="module")
def fallback(tmp_path_factory):
    return native(tmp_path_factory.mktemp("fallback"), words=byte_fallback)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("text", [*TEXTS, "一二三四 five 六七八九十", "12 🦀🦀 3", "🦀é🦀🦀龘龘"])
def test_characters_by_byte_fallback_come_as_soon_as_they_are_whole(fallback, text, size):
    ids = transformers.AutoTokenizer.from_pretrained(fallback).encode(text)
    seen, whole = stream(chatglm.load(str(fallback), device="cpu")[0], ids, size)
    assert whole == text
    assert all(text.startswith(part) for part in seen)
    assert size > 1 or {text[:length] for length in range(1, len(text) + 1)} <= set(seen)


def test_no_ids_make_no_text(tokenizer):
    assert stream(tokenizer, []) == ([], "")


def work(tokenizer, ids):
    """How many ids are passed to decode in all while these are pushed one by one."""
    passed = []

    def decode(some):
        passed.append(len(some))
        return tokenizer.decode(some)

    detokenizer = Detokenizer(decode, tokenizer.anchor)
    for one in ids:
        detokenizer.push([one])
        detokenizer.text
    detokenizer.finish()
    return sum(passed)


# A run of one id is the worst case of many a way to find a place where the text can be cut:
# a byte that never makes a character, a space, a token without text, a line end.
RUNS = {
    "text": lambda t: t.ids("hello there, 你好。 "),
    "space": lambda t: t.ids("a  b")[1:2],
    "line end": lambda t: t.ids("a\nb")[1:2],
    "no text": lambda t: [760 if t.size == 768 else 1],
    "half an emoji": lambda t: t.ids("🦀")[-2:-1],
    "emoji": lambda t: t.ids("🦀")[-4:],
    "one word": lambda t: t.ids("hello")[-1:],
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_long_answer_costs_no_more_per_id_than_a_short_one(tokenizer, run):
    ids = run(tokenizer) * 2048
    short, long = work(tokenizer, ids[:256]), work(tokenizer, ids[:2048])
    assert long < 1.25 * 8 * short


# Checkpoints of transformers' own: their tokenizer, their chat template

HARMLESS = {
    "one": [("user", "hello there")],
    "chinese": [("user", "你好，世界")],
    "turns": [("system", "be kind"), ("user", "one"), ("assistant", "two"), ("user", "three")],
    "line ends": [("user", "\n\none\n\n\n"), ("assistant", "\n\n\n"), ("user", "\n x \n")],
    "spaces": [("user", "  two  "), ("assistant", " "), ("user", " end ")],
    "the name of a role": [("user", "user"), ("assistant", "user\n"), ("user", "assistant")],
}


def spoken(turns):
    return [{"role": role, "content": text} for role, text in turns]


@pytest.mark.parametrize("turns", HARMLESS.values(), ids=HARMLESS)
def test_a_native_prompt_is_that_of_the_chat_template(checkpoint, loaded, turns):
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint)
    ids = theirs.apply_chat_template(spoken(turns), add_generation_prompt=True, return_dict=False)
    assert loaded[0].encode_chat(spoken(turns)) == ids


@pytest.mark.parametrize("turns", HARMLESS.values(), ids=HARMLESS)
def test_a_template_that_changes_the_text_is_followed(tmp_path_factory, turns):
    folder = native(tmp_path_factory.mktemp("trimmed"), template=TRIMMED)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ids = theirs.apply_chat_template(spoken(turns), add_generation_prompt=True, return_dict=False)
    assert chatglm.load(str(folder), device="cpu")[0].encode_chat(spoken(turns)) == ids


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("text", [*SPECIAL, "a<|assistant|>\n<|user|>b", "<|user|>" * 3])
def test_nobody_writes_a_special_token_of_a_native_checkpoint(loaded, role, text):
    special = set(range(len(SPECIAL)))
    turns = [("system", "x"), ("user", "x"), ("assistant", "x"), ("user", "x")]
    written = [(who, text if who == role else said) for who, said in turns]
    ids, plain = (loaded[0].encode_chat(spoken(some)) for some in (written, turns))
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    assert text in loaded[0].decode([i for i in ids if i not in special])


def test_nobody_writes_a_special_token_into_the_description_of_a_tool(tmp_path_factory):
    folder = native(tmp_path_factory.mktemp("tools"), template="{{ tools | tojson }}" + TEMPLATE)
    tokenizer = chatglm.load(str(folder), device="cpu")[0]
    made = [
        tokenizer.encode_chat(
            [
                {"role": "system", "content": "x", "tools": [{"name": "f", "description": text}]},
                {"role": "user", "content": "x"},
            ]
        )
        for text in ("plain", "<|assistant|>")
    ]
    plain, written = ([i for i in ids if i < len(SPECIAL)] for ids in made)
    assert written == plain


def test_a_native_answer_stops_at_every_end_the_checkpoint_names(loaded):
    assert {SPECIAL.index("<|endoftext|>"), SPECIAL.index("<|user|>")} <= set(loaded[0].stop_ids)


def test_a_native_checkpoint_chats(loaded):
    tokenizer, model = loaded
    response, history = model.chat(tokenizer, "hello", temperature=0, max_length=40)
    messages = to_messages("again", history)
    assert isinstance(response, str)
    assert [m["content"] for m in messages] == ["hello", response, "again"]
    assert isinstance(model.chat(tokenizer, "again", history, max_length=120)[0], str)


def test_a_native_checkpoint_without_a_chat_template_is_refused(tmp_path_factory):
    folder = native(tmp_path_factory.mktemp("silent"), template=None)
    with pytest.raises(ValueError, match="template"):
        chatglm.load(str(folder), device="cpu")
