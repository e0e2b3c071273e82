"""Evaluations on the way: what they measure, which step is kept, and that they do not bend the run."""

import math

import pytest
import torch
from conftest import CHAT_ROWS, DROPOUT, adapter_bytes, chat, metrics, run, save_base, write_recipe, write_rows
from test_run_resume import Killed, kill_after

from ftune import folder
from ftune.errors import UserError
from ftune.recipe import load
from ftune.run import afterwards, targets, watching
from ftune.run.training import train_run
from ftune.run.watching import choose


def line(step, loss=1.0, score=None, drop=None):
    return {"step": step, "validation_loss": loss, "validation_score": score, "worst_drop": drop, "general_loss": None}


def test_best_is_the_lowest_loss_and_never_what_is_no_number():
    """Case 91: 3, 1, nan, 2, lower is better."""
    lines = [line(0, 0.5), *(line(step, loss) for step, loss in enumerate((3.0, 1.0, math.nan, 2.0), start=1))]
    assert choose(lines, "loss", None).step == 2
    assert choose([line(1, None), line(2, 4.0)], "loss", None).step == 2
    assert choose([line(0, 1.0), line(1, None)], "loss", None) is None


def test_best_is_the_highest_score_where_one_was_measured_then_the_lowest_loss_then_the_earliest():
    lines = [line(1, 0.1, 0.2), line(2, 0.9, 0.8), line(3, 0.5, 0.8), {"step": 3, "loss": 0.0}]
    assert choose(lines, "exact_match", None).step == 3
    assert choose(lines, "loss", None).step == 1
    assert choose([line(1, None, 0.0), line(2, 0.5, 0.0), line(3, 0.5, 0.0)], "exact_match", None).step == 2


def test_a_step_that_forgot_too_much_is_not_best_unless_all_did():
    lines = [line(1, score=0.5, drop=0.02), line(2, score=0.7, drop=0.05), line(3, score=0.9, drop=0.3)]
    assert choose(lines, "exact_match", None).step == 3
    within = choose(lines, "exact_match", 0.05)
    assert within.step == 2
    assert "among 2 of 3 that forgot no more than 0.05" in within.reason
    none = choose(lines, "exact_match", 0.01)
    assert none.step == 1
    assert "every evaluated step forgot more than 0.01; this one least, 0.02" in none.reason


PROBE = [chat("say a", "a"), chat("say bb", "b"), {"text": "a b c d"}]


@pytest.fixture
def watched(workspace):
    """A workspace whose runs are evaluated: validation rows, and a probe."""
    write_rows(workspace / "validation.jsonl", CHAT_ROWS[:6])
    write_rows(workspace / "probe.jsonl", PROBE)
    return workspace


SECTIONS = {
    "method": DROPOUT,
    "data": {"validation": "validation.jsonl"},
    "training": {"max_steps": 8, "optimizer": "adamw", "evaluate_every": 2, "checkpoint_every": 3},
    "evaluation": {"probe": "probe.jsonl"},
}


def with_(**training):
    return {**SECTIONS, "training": {**SECTIONS["training"], **training}}


def evaluations(path):
    return [line for line in folder.read_json_lines(path / "metrics.jsonl") if "validation_loss" in line]


def test_every_evaluation_measures_both_and_the_path_begins_with_the_base(watched):
    report, _ = run(watched, **SECTIONS)
    assert [entry["step"] for entry in report["path"]] == [0, 2, 4, 6, 8]
    first, *_, last = report["path"]
    assert first["worst_drop"] == 0.0
    assert report["path"][1]["validation_loss"] < first["validation_loss"]
    assert all(entry["score"] is not None and entry["general_loss"] is not None for entry in report["path"])
    assert report["selection"] == {"select": "last", "step": 8, "reason": "the last step"}
    # What was measured last on the way is what is measured afterwards of the files.
    assert last["general_loss"] == pytest.approx(report["forgetting"]["general_loss"]["after"], abs=1e-5)
    assert first["general_loss"] == pytest.approx(report["forgetting"]["general_loss"]["before"], abs=1e-5)
    assert last["worst_drop"] == report["forgetting"]["worst_drop"]


@pytest.mark.parametrize("name", ["lora", "prefix_tuning", "full", "adalora"])
def test_evaluations_do_not_bend_the_run(watched, name):
    sections = {**SECTIONS, "method": {"name": name} | ({"dropout": 0.1} if name in ("lora", "adalora") else {})}
    _, path = run(watched, output={"dir": "watched"}, **sections)
    _, plain = run(watched, output={"dir": "plain"}, **{**sections, "data": {}, "evaluation": {}})
    assert [line["loss"] for line in metrics(path)] == [line["loss"] for line in metrics(plain)]
    weights = "merged/model.safetensors" if name == "full" else "adapter/adapter_model.safetensors"
    assert (path / weights).read_bytes() == (plain / weights).read_bytes()


def scripted(monkeypatch, scores):
    """The score of each evaluation, by step; all else is measured."""
    monkeypatch.setattr(watching.Watch, "_score", lambda self, model, step, features, loss: scores.get(step))


SCORES = {2: 0.1, 4: 0.9, 6: math.nan, 8: 0.3}


def test_best_is_kept_saved_and_measures_again_what_it_measured(watched, monkeypatch):
    """Case 91: the best and the newest checkpoint stay, and the adapter on disk is the best step's."""
    scripted(monkeypatch, SCORES)
    report, path = run(watched, **with_(select="best", keep_checkpoints=1))
    assert report["selection"]["step"] == 4
    assert sorted(entry.name for entry in (path / "checkpoints").iterdir()) == ["step-000004", "step-000008"]
    logged = {entry["step"]: entry for entry in report["path"]}
    again = afterwards.load_tuned(targets.resolve(path), torch.device("cpu"))[0]
    monkeypatch.undo()
    loaded = load(path / "recipe.yaml")
    from ftune.run.inputs import require

    watch = watching.Watch(loaded, require(loaded), [], "exact_match", None)
    measured = watch.line(again, 4, None)
    assert measured["validation_loss"] == pytest.approx(logged[4]["validation_loss"], abs=1e-6)
    assert abs(measured["validation_loss"] - logged[8]["validation_loss"]) > 1e-4
    assert report["artefact"]["reload_max_diff"] == 0.0


def test_resumed_runs_keep_the_same_step_and_bytes(watched, monkeypatch):
    scripted(monkeypatch, SCORES)
    clean_report, clean = run(watched, output={"dir": "clean"}, **with_(select="best", keep_checkpoints=1))
    for step in (1, 4, 5, 8):
        with monkeypatch.context() as patch:
            kill_after(patch, step)
            with pytest.raises(Killed):
                run(watched, output={"dir": f"killed-{step}"}, **with_(select="best", keep_checkpoints=1))
        sections = with_(select="best", keep_checkpoints=1)
        report, path = run(watched, resume=True, output={"dir": f"killed-{step}"}, **sections)
        assert adapter_bytes(path) == adapter_bytes(clean)
        assert report["selection"] == clean_report["selection"]
        assert report["path"] == clean_report["path"]
        assert evaluations(path) == evaluations(clean)


def test_best_needs_validation_rows(workspace):
    with pytest.raises(UserError, match="the best step is chosen on validation rows"):
        train_run(load(write_recipe(workspace, training={"select": "best"})))
    assert not (workspace / "run").exists()


@pytest.mark.parametrize("method", ["lora", "linear_probe"])
@pytest.mark.parametrize("metric", ["accuracy", "f1"])
def test_classifiers_are_scored_by_their_labels(tmp_path, method, metric):
    save_base(tmp_path / "base")
    rows = [{"text": f"{'abcd'[i % 4] * 3} {i}", "label": "xy"[i % 2]} for i in range(24)]
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "held.jsonl", rows[:10])
    report, _ = run(
        tmp_path,
        objective={"name": "classification"},
        method={"name": method},
        data={"validation": "held.jsonl", "test": "held.jsonl"},
        training={"max_steps": 6, "learning_rate": 0.02, "evaluate_every": 3, "select": "best"},
        evaluation={"metric": metric, "few_shot": 0},
    )
    chosen = next(entry for entry in report["path"] if entry["step"] == report["selection"]["step"])
    assert chosen["score"] == pytest.approx(report["task"]["tuned"], abs=1e-9)
    assert chosen["score"] == max(entry["score"] for entry in report["path"][1:])


@pytest.mark.parametrize("count", [3, 4, 5, 6, 11])
def test_as_many_rows_are_answered_as_is_said(monkeypatch, count):
    monkeypatch.setattr(watching, "MOST_ANSWERED", 4)
    monkeypatch.setattr(watching.evaluate, "has_answer", lambda example: True)
    rows = watching.chosen_rows(list(range(count)))
    assert len(rows) == len(set(rows)) == min(count, 4)


def test_many_validation_rows_are_answered_in_part_and_it_is_said(watched, monkeypatch, capsys):
    monkeypatch.setattr(watching, "MOST_ANSWERED", 4)
    run(watched, **SECTIONS)
    assert "4 of 6 validation rows are answered at each evaluation" in capsys.readouterr().err
