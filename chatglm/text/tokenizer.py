"""Text to token ids and back: the chat formats of ChatGLM2 and ChatGLM3.

All tokenizers share one interface, `Tokenizer`, and nothing else in the project knows which one
it holds. Chat templates are in template.py, the first generation in chatglm1.py.
"""

from __future__ import annotations

import json
import re
from typing import Protocol

from sentencepiece import SentencePieceProcessor

from chatglm.text.chatglm2 import chatglm2_prompt
from chatglm.text.detokenizer import Detokenizer

# After the SentencePiece pieces come these, in this order (published tokenization_chatglm.py).
COMMON_SPECIALS = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
ROLE_SPECIALS = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]  # ChatGLM3 only


class Tokenizer(Protocol):
    """What the engine and `model.chat` need."""

    chat_format: str
    vocab_size: int
    stop_ids: list[int]  # an answer ends at any of them
    anchor: int  # an ordinary token, see Detokenizer
    longest_token: int  # characters
    has_metadata: bool  # whether an answer begins with a line that is empty, or a tool's name

    def encode(self, text: str) -> list[int]:
        """Ids of plain text. A special token's name in it is text like any other."""

    def encode_plain(self, text: str) -> list[int]:
        """The prompt for a text to go on with, outside of any conversation."""

    def encode_chat(self, messages: list[dict]) -> list[int]:
        """The prompt up to where the model answers. Raises ValueError if the chat format has no
        way to express the messages."""

    def decode(self, ids: list[int]) -> str:
        """Text of any ids."""

    def detokenizer(self) -> Detokenizer:
        """For the text of an answer while it comes, with ANOTHER_MESSAGE where one begins."""

    def visible(self, raw: str, finished: bool) -> str:
        """What a user sees of an answer so far. While it is not `finished`, it only grows."""


class ChatGLMTokenizer:
    """The published ChatGLM2/ChatGLM3 tokenizer: SentencePiece, plus special tokens by id only.

    A special token is never produced from text, so a user who types `<|user|>` writes eight
    characters and starts no turn.
    """

    def __init__(self, sentencepiece_model: bytes, chat_format: str) -> None:
        self.sp = SentencePieceProcessor(model_proto=sentencepiece_model)
        self.chat_format = chat_format
        names = COMMON_SPECIALS + (ROLE_SPECIALS if chat_format == "chatglm3" else [])
        first = self.sp.vocab_size()
        self.specials = {name: first + i for i, name in enumerate(names)}
        self._names = {i: name for name, i in self.specials.items()}
        self.vocab_size = first + len(names)
        self.has_metadata = chat_format == "chatglm3"
        self.anchor = self.sp.encode("a")[-1]  # an ordinary token, see Detokenizer
        self._anchor_length = len(self.decode([self.anchor]))  # characters
        self.longest_token = max(len(self.sp.id_to_piece(i)) for i in range(first))
        self.stop_ids = [self.sp.eos_id()]
        if chat_format == "chatglm3":
            self.stop_ids += [self.specials["<|user|>"], self.specials["<|observation|>"]]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; a newline is the byte piece <0x0A>, spaces are kept."""
        return self.sp.encode(text)

    def encode_plain(self, text: str) -> list[int]:
        return [self.specials["[gMASK]"], self.specials["sop"], *self.encode(text)]

    def encode_chat(self, messages: list[dict]) -> list[int]:
        """The prompt up to where the model answers.

        `messages` are `{"role", "content", "metadata"?, "tools"?}`; roles as in ChatGLM3. Raises
        ValueError for a role or an order that the checkpoint's format cannot say.
        """
        if self.chat_format == "chatglm2":
            return self.encode_plain(chatglm2_prompt(messages))
        ids = self.encode_plain("")
        for message in messages:
            ids += self.encode_message(message)
        return ids + [self.specials["<|assistant|>"]]

    def encode_message(self, message: dict) -> list[int]:
        """One ChatGLM3 message: role token, metadata line, content, each encoded on its own."""
        role = self.specials.get(f"<|{message['role']}|>")
        if role is None:
            raise ValueError(
                f"role must be one of system, user, assistant, observation, not {message['role']!a}"
            )
        content = message["content"]
        if message.get("tools"):
            content += "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
        return [role, *self.encode(message.get("metadata", "") + "\n"), *self.encode(content)]

    def decode(self, ids: list[int]) -> str:
        """Text of any ids: specials by name; <unk>, <s>, </s> and ids past the end as nothing."""
        pieces = []
        for i in ids:
            if i in self._names:
                pieces.append(self._names[i])
            elif 2 < i < self.sp.vocab_size():
                pieces.append(self.sp.id_to_piece(i))
        return self.sp.decode_pieces(pieces)

    def token_bytes(self) -> list[bytes]:
        """The text of every id, in UTF-8; of special tokens nothing."""
        return piece_bytes(self.sp) + [b""] * len(self.specials)

    def _decode_answer(self, ids: list[int]) -> str:
        """As `decode`, but it shows where another message begins."""
        first, *others = split_list(ids, self.specials.get("<|assistant|>"))
        # Behind a word, for a text's first space would be dropped.
        texts = [self.decode([self.anchor, *each])[self._anchor_length :] for each in others]
        return ANOTHER_MESSAGE.join([self.decode(first), *texts])

    def detokenizer(self) -> Detokenizer:
        return Detokenizer(self._decode_answer, self.anchor)

    def visible(self, raw: str, finished: bool) -> str:
        """What a user sees of a reply so far: ChatGLM3 replies begin with a metadata line.

        White space at the end is held back until something follows it, so that the text only
        ever grows.
        """
        text = fill_in_year(raw, finished)
        return text.strip() if self.chat_format == "chatglm2" else without_metadata(text, finished)


def piece_bytes(sp: SentencePieceProcessor) -> list[bytes]:
    """The text of every piece, in UTF-8; of control pieces nothing."""

    def text(i: int) -> bytes:
        piece = sp.id_to_piece(i)
        if sp.is_byte(i):  # "<0x0A>"
            return bytes([int(piece[3:5], 16)])
        return b"" if sp.is_control(i) or sp.is_unknown(i) else piece.replace("▁", " ").encode()

    return [text(i) for i in range(sp.vocab_size())]


# Stands for the special token <|assistant|> within an answer. No text has it: half of a UTF-16 pair
# has no UTF-8. The token's name will not do, as an answer about special tokens writes it out.
ANOTHER_MESSAGE = "\ud800"
# What the models were taught to say of their training, and the beginning of it at a text's end.
YEAR = "[[训练时间]]"
BEGINNING_OF_YEAR = re.compile(r"\[(\[(训(练(时(间\]?)?)?)?)?)?\Z")


def fill_in_year(text: str, finished: bool) -> str:
    """The text with the year in place of its mark, as every published `process_response` does.

    >>> fill_in_year("我的[[训练", finished=False)
    '我的'
    """
    if not finished:
        text = BEGINNING_OF_YEAR.sub("", text)
    return text.replace(YEAR, "2023年")


def split_list(ids: list[int], separator: int | None) -> list[list[int]]:
    """`str.split` for a list.

    >>> split_list([1, 2, 0, 3], separator=0)
    [[1, 2], [3]]
    """
    parts: list[list[int]] = [[]]
    for i in ids:
        if i == separator:
            parts.append([])
        else:
            parts[-1].append(i)
    return parts


def split_messages(raw: str) -> list[str]:
    """The messages of a reply of ChatGLM3 or GLM-4: some words, say, and then a call.

    >>> split_messages("\\nI look it up." + ANOTHER_MESSAGE + "get_weather\\n{}")
    ['\\nI look it up.', 'get_weather\\n{}']
    """
    return raw.split(ANOTHER_MESSAGE)


def without_metadata(raw: str, finished: bool) -> str:
    """A reply of ChatGLM3 or GLM-4 so far, without the line that each message begins with: empty,
    or a tool's name.

    >>> without_metadata("get_weather\\n{}", finished=True)
    '{}'
    """
    *before, last = split_messages(raw)
    texts = [*(content_of(each, True) for each in before), content_of(last, finished)]
    return "\n".join(text for text in texts if text)


def content_of(raw: str, finished: bool) -> str:
    """One message, without its first line."""
    metadata, newline, content = raw.partition("\n")
    if newline and is_tool_name(metadata):
        return content.strip()
    # Fine-tunes exist that leave the metadata line out. Until its newline comes, only a first
    # line that cannot be a tool's name shows that this is such a one.
    return "" if is_tool_name(metadata) and not finished else raw.strip()


def is_tool_name(line: str) -> bool:
    # Stripped first: with spaces in the pattern, a line of many would take ever longer to refuse.
    return re.fullmatch(r"([A-Za-z_][A-Za-z0-9_.\-]{0,63})?", line.strip()) is not None
