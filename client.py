"""Chat with the server in a terminal.

    python client.py                     # a conversation: clear forgets it, stop or Ctrl-D leaves
    python client.py "What is HTTP?"     # one answer

Ctrl-C stops an answer, on the server too. It needs `requests`; with `rich`, it draws Markdown.
"""

import argparse
import codecs
import io
import json
import locale
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from importlib.util import find_spec
from itertools import islice
from typing import Any

import requests

MARKER = "<^>"  # begins each frame; what follows it is the whole text so far
REDRAW_INTERVAL = 1 / 15  # seconds


class ChatError(Exception):
    """No answer, or not all of it; the message says what to tell the user."""


# --- Reading the stream ----------------------------------------------------------------------


def frames(chunks: Iterable[bytes]) -> Generator[str, None, bool]:
    """The text so far, each time it has grown, however the network cut or joined the bytes. Returns
    whether the answer was cut by max_length: then its last frame comes twice.

    >>> list(frames([b"<^>He<^>Hel", b"lo<", b"^>Hello!"]))
    ['Hel', 'Hello', 'Hello!']
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # keeps half a character for later
    number, before, frame, shown = 0, "", "", ""
    for chunk in chunks:
        *others, frame = (frame + decoder.decode(chunk)).split(MARKER)
        number += len(others)
        before = others[-1] if others else before
        # The beginning of a marker at the end may become one with the next chunk: hold it back.
        text = strip_controls(unescape(re.sub("<(\\^\u200b*)?$", "", frame)))
        if not shown.startswith(text):  # ignore a frame that is still a prefix of what was shown
            shown = text
            yield text
    text = strip_controls(unescape(frame + decoder.decode(b"", final=True)))
    if text != shown:
        yield text
    return number > 1 and before == frame


def unescape(text: str) -> str:
    """Undoes the server's escape of `<^>` in the text itself."""
    return re.sub("<\\^(\u200b*)\u200b>", "<^\\1>", text)


def strip_controls(text: str) -> str:
    """Without what a terminal obeys instead of showing it: control characters, which could clear
    the screen, and marks that write text backwards. Tabs and line ends stay."""
    return re.sub(
        "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb]",
        "",
        text,
    )


def answer(args: argparse.Namespace, prompt: str, history: list) -> Generator[str, None, None]:
    """Yields the text so far; closing it disconnects, which stops the server. Drops the oldest
    turns of `history` if the server says that they do not fit. Raises ChatError."""
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
                    if (yield from frames(response.iter_content(chunk_size=None))):
                        raise ChatError("（截断了）(cut off: a larger --max-length gives more)")
                    return
                detail, code = read_refusal(response)
                if not history or code != "context_length_exceeded":
                    raise ChatError(f"{detail} (HTTP {response.status_code})")
            del history[0]
            note = "（对话太长，忘记了最早的一轮）(too long: the oldest turn is forgotten)"
            print(note, file=sys.stderr)
    except requests.exceptions.ChunkedEncodingError as error:
        raise ChatError("回答不完整，连接断了 (incomplete: the connection broke off)") from error
    except requests.exceptions.ConnectionError as error:
        advice = "没有服务器，请运行 (no server, start it): python api.py"
        raise ChatError(f"{args.url} {advice}") from error
    except requests.exceptions.RequestException as error:
        raise ChatError(str(error)) from error


def read_refusal(response: requests.Response) -> tuple[str, str | None]:
    """What a refusal says to people, and its code for programs. Another server, such as a proxy,
    may send anything."""
    content = b"".join(islice(response.iter_content(4096), 16))  # no more than 64 KiB
    try:
        refusal = json.loads(content)
    except (ValueError, RecursionError):
        refusal = None
    if isinstance(refusal, dict) and "detail" in refusal:
        return str(refusal["detail"])[:1000], refusal.get("code")
    return content.decode("utf-8", "replace")[:200], None


# --- Showing it: a display is a context manager with a function that shows the text so far ----


@contextmanager
def plain_display() -> Iterator[Callable[[str], None]]:
    """Writes what is new; into a pipe, all at the end."""
    is_terminal, shown = sys.stdout.isatty(), ""

    def show(text: str) -> None:
        nonlocal shown
        if is_terminal:
            print(text.removeprefix(shown), end="", flush=True)
        shown = text

    try:
        yield show
    finally:
        print("" if is_terminal else shown)


@contextmanager
def markdown_display() -> Iterator[Callable[[str], None]]:
    """Draws Markdown. Finished blocks are printed for good; only the last one is redrawn."""
    from rich.console import Console
    from rich.live import Live
    from rich.segment import SegmentLines

    console = Console()
    console.width -= 3  # room for the ^C that terminals write where the cursor is
    answer_so_far = ""
    printed = 0  # characters that are printed for good
    drawn = 0.0  # when the rest was drawn

    def draw(finished: str) -> None:
        lines = console.render_lines(markdown(answer_so_far[printed:]), pad=False)
        lower_end = SegmentLines(lines[2 - console.height :], new_lines=True)  # what fits
        display.update(lower_end, refresh=not finished)
        if finished:  # rich prints it above the display, and draws that anew
            console.print(markdown(finished), "")

    def show(text: str) -> None:
        nonlocal answer_so_far, printed, drawn
        with deferred_interrupt():
            answer_so_far = text
            finished = finished_blocks(text[printed:])
            printed += len(finished)
            if finished or time.monotonic() - drawn > REDRAW_INTERVAL:
                draw(finished)
                drawn = time.monotonic()

    try:  # without rich's redrawing thread: it would draw over lines that are printed meanwhile
        with Live(console=console, auto_refresh=False, transient=True) as display:
            yield show
    finally:
        if answer_so_far[printed:].strip():
            console.print(markdown(answer_so_far[printed:]))


@contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Defers Ctrl-C while rich is writing; an interrupted write would be drawn twice."""
    interrupted = False

    def remember(signum: int, frame: object) -> None:
        nonlocal interrupted
        interrupted = True

    usual = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if interrupted:
        raise KeyboardInterrupt


def markdown(text: str) -> Any:
    """rich's Markdown, with every line end kept, and HTML and where links lead shown."""
    from rich.markdown import Markdown

    shown_as = {"html_block": "fence", "softbreak": "hardbreak", "html_inline": "text"}
    document = Markdown(text, hyperlinks=False)  # a link shows where it leads
    for token in document.parsed:
        for part in [token, *(token.children or [])]:
            part.type = shown_as.get(part.type, part.type)
    return document


def finished_blocks(text: str) -> str:
    """What comes before the last block of a Markdown text."""
    starts = [token.map[0] for token in markdown(text).parsed if token.level == 0 and token.map]
    return "".join(text.splitlines(keepends=True)[: starts[-1]]) if starts else ""


# --- The conversation ------------------------------------------------------------------------


def ask(args: argparse.Namespace, prompt: str, history: list, display: Callable) -> int:
    """One turn, added to `history` unless nothing was said. Returns the exit status."""
    text = ""
    try:
        with display() as show, closing(answer(args, prompt, history)) as texts:
            for text in texts:
                show(text)
        return 0
    except KeyboardInterrupt:
        print("（已停止）(stopped)", file=sys.stderr)
        return 130
    except ChatError as error:
        print(strip_controls(str(error)), file=sys.stderr)  # some of it is the server's own words
        return 1
    finally:
        if text:
            history.append([prompt, text])


def converse(args: argparse.Namespace, display: Callable) -> int:
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
            ask(args, prompt, history, display)


def read_input() -> str:
    """All of a pipe or file, in the encoding it seems to have. `echo 你好 |` on a Chinese Windows
    gives GBK; its PowerShell and Notepad write UTF-16 or UTF-8 with a mark in front."""
    if "PYTHONIOENCODING" in os.environ:
        return sys.stdin.read()
    data = sys.stdin.buffer.read()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace")
    for encoding in ("utf-8-sig", locale.getpreferredencoding(False)):
        with suppress(UnicodeDecodeError):
            return data.decode(encoding)
    return data.decode("gb18030", "replace")


def main() -> int:
    parser = argparse.ArgumentParser(description="Chat with a ChatGLM server.")
    parser.add_argument("question", nargs="?", help="ask this alone, and end")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="default: %(default)s")
    parser.add_argument("--max-length", type=int, help="tokens of prompt and answer together")
    parser.add_argument("--top-p", type=float, help="nucleus sampling, over 0, up to 1")
    parser.add_argument("--temperature", type=float, help="0, always the likeliest word, to 2")
    parser.add_argument("--api-key", help="where the server wants one")
    parser.add_argument("--plain", action="store_true", help="no Markdown, no redrawing")
    args = parser.parse_args(namespace=argparse.Namespace(id=str(time.time_ns())))
    for stream in (sys.stdout, sys.stderr):
        wanted = stream.isatty() or "PYTHONIOENCODING" in os.environ
        if isinstance(stream, io.TextIOWrapper) and not wanted:
            stream.reconfigure(encoding="utf-8", errors="replace")
    drawing = sys.stdout.isatty() and not args.plain and find_spec("rich")
    display = markdown_display if drawing else plain_display
    if args.question is None and sys.stdin.isatty():
        return converse(args, display)
    question = read_input() if args.question is None else args.question
    return ask(args, question, [], display)


if __name__ == "__main__":
    sys.exit(main())
