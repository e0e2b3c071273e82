"""Trust case 80: a run stopped after any of its steps and resumed is the run that was never stopped."""

import copy
import shutil

import pytest
from resume_kit import METHODS, STEPS, Stage, make_place, outcome, sections_of, stopped_at, without_waiting_for_disks

from ftune import batches, checkpoint, folder, schedule, train
from ftune.methods.base import training_state
from ftune.run.inputs import attach_method

CASES = {f"{objective}, {name}": (name, objective) for objective in ("sft", "classification") for name in METHODS}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("exact"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTUNE_CACHE", str(tmp_path / "cache"))


def check_every_stop(stage, tmp_path, monkeypatch, total=STEPS):
    with without_waiting_for_disks(monkeypatch):
        stage.train(tmp_path / "clean", checkpoint_every=1, keep_checkpoints=total)
        clean = outcome(tmp_path / "clean", total)
        assert len(clean[1]) == total
        for step in range(1, total):
            resumed = stopped_at(tmp_path / "clean", step, tmp_path / "resumed")
            stage.train(resumed, checkpoint_every=total)
            assert outcome(resumed, total) == clean, f"stopped after step {step}"
            shutil.rmtree(resumed)
    return clean


@pytest.mark.parametrize("case", CASES)
def test_run_stopped_after_any_step_ends_with_the_same_bytes(place, tmp_path, monkeypatch, case):
    """Parameters, optimizer, learning rates, losses and row ids; two micro-batches a step, dropout, mixed files."""
    method, objective = CASES[case]
    check_every_stop(Stage(place, sections_of(method, objective)), tmp_path, monkeypatch)


@pytest.mark.parametrize("objective", ["sft", "classification"])
def test_without_packing_too(place, tmp_path, monkeypatch, objective):
    sections = sections_of("lora", objective, max_steps=5)
    sections["data"] |= {"packing": False}
    check_every_stop(Stage(place, sections), tmp_path, monkeypatch, total=5)


def test_what_these_runs_are_made_of(place):
    """A test that stops runs proves little if they are too simple: several micro-batches, two epochs, two files."""
    stage = Stage(place, sections_of("lora"))
    plan, examples = stage.inputs.plan, stage.inputs.train.examples
    per_epoch = schedule.steps_per_epoch(len(plan.mixture), 4)
    assert per_epoch < STEPS
    assert len(plan.mixture) % 4
    seen = []
    for step in range(1, STEPS + 1):
        indices = batches.step_indices(step, plan.mixture, 4, plan.seed)
        groups = batches.split([len(examples[i].tokens) for i in indices], plan.micro_batch_tokens)
        assert len(groups) >= min(2, len(indices))
        seen += indices
    assert seen[: len(plan.mixture)] != sorted(seen[: len(plan.mixture)])


def test_restored_state_is_the_saved_state(place, tmp_path):
    """Case 88: moments and adapter are those that were saved, and something is trained."""
    stage = Stage(place, sections_of("adalora"))
    stage.train(tmp_path, checkpoint_every=5, keep_checkpoints=9)
    found = checkpoint.at(tmp_path / "checkpoints", 5)
    model = copy.deepcopy(stage.base)
    attach_method(stage.settings, stage.inputs, model)
    state, optimizer = training_state(model), train.make_optimizer(model, stage.settings.training)
    assert sum(tensor.numel() for tensor in state.values() if tensor.requires_grad) > 0
    checkpoint.restore(found, state, optimizer)
    again = checkpoint.save(tmp_path / "again", 5, state, optimizer, found.inputs, checkpoint.Keep(1))
    assert folder.checksums(again) == folder.checksums(found.path)
