"""The recipe: what it accepts, and what it is then. Case numbers are those of the trust cases."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import MINIMAL, problems_of, save_base, the_problem

from ftune.recipe import dump, load
from ftune.run.inputs import resolve
from ftune.settings import METHOD_NAMES, available

ROOT = Path(__file__).parent.parent


# What is accepted


def test_a_method_a_model_and_data_are_a_whole_recipe(write: Any, tmp_path: Path) -> None:
    recipe = load(write(MINIMAL, "first.yaml"))
    assert (recipe.method.name, recipe.objective.name, recipe.name) == ("lora", "sft", "first")
    assert recipe.model.base == tmp_path / "base"
    assert recipe.data.files == (tmp_path / "train.jsonl",)
    assert recipe.output.dir == tmp_path / "runs" / "first"
    assert (recipe.training.epochs, recipe.training.max_steps) == (3.0, None)
    assert (recipe.method.rank, recipe.method.alpha, recipe.method.dropout) == (16, 32.0, 0.05)  # type: ignore[attr-defined]


def test_short_forms_mean_the_long_ones(write: Any) -> None:
    long = "model: {base: ./base}\nmethod: {name: lora}\nobjective: {name: sft}\ndata: {train: train.jsonl}\n"
    assert load(write(long)) == load(write(MINIMAL + "objective: sft\n"))


@pytest.mark.parametrize("method", available(METHOD_NAMES))
def test_the_learning_rate_suits_method_and_width_unless_it_is_given(write: Any, method: str, tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    path = write(MINIMAL)
    recipe = load(path, [f"method={method}"])
    assert recipe.training.learning_rate is None
    rule = recipe.method.rate
    rate = float(f"{rule.at_2000 * (2000 / 64) ** rule.exponent:.1e}")
    assert resolve(recipe).training.learning_rate == rate
    classifier = load(path, [f"method={method}", "objective=classification"])
    share = float(f"{rule.for_classes * rule.at_2000 * (2000 / 64) ** rule.exponent:.1e}")
    assert resolve(classifier).training.learning_rate == share
    given = load(path, [f"method={method}", "training.learning_rate=0.5"])
    assert resolve(given).training.learning_rate == given.training.learning_rate == 0.5


@pytest.mark.parametrize("written", ["1e-4", "1.0e-4", "0.0001", '"1e-4"', "'1e-4'", "1E-4", "+1e-4"])
def test_a_number_may_be_written_in_every_usual_way(write: Any, written: str) -> None:
    """Case 37: YAML 1.1 reads `1e-4` as text."""
    by_file = load(write(MINIMAL + f"training:\n  learning_rate: {written}\n"))
    by_override = load(write(MINIMAL), [f"training.learning_rate={written}"])
    assert by_file.training.learning_rate == by_override.training.learning_rate == 0.0001
    assert dump(by_file) == dump(load(write(MINIMAL + "training: {learning_rate: 0.0001}\n")))


@pytest.mark.parametrize(("written", "value"), [("1e5", 1e5), (".5", 0.5), ("1.5e-3", 1.5e-3), ("3", 3.0), ("5.", 5.0)])
def test_other_numbers_are_numbers_too(write: Any, written: str, value: float) -> None:
    assert load(write(MINIMAL), [f"training.epochs={written}"]).training.epochs == value


@pytest.mark.parametrize("word", ["no", "yes", "on", "off", "012", "1_000", "1:30", "2024-01-01", "0x1F", "NO", "y"])
def test_words_that_yaml_1_1_takes_for_something_else_stay_text(write: Any, word: str, tmp_path: Path) -> None:
    """Case 37: in YAML 1.1 `no` is false, `012` is 10, `1_000` is 1000."""
    recipe = load(
        write(MINIMAL + f"evaluation: {{probe: ./{word}}}\n"),
        [f"data.columns={{prompt: {word}}}", f"data.test={word}"],
    )
    assert recipe.data.columns == {"prompt": word}
    assert recipe.data.test == tmp_path / word
    path = write(dump(recipe), "again.yaml")
    assert load(path) == recipe
    assert yaml.safe_load(path.read_text())["data"]["columns"] == {"prompt": word}, "other readers are misled"


def test_off_is_a_word(write: Any) -> None:
    recipe = load(write(MINIMAL + "evaluation:\n  probe: off\n"), ["data.deduplicate=off"])
    assert (recipe.evaluation.probe, recipe.data.deduplicate) == ("off", "off")


def test_training_files_come_one_or_many(write: Any, tmp_path: Path) -> None:
    train = "[a.jsonl, {path: sub/b.jsonl}, {path: c.jsonl, weight: 1}]"
    recipe = load(write(MINIMAL), [f"data.train={train}"])
    assert recipe.data.files == (tmp_path / "a.jsonl", tmp_path / "sub/b.jsonl", tmp_path / "c.jsonl")


def test_paths_are_relative_to_the_recipe_wherever_it_is_called_from(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    path = write(MINIMAL + "evaluation: {probe: ../probe.jsonl}\noutput: {dir: '../runs/{recipe}'}\n", "sub/one.yaml")
    monkeypatch.chdir(tmp_path)
    recipe = load(Path("sub/one.yaml"))
    assert recipe == load(path)
    assert recipe.data.train == tmp_path / "sub" / "train.jsonl"
    assert recipe.evaluation.probe == tmp_path / "probe.jsonl"
    assert recipe.output.dir == tmp_path / "runs" / "one"


@pytest.mark.parametrize("written", ["..", "sub/..", "../{recipe}/..", "./sub/../../."])
def test_a_path_is_written_out_without_detours(write: Any, tmp_path: Path, written: str) -> None:
    (tmp_path / "sub").mkdir()
    assert ".." not in load(write(MINIMAL), [f"output.dir='{written}'"]).output.dir.parts


def test_a_link_keeps_its_own_name(write: Any, tmp_path: Path) -> None:
    (tmp_path / "blob").touch()
    (tmp_path / "train.jsonl").symlink_to(tmp_path / "blob")
    assert load(write(MINIMAL)).data.files == (tmp_path / "train.jsonl",)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("gpt2", "gpt2"),
        ("owner/name-1.5", "owner/name-1.5"),
        ("there", "{folder}/there"),
        ("./new", "{folder}/new"),
        ("/models/x", "/models/x"),
        ("a/b/c", "{folder}/a/b/c"),
    ],
)
def test_a_base_is_a_folder_or_a_hub_id(write: Any, tmp_path: Path, written: str, expected: str) -> None:
    (tmp_path / "there").mkdir()
    base = load(write(MINIMAL), [f"model={written}"]).model.base
    assert str(base) == expected.format(folder=tmp_path)
    assert isinstance(base, Path) == expected.startswith(("/", "{"))


# Overrides


def test_an_override_sets_any_key_and_makes_what_is_missing(write: Any) -> None:
    recipe = load(write(MINIMAL), ["method.rank=8", "method.target_modules=[q_proj, v_proj]", "gates.min_score=0.5"])
    assert recipe.method.name == "lora"
    assert (recipe.method.rank, recipe.method.target_modules) == (8, ("q_proj", "v_proj"))  # type: ignore[attr-defined]
    assert recipe.gates.min_score == 0.5


def test_an_override_repairs_what_it_replaces(write: Any) -> None:
    path = write(MINIMAL + "training:\n  seed: x\n  epochs: 1\n  epochs: 2\n  batch_size: !!python/name:os.system 1\n")
    assert len(problems_of(path)) == 3
    assert load(path, ["training={epochs: 1}"]).training.epochs == 1.0


def test_the_last_of_two_overrides_counts(write: Any) -> None:
    assert load(write(MINIMAL), ["training.seed=1", "training.seed=2"]).training.seed == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("foo", "KEY=VALUE"),
        ("=3", "KEY=VALUE"),
        ("a..b=3", "KEY=VALUE"),
        ("training.learning_rat=1", 'unknown key "learning_rat"; did you mean "learning_rate"?'),
        ("traning.seed=1", 'unknown key "traning"; did you mean "training"?'),
        ("data.train.x=1", "`data.train` is no mapping"),
        ("training.seed=[1", "not valid YAML"),
        ("training.seed=!!python/object/apply:os.getcwd []", "!!python/object/apply:os.getcwd is refused"),
    ],
)
def test_a_wrong_override_is_named(write: Any, override: str, words: str) -> None:
    problem = the_problem(write(MINIMAL), [override])
    assert problem.where == f"override {override}"
    assert words in problem.what


# Names and start-up


@pytest.mark.parametrize("name", ["...yaml", "..yaml", ".yaml"])
def test_a_recipe_name_cannot_lead_out_of_the_runs(write: Any, name: str) -> None:
    """Case 110: names used as paths."""
    path = write(MINIMAL, name)
    if path.stem.strip("."):
        assert load(path).output.dir == path.parent / "runs" / path.stem
    else:
        assert "needs a name" in the_problem(path).what


def test_the_recipe_answers_without_torch() -> None:
    code = "import sys, ftune.recipe; print(sorted({'torch', 'transformers', 'rich', 'numpy'} & sys.modules.keys()))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert told.stdout.strip() == "[]"
