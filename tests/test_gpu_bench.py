"""The GPU's benchmark, rehearsed without a GPU: every step runs, and none can spoil another."""

import argparse
import json
import multiprocessing
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import gpu, gpu_profile
from tests.test_bench import bench

GOLDEN = Path(__file__).parent / "golden"
pytestmark = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="a step's process is a fork"
)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The two files of a whole run with the tiny network on a CPU."""
    folder = tmp_path_factory.mktemp("gpu")
    bench("gpu", "--preset", "tiny", "--device", "cpu", "--out", folder)
    content = json.loads((folder / "gpu.json").read_text("utf-8"))
    return content["steps"], (folder / "gpu.md").read_text("utf-8")


def test_every_step_is_done_and_told(rehearsal):
    steps, text = rehearsal
    assert list(steps) == list(gpu.STEPS)
    for name, step in steps.items():
        assert step["state"] == "done" and step["tables"] and step["title"] in text, name


def test_every_golden_checkpoint_is_compared_in_both_precisions(rehearsal):
    rows = rehearsal[0]["golden"]["tables"]["golden"]
    names = {file.parent.name for file in GOLDEN.glob("*/expected.json")}
    assert {(row["checkpoint"], row["dtype"]) for row in rows} == {
        (name, dtype) for name in names for dtype in ("float32", "bfloat16")
    }
    assert all(row["right"] for row in rows if row["dtype"] == "float32")


def test_a_crowd_answers_as_alone_and_leaves_nothing(rehearsal):
    exact, _ = rehearsal[0]["crowd"]["tables"]["answers in a crowd"]
    assert exact["the same alone"] == exact["answers"] and exact["left behind"] == 0


def test_both_servers_answer_all_their_clients(rehearsal):
    rows = rehearsal[0]["HTTP"]["tables"]["clients"]
    assert {row["server"] for row in rows} == {"ours", "textbook"}
    assert all(row["failed"] == 0 and row["tokens/s"] > 0 for row in rows)


def run(folder, monkeypatch, **steps) -> dict:
    """A run with steps of the test's own."""
    made = {name: gpu.Step(name, step, 3) for name, step in steps.items()}
    monkeypatch.setattr(gpu, "STEPS", made)
    settings = argparse.Namespace(preset="tiny", device="cpu", dtype="auto", minutes=1, out=folder)
    gpu.main(settings)
    return json.loads((folder / "gpu.json").read_text("utf-8"))["steps"]


def fails(figures, settings):
    figures.add("rows", before=1)
    raise ValueError("on purpose")


def hangs(figures, settings):
    figures.add("rows", before=1)
    time.sleep(600)


def breaks(figures, settings):
    os._exit(3)


def works(figures, settings):
    figures.add("rows", speed=1234.5)


def test_a_step_that_fails_hangs_or_breaks_is_told_and_the_next_goes_on(tmp_path, monkeypatch):
    steps = run(tmp_path, monkeypatch, fails=fails, hangs=hangs, breaks=breaks, works=works)
    assert steps["fails"]["state"] == "failed" and "on purpose" in steps["fails"]["error"]
    assert steps["hangs"]["state"] == "cut after 3 s"
    assert steps["breaks"]["state"] == "failed: its process ended with 3"
    assert steps["works"]["state"] == "done"
    for name in ("fails", "hangs"):  # what they had found is kept
        assert steps[name]["tables"]["rows"] == [{"before": 1}]
    assert "1,234" in (tmp_path / "gpu.md").read_text("utf-8")


def test_a_cut_of_the_whole_keeps_each_row_that_was_there(tmp_path, monkeypatch):
    content = []

    def looks(figures, settings):
        figures.add("rows", number=1)
        content.append(json.loads((tmp_path / "gpu.json").read_text("utf-8")))
        figures.add("looks", rows=len(content[0]["steps"]["looks"]["tables"]["rows"]))

    assert run(tmp_path, monkeypatch, looks=looks)["looks"]["tables"]["looks"] == [{"rows": 1}]
    assert {file.name for file in tmp_path.iterdir()} == {"gpu.json", "gpu.md"}


def event(start: int, end: int):
    return SimpleNamespace(time_range=SimpleNamespace(start=start, end=end))


def test_the_time_between_kernels_is_that_in_which_none_runs():
    overlapping = [event(0, 4000), event(2000, 5000), event(3000, 3500), event(9000, 10000)]
    found = gpu_profile.gaps(overlapping)
    assert found["ms/step"] * gpu_profile.STEPS == pytest.approx(10)
    assert found["between ms"] * gpu_profile.STEPS == pytest.approx(4)
    assert found["busy share"] == pytest.approx(0.6)
