"""Benchmarks of the chat server.

    pip install -r bench/requirements.txt
    python -m bench                     # beside the textbook's server and transformers serve
    python -m bench --quick             # the same in about 2 minutes
    python -m bench --peer vLLM=http://127.0.0.1:9000    # and beside a server that runs already
    python -m bench --preset 1.5b --quantize int8 --long 500 --clients 1,4,16 --tokens 32 \\
        --weights FOLDER --peer llama.cpp=http://127.0.0.1:8080     # see sizes.py
    python -m bench growth              # what a longer answer and more clients cost
    python -m bench soak --minutes 10   # good, bad, slow and vanishing clients, all mixed
    python -m bench soak --hostile      # the same beside strangers who send what they should not
    python -m bench fair                # two clients beside one that opens 330 connections
    python -m bench decode --preset chatglm3-6b          # how near a GPU comes to its limit
    python -m bench gpu                 # all that a GPU can show, within eight minutes
    python -m bench scale               # what Ray Serve costs, and how many GPUs a class needs

Reading order: weights.py, sizes.py, textbook.py, contenders.py, load.py, canned.py, compare.py,
report.py, growth.py, soak.py, hostile.py, fair.py, decode.py, gpu.py, gpu_checks.py, gpu_speed.py,
gpu_profile.py, gpu_trial.py, gpu_kernels.py, scale.py.
"""

import argparse
import importlib
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
DEFAULTS = {  # in full, and with --quick
    "compare": (
        {"clients": [1, 4, 16, 64], "tokens": 100, "repeats": 3},
        {"clients": [1, 16], "tokens": 40, "repeats": 1},
    ),
    "scale": (
        {"clients": [1, 8, 32], "tokens": 100, "repeats": 3},
        {"clients": [1, 16], "tokens": 100, "repeats": 1},
    ),
}


def numbers(text: str) -> list[int]:
    """`1,4,16` as a list. Raises ValueError for what is no count."""
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 1:
        raise ValueError(text)
    return counts


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n")[0])
    add = top.add_subparsers(dest="what").add_parser
    compare = add("compare", help="beside other servers (what is done without a word)")
    compare.add_argument("--clients", type=numbers, help="default: 1,4,16,64")
    compare.add_argument("--tokens", type=int, help="of an answer (default: 100)")
    compare.add_argument("--repeats", type=int, help="default: 3")
    compare.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=URL",
        help="an OpenAI-compatible server that runs already; may be repeated",
    )
    compare.add_argument(
        "--weights",
        metavar="FOLDER",
        help="keep the weights there, as `python -m bench.weights` makes them",
    )
    compare.add_argument("--preset", choices=["tiny", "1.5b", "chatglm3-6b"], default="tiny")
    compare.add_argument("--quantize", choices=["int8", "int4"], help="this server's weights")
    compare.add_argument(
        "--long", type=int, default=1000, help="tokens of a long prompt (default: 1000; 0: none)"
    )
    growth = add("growth", help="cost against the length of an answer and the number of clients")
    soak = add("soak", help="does every answer arrive, and is it the right one?")
    soak.add_argument("--minutes", type=float, default=10)
    soak.add_argument("--clients", type=int, default=24, help="at once (default: 24)")
    soak.add_argument("--hostile", action="store_true", help="sixty good clients among strangers")
    fair = add("fair", help="how long two clients wait beside a greedy one")
    fair.add_argument("--connections", type=int, default=330, help="of the greedy one")
    fair.add_argument("--questions", type=int, default=20, help="of each of the two (default: 20)")
    decode = add("decode", help="decode speed against the device's memory bandwidth")
    decode.add_argument("--preset", choices=["tiny", "1.5b", "chatglm3-6b"], default="tiny")
    decode.add_argument("--device", default="auto")
    decode.add_argument("--dtype", default="auto")
    decode.add_argument("--quantize", choices=["int8", "int4"])
    decode.add_argument("--batch", type=numbers, default=[1, 8, 64, 256])
    decode.add_argument("--tokens", type=int, default=128, help="of each answer (default: 128)")
    gpu = add("gpu", help="all that a GPU can show, step by step (gpu.md is the recipe)")
    gpu.add_argument("--preset", choices=["chatglm3-6b", "tiny"], default="chatglm3-6b")
    gpu.add_argument("--device", default="cuda")
    gpu.add_argument("--dtype", default="auto")
    gpu.add_argument("--minutes", type=float, default=7.5, help="for all steps (default: 7.5)")
    scale = add("scale", help="the server under Ray Serve, with one replica and with two")
    scale.add_argument("--clients", type=numbers, help="default: 1,8,32")
    scale.add_argument("--tokens", type=int, help="of an answer (default: 100)")
    scale.add_argument("--repeats", type=int, help="default: 3")
    for command in (compare, growth, soak, fair, decode, gpu, scale):
        command.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    for command in (compare, growth, scale):
        command.add_argument("--quick", action="store_true", help="short settings")
    return top


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("--"):
        arguments = ["compare", *arguments] if "--help" not in arguments else arguments
    settings = parser().parse_args(arguments)
    if settings.what in DEFAULTS:
        for name, value in DEFAULTS[settings.what][settings.quick].items():
            if getattr(settings, name) is None:
                setattr(settings, name, value)
    try:
        return importlib.import_module(f"bench.{settings.what}").main(settings)
    except ValueError as error:  # an address, a device or a folder that will not do
        print(f"bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
