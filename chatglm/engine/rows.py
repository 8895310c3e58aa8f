"""What only some rows of a step ask for: biases, an answer's form, and log-probabilities.

On a CPU, rows that do not ask cost nothing. On a GPU biases are added to every row, because a CUDA
graph repeats the same work in every step.
"""

from __future__ import annotations

from array import array
from typing import Any

import torch

from chatglm.engine.sequence import Sequence
from chatglm.sampling import Bias, SamplingParams, TokenLogprob
from chatglm.text.constraint import next_biases

# For the library's own requests, with which it warms up and captures CUDA graphs.
NEUTRAL = SamplingParams(temperature=0.0, top_p=1.0, seed=0)


def params_of(state: Any) -> SamplingParams:
    """Of one of the library's states."""
    return state.logit_processor_kwargs.get("params", NEUTRAL)


class RowExtras:
    """Used by the model thread: `prepare`, then in the step `add_biases` and `record`.

    `states` are the library's, a row each; `sequences` are those of the batch, by batch_id.
    """

    def __init__(
        self, vocab_size: int, max_rows: int, device: torch.device, sequences: dict[str, Sequence]
    ) -> None:
        self.vocab_size, self.device, self.sequences = vocab_size, device, sequences
        self.biased: list[tuple[int, torch.Tensor]] = []  # row, what is added to its scores [V]
        self.recorded: list[tuple[int, int, Sequence]] = []  # row, position, whose it is
        self.graph_biases = None  # [rows, V]
        if device.type != "cpu":
            self.graph_biases = torch.zeros(max_rows, vocab_size, device=device)

    def prepare(self, states: list[Any]) -> None:
        if self.graph_biases is not None:
            for row, _ in self.biased:
                self.graph_biases[row] = 0
        self.biased = [
            (row, self._bias_of(state))
            for row, state in enumerate(states)
            if params_of(state).has_bias
        ]
        self.biased += self._biases_of_forms(states)
        if self.graph_biases is not None:
            for row, bias in self.biased:
                self.graph_biases[row] += bias
        self.recorded = [
            (row, state.position_offset, self.sequences[state.request_id])
            for row, state in enumerate(states)
            if params_of(state).logprobs is not None and state.request_id in self.sequences
        ]

    def _biases_of_forms(self, states: list[Any]) -> list[tuple[int, torch.Tensor]]:
        formed = [
            (row, state, sequence, sequence.constraint)
            for row, state in enumerate(states)
            if (sequence := self.sequences.get(state.request_id)) and sequence.constraint
        ]
        if not formed:
            return []
        for _, state, sequence, constraint in formed:
            made = sequence.resumed_ids + state.generated_tokens
            constraint.advance(made, sequence.max_tokens - len(made))
        biases = next_biases([constraint for *_, constraint in formed], self.vocab_size)
        for _, _, sequence, constraint in formed:
            if constraint.error:
                sequence.failure = (
                    f"response_format or tools take too long to keep to: {constraint.error}"
                )
        rows = [row for row, *_ in formed]
        return list(zip(rows, biases.to(self.device), strict=True))

    def _bias_of(self, state: Any) -> torch.Tensor:
        """Kept with the request's settings, so that it is freed with the request."""
        kept = state.logit_processor_kwargs
        if "bias" not in kept:
            kept["bias"] = Bias(kept["params"], self.vocab_size, self.device)
            kept["bias"].count(kept["resumed_ids"])
        kept["bias"].count(state.generated_tokens[-1:])
        return kept["bias"].values

    def add_biases(self, scores: torch.Tensor) -> torch.Tensor:
        if self.graph_biases is not None:
            return scores + self.graph_biases[: len(scores)]
        if self.biased:
            scores = scores.clone()
        for row, bias in self.biased:
            scores[row] += bias
        return scores

    def record(self, scores: torch.Tensor, token: torch.Tensor) -> None:
        """Keeps the log-probabilities of what was chosen, `token` [n], by the network's own
        `scores` [n, V]."""
        for row, position, sequence in self.recorded:
            logprobs = scores[row].log_softmax(dim=-1)
            sequence.new_logprobs[position] = recorded(int(token[row]), logprobs, sequence.params)


def recorded(token: int, logprobs: torch.Tensor, params: SamplingParams) -> TokenLogprob:
    likeliest = logprobs.topk(params.logprobs or 0)
    tokens, values = array("i", likeliest.indices.tolist()), array("d", likeliest.values.tolist())
    return TokenLogprob(token, float(logprobs[token]), tokens, values)
