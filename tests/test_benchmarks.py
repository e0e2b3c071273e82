"""The benchmarks still run, and the sides they compare still train the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_speed_is_compared_between_equal_trainings(tmp_path):
    """It ends with an error where losses differ; nothing is said of the times here."""
    results = tmp_path / "speed.json"
    command = [sys.executable, BENCHMARKS / "speed.py", "--cases", "quick", "--runs", "1", "--results", results]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    [found] = json.loads(results.read_text())["results"]
    assert set(found["figures"]) == {"ftune", "trl, padding-free"}
    assert 0 < max(found["losses_apart"].values()) < 1e-5


def test_what_only_a_gpu_can_answer_is_asked_rightly(tmp_path):
    """The same cases on tiny shapes: both sides of each start from the same loss."""
    results = tmp_path / "gpu.json"
    command = [sys.executable, "-W", "ignore", BENCHMARKS / "gpu.py", "--reduced", "--results", results]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(results.read_text())
    assert found["packing"]["packed_rows_differ_by"] < 1e-5
    assert all(head["seconds"] > 0 for head in found["heads"])
    assert all(one["seconds"] > 0 and one["apart"] < 1e-5 for one in found["attention"])
    assert len(found["cases"]) == 6
    for sides in found["cases"].values():
        losses = [side["losses"] for side in sides.values()]
        assert all(one == pytest.approx(losses[0], rel=1e-3) for one in losses)
