"""Choosing the next token, for many sequences in one batch, each with its own settings.

Temperature, nucleus (top_p), repetition penalty and seed are given per row, so no sequence's
settings affect its neighbours. Randomness is counter-based: the noise of a token depends only on
the seed, the position and the token, not on what else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from chatglm.errors import PromptTooLong

DEFAULT_MAX_LENGTH = 2048  # tokens of prompt and answer, where a request sets no limit
CANDIDATES = 32  # the likeliest tokens; they nearly always hold the whole nucleus
# Odd 64-bit multipliers of splitmix64 (Steele, Lea and Flood 2014), as signed integers.
GOLDEN, MIX_1, MIX_2 = -7046029254386353131, -4658895280553007687, -7723592293110705685


@dataclass(frozen=True)
class SamplingParams:
    """How an answer is sampled, and how long it may be. Lengths are in tokens."""

    temperature: float = 0.95  # 0 is greedy
    top_p: float = 0.7  # nucleus sampling
    repetition_penalty: float = 1.0  # over 1 discourages repetition
    seed: int | None = None  # 32 bits; the same seed gives the same answer
    max_length: int | None = None  # of prompt and answer together
    max_new_tokens: int | None = None  # of the answer alone; the smaller bound holds


def check_room(prompt_tokens: int, max_length: int, context: int, exact: bool = True) -> int:
    """Tokens that are left for the answer within `max_length` and the model's context. Raises
    PromptTooLong if there are none. If `prompt_tokens` is not `exact`, it is a lower bound."""
    if prompt_tokens < min(max_length, context):
        return min(max_length, context) - prompt_tokens
    advice = "shorten the history" + (", or raise max_length" if max_length < context else "")
    raise PromptTooLong(prompt_tokens, min(max_length, context), advice, exact)


def gumbel_noise(seed: torch.Tensor, position: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise [n, k] from `seed` and `position` [n] and `tokens` [n, k], int64.

    The argmax of log-probabilities plus Gumbel noise is a draw from the distribution (the
    Gumbel-max trick), which turns seeded sampling into an argmax.
    """

    def mix(x: torch.Tensor) -> torch.Tensor:  # splitmix64; `>>` keeps the sign, so it is masked
        x = (x ^ ((x >> 30) & (2**34 - 1))) * MIX_1
        x = (x ^ ((x >> 27) & (2**37 - 1))) * MIX_2
        return x ^ ((x >> 31) & (2**33 - 1))

    row = mix(seed * GOLDEN + position)  # [n]
    bits = mix(row[:, None] + tokens * GOLDEN)  # [n, k]
    # 23 bits and a half: never 0 or 1, where the logarithms would be infinite.
    uniform = (((bits >> 41) & (2**23 - 1)).float() + 0.5) / 2**23
    return -torch.log(-torch.log(uniform))


def choose(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:
    """The next token [n] for each row of `logits` [n, V], float32; the other arguments are [n].

    Temperature 0 is greedy. top_p keeps the fewest most likely tokens whose probabilities sum to
    at least top_p (Holtzman et al. 2020), always one at least.
    """
    on_cpu = logits.device.type == "cpu"  # there, looking at values costs nothing
    greedy = None if on_cpu and temperature.all() else logits.argmax(dim=-1)
    if greedy is not None and on_cpu and not temperature.any():
        return greedy
    scores = logits / torch.where(temperature > 0, temperature, 1.0)[:, None]
    probabilities = scores.softmax(dim=-1)
    if can_branch(logits.device):
        drawn = draw_from_few(probabilities, top_p, seed, position)
    else:
        drawn = draw_above_floor(probabilities, top_p, seed, position)
    return drawn if greedy is None else torch.where(temperature > 0, drawn, greedy)


def can_branch(device: torch.device) -> bool:
    """Whether Python may decide by values or by its own state. While a CUDA graph is captured it
    may not: the graph is replayed without Python."""
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def draw_from_few(
    probabilities: torch.Tensor, top_p: torch.Tensor, seed: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """A token [n] from the nucleus of each row. Sorting a whole vocabulary takes longer than the
    network; mostly, a few candidates have enough probability."""
    vocab_size = probabilities.shape[-1]
    candidates = min(CANDIDATES, vocab_size)
    drawn, mass = draw(probabilities, candidates, top_p, seed, position)
    few = (mass < top_p).nonzero().squeeze(1) if candidates < vocab_size else drawn[:0]
    if few.numel():
        drawn[few], _ = draw(probabilities[few], vocab_size, top_p[few], seed[few], position[few])
    return drawn


def draw_above_floor(
    probabilities: torch.Tensor, top_p: torch.Tensor, seed: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """The same without a look at values, and without sorting. The nucleus is every token whose
    probability is at least some floor: the highest with which they sum to top_p.

    The floor is found bit by bit, from the highest bit of a float32 down: positive floats are in
    the same order as their bits read as integers.
    """
    bits = probabilities.view(torch.int32)  # [n, V]
    floor = torch.zeros_like(bits[:, :1])  # [n, 1]
    for place in reversed(range(30)):  # 1.0 has bits under 2**30
        tried = floor | (1 << place)
        mass = torch.where(bits >= tried, probabilities, 0.0).sum(dim=-1, keepdim=True)
        floor = torch.where(mass >= top_p[:, None], tried, floor)
    tokens = torch.arange(probabilities.shape[-1], device=probabilities.device)[None]  # [1, V]
    ranked = probabilities.log() + gumbel_noise(seed, position, tokens)
    return torch.where(bits >= floor, ranked, -torch.inf).argmax(dim=-1)


def draw(
    probabilities: torch.Tensor,
    candidates: int,
    top_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token [n] from the nucleus of each row, if that is within its `candidates` likeliest, and
    how much probability [n] these have."""
    ordered, tokens = probabilities.topk(candidates, dim=-1)  # [n, candidates]
    before = ordered.cumsum(dim=-1) - ordered  # mass ahead of each
    noise = gumbel_noise(seed, position, tokens)
    ranked = torch.where(before < top_p[:, None], ordered.log() + noise, -torch.inf)
    drawn = tokens.gather(1, ranked.argmax(dim=-1, keepdim=True)).squeeze(1)
    return drawn, ordered.sum(dim=-1)


def penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """Repetition penalty (Keskar et al. 2019, as in transformers): the score of each token that is
    `seen` [n, V] in prompt or answer is divided by `penalty` [n], multiplied where negative."""
    penalty = penalty[:, None]
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
