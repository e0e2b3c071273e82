"""`ftune verify RECIPE --resume` kills a real run of the recipe, resumes it and compares bytes."""

import pytest
from conftest import DROPOUT, write_recipe

from ftune import checkpoint
from ftune.errors import RunError, UserError
from ftune.run import resume_proof


def test_a_killed_run_of_the_recipe_goes_on_to_the_same_bytes_and_a_flipped_bit_is_seen(workspace, monkeypatch):
    compare = resume_proof._compare

    def compare_both_ways(straight, resumed, after, steps):
        found = list(compare(straight, resumed, after, steps))
        yield from found
        file = checkpoint.path_of(resumed.checkpoints, steps) / checkpoint.OPTIMIZER
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        again = list(compare(straight, resumed, after, steps))
        assert [check.name for check in again if not check.passed] == ["optimizer"]
        assert "differ after steps 4" in next(check.told for check in again if check.name == "optimizer")

    monkeypatch.setattr(resume_proof, "_compare", compare_both_ways)
    path = write_recipe(workspace, method=DROPOUT, gates={"min_score": None})
    before = sorted(workspace.rglob("*"))
    found = resume_proof.prove_resume(path, ["training.batch_size=5"], 4)
    assert found["passed"] is True
    assert len(found["checks"]) == 5
    assert sorted(workspace.rglob("*")) == before, "something was written beside the recipe"


def test_what_is_wrong_with_the_recipe_is_told_before_anything_is_trained(workspace):
    path = write_recipe(workspace)
    with pytest.raises(UserError, match="learning_rat"):
        resume_proof.prove_resume(path, ["training.learning_rat=1"], 4)
    with pytest.raises(UserError, match="one step"):
        resume_proof.prove_resume(path, [], 1)
    (workspace / "train.jsonl").unlink()
    with pytest.raises(RunError, match="exit code 2"):
        resume_proof.prove_resume(path, [], 4)
