"""Lab 7: a web page that streams, once with fetch and once with EventSource.

The page is opened in a real browser. A script that is added to it asks a question as a student
would, and reports what stands on the page.
"""

import json
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path

from labs.program import until
from labs.raw_server import Exchange, RawServer
from labs.verdict import require

QUESTION = "1+1 & 2?"
FIRST, LAST = "你好，", "你好，<b>世界</b>。"
PATIENCE = 60  # seconds for a browser to open, or to do what it should
REPORTER = """<script>
addEventListener("load", async () => {
  const report = (kind, text) =>
    fetch("/lab/" + kind, {method: "POST", body: JSON.stringify(text)}).catch(() => {});
  addEventListener("error", event => report("error", event.message));
  addEventListener("unhandledrejection", event => report("error", String(event.reason)));
  const get = id => document.getElementById(id);
  const missing = ["question", "fetch", "events", "answer"].filter(id => !get(id));
  if (missing.length) return report("error", "no element with the id " + missing[0]);
  for (const button of ["fetch", "events"]) {
    get("question").value = QUESTION;
    await report("begin", button);
    get(button).click();
    for (let shown = null; await (await fetch("/lab/goes-on")).json(); ) {
      if (shown !== get("answer").textContent)
        await report("text", shown = get("answer").textContent);
      await new Promise(resolve => setTimeout(resolve, 20));
    }
  }
});
</script>""".replace("QUESTION", json.dumps(QUESTION))


class Lab:
    """The server of the page: what the page shows, and how it asks."""

    def __init__(self, page: bytes) -> None:
        self.page = page
        self.button, self.text, self.error = "", "", ""
        self.asked: list[Exchange] = []
        self.verdict: dict[str, tuple] = {}
        self.done = {"fetch": threading.Event(), "events": threading.Event()}

    def answer(self, exchange: Exchange) -> None:
        kind = exchange.path.removeprefix("/lab/")
        if exchange.path == "/" and exchange.method == "GET":
            exchange.whole(self.page, kind="text/html; charset=utf-8")
        elif kind == "goes-on":
            exchange.reply(not self.done[self.button].is_set())
        elif kind in ("begin", "text", "error"):
            setattr(self, {"begin": "button"}.get(kind, kind), exchange.json())
            exchange.reply(None)
        elif exchange.path == "/favicon.ico":
            exchange.whole(b"", 404)
        else:
            self.stream(exchange)

    def stream(self, exchange: Exchange) -> None:
        """The first piece, then the rest when the first is on the page; cut inside a character."""
        button, again = self.button, any(e.path == exchange.path for e in self.asked)
        self.asked.append(exchange)
        if again:  # an EventSource that was not closed comes back
            return exchange.whole(b"", 204)
        pieces = frames() if exchange.path == "/" else events()
        exchange.begin(kind="text/plain" if exchange.path == "/" else "text/event-stream")
        exchange.chunk(pieces[0])
        live = until(lambda: self.error or self.text == FIRST, 5) and not self.error
        for piece in pieces[1:-1]:
            exchange.chunk(piece)
        if exchange.path == "/":  # half a character is on its way: the other half comes later
            until(lambda: self.error or "<b>世" in self.text, 5)
        exchange.chunk(pieces[-1])
        exchange.end()
        until(lambda: self.text == LAST or self.error, 5)
        self.verdict[button] = (exchange, live, self.text)


def frames() -> list[bytes]:
    half, rest = f"<^>{LAST}".encode().split("界".encode(), 1)
    character = "界".encode()
    return [f"<^>{FIRST}".encode(), half + character[:1], character[1:] + rest]


def events() -> list[bytes]:
    def event(text: str) -> bytes:
        return b"data: " + json.dumps({"text": text, "message_id": "1"}).encode() + b"\n\n"

    rest = event(LAST.removeprefix(FIRST)) + b"data: [DONE]\n\n"
    return [b"retry: 50\n" + event(FIRST), rest[:20], rest[20:]]


def check(file: Path, browse: Callable[[str], object] = webbrowser.open) -> None:
    lab = Lab(file.read_bytes() + REPORTER.encode())
    with RawServer(lab.answer) as server:
        browse(server.url)
        for button in ("fetch", "events"):
            until(lambda: lab.error or button in lab.verdict, PATIENCE)
            judge(lab, button)
            if button == "events":
                # A browser reconnects after 50 ms, because the stream says `retry: 50`.
                until(lambda: len(lab.asked) > 2, 1)
                require(
                    len(lab.asked) == 2,
                    "EventSource 又连了一次：收到 [DONE] 以后要 source.close()。",
                    "The EventSource has connected again: after [DONE], call source.close().",
                )
            lab.done[button].set()


def judge(lab: Lab, button: str) -> None:
    require(
        not lab.error,
        f"网页上的脚本出错了：{lab.error}",
        f"The script of the page fails: {lab.error}",
    )
    require(
        lab.button,
        f"浏览器 {PATIENCE} 秒内没有打开网页。",
        f"No browser has opened the page within {PATIENCE} seconds.",
    )
    require(
        button in lab.verdict,
        f"按下 #{button} 以后，网页没有发请求。",
        f"After a click on #{button}, the page sends no request.",
    )
    exchange, live, text = lab.verdict[button]
    expected = ("POST", "/") if button == "fetch" else ("GET", "/stream")
    require(
        (exchange.method, exchange.path) == expected,
        f"#{button} 应该请求 {' '.join(expected)}，却请求了 {exchange.method} {exchange.path}。",
        f"#{button} should ask {' '.join(expected)}, and asks {exchange.method} {exchange.path}.",
    )
    asked = (exchange.json() or {}) if button == "fetch" else exchange.query
    require(
        asked.get("prompt") == QUESTION,
        f"问题到服务器成了 {asked.get('prompt')!r}：网址里要用 encodeURIComponent。",
        f"The question reaches the server as {asked.get('prompt')!r}: in a URL, it needs "
        "encodeURIComponent.",
    )
    require(
        live,
        f"#{button}：第一段文字到了，#answer 里应该马上只有 {FIRST!r}。",
        f"#{button}: the first piece has arrived, and #answer should show {FIRST!r} at once.",
    )
    require(
        text == LAST,
        f"#{button}：#answer 最后应该是 {LAST!r}，却是 {text!r:.60}。（用 textContent。）",
        f"#{button}: #answer should end as {LAST!r}, and is {text!r:.60}. (Use textContent.)",
    )
