"""The sampler, inside a step of continuous batching: chatglm.sampling for each row of the batch."""

from __future__ import annotations

import torch
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)

from chatglm.engine.rows import RowExtras
from chatglm.engine.sequence import Sequence
from chatglm.sampling import can_branch, choose, penalise


class SamplerProcessor(ContinuousBatchingLogitsProcessorList):
    """chatglm.sampling as the one logits processor of the batch: a row per sequence.

    It gives the chosen token log-probability 0 and all others minus infinity, so the library's
    argmax takes it. A row with a NaN or infinity is marked by NaN, which reaches that sequence
    alone, as its token's log-probability. The settings travel in an int32 tensor [7, rows] that
    the library owns, because a CUDA graph replays with what lies there. Floats are stored in it
    bit for bit.
    """

    FLOATS = ("temperature", "top_p", "repetition_penalty", "min_p")
    INTEGERS = ("seed", "top_k")
    # For the library's own requests, with which it warms up and captures CUDA graphs.
    NEUTRAL = {
        "temperature": 0.0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "min_p": 0.0,
        "seed": 0,
        "top_k": 0,
    }

    def __init__(
        self,
        vocab_size: int,
        max_running: int,
        device: torch.device,
        sequences: dict[str, Sequence] | None = None,
    ) -> None:
        super().__init__(LogitsProcessorList())
        self.supported_keys = {
            **dict.fromkeys(self.FLOATS, float),
            **dict.fromkeys(self.INTEGERS, int),
            **RowExtras.KEYS,
        }
        # The position comes last.
        self.tensors_required = len(self.FLOATS) + len(self.INTEGERS) + 1
        self.ignored_keys: set[str] = set()
        self.do_processing = True
        self.seen = torch.zeros(max_running, vocab_size, dtype=torch.bool, device=device)
        self.extras = RowExtras(
            vocab_size, max_running, device, {} if sequences is None else sequences
        )
        # Whether a row of this step has the penalty, top_k or min_p. What no row has is left out;
        # a CUDA graph does the same in every step.
        self.penalising = self.truncating = False

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(
        self, requests_in_batch: list, arg_storage: torch.Tensor
    ) -> torch.Tensor:
        states = [request.state for request in requests_in_batch if request.has_new_token]
        settings = [self.NEUTRAL | state.logit_processor_kwargs for state in states]
        floats = torch.tensor([[s[name] for s in settings] for name in self.FLOATS])
        # position_offset already counts the tokens of this step.
        integers = [[s[name] for s in settings] for name in self.INTEGERS]
        integers.append([state.position_offset for state in states])
        # A seed has 32 bits and no sign: int64 first, then the lower half of it.
        lower = torch.tensor(integers, dtype=torch.int64).to(torch.int32)
        # One copy to the device: each copy of ordinary memory waits for the one before.
        rows = torch.zeros(self.tensors_required, len(requests_in_batch), dtype=torch.int32)
        rows[: len(self.FLOATS), : len(states)] = floats.view(torch.int32)
        rows[len(self.FLOATS) :, : len(states)] = lower
        arg_storage[:, : len(requests_in_batch)] = rows
        self.penalising = any(s["repetition_penalty"] != 1.0 for s in settings)
        self.truncating = any(s["top_k"] or s["min_p"] for s in settings)
        for row, (state, asked) in enumerate(zip(states, settings)):
            if asked["repetition_penalty"] != 1.0:
                self.seen[row] = self._seen_by(state)
        self.extras.prepare(states)
        return arg_storage

    def _seen_by(self, state) -> torch.Tensor:
        """The tokens of prompt and answer, [V]. Kept with the request's settings, so that it is
        freed with the request."""
        seen = state.logit_processor_kwargs.get("seen")
        if seen is None:
            seen = torch.zeros(self.seen.shape[1], dtype=torch.bool, device=self.seen.device)
            seen[torch.tensor(state.initial_tokens, device=seen.device)] = True
            state.logit_processor_kwargs["seen"] = seen
        if state.generated_tokens:
            seen[state.generated_tokens[-1]] = True
        return seen

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, args: torch.Tensor
    ) -> torch.Tensor:
        temperature, top_p, penalty, min_p = args[: len(self.FLOATS)].view(torch.float32)
        seed, top_k, position = args[len(self.FLOATS) :].long()
        raw_scores, is_capturing = scores, not can_branch(scores.device)
        if self.penalising or is_capturing:
            penalty = torch.where(penalty > 0, penalty, 1.0)  # rows that only prefill have 0
            scores = penalise(scores, self.seen[: len(scores)], penalty)
        scores = self.extras.add_biases(scores)
        limits = (top_k, min_p) if self.truncating or is_capturing else ()
        token = choose(scores, temperature, top_p, seed & 0xFFFFFFFF, position, *limits)
        self.extras.record(raw_scores, token)
        # The sum is not finite if one score is not. Adding is ten times faster than `isfinite`.
        mark = torch.where(torch.isfinite(scores.sum(dim=-1)), 0.0, torch.nan)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], mark[:, None])
