"""top_k, min_p, presence and frequency penalties, logit_bias and logprobs: each row by itself.

pytest tests/test_penalties.py
"""

import asyncio
from contextlib import aclosing

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import chatglm
from chatglm import SamplingParams
from chatglm.sampling import Bias, choose

ROWS = 40_000
HELLO = [{"role": "user", "content": "Count to twelve"}]
PARAMS = [
    {},
    {"temperature": 0, "presence_penalty": 1.5},
    {"temperature": 0, "frequency_penalty": 0.9},
    {"temperature": 0, "frequency_penalty": -0.5, "presence_penalty": 0.3},
    {"temperature": 1.0, "top_p": 0.9, "top_k": 5, "seed": 3},
    {"temperature": 1.5, "top_p": 1.0, "min_p": 0.2, "seed": 4},
    {"temperature": 1.2, "top_p": 1.0, "top_k": 100, "min_p": 0.01, "seed": 5},
    {"temperature": 0, "logit_bias": ((300, 100.0),)},
    {"temperature": 0.8, "repetition_penalty": 1.2, "presence_penalty": 0.5, "seed": 6},
]


@pytest.mark.parametrize("size", [30, 500])
@pytest.mark.parametrize(
    "top_k, top_p, min_p",
    [(5, 1.0, 0.0), (5, 0.6, 0.0), (0, 1.0, 0.2), (8, 0.9, 0.1), (60, 0.8, 0.0), (0, 0.7, 0.0)],
)
def test_top_k_and_min_p_leave_what_transformers_leaves(size, top_k, top_p, min_p):
    logits = torch.randn(size, generator=torch.Generator().manual_seed(size)) * 2
    wanted = logits[None] / 1.2
    for warper in [
        *([TopKLogitsWarper(min(top_k, size))] if top_k else []),
        TopPLogitsWarper(top_p),
        MinPLogitsWarper(min_p),
    ]:
        wanted = warper(None, wanted)
    tokens = choose(
        logits.repeat(ROWS, 1),
        torch.full((ROWS,), 1.2),
        torch.full((ROWS,), top_p),
        torch.arange(ROWS),
        torch.full((ROWS,), 17),
        torch.full((ROWS,), top_k),
        torch.full((ROWS,), min_p),
    )
    shares = torch.bincount(tokens, minlength=size) / ROWS
    assert (shares[wanted[0].isinf()] == 0).all()
    assert (shares - wanted.softmax(-1)[0]).abs().max() < 0.012  # five deviations of a half


def test_a_bias_is_the_published_formula():
    params = SamplingParams(
        presence_penalty=0.7, frequency_penalty=0.3, logit_bias=((4, 2.5), (1, -100.0))
    )
    answer = [1, 2, 2, 3, 2]
    counts = torch.bincount(torch.tensor(answer), minlength=6).float()
    wanted = torch.tensor([0, -100, 0, 0, 2.5, 0]) - 0.3 * counts - 0.7 * (counts > 0)
    bias = Bias(params, 6, torch.device("cpu"))
    for token in answer:
        bias.count([token])
    torch.testing.assert_close(bias.values, wanted)


@pytest.fixture(scope="module")
def engine():
    tokenizer, model = chatglm.load()
    with chatglm.Engine(tokenizer, model) as engine:
        yield engine


def by_hand(engine, params, steps):
    """The tokens of an answer, a forward pass of the whole text for each."""
    p, V = SamplingParams(**{"seed": 1, **params}), engine.model.config.vocab_size
    prompt, answer, logprobs = engine.tokenizer.encode_chat(HELLO), [], []
    for _ in range(steps):
        ids = torch.tensor([prompt + answer])
        with torch.inference_mode():
            logits = engine.model(ids).logits[0, -1].float()
        logprobs.append(logits.log_softmax(-1))
        seen = torch.bincount(ids[0], minlength=V) > 0
        penalised = torch.where(
            logits > 0, logits / p.repetition_penalty, logits * p.repetition_penalty
        )
        scores = torch.where(seen, penalised, logits)
        counts = torch.bincount(torch.tensor(answer, dtype=torch.long), minlength=V).float()
        scores = scores - p.frequency_penalty * counts - p.presence_penalty * (counts > 0)
        for token, bias in p.logit_bias:
            scores[token] += bias
        row = (p.temperature, p.top_p, p.seed, len(ids[0]), p.top_k, p.min_p)
        answer.append(int(choose(scores[None], *(torch.tensor([value]) for value in row))))
        if answer[-1] in engine.tokenizer.stop_ids:
            break
    return answer, logprobs


async def answer_of(engine, params, steps):
    sequence = engine.prepare(
        HELLO, SamplingParams(**{"seed": 1, "max_visible_tokens": steps, **params})
    )
    async with aclosing(await engine.submit(sequence)) as chunks:
        async for chunk in chunks:
            pass
    return sequence.latest.token_ids, chunk


def test_each_row_of_a_batch_has_its_own_settings(engine):
    async def all_at_once():
        return await asyncio.gather(*(answer_of(engine, params, 20) for params in PARAMS))

    for (tokens, _), params in zip(asyncio.run(all_at_once()), PARAMS, strict=True):
        wanted = by_hand(engine, params, 20)[0]
        assert tokens[:20] == wanted[: len(tokens[:20])], params


def test_a_penalty_goes_on_over_a_pause(engine):
    async def paused():
        params = {"temperature": 0, "frequency_penalty": 0.9, "logprobs": 1}
        sequence = engine.prepare(HELLO, SamplingParams(max_visible_tokens=20, **params))
        chunks = await engine.submit(sequence, "greedy")
        async with aclosing(chunks):
            await anext(chunks)
            engine._admission._pause_newest("greedy")
            engine._admission._admit()
            async for chunk in chunks:
                pass
        return sequence.latest.token_ids, chunk, sequence.stats.hidden_tokens

    tokens, chunk, hidden = asyncio.run(paused())
    assert tokens[:20] == by_hand(engine, {"temperature": 0, "frequency_penalty": 0.9}, 20)[0]
    assert [each.token for each in chunk.logprobs] == tokens[hidden : hidden + 20]


def test_logprobs_are_those_of_the_network_before_temperature_and_penalties(engine):
    params = {"temperature": 1.3, "seed": 2, "presence_penalty": 1.0}
    tokens, chunk = asyncio.run(answer_of(engine, {**params, "logprobs": 3}, 12))
    hidden = tokens.index(chunk.logprobs[0].token)  # those of the metadata line
    wanted = by_hand(engine, params, 14)[1][hidden:]
    assert len(chunk.logprobs) == chunk.completion_tokens - chunk.hidden_tokens == 12
    for each, token, logprobs in zip(chunk.logprobs, tokens[hidden:], wanted):
        assert each.token == token and each.logprob == pytest.approx(
            float(logprobs[token]), abs=1e-4
        )
        top = logprobs.topk(3)
        assert [token for token, _ in each.alternatives] == top.indices.tolist()
        values = [value for _, value in each.alternatives]
        assert values == pytest.approx(top.values.tolist(), abs=1e-4)
