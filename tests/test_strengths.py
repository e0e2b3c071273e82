"""What was trained at several strengths: 0 is the base, 1 all of it, and nothing in between is trained again."""

import pytest
from conftest import CHAT_ROWS, chat, ftune, run, save_base, write_rows

from ftune import folder
from ftune.errors import UserError
from ftune.run import afterwards, targets

PROBE = [chat("say a", "a"), chat("say bb", "b"), {"text": "a b c d"}]
AT = (1.0, 0.0, 0.5)


@pytest.fixture
def measured(workspace):
    write_rows(workspace / "test.jsonl", CHAT_ROWS[:6])
    write_rows(workspace / "probe.jsonl", PROBE)
    return workspace


SECTIONS = {
    "data": {"test": "test.jsonl"},
    "training": {"max_steps": 6, "optimizer": "adamw", "learning_rate": 0.02},
    "evaluation": {"probe": "probe.jsonl", "metric": "loss"},
}


@pytest.mark.parametrize("method", ["lora", "ia3", "vera", "full", "bottleneck"])
def test_strength_0_is_the_base_and_1_the_tuned_model(measured, method):
    report, path = run(measured, method={"name": method}, **SECTIONS)
    found = afterwards.evaluate_target(targets.resolve(path), AT)["strengths"]
    assert [row["strength"] for row in found] == [0.0, 0.5, 1.0]
    nothing, half, everything = found
    assert nothing["score"] == report["task"]["zero_shot"]
    assert (nothing["worst_drop"], nothing["kl_to_base"]) == (0.0, 0.0)
    assert nothing["general_loss"] == report["forgetting"]["general_loss"]["before"]
    assert everything["score"] == report["task"]["tuned"]
    assert everything["ci95"] == report["task"]["intervals"]["tuned"]
    assert everything["kl_to_base"] == pytest.approx(report["forgetting"]["kl_to_base"], rel=1e-6)
    # Not always in between: at this rate the divergence hardly changes from a quarter of the strength on.
    assert half["kl_to_base"] not in (nothing["kl_to_base"], everything["kl_to_base"])
    assert half["score"] != everything["score"]


def test_a_classifier_is_measured_at_each_strength(tmp_path):
    save_base(tmp_path / "base")
    rows = [{"text": f"{'abcd'[i % 4] * 3} {i}", "label": "xy"[i % 2]} for i in range(24)]
    write_rows(tmp_path / "train.jsonl", rows)
    sections = {"objective": {"name": "classification"}, "data": {"test": "train.jsonl"}}
    report, path = run(tmp_path, **sections, evaluation={"metric": "accuracy", "few_shot": 0})
    (found,) = afterwards.evaluate_target(targets.resolve(path), [1.0])["strengths"]
    assert found["score"] == report["task"]["tuned"]
    assert found["worst_drop"] is None


def test_what_has_no_strength_is_refused_by_name(measured):
    _, path = run(measured, method={"name": "prefix_tuning"}, **SECTIONS)
    with pytest.raises(UserError, match="a prefix has no strength that could be scaled"):
        afterwards.evaluate_target(targets.resolve(path), [0.5])


def test_strengths_stay_in_the_run_and_its_checksums_hold(measured):
    _, path = run(measured, **SECTIONS)
    done = ftune("eval", path, "--strengths", "0,0.5,1", cwd=measured)
    assert done.returncode == 0, done.stderr
    assert "Learning against forgetting, by strength" in done.stdout
    before = folder.read_json(path / "report.json")["strengths"]
    assert len(before) == 3
    assert ftune("eval", path, cwd=measured).returncode == 0
    assert folder.read_json(path / "report.json")["strengths"] == before
    assert ftune("verify", path, cwd=measured).returncode == 0


def test_files_that_changed_are_not_measured_and_recorded_as_the_runs_own(measured):
    _, path = run(measured, **SECTIONS)
    weights = path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(UserError, match="changed since the run wrote it: adapter/adapter_model"):
        afterwards.evaluate_target(targets.resolve(path))


@pytest.mark.parametrize("text", ["0,half", "0;1", "nan", "0,,1"])
def test_a_list_that_is_none_is_refused(workspace, text):
    done = ftune("eval", workspace / "base", "--strengths", text)
    assert done.returncode == 2
    assert "write them with commas between" in done.stderr
