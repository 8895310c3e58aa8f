"""One conversation, one token at a time: `model.chat` and `model.stream_chat`."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

from chatglm.sampling import choose, penalise
from chatglm.text.detokenizer import Detokenizer
from chatglm.text.messages import extend_history, to_messages


class ChatMixin:
    """`chat` and `stream_chat`, as published models have them, for any causal language model."""

    def chat(
        self, tokenizer, query: str, history: list | None = None, **settings
    ) -> tuple[str, list]:
        """The whole answer, and the history with it; the settings are those of `stream_chat`."""
        for result in self.stream_chat(tokenizer, query, history, **settings):
            pass
        return result

    @torch.inference_mode()
    def stream_chat(
        self,
        tokenizer,
        query: str,
        history: list | None = None,
        role: str = "user",
        max_length: int = 8192,
        do_sample: bool = True,
        top_p: float = 0.8,
        temperature: float = 0.8,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[tuple[str, list]]:
        """Yields (text so far, history with it), as the text grows.

        `max_length` counts prompt and answer, in tokens; temperature 0, or do_sample=False, is
        greedy. The names and defaults are those of the published ChatGLM3. Raises ValueError for a
        history of neither form and for a prompt that leaves no room within `max_length`.
        """
        ids = tokenizer.encode_chat(to_messages(query, history, role))
        room = min(max_length, self.config.max_position_embeddings) - len(ids)
        if room < 1:
            raise ValueError(
                f"prompt and history take {len(ids)} tokens, which leaves no room "
                f"within max_length {max_length}"
            )
        settings = [
            torch.tensor([float(v)], device=self.device)
            for v in (temperature if do_sample else 0, top_p, repetition_penalty)
        ]
        seed = random.getrandbits(32) if seed is None else seed
        text, detokenizer = "", Detokenizer(tokenizer.decode_raw, tokenizer.anchor)
        for token in self._tokens(ids, room, *settings, seed):
            if token in tokenizer.stop_ids:
                break
            detokenizer.push([token])
            if (visible := tokenizer.visible(detokenizer.text, finished=False)) != text:
                text = visible
                yield text, extend_history(history, query, text, role)
        text = tokenizer.visible(detokenizer.finish(), finished=True)
        yield text, extend_history(history, query, text, role)

    def _tokens(
        self,
        ids: list[int],
        room: int,
        temperature: torch.Tensor,
        top_p: torch.Tensor,
        penalty: torch.Tensor,
        seed: int,
    ) -> Iterator[int]:
        """Prefill, then one forward pass a token over the key/value cache."""
        input_ids = torch.tensor([ids], device=self.device)  # [1, prompt]
        seen = torch.zeros(1, self.config.vocab_size, dtype=torch.bool, device=self.device)
        seeds = torch.tensor([seed], device=self.device)
        cache = None
        for position in range(len(ids), len(ids) + room):
            out = self(input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            seen[0, input_ids[0]] = True
            logits = penalise(out.logits[:, -1].float(), seen, penalty)  # [1, vocab]
            if not torch.isfinite(logits).all():
                raise ValueError(
                    "the model's scores are not finite: its weights are damaged, or "
                    "dtype float16 is too narrow for it"
                )
            token = choose(
                logits, temperature, top_p, seeds, torch.tensor([position], device=self.device)
            )
            yield token.item()
            input_ids = token[None]
