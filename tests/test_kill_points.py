"""Trust cases 81, 83 and 84: killed, or refused by the disk, at every file operation of a save. Whole runs too, and
all of their operations: scripts/kill_points."""

import shutil
import signal

import pytest
from kill_kit import (
    FULL,
    KILLED,
    STOPPED,
    Operations,
    check_ended,
    check_two_ended,
    in_child,
    make_run,
    make_shared_run,
    operations_of,
    run_to_end,
    saves_of_two,
    whole_outcome,
)
from resume_kit import Stage, make_place, outcome, sections_of

from ftune import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
STEPS = 2
OPERATIONS = {"open", "write", "fsync", "rename", "mkdir", "chmod", "remove", "rmdir"}
FULL_AT = 3
WHOLE_RUN_AT = 40
"""Each so manieth operation is tried here, and all of them in the script."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """Two steps and two saves: the first into an empty folder, the second replaces it."""
    sections = sections_of("lora", max_steps=STEPS, checkpoint_every=1, keep_checkpoints=1)
    sections["data"] |= {"packing": False}
    return Stage(make_place(tmp_path_factory.mktemp("kills")), sections)


@pytest.fixture(scope="module")
def clean(stage, tmp_path_factory):
    path = tmp_path_factory.mktemp("clean")
    stage.train(path)
    return outcome(path, STEPS)


def steps_in(run):
    return [int(path.name.removeprefix("step-")) for path in checkpoint.folders_in(run / "checkpoints")]


def check_goes_on(stage, run, clean, tmp_path, what):
    """Whatever has a checkpoint's name is one, to the last byte; and the run ends as if nothing had been."""
    for step in steps_in(run):
        checkpoint.at(run / "checkpoints", step)
    log = tmp_path / "resumed.log"
    assert in_child(lambda: stage.train(run), log=log) == 0, f"{what}: {log.read_text()}"
    assert outcome(run, STEPS) == clean, what
    assert not list(run.rglob(".tmp-*")), what
    assert steps_in(run) == [STEPS]


def test_killed_at_every_file_operation_a_run_ends_with_the_same_bytes(stage, clean, tmp_path, record_property):
    """Case 81."""
    run, seen = tmp_path / "run", set()
    names = operations_of(lambda: stage.train(run), run, tmp_path / "log")
    record_property("kill_points", len(names))
    assert len(names) > 40
    assert {name.split()[0] for name in names} == OPERATIONS
    for number, name in enumerate(names, 1):
        shutil.rmtree(run)
        assert in_child(lambda n=number: stage.train(run), Operations(run, number)) == -signal.SIGKILL, name
        seen.add(tuple(steps_in(run)))
        check_goes_on(stage, run, clean, tmp_path, f"{number} {name}")
    assert seen == {(), (1,), (1, 2), (2,)}


def test_a_full_disk_is_told_and_costs_nothing(stage, clean, tmp_path):
    """Case 83: exit 3 with the system's words, the last checkpoint is whole, and with room again the run goes on."""
    run, log = tmp_path / "run", tmp_path / "full.log"
    names = operations_of(lambda: stage.train(run), run, tmp_path / "log")
    for number, name in list(enumerate(names, 1))[::FULL_AT]:
        shutil.rmtree(run)
        log.unlink(missing_ok=True)
        code = in_child(lambda: stage.train(run), Operations(run, number, FULL), log)
        told = log.read_text()
        assert "Traceback" not in told, f"{number} {name}: {told}"
        if code:  # to remove what is not needed any more may fail: it is tried again with the next run
            assert code == 3
            assert "No space left on device" in told
            assert str(run) in told
        check_goes_on(stage, run, clean, tmp_path, f"{number} {name}")


def test_a_save_is_on_disk_before_it_has_its_name_and_before_the_old_one_goes(stage, tmp_path):
    """Case 84: the temporary folder lies beside its target; files, folder and parent are synced, in this order."""
    run = tmp_path / "run"
    names = operations_of(lambda: stage.train(run), run, tmp_path / "log")
    last = [name for name in names if "step-000002" in name]
    temporary = last[0].split()[1]
    assert temporary.startswith("checkpoints/.tmp-step-000002-")
    renamed = names.index(f"rename {temporary}")
    written = {name.split()[1] for name in names if name.startswith(f"write {temporary}/")}
    assert len(written) == 4
    synced = names[:renamed]
    for file in written:
        assert synced.index(f"fsync {file}") > max(i for i, name in enumerate(names) if name == f"write {file}")
    assert f"fsync {temporary}" in synced
    assert names[renamed + 1] == "fsync checkpoints"
    assert names[renamed + 2] == "rename checkpoints/step-000001", "the old checkpoint vanishes at once, and last"


def test_a_whole_run_ended_anywhere_ends_with_the_same_bytes(tmp_path):
    """Cases 81, 83, 85 from the first folder to the last checksum: metrics, adapter, merged model, samples, report."""
    settings = make_run(tmp_path)
    run, log = settings.output.dir, tmp_path / "run.log"
    assert in_child(lambda: run_to_end(settings), log=log) == 0, log.read_text()
    clean = whole_outcome(run)
    shutil.rmtree(run)
    names = operations_of(lambda: run_to_end(settings), run, tmp_path / "operations.log")
    assert {name.split()[1].split("/")[0] for name in names} >= {"lock.json", "checkpoints", "metrics.jsonl"}
    for number in range(7, len(names), WHOLE_RUN_AT):
        how = (KILLED, STOPPED, FULL)[number % 3]
        check_ended(settings, Operations(run, number, how), clean, log, f"{how} at {number}, {names[number - 1]}")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_one_of_which_is_killed_anywhere_in_a_save_end_with_the_same_bytes(tmp_path, parallel):
    """Case 81, with 2 processes: the other one says so and ends with 3, and both go on to the clean run's bytes."""
    settings = make_shared_run(tmp_path, parallel)
    clean, points = saves_of_two(settings, tmp_path)
    for number, name in points[:: 12 if parallel == "ddp" else 24]:
        check_two_ended(settings, number, clean, tmp_path / "two.log", name)
