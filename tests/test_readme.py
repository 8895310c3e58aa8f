"""What the README and the house style say of the files is true."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUANTIZE = "chatglm/checkpoint/requirements-quantize.txt"
README = (ROOT / "README.md").read_text("utf-8")


def lines(name: str) -> int:
    return len((ROOT / name).read_text("utf-8").splitlines())


def test_the_line_counts_in_the_readme_are_the_files():
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", README, re.MULTILINE)
    assert len(rows) >= 10
    assert {name: int(count) for name, count in rows} == {name: lines(name) for name, _ in rows}


def test_the_dependencies_are_those_the_readme_gives_reasons_for():
    table = README[README.index("## Dependencies") :]
    for name in ("requirements.txt", QUANTIZE, "tests/requirements.txt"):
        for package in re.findall(r"^([\w-]+)==", (ROOT / name).read_text("utf-8"), re.M):
            assert package in table
