"""The schema: every key is described, and the page, the JSON Schema and the starters agree with it."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import MINIMAL
from pydantic import ValidationError

from ftune.errors import UserError
from ftune.recipe import Recipe, documentation, json_schema, load, starter
from ftune.recipe.problems import every_key
from ftune.recipe.writing import TASKS
from ftune.settings import METHOD_NAMES, OBJECTIVE_NAMES, available

ROOT = Path(__file__).parent.parent

# DESIGN's table of keys: the names that users type.
KEYS = {
    "model": "base revision dtype quantization double_quantization attention chat_template trust_remote_code",
    "method": "name layers start_from rank alpha dropout target_modules rank_pattern alpha_pattern"
    " modules_to_save rank_stabilized init learning_rate_ratio initial_rank target_rank orthogonal_weight"
    " initial_fraction final_fraction feedforward_modules size placement activation virtual_tokens projection"
    " depth init_text",
    "objective": "name",
    "data": "train validation test format columns max_length too_long packing deduplicate decontaminate on_bad_row",
    "training": "learning_rate epochs max_steps batch_size micro_batch_tokens optimizer schedule warmup"
    " weight_decay max_grad_norm gradient_checkpointing parallel seed evaluate_every checkpoint_every"
    " keep_checkpoints select",
    "evaluation": "metric previous few_shot max_new_tokens review probe",
    "gates": "min_score min_gain max_forgetting",
    "output": "dir save trackers",
}


def test_every_key_of_the_design_exists_and_no_other() -> None:
    assert set(every_key()) == {f"{section}.{name}" for section, names in KEYS.items() for name in names.split()}
    assert list(Recipe.model_fields) == list(KEYS)


def test_every_key_is_described() -> None:
    for name, field in {**every_key(), **Recipe.model_fields}.items():
        assert field.description, f"{name} has no description"
        assert "|" not in field.description
    for name, entry in {**METHOD_NAMES, **OBJECTIVE_NAMES}.items():
        assert entry.description, name


def test_the_committed_page_of_keys_is_up_to_date() -> None:
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == documentation(), (
        "write it anew: see CONTRIBUTING.md"
    )


def test_the_json_schema_describes_what_is_accepted() -> None:
    schema = json_schema()
    json.dumps(schema, allow_nan=False)
    assert schema["required"] == ["model", "method", "data"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["method"]["anyOf"][0] == {
        "type": "string",
        "enum": list(available(METHOD_NAMES)),
    }
    assert "required" not in schema["$defs"]["TrainingSection"]
    assert schema["$defs"]["LoraSettings"]["properties"]["rank"]["minimum"] == 1


@pytest.mark.parametrize("method", available(METHOD_NAMES))
@pytest.mark.parametrize("task", TASKS)
def test_a_starter_is_accepted_and_explains_every_key_it_shows(write: Any, method: str, task: str) -> None:
    text = starter(method, task)
    recipe = load(write(text))
    assert (recipe.method.name, recipe.training.epochs) == (method, 3.0)
    lines = [line for line in text.splitlines() if "max_steps" not in line]
    uncommented = [line.replace("# ", "", 1) if line.startswith(("  # ", "# gates")) else line for line in lines]
    everything = load(write("\n".join(uncommented)))
    assert everything.method == recipe.method, "a commented default is not the default"
    assert everything.training == recipe.training
    assert all("#" in line for line in text.splitlines() if line.startswith("  "))


def test_a_starter_for_something_unknown_is_refused() -> None:
    with pytest.raises(UserError, match="no method 'adapter'"):
        starter("adapter", "chat")
    with pytest.raises(UserError, match="no task 'vision'"):
        starter("lora", "vision")


def test_a_recipe_cannot_be_changed(write: Any) -> None:
    recipe = load(write(MINIMAL))
    with pytest.raises(ValidationError):
        recipe.training.seed = 1
