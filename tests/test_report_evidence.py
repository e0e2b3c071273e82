"""What the report shows of learning against forgetting: the path, the strengths, the items that flipped."""

import re
from pathlib import Path
from typing import Any

import pytest
from sample_run import NEW_PARTS, probe_row, sample_probe, sample_report, write_run

from ftune import folder
from ftune.report import render
from ftune.report.flips import MOST_SHOWN, choose_flips
from ftune.report.tradeoff import MOST_ROWS, path_chart, path_points, shown_entries, strength_charts


def pages_of(path: Path, report: dict[str, Any]) -> tuple[str, str]:
    run = write_run(path, report)
    render(run)
    return (run / "report.html").read_text(encoding="utf-8"), (run / "report.md").read_text(encoding="utf-8")


# The path


def test_the_path_joins_the_evaluations_in_order_and_marks_base_kept_and_gate() -> None:
    drawn = path_chart(sample_report())
    assert drawn is not None
    by_kind = {kind: path for _, kind, path in drawn.paths}
    places = [float(x) for x in re.findall(r"[ML]([\d.]+) ", by_kind["line"])]
    assert places == pytest.approx([1000 * drop / 0.13 for drop in (0, 0.02, 0.05, 0.09, 0.12, 0.13)], abs=0.1)
    assert by_kind["base dots"].startswith("M0.0 1000.0")
    assert by_kind["kept-one dots"].startswith(f"M{1000 * 0.09 / 0.13:.1f} 70.0")
    assert [label.text for label in drawn.labels] == ["base", "step 225, kept", "step 375"]
    assert drawn.limit is not None
    assert drawn.limit.place == pytest.approx(100 * 0.1 / 0.13)
    assert drawn.across == "worst drop"


def test_the_path_goes_back_where_training_forgot_less() -> None:
    path = [{"step": step, "score": 0.5, "worst_drop": drop} for step, drop in ((0, 0.0), (1, 0.4), (2, -0.1))]
    drawn = path_chart({"path": path[::-1]})
    assert drawn is not None
    assert [float(x) for x in re.findall(r"[ML]([\d.]+) ", drawn.paths[0][2])] == [200.0, 1000.0, 0.0]
    assert drawn.limit is None
    same = path_chart({"path": [{"step": step, "score": 0.0, "worst_drop": 0.0} for step in (0, 1)]})
    assert same is not None, "nothing learned and nothing forgotten is a point, not a crash"


@pytest.mark.parametrize(
    ("path", "points"),
    [
        ([], {}),
        (
            [{"step": 0, "score": 0.1, "worst_drop": None}, {"step": 5, "score": 0.2, "worst_drop": 0.1}],
            {0: 0.0, 5: 0.1},
        ),
        ([{"step": 5, "score": None, "worst_drop": 0.1}, {"step": 9, "score": 0.2, "worst_drop": None}], {}),
        ([{"step": 5, "validation_loss": 1.0}], {}),
    ],
)
def test_what_was_not_measured_is_no_point(path: list[Any], points: dict[int, float]) -> None:
    assert {step: drop for step, (drop, _) in path_points(path).items()} == points
    assert (path_chart({"path": path}) is None) == (len(points) < 2)


def test_a_long_path_is_a_short_table() -> None:
    path = [{"step": step, "score": 0.1, "worst_drop": 0.0} for step in range(0, 5000, 10)]
    report = {**sample_report(), "path": path, "selection": {"select": "best", "step": 1230, "reason": ""}}
    steps = [entry["step"] for entry in shown_entries(report)]
    assert len(steps) in (MOST_ROWS, MOST_ROWS + 1)
    assert (steps[0], steps[-1]) == (0, 4990)
    assert 1230 in steps
    assert len(shown_entries({"path": path[:1]})) == 1


# Strengths


def test_strengths_are_two_curves_in_one_chart_or_in_two() -> None:
    report = sample_report()
    (both,) = strength_charts(report)
    assert [name for name, _, _ in both.paths if name] == ["score (exact match)", "worst drop"]
    assert both.across == "strength"
    for entry in report["strengths"]:
        entry["score"] *= 4
    assert [one.title for one in strength_charts(report)] == ["Score", "Worst drop"], "a loss has an axis of its own"
    for entry in report["strengths"]:
        entry["worst_drop"] = None
    assert [one.title for one in strength_charts(report)] == ["Score"]
    assert strength_charts({"strengths": None}) == []


# Flips


def test_lost_items_come_first_and_no_skill_takes_all_places() -> None:
    found = choose_flips(sample_probe())
    assert found.counts == [("sorting", 26, 0), ("addition", 3, 0), ("facts", 0, 2)]
    assert (found.lost, found.gained) == (29, 2)
    assert len(found.shown) == MOST_SHOWN
    assert [flip.suite for flip in found.shown] == ["sorting"] * 9 + ["addition"] * 3
    fewer = choose_flips(sample_probe()[20:])
    assert [flip.is_lost for flip in fewer.shown] == [True] * 9 + [False] * 2
    assert fewer.shown[-1].is_choice


def test_items_that_stayed_or_were_not_scored_are_no_flips() -> None:
    kept = probe_row("facts", 1, "2 + 2 =", "4", "4", "4")
    assert (
        choose_flips([kept, {**kept, "scores": None}, {**kept, "scores": {"before": 1.0, "after": None}}]).shown == []
    )
    graded = {**kept, "scores": {"before": 0.8, "after": 0.5}}
    assert choose_flips([graded]).lost == 1


# The pages


def test_the_report_shows_what_learning_cost(tmp_path: Path) -> None:
    page, text = pages_of(tmp_path, sample_report())
    assert "What did learning cost?" in page
    assert "Kept: step 225 (training.select: best); the best score with a worst drop of at most 0.1." in page
    assert page.count("✗ lost") == MOST_SHOWN
    assert "29 lost, 2 gained: sorting 26 lost, 0 gained; addition 3 lost, 0 gained; facts 0 lost, 2 gained." in page
    assert '<tr class="total"><td>all items</td><td>730</td>' in page
    assert "1.9400 nats per token" in page, "the KL on the task's prompts"
    assert "| 225 ✅ | 0.930 | 0.090 | 0.210 |" in text
    assert "| 0 (base) | 0.000 | 0.000 | 3.110 |" in text
    assert "| 0.5 | 0.580 | [0.530, 0.620] | 0.030 |" in text
    assert "| all items (n = 730) | 0.953 → 0.912 |" in text
    assert "Items that changed: 42 lost, 12 gained." in text


def test_a_run_from_before_looks_as_it_did(tmp_path: Path) -> None:
    report = {name: part for name, part in sample_report().items() if name not in NEW_PARTS}
    del report["forgetting"]["overall"], report["forgetting"]["kl_to_base_on_task"]
    run = write_run(tmp_path, report)
    (run / "probe.jsonl").unlink()
    render(run)
    page, text = (run / "report.html").read_text(), (run / "report.md").read_text()
    for words in ("What did learning cost?", "Kept:", "whose score changed", "all items", "task's prompts", "prefer?"):
        assert words not in page
    for words in ("## Path", "## Strengths", "## Review", "all items", "Items that changed"):
        assert words not in text
    assert "None" not in page + text


@pytest.mark.parametrize("value", [None, [], {}])
@pytest.mark.parametrize("part", NEW_PARTS)
def test_each_new_part_may_be_empty(tmp_path: Path, part: str, value: Any) -> None:
    page, text = pages_of(tmp_path, {**sample_report(), part: value})
    assert "None" not in page + text


def test_every_value_of_a_new_part_may_be_missing(tmp_path: Path) -> None:
    report = sample_report()
    report["path"] = [{"step": 0}, {"step": 3, "score": 0.5, "validation_loss": None}]
    report["strengths"] = [{"strength": 0.5, "score": None, "ci95": None, "worst_drop": None}]
    report["selection"] = {"select": "last", "step": None, "reason": None}
    report["forgetting"]["overall"] = dict.fromkeys(report["forgetting"]["overall"])
    report["forgetting"]["suites"][0] |= {"before": None, "after": None, "drop": None, "verdict": None}
    page, text = pages_of(tmp_path, report)
    assert "not measured" in page
    assert "None" not in page + text


def test_hostile_flips_stay_text(tmp_path: Path) -> None:
    hostile = "</div><script>alert(1)</script>\x1b[31m\u202e"
    run = write_run(tmp_path, {**sample_report(), "selection": {"select": hostile, "step": 1, "reason": hostile}})
    folder.write_json_lines(run / "probe.jsonl", [probe_row(hostile, 1, hostile, hostile, hostile, "x")])
    render(run)
    page = (run / "report.html").read_text()
    assert "<script" not in page
    assert "\x1b" not in page
    assert "✗ lost" in page
