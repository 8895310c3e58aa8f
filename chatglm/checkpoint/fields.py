"""The fields that are read of a checkpoint's JSON files, and what each may hold.

A checkpoint comes from a stranger. One table here answers for all files, as a field means the same
in each; sizes of a network are checked in conversion.py, by what it needs of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chatglm.errors import is_panic, preview

DEEPEST = 50  # objects in each other; published files have 5
LONGEST_NAME = 1000  # characters; a search for the kind of a model in it must not take long
LARGEST_ID = 2**31  # above all token ids


def is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_NAME


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def is_id(value: Any) -> bool:
    return type(value) is int and -1 <= value < LARGEST_ID  # -1 is what some write for none


def is_id_or_ids(value: Any) -> bool:
    return all(map(is_id, value)) if isinstance(value, list) else is_id(value)


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST_ID


def is_number(value: Any) -> bool:
    """Over 0, and so small that float32 holds it: neither NaN nor infinite."""
    return type(value) in (int, float) and 0 < value < 2**63


def is_object(value: Any) -> bool:
    return isinstance(value, dict)


def is_patterns(value: Any) -> bool:
    return isinstance(value, dict) and all(map(is_number, value.values()))


def is_template(value: Any) -> bool:
    """A text, or some by name, such as one for tools."""
    if isinstance(value, list):
        return all(isinstance(t, dict) and isinstance(t.get("template"), str) for t in value)
    return isinstance(value, str)


NAME = (is_name, f"a text of at most {LONGEST_NAME} characters")
FLAG = (is_flag, "true or false")
IDS = (is_id_or_ids, "a token id or a list of them")
COUNT = (is_count, "a whole number from 0 on")
NUMBER = (is_number, "a number over 0")
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model_type": NAME,
    "_name_or_path": NAME,
    "torch_dtype": NAME,
    "tie_word_embeddings": FLAG,
    "position_encoding_2d": FLAG,
    "bos_token_id": IDS,
    "eos_token_id": IDS,
    "pad_token_id": IDS,
    "quantization_bit": COUNT,
    "rope_ratio": NUMBER,
    "name_or_path": NAME,  # from here on of a tokenizer
    "tokenizer_class": NAME,
    "num_image_tokens": COUNT,
    "chat_template": (is_template, "a text or a list of named ones"),
    "weight_map": (is_object, "an object, tensor to file"),  # of an index
    "base_model_name_or_path": NAME,  # from here on of an adapter
    "r": NUMBER,
    "lora_alpha": NUMBER,
    "alpha_pattern": (is_patterns, "an object, pattern to number"),
}


def check_content(content: Any, file: Path) -> None:
    """Raises ValueError, naming the file, for what is no object, is nested too deeply for those
    who walk through it, or has a field above that holds something else. null is as if absent."""
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, not {preview(content)}; get it again")
    if is_deep(content):
        raise ValueError(f"{file} is nested over {DEEPEST} deep; download it again")
    for field, (fits, wanted) in FIELDS.items():
        value = content.get(field)
        if value is not None and not fits(value):
            raise ValueError(f"{file}: {field} must be {wanted}, not {preview(value)}")


def is_deep(content: Any) -> bool:
    """Level by level, since a function that calls itself would fail on what this looks for."""
    level = [content]
    for _ in range(DEEPEST):
        objects = [list(value.values()) for value in level if isinstance(value, dict)]
        lists = [value for value in level if isinstance(value, list)]
        level = [child for children in objects + lists for child in children]
        if not level:
            return False
    return True


@contextmanager
def blaming(what: str) -> Iterator[None]:
    """Raises ValueError, `what` and the reason in one line, for whatever a library raises over a
    stranger's file: it checks little of what it reads, so that may be anything."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise ValueError(f"{what} ({reason(error)})") from error


def reason(error: BaseException) -> str:
    """The error in one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
