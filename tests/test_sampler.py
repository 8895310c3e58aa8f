"""Choosing tokens, compared with transformers' own logits processors."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import RepetitionPenaltyLogitsProcessor, TopPLogitsWarper

from chatglm import SamplingParams, sampling
from chatglm.engine import transformers_batch
from chatglm.engine.transformers_batch import SamplerProcessor
from chatglm.sampling import choose, draw_above_floor, gumbel_noise, penalise

ROWS = 40_000


def draw(logits: torch.Tensor, temperature: float, top_p: float, seed, position) -> torch.Tensor:
    """The share of each token in ROWS draws from the same logits [V]."""
    rows = logits.repeat(ROWS, 1)
    tokens = choose(
        rows, torch.full((ROWS,), temperature), torch.full((ROWS,), top_p), seed, position
    )
    return torch.bincount(tokens, minlength=len(logits)) / ROWS


def expected(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    return TopPLogitsWarper(top_p)(None, logits[None] / temperature).softmax(-1)[0]


def test_sampling_has_the_distribution_of_temperature_and_top_p():
    logits = torch.randn(30, generator=torch.Generator().manual_seed(1))
    seeds, positions = torch.arange(ROWS), torch.full((ROWS,), 17)
    for temperature, top_p in [(0.95, 0.7), (1.0, 1.0), (2.0, 0.9), (0.3, 0.5)]:
        shares = draw(logits, temperature, top_p, seeds, positions)
        wanted = expected(logits, temperature, top_p)
        assert torch.equal(shares > 0, wanted > 0)
        assert (shares - wanted).abs().max() < 0.012  # five standard deviations of a half


def test_one_seed_gives_the_distribution_over_positions_too():
    logits = torch.randn(30, generator=torch.Generator().manual_seed(2))
    shares = draw(logits, 1.0, 0.95, torch.full((ROWS,), 5), torch.arange(ROWS))
    assert (shares - expected(logits, 1.0, 0.95)).abs().max() < 0.012


def test_noise_is_gumbel_and_rows_are_independent():
    noise = gumbel_noise(
        torch.arange(300), torch.zeros(300, dtype=torch.long), torch.arange(2000).expand(300, -1)
    )
    assert torch.isfinite(noise).all()
    assert abs(noise.mean() - 0.5772) < 0.01 and abs(noise.var() - 1.6449) < 0.02
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.15


def test_a_row_is_drawn_alike_whatever_the_batch():
    logits = torch.randn(64, 500, generator=torch.Generator().manual_seed(3))
    settings = [
        torch.rand(64) * 2,
        torch.rand(64) * 0.9 + 0.1,
        torch.arange(64),
        torch.arange(64) * 7,
    ]
    together = choose(logits, *settings)
    alone = [choose(logits[i : i + 1], *(s[i : i + 1] for s in settings)).item() for i in range(64)]
    assert together.tolist() == alone


def test_temperature_zero_is_greedy_among_sampling_neighbours():
    logits = torch.randn(8, 50)
    temperature = torch.tensor([0.0, 2.0] * 4)
    tokens = choose(logits, temperature, torch.ones(8), torch.arange(8), torch.arange(8))
    assert torch.equal(tokens[::2], logits.argmax(-1)[::2])


def test_repetition_penalty_is_that_of_transformers():
    logits, ids = torch.randn(3, 40), torch.randint(0, 40, (3, 12))
    seen = torch.zeros(3, 40, dtype=torch.bool).scatter(1, ids, True)
    for penalty in (0.8, 1.0, 1.3):
        wanted = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
        torch.testing.assert_close(penalise(logits, seen, torch.full((3,), penalty)), wanted)


@pytest.mark.parametrize("limited", [False, True])
def test_without_looking_at_values_the_same_tokens_are_drawn(monkeypatch, limited):
    """What a CUDA graph computes, on a CPU: neither a sort nor a branch."""
    dice = torch.Generator().manual_seed(4)
    logits = torch.randn(500, 2000, generator=dice) * torch.rand(500, 1, generator=dice) * 8
    settings = [
        torch.rand(500, generator=dice) * 2 * (torch.arange(500) % 5 > 0),  # a fifth is greedy
        torch.rand(500, generator=dice).clamp(min=0.01),
        torch.arange(500),
        torch.arange(500) * 3,
    ]
    settings[1][::7] = 1.0
    if limited:
        settings.append(torch.randint(0, 60, (500,), generator=dice))  # top_k, 0 in some rows
        settings.append(torch.rand(500, generator=dice) * 0.2 * (torch.arange(500) % 3 > 0))
    expected = choose(logits, *settings)
    monkeypatch.setattr(sampling, "can_branch", lambda device: False)
    assert torch.equal(choose(logits, *settings), expected)


def test_the_coldest_temperature_is_as_good_as_greedy():
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(7)) * 1e4
    coldest = torch.full((6,), 1e-40)
    tokens = choose(logits, coldest, torch.ones(6), torch.arange(6), torch.arange(6))
    assert torch.equal(tokens, logits.argmax(-1))


def test_a_tiny_top_p_leaves_the_likeliest_token_and_one_leaves_all():
    probabilities = torch.randn(6, 300, generator=torch.Generator().manual_seed(5)).softmax(-1)
    seeds, positions = torch.arange(6), torch.zeros(6, dtype=torch.long)
    least = draw_above_floor(probabilities, torch.full((6,), 1e-6), seeds, positions)
    assert torch.equal(least, probabilities.argmax(-1))
    noise = gumbel_noise(seeds, positions, torch.arange(300)[None])
    whole = draw_above_floor(probabilities, torch.ones(6), seeds, positions)
    assert torch.equal(whole, (probabilities.log() + noise).argmax(-1))


class Copies(TorchDispatchMode):
    """Counts copies from a CPU to another device. `meta` is one that holds no numbers."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        from_cpu = any(tensor.device.type == "cpu" and tensor.dim() for tensor in tensors)
        self.count += from_cpu and out.device.type == "meta"
        return out


def in_a_step(has_new_token=True, **settings):
    """A request as the library shows it, at position 7."""
    asked = {"temperature": 0.5, "top_p": 0.75, "repetition_penalty": 1.0, "seed": 5} | settings
    params = SamplingParams(**asked)
    state = SimpleNamespace(
        logit_processor_kwargs={"params": params}, position_offset=7, request_id="request"
    )
    return SimpleNamespace(has_new_token=has_new_token, state=state)


def test_the_settings_of_a_step_reach_the_device_in_one_copy_bit_for_bit():
    last = in_a_step(seed=2**32 - 1, top_p=0.1, min_p=0.25, top_k=4)
    requests = [in_a_step(), in_a_step(has_new_token=False), last]
    processor = SamplerProcessor(50, 4, torch.device("cpu"))
    rows = processor.prepare_tensor_args(requests, torch.full((7, 9), 77, dtype=torch.int32))
    floats = [[0.5, 0.5], [0.75, 0.1], [1, 1], [0, 0.25]]
    assert torch.equal(rows[:4, :2].view(torch.float32), torch.tensor(floats))
    assert (rows[4, :2].long() & 0xFFFFFFFF).tolist() == [5, 2**32 - 1]
    assert rows[5, :2].tolist() == [0, 4] and rows[6, :2].tolist() == [7, 7]
    assert not rows[:, 2].any() and (rows[:, 3:] == 77).all()  # that one only reads its prompt
    with Copies() as copies:
        processor.prepare_tensor_args(requests, torch.empty(7, 9, dtype=torch.int32, device="meta"))
    assert copies.count == 1


def test_a_graph_penalises_whatever_python_thinks(monkeypatch):
    """A replayed step has no Python: only the settings that lie in its tensors count."""
    processor = SamplerProcessor(50, 2, torch.device("cpu"))
    asked = [in_a_step(temperature=0.0, repetition_penalty=2.0), in_a_step(temperature=0.0)]
    for request in asked:
        request.state.initial_tokens, request.state.generated_tokens = [3, 4], [8]
    rows = processor.prepare_tensor_args(asked, torch.zeros(7, 2, dtype=torch.int32))
    scores = torch.randn(2, 50, generator=torch.Generator().manual_seed(6))
    scores[:, 8] = scores.max() + 1  # the likeliest, and already said
    expected = processor(None, scores, rows)
    assert expected.argmax(-1).tolist()[1] == 8 != expected.argmax(-1).tolist()[0]
    processor.penalising = False
    monkeypatch.setattr(transformers_batch, "can_branch", lambda device: False)
    assert torch.equal(processor(None, scores, rows), expected)
