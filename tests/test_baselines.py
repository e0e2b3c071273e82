"""What fine-tuning is held against: the base with and without examples, and a previous run, item by item."""

import json
import math
import shutil

import numpy as np
import pytest
from conftest import CHAT_ROWS, chat, run, save_base, write_recipe, write_rows
from sample_run import sample_report, write_run
from test_classification import ROWS as LABELLED

from ftune import folder, recipe
from ftune.console.summary import print_report
from ftune.evaluate import Scored, TokenLosses
from ftune.folder import RunFolder
from ftune.report import pages, render, verdict
from ftune.run import evidence, preview, task
from ftune.run.evidence import Evidence, gates
from ftune.run.inputs import require

DATA = {"train": "train.jsonl", "test": "test.jsonl", "deduplicate": "off", "decontaminate": False}
FAST = {"max_steps": 2}


def scored(*scores):
    return Scored([""] * len(scores), [float(score) for score in scores])


def test_the_gain_is_over_the_better_baseline():
    zero, few = scored(0, 0, 1), scored(1, 0, 1)
    assert task.better(zero, few) == ("few_shot", few)
    assert task.better(few, zero) == ("zero_shot", few)
    assert task.better(zero, zero)[0] == "zero_shot", "of equal ones the plainer"
    assert task.better(zero, None) == ("zero_shot", zero)


def test_intervals_of_scores_without_bounds_claim_nothing_of_what_was_not_seen():
    assert task.interval([0.5] * 20) is not None, "within [0, 1] others may have been missed"
    assert task.interval([0.5] * 20, bounded=False) is None
    assert task.gain_interval([1.0] * 9, [3.0] * 9, bounded=False) is None
    low, high = task.interval([-5.0, 0.0, 80.0, 3.0] * 9, bounded=False)
    assert -5 < low < 19.5 < high < 80
    assert not task.are_bounded([0.0, 1.0], [1.5])
    assert task.are_bounded([0.0, 1.0], [0.5])


# Loss and perplexity


@pytest.mark.parametrize("metric", ["loss", "perplexity"])
def test_run_measured_by_tokens_has_intervals_and_gates_from_above(workspace, metric):
    write_rows(workspace / "test.jsonl", CHAT_ROWS[:8])
    limits = {"min_score": 1e6, "min_gain": 0.0}
    report, path = run(workspace, data=DATA, training={"max_steps": 12}, evaluation={"metric": metric}, gates=limits)
    found = report["task"]
    assert found["tuned"] < found["zero_shot"]
    assert found["gain"] == pytest.approx(found["zero_shot"] - found["tuned"])
    assert found["ci95"][0] < found["gain"] < found["ci95"][1]
    for who in ("zero_shot", "tuned"):
        assert found["intervals"][who][0] < found[who] < found["intervals"][who][1]
    assert (found["few_shot"], found["baseline"]) == (None, "zero_shot")
    assert metric in found["reason"]
    assert all(gate["passed"] for gate in report["gates"][:2])
    assert f"Tuned {metric} {found['tuned']:.2f}" in report["verdict"]
    assert " beats zero-shot " in report["verdict"]
    assert "lower is better" in (path / "report.html").read_text()
    assert found["tuned"] > 1.5 if metric == "perplexity" else found["tuned"] < 4.7


def test_perplexity_is_the_exponential_of_the_loss(workspace):
    write_rows(workspace / "test.jsonl", CHAT_ROWS[:8])
    tasks = [
        run(workspace, overwrite=True, data=DATA, training=FAST, evaluation={"metric": metric})[0]["task"]
        for metric in ("loss", "perplexity")
    ]
    loss, perplexity = tasks
    for who in ("zero_shot", "tuned"):
        assert perplexity[who] == pytest.approx(math.exp(loss[who]))
        assert perplexity["intervals"][who] == pytest.approx([math.exp(end) for end in loss["intervals"][who]])
    assert perplexity["gain"] == pytest.approx(perplexity["zero_shot"] - perplexity["tuned"])


@pytest.mark.parametrize(
    ("metric", "limit", "passed"),
    [
        ("loss", 1.0, True),
        ("loss", 0.4, False),
        ("perplexity", 0.4, False),
        ("rouge_l", 0.4, True),
        ("bleu", 1.0, False),
    ],
)
def test_min_score_is_at_most_where_lower_is_better(workspace, metric, limit, passed):
    settings = recipe.load(write_recipe(workspace, gates={"min_score": limit}))
    (gate,) = gates(settings, Evidence({"metric": metric, "tuned": 0.5}, None, []))
    assert gate["passed"] is passed
    assert evidence.at_most(0.5, 0.5)


def test_infinite_perplexity_is_told_and_not_written(monkeypatch):
    losses = iter([TokenLosses(np.array([9e3, 8e3]), np.array([2.0, 3.0])), TokenLosses(np.ones(2), np.ones(2))])
    monkeypatch.setattr("ftune.evaluate.token_losses", lambda *_: next(losses))
    found = task.loss_task("perplexity", None, None, [None] * 2, None)
    assert (found["zero_shot"], found["tuned"], found["gain"], found["ci95"]) == (
        None,
        pytest.approx(math.e),
        None,
        None,
    )
    assert found["reason"].endswith("the perplexity is not finite: inf before, 2.718281828459045 after")
    json.dumps(found, allow_nan=False)
    assert verdict({"task": found}).startswith("Tuned perplexity 2.72, with no baseline to compare")


# A run by each metric of answers


def test_run_by_json_tells_the_fields(workspace):
    rows = [chat(f"say {i}", json.dumps({"a": 1, "b": i})) for i in range(4)]
    write_rows(workspace / "test.jsonl", rows)
    report, path = run(workspace, data=DATA, training=FAST, evaluation={"metric": "json_match"})
    assert report["task"]["fields"] == {"a": 0.0, "b": 0.0}
    for name in ("report.md", "report.html"):
        assert "field of the answer" in (path / name).read_text()


def test_run_by_bleu_tells_that_of_all_items(workspace):
    write_rows(workspace / "test.jsonl", CHAT_ROWS[:4])
    evaluation = {"metric": "bleu", "few_shot": 2, "max_new_tokens": 4}
    report, _ = run(workspace, data=DATA, training=FAST, evaluation=evaluation)
    found = report["task"]["corpus_bleu"]
    assert set(found) == {"zero_shot", "few_shot", "tuned", "signature"}
    assert all(0 <= found[who] <= 1 for who in ("zero_shot", "few_shot", "tuned"))
    assert report["task"]["baseline"] in ("zero_shot", "few_shot")


def test_expected_answer_without_json_is_told_before_training(workspace):
    write_rows(workspace / "test.jsonl", [chat("q", "{}"), chat("r", "{oops"), chat("s", "[1]")])
    problems = preview.check(recipe.load(write_recipe(workspace, data=DATA, evaluation={"metric": "json_match"})))
    assert [(one["what"], one["where"]) for one in problems["problems"]] == [
        ("the expected answer is not JSON", "data.test (row test.jsonl:2)")
    ]


# A previous run


@pytest.fixture
def first(workspace):
    """A workspace with a finished run of 8 test rows, called `first`."""
    write_rows(workspace / "test.jsonl", [*CHAT_ROWS[:7], CHAT_ROWS[0]])
    run(workspace, data=DATA, training=FAST, output={"dir": "first"})
    return workspace


def problem_of(workspace, previous="first", **sections):
    evaluation = {"previous": previous, "few_shot": 0, "max_new_tokens": 8, **sections.pop("evaluation", {})}
    settings = recipe.load(write_recipe(workspace, **{"data": DATA, **sections}, evaluation=evaluation))
    found = preview.check(settings)["problems"]
    assert len(found) == 1, found
    assert found[0]["where"].startswith("evaluation.previous")
    return found[0]["what"]


def test_previous_run_is_paired_by_item(first):
    """The previous scores are made up, so that the pairs can be computed by hand; order, file and ids differ."""
    samples = folder.read_json_lines(first / "first" / "samples.jsonl")
    for i, sample in enumerate(samples):
        sample["scores"]["tuned"] = i / 10
        sample["row_id"] = f"elsewhere:{i}"
    folder.write_json_lines(first / "first" / "samples.jsonl", samples)
    rows = (first / "test.jsonl").read_text().splitlines()
    (first / "other.jsonl").write_text("\n".join(reversed(rows)) + "\n")
    sections = {"data": {**DATA, "test": "other.jsonl"}, "training": FAST}
    sections["evaluation"] = {"previous": "first", "few_shot": 0, "max_new_tokens": 8}
    paired = require(recipe.load(write_recipe(first, **sections))).previous
    assert paired.scores == [0.0, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.7], "the row that is there twice has two partners"
    report, path = run(first, **sections)
    found, now = report["task"]["previous"], folder.read_json_lines(path / "samples.jsonl")
    assert set(found) == {"run", "tuned", "interval", "gain", "ci95"}
    assert found["run"] == str(first / "first")
    assert found["tuned"] == pytest.approx(0.35)
    before = {sample["prompt"]: sample["scores"]["tuned"] for sample in samples[1:7]}
    gains = [row["scores"]["tuned"] - before[row["prompt"]] for row in now if row["prompt"] in before]
    twice = [row["scores"]["tuned"] for row in now if row["prompt"] not in before]
    assert found["gain"] == pytest.approx((sum(gains) + sum(twice) - 0.0 - 0.7) / 8)
    assert found["ci95"][0] <= found["gain"] <= found["ci95"][1]
    assert "gain over the previous run first, 0.35:" in report["verdict"]
    for name in ("report.md", "report.html"):
        assert "previous run first" in (path / name).read_text()


def test_a_run_is_compared_with_itself_as_equal(first):
    report, _ = run(first, data=DATA, training=FAST, evaluation={"previous": "first"}, output={"dir": "second"})
    found = report["task"]["previous"]
    assert found["gain"] == 0.0
    assert found["tuned"] == report["task"]["tuned"]


def test_what_cannot_be_compared_is_refused_by_check(first):
    assert "no finished run" in problem_of(first, previous="nowhere")
    assert "no finished run" in problem_of(first, previous="base")
    assert "scored by exact_match, this one is by contains" in problem_of(first, evaluation={"metric": "contains"})
    assert "keeps no answers" in problem_of(first, evaluation={"metric": "loss"})
    assert "no test set" in problem_of(first, data={**DATA, "test": None})
    assert "the run itself" in problem_of(first, output={"dir": "first"})
    write_rows(first / "test.jsonl", [*CHAT_ROWS[:6], chat("another", "a"), CHAT_ROWS[0]])
    told = problem_of(first)
    assert "other items: 7 of this run's 8 test rows are among its 8" in told
    assert "another" in told
    write_rows(first / "test.jsonl", CHAT_ROWS[:7])
    assert "other items: 7 of this run's 7 test rows are among its 8" in problem_of(first)
    changed = [
        {**row, "messages": [row["messages"][0], {"role": "assistant", "content": "z"}]} for row in CHAT_ROWS[:8]
    ]
    write_rows(first / "test.jsonl", changed)
    assert "other items: 0 of" in problem_of(first), "the expected answers differ"


def test_broken_files_of_a_previous_run_are_told(first):
    samples = first / "first" / "samples.jsonl"
    whole = samples.read_text()
    samples.write_text(whole + "{")
    assert "not valid JSON" in problem_of(first)
    samples.write_text(whole.replace('"tuned"', '"turned"'))
    assert "not what a run writes: KeyError" in problem_of(first)
    samples.write_text(whole)
    report = first / "first" / "report.json"
    folder.write_json(report, {**folder.read_json(report), "task": None})
    assert "scored by nothing" in problem_of(first)


def test_previous_run_of_another_function_is_refused(workspace):
    write_rows(workspace / "test.jsonl", CHAT_ROWS[:4])
    judge = workspace / "judge.py"
    judge.write_text("def score(expected, answer): return 7")
    own = {"metric": "judge.py:score", "few_shot": 0, "max_new_tokens": 8}
    run(workspace, data=DATA, training=FAST, evaluation=own, output={"dir": "first"})
    report, _ = run(workspace, data=DATA, training=FAST, evaluation={**own, "previous": "first"})
    assert report["task"]["previous"] | {"run": ""} == {
        "run": "",
        "tuned": 7,
        "interval": None,
        "gain": 0,
        "ci95": None,
    }
    shutil.rmtree(workspace / "run")
    judge.write_text("def score(expected, answer): return 8")
    assert "not the file that scored" in problem_of(workspace, evaluation=own)


@pytest.mark.parametrize("metric", ["accuracy", "f1"])
def test_previous_run_of_a_classifier_is_compared_by_its_labels(tmp_path, metric):
    save_base(tmp_path / "base")
    write_rows(tmp_path / "train.jsonl", LABELLED)
    write_rows(tmp_path / "test.jsonl", LABELLED[:6])
    sections = {"objective": {"name": "classification"}, "data": DATA}
    run(tmp_path, **sections, training=FAST, evaluation={"metric": metric}, output={"dir": "first"})
    samples = folder.read_json_lines(tmp_path / "first" / "samples.jsonl")
    for sample in samples:
        sample["tuned"], sample["scores"]["tuned"] = "gone", 0.0
    folder.write_json_lines(tmp_path / "first" / "samples.jsonl", samples)
    report, _ = run(
        tmp_path, **sections, training={"max_steps": 40}, evaluation={"metric": metric, "previous": "first"}
    )
    found = report["task"]["previous"]
    assert found["tuned"] == 0.0, "a label that no longer exists is wrong"
    assert found["gain"] == pytest.approx(report["task"]["tuned"])
    assert found["gain"] > 0.5
    assert found["ci95"] is None or found["ci95"][0] > 0


# What is said of it


def told(**changes):
    report = sample_report()
    report["task"] = {**report["task"], **changes}
    return report


def test_the_verdict_says_when_prompting_reaches_it():
    base = {"zero_shot": 0.1, "few_shot": 0.9, "tuned": 0.91, "intervals": {}}
    over = {**base, "baseline": "few_shot", "gain": 0.01}
    assert "gain +0.01 [-0.02, 0.04]: few-shot already reaches it;" in verdict(told(**over, ci95=[-0.02, 0.04]))
    assert "few-shot already reaches it" in verdict(told(**{**over, "gain": -0.1}, ci95=[-0.2, -0.01]))
    assert "few-shot already reaches it" in verdict(told(**{**over, "gain": 0.0}, ci95=None))
    assert "already" not in verdict(told(**over, ci95=[0.002, 0.02]))
    assert "already" not in verdict(told(**{**over, "baseline": "zero_shot"}, ci95=[-0.02, 0.04]))


@pytest.mark.parametrize("value", [None, [0.01, 0.2]])
def test_the_previous_run_is_shown_everywhere(tmp_path, value, capsys):
    previous = {"run": "/runs/<b>old", "tuned": 0.912, "interval": value, "gain": 0.0577, "ci95": value}
    report = told(previous=previous)
    assert "; gain over the previous run <b>old, 0.91: +0.06" in verdict(report)
    render(write_run(tmp_path, report))
    page = (tmp_path / "report.html").read_text()
    assert "<b>old" not in page
    assert "Gain over the previous run &lt;b&gt;old: <strong>+0.058</strong>" in page
    assert 'class="bar previous"' in page
    assert "| gain over the previous run | +0.058 |" in (tmp_path / "report.md").read_text()
    print_report(report, None)
    shown = capsys.readouterr().out
    assert "previous run" in shown
    assert "+0.058" in shown


def test_fields_that_fail_are_shown_worst_first(tmp_path, capsys):
    report = told(metric="json_match", fields={"tool": 1.0, "mi|nutes": 0.4, "city": 0.9}, unexpected_fields=0.25)
    render(write_run(tmp_path, report))
    text = (tmp_path / "report.md").read_text()
    rows = [line for line in text.splitlines() if line.endswith(("| 0.400 |", "| 0.750 |", "| 0.900 |"))]
    assert [line.split(" | ")[0] for line in rows] == ["| mi\\|nutes", "| (no unexpected field)", "| city"]
    print_report(report, None)
    assert "mi|nutes" in capsys.readouterr().out
    assert "<td>mi|nutes</td><td>0.400</td>" in (tmp_path / "report.html").read_text()


def test_bars_stand_on_zero_wherever_it_is():
    """By hand: the axis of scores from -50 to 150 goes from -52.5 to 157.5."""
    found = {
        key: (bar["left"], bar["share"], bar["whisker"])
        for bar in pages._scores(
            {
                "metric": "judge.py:score",
                "zero_shot": -50.0,
                "few_shot": None,
                "tuned": 105.0,
                "intervals": {"tuned": [52.5, 150.0]},
            }
        )
        for key in [bar["key"]]
    }
    assert found["zero_shot"] == (pytest.approx(2.5 / 210), pytest.approx(50 / 210), None)
    assert found["few_shot"] == (None, None, None)
    assert found["tuned"][:2] == (pytest.approx(0.25), pytest.approx(0.5))
    assert found["tuned"][2] == pytest.approx([0.5, 202.5 / 210])
    (bar, *_) = pages._scores({"metric": "exact_match", "zero_shot": 0.25, "tuned": 0.5})
    assert (bar["left"], bar["share"]) == (0.0, 0.25)
    (bar, *_) = pages._scores({"metric": "loss", "zero_shot": 0.5, "tuned": 0.25})
    assert bar["share"] == pytest.approx(1 / 1.05)


def test_run_folder_of_a_previous_run_needs_its_samples(first):
    run_folder = RunFolder(first / "first")
    run_folder.samples.unlink()
    assert "no finished run" in problem_of(first)
