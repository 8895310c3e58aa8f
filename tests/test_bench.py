"""The benchmarks run, with the shortest settings, on real servers."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def bench(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "bench", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", sorted(ROOT.glob("bench/*.py")), ids=lambda file: file.stem)
def test_what_a_benchmark_imports_is_there(file):
    importlib.import_module(f"bench.{file.stem}")


def test_the_comparison_has_figures_for_each_contender(tmp_path):
    bench("--clients", "1", "--tokens", "12", "--repeats", "1", "--out", tmp_path)
    results = json.loads((tmp_path / "compare.json").read_text("utf-8"))["results"]
    assert {"this server", "textbook"} <= {result["contender"] for result in results}
    for result in results:
        assert result["median"]["tokens_per_s"] > 0 and result["median"]["failed"] == 0
    assert "| this server | 1 |" in (tmp_path / "compare.md").read_text("utf-8")


def test_a_short_soak_finds_no_fault(tmp_path):
    bench("soak", "--minutes", "0.1", "--clients", "8", "--out", tmp_path)
    result = json.loads((tmp_path / "soak.json").read_text("utf-8"))
    assert result["counts"]["good"] > 0 and result["samples"] == []
    assert result["health after"]["active"] == result["health after"]["waiting"] == 0
