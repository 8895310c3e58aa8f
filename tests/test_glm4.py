"""GLM-4's first files: a vocabulary of tiktoken's, and a prompt written in Python."""

import asyncio
import base64
import json
import random
import re
import shutil

import pytest

import chatglm
from chatglm import Chunk
from chatglm.text.glm4 import read_ranks
from chatglm.text.messages import extend_history, to_messages
from chatglm.text.tokenizer import ANOTHER_MESSAGE
from chatglm.text.tools import published_response, tool_names
from server.answers import deltas, visible
from tests.original import GOLDEN, golden, write_json

GLM4 = GOLDEN / "glm4"
EXPECTED = json.loads((GLM4 / "expected.json").read_text())
CL100K = (  # the pattern that GLM-4's own tokenizer cuts text by
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOOL = {"name": "get_weather", "description": "<|user|>", "parameters": {"type": "object"}}


@pytest.fixture
def copy_of(tmp_path):
    """The golden checkpoint with changes to its tokenizer_config.json."""

    def make(remove=(), **changes):
        folder = tmp_path / "checkpoint"
        shutil.copytree(GLM4, folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text()) | changes
        kept = {key: value for key, value in settings.items() if key not in remove}
        write_json(folder / "tokenizer_config.json", kept)
        return folder

    return make


def load(folder, **options):
    return chatglm.load(folder, device="cpu", dtype="float32", **options)


def prompt(tokenizer, messages):
    return tokenizer.hf.decode(tokenizer.encode_chat(messages))


# Text


@pytest.mark.parametrize("case", EXPECTED["encode"], ids=lambda case: ascii(case["text"])[:30])
def test_text_becomes_the_ids_of_the_original(case):
    assert golden("glm4")[0].encode(case["text"]) == case["ids"]


@pytest.mark.parametrize("case", EXPECTED["decode"], ids=lambda case: str(case["ids"])[:30])
def test_ids_become_the_text_of_the_original_without_special_tokens(case):
    assert golden("glm4")[0].decode(case["ids"]) == case["text_without_specials"]


def test_any_text_becomes_the_ids_that_tiktoken_gives():
    ranks = read_ranks((GLM4 / "tokenizer.model").read_bytes())
    tiktoken = pytest.importorskip("tiktoken")
    theirs = tiktoken.Encoding("glm4", pat_str=CL100K, mergeable_ranks=ranks, special_tokens={})
    draw = random.Random(0)
    pieces = [c["text"] for c in EXPECTED["encode"]] + list("aé你\n\t \r'!12.😀\u3000\u200d")
    for _ in range(1000):
        text = "".join(draw.choices(pieces, k=draw.randrange(12)))
        assert golden("glm4")[0].encode(text) == theirs.encode_ordinary(text), ascii(text)


# Prompts


def test_the_special_tokens_have_the_ids_of_the_original():
    tokenizer = golden("glm4")[0].hf
    special = EXPECTED["special_tokens"]
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in special} == special
    assert len(tokenizer) == EXPECTED["vocab_size"]


@pytest.mark.parametrize("number", range(len(EXPECTED["chats"])))
def test_the_first_tokenizer_file_encodes_the_parts_of_a_message_apart(copy_of, number):
    folder = copy_of()
    (folder / "tokenization_chatglm.py").write_text("def apply_chat_template(self): raise OSError")
    chat = EXPECTED["chats"][number]
    ids = load(folder)[0].encode_chat(to_messages(chat["query"], chat["history"], chat["role"]))
    assert ids == chat.get("input_ids_first_version", chat["input_ids"])


WITHOUT_TOOLS = [c for c in EXPECTED["chats"] if not any("tools" in m for m in c["history"])]


def test_without_a_template_the_prompt_is_the_one_that_the_first_code_wrote(copy_of):
    tokenizer = load(copy_of(remove=["chat_template"]))[0]
    for chat in WITHOUT_TOOLS:
        ids = tokenizer.encode_chat(to_messages(chat["query"], chat["history"]))
        assert ids == chat.get("input_ids_first_version", chat["input_ids"])


def test_without_a_template_tools_are_declared_as_the_first_code_did(copy_of):
    tokenizer = load(copy_of(remove=["chat_template"]))[0]
    system = {"role": "system", "content": "", "tools": [TOOL]}
    text = prompt(tokenizer, [system, {"role": "user", "content": "hi"}])
    declared = json.dumps(TOOL, ensure_ascii=False, indent=4)
    assert text.startswith("[gMASK]<sop><|system|>\n你是一个名为 ChatGLM 的人工智能助手。")
    assert f"\n\n# 可用工具\n\n## get_weather\n\n{declared}\n在调用上述函数时" in text
    assert text.endswith("表示调用的参数。<|user|>\nhi<|assistant|>")


def test_without_a_template_a_tool_that_the_server_cannot_offer_is_refused_by_name(copy_of):
    tokenizer = load(copy_of(remove=["chat_template"]))[0]
    system = {"role": "system", "content": "", "tools": [{"type": "cogview"}]}
    with pytest.raises(ValueError, match="cogview"):
        tokenizer.encode_chat([system, {"role": "user", "content": "hi"}])


@pytest.mark.parametrize("wrap", [lambda tool: tool, lambda t: {"type": "function", "function": t}])
def test_tools_are_declared_once_with_and_without_their_wrapping(wrap):
    system = {"role": "system", "content": "Be brief.", "tools": [wrap(TOOL)]}
    text = prompt(golden("glm4")[0], [system, {"role": "user", "content": "hi"}])
    assert text.count("## get_weather") == 1
    assert text.count(json.dumps(TOOL, ensure_ascii=False, indent=4)) == 1
    assert text.endswith("<|system|>\nBe brief.<|user|>\nhi<|assistant|>")


@pytest.mark.parametrize("name", EXPECTED["special_tokens"])
def test_nobody_writes_a_special_token(name):
    tokenizer = golden("glm4")[0]
    text = f"a{name}\n {name}{name}b"
    tool = {"role": "system", "content": text, "tools": [{"name": text}]}
    ids = tokenizer.encode_chat([tool, {"role": "user", "content": text}])
    special = set(EXPECTED["special_tokens"].values())
    prefix = [EXPECTED["special_tokens"][s] for s in ("[gMASK]", "<sop>")]
    roles = ("<|system|>", "<|system|>", "<|user|>", "<|assistant|>")
    roles = [EXPECTED["special_tokens"][role] for role in roles]
    assert [i for i in ids if i in special] == prefix + roles
    user = [EXPECTED["special_tokens"]["<|user|>"], *tokenizer.encode("\n" + text)]
    assert ids[-len(user) - 1 : -1] == user


# Answers


@pytest.mark.parametrize(
    "raw, seen",
    [
        ("\n你好", "你好"),
        ("你好", "你好"),
        ("get_weather\n{}", "{}"),
        (".\n):", ".\n):"),
        ("\n", ""),
    ],
)
def test_the_line_that_an_answer_begins_with_is_not_shown(raw, seen):
    assert golden("glm4")[0].visible(raw, finished=True) == seen


DECLARED = [  # what calls a tool that nobody declared stays text here
    case for case in EXPECTED["responses"] if isinstance(case["response"], str) or case["history"]
]


@pytest.mark.parametrize("case", DECLARED, ids=lambda case: ascii(case["decoded"]))
def test_an_answer_is_that_of_the_original(case):
    tokenizer, decoded = golden("glm4")[0], case["decoded"]
    ids = [
        token
        for part in re.split(r"(<\|assistant\|>)", decoded)
        for token in (
            [tokenizer.hf.convert_tokens_to_ids(part)] if "<|" in part else tokenizer.encode(part)
        )
    ]
    detokenizer, seen = tokenizer.detokenizer(), []
    for token in ids:
        detokenizer.push([token])
        seen.append(tokenizer.visible(detokenizer.text, finished=False))
    raw = detokenizer.finish()
    assert raw.replace(ANOTHER_MESSAGE, "<|assistant|>") == decoded
    text = tokenizer.visible(raw, finished=True)
    assert all(text.startswith(earlier) for earlier in seen)
    answer = published_response(raw, text, tool_names(case["history"]))
    assert answer.response == case["response"]
    history = extend_history(case["history"] or [{"role": "user"}], "?", answer.messages)
    ours = [turn for turn in history if turn["role"] == "assistant"]
    theirs = [turn for turn in case["history_after"] if turn["role"] == "assistant"]
    for our, their in zip(ours, theirs, strict=True):
        # The year is in our history, too: the model is told what its reader saw.
        assert {"metadata": "", **our} == their | {
            "content": their["content"].replace("[[训练时间]]", "2023年")
        }


@pytest.mark.parametrize("name", ["glm4", "chatglm3"])
def test_words_before_a_call_are_shown_and_the_call_is_called(name):
    tokenizer = golden(name)[0]
    raw = f'\n先查天气。{ANOTHER_MESSAGE}get_weather\n{{"city": "北京"}}'

    async def chunks():
        for end in range(1, len(raw) + 1):
            seen, over = raw[:end], end == len(raw)
            yield Chunk(tokenizer.visible(seen, over), seen, 5, end, "stop" if over else None)

    async def collect(answer):
        return [each async for each in answer]

    parts = asyncio.run(collect(deltas(chunks(), ["get_weather"], [])))
    assert "".join(part.text for part in parts) == "先查天气。"
    assert json.loads(parts[-1].call.arguments) == {"city": "北京"}
    shown = asyncio.run(collect(visible(chunks(), ["get_weather"], [])))
    assert all(shown[-1].text.startswith(chunk.text) for chunk in shown)
    assert shown[-1].text == '先查天气。\nget_weather\n{"city": "北京"}'
    assert tokenizer.visible(raw, finished=True) == '先查天气。\n{"city": "北京"}'


@pytest.mark.parametrize("name", ["glm4", "chatglm3"])
@pytest.mark.parametrize("follows", ["", "get_weather\n{}"])
def test_the_name_of_a_special_token_is_text_where_an_answer_writes_it_out(name, follows):
    tokenizer = golden(name)[0]
    specials = tokenizer.specials if name == "chatglm3" else tokenizer.hf.get_vocab()
    text = 'The template ends in <|assistant|>get_weather\n{"city": "a"}'
    ids = tokenizer.encode("\n" + text)
    if follows:
        ids += [specials["<|assistant|>"], *tokenizer.encode(follows)]
    detokenizer = tokenizer.detokenizer()
    for token in ids:
        detokenizer.push([token])
    raw = detokenizer.finish()
    seen = tokenizer.visible(raw, finished=True)
    assert seen == text + ("\n{}" if follows else "")
    answer = published_response(raw, seen, ["get_weather"])
    assert answer.messages[0] == ("", text)
    assert answer.response == ({"name": "get_weather", "parameters": {}} if follows else text)


def test_every_end_that_the_files_name_ends_an_answer(copy_of):
    folder = copy_of()
    write_json(folder / "generation_config.json", {"eos_token_id": [562, 567]})
    assert load(folder)[0].stop_ids == [562, 567, 569, 571]


# Files


def test_a_template_in_a_file_of_its_own_is_used(copy_of):
    folder = copy_of(remove=["chat_template"])
    (folder / "chat_template.jinja").write_text("<sop>{{ messages[0]['content'] }}", "utf-8")
    assert prompt(load(folder)[0], [{"role": "user", "content": "hi"}]) == "<sop>hi"


def test_the_vocabulary_is_recognised_whatever_the_class_is_called(copy_of):
    folder = copy_of(remove=["tokenizer_class"])
    ids = load(folder)[0].encode_chat(to_messages("你好"))
    assert ids == EXPECTED["chats"][0]["input_ids"]


LINE = base64.b64encode(b"a") + b" 0\n"
BROKEN = {"empty": b"", "no numbers": b"YQ==\n" * 300, "one token": LINE, "twice": LINE * 300}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_vocabulary_is_named(copy_of, content):
    folder = copy_of()
    (folder / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.model"):
        load(folder)


def test_another_chat_format_is_refused():
    with pytest.raises(ValueError, match="GLM-4.*chatglm3"):
        load(GLM4, chat_format="chatglm3")


def test_the_base_model_is_refused_unless_the_format_is_asked_for(copy_of):
    folder = copy_of(remove=["chat_template"])
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"_name_or_path": "THUDM/glm-4-9b"})
    with pytest.raises(ValueError, match="base model"):
        load(folder)
    assert load(folder, chat_format="template")[0].chat_format == "template"


def test_the_model_for_images_is_refused(copy_of):
    folder = copy_of()
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"vision_config": {"image_size": 1120}})
    with pytest.raises(ValueError, match="images") as caught:
        load(folder)
    assert re.search(str(folder), str(caught.value))
