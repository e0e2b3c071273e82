"""Trackers: what they are told, what becomes of it when a run is stopped, and that they cannot harm it."""

import importlib.util
import json
import struct

import pytest
from conftest import CHAT_ROWS, adapter_bytes, metrics, run, write_rows
from test_run_resume import Killed, kill_after

from ftune import folder, trackers
from ftune.errors import RunError, UserError

needs = {
    name: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed here")
    for name in trackers.FOLDERS
}
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def nowhere_else(monkeypatch, tmp_path):
    """Whatever the machine is set up for: these tests send nothing, and leave nothing behind."""
    for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in trackers.QUIET | trackers.PATIENCE:
        monkeypatch.setenv(name, (trackers.QUIET | trackers.PATIENCE)[name])
    monkeypatch.setenv("HOME", str(tmp_path))


def tensorboard_scalars(path):
    """{tag: [(step, value), ...]} of all event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(path / "tensorboard"))
    read.Reload()
    found = {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    return found, read


def wandb_records(content):
    """The records of a .wandb file: LevelDB's log format, blocks of 32 KiB, (crc, length, type) before each piece."""
    from wandb.proto import wandb_internal_pb2

    offset, pieces = 7, b""
    while offset + 7 <= len(content):
        length, kind = struct.unpack("<HB", content[offset + 4 : offset + 7])
        left = 32768 - offset % 32768
        if left < 7 or kind == 0:
            offset += left
            continue
        pieces += content[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pieces)
            yield record
            pieces = b""


def wandb_lines(path):
    """Every line of figures in the offline files, oldest file first; the configuration; the ids of the runs."""
    import wandb

    wandb.teardown()  # its own process closes the file a moment after the run was told to end
    lines, config, ids = [], {}, set()
    for file in sorted((path / "wandb").glob("offline-run-*/*.wandb")):
        for record in wandb_records(file.read_bytes()):
            items = record.history.item
            if items:
                lines.append({(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items})
            for item in [*record.config.update, *record.run.config.update]:
                config[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
            if record.run.run_id:
                ids.add(record.run.run_id)
    return lines, config, ids


def mlflow_runs(path):
    import mlflow

    client = mlflow.MlflowClient((path / "mlflow").as_uri())
    (experiment,) = [e for e in client.search_experiments() if e.name == "ftune"]
    return client, client.search_runs([experiment.experiment_id])


@quiet
@needs["tensorboard"]
def test_tensorboard_hears_every_step_evaluation_and_the_report(workspace):
    write_rows(workspace / "held.jsonl", CHAT_ROWS[:3])
    sections = {"data": {"validation": "held.jsonl", "test": "held.jsonl"}, "training": {"evaluate_every": 2}}
    report, path = run(workspace, output={"trackers": ["tensorboard"]}, **sections)
    scalars, read = tensorboard_scalars(path)
    lines = metrics(path)
    for key in ("loss", "grad_norm", "learning_rate", "supervised_tokens"):
        assert scalars[f"training/{key}"] == [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines]
    assert [step for step, _ in scalars["evaluation/validation_loss"]] == [0, 2, 4]
    assert scalars["report/task/tuned"] == [(4, pytest.approx(report["task"]["tuned"]))]
    assert "report/cost/peak_memory_bytes" in scalars
    (text,) = read.Tensors("recipe/text_summary")
    assert "learning_rate: 0.01" in text.tensor_proto.string_val[0].decode()
    manifest = folder.read_json(path / "manifest.json")
    assert manifest["trackers"] == {"tensorboard": "followed to the end"}
    for file in (path / "tensorboard").iterdir():
        file.write_bytes(file.read_bytes() + b"more")
    assert folder.changed_files(path, manifest["files"]) == [], "what a tracker writes later breaks no checksum"


@quiet
@needs["wandb"]
def test_wandb_keeps_the_run_offline_in_the_run_folder(workspace):
    _, path = run(workspace, output={"trackers": ["wandb"]})
    lines, config, ids = wandb_lines(path)
    losses = {line["_step"]: line["training/loss"] for line in lines if "training/loss" in line}
    assert losses == {line["step"]: pytest.approx(line["loss"]) for line in metrics(path)}
    assert any("report/artefact/reload_max_diff" in line and line["_step"] == 4 for line in lines)
    assert config["training.learning_rate"] == 0.01
    assert len(ids) == 1


@quiet
@needs["mlflow"]
def test_mlflow_keeps_the_run_in_the_run_folder(workspace):
    _, path = run(workspace, output={"trackers": ["mlflow"]})
    client, (found,) = mlflow_runs(path)
    history = client.get_metric_history(found.info.run_id, "training/loss")
    assert [(m.step, m.value) for m in history] == [(line["step"], line["loss"]) for line in metrics(path)]
    assert found.data.params["training.learning_rate"] == "0.01"
    assert "report/cost/tokens" in found.data.metrics
    assert (found.info.status, found.info.run_name) == ("FINISHED", "run")


@quiet
@needs["tensorboard"]
@needs["wandb"]
@needs["mlflow"]
def test_a_resumed_run_goes_on_in_the_same_tracker_runs(workspace, monkeypatch):
    """Killed after step 5, two steps after a checkpoint, then after step 4: no step is told twice, but for the last one
    before a kill, which may not have got out."""
    sections = {
        "training": {"checkpoint_every": 3, "max_steps": 7},
        "output": {"trackers": ["tensorboard", "wandb", "mlflow"]},
    }
    for step in (5, 4):
        with monkeypatch.context() as patch:
            kill_after(patch, step)
            with pytest.raises(Killed):
                run(workspace, resume=step == 4, **sections)
    _, path = run(workspace, resume=True, **sections)
    _, plain = run(workspace, training=sections["training"], output={"dir": "plain"})
    assert adapter_bytes(path) == adapter_bytes(plain)
    scalars, _ = tensorboard_scalars(path)
    assert [step for step, _ in scalars["training/loss"]] == [1, 2, 3, 4, 5, 6, 7]
    lines, _, ids = wandb_lines(path)
    told = [line["_step"] for line in lines if "training/loss" in line]
    assert len(ids) == 1
    client, (found,) = mlflow_runs(path)
    history = [m.step for m in client.get_metric_history(found.info.run_id, "training/loss")]
    assert sorted(told) == sorted(history) == [1, 2, 3, 4, 5, 5, 6, 7]
    assert found.info.status == "FINISHED"


class Broken:
    """Fails from its third line on, as a network does."""

    def __init__(self):
        self.told = []

    def log(self, values, step):
        if len(self.told) == 2:
            raise ConnectionError("the server is gone\nand more")
        self.told.append(step)

    def store_init_configuration(self, values):
        pass


def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(workspace, monkeypatch, capsys):
    broken = Broken()
    monkeypatch.setitem(trackers.STARTS, "wandb", lambda *_: broken)
    monkeypatch.setattr(trackers, "check", lambda names: None)
    _, plain = run(workspace, output={"dir": "plain"})
    _, path = run(workspace, output={"trackers": ["wandb"]})
    assert broken.told == [1, 2]
    assert capsys.readouterr().err.count("failed: ConnectionError: the server is gone") == 1
    assert adapter_bytes(path) == adapter_bytes(plain)
    said = folder.read_json(path / "manifest.json")["trackers"]
    assert said == {"wandb": "failed: ConnectionError: the server is gone"}


def test_a_tracker_that_cannot_start_ends_the_run_before_it_trains(workspace, monkeypatch):
    def refuse(*_):
        raise ConnectionError("no route")

    monkeypatch.setitem(trackers.STARTS, "wandb", refuse)
    monkeypatch.setattr(trackers, "check", lambda names: None)
    with pytest.raises(RunError, match="wandb cannot be started: ConnectionError: no route"):
        run(workspace, output={"trackers": ["wandb"]})
    assert not (workspace / "run" / "metrics.jsonl").exists()


def test_a_tracker_that_is_not_installed_is_an_error_before_anything_is_written(workspace, monkeypatch):
    """accelerate would leave it out with a line in a log nobody reads."""
    monkeypatch.setattr(trackers, "_is_installed", lambda name: name != "mlflow")
    with pytest.raises(UserError, match="mlflow is not installed here") as caught:
        run(workspace, output={"trackers": ["tensorboard", "mlflow"]})
    assert caught.value.problems[0].hint.startswith("pip install 'ftune[trackers]'")
    assert not (workspace / "run").exists()


def test_a_folder_of_that_name_is_no_installed_tracker(tmp_path, monkeypatch):
    (tmp_path / "not_a_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not trackers._is_installed("not_a_tracker")
    assert trackers._is_installed("json")


@pytest.mark.parametrize(("error", "how"), [(None, "finished"), (RunError("x"), "failed")])
def test_a_tracker_is_told_how_the_run_ended(workspace, monkeypatch, error, how):
    from conftest import write_recipe

    from ftune.recipe import load

    ended = []
    monkeypatch.setitem(trackers.STARTS, "wandb", lambda *_: Broken())
    monkeypatch.setitem(trackers.ENDS, "wandb", lambda tracker, how: ended.append(how))
    recipe = load(write_recipe(workspace, output={"trackers": ["wandb"]}))
    (workspace / "run").mkdir()

    def follow():
        with trackers.following(recipe, folder.RunFolder(workspace / "run"), False, True) as following:
            following.start(0)
            if error:
                raise error

    if error:
        with pytest.raises(RunError):
            follow()
    else:
        follow()
    assert ended == [how]
