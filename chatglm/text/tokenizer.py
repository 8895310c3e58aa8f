"""Text to token ids and back: the two published ChatGLM chat formats, and chat templates.

The tokenizers share one interface, `Tokenizer`. Nothing else in the project knows which it holds.
"""

from __future__ import annotations

import copy
import json
import re
from typing import Protocol

from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizerBase

from chatglm.text.tools import INTRODUCTION

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

    def encode(self, text: str) -> list[int]:
        """Ids of plain text. A special token's name in it is text like any other."""

    def encode_chat(self, messages: list[dict]) -> list[int]:
        """The prompt up to where the model answers. Raises ValueError if the chat format has no
        way to express the messages."""

    def decode(self, ids: list[int]) -> str:
        """Text of any ids."""

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
        self.anchor = self.sp.encode("a")[-1]  # an ordinary token, see Detokenizer
        self.longest_token = max(len(self.sp.id_to_piece(i)) for i in range(first))
        self.stop_ids = [self.sp.eos_id()]
        if chat_format == "chatglm3":
            self.stop_ids += [self.specials["<|user|>"], self.specials["<|observation|>"]]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; a newline is the byte piece <0x0A>, spaces are kept."""
        return self.sp.encode(text)

    def encode_chat(self, messages: list[dict]) -> list[int]:
        """The prompt up to where the model answers.

        `messages` are `{"role", "content", "metadata"?, "tools"?}`; roles as in ChatGLM3. Raises
        ValueError for a role or an order that the checkpoint's format cannot say.
        """
        ids = [self.specials["[gMASK]"], self.specials["sop"]]
        if self.chat_format == "chatglm2":
            return ids + self.encode(chatglm2_prompt(messages))
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

    def visible(self, raw: str, finished: bool) -> str:
        """What a user sees of a reply so far: ChatGLM3 replies begin with a metadata line.

        White space at the end is held back until something follows it, so that the text only
        ever grows.
        """
        if self.chat_format == "chatglm2":
            return raw.strip()
        metadata, newline, content = raw.partition("\n")
        if newline and is_tool_name(metadata):
            return content.strip()
        # Fine-tunes exist that leave the metadata line out. Until its newline comes, only a first
        # line that cannot be a tool's name shows that this is such a one.
        return "" if is_tool_name(metadata) and not finished else raw.strip()


def is_tool_name(line: str) -> bool:
    return re.fullmatch(r"\s*[A-Za-z0-9_.\-]{0,64}\s*", line) is not None


def chatglm2_prompt(messages: list[dict]) -> str:
    """`[Round 1]\\n\\n问：…\\n\\n答：…\\n\\n[Round 2]\\n\\n问：…\\n\\n答：` (published
    `build_prompt`).

    The format has no system role: a system message goes in front of the first question.
    """
    text, rounds, preface = "", 0, ""
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "system":
            preface = content + "\n\n"
        elif role == "user":
            rounds += 1
            text += f"[Round {rounds}]\n\n问：{preface}{content}\n\n答："
            preface = ""
        elif role == "assistant":
            text += f"{content}\n\n"
        else:
            raise ValueError(
                f"role must be one of system, user, assistant, not {role!a}: "
                "ChatGLM2 has no tools, so it takes no observation"
            )
    return text


class TemplateTokenizer:
    """A tokenizer that `transformers` ships, with the checkpoint's chat template."""

    chat_format = "template"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int]) -> None:
        self.hf = tokenizer
        # A copy for users' words: the library keeps split_special_tokens as a state of the
        # tokenizer, and requests are prepared in several threads.
        self._plain = copy.deepcopy(tokenizer)
        self.stop_ids = stop_ids
        self.vocab_size = len(tokenizer)
        self.anchor = tokenizer.encode("a", add_special_tokens=False)[-1]
        self.longest_token = max(map(len, tokenizer.get_vocab()))
        # What stands for a special token's name where a user wrote it, see `encode_chat`.
        names = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        self._marks = {f"\ue000{n}\ue001": name for n, name in enumerate(names)}
        self._template = str(tokenizer.chat_template)
        self._tool_role = "observation" if "observation" in self._template else "tool"

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: a special token's name is taken apart like any other word."""
        return self._plain(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def encode_chat(self, messages: list[dict]) -> list[int]:
        """The prompt up to where the model answers. Raises ValueError if the template refuses.

        A special token's name that a user wrote goes through the template as a mark of two
        private-use characters, and comes out as plain text.
        """
        tools = next((m["tools"] for m in messages if m.get("tools")), None)
        if tools:
            tools = [
                tool if "function" in tool else {"type": "function", "function": tool}
                for tool in json.loads(self._mark(json.dumps(tools, ensure_ascii=False)))
            ]
        messages = [self._message(m) for m in messages]
        messages = [m for m in messages if m["content"] or m["role"] != "system"]
        ids = []
        for part in re.split("(\ue000\\d+\ue001)", self._render(messages, tools)):
            if part in self._marks:
                ids += self.encode(self._marks[part])
            else:
                ids += self.hf(part, add_special_tokens=False)["input_ids"]
        return ids

    def _message(self, message: dict) -> dict:
        """A message as templates want it, users' words marked."""
        content = message["content"]
        if content.endswith(INTRODUCTION):  # templates have one of their own
            content = content.removesuffix(INTRODUCTION).rstrip()
        new = {"role": message["role"], "content": self._mark(content)}
        if message["role"] == "observation":
            new["role"] = self._tool_role
        if "metadata" in message:
            new["metadata"] = self._mark(message["metadata"])
        if "arguments" in message:  # a call: as tool_calls, or GLM-4's name and JSON
            arguments = self._mark(json.dumps(message["arguments"], ensure_ascii=False))
            function = {"name": new["metadata"], "arguments": json.loads(arguments)}
            new |= (
                {"content": "", "tool_calls": [{"type": "function", "function": function}]}
                if "tool_calls" in self._template
                else {"content": arguments}
            )
        return new

    def _mark(self, text: str) -> str:
        for mark, name in self._marks.items():
            text = text.replace(name, mark)
        return text

    def _render(self, messages: list[dict], tools: list | None) -> str:
        from jinja2 import TemplateError

        try:
            return str(
                self.hf.apply_chat_template(
                    messages, tools=tools, add_generation_prompt=True, tokenize=False
                )
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error

    def decode(self, ids: list[int]) -> str:
        ids = [i for i in ids if 0 <= i < self.vocab_size]
        text = self.hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def visible(self, raw: str, finished: bool) -> str:
        return raw.strip()
