"""The labs: each check fails the starter and three wrong programs, and passes the solution.

pytest -n 0 tests/test_labs.py
"""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from labs import hosted
from labs.verdict import Wrong

ROOT = Path(__file__).parents[1]
LABS = ROOT / "labs"
SOLUTIONS = LABS / "solutions"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
CI = "CI" in os.environ  # there, nothing may be missing unnoticed
PROGRAMS = {
    0: "my_ask.py",
    1: "my_json.py",
    2: "my_get.py",
    3: "my_post.py",
    4: "my_stream.py",
    5: "my_server.py",
    6: "my_client.py",
    7: "my_page.html",
    8: "my_protocol.py",
    9: "my_sampling.py",
}
STARTERS = {  # what the check says to each, in English
    0: "try json=",
    1: "not a JSON object",
    2: "GET /repeat/3 {'text': 'hi'} should get 200, and got 404",
    3: "POST / {} should get 422, and got 500, because of KeyError",
    4: "NameError: name 'prompt' is not defined",
    5: "/health gets no answer",
    6: "When a character or <^> arrives in pieces",
    7: "#fetch: the first piece has arrived",
    8: "A frame is its length in decimal",
    9: "--top-k 5 should become",
}
GLOBAL_HISTORY = {
    "class Chat": "talk = []\n\n\nclass Chat",
    "    return": "    talk.append([body.prompt, response])\n    return",
    "[*body.history, [body.prompt, response]]": "talk",
}
GLOBAL_VARIABLES = {
    "process(prompt, history, **settings)": "process(**settings)",
    "    data = await request.json()\n": "    global prompt, history\n"
    "    data = await request.json()\n"
    '    prompt, history = data.get("prompt"), data.get("history") or []\n',
    '        data.get("prompt"),\n        data.get("history") or [],\n': "",
}
SWALLOWED = {
    "    for response, _": "    try:\n      for response, _",
    "sleep(0)\n": "sleep(0)\n    except asyncio.CancelledError:\n        pass\n",
}
IN_TURN = {
    "app = FastAPI(": "lock = asyncio.Lock()\napp = FastAPI(",
    "    async with aclosing(chunks):": "    async with lock, aclosing(chunks):",
}
FOR_NOBODY = {
    "async def process(chunks):\n": """async def process(chunks):
    queue = asyncio.Queue()

    async def produce():
        async for chunk in chunks:
            queue.put_nowait(chunk)
        queue.put_nowait(None)

    task = asyncio.create_task(produce())
    while chunk := await queue.get():
        yield "<^>" + chunk.text
    await task


async def unused(chunks):
"""
}
# A lab, what is changed in its solution, and what the check says to that.
WRONG = [
    (0, {'"prompt": question': '"question": question'}, '"prompt" should be the question'),
    (0, {', "stream": False': ""}, 'needs "stream": false'),
    (0, {'.json()["response"]': ".text"}, "print the text of the answer alone"),
    (1, {", ensure_ascii=False": ""}, "needs ensure_ascii=False"),
    (1, {"except json.JSONDecodeError": "except KeyError"}, "JSONDecodeError"),
    (1, {" or []) +": ") +"}, "TypeError"),
    (2, {"number: int": "number"}, "should get 200, and got 500, because of TypeError"),
    (2, {'text: str = "ha"': "text: str"}, "GET /repeat/2 should get 200, and got 422"),
    (2, {', params={"text": text})': ' + f"?text={text}")'}, "pass it with params="),
    (3, {"list = []": "list"}, 'POST / {"prompt": "你好"} should get 200, and got 422'),
    (3, {"Field(0.95, ge=0, le=2)": "0.95"}, '"temperature": -0.1} should get 422, and got 200'),
    (3, {"ge=0, le=2": "gt=0, lt=2"}, '"temperature": 0} should get 200, and got 422'),
    (3, GLOBAL_HISTORY, "the server should remember nothing"),
    (4, GLOBAL_VARIABLES, "do not make the variables global"),
    (4, {"        await asyncio.sleep(0)\n": ""}, "the event loop must get its turn"),
    (4, SWALLOWED, "do not swallow CancelledError"),
    (5, {'"/health"': '"/healthy"'}, "GET /health should get 200, and got 404"),
    (5, IN_TURN, "only when the first one's answer has ended"),
    (5, FOR_NOBODY, "After the client has hung up"),
    (6, {", flush=True": ""}, "print needs flush=True"),
    (6, {'sys.exit(f"回答不完整': 'print(f"回答不完整'}, "that the answer is incomplete"),
    (6, {"if not response.ok": "if False"}, "The server refused the request"),
    (6, {'print(received.rpartition("<^>")[2].removeprefix(shown))': "print()"}, "may end in <"),
    (7, {", {stream: true}": ""}, "#fetch: #answer should end as"),
    (7, {"return source.close()": "return"}, "call source.close()"),
    (7, {'encodeURIComponent(get("question").value)': 'get("question").value'}, "encodeURI"),
    (8, {"str(len(data))": "str(len(text))"}, "in bytes, not characters"),
    (8, {'    yield b"0\\n"\n': ""}, "has the length 0"),
    (8, {"if len(rest) < int(length)": "if False"}, "The client should print"),
    (9, {"Field(None, ge=1)": "None"}, '"top_k": 0 should get 422'),
    (9, {"top_k < len(logits)": "top_k < 0"}, "does not reach the sampling"),
    (9, {"int | None = Field(None, ge=1)": "int = Field(1, ge=1)"}, "if top_k is absent"),
]


@pytest.fixture(scope="module", autouse=True)
def one_process():
    """All servers run in one process, one after the other: torch is imported once."""
    host = hosted.HostProcess()
    hosted.SHARED.append(host)
    yield
    hosted.SHARED.remove(host)
    host.close()


def check(lab, file, **options):
    if lab == 7:
        return check_page(file)
    import_module(f"labs.checks.lab{lab}").check(file, **options)


def check_page(file):
    """In a Chromium without a screen."""
    if not CHROMIUM and not CI:
        pytest.skip("there is no chromium here")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    browsers = []

    def browse(url):
        profile = f"--user-data-dir={file.parent / 'profile'}"
        run = [CHROMIUM, *flags, profile, url]
        browsers.append(subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    try:
        import_module("labs.checks.lab7").check(file, browse)
    finally:
        for browser in browsers:
            browser.kill()
            browser.wait()


@pytest.mark.parametrize("lab", PROGRAMS)
def test_a_solution_passes(lab, tmp_path):
    check(lab, Path(shutil.copy(SOLUTIONS / PROGRAMS[lab], tmp_path)))


def sentence(lab, file, **options):
    """The English one. There is a Chinese one before it, and both are one line."""
    with pytest.raises(Wrong) as caught:
        check(lab, file, **options)
    chinese, english = str(caught.value).split("\n")
    assert re.search("[一-鿿]", chinese)
    return english


@pytest.mark.parametrize("lab", PROGRAMS)
def test_a_starter_runs_and_lacks_the_point(lab, tmp_path):
    file = Path(shutil.copy(LABS / str(lab) / PROGRAMS[lab], tmp_path))
    assert STARTERS[lab] in sentence(lab, file)


@pytest.mark.parametrize(("lab", "changes", "says"), WRONG)
def test_a_wrong_program_is_told_what_is_wrong(lab, changes, says, tmp_path):
    source = (SOLUTIONS / PROGRAMS[lab]).read_text("utf-8")
    for old, new in changes.items():
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    file = tmp_path / PROGRAMS[lab]
    file.write_text(source, "utf-8")
    assert says in sentence(lab, file)


# --- Lab 10: a file of questions, and a model ------------------------------------------------

QUESTIONS = [
    json.loads(line) for line in (SOLUTIONS / "my_questions.jsonl").read_text("utf-8").splitlines()
]


def questions(tmp_path, change=lambda wordings: None, count=20):
    """The solution's questions; `change` edits the wordings of the last."""
    lines = json.loads(json.dumps(QUESTIONS[:count]))
    change(lines[-1]["messages"][0]["content"])
    file = tmp_path / "my.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    return file


def test_questions_of_ones_own_are_right_and_the_bundled_model_does_not_know_them():
    file = SOLUTIONS / "my_questions.jsonl"
    assert "The file is right" in sentence(10, file)
    assert "it gets 0% right" in sentence(10, file, model=ROOT / "chatglm" / "tiny")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda wordings: wordings.__delitem__(slice(2, None)), "at least 6 different wordings"),
        (lambda wordings: wordings.append("图书馆几点开门？"), "a wording of two questions"),
        (lambda wordings: wordings.append("What is HTTP?"), "already answers 'What is HTTP?'"),
    ],
)
def test_a_file_that_cannot_be_learned_is_told_why(change, says, tmp_path):
    assert says in sentence(10, questions(tmp_path, change))


def test_the_starter_of_lab_10_has_too_few_wordings_and_nineteen_questions_are_too_few(tmp_path):
    assert "at least 6 different wordings" in sentence(10, LABS / "10" / "my_questions.jsonl")
    assert "At least 20 questions are needed" in sentence(10, questions(tmp_path, count=19))


# --- The commands ----------------------------------------------------------------------------


def command(*arguments):
    run = [sys.executable, "-m", "labs.check", *map(str, arguments)]
    return subprocess.run(run, cwd=ROOT, capture_output=True, encoding="utf-8")


def test_the_command_says_it_in_both_languages_and_by_its_exit_status():
    passed = command(1, SOLUTIONS / "my_json.py")
    assert passed.returncode == 0 and "通过" in passed.stdout and "is passed" in passed.stdout
    failed = command(1, LABS / "1" / "my_json.py")
    assert failed.returncode == 1 and "不是 JSON" in failed.stdout and "not a JSON" in failed.stdout
    assert "There is no such file" in command(1, "nowhere.py").stdout


# --- The notebook and the pages --------------------------------------------------------------


def test_the_notebook_runs_from_top_to_bottom():
    if not CI:
        pytest.importorskip("nbclient")
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(LABS / "stream.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": LABS}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    written = ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]
    assert all(written)
    assert "<^>HTTP" in "".join(written)


def test_the_notebook_is_kept_without_its_outputs():
    cells = json.loads((LABS / "stream.ipynb").read_text("utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.mark.parametrize("lab", range(11))
def test_a_worksheet_is_one_page_and_its_files_and_commands_exist(lab):
    page = (LABS / str(lab) / "README.md").read_text("utf-8")
    assert len(page.splitlines()) <= 60
    assert f"labs.check {lab} " in page
    for name in re.findall(r"\blabs/[\w/]+\.\w+", page):
        assert (ROOT / name).exists(), name
    rows = [row.strip("|").split(" | ") for row in page.splitlines() if row.startswith("| **")]
    assert rows and all(len(row) == 2 and re.search("[一-鿿]", row[0]) for row in rows)


@pytest.mark.parametrize("lab", [2, 3, 4, 8, 9])
def test_the_command_of_a_worksheet_starts_its_server(lab):
    """As it stands there, in the project's folder, but for the port."""
    page = (LABS / str(lab) / "README.md").read_text("utf-8")
    (command,) = re.findall(r"^python (-m uvicorn .*)$", page, re.MULTILINE)
    starter = (LABS / str(lab) / PROGRAMS[lab]).read_text("utf-8")
    assert re.sub(r"--reload(-dir \S+)? ", "", command) in starter  # it says the same
    run = [sys.executable, *command.replace("--reload ", "").split(), "--port", "0"]
    with subprocess.Popen(run, cwd=ROOT, stderr=subprocess.PIPE, text=True) as server:
        try:
            said = next(
                line for line in server.stderr if "Uvicorn running" in line or "rror" in line
            )
            assert "Uvicorn running" in said
        finally:
            server.terminate()


def test_the_server_to_compare_with_is_the_starter():
    """A student changes the starter, and the table has to go on comparing with it."""
    files = [LABS / "5" / name for name in ("naive.py", "my_server.py")]
    naive, starter = (file.read_text("utf-8").split('"""')[2] for file in files)
    assert naive == starter.replace("TODO: ", "")


def test_the_packages_of_the_labs_are_pinned_as_the_servers_are():
    pinned = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    mine = (LABS / "requirements.txt").read_text("utf-8").splitlines()
    assert {line for line in mine if "==" in line} <= set(pinned)
