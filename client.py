"""Talks with the server in a terminal.

    python client.py                     # a conversation: clear forgets it, stop or Ctrl-D leaves
    python client.py "What is HTTP?"     # one answer

Ctrl-C stops an answer, on the server too. It needs `requests`; with `rich`, it draws Markdown."""

import argparse
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec

import requests

MARKER = b"<^>"  # begins each frame; what follows it is the whole text so far


class Broken(Exception):
    """No answer, or not all of it; the message says what to tell the user."""


# --- Reading the stream ----------------------------------------------------------------------


def frames(chunks: Iterable[bytes]) -> Iterator[str]:
    """The text so far, each time it has grown, however the network cut or joined the bytes.
    >>> list(frames([b"<^>He<^>Hel", b"lo<", b"^>Hello!"]))
    ['Hel', 'Hello', 'Hello!']
    """
    frame, shown = b"", ""
    for chunk in chunks:
        frame += chunk
        frame = frame[max(0, frame.rfind(MARKER)) :]
        # Held back: bytes of a character, or of a marker, whose rest has not arrived.
        text = frame.removeprefix(MARKER).decode("utf-8", "ignore")
        text = unescape(re.sub("<(\\^\u200b*)?$", "", text))
        if not shown.startswith(text):  # the beginning of a frame is no news
            yield (shown := text)
    text = unescape(frame.removeprefix(MARKER).decode("utf-8", "replace"))
    if text != shown:
        yield text


def unescape(text: str) -> str:
    """Undoes the server's escape of `<^>`; takes out controls, which could clear the screen."""
    text = re.sub("[\0-\x08\x0b-\x1f\x7f-\x9f]", "", text)
    return re.sub("<\\^(\u200b*)\u200b>", "<^\\1>", text)


def answer(args: argparse.Namespace, prompt: str, history: list) -> Iterator[str]:
    """Yields the text so far; closing the iterator hangs up, which stops the server. Drops the
    oldest turns of `history` where the server says that they do not fit. Raises Broken."""
    session = requests.Session()
    # http_proxy is the way to other machines, not to this one.
    session.trust_env = not re.match(r"https?://(localhost|127\.[\d.]+|\[::1\])(:|/|$)", args.url)
    headers = {"Authorization": args.api_key and f"Bearer {args.api_key}", "x-session-id": args.id}
    body = {
        "prompt": prompt,
        "history": history,
        "max_length": args.max_length,
        "top_p": args.top_p,
        "temperature": args.temperature,
    }
    try:
        while True:
            with session.post(args.url, json=body, headers=headers, stream=True) as response:
                if response.status_code == 200:
                    yield from frames(response.iter_content(chunk_size=None))
                    return
                detail = re.search(r'"detail": *"((?:[^"\\]|\\.)*)"', response.text)
                refusal = json.loads(f'"{detail[1]}"') if detail else response.text[:200]
                if not history or "leaves no room" not in refusal:
                    raise Broken(f"{refusal} (HTTP {response.status_code})")
            del history[0]
            print(
                "（对话太长，忘记了最早的一轮）(too long: the oldest turn is forgotten)",
                file=sys.stderr,
            )
    except requests.exceptions.ChunkedEncodingError as error:
        raise Broken("回答不完整，连接断了 (incomplete: the connection broke off)") from error
    except requests.exceptions.ConnectionError as error:
        raise Broken(
            f"{args.url} 没有服务器，请运行 (no server, start it): python api.py"
        ) from error
    except requests.exceptions.RequestException as error:
        raise Broken(str(error)) from error


# --- Showing it ------------------------------------------------------------------------------


def show_plain(texts: Iterator[str], heard: list[str]) -> None:
    """Writes what is new; into a pipe, all at the end. `heard[0]` is the text so far."""
    live = sys.stdout.isatty()
    try:
        for text in texts:
            print(text.removeprefix(heard[0]) if live else "", end="", flush=live)
            heard[0] = text
    finally:
        print("" if live else heard[0])


def show_markdown(texts: Iterator[str], heard: list[str]) -> None:
    """Draws Markdown. Finished blocks are printed for good; only the last one is redrawn."""
    from rich import console, live, segment

    screen, done, drawn, pressed = console.Console(), 0, 0.0, []  # done: printed for good
    screen.width -= 3  # room for the ^C that terminals write where the cursor is

    def tail() -> segment.SegmentLines:  # of a block taller than the screen, its lower end
        lines = screen.render_lines(markdown(heard[0][done:]), pad=False)
        return segment.SegmentLines(lines[2 - screen.height :], new_lines=True)

    try:  # no thread of rich's that redraws: a line printed meanwhile would be drawn over
        with live.Live(console=screen, auto_refresh=False, transient=True) as last:
            for heard[0] in texts:
                # What Ctrl-C finds half written, rich would write once more: so it waits.
                usual = signal.signal(signal.SIGINT, lambda *_: pressed.append(1))
                done += len(block := finished_blocks(heard[0][done:]))
                if block or time.monotonic() - drawn > 1 / 15:
                    last.update(tail(), refresh=not block)
                    if block:
                        screen.print(markdown(block), "")
                    drawn = time.monotonic()
                signal.signal(signal.SIGINT, usual)
                if pressed:
                    raise KeyboardInterrupt
    finally:
        if heard[0][done:].strip():
            screen.print(markdown(heard[0][done:]))


def markdown(text: str):
    """rich's Markdown, with every line end kept, and HTML shown instead of left out."""
    from rich.markdown import Markdown

    document = Markdown(text)
    for token in document.parsed:
        token.type = {"html_block": "fence"}.get(token.type, token.type)
        for part in token.children or []:
            part.type = {"softbreak": "hardbreak", "html_inline": "text"}.get(part.type, part.type)
    return document


def finished_blocks(text: str) -> str:
    """What comes before the last block of a Markdown text."""
    starts = [token.map[0] for token in markdown(text).parsed if token.level == 0 and token.map]
    return "".join(text.splitlines(keepends=True)[: starts[-1]]) if starts else ""


# --- The conversation ------------------------------------------------------------------------


def ask(args: argparse.Namespace, prompt: str, history: list, show: Callable) -> int:
    """One turn, added to `history` unless nothing was said. Returns the exit status."""
    heard, texts = [""], answer(args, prompt, history)
    try:
        show(texts, heard)
        return 0
    except KeyboardInterrupt:
        texts.close()
        print("（已停止）(stopped)", file=sys.stderr)
        return 130
    except Broken as error:
        print(str(error), file=sys.stderr)
        return 1
    finally:
        if heard[0]:
            history.append([prompt, heard[0]])


def converse(args: argparse.Namespace, show: Callable) -> int:
    if find_spec("readline"):  # arrow keys, and a backspace that knows how wide 字 is
        import readline  # noqa: F401
    history: list[list[str]] = []
    print("clear 清空 forgets, stop 退出 leaves, Ctrl-C 停止回答 stops an answer")
    while True:
        try:
            prompt = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if prompt == "stop":
            return 0
        if prompt == "clear":
            history.clear()
            print("（已清空）(forgotten)")
        elif prompt:
            ask(args, prompt, history, show)


def main() -> int:
    parser = argparse.ArgumentParser(description="Talks with a ChatGLM server.")
    parser.add_argument("question", nargs="?", help="ask this alone, and end")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="default: %(default)s")
    parser.add_argument("--max-length", type=int, help="tokens of prompt and answer together")
    parser.add_argument("--top-p", type=float, help="nucleus sampling, over 0, up to 1")
    parser.add_argument("--temperature", type=float, help="0, always the likeliest word, to 2")
    parser.add_argument("--api-key", help="where the server wants one")
    parser.add_argument("--plain", action="store_true", help="no Markdown, no redrawing")
    args = parser.parse_args(namespace=argparse.Namespace(id=str(time.time_ns())))
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if not stream.isatty():
            stream.reconfigure(encoding="utf-8", errors="replace")
    drawing = sys.stdout.isatty() and not args.plain and find_spec("rich")
    show = show_markdown if drawing else show_plain
    if args.question is None and sys.stdin.isatty():
        return converse(args, show)
    return ask(args, sys.stdin.read() if args.question is None else args.question, [], show)


if __name__ == "__main__":
    sys.exit(main())
