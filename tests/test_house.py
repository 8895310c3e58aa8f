"""The rooms of the house stay apart, and each can be read in one sitting."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HTTP_SIDE = [ROOT / "api.py", *(ROOT / "server").rglob("*.py")]
MODEL_SIDE = [*(ROOT / "chatglm").rglob("*.py")]
WEB_FRAMEWORK = {"fastapi", "starlette", "uvicorn", "server", "api"}
GUIDE = {"api.py": 260}  # formatted lines; other files may have 300


def imports(file):
    """The first word of each module that a file imports, wherever in the file that is."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("file", HTTP_SIDE, ids=lambda file: file.name)
def test_the_http_side_imports_no_torch(file):
    assert not {"torch", "transformers"} & set(imports(file))


@pytest.mark.parametrize("file", MODEL_SIDE, ids=lambda file: file.name)
def test_the_model_side_imports_no_web_framework(file):
    assert not WEB_FRAMEWORK & set(imports(file))


@pytest.mark.parametrize(
    "file", [*HTTP_SIDE, ROOT / "client.py", *MODEL_SIDE], ids=lambda f: f.name
)
def test_a_file_has_one_subject(file):
    lines = len(file.read_text("utf-8").splitlines())
    assert lines <= GUIDE.get(file.name, 300)


def test_the_first_page_of_api_py_goes_from_the_commands_to_post():
    text = (ROOT / "api.py").read_text("utf-8").splitlines()
    first = "\n".join(text[:120])
    for part in (
        "python api.py",
        "POST /",
        "class Chat",
        "asyncio.sleep(0)",
        "def chat(",
        "AnswerResponse(process(",
    ):
        assert part in first
