"""Conversations: the two forms of `history`, and `model.chat` / `model.stream_chat`."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator
from typing import Any

import torch

from chatglm.detokenizer import Detokenizer
from chatglm.sampler import choose, penalise

INVISIBLE = ("Zs", "Zl", "Zp", "Cc", "Cf")   # Unicode categories of spaces, controls, formats

# Which role may follow which; None is the beginning.
FOLLOWS = {
    "system": {None},
    "user": {None, "system", "assistant"},
    "assistant": {"user", "observation"},
    "observation": {"assistant"},
}


def to_messages(prompt: str, history: list | None = None, role: str = "user") -> list[dict]:
    """`history` in either published form, and the prompt, as messages.

    >>> to_messages("and you?", [["hi", "hello"]])[0]
    {'role': 'user', 'content': 'hi'}

    The forms: `[query, response]` pairs (ChatGLM-6B, ChatGLM2) or `{"role", "content"}` dicts
    (ChatGLM3). Raises ValueError, naming the entry, for anything else, and for a prompt with
    nothing visible in it.
    """
    if all(unicodedata.category(c) in INVISIBLE for c in prompt):
        raise ValueError(f"prompt must hold something visible, not {shown(prompt)}")
    if history is not None and not isinstance(history, (list, tuple)):
        raise ValueError(f"history must be a list, not {shown(history)}")
    messages: list[dict] = []
    for i, turn in enumerate(history or []):
        if isinstance(turn, dict) != isinstance(history[0], dict):
            raise ValueError(f"history[{i}]: use one form throughout, [query, response] pairs or "
                             '{"role": …, "content": …} dicts')
        if isinstance(turn, dict):
            messages.append(check_message(turn, f"history[{i}]"))
        else:
            query, response = check_pair(turn, f"history[{i}]")
            messages += [{"role": "user", "content": query},
                         {"role": "assistant", "content": response}]
    messages.append(check_message({"role": role, "content": prompt}, "prompt"))
    check_order(messages)
    return messages


def check_pair(turn: Any, where: str) -> tuple[str, str]:
    two = isinstance(turn, (list, tuple)) and len(turn) == 2
    if not two or not all(isinstance(text, str) for text in turn):
        raise ValueError(f'{where} must be a [query, response] pair of two strings or a '
                         f'{{"role": …, "content": …}} dict, not {shown(turn)}')
    for text in turn:
        check_text(text, where)
    return turn[0], turn[1]


def check_message(turn: dict, where: str) -> dict:
    if not isinstance(turn.get("role"), str) or turn["role"] not in FOLLOWS:
        raise ValueError(f"{where}.role must be one of {', '.join(FOLLOWS)}, "
                         f"not {shown(turn.get('role'))}")
    for field in ("content", "metadata"):
        text = turn.get(field, "" if field == "metadata" else None)
        if not isinstance(text, str):
            raise ValueError(f"{where}.{field} must be a string, not {shown(text)}")
        check_text(text, f"{where}.{field}")
    return turn


def check_order(messages: list[dict]) -> None:
    before = None
    for i, role in enumerate(m["role"] for m in messages):
        if before not in FOLLOWS[role]:
            place = f"history[{i}]" if i + 1 < len(messages) else "prompt"
            after = f"after {before!r}" if before else "at the beginning"
            raise ValueError(f"{place}: role {role!r} cannot stand {after}; system may come "
                             "first, then user and assistant, observation after assistant")
        before = role


def check_text(text: str, where: str) -> None:
    """Raises ValueError for half of a surrogate pair, which no encoding can say."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} holds half of a surrogate pair, which is no character: "
                         f"{shown(text[error.start])}") from error


def shown(value: Any) -> str:
    """A value as an error message shows it: ASCII, 80 characters at most."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def extend_history(history: list | None, prompt: str, response: str, role: str = "user") -> list:
    """`history` with this turn added, in the form it came in (pairs when it was empty)."""
    history = list(history or [])
    if history and isinstance(history[0], dict):
        metadata = {"metadata": ""} if any("metadata" in turn for turn in history) else {}
        return [*history, {"role": role, "content": prompt},
                {"role": "assistant", **metadata, "content": response}]
    return [*history, [prompt, response]]


class ChatMixin:
    """`chat` and `stream_chat`, as published models have them, for any causal language model."""

    def chat(self, tokenizer, query: str, history: list | None = None,
             **settings) -> tuple[str, list]:
        """The whole answer, and the history with it; the settings are those of `stream_chat`."""
        for result in self.stream_chat(tokenizer, query, history, **settings):
            pass
        return result

    @torch.inference_mode()
    def stream_chat(self, tokenizer, query: str, history: list | None = None, role: str = "user",
                    max_length: int = 8192, do_sample: bool = True, top_p: float = 0.8,
                    temperature: float = 0.8, repetition_penalty: float = 1.0,
                    seed: int | None = None) -> Iterator[tuple[str, list]]:
        """Yields (text so far, history with it), as the text grows.

        `max_length` counts prompt and answer, in tokens; temperature 0, or do_sample=False, is
        greedy. The names and defaults are those of the published ChatGLM3. Raises ValueError for a
        history of neither form and for a prompt that leaves no room within `max_length`.
        """
        ids = tokenizer.encode_chat(to_messages(query, history, role))
        room = min(max_length, self.config.max_position_embeddings) - len(ids)
        if room < 1:
            raise ValueError(f"prompt and history take {len(ids)} tokens, which leaves no room "
                             f"within max_length {max_length}")
        settings = [torch.tensor([float(v)], device=self.device)
                    for v in (temperature if do_sample else 0, top_p, repetition_penalty)]
        seed = random.getrandbits(32) if seed is None else seed
        text, detokenizer = "", Detokenizer(tokenizer.decode, tokenizer.anchor)
        for token in self._tokens(ids, room, *settings, seed):
            if token in tokenizer.stop_ids:
                break
            detokenizer.push([token])
            if (visible := tokenizer.visible(detokenizer.text, finished=False)) != text:
                text = visible
                yield text, extend_history(history, query, text, role)
        text = tokenizer.visible(detokenizer.finish(), finished=True)
        yield text, extend_history(history, query, text, role)

    def _tokens(self, ids: list[int], room: int, temperature: torch.Tensor, top_p: torch.Tensor,
                penalty: torch.Tensor, seed: int) -> Iterator[int]:
        """Prefill, then one forward pass a token over the key/value cache."""
        input_ids = torch.tensor([ids], device=self.device)                          # [1, prompt]
        seen = torch.zeros(1, self.config.vocab_size, dtype=torch.bool, device=self.device)
        seeds = torch.tensor([seed], device=self.device)
        cache = None
        for position in range(len(ids), len(ids) + room):
            out = self(input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            seen[0, input_ids[0]] = True
            logits = penalise(out.logits[:, -1].float(), seen, penalty)              # [1, vocab]
            if not torch.isfinite(logits).all():
                raise ValueError("the model's scores are not finite: its weights are damaged, or "
                                 "dtype float16 is too narrow for it")
            token = choose(logits, temperature, top_p, seeds,
                           torch.tensor([position], device=self.device))
            yield token.item()
            input_ids = token[None]
