"""GLM-4's vocabulary and prompt, as its first files have them.

The file is tiktoken's: a line for each token, the base64 of its bytes and its id. transformers can
turn that into a fast tokenizer, but would need tiktoken to read five lines.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

# They follow the ranks, in this order.
SPECIALS = (
    "<|endoftext|> [MASK] [gMASK] [sMASK] <sop> <eop> <|system|> <|user|> <|assistant|> "
    "<|observation|> <|begin_of_image|> <|end_of_image|> <|begin_of_video|> <|end_of_video|>"
).split()

# What the first tokenizer file (June 2024) wrote in Python, where there is no template in JSON.
# (A newline directly behind a statement would be dropped, hence the two in quotes.)
TEMPLATE = """\
[gMASK]<sop>\
{% for item in messages %}{% if item['tools'] %}<|system|>
你是一个名为 ChatGLM 的人工智能助手。\
你是基于智谱AI训练的语言模型 GLM-4 模型开发的，\
你的任务是针对用户的问题和要求提供适当的答复和支持。

# 可用工具{% for tool in item['tools'] %}\
{% if tool['type'] == 'function' %}{{ '\\n\\n' }}## {{ tool['function']['name'] }}

{{ tool['function'] | tojson(indent=4) }}
在调用上述函数时，请使用 Json 格式表示调用的参数。{% else %}\
{{ raise_exception("GLM-4 takes tools of type function, not " ~ tool['type']) }}{% endif %}\
{% endfor %}{% endif %}\
{% if item['content'] %}<|{{ item['role'] }}|>{{ item['metadata'] }}
{{ item['content'] }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% endif %}"""


class Converter(TikTokenConverter):
    """The library's, but it reads the file itself."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        return read_ranks(Path(tiktoken_url).read_bytes())


def read_ranks(content: bytes) -> dict[bytes, int]:
    """Token -> id. Raises ValueError, naming the line, for anything else than such a file."""
    ranks = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"line {number} is not a base64 string and a number") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
        raise ValueError("its numbers are not those from 0 on, or fewer than the 256 bytes")
    return ranks


def glm4_tokenizer(file: Path, template: str | None) -> PreTrainedTokenizerFast:
    """The tokenizer of such a file, with the special tokens behind its ids."""
    converter = Converter(vocab_file=str(file), extra_special_tokens=SPECIALS)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(),
        eos_token=SPECIALS[0],
        pad_token=SPECIALS[0],
        extra_special_tokens=SPECIALS[1:],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template or TEMPLATE
    return tokenizer
