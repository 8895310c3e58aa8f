"""The steps of `python -m bench gpu` that look whether the answers are right."""

import argparse
import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import torch
from safetensors.torch import load_file

import chatglm
from chatglm.checkpoint.files import read_json

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
QUESTIONS = ["你好", "什么是流式输出？", "Tell me about FastAPI", "hi", "a b c", "What is HTTP?"]
EXACT = 1e-4  # of the largest logit: how far float32 may be off where sums have another order


# 1. The golden checkpoints


def check_golden(figures, settings: argparse.Namespace) -> None:
    """Every checkpoint in tests/golden, against what the original implementation computed."""
    failed = []
    for file in sorted(GOLDEN.glob("*/expected.json")):
        for dtype in ("float32", "bfloat16"):
            try:
                row = compare_golden(file.parent, dtype, settings.device)
            except Exception as error:  # one checkpoint must not hide the others
                row = {"error": f"{type(error).__name__}: {error}"[:300]}
            figures.add("golden", checkpoint=file.parent.name, dtype=dtype, **row)
            if "error" in row or (dtype == "float32" and not row["right"]):
                failed.append(f"{file.parent.name} {dtype}")
    if failed:
        raise ValueError(f"not as the original: {', '.join(failed)}")


def compare_golden(folder: Path, dtype: str, device: str) -> dict:
    """How far the logits are off, and how many greedy answers of the engine are the original's."""
    expected = read_json(folder / "expected.json")
    adapter: dict = {"adapter": folder} if "base" in expected else {}
    base = GOLDEN / expected.get("base", folder.name)
    tokenizer, model = chatglm.load(base, device, dtype, **adapter)
    known = load_file(folder / "expected_logits.safetensors")
    with torch.inference_mode():
        logits = model(known["input_ids"].to(model.device)).logits.float().cpu()
    off = float((logits - known["logits"]).abs().max() / known["logits"].abs().max())
    chats = expected["chats"]
    with chatglm.Engine(tokenizer, model, max_concurrency=len(chats)) as engine:
        made = asyncio.run(continue_all(engine, [chat["input_ids"] for chat in chats]))
    same = sum(tokens == chat["greedy_next_24"][: len(tokens)] for tokens, chat in zip(made, chats))
    right = same == len(chats) and off < EXACT
    return {"logits off by": off, "answers": len(chats), "the original's": same, "right": right}


async def continue_all(engine: chatglm.Engine, prompts: list[list[int]]) -> list[list[int]]:
    """The next 24 tokens of each, all at once, without the one that ends an answer."""

    async def continue_one(input_ids: list[int]) -> list[int]:
        sequence = prepare(engine, input_ids, 24)
        async with aclosing(await engine.submit(sequence)) as chunks:
            async for _ in chunks:
                pass
        return [token for token in sequence.latest.token_ids if token not in stops]

    stops = engine.tokenizer.stop_ids
    return await asyncio.gather(*map(continue_one, prompts))


def prepare(engine: chatglm.Engine, input_ids: list[int], tokens: int) -> chatglm.Sequence:
    """A request for the greedy continuation of these token ids."""
    params = chatglm.SamplingParams(
        temperature=0, max_length=engine.max_request_tokens, max_new_tokens=tokens
    )
    sequence = engine.prepare([{"role": "user", "content": "hi"}], params)
    sequence.input_ids[:] = input_ids
    return sequence


# 2. A crowd that comes and goes


def check_crowd(figures, settings: argparse.Namespace) -> None:
    """Answers in a crowd against the same alone, exactly so in float32. What the engine runs on."""
    for dtype in ("float32", "bfloat16"):
        tokenizer, model = chatglm.load(None, settings.device, dtype)
        with chatglm.Engine(tokenizer, model) as engine:
            figures.add("the engine's choices", dtype=dtype, **choices(engine))
            row = asyncio.run(compare_crowd(engine, settings.size.crowd))
            figures.add("answers in a crowd", dtype=dtype, **row)


def manager_of(engine: chatglm.Engine):
    """The library's part of a running engine."""
    assert engine._batch is not None
    return engine._batch._manager


def choices(engine: chatglm.Engine) -> dict:
    """How the library runs the batch: decided by it at start-up."""
    manager = manager_of(engine)
    config, cache = manager.continuous_batching_config, manager.batch_processor.cache
    return {
        "attention": engine.model.config._attn_implementation,
        "CUDA graphs (prefill, decode)": config.use_cuda_graph,
        "block table": bool(config.max_blocks_per_request),
        "asynchronous": config.use_async_batching,
        "block size": config.page_size,
        "blocks": cache.num_blocks,
        "tokens a step": cache.max_batch_tokens,
        "cache, GB": cache.cache_tensor.nbytes / 1e9,
    }


async def compare_crowd(engine: chatglm.Engine, count: int) -> dict:
    dice = random.Random(0)
    requests = [
        (
            dice.choice(QUESTIONS) * dice.randrange(1, 9),
            {"temperature": dice.choice([0, 0.5, 1]), "seed": i, "max_new_tokens": 20 + i},
        )
        for i in range(count)
    ]

    async def leave_early(question: str) -> None:
        await asyncio.sleep(dice.random() / 2)
        async with aclosing(messages(engine, question, max_new_tokens=200)) as chunks:
            async for _ in chunks:
                if dice.random() < 0.3:
                    break

    leavers = [asyncio.create_task(leave_early(question)) for question, _ in requests]
    together = await asyncio.gather(*(answer(engine, q, **settings) for q, settings in requests))
    await asyncio.gather(*leavers)
    left = engine.active + engine.waiting
    alone = [await answer(engine, question, **settings) for question, settings in requests]
    same = sum(one == other for one, other in zip(together, alone))
    return {"answers": count, "the same alone": same, "left behind": left}


def messages(
    engine: chatglm.Engine, question: str, **settings
) -> AsyncGenerator[chatglm.Chunk, None]:
    return engine.generate([{"role": "user", "content": question}], **settings)


async def answer(engine: chatglm.Engine, question: str, **settings) -> str:
    async for chunk in messages(engine, question, **settings):
        pass
    return chunk.raw
