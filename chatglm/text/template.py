"""A tokenizer that transformers has, with the chat template of its checkpoint."""

from __future__ import annotations

import copy
import itertools
import json
import re
import time
from typing import Any

from transformers import PreTrainedTokenizerBase

from chatglm.errors import is_panic
from chatglm.text.detokenizer import Detokenizer
from chatglm.text.time_limit import time_limit
from chatglm.text.tokenizer import ANOTHER_MESSAGE, fill_in_year, split_list, without_metadata
from chatglm.text.tools import INTRODUCTION

# Private-use characters, which stand in the rendered prompt and never reach the model.
MARK = "\ue000{}\ue001"  # for the special token of that number where a user wrote its name
CUT = MARK.format("")  # for a place where the text is to be encoded in two parts
GLM4_BEGINNING = ("[gMASK]", "<sop>")  # of every text
LENGTHS_TRIED = [2**n for n in range(4, 16)]  # characters, when a tokenizer is tried out
SECONDS_TO_ENCODE = 1.0  # that one of these texts may take; usual are 0.05


class TemplateTokenizer:
    """Messages by a chat template; special tokens come from the template, never from a user.

    With `encodes_apart`, the content of a message is encoded apart from the line above it, as the
    first GLM-4 tokenizer did: it matters where the content begins with newlines.
    """

    chat_format = "template"
    time_limit = 10.0  # seconds in which a template must have written a conversation

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int], encodes_apart: bool = False
    ) -> None:
        self.hf = tokenizer
        # A copy for users' words: the library keeps split_special_tokens as a state of the
        # tokenizer, and requests are prepared in several threads.
        self._plain = copy.deepcopy(tokenizer)
        self.stop_ids = stop_ids
        self.vocab_size = len(tokenizer)
        try_out(self._plain)
        self.anchor = tokenizer.encode("a", add_special_tokens=False)[-1]
        vocabulary = tokenizer.get_vocab()
        self.longest_token = max(map(len, vocabulary))
        self._before_text = [vocabulary[name] for name in GLM4_BEGINNING if name in vocabulary]
        names = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        self._marks = {MARK.format(n): name for n, name in enumerate(names)}
        self._special = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._cut = CUT if encodes_apart else ""
        self._read_template(str(tokenizer.chat_template), names)
        self.encode_chat([{"role": "user", "content": "?"}])  # else it is of no use: it raises

    def _read_template(self, template: str, names: list[str]) -> None:
        """What this template expects of a conversation, told by the words in it."""
        knows_tool = re.search(r"""["']tool["']""", template)
        observes = "observation" in template or "<|observation|>" in names
        self._tool_role = "observation" if observes and not knows_tool else "tool"
        self._has_tool_calls = "tool_calls" in template
        # GLM-4's reads the tools of a message, others have a variable of that name.
        self._tools_in_message = re.search(r"""\w(\.tools\b|\[["']tools["']\])""", template)
        self.has_metadata = "metadata" in template  # GLM-4's first form
        self._another_message = self.hf.get_vocab().get("<|assistant|>")

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: a special token's name is taken apart like any other word."""
        return ids_of(self._plain, text, add_special_tokens=False, split_special_tokens=True)

    def encode_plain(self, text: str) -> list[int]:
        """With the special tokens that the tokenizer puts before every text."""
        ids = ids_of(self._plain, text, split_special_tokens=True)
        # GLM-4's first files say so in Python; later ones leave it to the library.
        return ids if ids[:2] == self._before_text else [*self._before_text, *ids]

    def encode_chat(self, messages: list[dict]) -> list[int]:
        """The prompt up to where the model answers. Raises ValueError if the template refuses."""
        tools = next((self._declared(m["tools"]) for m in messages if m.get("tools")), None)
        messages = [self._message(m) for m in messages]
        messages = [m for m in messages if m["content"] or "tools" in m or m["role"] != "system"]
        rendered = self._render(messages, tools)
        return [i for part in rendered.split(CUT) for i in self._encode_rendered(part)]

    def _encode_rendered(self, text: str) -> list[int]:
        """Ids of a part of the prompt. What lies between two special tokens is encoded as one, and
        as plain text if a user has written a special token's name in it."""
        edges = [0, *itertools.chain(*(m.span() for m in self._special.finditer(text))), len(text)]
        parts = [text[begin:end] for begin, end in itertools.pairwise(edges)]
        ids = []
        for is_marked, some in itertools.groupby(parts, lambda part: "\ue000" in part):
            together = "".join(some)
            if is_marked:
                ids += self.encode(self._unmark(together))
            else:
                ids += ids_of(self.hf, together, add_special_tokens=False)
        return ids

    def _declared(self, tools: list[dict]) -> list[dict]:
        """Tools as templates want them, {"type": "function", "function": …}; names marked."""
        tools = json.loads(self._mark(json.dumps(tools, ensure_ascii=False)))
        return [
            {"type": "function", "function": tool} if "name" in tool else tool for tool in tools
        ]

    def _message(self, message: dict) -> dict:
        """A message as templates want it, users' words marked."""
        content = message["content"]
        if content.endswith(INTRODUCTION):  # templates have one of their own
            content = content.removesuffix(INTRODUCTION).rstrip()
        new = {"role": message["role"], "content": content and self._cut + self._mark(content)}
        if message["role"] == "observation":
            new["role"] = self._tool_role
        if message.get("tools") and self._tools_in_message:
            new["tools"] = self._declared(message["tools"])
        if "metadata" in message:
            new["metadata"] = self._mark(message["metadata"])
        if "arguments" in message:  # a call: as tool_calls, or GLM-4's name and JSON
            arguments = self._mark(json.dumps(message["arguments"], ensure_ascii=False))
            function = {"name": new["metadata"], "arguments": json.loads(arguments)}
            new |= (
                {"content": "", "tool_calls": [{"type": "function", "function": function}]}
                if self._has_tool_calls
                else {"content": arguments}
            )
        return new

    def _mark(self, text: str) -> str:
        for mark, name in self._marks.items():
            text = text.replace(name, mark)
        return text

    def _unmark(self, text: str) -> str:
        for mark, name in self._marks.items():
            text = text.replace(mark, name)
        return text

    def _render(self, messages: list[dict], tools: list | None) -> str:
        try:
            with time_limit(self.time_limit):
                text = self.hf.apply_chat_template(
                    messages,
                    tools=None if self._tools_in_message else tools,
                    add_generation_prompt=True,
                    tokenize=False,
                )
        except TimeoutError as error:
            raise ValueError(f"the chat template takes over {self.time_limit:g} s") from error
        except Exception as error:  # a template is a program, and may raise anything
            raise ValueError(f"the chat template refuses the conversation: {error}") from error
        return str(text)

    def decode(self, ids: list[int]) -> str:
        ids = [i for i in ids if 0 <= i < self.vocab_size]
        text = self.hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def _decode_answer(self, ids: list[int]) -> str:
        """As `decode`, but it shows where another message begins."""
        if not self.has_metadata:
            return self.decode(ids)
        messages = split_list(ids, self._another_message)
        return ANOTHER_MESSAGE.join(map(self.decode, messages))

    def detokenizer(self) -> Detokenizer:
        return Detokenizer(self._decode_answer, self.anchor)

    def visible(self, raw: str, finished: bool) -> str:
        """What a user sees of a reply so far."""
        if not self.has_metadata:
            return raw.strip()
        return without_metadata(fill_in_year(raw, finished), finished)  # GLM-4


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> list[int]:
    """Raises ValueError where one of the tokenizer's regular expressions gives up."""
    try:
        return tokenizer(text, **options)["input_ids"]
    except BaseException as error:
        if not is_panic(error):
            raise
        raise ValueError(f"the tokenizer cannot read this text: {error}") from error


def try_out(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError if a text makes it slow: its regular expressions come from a stranger.

    Once it runs, nothing can stop it. So this is seen at start, on texts of doubling length.
    """
    for piece in ("a", " ", "1", "!", "\n", "a ", "\u4e2d"):
        for length in LENGTHS_TRIED:
            begin = time.process_time()
            try:
                ids_of(tokenizer, piece * length + "?")
            except ValueError as error:
                raise ValueError(f"{error}, {length} times {piece!a}") from error
            if time.process_time() - begin > SECONDS_TO_ENCODE:
                raise ValueError(
                    f"its tokenizer takes over {SECONDS_TO_ENCODE:g} s for {length} times {piece!a}"
                )
