"""The calibration of the statistics in short; benchmarks/calibration.py is the long form, and its results are kept."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FILE = Path(__file__).parent.parent / "benchmarks" / "calibration.py"


@pytest.fixture(scope="module")
def calibration() -> Any:
    spec = importlib.util.spec_from_file_location("calibration", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["calibration"] = module
    spec.loader.exec_module(module)
    return module


def test_what_is_drawn_has_the_truth_it_is_judged_by(calibration: Any) -> None:
    generator = np.random.default_rng(0)
    for population in calibration.POPULATIONS:
        for drop in (0.0, 0.05):
            before, after = population.draw(generator, 400_000, drop)
            assert before.mean() == pytest.approx(population.mean, abs=0.004), population.name
            assert before.mean() - after.mean() == pytest.approx(drop, abs=0.004), population.name
            changed = 1.0 if population.churn == 1 else (before != after).mean()
            assert changed == pytest.approx(population.churn, abs=0.006) or drop, population.name


def test_the_promises_hold_in_few_trials(calibration: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SIZES", (55,))
    monkeypatch.setattr(calibration, "RESAMPLES", 500)
    trials = 60
    results = {name: list(part(trials, 1)) for name, part in calibration.PARTS.items() if name != "family_power"}
    assert not calibration.broken(results, trials)


def test_a_promise_that_is_broken_is_told(calibration: Any) -> None:
    row = {"population": "p", "n": 50, "few_changes": False, "few_scores": False}
    good = {**row, "false_alarms": 0.05, "power": 0.8, "covered": 0.95, "covered_score": 0.95}
    assert not calibration.broken({"part": [good]}, 1000)
    for bad in ({"false_alarms": 0.08}, {"power": 0.7}, {"covered": 0.9}, {"covered": 1.0}, {"covered_score": 0.9}):
        assert len(calibration.broken({"part": [good | bad]}, 1000)) == 1, bad
    assert not calibration.broken({"part": [good | {"covered": 1.0, "few_changes": True}]}, 1000)
    assert calibration.broken({"part": [good | {"covered": 0.9, "few_changes": True}]}, 1000)


def test_the_kept_results_are_of_a_whole_run_and_hold(calibration: Any) -> None:
    kept = json.loads(calibration.RESULTS.read_text(encoding="utf-8"))
    assert kept["trials"] >= 1000
    assert {row["population"] for row in kept["one_suite"]} == {p.name for p in calibration.POPULATIONS}
    results = {name: kept[name] for name in calibration.PARTS}
    assert calibration.broken(results, kept["trials"]) == kept["broken"] == []
