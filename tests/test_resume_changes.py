"""Trust cases 87 to 90: what may change before a run is resumed, and what that does; the rest is refused key by key."""

import json
import re
import shutil

import pytest
from conftest import CHAT_ROWS, REPOSITORY, adapter_bytes, metrics, run, write_recipe, write_rows
from resume_kit import Stage, make_place, outcome, sections_of
from test_run_resume import Killed, kill_after

from ftune import folder, recipe, schedule
from ftune.errors import UserError
from ftune.recipe.loading import leaves_of
from ftune.run import changes
from ftune.run.training import train_run

MAY = changes.FREE | changes.MEASURING | changes.SELECTING | changes.ROUNDING | changes.LENGTH
STEPS = {"training": {"checkpoint_every": 1}}
OTHER = {
    "model.dtype": "bfloat16",
    "model.attention": "eager",
    "method.rank": 2,
    "method.dropout": 0.3,
    "method.target_modules": "attention",
    "data.packing": False,
    "data.max_length": 100,
    "data.deduplicate": "exact",
    "data.decontaminate": "remove",
    "training.batch_size": 3,
    "training.learning_rate": 0.02,
    "training.optimizer": "sgd",
    "training.schedule": "linear",
    "training.seed": 1,
    "training.warmup": 0.1,
    "training.weight_decay": 0.1,
    "training.max_grad_norm": 0.5,
    "evaluation.probe": "general",
}
"""A second value of keys that shape training."""


@pytest.fixture
def killed(workspace, monkeypatch):
    """A run that was killed after the third of its four steps."""
    with monkeypatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(Killed):
            run(workspace, **STEPS)
    return workspace


def whole(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def loaded(place, *overrides):
    return recipe.load(write_recipe(place, **STEPS), overrides)


def test_every_change_that_would_bend_the_run_is_told_at_once_key_by_key(killed):
    """Case 87: old and new value, exit 2, nothing touched."""
    before = whole(killed / "run")
    overrides = [f"{key}={json.dumps(value)}" for key, value in OTHER.items()]
    with pytest.raises(UserError) as caught:
        train_run(loaded(killed, *overrides), resume=True)
    assert caught.value.exit_code == 2
    assert whole(killed / "run") == before
    told = [problem.what.removeprefix("the recipe changed since this run began: ") for problem in caught.value.problems]
    assert [change.partition(":")[0] for change in sorted(told)] == sorted(OTHER)
    assert {"training.learning_rate: 0.01 -> 0.02", "method.rank: 4 -> 2", "data.packing: true -> false"} <= set(told)


def test_a_key_may_change_only_if_somebody_said_so(killed):
    """A key that is added to the recipe is refused until it is listed; what is listed is a key."""
    settings = loaded(killed)
    keys = dict(leaves_of(settings.model_dump(mode="json")))
    keys |= {f"evaluation.{name}": None for name in type(settings.evaluation).model_fields}
    assert keys.keys() >= MAY
    assert keys.keys() >= changes.PATHS - {"method.start_from"} | set(OTHER)
    for key in keys.keys() - MAY:
        assert changes.obstacle(recipe.Change(key, 1, 2), settings, settings), key
    for key in MAY - changes.LENGTH:
        assert not changes.obstacle(recipe.Change(key, 1, 2), settings, settings), key


def test_what_is_measured_on_the_way_or_selects_may_not_change_then(killed):
    watched = loaded(killed, "data.validation=0.2")
    selecting = loaded(killed, "data.validation=0.2", "training.select=best")
    for key in changes.MEASURING:
        assert changes.obstacle(recipe.Change(key, 1, 2), watched, watched), key
    for key in changes.SELECTING:
        assert not changes.obstacle(recipe.Change(key, 1, 2), watched, watched), key
        assert changes.obstacle(recipe.Change(key, 1, 2), selecting, selecting), key


def test_the_docs_tell_what_may_change():
    page = (REPOSITORY / "docs" / "resume.md").read_text(encoding="utf-8")
    table = page.split("## What may change")[1].split("\n## ")[0]
    assert set(re.findall(r"`((?:evaluation|gates|output|training)\.\w+)`", table)) - {"training.select"} == MAY


def test_what_does_not_touch_training_may_change_and_is_recorded(killed, capsys):
    overrides = ["training.keep_checkpoints=1", "evaluation.few_shot=1", "training.checkpoint_every=2"]
    train_run(loaded(killed, *overrides), resume=True)
    shown = capsys.readouterr().err
    told = ["training.checkpoint_every: 1 -> 2", "training.keep_checkpoints: 2 -> 1", "evaluation.few_shot: 0 -> 1"]
    assert all(f"changed since this run began: {change}" in shown for change in told)
    _, clean = run(killed, output={"dir": "clean"}, **STEPS)
    assert adapter_bytes(killed / "run") == adapter_bytes(clean)
    assert folder.read_json_lines(killed / "run" / "changes.jsonl") == [{"after_step": 3, "changes": told}]
    assert recipe.load(killed / "run" / "recipe.yaml").training.keep_checkpoints == 1
    assert "changes.jsonl" in folder.read_json(killed / "run" / "manifest.json")["files"]
    assert [path.name for path in (killed / "run" / "checkpoints").iterdir()] == ["step-000004"]


def test_files_may_move_but_not_change(killed):
    """A run that goes on elsewhere."""
    for name in ("base", "train.jsonl"):
        (killed / "elsewhere").mkdir(exist_ok=True)
        shutil.move(killed / name, killed / "elsewhere" / name)
    moved = {"model": {"base": "elsewhere/base"}, "data": {"train": "elsewhere/train.jsonl"}, **STEPS}
    write_rows(killed / "elsewhere" / "train.jsonl", CHAT_ROWS[1:])
    with pytest.raises(
        UserError, match=r"changed since this run began: data train.jsonl: [0-9a-f]{12} -> [0-9a-f]{12}"
    ):
        run(killed, resume=True, **moved)
    write_rows(killed / "elsewhere" / "train.jsonl", CHAT_ROWS)
    config = killed / "elsewhere" / "base" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(UserError, match=r"changed since this run began: base config.json: "):
        run(killed, resume=True, **moved)
    config.write_text(config.read_text()[:-1])
    _, path = run(killed, resume=True, **moved)
    assert str(recipe.load(path / "recipe.yaml").model.base).endswith("elsewhere/base")
    assert not (path / "changes.jsonl").exists()
    _, clean = run(killed, output={"dir": "clean"}, **moved)
    assert adapter_bytes(path) == adapter_bytes(clean)


def test_a_template_that_changed_is_told(killed):
    config = killed / "base" / "chat_template.jinja"
    config.write_text(config.read_text().replace("user", "user") + "{# other #}")
    with pytest.raises(UserError, match=r"changed since this run began: template [0-9a-f]{12} -> [0-9a-f]{12}"):
        run(killed, resume=True, **STEPS)


def test_another_environment_is_told_and_no_obstacle(killed, monkeypatch, capsys):
    monkeypatch.setattr(changes.torch, "get_num_threads", lambda: 7)
    run(killed, resume=True, **STEPS)
    told = " ".join(capsys.readouterr().err.split())
    assert "another environment than at the checkpoint (threads 1 -> 7): the same run, to rounding" in told


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_longer_training_follows_the_schedule_of_the_new_length(tmp_path, method):
    """Case 87: from the step on where it goes on, the learning rate is the new length's; and that run is exact too."""
    place = make_place(tmp_path / "place")
    short, long = (Stage(place, sections_of(method, max_steps=total, checkpoint_every=1)) for total in (4, 8))
    short.train(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    long.train(tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("step-*[78]"):
        shutil.copytree(path, tmp_path / "again" / "checkpoints" / path.name)
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-000008")
    shutil.copy(tmp_path / "run" / "metrics.jsonl", tmp_path / "again")
    long.train(tmp_path / "again")
    assert outcome(tmp_path / "again", 8) == outcome(tmp_path / "run", 8)
    planned = long.settings.training
    shape = (planned.learning_rate, planned.schedule, planned.warmup)
    expected = [schedule.learning_rate(step, 4 if step <= 4 else 8, *shape) for step in range(1, 9)]
    assert [line["learning_rate"] for line in metrics(tmp_path / "run")] == expected


def test_a_finished_run_can_be_made_longer(workspace):
    data = {"data": {"train": "train.jsonl"}, "training": {"max_steps": None, "epochs": 1, "checkpoint_every": 1}}
    _, path = run(workspace, **data)
    with pytest.raises(UserError, match=r"training.epochs: 1.0 -> 0.5") as caught:
        run(workspace, resume=True, data=data["data"], training=data["training"] | {"epochs": 0.5})
    assert "longer, not shorter" in str(caught.value)
    with pytest.raises(UserError, match="training would end at step 2 instead of 6"):
        run(workspace, resume=True, data=data["data"], training={"max_steps": 2, "checkpoint_every": 1})
    assert folder.RunFolder(path).is_complete
    report, _ = run(workspace, resume=True, data=data["data"], training=data["training"] | {"epochs": 1.5})
    assert [line["step"] for line in metrics(path)] == list(range(1, 10))
    assert "already_complete" not in report
    assert folder.read_json_lines(path / "changes.jsonl") == [
        {"after_step": 6, "changes": ["training.epochs: 1.0 -> 1.5"]}
    ]
    # The schedule is constant, so this is the run that was planned so from the beginning.
    _, planned = run(workspace, data=data["data"], training=data["training"] | {"epochs": 1.5}, output={"dir": "b"})
    assert adapter_bytes(path) == adapter_bytes(planned)


def test_a_finished_run_says_so(workspace, capsys):
    """Case 90."""
    _, path = run(workspace)
    before = whole(path)
    report, _ = run(workspace, resume=True)
    assert "already complete at step 4/4, nothing to do" in capsys.readouterr().err
    assert report["already_complete"] is True
    with pytest.raises(UserError, match=r"complete, so evaluation.few_shot: 0 -> 3 would change nothing") as caught:
        run(workspace, resume=True, evaluation={"few_shot": 3})
    assert "ftune eval" in str(caught.value)
    assert whole(path) == before


def test_what_is_no_run_is_not_resumed(workspace):
    """Case 89: weights alone are not enough."""
    _, path = run(workspace)
    for part, told in {
        "run/adapter": "only weights, no optimizer/rng state",
        "base": "only weights, no optimizer/rng state",
        "run/checkpoints/step-000004": "this is one checkpoint of a run",
        "nowhere": "no run to resume",
        "train.jsonl": "this is a file, not a folder",
    }.items():
        with pytest.raises(UserError, match=told) as caught:
            run(workspace, resume=True, output={"dir": part})
        assert caught.value.exit_code == 2
    with pytest.raises(UserError, match="this is a file, not a folder"):
        run(workspace, output={"dir": "train.jsonl"})
    shutil.rmtree(path / "adapter" / "x", ignore_errors=True)
    assert not (workspace / "nowhere").exists()


def test_lines_of_steps_that_are_gone_are_told(killed):
    lines = (killed / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    for kept, told in ((lines[1:], r"steps \[1\] are not there"), ([], r"steps \[1, 2, 3\] are not there")):
        (killed / "run" / "metrics.jsonl").write_text("".join(kept))
        with pytest.raises(UserError, match=told):
            run(killed, resume=True, **STEPS)
    (killed / "run" / "metrics.jsonl").write_text("".join([lines[0], "{?\n", *lines[1:]]))
    with pytest.raises(UserError, match=r"not valid JSON"):
        run(killed, resume=True, **STEPS)
    (killed / "run" / "metrics.jsonl").write_text("".join([*lines, '{"step": 4, "lo']))
    run(killed, resume=True, **STEPS)
    assert [line["step"] for line in metrics(killed / "run")] == [1, 2, 3, 4]
