"""The terminal client, in a real terminal (a pty, its screen kept by pyte) and in pipes. It talks
with the real server, or with a peer that speaks the wire format in ways a server seldom does."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pexpect
import pyte
import pytest
import requests

import client
from tests.servers import HERE, LIMIT, busy, until

ROWS = [f"{number:03}" for number in range(70)]  # about three screens
# What of the tester's own terminal and network would change what is seen.
OWN = re.compile("LC_|LINES$|COLUMNS$|NO_COLOR$|FORCE_COLOR$|TTY_|PYTHON|.*_proxy$", re.I)
ENV = {name: value for name, value in os.environ.items() if not OWN.match(name)}
ENV |= {"LANG": "C.UTF-8", "TERM": "xterm-256color"}
TRICKY = [
    "你好，世界！",
    "一枚火箭 🚀 和 👩‍🚀",
    "a < b <",
    "<^",
    "<^>",
    "<^><^>好<^\u200b>",
    "<<^<^>>^>",
    "",
    "<^\u200b",
    "1 <^> 2 <^\u200b\u200b> 3",
]
HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\n"
    b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
)
in_a_terminal = pytest.mark.skipif(
    not hasattr(pexpect, "spawn") and "CI" not in os.environ, reason="there are no ptys here"
)


# --- A peer that speaks the wire format: its scripts yield bytes to send ------------------------


def frame(text):
    return ("<^>" + re.sub("<\\^(\u200b*)>", "<^\\1\u200b>", text)).encode()


def growing(text, step=1):
    return [frame(text[:end]) for end in range(step, len(text), step)] + [frame(text)]


def streaming(*chunks, end=b"0\r\n\r\n", pace=0.0):
    """A 200 and these chunks. The `end` b"" breaks off; None waits for the reader to hang up."""

    def script(body):
        yield HEAD
        for chunk in chunks:
            yield b"%x\r\n%b\r\n" % (len(chunk), chunk)
            time.sleep(pace)  # a model takes its time
        yield end

    return script


def answering(*texts, **how):
    return streaming(*map(frame, texts), **how)


def refusing(status, content):
    kind = "text/html" if content.startswith("<h1>") else "application/json"
    head = f"HTTP/1.1 {status} No\r\nContent-Type: {kind}\r\nConnection: close\r\n\r\n"
    return lambda body: [(head + content).encode()]


def never_ending(url):
    """The real server's answer, made endless by a wish that the client has no flag for."""

    def script(body):
        body |= {"repetition_penalty": 0.5, "temperature": 0, "max_length": 8192}
        with requests.post(url, json=body, stream=True, timeout=LIMIT) as response:
            yield HEAD
            for chunk in response.iter_content(None):
                yield b"%x\r\n%b\r\n" % (len(chunk), chunk)

    return script


class Peer:
    """Serves the scripts, one a request, the last for all that follow; keeps what it was sent."""

    def __init__(self, *scripts):
        self.scripts, self.bodies, self.headers = scripts, [], []
        self.hung_up = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            connection = self.listener.accept()[0]
            with connection, connection.makefile("rb") as request:
                connection.settimeout(LIMIT)
                lines = list(iter(lambda: request.readline().decode("latin-1").strip(), ""))[1:]
                head = {line.split(": ")[0].lower(): line.split(": ", 1)[1] for line in lines}
                body = json.loads(request.read(int(head["content-length"])))
                self.headers.append(head)
                self.bodies.append(body)
                script = self.scripts[min(len(self.bodies), len(self.scripts)) - 1]
                self.play(connection, iter(script(dict(body))))

    def play(self, connection, parts):
        try:
            for part in parts:
                if part is not None:
                    connection.sendall(part)
                elif not connection.recv(1):
                    self.hung_up.set()
        except OSError:
            self.hung_up.set()
        finally:
            getattr(parts, "close", int)()  # a script that is itself a reader hangs up as well


def said(url, prompt, history=()):
    body = {"prompt": prompt, "history": history, "temperature": 0, "stream": False}
    return requests.post(url, json=body, timeout=LIMIT).json()["response"]


def run(url, *arguments, stdin=b"", **env):
    return subprocess.run(
        [sys.executable, "client.py", "--url", url, *arguments],
        cwd=HERE,
        env=ENV | env,
        input=stdin,
        capture_output=True,
        timeout=LIMIT,
    )


# --- A terminal --------------------------------------------------------------------------------


class Terminal:
    """80x24, on which the user already had twenty lines."""

    def __init__(self, url, *flags, **env):
        self.screen = pyte.HistoryScreen(80, 24, history=2000)
        self.stream = pyte.ByteStream(self.screen)
        self.stream.feed(b"".join(b"kept%s\r\n" % row.encode() for row in ROWS[:20]))
        self.child = pexpect.spawn(
            sys.executable,
            ["client.py", "--url", url, *flags],
            cwd=HERE,
            env=ENV | env,
            dimensions=(24, 80),
        )

    def text(self):
        """All there is, from the top of the scrollback."""
        gone = ["".join(line[x].data for x in range(80)) for line in self.screen.history.top]
        return "\n".join(line.rstrip() for line in gone + self.screen.display)

    def until(self, condition):
        """Reads on until the condition holds."""

        def came():
            try:
                self.stream.feed(self.child.read_nonblocking(2**16, 0.2))
            except pexpect.TIMEOUT:
                pass
            return condition()

        until(came)

    def at_prompt(self):
        return self.screen.display[self.screen.cursor.y].rstrip() == ">"

    def send(self, line):
        self.until(self.at_prompt)
        self.child.send(line + "\r")

    def ask(self, *lines):
        for line in lines:
            self.send(line)
            prompts = self.text().count("\n>")
            self.until(lambda: self.at_prompt() and self.text().count("\n>") > prompts)

    def exit_status(self):
        self.child.expect(pexpect.EOF, timeout=LIMIT)
        self.stream.feed(self.child.before)
        self.child.close()
        return self.child.exitstatus


@pytest.fixture
def terminal():
    opened = []
    yield lambda *arguments, **env: opened.append(Terminal(*arguments, **env)) or opened[-1]
    for one in opened:
        print(one.text())  # pytest shows it where the test failed
        if one.child.isalive():
            one.child.kill(signal.SIGKILL)
            one.child.wait()
        one.child.close()


def squeezed(text):
    return "".join(text.split())  # as it is however a terminal breaks the lines


# --- Frames ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TRICKY)
def test_frames_are_read_right_wherever_the_bytes_are_cut(text):
    stream, chance = b"".join(growing(text)), random.Random(text)
    for cut in range(len(stream) + 1):
        for more in (0, chance.randrange(20)):
            at = sorted([0, cut, len(stream), *chance.choices(range(len(stream)), k=more)])
            seen = ["", *client.frames(stream[a:b] for a, b in zip(at, at[1:]))]
            assert seen[-1] == text, at
            assert all(new.startswith(old) for old, new in zip(seen, seen[1:])), (at, seen)
    assert client.unescape(frame(text).decode().removeprefix("<^>")) == text


def test_frames_yield_each_time_the_text_has_grown():
    assert list(client.frames(growing("你好🚀!"))) == ["你", "你好", "你好🚀", "你好🚀!"]


# --- One answer, in pipes ----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["argument", "pipe"])
def test_one_question_gets_plain_text_in_utf8(url, how):
    question = "发一个表情符号"
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    if how == "argument":
        done = run(url, "--temperature", "0", question)
    else:
        done = run(url, "--temperature", "0", stdin=question.encode(), **ascii_only)
    assert (done.returncode, done.stdout.decode().strip()) == (0, said(url, question))
    assert b"\x1b" not in done.stdout


def test_a_pipe_gets_each_character_once_however_the_bytes_come():
    text = "一帧：<^>你好 🚀，<^\u200b> **a**\n\n```\n<b>\n```\n完"
    stream = b"".join(growing(text))
    done = run(Peer(streaming(*(bytes([byte]) for byte in stream))).url, "?")
    assert (done.returncode, done.stdout.decode().rstrip("\n")) == (0, text)


@pytest.mark.parametrize("rest", [b"", b"ff\r\n", b"ff\r\n<^>Half an answer, n"])
def test_a_broken_stream_keeps_the_text_and_is_called_incomplete(rest):
    done = run(Peer(answering("Half", "Half an answer", end=rest)).url, "?")
    assert done.returncode == 1 and done.stdout.startswith(b"Half an answer")
    assert b"incomplete" in done.stderr and b"Traceback" not in done.stderr


def test_without_a_server_one_line_says_how_to_start_it():
    with socket.socket() as nobody:  # a port that is taken, and that nobody listens at
        nobody.bind(("127.0.0.1", 0))
        done = run(f"http://127.0.0.1:{nobody.getsockname()[1]}", "?")
    assert done.returncode == 1 and b"python api.py" in done.stderr and not done.stdout.strip()
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("content", ['{"detail": "不行 Bad."}', "<h1>Bad.</h1>", "{", "[]", ""])
def test_a_refusal_is_shown_and_what_another_server_says_is_no_traceback(content):
    done = run(Peer(refusing(503, content)).url, "?")
    assert done.returncode == 1 and done.stderr.strip() and b"Traceback" not in done.stderr
    assert ("不行 Bad." in done.stderr.decode()) == ("不行" in content)


EVIL = "\x1b]0;title\x07\x1b[2J\x1b]52;c;cm0=\x07\u202eevil\u2066\r\x9b2J"


@pytest.mark.parametrize(
    "content",
    [EVIL, json.dumps({"detail": EVIL}), '{"detail": "\\q"} evil', "[" * 10_000 + "evil"],
    ids=["no JSON", "JSON", "no JSON escape", "deep"],
)
def test_a_refusal_moves_nothing_on_the_terminal(content):
    done = run(Peer(refusing(503, content)).url, "?")
    assert b"Traceback" not in done.stderr and b"HTTP 503" in done.stderr
    assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\u202e\u2066]", done.stderr.decode())


def test_a_refusal_without_end_is_not_read_to_its_end():
    def endless(body):
        yield b"HTTP/1.1 503 No\r\nConnection: close\r\n\r\nevil"
        for _ in range(5000):
            yield b"a" * 65536

    done = run(Peer(endless).url, "?")
    assert done.stderr.startswith(b"evilaaa") and len(done.stderr) < 400


def test_a_link_shows_where_it_leads():
    from rich.console import Console

    with (console := Console(force_terminal=True, width=90)).capture() as shown:
        console.print(client.markdown("[my bank](http://evil.example) ![a](http://img.example)"))
    assert "http://evil.example" in shown.get() and "\x1b]8;" not in shown.get()


def test_the_servers_own_refusal_is_shown(url):
    detail = requests.post(url, json={"prompt": "?", "top_p": 2}, timeout=LIMIT).json()["detail"]
    done = run(url, "--top-p", "2", "?")
    assert done.returncode == 1 and detail in done.stderr.decode()


def test_flags_and_key_are_sent_where_they_are_given():
    it = Peer(answering("ok"))
    run(it.url, *"--max-length 99 --top-p 0.5 --temperature 0 --api-key k ?".split())
    run(it.url, "?")
    wanted = {"prompt": "?", "max_length": 99, "top_p": 0.5, "temperature": 0}
    assert it.bodies[0].items() >= wanted.items() and not it.bodies[0].get("history")
    assert it.headers[0]["authorization"] == "Bearer k"
    assert {it.bodies[1].get(name) for name in wanted} == {"?", None}
    assert "authorization" not in it.headers[1]
    assert b"http://127.0.0.1:8000" in run("", "--help").stdout  # what there is without --url


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_proxies_are_not_asked_for_this_machine(host):
    proxy, it = Peer(answering("wrong way")), Peer(answering("ok"))
    done = run(it.url.replace("127.0.0.1", host), "?", http_proxy=proxy.url, all_proxy=proxy.url)
    assert done.stdout.strip() == b"ok" and not proxy.bodies


# --- A conversation ----------------------------------------------------------------------------


@in_a_terminal
def test_a_conversation_goes_on_from_what_was_said(url, terminal):
    chat, first, then = terminal(url, "--temperature", "0"), "Count from 1 to 100", "用中文说"
    chat.ask(first, then)
    answer = said(url, first)
    shown = f"> {first}{answer}> {then}{said(url, then, [[first, answer]])}>"
    assert squeezed(shown) in squeezed(chat.text())


@in_a_terminal
def test_history_is_sent_as_pairs_until_cleared(terminal):
    it = Peer(answering("A"), answering("B", "B **b**"), answering("C"), answering("D"))
    terminal(it.url).ask("a", "b", "c", "clear", "d")
    assert [body["prompt"] for body in it.bodies] == ["a", "b", "c", "d"]
    assert [body["history"] for body in it.bodies] == [
        [],
        [["a", "A"]],
        [["a", "A"], ["b", "B **b**"]],
        [],
    ]


@in_a_terminal
@pytest.mark.parametrize("key", ["stop\r", "\x04", "\x03"])
def test_stop_and_the_end_of_input_and_ctrl_c_leave(terminal, key):
    chat = terminal(Peer().url)
    chat.until(chat.at_prompt)
    chat.child.send(key)
    assert chat.exit_status() == 0 and "Traceback" not in chat.text()


@in_a_terminal
def test_ctrl_c_stops_the_answer_on_the_server_too(server, terminal):
    chat = terminal(Peer(never_ending(server.url)).url)
    with server.held():
        chat.send("Count from 1 to 100")
        until(lambda: busy(server.url) == 1)
        # The client draws the newest text with the frame that comes next, so more must come.
        chat.until(lambda: server.step() or "1 2 3" in chat.text())
        chat.child.sendintr()
        chat.until(chat.at_prompt)
        until(lambda: server.step() or busy(server.url) == 0)


@in_a_terminal
def test_ctrl_c_keeps_what_was_said_and_drops_an_empty_turn(terminal):
    it = Peer(answering("Half of **it**", end=None), answering(end=None), answering("ok"))
    chat = terminal(it.url)
    for question, shown in [("one", "Half of it"), ("two", "> two")]:
        it.hung_up.clear()
        chat.send(question)
        chat.until(  # drawn to its end
            lambda: shown in chat.text() and question in [body["prompt"] for body in it.bodies]
        )
        chat.child.sendintr()
        chat.until(chat.at_prompt)
        until(it.hung_up.is_set)
    chat.ask("three")
    assert chat.text().count("Half of") == 1 and "Traceback" not in chat.text()
    assert it.bodies[2]["history"] == [["one", "Half of **it**"]]


@in_a_terminal
def test_ctrl_c_in_the_middle_of_drawing_leaves_one_copy(terminal):
    rows = [f"row{number:04} {'x' * 60}" for number in range(1500)]  # no terminal takes all at once
    chat = terminal(Peer(answering("\n".join(rows) + "\n\nlast", end=None)).url)
    chat.send("?")
    chat.until(lambda: rows[0] in chat.text())  # and then nobody reads: it waits within a write
    chat.child.kill(signal.SIGINT)
    chat.until(chat.at_prompt)
    assert re.findall("row.*|last", chat.text()) == [*rows, "last"]


@in_a_terminal
def test_what_no_longer_fits_is_dropped_from_the_oldest_on(terminal):
    full = refusing(400, '{"detail": "leaves no room", "code": "context_length_exceeded"}')
    it = Peer(answering("A"), answering("B"), full, full, answering("C"), answering("D"))
    chat = terminal(it.url)
    chat.ask("a", "b", "c", "d")
    history = [body["history"] for body in it.bodies]
    assert history[2:] == [[["a", "A"], ["b", "B"]], [["b", "B"]], [], [["c", "C"]]]
    assert "oldest" in chat.text() and "leaves no room" not in chat.text()


@in_a_terminal
def test_a_conversation_outlives_the_context_of_the_server(url, terminal):
    body = {"prompt": "Tell me something that is not too long about anything.", "stream": False}
    sizes = (body | {"max_length": n} for n in range(1, 200))
    fits = (b["max_length"] for b in sizes if requests.post(url, json=b, timeout=LIMIT).ok)
    room = next(fits) + 5  # for one such question, and not for two
    chat = terminal(url, "--max-length", str(room), "--temperature", "0")
    chat.ask(*[body["prompt"]] * 3)
    assert chat.text().count("oldest") == 2 and "leaves no room" not in chat.text()


@in_a_terminal
def test_a_conversation_survives_refusals_and_broken_streams(terminal):
    it = Peer(
        refusing(400, '{"detail": "no such thing"}'),
        answering("Half", end=b""),
        refusing(502, '{"error": "bad"}'),
        answering("whole"),
    )
    chat = terminal(it.url)
    chat.ask("a", "b", "c", "d")
    assert all(chat.text().count(word) == 1 for word in ("no such", "incomplete", "Half", "whole"))
    assert it.bodies[1]["history"] == [] and "Traceback" not in chat.text()


# --- What the screen shows ---------------------------------------------------------------------

LONG = {
    "paragraphs": "\n\n".join(f"row{row} of **many**" for row in ROWS),
    "lines": "\n".join(f"row{row} of many" for row in ROWS),
    "wide lines": "\n".join(f"row{row}:{'汉字很宽🚀' * 9}" for row in ROWS),  # in odd columns too
    "one paragraph": " ".join(f"row{row} 是 one of the many that are told here" for row in ROWS),
    "list": "\n".join(f"- row{row}" for row in ROWS),
    "code": "```python\n" + "\n".join(f"x = 'row{row}'" for row in ROWS) + "\n```\nend",
    "table": "| a | b |\n|---|---|\n" + "\n".join(f"| row{row} | 字 |" for row in ROWS),
}


@in_a_terminal
@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("flags", [[], ["--plain"]])
def test_a_long_answer_is_whole_in_the_scrollback_and_the_rest_is_left_alone(terminal, kind, flags):
    chat = terminal(Peer(streaming(*growing(LONG[kind], 20), pace=0.01)).url, *flags)
    chat.ask("你会吗？")
    assert re.findall(r"row(\d{3})", squeezed(chat.text())) == ROWS
    assert kind != "wide lines" or squeezed(f"> 你会吗？{LONG[kind]}>") in squeezed(chat.text())
    assert re.findall(r"kept(\d+)", chat.text()) == ROWS[:20]


@in_a_terminal
def test_markdown_and_code_are_drawn(terminal):
    text = "Some **bold** word, <p>HTML</p>, <^>.\n\n```python\ndef f(x):\n    return x\n```\n"
    chat = terminal(Peer(streaming(*growing(text), pace=0.01)).url)
    chat.ask("?")
    lines = [line.strip() for line in chat.text().splitlines()]
    assert lines.count("Some bold word, <p>HTML</p>, <^>.") == 1 and "```" not in lines
    assert re.search("\n( *)def f.x.: *\n\\1    return x", chat.text())
    line = next(y for y, shown in enumerate(chat.screen.display) if "bold" in shown)
    bold = [cell.data for _, cell in sorted(chat.screen.buffer[line].items()) if cell.bold]
    assert "".join(bold) == "bold"


@in_a_terminal
@pytest.mark.parametrize("flags", [["--plain"], []])
def test_with_requests_alone_or_plain_it_still_converses(terminal, tmp_path, flags):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['rich'] = None")
    it = Peer(answering("It is **b", "It is **bold**.\n\n- 一"), answering("ok"))
    chat = terminal(it.url, *flags, PYTHONPATH="" if flags else str(tmp_path))
    chat.ask("a", "b")
    assert chat.text().count("It is **bold**.\n\n- 一\n") == 1 and "Traceback" not in chat.text()
    assert it.bodies[1]["history"] == [["a", "It is **bold**.\n\n- 一"]]
