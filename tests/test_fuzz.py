"""Bodies made at random, near what is right: none gives a 500, and the server goes on.

pytest tests/test_fuzz.py                          # 45 s
FUZZ_SECONDS=600 pytest -n 0 tests/test_fuzz.py    # longer; FUZZ_SEED=1 for other bodies
"""

import json
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor

import requests

from test_api import ask
from tests.servers import LIMIT, busy, started_with, until

SECONDS = float(os.environ.get("FUZZ_SECONDS", 120 if "CI" in os.environ else 45))
SEED = int(os.environ.get("FUZZ_SEED", 0))
V1, TEXT = "/v1/chat/completions", "/v1/completions"
STRINGS = [
    "",
    "hi",
    "你好",
    "\ud800",
    "a\udfff",
    "\x00\x1b[2J",
    "<^>",
    "\u202e",
    "<|user|>",
    "a" * 5000,
]
NUMBERS = [0, 1, -1, 2, 0.5, 1e-40, 1e308, 10**400, float("nan"), float("inf"), 2**32, 8192]
ROLES = ["system", "user", "assistant", "observation", "tool", "function", "developer", "robot"]
USER = {"role": "user", "content": "hi"}
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "what it does", "parameters": {"type": "object"}},
}
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
RIGHT = {  # bodies with something in each field
    "/": {
        "prompt": "hi",
        "history": [{"role": "system", "content": "be short", "tools": [TOOL]}],
        "temperature": 1,
        "top_p": 0.7,
        "repetition_penalty": 1.1,
        "seed": 1,
        "stream": False,
    },
    "/stream": {"prompt": "hi", "history": [["hello", "hi"]], "stream": True},
    V1: {
        "messages": [
            {"role": "system", "content": "be short"},
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL], "metadata": "f"},
            {"role": "tool", "content": [{"type": "text", "text": "3"}], "tool_call_id": "1"},
        ],
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "stop": ["a", "b"],
        "stream_options": {"include_usage": True},
        "logit_bias": {},
        "response_format": {"type": "text"},
        "temperature": 1,
    },
    TEXT: {
        "prompt": ["hi", "你好"],
        "n": 2,
        "logprobs": 1,
        "stop": "a",
        "frequency_penalty": 0.5,
        "stream": True,
        "best_of": 1,
    },
}


def anything(dice, levels=3):
    """Any JSON, and some that is none."""
    kinds = [
        lambda: dice.choice(STRINGS),
        lambda: dice.choice(NUMBERS),
        lambda: dice.choice([None, True, False]),
        lambda: dice.choice([USER, TOOL, CALL, {"role": dice.choice(ROLES), "content": "a"}]),
    ]
    if levels:
        kinds += [
            lambda: [anything(dice, levels - 1) for _ in range(dice.randrange(4))],
            lambda: {dice.choice(STRINGS): anything(dice, levels - 1) for _ in range(2)},
        ]
    return dice.choice(kinds)()


def changed(dice, value, likely):
    """The value, with something else in a few of its places."""
    if dice.random() < likely:
        return anything(dice)
    if isinstance(value, dict):
        kept = {key: changed(dice, entry, likely) for key, entry in value.items()}
        if dice.random() < likely:
            kept[dice.choice([*STRINGS, "tools", "metadata", "arguments", "name"])] = anything(dice)
        return kept
    if isinstance(value, list):
        entries = [changed(dice, entry, likely) for entry in value]
        return entries * dice.choice([1, 1, 1, 1, 0, 2])
    return value


def attempt(url, seed):
    """One request, and what is wrong with its reply."""
    dice = random.Random(seed)
    path = dice.choice(list(RIGHT))
    body = changed(dice, RIGHT[path], dice.choice([0.02, 0.05, 0.2]))
    if isinstance(body, dict):
        body |= {"max_length": 300, "max_tokens": 5}
    content = bytearray(json.dumps(body).encode())
    if dice.random() < 0.1:
        content[dice.randrange(len(content))] = dice.randrange(256)
    if path == "/stream" and isinstance(body, dict) and dice.random() < 0.3:
        query = {key: json.dumps(value) for key, value in body.items() if key.isascii()}
        reply = requests.get(url + path, params=query, timeout=LIMIT)
    else:
        reply = requests.post(url + path, bytes(content), timeout=LIMIT)
    right = reply.status_code in (200, 400)
    if right and reply.status_code == 400:
        right = set(reply.json()) <= ({"error"} if path in (V1, TEXT) else {"detail", "code"})
    return None if right else (seed, path, bytes(content), reply.status_code, reply.text)


@started_with("--max-length", "512")
def test_no_body_gives_an_error_of_the_server(server):
    end, number = time.monotonic() + SECONDS, 0
    with ThreadPoolExecutor(4) as pool:
        while time.monotonic() < end:
            seeds = [f"{SEED}-{number + i}" for i in range(100)]
            wrong = [one for one in pool.map(lambda seed: attempt(server.url, seed), seeds) if one]
            assert not wrong, wrong[0]
            number += 100
    until(lambda: busy(server.url) == 0)
    assert ask(server.url) and number
