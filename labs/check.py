"""Checks the program that you wrote in a lab.

    python -m labs.check 6 my_client.py

It runs the program for real, and says in one sentence what is wrong, or that the lab is passed.
"""

import argparse
import importlib
import sys
from pathlib import Path

from labs.verdict import Wrong

LABS = range(11)


def main() -> int:
    parser = argparse.ArgumentParser(description="Checks the program that you wrote in a lab.")
    parser.add_argument("lab", type=int, choices=LABS, help="the number of the lab")
    parser.add_argument("file", type=Path, help="your program")
    parser.add_argument("--model", type=Path, help="lab 10: the folder of your fine-tuned model")
    args = parser.parse_args()
    for stream in (sys.stdout, sys.stderr):  # Windows' console may not know 中文
        stream.reconfigure(encoding="utf-8", errors="replace")
    if not args.file.is_file():
        print(f"✗ 没有这个文件：{args.file}\n  There is no such file: {args.file}")
        return 1
    options = {"model": args.model} if args.lab == 10 else {}
    check = importlib.import_module(f"labs.checks.lab{args.lab}").check
    try:
        check(args.file.resolve(), **options)
    except Wrong as wrong:
        print("✗ " + str(wrong).replace("\n", "\n  "))
        return 1
    print(f"✓ 实验 {args.lab} 通过了。\n  Lab {args.lab} is passed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
