"""Choosing the next token, for many sequences in one batch, each with its own settings.

Each row has its own temperature, top_p, top_k, min_p, penalties, biases and seed, so no sequence's
settings affect its neighbours. Randomness is counter-based: the noise of a token depends only on
the seed, the position and the token, not on what else is in the batch.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from chatglm.errors import InvalidField, PromptTooLong, preview

DEFAULT_MAX_LENGTH = 2048  # tokens of prompt and answer on POST /; the KV cache is made for these
COLDEST = 1e-5  # the lowest temperature that is divided by
CANDIDATES = 32  # the likeliest tokens; they nearly always hold the whole nucleus
# Odd 64-bit multipliers of splitmix64 (Steele, Lea and Flood 2014), as signed integers.
GOLDEN, MIX_1, MIX_2 = -7046029254386353131, -4658895280553007687, -7723592293110705685


@dataclass(frozen=True)
class SamplingParams:
    """How an answer is sampled, and how long it may be. Lengths are in tokens."""

    temperature: float = 0.95  # 0 is greedy
    top_p: float = 0.7  # nucleus sampling
    top_k: int = 0  # the k likeliest tokens alone; 0: all
    min_p: float = 0.0  # no token that is less likely than this times the likeliest
    repetition_penalty: float = 1.0  # over 1 discourages repetition
    presence_penalty: float = 0.0  # over 0 discourages tokens that the answer has already
    frequency_penalty: float = 0.0  # the same, each time that it has them
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its score)
    logprobs: int | None = None  # with each token, its log-probability and so many alternatives
    seed: int | None = None  # 32 bits; the same seed gives the same answer
    # Without any limit, the answer may fill the context.
    max_length: int | None = None  # of prompt and answer together
    max_new_tokens: int | None = None  # of the answer alone; the smallest bound holds
    max_visible_tokens: int | None = None  # the same, from the first one on that a user sees

    @property
    def has_bias(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.logit_bias)


class TokenLogprob(NamedTuple):
    """How likely the network found a token: at temperature 1, before penalties and biases."""

    token: int
    logprob: float
    likeliest: array[int]  # tokens; arrays take an eighth of the memory of lists
    their_logprobs: array[float]

    @property
    def alternatives(self) -> Iterator[tuple[int, float]]:
        """The likeliest tokens, with their log-probabilities."""
        return zip(self.likeliest, self.their_logprobs, strict=True)


class Bias:
    """What is added to a sequence's scores, `values` [V]: `logit_bias`, less the presence penalty
    of each token that its answer has, and the frequency penalty times how often it has it.

    Formula: https://platform.openai.com/docs/api-reference/chat/create (frequency_penalty)
    """

    def __init__(self, params: SamplingParams, vocab_size: int, device: torch.device) -> None:
        self.params = params
        self.values = torch.zeros(vocab_size, device=device)
        if params.logit_bias:
            tokens, biases = zip(*params.logit_bias, strict=True)
            self.values.index_add_(
                0, torch.tensor(tokens, device=device), torch.tensor(biases, device=device).float()
            )
        self._present: set[int] = set()

    def count(self, tokens: Iterable[int]) -> None:
        """Takes further tokens of the answer into account."""
        for token in tokens:
            self.values[token] -= self.params.frequency_penalty
            if token not in self._present:
                self.values[token] -= self.params.presence_penalty
                self._present.add(token)


def check_params(params: SamplingParams, vocab_size: int, offers_logprobs: bool) -> None:
    """Raises InvalidField for what this model or this batch cannot do."""
    if params.logprobs is not None and not offers_logprobs:
        raise InvalidField("logprobs", "are not available with CUDA graphs; leave it out")
    if not 0 <= params.top_k < 2**31:  # it travels in 32 bits
        raise InvalidField("top_k", f"must be from 0 to {2**31 - 1}, not {preview(params.top_k)}")
    for token, _ in params.logit_bias:
        if not 0 <= token < vocab_size:
            raise InvalidField("logit_bias", f"names {token}, which is no token of this model")


def check_room(prompt_tokens: int, max_length: int, context: int, exact: bool = True) -> int:
    """Tokens that are left for the answer within `max_length` and the model's context. Raises
    PromptTooLong if there are none. If `prompt_tokens` is not `exact`, it is a lower bound."""
    if prompt_tokens < min(max_length, context):
        return min(max_length, context) - prompt_tokens
    raise PromptTooLong(prompt_tokens, max_length, context, exact)


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
    top_k: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """The next token [n] for each row of `logits` [n, V], float32; the other arguments are [n].

    Temperature 0 is greedy. top_p keeps the fewest most likely tokens whose probabilities sum to
    at least top_p (Holtzman et al. 2020), always one at least. It is of what top_k leaves, as in
    transformers. The last two are given together, where a row uses one of them.
    """
    on_cpu = logits.device.type == "cpu"  # there, looking at values costs nothing
    greedy = None if on_cpu and temperature.all() else logits.argmax(dim=-1)
    if greedy is not None and on_cpu and not temperature.any():
        return greedy
    # Colder than this is as good as greedy, and a quotient could overflow.
    divisor = torch.where(temperature > 0, temperature.clamp(min=COLDEST), 1.0)
    scores = logits / divisor[:, None]
    probabilities = scores.softmax(dim=-1)
    limits = (top_k, min_p)
    if can_branch(logits.device):
        drawn = draw_from_few(probabilities, top_p, seed, position, *limits)
    else:
        drawn = draw_above_floor(probabilities, top_p, seed, position, *limits)
    return drawn if greedy is None else torch.where(temperature > 0, drawn, greedy)


def can_branch(device: torch.device) -> bool:
    """Whether Python may decide by values or by its own state. While a CUDA graph is captured it
    may not: the graph is replayed without Python."""
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def draw_from_few(
    probabilities: torch.Tensor,
    top_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    top_k: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """A token [n] from the nucleus of each row. Sorting a whole vocabulary takes longer than the
    network; mostly, a few candidates have enough probability."""
    vocab_size = probabilities.shape[-1]
    candidates = min(CANDIDATES, vocab_size)
    drawn, enough = draw(probabilities, candidates, top_p, seed, position, top_k, min_p)
    few = (~enough).nonzero().squeeze(1) if candidates < vocab_size else drawn[:0]
    if few.numel():
        settings = (None if each is None else each[few] for each in (top_k, min_p))
        drawn[few], _ = draw(
            probabilities[few], vocab_size, top_p[few], seed[few], position[few], *settings
        )
    return drawn


def draw_above_floor(
    probabilities: torch.Tensor,
    top_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    top_k: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same without a look at values, and without sorting. The nucleus is every token whose
    probability is at least some floor: the highest with which they sum to top_p."""
    kept = torch.ones_like(probabilities, dtype=torch.bool)
    mass = torch.ones_like(probabilities[:, :1])
    if top_k is not None and min_p is not None:
        limited = (top_k > 0)[:, None]
        most = torch.where(limited, top_k[:, None], 0)
        kept = above_floor(probabilities, lambda above: above.sum(-1, keepdim=True) >= most)
        kept = kept | ~limited
        mass = torch.where(limited, torch.where(kept, probabilities, 0.0).sum(-1, True), 1.0)
        kept = kept & (probabilities >= min_p[:, None] * probabilities.amax(-1, keepdim=True))
    wanted = top_p[:, None] * mass
    kept = kept & above_floor(
        probabilities,
        lambda above: torch.where(above, probabilities, 0.0).sum(-1, keepdim=True) >= wanted,
    )
    tokens = torch.arange(probabilities.shape[-1], device=probabilities.device)[None]  # [1, V]
    ranked = probabilities.log() + gumbel_noise(seed, position, tokens)
    return torch.where(kept, ranked, -torch.inf).argmax(dim=-1)


def above_floor(
    probabilities: torch.Tensor, is_enough: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The tokens [n, V] above the highest floor with which `is_enough` still holds [n, 1].

    The floor is found bit by bit, from the highest bit of a float32 down: positive floats are in
    the same order as their bits read as integers.
    """
    bits = probabilities.view(torch.int32)  # [n, V]
    floor = torch.zeros_like(bits[:, :1])  # [n, 1]
    for place in reversed(range(30)):  # 1.0 has bits under 2**30
        tried = floor | (1 << place)
        floor = torch.where(is_enough(bits >= tried), tried, floor)
    return bits >= floor


def draw(
    probabilities: torch.Tensor,
    candidates: int,
    top_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    top_k: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token [n] from what top_k, top_p and min_p leave of each row, and whether all of that is
    within the row's `candidates` likeliest tokens, [n]. If not, the token does not count."""
    ordered, tokens = probabilities.topk(candidates, dim=-1)  # [n, candidates]
    before = ordered.cumsum(dim=-1) - ordered  # mass ahead of each
    enough = ordered.sum(dim=-1) >= top_p
    if top_k is None or min_p is None:
        kept = before < top_p[:, None]
    else:
        limited = top_k > 0
        rank = torch.arange(candidates, device=ordered.device)
        first = (rank < top_k[:, None]) | ~limited[:, None]  # [n, candidates]
        mass = torch.where(limited, (ordered * first).sum(dim=-1), 1.0)
        likely = ordered >= min_p[:, None] * ordered[:, :1]
        kept = first & likely & (before < (top_p * mass)[:, None])
        enough = torch.where(limited, top_k <= candidates, enough)
    noise = gumbel_noise(seed, position, tokens)
    ranked = torch.where(kept, ordered.log() + noise, -torch.inf)
    drawn = tokens.gather(1, ranked.argmax(dim=-1, keepdim=True)).squeeze(1)
    return drawn, enough


def penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """Repetition penalty (Keskar et al. 2019, as in transformers): the score of each token that is
    `seen` [n, V] in prompt or answer is divided by `penalty` [n], multiplied where negative."""
    penalty = penalty[:, None]
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
