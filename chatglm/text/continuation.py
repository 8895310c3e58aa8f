"""Where the part of an answer begins that its reader has not seen: behind what the client has begun
itself (a last message of the assistant), and behind what the chat format hides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatglm.sampling import check_room
from chatglm.text.detokenizer import REPLACEMENT
from chatglm.text.messages import count_characters

if TYPE_CHECKING:
    from chatglm.engine.sequence import Sequence
    from chatglm.text.tokenizer import Tokenizer

# Room for what stands before the first visible token, such as ChatGLM3's metadata line.
HIDDEN_TOKENS = 32
ALWAYS_COUNTED = 2**16  # characters; of shorter prompts, a refusal has the exact length in tokens


def check_characters(
    tokenizer: Tokenizer, messages: list[dict], max_length: int, context: int
) -> None:
    """Raises PromptTooLong for a text so long that it cannot fit. It is not tokenised: that would
    take time and memory."""
    longest = tokenizer.longest_token
    most = max(ALWAYS_COUNTED, min(max_length, context) * longest)
    characters = count_characters(messages, most)
    if characters > most:
        check_room(characters // longest, max_length, context, exact=False)


def encode_prompt(
    tokenizer: Tokenizer, messages: list[dict], forced_prefix: str
) -> tuple[list[int], str, int]:
    """The ids up to where the model goes on; the text with which its answer begins; and how many
    characters of that the client has begun itself."""
    begun = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
    if begun:
        input_ids, between = encode_begun(tokenizer, messages)
        return input_ids, between + begun, len(begun.lstrip())
    forced_ids = tokenizer.encode(forced_prefix) if forced_prefix else []
    return tokenizer.encode_chat(messages) + forced_ids, forced_prefix, 0


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


def hidden_tokens(tokenizer: Tokenizer, sequence: Sequence, tokens: list[int]) -> int | None:
    """How many tokens stand before the first with visible text, or None if there is none yet. They
    do not count for `max_visible_tokens`: a gateway tests a connection with one."""
    anchor = [tokenizer.anchor] if sequence.begun_length else []
    skipped = len(tokenizer.decode(anchor)) if anchor else 0
    for number in range(1, min(len(tokens), HIDDEN_TOKENS + 1) + 1):
        text = tokenizer.decode(anchor + tokens[:number])[skipped:]
        raw = sequence.forced_prefix + text.rstrip(REPLACEMENT)
        if len(tokenizer.visible(raw, finished=False)) > sequence.begun_length:
            return number - 1
    return HIDDEN_TOKENS if len(tokens) > HIDDEN_TOKENS else None
