"""Choosing the next token, for many requests in one batch, each by its own settings.

Temperature, nucleus (top_p), repetition penalty and seed are arguments per row, so no request's
settings touch its neighbour's. Randomness is counter-based: the noise of a token depends only on
the request's seed, the position and the token, not on what else is in the batch.
"""

from __future__ import annotations

import torch
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)

HEAD = 32  # likeliest tokens that are looked at first
# Odd 64-bit multipliers of splitmix64 (Steele, Lea and Flood 2014), as signed integers.
GOLDEN, MIX_1, MIX_2 = -7046029254386353131, -4658895280553007687, -7723592293110705685


def gumbel_noise(seed: torch.Tensor, position: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise [n, k] from `seed` and `position` [n] and `tokens` [n, k], int64.

    The argmax of log-probabilities plus Gumbel noise is a draw from the distribution (the
    Gumbel-max trick), which turns seeded sampling into an argmax.
    """
    def mix(x: torch.Tensor) -> torch.Tensor:  # splitmix64; `>>` keeps the sign, so it is masked
        x = (x ^ ((x >> 30) & (2**34 - 1))) * MIX_1
        x = (x ^ ((x >> 27) & (2**37 - 1))) * MIX_2
        return x ^ ((x >> 31) & (2**33 - 1))

    row = mix(seed * GOLDEN + position)                       # [n]
    bits = mix(row[:, None] + tokens * GOLDEN)                # [n, k]
    # 23 bits and a half: never 0 or 1, where the logarithms would be infinite.
    uniform = (((bits >> 41) & (2**23 - 1)).float() + 0.5) / 2**23
    return -torch.log(-torch.log(uniform))


def choose(logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor,
           seed: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """The next token [n] for each row of `logits` [n, V], float32; the other arguments are [n].

    Temperature 0 is greedy. top_p keeps the fewest most likely tokens whose probabilities sum to
    at least top_p (Holtzman et al. 2020), always one at least.
    """
    on_cpu = logits.device.type == "cpu"  # where a look at the values costs nothing
    greedy = None if on_cpu and temperature.all() else logits.argmax(dim=-1)
    if on_cpu and not temperature.any():
        return greedy
    scores = logits / torch.where(temperature > 0, temperature, 1.0)[:, None]
    probabilities = scores.softmax(dim=-1)
    # To sort a whole vocabulary takes longer than the network; mostly its head has enough mass.
    head = min(HEAD, logits.shape[-1]) if on_cpu else logits.shape[-1]
    drawn, mass = draw(probabilities, head, top_p, seed, position)
    if on_cpu and head < logits.shape[-1] and (few := (mass < top_p).nonzero().squeeze(1)).numel():
        drawn[few], _ = draw(probabilities[few], logits.shape[-1], top_p[few], seed[few],
                             position[few])
    return drawn if greedy is None else torch.where(temperature > 0, drawn, greedy)


def draw(probabilities: torch.Tensor, head: int, top_p: torch.Tensor, seed: torch.Tensor,
         position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A token [n] from the nucleus of each row, if that is within its `head` likeliest, and how
    much probability [n] these have."""
    ordered, tokens = probabilities.topk(head, dim=-1)                         # [n, head]
    before = ordered.cumsum(dim=-1) - ordered                                  # mass ahead of each
    noise = gumbel_noise(seed, position, tokens)
    ranked = torch.where(before < top_p[:, None], ordered.log() + noise, -torch.inf)
    drawn = tokens.gather(1, ranked.argmax(dim=-1, keepdim=True)).squeeze(1)
    return drawn, ordered.sum(dim=-1)


def penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """Repetition penalty (Keskar et al. 2019, as in transformers): the score of each token that is
    `seen` [n, V] in prompt or answer is divided by `penalty` [n], multiplied where negative."""
    penalty = penalty[:, None]
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


class Sampler(ContinuousBatchingLogitsProcessorList):
    """All of the above as the one logits processor of a continuous batch.

    It marks the chosen token by probability 1, so the batch's own argmax takes it, and a row with
    a NaN or infinity by NaN, which reaches that request alone, as its token's log-probability.
    Settings travel in a row each of an int32 tensor that the batch keeps (a CUDA graph replays
    with what lies there); floats lie in it bit for bit.
    """

    do_processing = True
    FLOATS = ("temperature", "top_p", "repetition_penalty")
    tensors_required = len(FLOATS) + 2  # and the seed, and the position

    def __init__(self, vocab_size: int, max_requests: int, device: torch.device) -> None:
        self.supported_keys = {**dict.fromkeys(self.FLOATS, float), "seed": int}
        self.ignored_keys = set()
        self.seen = torch.zeros(max_requests, vocab_size, dtype=torch.bool, device=device)
        self.penalising = False  # whether a request of this step has a penalty; used on a CPU only

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_in_batch: list,
                            arg_storage: torch.Tensor) -> torch.Tensor:
        states = [request.state for request in requests_in_batch if request.has_new_token]
        settings = [state.logit_processor_kwargs for state in states]
        floats = torch.tensor([[s[name] for s in settings] for name in self.FLOATS])
        # A seed has 32 bits and no sign; position_offset already counts the tokens of this step.
        integers = torch.tensor([[s["seed"] for s in settings],
                                 [state.position_offset for state in states]], dtype=torch.int64)
        arg_storage[:, : len(requests_in_batch)] = 0
        arg_storage[:3, : len(states)] = floats.view(torch.int32).to(arg_storage.device)
        arg_storage[3:, : len(states)] = integers.to(torch.int32).to(arg_storage.device)
        self.penalising = any(s["repetition_penalty"] != 1.0 for s in settings)
        for row, state in enumerate(states):
            if state.logit_processor_kwargs["repetition_penalty"] != 1.0:
                self.seen[row] = self._seen_by(state)
        return arg_storage

    def _seen_by(self, state) -> torch.Tensor:
        """The tokens of prompt and answer, [V]. Kept with the request, and gone with it."""
        seen = state.logit_processor_kwargs.get("seen")
        if seen is None:
            seen = torch.zeros(self.seen.shape[1], dtype=torch.bool, device=self.seen.device)
            seen[torch.tensor(state.initial_tokens, device=seen.device)] = True
            state.logit_processor_kwargs["seen"] = seen
        if state.generated_tokens:
            seen[state.generated_tokens[-1]] = True
        return seen

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor,
                 args: torch.Tensor) -> torch.Tensor:
        temperature, top_p, penalty = args[:3].view(torch.float32)
        seed, position = args[3:].long()
        if self.penalising or scores.device.type != "cpu":
            penalty = torch.where(penalty > 0, penalty, 1.0)  # rows that only prefill have 0
            scores = penalise(scores, self.seen[: len(scores)], penalty)
        token = choose(scores, temperature, top_p, seed & 0xFFFFFFFF, position)
        # A sum is finite if all in it are, and takes a tenth of the time of a look at each.
        mark = torch.where(torch.isfinite(scores.sum(dim=-1)), 0.0, torch.nan)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], mark[:, None])
