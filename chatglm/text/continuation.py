"""From a prompt to ids, and from the tokens of an answer to what its reader is to see of it: what
stands behind the beginning that the client wrote itself, and behind what the chat format hides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatglm.sampling import check_room
from chatglm.text.messages import texts_of
from chatglm.text.tokenizer import ANOTHER_MESSAGE

if TYPE_CHECKING:
    from chatglm.engine.sequence import Sequence
    from chatglm.text.tokenizer import Tokenizer

# Room for what stands before the first visible token, such as ChatGLM3's metadata line.
HIDDEN_TOKENS = 32
ALWAYS_COUNTED = 2**16  # characters; of shorter prompts, a refusal has the exact length in tokens
PART = 2**13  # characters


def check_length(
    tokenizer: Tokenizer, prompt: list[dict] | str, max_length: int, context: int
) -> None:
    """Raises PromptTooLong for a long prompt that cannot fit, as soon as its beginning shows it.

    To tokenise all of it would take time and memory. It is read in parts, because SentencePiece
    holds Python's lock, and with it the event loop, until it has read a text to its end.
    """
    if is_short(prompt):
        return
    tokens = 0
    for text in texts_of(prompt):
        for begin in range(0, len(text), PART):
            torn = tokenizer.longest_token if begin else 0  # a token may lie across the cut
            tokens += max(0, len(tokenizer.encode(text[begin : begin + PART])) - torn)
            if tokens >= min(max_length, context):
                check_room(tokens, max_length, context, exact=False)


def is_short(prompt: list[dict] | str) -> bool:
    total = 0
    for text in texts_of(prompt):
        total += len(text)
        if total > ALWAYS_COUNTED:
            return False
    return True


def encode_prompt(
    tokenizer: Tokenizer, prompt: list[dict] | str, forced_prefix: str
) -> tuple[list[int], str, int]:
    """The ids up to where the model goes on; the text with which its answer begins; and how many
    characters of that the client has begun itself."""
    if isinstance(prompt, str):
        return tokenizer.encode_plain(prompt), "", 0
    begun = prompt[-1]["content"] if prompt[-1]["role"] == "assistant" else ""
    if begun:
        input_ids, between = encode_begun(tokenizer, prompt)
        return input_ids, between + begun, len(begun.lstrip())
    forced_ids = tokenizer.encode(forced_prefix) if forced_prefix else []
    return tokenizer.encode_chat(prompt) + forced_ids, forced_prefix, 0


def encode_begun(tokenizer: Tokenizer, messages: list[dict]) -> tuple[list[int], str]:
    """The ids of a conversation up to where the last message, the assistant's, breaks off; and what
    the chat format writes between the assistant's role and that message.

    >>> encode_begun(chatglm3_tokenizer, [..., {"role": "assistant", "content": "One, two,"}])[1]
    '\\n'
    """
    begun = messages[-1]["content"]
    prompt, content = tokenizer.encode_chat(messages[:-1]), tokenizer.encode(begun)
    # With another message behind it, the begun answer is written as a whole one would be.
    whole = tokenizer.encode_chat([*messages, {"role": "user", "content": "?"}])
    written = whole[len(prompt) :]
    if whole[: len(prompt)] == prompt:
        for start in range(min(8, len(written))):
            if written[start : start + len(content)] == content:
                between = written[:start]
                return prompt + between + content, tokenizer.decode(between)
    return prompt + content, ""  # the format encodes both together, so that their tokens differ


class AnswerText:
    """The text of an answer while its tokens come."""

    def __init__(self, tokenizer: Tokenizer, sequence: Sequence) -> None:
        self._tokenizer, self._sequence = tokenizer, sequence
        self._detokenizer = tokenizer.detokenizer()
        # What goes on with a text may begin with a space, which decoders drop at the beginning.
        goes_on = sequence.begun_length or sequence.is_plain
        self._anchor = [tokenizer.anchor] if goes_on else []
        self._skipped = len(tokenizer.decode(self._anchor)) if goes_on else 0
        self._detokenizer.push(self._anchor)

    def push(self, ids: list[int]) -> None:
        self._detokenizer.push(ids)

    def so_far(self, finished: bool) -> tuple[str, str]:
        """(all of the answer, what its reader sees of it)."""
        text = self._detokenizer.finish() if finished else self._detokenizer.text
        if self._sequence.is_plain:  # it has no messages
            text = text.replace(ANOTHER_MESSAGE, "")
        raw = self._sequence.forced_prefix + text[self._skipped :]
        return raw, self._visible(raw, finished)

    def _visible(self, raw: str, finished: bool) -> str:
        if self._sequence.is_plain:
            return raw
        return self._tokenizer.visible(raw, finished)[self._sequence.begun_length :]

    def hidden_tokens(self, tokens: list[int]) -> int | None:
        """How many tokens stand before the first with visible text, or None if there is none yet.
        They do not count for `max_visible_tokens`: a gateway tests a connection with one."""
        if self._sequence.is_plain:
            return 0
        beginning = AnswerText(self._tokenizer, self._sequence)
        for number, token in enumerate(tokens[: HIDDEN_TOKENS + 1]):
            beginning.push([token])
            if beginning.so_far(finished=False)[1]:
                return number
        return HIDDEN_TOKENS if len(tokens) > HIDDEN_TOKENS else None
