"""A recipe's YAML: what is no recipe is told in words, and nothing is executed. Numbers: trust cases."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import MINIMAL, one_a_line, problems_of, the_problem
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ftune.errors import UserError
from ftune.recipe import Recipe, load
from ftune.recipe.problems import every_key


@pytest.mark.parametrize(
    ("text", "words", "line"),
    [
        (MINIMAL + "training:\n  seed: 1\n  epochs: 1\n  seed: 2\n", 'duplicate key "seed" (lines 5 and 7)', 7),
        (MINIMAL + "method: full\n", 'duplicate key "method" (lines 2 and 4)', 4),
        (MINIMAL + "evaluation: {probe: a, probe: b}\n", 'duplicate key "probe" (lines 4 and 4)', 4),
    ],
)
def test_a_duplicate_key_names_both_lines(write: Any, text: str, words: str, line: int) -> None:
    """Case 38: YAML parsers silently let the last one win."""
    problem = the_problem(write(text))
    assert words in problem.what
    assert f"recipe.yaml:{line} (" in problem.where


@pytest.mark.parametrize(
    "line",
    ["training: &shared {seed: 1}\ngates: *shared", "training:\n  <<: {seed: 1}", "data: {test: *.jsonl}"],
)
def test_aliases_and_merge_keys_are_refused_in_words(write: Any, line: str) -> None:
    """Case 38."""
    assert "merge keys (<<) are not read" in str(problems_of(write(MINIMAL + line + "\n"))[0])


TAGGED = """
training={seed: !!python/object/apply:os.system ['touch {stolen}']} | training={seed: !!python/name:os.system }
training={seed: !env HOME} | training={seed: !!binary aGk=} | gates=!!set {a} | training={seed: !!int fast}
"""


@pytest.mark.parametrize("line", one_a_line(TAGGED))
def test_yaml_object_tags_are_refused_and_nothing_is_executed(write: Any, tmp_path: Path, line: str) -> None:
    """Case 110."""
    stolen = tmp_path / "stolen"
    problem = the_problem(write(MINIMAL + line.replace("{stolen}", str(stolen)).replace("=", ": ", 1) + "\n"))
    assert "the YAML tag !" in problem.what
    assert "is refused" in problem.what
    assert not stolen.exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("# only a comment\n", "empty"),
        ("- a\n- b\n", "a recipe is a mapping"),
        ("text\n", "a recipe is a mapping"),
        (MINIMAL + "---\n" + MINIMAL, "one YAML document"),
        (MINIMAL + "training: {seed: 1\n", "not valid YAML"),
        (MINIMAL + "training:\n\tseed: 1\n", "not valid YAML"),
        (MINIMAL + "a: \x07\n", "not valid YAML"),
        (MINIMAL + "? [a, b]\n: 1\n", "a key must be plain text"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_what_is_no_recipe_is_told_in_words(write: Any, text: str, words: str) -> None:
    problem = the_problem(write(text))
    assert words in problem.what
    assert "recipe.yaml" in problem.where


YAMLISH = st.text(st.sampled_from("aA01-:?[]{},#&*!|>'\"%@` \n\t\\ux.~<="), max_size=40) | st.text(max_size=20)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=YAMLISH, is_override=st.booleans())
@example(text='model: "\\UFFFFFFFF"', is_override=False)
@example(text='"\\U00110000"', is_override=True)
@example(text="%YAML 9.9\n--- {}", is_override=False)
def test_no_text_makes_the_loader_fall_over(write: Any, tmp_path: Path, text: str, is_override: bool) -> None:
    path, overrides = tmp_path / "recipe.yaml", [f"data.columns={text}"] if is_override else []
    path.write_bytes(MINIMAL.encode() if is_override else text.encode("utf-8", "surrogatepass"))
    with suppress(UserError):
        load(path, overrides)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("(?<{"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from([*every_key(), *Recipe.model_fields]), value=ANYTHING)
@example(key="method.target_modules", value=["(?<{"])
def test_no_value_makes_the_loader_fall_over(write: Any, key: str, value: Any) -> None:
    with suppress(UserError):
        load(write(MINIMAL), [f"{key}={json.dumps(value).replace('NaN', '.nan').replace('Infinity', '.inf')}"])


@pytest.mark.parametrize("depth", range(150, 400, 50))
def test_no_depth_makes_the_loader_fall_over(write: Any, depth: int) -> None:
    assert problems_of(write(MINIMAL), [f"training.seed={'[' * depth}{']' * depth}"])


def test_a_syntax_error_names_its_line(write: Any) -> None:
    assert the_problem(write(MINIMAL + "training:\n  seed: 1: 2\n")).where.endswith("recipe.yaml:5")


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    assert the_problem(tmp_path / "none.yaml").what == "no such recipe"
    assert "cannot be read" in the_problem(tmp_path).what
    (tmp_path / "latin.yaml").write_bytes(b"# caf\xe9\n" + MINIMAL.encode())
    assert "not UTF-8 text, from byte 5" in the_problem(tmp_path / "latin.yaml").what


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(write: Any) -> None:
    path = write(MINIMAL)
    expected = load(path)
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load(path) == expected
