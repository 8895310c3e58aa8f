"""The tokenizer of a checkpoint: which chat format it speaks, told by the files that lie there.

They are read as text and never run.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from chatglm.checkpoint.fields import blaming
from chatglm.checkpoint.files import how_to_get, read_json
from chatglm.text.chatglm1 import ChatGLM1Tokenizer
from chatglm.text.glm4 import glm4_tokenizer
from chatglm.text.template import TemplateTokenizer
from chatglm.text.tokenizer import ChatGLMTokenizer, Tokenizer

FORMATS = ("chatglm2", "chatglm3")
NAMES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def is_first_generation(published: dict) -> bool:
    """Whether it is ChatGLM-6B, whose network is another than its successors'."""
    return bool({"position_encoding_2d", "inner_hidden_size"} & set(published))


def load_tokenizer(folder: Path, published: dict, chat_format: str | None) -> Tokenizer:
    """The tokenizer of a ChatGLM. Raises ValueError if its files do not make one."""
    if is_first_generation(published):
        return load_chatglm1_tokenizer(folder, published, chat_format)
    if is_tiktoken(folder):
        return load_glm4_tokenizer(folder, published, chat_format)
    return load_chatglm_tokenizer(folder, chat_format or detect_chat_format(published, folder))


def is_tiktoken(folder: Path) -> bool:
    """Whether the vocabulary is GLM-4's: lines of a base64 string and a number."""
    vocabulary = folder / "tokenizer.model"
    if (
        read_optional(folder / "tokenizer_config.json").get("tokenizer_class")
        == "ChatGLM4Tokenizer"
    ):
        return True
    if not vocabulary.is_file():
        return False
    with vocabulary.open("rb") as start:
        return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", start.read(200)) is not None


def read_optional(file: Path) -> dict:
    return read_json(file) if file.is_file() else {}


def read_code(folder: Path) -> str:
    """The published tokenizer's code, as text: it says which of its versions made the files."""
    code = folder / "tokenization_chatglm.py"
    return code.read_text(encoding="utf-8", errors="replace") if code.is_file() else ""


def detect_chat_format(published: dict, folder: Path) -> str:
    """chatglm2 or chatglm3, by the files that come with the weights."""
    named, texts = [str(published.get("_name_or_path", ""))], [read_code(folder)]
    for name in NAMES:
        content = read_optional(folder / name)
        named.append(str(content.get("name_or_path", "")))
        texts.append(json.dumps(content, ensure_ascii=False))
    # A folder may be called anything: its name counts only where the files have none.
    folder_name = [folder.resolve().name]
    names = [name for name in named if name] or folder_name
    refuse_base_model(names, folder, r"(chatglm|codegeex)\d?[\w.-]*[-_]base\b")
    if any("<|user|>" in text for text in texts):
        return "chatglm3"
    for some in (names, folder_name):
        for generation, pattern in (("chatglm3", "chatglm3"), ("chatglm2", "chatglm2|codegeex2")):
            if any(re.search(pattern, name, re.IGNORECASE) for name in some):
                return generation
    if read_code(folder):
        return "chatglm2"
    raise ValueError(
        f"{folder}: its files do not say which chat format it speaks; pass "
        "chat_format (--chat-format) chatglm2 or chatglm3"
    )


def refuse_base_model(names: list[str], folder: Path, pattern: str) -> None:
    if any(re.search(pattern, name, re.IGNORECASE) for name in names):
        raise ValueError(
            f"{folder} is a base model, not trained to chat; use the chat model, or "
            "pass chat_format (--chat-format) if you have tuned it to"
        )


def load_chatglm_tokenizer(folder: Path, chat_format: str) -> ChatGLMTokenizer:
    if chat_format not in FORMATS:
        raise ValueError(
            f"{folder} is a ChatGLM: chat_format can be chatglm2 or chatglm3, not {chat_format!a}"
        )
    file = find_vocabulary(folder, "tokenizer.model")
    try:
        return ChatGLMTokenizer(file.read_bytes(), chat_format)
    except RuntimeError as error:
        raise ValueError(f"{file} is not a SentencePiece model; {how_to_get(file)}") from error


def load_chatglm1_tokenizer(
    folder: Path, published: dict, chat_format: str | None
) -> ChatGLM1Tokenizer:
    if chat_format not in (None, "chatglm1"):
        raise ValueError(
            f"{folder} is the first ChatGLM-6B: chat_format can be chatglm1, not {chat_format!a}"
        )
    file = find_vocabulary(folder, "ice_text.model")
    count = read_optional(folder / "tokenizer_config.json").get("num_image_tokens")
    try:
        return ChatGLM1Tokenizer(file.read_bytes(), count, published.get("bos_token_id", 150004))
    except RuntimeError as error:
        raise ValueError(f"{file} is not a SentencePiece model; {how_to_get(file)}") from error


def find_vocabulary(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise ValueError(
            f"{folder} has no {name}, the vocabulary that comes with every such "
            "ChatGLM; copy it next to the weights"
        )
    return folder / name


def load_glm4_tokenizer(
    folder: Path, published: dict, chat_format: str | None
) -> TemplateTokenizer:
    """GLM-4's, in the first form (its prompt written in Python) or the later one (a template)."""
    template = read_template(folder)
    name = str(published.get("_name_or_path", ""))
    if template is None and chat_format is None:
        refuse_base_model([name or folder.resolve().name], folder, r"glm-?4-9b/?$")
    if chat_format not in (None, "template"):
        raise ValueError(f"{folder} is GLM-4: chat_format can be template, not {chat_format!a}")
    file = find_vocabulary(folder, "tokenizer.model")
    try:
        tokenizer = glm4_tokenizer(file, template)
    except ValueError as error:
        advice = how_to_get(file)
        raise ValueError(f"{file} is not a vocabulary of GLM-4: {error}; {advice}") from error
    is_first_form = template is None or "def apply_chat_template" in read_code(folder)
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>", "<|observation|>"])
    stops = collect_stops(folder, len(tokenizer), ends, published.get("eos_token_id"))
    with blaming(f"{folder}: its tokenizer cannot be used with its chat_template"):
        return TemplateTokenizer(tokenizer, stops, encodes_apart=is_first_form)


def read_template(folder: Path) -> str | None:
    """The chat template that lies in a folder: in a file of its own, or in a JSON."""
    for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        template: Any
        if file.suffix == ".jinja":
            template = file.read_text("utf-8", errors="replace")
        else:
            template = read_json(file).get("chat_template")
        if isinstance(template, list):  # several by name, such as for tools
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        if template:
            return template
    return None


def collect_stops(folder: Path, vocab_size: int, *found) -> list[int]:
    """Ids that end an answer, of every place that names one. Raises ValueError if none does."""
    generation = read_optional(folder / "generation_config.json")
    stops = [*found, generation.get("eos_token_id")]
    lists = [stop if isinstance(stop, list) else [stop] for stop in stops if stop is not None]
    # The batch is filled up with the first of them, so each must be one of the network's.
    ids = sorted({i for some in lists for i in some if 0 <= i < vocab_size})
    if not ids:
        raise ValueError(f"{folder}: no file names an eos_token_id, the token that ends an answer")
    return ids


def load_template_tokenizer(folder: Path, config, chat_format: str | None) -> TemplateTokenizer:
    if chat_format not in (None, "template"):
        raise ValueError(
            f"{folder} is not a ChatGLM2 or ChatGLM3: chat_format can only be template, "
            f"not {chat_format!a}"
        )
    own_code = "auto_map" in read_optional(folder / "tokenizer_config.json")
    source = PreTrainedTokenizerFast if own_code else AutoTokenizer
    with blaming(f"{folder}: its tokenizer.json and tokenizer_config.json make no tokenizer"):
        tokenizer = source.from_pretrained(folder, config=config, local_files_only=True)
    if not tokenizer.chat_template:
        raise ValueError(
            f"{folder} has no chat template: a base model, not trained to chat. "
            "Use its chat or instruct version"
        )
    stops = collect_stops(folder, len(tokenizer), config.eos_token_id, tokenizer.eos_token_id)
    with blaming(f"{folder}: its tokenizer cannot be used with its chat_template"):
        return TemplateTokenizer(tokenizer, stops)
