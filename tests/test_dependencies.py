"""What the code imports is declared and pinned, and the README gives the reason for it."""

import ast
import itertools
import json
import os
import re
import sys
from importlib.metadata import packages_distributions

import pytest

from tests.test_readme import README, ROOT, section, source_files

# What is not for everybody: the file that imports it, and where it is pinned.
OPTIONAL = {
    "chatglm/checkpoint/quantize.py": "chatglm/checkpoint/requirements-quantize.txt",
    "chatglm/hardware/onnx_int4.py": "chatglm/checkpoint/requirements-int4.txt",
}


def declared(name: str) -> set[str]:
    """Packages that a requirements file pins."""
    return set(re.findall(r"^([\w-]+)(?:\[\w+\])?==", (ROOT / name).read_text("utf-8"), re.M))


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.lower())  # package names that differ so are the same


def imported(name: str) -> set[str]:
    """The modules outside the standard library and the project that a file imports."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"api", "server", "chatglm"}


def test_the_dependencies_are_those_the_readme_gives_reasons_for():
    rows = re.findall(r"^\| ([^|`]+) \|", section("Dependencies"), re.MULTILINE)
    given = {re.sub(r"\[.*", "", name) for row in rows for name in row.split(", ")} - {"package"}
    vendored = {name for name in given if " " in name}  # with a version: scripts of the page
    files = itertools.chain(
        *(ROOT.glob(f"{place}requirements*.txt") for place in ("", "*/", "chatglm/*/", "tests/*/"))
    )
    assert given - vendored == set().union(*(declared(file.relative_to(ROOT)) for file in files))


def test_what_the_code_imports_is_declared_and_pinned():
    owners = packages_distributions()
    pinned = {plain(name) for name in declared("requirements.txt")}
    for name in source_files():
        optional = declared(OPTIONAL[name]) if name in OPTIONAL else set()
        for module in imported(name):
            # One that is not installed is taken to have its module's name.
            packages = {plain(owner) for owner in owners.get(module, [module])}
            assert packages & (pinned | optional), f"{name} imports {module}"


def test_the_least_version_of_python_is_the_one_the_code_is_checked_for():
    assert 'target-version = "py311"' in (ROOT / ".ruff.toml").read_text("utf-8")
    assert "Python 3.11 or newer" in README
    assert "Python 3.11 或更新" in (ROOT / "docs/zh/README.md").read_text("utf-8")


@pytest.mark.parametrize(
    "ours, package, published, licence",
    [
        ("marked.umd.js", "marked", "lib/marked.umd.js", "marked.LICENSE"),
        ("purify.min.js", "dompurify", "dist/purify.min.js", "purify.LICENSE"),
    ],
)
def test_the_page_s_scripts_are_those_of_npm(ours, package, published, licence):
    """Brought by: npm install --prefix tests/clients"""
    installed = ROOT / "tests" / "clients" / "node_modules" / package
    if not installed.exists() and "CI" not in os.environ:
        pytest.skip("not installed; see tests/test_more_clients.py")
    vendor = ROOT / "web" / "static" / "vendor"
    assert (vendor / ours).read_bytes() == (installed / published).read_bytes()
    assert (vendor / licence).read_bytes() == (installed / "LICENSE").read_bytes()
    version = json.loads((installed / "package.json").read_text("utf-8"))["version"]
    name = {"dompurify": "DOMPurify"}.get(package, package)
    assert f"| {name} {version} (" in section("Dependencies")
