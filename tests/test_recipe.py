"""The recipe: what it accepts, what it refuses, and in which words. Case numbers are those of the trust cases."""

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ftune.errors import ExitCode, Problem, UserError
from ftune.recipe import Recipe, differences, documentation, dump, json_schema, load, starter
from ftune.recipe.later import AVAILABLE, Only
from ftune.recipe.problems import every_key
from ftune.recipe.writing import TASKS
from ftune.settings import METHOD_NAMES, OBJECTIVE_NAMES, available

ROOT = Path(__file__).parent.parent
MINIMAL = "model: ./base\nmethod: lora\ndata: {train: train.jsonl}\n"

# DESIGN's table of keys: the names that users type.
KEYS = {
    "model": "base revision dtype quantization double_quantization attention chat_template trust_remote_code",
    "method": "name layers start_from rank alpha dropout target_modules rank_pattern alpha_pattern"
    " modules_to_save rank_stabilized init learning_rate_ratio",
    "objective": "name",
    "data": "train validation test format columns max_length too_long packing deduplicate decontaminate on_bad_row",
    "training": "learning_rate epochs max_steps batch_size micro_batch_tokens optimizer schedule warmup"
    " weight_decay max_grad_norm gradient_checkpointing parallel seed evaluate_every checkpoint_every"
    " keep_checkpoints select",
    "evaluation": "metric few_shot max_new_tokens review probe",
    "gates": "min_score min_gain max_forgetting",
    "output": "dir save trackers",
}


def one_a_line(text: str) -> list[str]:
    """A table of overrides: one or, with | between them, several on a line."""
    return [item.strip() for line in text.strip().splitlines() for item in line.split(" | ")]


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_recipe(text: str, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write_recipe


def problems_of(path: Path, overrides: Sequence[str] = ()) -> tuple[Problem, ...]:
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    assert caught.value.exit_code == ExitCode.USER_ERROR
    assert sorted(path.parent.rglob("*")) == before, "a refused recipe wrote something"
    return caught.value.problems


def the_problem(path: Path, overrides: Sequence[str] = ()) -> Problem:
    (problem,) = problems_of(path, overrides)
    return problem


# What is accepted


def test_a_method_a_model_and_data_are_a_whole_recipe(write: Any, tmp_path: Path) -> None:
    recipe = load(write(MINIMAL, "first.yaml"))
    assert (recipe.method.name, recipe.objective.name, recipe.name) == ("lora", "sft", "first")
    assert recipe.model.base == tmp_path / "base"
    assert recipe.data.train_paths == (tmp_path / "train.jsonl",)
    assert recipe.output.dir == tmp_path / "runs" / "first"
    assert (recipe.training.epochs, recipe.training.max_steps) == (3.0, None)
    assert (recipe.method.rank, recipe.method.alpha, recipe.method.dropout) == (16, 32.0, 0.05)  # type: ignore[attr-defined]


def test_short_forms_mean_the_long_ones(write: Any) -> None:
    long = "model: {base: ./base}\nmethod: {name: lora}\nobjective: {name: sft}\ndata: {train: train.jsonl}\n"
    assert load(write(long)) == load(write(MINIMAL + "objective: sft\n"))


@pytest.mark.parametrize("method", available(METHOD_NAMES))
def test_the_learning_rate_suits_the_method_unless_it_is_given(write: Any, method: str) -> None:
    path = write(MINIMAL)
    assert (
        load(path, [f"method={method}"]).training.learning_rate == available(METHOD_NAMES)[method].default_learning_rate
    )
    assert load(path, [f"method={method}", "training.learning_rate=0.5"]).training.learning_rate == 0.5


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
    assert recipe.data.train_paths == (tmp_path / "a.jsonl", tmp_path / "sub/b.jsonl", tmp_path / "c.jsonl")


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
    assert load(write(MINIMAL)).data.train_paths == (tmp_path / "train.jsonl",)


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


# Unknown keys


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("training: {learning_rte: 1}", 'unknown key "learning_rte"; did you mean "learning_rate"?'),
        ("learning_rate: 1", 'unknown key "learning_rate"; did you mean "training.learning_rate"?'),
        ("training: {rank: 1}", 'unknown key "rank"; did you mean "method.rank"?'),
        ("num-epochs: 1", 'unknown key "num-epochs"; did you mean "training.epochs"?'),
        ("training: {num-epochs: 1}", 'unknown key "num-epochs"; did you mean "epochs"?'),
        ("training: {batch-size: 1}", 'unknown key "batch-size"; did you mean "batch_size"?'),
        ("lr: 1", 'unknown key "lr"; did you mean "training.learning_rate"?'),
        ("evaluation: {max_steps: 1}", 'unknown key "max_steps"; did you mean "training.max_steps"?'),
        ("zzz: 1", 'unknown key "zzz"; the keys here are model, method'),
    ],
)
def test_an_unknown_or_misplaced_key_is_told_with_the_right_one(write: Any, line: str, words: str) -> None:
    """Case 36: other tools drop such keys and train with their defaults."""
    problem = the_problem(write(MINIMAL + line + "\n"))
    assert words in problem.what
    assert "recipe.yaml:4 (" in problem.where


def test_a_key_of_another_method_says_whose_it_is(write: Any) -> None:
    """Case 36."""
    problem = the_problem(write(MINIMAL), ["method={name: full, rank: 8}"])
    assert problem.what == 'unknown key "rank": it is a key of lora'


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_misspelt_key_is_refused_by_name(write: Any, data: st.DataObject) -> None:
    """Case 36."""
    key = data.draw(
        st.sampled_from(sorted(key for key in every_key() if not key.startswith(("objective", "model.base"))))
    )
    section, name = key.split(".")
    spot = data.draw(st.integers(0, len(name) - 1))
    letter = data.draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz_-"))
    wrong = name[:spot] + letter + data.draw(st.sampled_from([name[spot:], name[spot + 1 :]]))
    if f"{section}.{wrong}" in every_key():
        return
    whats = [problem.what for problem in problems_of(write(MINIMAL), [f"{section}.{wrong}=1"])]
    assert any(what.startswith(f'unknown key "{wrong}"') for what in whats)


# Wrong YAML


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


# Wrong values


SENSELESS = """
method.rank=0 | method.rank=8.0 | method.rank=1_0 | method.alpha=0 | method.alpha=null
method.dropout=1.0 | method.dropout=-0.1 | method.target_modules=[] | method.target_modules=q_proj
method.layers=[-1] | method.layers=first-half | method.rank_pattern={q_proj: 0}
training.learning_rate=fast | training.learning_rate=-1 | training.learning_rate=.nan
training.learning_rate=.inf | training.learning_rate=1e999 | training.learning_rate=true
training.learning_rate=null | training.epochs=1.5x | training.epochs=0 | training.batch_size=0
training.micro_batch_tokens=0 | training.warmup=1 | training.seed=-1 | training.seed=99999999999999999999999
training.gradient_checkpointing=on | training.max_grad_norm=0 | training.keep_checkpoints=0
data.max_length=1 | data.train=null | data.train=[] | data.train=3 | data.packing=yes | data.test=''
evaluation.metric=exact | evaluation.few_shot=-1 | gates.max_forgetting=-1 | output.dir=''
output.dir=runs/{model} | model.base=3 | model.trust_remote_code=1 | training=null | data.test=~no-such-user/x
method.target_modules=['q_proj('] | method.rank_pattern={'(': 3} | data.test="\\ud83d"
"""


@pytest.mark.parametrize("override", one_a_line(SENSELESS))
def test_a_value_without_sense_is_refused_with_its_key(write: Any, override: str) -> None:
    """Cases 37 and 40: rank 0, batch 0, dropout 1.0, max_length 1, `fast`, -1, .nan."""
    problem = the_problem(write(MINIMAL), [override])
    assert override.partition("=")[0] in problem.what
    assert problem.where == f"override {override}"


@pytest.mark.parametrize("written", ["fast", "-1", ".nan", "1.5x"])
def test_a_refused_value_is_shown_with_key_and_line(write: Any, written: str) -> None:
    """Case 37."""
    problem = the_problem(write(MINIMAL + f"training:\n  learning_rate: {written}\n"))
    assert f"`training.learning_rate: {written}` must be" in problem.what
    assert problem.where.endswith("recipe.yaml:5 (training.learning_rate)")


def test_a_misspelt_value_is_told_with_the_right_one(write: Any) -> None:
    assert the_problem(write(MINIMAL), ["training.schedule=cosin"]).hint == "cosine"
    assert the_problem(write(MINIMAL), ["method=lorra"]).hint == "lora"


@pytest.mark.parametrize("missing", ["model", "method", "data"])
def test_what_must_be_given_is_asked_for(write: Any, missing: str) -> None:
    text = "".join(line + "\n" for line in MINIMAL.splitlines() if not line.startswith(missing))
    assert f'missing key "{missing}"' in the_problem(write(text)).what


def test_a_section_whose_keys_are_all_commented_out_is_told(write: Any) -> None:
    problem = the_problem(write(MINIMAL + "training:\n  # seed: 1\ngates: {}\n"))
    assert (problem.what, problem.hint) == ("`training` is empty", "write keys below it, or remove it")
    assert load(write(MINIMAL + "training:\n  # seed: 1\n"), ["training.seed=3"]).training.seed == 3


def test_epochs_and_max_steps_exclude_each_other(write: Any) -> None:
    recipe = load(write(MINIMAL), ["training.max_steps=10"])
    assert (recipe.training.epochs, recipe.training.max_steps) == (None, 10)
    for overrides in (["training={epochs: 1, max_steps: 10}"], ["training.epochs=null"]):
        assert the_problem(write(MINIMAL), overrides).what == "give either training.epochs or training.max_steps"


def test_all_problems_are_told_at_once_in_file_order(write: Any) -> None:
    text = (
        "model: ./base\n"
        "method: {name: lora, rank: 0}\n"
        "objective: dpo\n"
        "data:\n  validation: 0.1\n  packing: 3\n  packing: true\n"
        "training:\n  seed: !x 1\n  learning_rte: 1\n  optimizer: adamw_8bit\n"
    )
    problems = problems_of(write(text), ["gates.min_score=high", "foo"])
    places = [problem.where.partition("recipe.yaml:")[2] or problem.where for problem in problems]
    assert places == [
        "2 (method.rank)",
        "3 (objective)",
        "4 (data.train)",
        "5 (data.validation)",
        "6 (data.packing)",
        "7 (data.packing)",
        "9 (training.seed)",
        "10 (training.learning_rte)",
        "11 (training.optimizer)",
        "override gates.min_score=high",
        "override foo",
    ]


# What is for later


NOT_YET = """
model.quantization=nf4 | model.double_quantization=false | model.attention=flash_attention_2
method.start_from=./adapter | method.modules_to_save=[lm_head] | method.init=pissa
method.learning_rate_ratio=16 | data.train={hub: owner/name, split: train} | data.train={hub: 3}
data.validation=0.1 | data.format=sharegpt | data.deduplicate=exact | data.decontaminate=true
training.optimizer=paged_adamw_8bit | training.parallel=ddp | training.select=best
evaluation.metric=rouge_l | evaluation.metric=score.py:f1 | evaluation.review=50
evaluation.probe=general | evaluation.probe={harness: [arc_easy]} | output.trackers=[wandb]
"""


@pytest.mark.parametrize("override", one_a_line(NOT_YET))
def test_what_is_not_there_yet_is_refused_by_name(write: Any, override: str) -> None:
    """Case 39: an option that is validated but wired to nothing."""
    written = override.replace("=", ": ", 1)
    problem = the_problem(write(MINIMAL), [override])
    assert problem.what == f"`{written}` is not available in this version of ftune"


def test_the_table_above_names_everything_that_is_for_later() -> None:
    named = {override.partition("=")[0] for override in one_a_line(NOT_YET)}
    assert named == {key for key in AVAILABLE if "*" not in key}


def test_weights_of_files_are_refused_by_name(write: Any) -> None:
    problem = the_problem(write(MINIMAL), ["data.train=[{path: a.jsonl, weight: 2}]"])
    assert problem.what == "`data.train[0].weight: 2` is not available in this version of ftune"


@pytest.mark.parametrize(("section", "table"), [("method", METHOD_NAMES), ("objective", OBJECTIVE_NAMES)])
def test_methods_and_objectives_for_later_are_refused_by_name(write: Any, section: str, table: Any) -> None:
    for name in table.keys() - available(table).keys():
        problem = the_problem(write(MINIMAL), [f"{section}={name}"])
        assert (
            problem.what
            == f"{section} '{name}' is not available in this version; available: {', '.join(available(table))}"
        )


def test_every_default_is_available_and_every_refusal_means_a_key() -> None:
    keys = every_key()
    for name, rule in AVAILABLE.items():
        if "*" in name:
            continue
        default = keys[name].get_default(call_default_factory=True)
        assert keys[name].is_required() or rule.allows(list(default) if isinstance(default, tuple) else default), name
        assert not isinstance(rule, Only) or rule.values


# The schema


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
    with pytest.raises(UserError, match="no method 'dora'"):
        starter("dora", "chat")
    with pytest.raises(UserError, match="no task 'vision'"):
        starter("lora", "vision")


def test_a_recipe_cannot_be_changed(write: Any) -> None:
    recipe = load(write(MINIMAL))
    with pytest.raises(ValidationError):
        recipe.training.seed = 1


# Dump and differences

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
        "training.gradient_checkpointing": st.sampled_from(["auto", True, False]),
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
    assert {f"{section}.{key}" for section in written for key in written[section]} == set(every_key())
    assert written["method"]["alpha"] == 32.0


def test_differences_name_key_and_both_values(write: Any) -> None:
    path = write(MINIMAL)
    assert differences(load(path), load(path, ["training.learning_rate=0.01"])) == [
        "training.learning_rate: 0.001 -> 0.01"
    ]
    assert "method.rank: 16 -> (absent)" in differences(load(path), load(path, ["method=full"]))
    assert "data.columns: {} -> (absent)" in differences(load(path), load(path, ["data.columns={a: b}"]))


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
