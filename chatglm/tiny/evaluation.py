"""How good a checkpoint is: it is asked questions that are not in the corpus."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from pathlib import Path

import chatglm
from chatglm.text.tools import declare, read_call, write_call

HELD_OUT = Path(__file__).parent / "heldout.jsonl"
TOOLS = [
    {
        "name": "get_weather",
        "description": "Get the current weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
    {
        "name": "get_time",
        "description": "Get the current time",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": [],
        },
    },
    {
        "name": "calculate",
        "description": "Calculate an arithmetic expression",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
]
SEEDS = range(5)  # of the answers at the default sampling
LONGEST = 400  # tokens; no answer has more, but one that repeats itself would go on


async def answer(engine: chatglm.Engine, messages: list[dict], **settings) -> chatglm.Chunk:
    async for chunk in engine.generate(messages, max_new_tokens=LONGEST, **settings):
        pass
    return chunk


async def is_right(engine: chatglm.Engine, line: dict, tools: bool = False, **settings) -> bool:
    """Whether a held-out question gets its answer, character for character. For a question that
    needs a tool: whether the call comes, and then the answer from its result."""
    messages = [{"role": "user", "content": line["question"]}]
    if tools:
        messages = declare(messages, TOOLS)
    chunk = await answer(engine, messages, **settings)
    if line["kind"] == "tool":
        call = read_call(chunk.raw, [str(tool["name"]) for tool in TOOLS])
        if (
            call is None
            or {"name": call.name, "arguments": json.loads(call.arguments)} != line["call"]
        ):
            return False
        messages += [
            write_call(call.name, json.loads(call.arguments)),
            {"role": "observation", "content": line["result"]},
        ]
        chunk = await answer(engine, messages, **settings)
    return chunk.text == line["answer"]


def of_kind(kind: str) -> list[dict]:
    """The held-out questions that are "known", "unknown" or for a "tool"."""
    lines = [json.loads(line) for line in HELD_OUT.read_text("utf-8").splitlines()]
    return [line for line in lines if line["kind"] == kind]


async def share_right(engine: chatglm.Engine, lines: list[dict], **settings) -> float:
    """The share of these held-out questions that get the right answer."""
    right = await asyncio.gather(*(is_right(engine, line, **settings) for line in lines))
    return sum(right) / len(right)


def evaluate(folder: Path, quantize: str | None = None) -> dict[str, float]:
    """Shares of held-out questions that get the right answer, of each kind, under greedy decoding;
    of the known ones also at the default sampling, and with tools that none of them needs."""
    lines = of_kind("known") + of_kind("unknown") + of_kind("tool")
    tokenizer, model = chatglm.load(folder, device="cpu", quantize=quantize)

    async def shares() -> dict[str, float]:
        with chatglm.Engine(tokenizer, model, max_waiting=9 * len(lines)) as engine:

            def share(kind: str, **settings) -> Awaitable[float]:
                return share_right(engine, of_kind(kind), **settings)

            greedy, tools, unknown, calls, *sampled = await asyncio.gather(
                share("known", temperature=0),
                share("known", tools=True, temperature=0),
                share("unknown", temperature=0),
                share("tool", tools=True, temperature=0),
                *(share("known", seed=seed) for seed in SEEDS),
            )
        return {
            "known, greedy": greedy,
            "known, sampled": sum(sampled) / len(SEEDS),
            "known, with tools": tools,
            "unknown, greedy": unknown,
            "tool, greedy": calls,
        }

    return asyncio.run(shares())
