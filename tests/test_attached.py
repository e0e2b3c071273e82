"""What a method goes on is told before training, from the real attach. Numbers: trust cases."""

import json

import pytest
from conftest import CHAT_ROWS, ftune, run, save_base, write_recipe, write_rows

from ftune import folder, plan, recipe
from ftune.run.inputs import training_plan

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EXPECTED = [
    ({"name": "lora"}, dict.fromkeys(NAMES, 2), [0, 1]),
    ({"name": "lora", "target_modules": ["q_proj", ".*mlp.*"], "layers": [1]},
     {"q_proj": 1, "gate_proj": 1, "up_proj": 1, "down_proj": 1}, [1]),
    ({"name": "lora", "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
     {"v_proj": 2, "lm_head": 1}, [0, 1]),
    ({"name": "dora", "target_modules": "attention"}, dict.fromkeys(NAMES[:4], 2), [0, 1]),
    ({"name": "ia3"}, {"k_proj": 2, "v_proj": 2, "down_proj": 2}, [0, 1]),
    ({"name": "bottleneck"}, {"self_attn": 2, "mlp": 2}, [0, 1]),
    ({"name": "bitfit"}, {"q_proj": 2, "k_proj": 2, "v_proj": 2}, [0, 1]),
    ({"name": "prompt_tuning"}, {}, []),
    ({"name": "full"}, {}, []),
]  # fmt: skip


@pytest.mark.parametrize(("method", "targets", "layers"), EXPECTED, ids=lambda value: str(value)[:40])
def test_plan_counts_the_modules_that_a_method_goes_on(tmp_path, method, targets, layers):
    """Case 54."""
    save_base(tmp_path / "base", "qwen2")
    loaded = recipe.load(write_recipe(tmp_path, method=method))
    found = plan.make_plan(loaded, loaded.method, training_plan(loaded, None))
    assert (found.targets, found.layers) == (targets, layers)
    document = found.as_dict()
    assert (document["targets"], document["layers"]) == (targets, layers)
    assert bool(found.told_targets()) == bool(targets)


def test_training_and_check_tell_it(workspace, capsys):
    """Case 54: on screen before the first step, and in plan.json."""
    write_rows(workspace / "train.jsonl", CHAT_ROWS)
    method = {"name": "lora", "rank": 4, "target_modules": ["q_proj", "k_proj"], "layers": [1]}
    _, path = run(workspace, method=method)
    told = " ".join(capsys.readouterr().err.split())
    assert "lora on 2 modules: q_proj 1, k_proj 1 (layers 1)" in told
    assert told.index("lora on 2 modules") < told.index("step 1/4")
    assert folder.read_json(path / "plan.json")["targets"] == {"q_proj": 1, "k_proj": 1}
    done = ftune("check", workspace / "recipe.yaml")
    assert "2 modules in 1 layers: q_proj 1, k_proj 1" in " ".join(done.stdout.split())
    assert json.loads(ftune("check", workspace / "recipe.yaml", "--json").stdout)["plan"]["layers"] == [1]


def test_layers_are_told_in_ranges():
    assert plan.ranges([0, 1, 2, 5, 7, 8]) == "0 to 2, 5, 7 to 8"
