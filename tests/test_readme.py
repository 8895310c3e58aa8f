"""What the README and the pages in docs/ say is true.

python -m tests.test_readme    # writes the line counts in the README's map of the files anew
"""

import ast
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import requests

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
RESULTS = (ROOT / "bench" / "results").glob("*.md")
PAGES = [
    ROOT / "README.md",
    ROOT / "chatglm/tiny/README.md",
    *(ROOT / "docs").rglob("*.md"),
    *RESULTS,
]
FOLDERS = ["server", "chatglm", "web", "deploy", "bench", "docs", "tests"]
FILES = [*ROOT.glob("*.*"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.*"))]
ROW = re.compile(r"^\| `([\w/]+\.py)` \| (\d+) \|", re.MULTILINE)  # of the map of the files
MAPS = [ROOT / "README.md", ROOT / "docs" / "zh" / "README.md"]
OTHER_PROGRAMS = {"--timeout-graceful-shutdown"}  # uvicorn's, where it stands in a sentence


def source_files() -> list[str]:
    """The Python files that the map must have: all of the server, except empty `__init__.py`."""
    paths = [ROOT / "api.py", ROOT / "client.py"]
    paths += [path for name in ("server", "chatglm") for path in (ROOT / name).rglob("*.py")]
    return [path.relative_to(ROOT).as_posix() for path in paths if path.stat().st_size]


def lines(name: str) -> int:
    return len((ROOT / name).read_text("utf-8").splitlines())


def section(heading: str) -> str:
    return README.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def prose(text: str) -> str:
    """Markdown without its code blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def code(text: str) -> str:
    """The code of a Markdown page: its blocks, and what stands between backticks, line by line."""
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return "\n".join(blocks + re.findall(r"`([^`\n]+)`", prose(text)))


EVERY_PAGE = pytest.mark.parametrize(
    "page", PAGES, ids=[path.relative_to(ROOT).as_posix() for path in PAGES]
)

# --- The map of the files --------------------------------------------------------------------


@pytest.mark.parametrize("page", MAPS, ids=["English", "Chinese"])
def test_the_line_counts_in_the_readme_are_the_files(page):
    rows = ROW.findall(page.read_text("utf-8"))
    assert len(rows) >= 10
    counted = {name: lines(name) for name, _ in rows if (ROOT / name).exists()}
    assert {name: int(count) for name, count in rows} == counted, "python -m tests.test_readme"


def test_the_map_in_the_readme_has_every_file_once():
    assert sorted(name for name, _ in ROW.findall(README)) == sorted(source_files())


def test_the_reading_order_is_the_same_in_the_readme_and_in_the_package():
    docstring = ast.get_docstring(ast.parse((ROOT / "chatglm/__init__.py").read_text("utf-8")))
    order = re.findall(r"[\w/]+(?:\.py|/)(?=[,;. ]|$)", docstring.split("First sitting")[1], re.M)

    def entry(row: str) -> str:  # of the docstring, which shortens all of a folder to its name
        return next(
            name for name in order if row == name or name[-1] == "/" and row.startswith(name)
        )

    rows = [name.removeprefix("chatglm/") for name, _ in ROW.findall(README)]
    rows.remove("__init__.py")  # it is where the docstring stands
    assert [name for name, _ in itertools.groupby(map(entry, rows))] == order


def write_line_counts() -> None:
    """Rewrites the counts of the rows; one whose file is gone is left, for the tests to report."""

    def counted(row: re.Match) -> str:
        name, old = row.groups()
        new = lines(name) if (ROOT / name).exists() else old
        return f"| `{name}` | {new} |"

    for page in MAPS:
        text = page.read_text("utf-8")
        page.write_text(ROW.sub(counted, text), "utf-8", newline="\n")


# --- Links, files, commands and flags --------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@EVERY_PAGE
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text("utf-8"))):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@EVERY_PAGE
def test_every_file_that_is_named_exists(page):
    names = re.findall(
        r"(?:^| )([\w./-]+\.(?:py|txt|jsonl?|html|md|ini|toml)|[a-z]\w*(?:/\w+)*/)(?= |$)",
        code(page.read_text("utf-8")),
        re.MULTILINE,
    )
    for name in names:
        known = any(("/" + path.as_posix()).endswith("/" + name) for path in FILES)
        assert known or (ROOT / name).exists(), name


@EVERY_PAGE
def test_every_command_that_is_shown_can_be_run(page):
    text = code(page.read_text("utf-8"))
    for module in re.findall(r"python3? -m ([\w.]+)", text):
        assert importlib.util.find_spec(module), module
    for module, name in re.findall(r"(?:uvicorn|serve run) ([\w.]+):(\w+)", text):
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text("utf-8")
        assert re.search(rf"^(def )?{name}\b", source, re.MULTILINE), f"{module}:{name}"


@functools.cache
def flags_of(*command: str) -> set[str]:
    """The flags of a Python program of this project, by its own --help."""
    run = [sys.executable, *command, "--help"]
    page = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", page, re.MULTILINE))


@EVERY_PAGE
def test_every_flag_that_is_shown_exists(page):
    text = code(page.read_text("utf-8"))
    for program, arguments in re.findall(r"python (\w+\.py|-m [a-z][\w.]*)(.*)", text):
        command = tuple(program.split())
        if command == ("-m", "bench"):  # it has subcommands, and `compare` is the usual one
            word = re.match(r" ([a-z]+)", arguments)
            command += (word[1] if word else "compare",)
        for flag in re.findall(r"(?<= )--[\w-]+", arguments):
            assert flag in flags_of(*command), f"{command} {flag}"
    alone = set(re.findall(r"^(--[\w-]+)", text, re.MULTILINE)) - OTHER_PROGRAMS
    assert alone <= flags_of("api.py") | flags_of("client.py") | flags_of("-m", "bench", "compare")


def test_the_table_of_flags_has_each_flag_of_the_server_with_its_environment_variable():
    rows = re.findall(r"^\| (`--.*?) \| (.*?) \|", section("Running it"), re.MULTILINE)
    flags = [re.findall(r"`(.*?)`", cell) for cell, _ in rows]
    variables = [re.findall(r"`(.*?)`", cell) for _, cell in rows]
    table = dict(zip(sum(flags, []), sum(variables, []), strict=True))
    assert table == {
        flag: "CHATGLM_" + flag.strip("-").replace("-", "_").upper()
        for flag in flags_of("api.py") - {"--help"}
    }


def test_the_table_of_flags_has_the_numbers_that_are_the_defaults():
    from server.settings import Settings

    for setting in dataclasses.fields(Settings):
        if type(setting.default) in (int, float):
            row = re.search(rf"^.*`CHATGLM_{setting.name.upper()}`.*$", README, re.MULTILINE)[0]
            assert f"{setting.default:.0f}" in re.findall(r"\b\d+\b", row.split("|")[3]), row


def test_the_flags_of_the_client_are_those_the_readme_lists():
    listed = re.search(r"`client.py` has the flags `(.*?)`", README)[1]
    assert {"--help", *listed.split()} == flags_of("client.py")


# --- What the server answers -----------------------------------------------------------------


def test_the_curl_is_answered_as_it_is_shown(url):
    body, shown = re.search(r"^\$ curl -N \S+ -d '(.*)'\n(.*)$", README, re.MULTILINE).groups()
    frames = shown.split("<^>")[1:]
    assert all(new.startswith(old) for old, new in itertools.pairwise(frames))
    answer = requests.post(url, data=body, timeout=60)
    assert answer.text.split("<^>")[-1] == frames[-1]


def test_the_conversation_is_what_the_client_shows(url):
    screen = re.search(r"^\$ python client.py\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[1]
    banner, *turns = re.split(r"\n\n> ", screen)
    history = []
    for turn in turns:
        prompt, shown = turn.split("\n", 1)
        body = {"prompt": prompt, "history": history, "temperature": 0, "stream": False}
        answer = requests.post(url, json=body, timeout=60).json()["response"]
        shown, _, stopped = shown.strip().partition("\n")
        assert answer.startswith(shown) if stopped else answer == shown
        history.append([prompt, answer])
    words = (ROOT / "client.py").read_text("utf-8")
    assert banner in words and stopped in words


@pytest.mark.parametrize("sample", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_every_sample_in_python_runs(url, sample):
    for package in re.findall(r"^(?:from|import) (\w+)", sample, re.MULTILINE):
        pytest.importorskip(package)
    sample = sample.replace("http://127.0.0.1:8000", url)
    run = [sys.executable, "-X", "utf8", "-c", sample]
    assert subprocess.run(run, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout


def test_the_first_sample_tells_a_refusal_and_minds_no_proxy(url):
    sample = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    sample = sample.replace("http://127.0.0.1:8000", url)
    elsewhere = {
        **os.environ,
        "http_proxy": "http://127.0.0.1:9",
        "HTTP_PROXY": "http://127.0.0.1:9",
    }
    for history, status, said in [("[]", 0, "HTTP"), ("5", 1, "history must be a list")]:
        changed = sample.replace('"history": []', f'"history": {history}')
        run = [sys.executable, "-X", "utf8", "-c", changed]
        done = subprocess.run(run, cwd=ROOT, env=elsewhere, capture_output=True)
        assert done.returncode == status and said in (done.stdout + done.stderr).decode()
        assert b"Traceback" not in done.stderr


def test_refusals_and_whole_answers_are_as_described(url):
    protocol = section("The protocol of `POST /`")
    refusal = requests.post(url, json={"prompt": "hi", "temperature": 3}, timeout=60).json()
    assert f"`{json.dumps(refusal)}`" in protocol
    refusal = requests.post(url, json={"prompt": "hi", "max_length": 1}, timeout=60).json()
    assert f'`"code": "{refusal["code"]}"`' in protocol
    whole = requests.post(url, json={"prompt": "hi", "stream": False}, timeout=60).json()
    health = requests.get(url + "/health", timeout=60).json()
    described = [set(re.findall(r'"(\w+)"', keys)) for keys in re.findall(r"`({[^`]*})`", protocol)]
    assert set(whole) in described and set(health) in described


def test_the_table_of_fields_is_the_schema_of_the_body(url):
    document = requests.get(url + "/openapi.json", timeout=60).json()
    schema = document["paths"]["/"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    name = schema.get("$ref", "").removeprefix("#/components/schemas/")
    fields = document["components"]["schemas"][name] if name else schema
    table = section("The protocol of `POST /`")
    rows = re.findall(r"^\| `(\w+)` \| .*? \| (.*?) \| .*\|$", table, re.MULTILINE)
    assert {row for row, _ in rows} == set(fields["properties"])
    for row, default in rows:
        if "default" in fields["properties"][row] and default != "random":
            assert json.loads(default.strip("`")) == fields["properties"][row]["default"], row


def test_the_log_has_the_line_that_is_shown(url, server):
    line = re.search(r"`(request-\d.*?)`", README)[1]
    requests.post(url, json={"prompt": "hi"}, timeout=60)
    assert re.search(re.sub(r"\d+", r"\\d+", re.sub(r"[+.]", r"\\\g<0>", line)), server.log())
    assert "Listening on http" in server.log() and "`Listening on http" in README


if __name__ == "__main__":
    write_line_counts()
