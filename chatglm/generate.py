"""One conversation, a token at a time: `model.chat` and `model.stream_chat`.

The loop that makes a token is `generate_tokens`. The engine does the same for many conversations
at once.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

from chatglm.sampling import SamplingParams, check_room, choose, penalise
from chatglm.text.messages import extend_history, to_messages
from chatglm.text.tools import published_response, tool_names


class ChatMixin:
    """`chat` and `stream_chat`, as published models have them, for any causal language model."""

    def chat(
        self, tokenizer, query: str, history: list | None = None, **settings
    ) -> tuple[str | dict, list]:
        """The whole answer, and the history with it. The settings are those of `stream_chat`."""
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
    ) -> Iterator[tuple[str | dict, list]]:
        """Yields (text so far, history with it), as the text grows.

        Where the history's first message declares `tools`, the last response may be a call,
        `{"name": …, "parameters": {…}}`, as the published ChatGLM3 has it.

        `max_length` counts prompt and answer, in tokens. Temperature 0, or do_sample=False, is
        greedy. The names and defaults are those of the published ChatGLM3. Raises InvalidField
        for a history of neither form, and PromptTooLong if no token is left for the answer.
        """
        # 1. The conversation as token ids
        input_ids = tokenizer.encode_chat(to_messages(query, history, role))
        context = self.config.max_position_embeddings  # type: ignore[attr-defined]
        max_new_tokens = check_room(len(input_ids), max_length, context)
        params = SamplingParams(
            temperature=temperature if do_sample else 0,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=random.getrandbits(32) if seed is None else seed,
        )
        # 2. Token after token, as text
        text, detokenizer = "", tokenizer.detokenizer()
        for token in generate_tokens(self, input_ids, max_new_tokens, params):
            if token in tokenizer.stop_ids:
                break
            detokenizer.push([token])
            visible = tokenizer.visible(detokenizer.text, finished=False)
            if visible != text:
                text = visible
                yield text, extend_history(history, query, [("", text)], role)
        # 3. What was held back until it was clear that no more comes
        raw = detokenizer.finish()
        text = tokenizer.visible(raw, finished=True)
        names = tool_names(list(history or []))
        response, messages = published_response(raw, text, names)
        yield response, extend_history(history, query, messages, role)


def generate_tokens(
    model, input_ids: list[int], max_new_tokens: int, params: SamplingParams
) -> Iterator[int]:
    """Prefill, then one forward pass a token over the KV cache. Stop tokens do not end it."""
    device = model.device
    temperature, top_p, penalty = (
        torch.tensor([float(value)], device=device)
        for value in (params.temperature, params.top_p, params.repetition_penalty)
    )
    seed = torch.tensor([params.seed], device=device)
    seen = torch.zeros(1, model.config.vocab_size, dtype=torch.bool, device=device)
    new_ids = torch.tensor([input_ids], device=device)  # [1, prompt]: the first step is the prefill
    cache = None
    for position in range(len(input_ids), len(input_ids) + max_new_tokens):
        output = model(new_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        seen[0, new_ids[0]] = True
        logits = penalise(output.logits[:, -1].float(), seen, penalty)  # [1, vocab]
        if not torch.isfinite(logits).all():
            raise ValueError(
                "the model's scores are not finite: its weights are damaged, or "
                "dtype float16 is too narrow for it"
            )
        positions = torch.tensor([position], device=device)
        token = choose(logits, temperature, top_p, seed, positions)  # [1]
        yield int(token)
        new_ids = token[None]  # [1, 1]: from now on, decode
