"""The steps of `python -m bench gpu` that measure: the machine, full size, over HTTP, quantised."""

import argparse
import asyncio
import json
import platform
import random
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager

import psutil
import torch
import transformers
import uvicorn

import api
import chatglm
from bench import compare, decode, textbook, weights
from bench.contenders import Contender, Running
from bench.gpu_checks import choices, manager_of, prepare
from chatglm.checkpoint.files import TINY
from chatglm.hardware.device import pick_device, pick_dtype
from chatglm.tiny.evaluation import HELD_OUT, is_right

MATRIX = 8192  # rows and columns of the product whose speed is measured
PATIENCE = 20  # seconds for a server to start


# 0. The machine


def measure_machine(figures, settings: argparse.Namespace) -> None:
    """The card, the versions, and the two ceilings: bytes and operations a second."""
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    figures.add(
        "software",
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        cuda=torch.version.cuda,
        flash_attention=transformers.utils.is_flash_attn_2_available(),
    )
    figures.add("card", name=card(device), driver=driver(device), dtype=str(dtype))
    figures.add("bandwidth", **{"copies, GB/s": decode.bandwidth(device) / 1e9})
    figures.add("arithmetic", **{"matrix product, TFLOP/s": matrix_speed(device, dtype) / 1e12})


def card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def driver(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()


def matrix_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the best of ten products of large random matrices."""
    size = MATRIX if device.type == "cuda" else MATRIX // 16
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: left @ right, device) for _ in range(10))


def seconds(work: Callable, device: torch.device) -> float:
    decode.synchronise(device)
    begun = time.perf_counter()
    work()
    decode.synchronise(device)
    return time.perf_counter() - begun


# 3. The full size


def build(settings: argparse.Namespace, quantize: str | None = None) -> tuple:
    """(tokenizer, model) with random weights. What making them took is free again."""
    device = pick_device(settings.device)
    made = decode.build(settings.preset, device, pick_dtype(settings.dtype, device), quantize)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return made


def measure_full_size(figures, settings: argparse.Namespace) -> None:
    """Decoding against the bandwidth limit, prefill, memory, start-up; random weights."""
    device, size = pick_device(settings.device), settings.size
    speed = decode.bandwidth(device)
    begun = time.perf_counter()
    tokenizer, model = build(settings)
    built = time.perf_counter() - begun
    for batch, tokens in size.batches.items():
        engine = chatglm.Engine(tokenizer, model, max_concurrency=batch, max_waiting=batch)
        begun = time.perf_counter()
        with engine:
            if batch == 1:
                started = time.perf_counter() - begun
                figures.add("start-up", **{"weights, s": built, "engine, s": started})
                figures.add("prefill", **prefill(engine, size.prompt))
                figures.add("the engine's choices", **choices(engine))
            figures.add("decode", **decode_row(engine, batch, tokens, speed))
            figures.add("memory", **memory(engine, device))


def decode_row(engine: chatglm.Engine, batch: int, tokens: int, speed: float) -> dict:
    """Once to warm up, once to count: tokens a second, and the most that `speed` bytes a second
    would allow."""
    asyncio.run(decode.decode_speed(engine, batch, min(tokens, 16)))
    rate, context = asyncio.run(decode.decode_speed(engine, batch, tokens))
    least = decode.step_bytes(engine.model, batch, context) / speed
    return {
        "batch": batch,
        "tokens/s": rate,
        "ms/step": 1000 * batch / rate,
        "least ms/step": 1000 * least,
        "share": rate * least / batch,
    }


def prefill(engine: chatglm.Engine, length: int) -> dict:
    """Time to the first token of a prompt that no cache knows, the median of five."""
    dice = random.Random(0)
    pieces = engine.tokenizer.sp.vocab_size()

    async def first_token() -> float:
        input_ids = [dice.randrange(weights.CONTROLS, pieces) for _ in range(length)]
        begun = time.perf_counter()
        async with aclosing(await engine.submit(prepare(engine, input_ids, 2))) as chunks:
            await anext(chunks)
            return time.perf_counter() - begun

    times = [asyncio.run(first_token()) for _ in range(6)][1:]  # the first warms up
    median = statistics.median(times)
    return {"tokens": length, "ms": 1000 * median, "tokens/s": length / median}


def memory(engine: chatglm.Engine, device: torch.device) -> dict:
    """Gigabytes: the weights, the KV cache (which takes what there is), and all the rest."""
    held = weights.held_bytes(engine.model)
    cache = manager_of(engine).batch_processor.cache.cache_tensor.nbytes
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = psutil.Process().memory_info().rss
    return {
        "batch": engine.max_concurrency,
        "weights": held / 1e9,
        "cache": cache / 1e9,
        "peak": peak / 1e9,
        "rest at the peak": (peak - held - cache) / 1e9,
    }


# 4. Over HTTP


def measure_http(figures, settings: argparse.Namespace) -> None:
    """api.py beside the textbook's server, on the same weights in memory. The clients are another
    process."""
    size, loaded = settings.size, build(settings)
    tokenizer, model = loaded
    prompts = compare.Prompts(tokenizer)
    chatglm.load = lambda *_, **__: loaded  # api.py's own load then gets these weights
    textbook.app.state.tokenizer, textbook.app.state.model = tokenizer, model
    for server, app in (("ours", api.app), ("textbook", textbook.app)):
        with served(app) as running:
            for clients in size.clients:
                tokens = size.tokens
                if server == "textbook" and clients > 4:  # one after the other: as many in all
                    tokens = max(8, 4 * tokens // clients)
                if server == "ours" or clients == 1:
                    clients_row(running, prompts, clients, min(tokens, 16))  # warms up
                row = clients_row(running, prompts, clients, tokens)
                figures.add("clients", server=server, **row)


@contextmanager
def served(app) -> Iterator[Running]:
    """The app on a port of this machine, in a thread of this process."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_for(lambda: server.started or not thread.is_alive(), "the server to start")
            yield Running("127.0.0.1", listener.getsockname()[1], psutil.Process())
        finally:
            server.should_exit = True
            thread.join()


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {PATIENCE} s for {what}")
        time.sleep(0.05)


def clients_row(running: Running, prompts: compare.Prompts, clients: int, tokens: int) -> dict:
    """One load of so many clients, all at once, with short prompts."""
    contender = Contender("", "frames")
    asked = [[contender.body(*prompts.make("short"), tokens)] for _ in range(clients)]
    result = compare.run_load(running, contender, asked, health=True)
    got = compare.measure(result, tokens, own=True)
    return {
        "clients": clients,
        "tokens": tokens,
        "tokens/s": got["tokens_per_s"],
        "first token, ms": milliseconds(got["first_median"]),
        "first p95, ms": milliseconds(got["first_p95"]),
        "between p95, ms": milliseconds(got["between_p95"]),
        "health p95, ms": milliseconds(got["health_p95"]),
        "failed": got["failed"],
    }


def milliseconds(value: float | None) -> float | None:
    return None if value is None else 1000 * value


# 5. Quantised


def measure_quantised(figures, settings: argparse.Namespace) -> None:
    """Memory and speed at the full size, and what it costs the bundled model in right answers."""
    device, size = pick_device(settings.device), settings.size
    lines = [json.loads(line) for line in HELD_OUT.read_text("utf-8").splitlines()]
    known = [line for line in lines if line["kind"] == "known"][: size.held_out]
    speed = decode.bandwidth(device)
    for kind in ("int8", "int4"):
        tokenizer, model = build(settings, kind)
        for batch in size.profiled:
            with chatglm.Engine(tokenizer, model, batch, batch) as engine:
                row = decode_row(engine, batch, min(size.batches[batch], 64), speed)
                figures.add("decode", kind=kind, **row)
                figures.add("memory", kind=kind, **memory(engine, device))
        del tokenizer, model
    for quantize in (None, "int8", "int4"):
        with chatglm.Engine(
            *chatglm.load(TINY, settings.device, settings.dtype, quantize=quantize),
            max_waiting=len(known),
        ) as engine:
            right = asyncio.run(count_right(engine, known))
        figures.add("bundled model", kind=quantize or "full", questions=len(known), right=right)


async def count_right(engine: chatglm.Engine, lines: list[dict]) -> int:
    return sum(await asyncio.gather(*(is_right(engine, line, temperature=0) for line in lines)))
