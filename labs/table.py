"""Lab 5's table: three servers, each with two clients, on one thread of torch.

    python -m labs.table                 # about a minute
    python -m labs.table my_server.py    # and yours

Client 1 asks for a long answer. When it has its first frame, client 2 asks, and somebody looks at
/health. At last client 1 hangs up.
"""

import argparse
import sys
import time
from pathlib import Path

from labs.hosted import SESSION, Hosted, Reader, hosted
from labs.program import ROOT, until

LONG, SHORT = "从一数到一百", "What is JSON?"
SERVERS = [
    ("naive", ROOT / "labs/5/naive.py"),
    ("naive + sleep(0)", ROOT / "labs/5/with_sleep.py"),
    ("api.py", ROOT / "api.py"),
]


def measure(server: Hosted) -> list[str]:
    Reader(server.url, prompt=SHORT, temperature=0).wait()  # the first answer pays for all
    start = time.monotonic()
    first = Reader(server.url, prompt=LONG, temperature=0)
    until(lambda: first.answer)
    first_frame = time.monotonic() - start
    start = time.monotonic()
    second = Reader(server.url, prompt=SHORT, temperature=0)
    until(lambda: second.answer)
    second_frame = time.monotonic() - start
    second.wait()
    if first.ended:  # so that /health is asked beside an answer, for every server
        first = Reader(server.url, prompt=LONG, temperature=0)
        until(lambda: first.answer)
    start = time.monotonic()
    SESSION.get(server.url + "/health", timeout=120)
    health = time.monotonic() - start
    first.wait()
    return [*(f"{1000 * t:.0f} ms" for t in (first_frame, second_frame, health)), hang_up(server)]


def hang_up(server: Hosted) -> str:
    """How many tokens are still made for a client that is not there any more."""
    leaving = Reader(server.url, prompt=LONG, temperature=0)
    until(lambda: leaving.answer)
    leaving.hang_up()
    steps = server.state()["steps"]
    until(lambda: not server.state()["open"], 120)
    return f"{server.state()['steps'] - steps} tokens"


def main() -> None:
    parser = argparse.ArgumentParser(description="Three servers beside each other, and yours.")
    parser.add_argument("file", nargs="?", type=Path, help="your server")
    args = parser.parse_args()
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    own = [(args.file.name, args.file.resolve())] if args.file else []
    heads = ["server", "first frame", "2nd client", "/health", "after hang-up"]
    print("".join(f"{head:18}" for head in heads))
    for name, file in SERVERS + own:
        with hosted(file, model=True) as server:
            print("".join(f"{cell:18}" for cell in [name, *measure(server)]), flush=True)


if __name__ == "__main__":
    main()
