"""A recipe written out again: the same wherever it lies, and what differs between two."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import MINIMAL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftune.recipe import differences, dump, load
from ftune.recipe.problems import every_key
from ftune.settings import LoraSettings

TEXT = st.text(
    st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=("Cs", "Cc")),
    min_size=1,
    max_size=12,
)
MISLEADING = ["no", "off", "null", "~", "1e5", "012", ".5", "<<", "*a", "!a", "- a", "a: b", "# a", "", " ", "true"]
OVERRIDES = st.fixed_dictionaries(
    {},
    optional={
        "training.learning_rate": st.floats(1e-300, 1e300),
        "training.seed": st.integers(0, 2**32 - 1),
        "training.gradient_checkpointing": st.sampled_from(["auto", "half", True, False]),
        "training.max_steps": st.integers(1, 10**9),
        "data.columns": st.dictionaries(TEXT, TEXT | st.sampled_from(MISLEADING), max_size=3),
        "data.test": TEXT.filter(lambda text: not text.startswith("~")),
        "method.layers": st.lists(st.integers(0, 99), min_size=1, max_size=3),
        "method.alpha": st.floats(1e-9, 1e9),
        "method.rank_pattern": st.dictionaries(st.sampled_from(["q_proj", "no", "12", "a.b"]), st.integers(1, 64)),
        "gates.min_score": st.floats(-1, 1) | st.none(),
        "model.base": TEXT.filter(lambda text: not text.startswith("~")),
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=OVERRIDES)
def test_a_dumped_recipe_loads_as_the_same_wherever_it_lies(write: Any, tmp_path: Path, values: dict[str, Any]) -> None:
    (tmp_path / "elsewhere").mkdir(exist_ok=True)
    recipe = load(write(MINIMAL), [f"{key}={json.dumps(value)}" for key, value in values.items()])
    text = dump(recipe)
    again = load(write(text, "elsewhere/resolved.yaml"))
    assert again == recipe
    assert dump(again) == text
    assert differences(recipe, again) == []


@pytest.mark.parametrize("word", MISLEADING)
def test_text_that_looks_like_something_else_stays_text_in_a_dump(write: Any, word: str) -> None:
    recipe = load(write(MINIMAL), [f"data.columns={{prompt: {json.dumps(word)}}}"])
    assert load(write(dump(recipe), "again.yaml")).data.columns == {"prompt": word}


def test_every_key_is_written_out_by_dump(write: Any) -> None:
    written = yaml.safe_load(dump(load(write(MINIMAL))))
    assert {f"{section}.{key}" for section in written for key in written[section]} == {
        key
        for key in every_key()
        if not key.startswith("method.") or key.partition(".")[2] in LoraSettings.model_fields
    }
    assert written["method"]["alpha"] == 32.0


def test_differences_name_key_and_both_values(write: Any) -> None:
    path = write(MINIMAL)
    assert differences(load(path), load(path, ["training.learning_rate=0.01"])) == [
        "training.learning_rate: null -> 0.01"
    ]
    assert "method.rank: 16 -> (absent)" in differences(load(path), load(path, ["method=full"]))
    assert "data.columns: {} -> (absent)" in differences(load(path), load(path, ["data.columns={a: b}"]))
