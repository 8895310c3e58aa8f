"""How near decoding comes to the device's memory bandwidth.

    python -m bench decode --preset chatglm3-6b|1.5b|tiny [--quantize int8|int4]

A step reads every weight once and each request's keys and values once, so the bytes of these over
the bandwidth is the least time it can take. Weights are random, made on the device: speed does
not depend on what they say. On a CPU the tiny network lies in the processor's own cache, which is
faster than the memory whose bandwidth is measured; its share can then be over 100 %.
"""

import argparse
import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass

import torch
from transformers.quantizers import AutoHfQuantizer

import chatglm
from bench import weights
from bench.report import table
from bench.sizes import PRESETS
from chatglm.checkpoint.conversion import ChatGLMForConditionalGeneration, translate_config
from chatglm.checkpoint.cpu_quantizer import finish, replace_matrices
from chatglm.checkpoint.files import TINY, read_json
from chatglm.checkpoint.memory import check_memory
from chatglm.checkpoint.quantize import pick_quantization
from chatglm.checkpoint.tokenizers import load_chatglm_tokenizer
from chatglm.engine.cache_config import CPU_BATCH_TOKENS
from chatglm.hardware.device import GIB, pick_device, pick_dtype
from chatglm.hardware.threads import single_threaded

PROMPT = 128  # tokens of each prompt
COPIES = 10  # of the block whose copying shows the bandwidth
STEP = 2  # bytes of memory moved per byte copied: it is read and written


@dataclass
class Progress:
    """Tokens made of one request, and whether it has ended."""

    tokens: int = 0
    ended: bool = False


@single_threaded()
def build(preset: str, device: torch.device, dtype: torch.dtype, quantize: str | None):
    """A network with random weights, made where it will run, in full before it is quantised."""
    published = PRESETS.get(preset) or read_json(TINY / "config.json")
    config = translate_config(published, preset)
    tokenizer = load_chatglm_tokenizer(TINY, "chatglm3")
    config.eos_token_id = tokenizer.stop_ids
    check_memory(ChatGLMForConditionalGeneration, config, device, dtype)  # as it begins
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        with torch.device(device):
            model = ChatGLMForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        weights.never_stop(model.lm_head.weight, tokenizer.sp.vocab_size())
    if quantize and device.type == "cpu":
        pack(model, quantize)
    elif quantization := pick_quantization(quantize, device, dtype):
        make_small(model, quantization)
    return tokenizer, model.eval()


def pack(model, kind: str) -> None:
    """What loading does to each matrix for a CPU."""
    before = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    replace_matrices(model, kind)
    for name, full in before.items():
        small = model.get_submodule(name)
        if small is not full:
            small.bias = full.bias
            small.pack(small.shrink(full.weight.data))
            full.weight.data = torch.empty(0)  # not there in full while the next is made small
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data.half()
    finish(model, kind)


def make_small(model, config) -> None:
    """What transformers' loading does to each matrix, for a network that no file holds."""
    quantizer = AutoHfQuantizer.from_config(config)
    before = {
        name: (module.weight, module.bias)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    quantizer.preprocess_model(model, device_map=None)
    convert = quantizer.get_quantize_ops().convert
    for name, (weight, bias) in before.items():
        key, module = f"{name}.weight", model.get_submodule(name)
        if quantizer.param_needs_quantization(model, key):
            module.weight = convert({key: weight.data}, model=model, full_layer_name=key)[key]
            module.bias = bias


def bandwidth(device: torch.device) -> float:
    """Bytes a second that the device's memory gives, from a block that no cache holds: on a GPU by
    copying it, on a CPU by adding up its numbers, which only reads."""
    size = GIB if device.type == "cuda" else GIB // 2
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    copies = device.type == "cuda"
    moved = STEP * size if copies else size
    best = float("inf")
    for _ in range(COPIES):
        synchronise(device)
        begun = time.perf_counter()
        source.clone() if copies else source.sum()
        synchronise(device)
        best = min(best, time.perf_counter() - begun)
    return moved / best


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_bytes(model, batch: int, context: float) -> float:
    """What one decoding step must read: the weights, and the keys and values of each request."""
    config = model.config
    # Of the embedding only a row per request is read, unless it is the output layer as well.
    own_head = model.lm_head.weight is not model.model.embed_tokens.weight
    total = weights.held_bytes(model) - own_head * model.model.embed_tokens.weight.nbytes
    kept = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return total + model.dtype.itemsize * batch * context * kept


async def follow(engine: chatglm.Engine, request, progress: Progress) -> None:
    async with aclosing(await engine.submit(request)) as chunks:
        async for chunk in chunks:
            progress.tokens = chunk.completion_tokens
    progress.ended = True


async def decode_speed(engine: chatglm.Engine, batch: int, tokens: int) -> tuple[float, float]:
    """Tokens a second while all decode, and the mean context then: from when the last prompt is
    taken in until the first answer ends."""
    texts = [f"{i} " + "hello world " * PROMPT for i in range(batch)]
    tokens += batch * PROMPT // CPU_BATCH_TOKENS  # steps in which prompts are still taken in
    requests = [
        engine.prepare(
            [{"role": "user", "content": text}],
            chatglm.SamplingParams(
                temperature=0, max_length=engine.max_request_tokens, max_new_tokens=tokens
            ),
        )
        for text in texts
    ]
    for request in requests:
        del request.input_ids[PROMPT:]
    progress = [Progress() for _ in requests]
    tasks = [
        asyncio.create_task(follow(engine, request, each))
        for request, each in zip(requests, progress)
    ]
    while not all(each.tokens for each in progress):
        await asyncio.sleep(0.001)
    begun, before = time.perf_counter(), sum(each.tokens for each in progress)
    last, after = begun, before
    while not any(each.ended or each.tokens >= tokens for each in progress):
        await asyncio.sleep(0.001)
        last, after = time.perf_counter(), sum(each.tokens for each in progress)
    await asyncio.gather(*tasks)
    if after == before:
        raise ValueError(
            f"--tokens {tokens} is too few: the first answers ended before the last "
            "prompt was taken in"
        )
    return (after - before) / (last - begun), PROMPT + (before + after) / 2 / batch


async def measure(model, tokenizer, batch: int, tokens: int) -> tuple[float, float]:
    """`decode_speed` of an engine with that many places, once to warm up and once to count."""
    with chatglm.Engine(tokenizer, model, max_concurrency=batch, max_waiting=batch) as engine:
        await decode_speed(engine, batch, tokens)
        return await decode_speed(engine, batch, tokens)


def main(settings: argparse.Namespace) -> int:
    """Prints and saves one table."""
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    tokenizer, model = build(settings.preset, device, dtype, settings.quantize)
    with ThreadPoolExecutor(1) as apart:  # torch's threads for it end with it: see single_threaded
        speed = apart.submit(bandwidth, device).result()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    rows, results = [], []
    for batch in settings.batch:
        rate, context = asyncio.run(measure(model, tokenizer, batch, settings.tokens))
        least = step_bytes(model, batch, context) / speed  # seconds a step
        limit = batch / least
        results.append({"batch": batch, "tokens_per_s": rate, "limit": limit, "context": context})
        rows.append(
            [
                str(batch),
                f"{rate:,.0f}",
                f"{1000 * batch / rate:,.2f}",
                f"{1000 * least:,.2f}",
                f"{limit:,.0f}",
                f"{rate / limit:.0%}",
            ]
        )
        print(f"  batch {batch}: {rate:,.0f} tokens/s", flush=True)
    held = weights.held_bytes(model)
    title = (
        f"{settings.preset} on {where}, {settings.quantize or dtype}, weights of "
        f"{held / 1e9:,.3g} GB, memory at {speed / 1e9:,.0f} GB/s"
    )
    text = (
        title
        + "\n\n"
        + table(["batch", "tokens/s", "ms/step", "least ms/step", "limit tokens/s", "share"], rows)
    )
    settings.out.mkdir(parents=True, exist_ok=True)
    name = "-".join(filter(None, ["decode", settings.preset, device.type, settings.quantize]))
    (settings.out / f"{name}.md").write_text(text + "\n", "utf-8")
    (settings.out / f"{name}.json").write_text(
        json.dumps(
            {
                "where": where,
                "dtype": str(dtype),
                "quantize": settings.quantize,
                "held_bytes": held,
                "bytes_per_s": speed,
                "results": results,
            },
            indent=1,
        )
        + "\n",
        "utf-8",
    )
    print(f"\n{text}\nsaved in {settings.out}")
    return 0
