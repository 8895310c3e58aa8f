"""An answer that the client has begun: a last message of the assistant, for the model to go on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chatglm.text.tokenizer import Tokenizer


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
