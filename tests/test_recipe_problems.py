"""A wrong recipe: which keys and values are refused, and in which words. Case numbers are those of the trust cases."""

from typing import Any

import pytest
from conftest import MINIMAL, one_a_line, problems_of, the_problem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftune.recipe import load
from ftune.recipe.problems import every_key
from ftune.settings import METHOD_NAMES, OBJECTIVE_NAMES, available

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
    assert problem.what == 'unknown key "rank": it is a key of lora, qlora, dora, vera'


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


# Wrong values


SENSELESS = """
method.rank=0 | method.rank=8.0 | method.rank=1_0 | method.alpha=0 | method.alpha=null
method.dropout=1.0 | method.dropout=-0.1 | method.target_modules=[] | method.target_modules=q_proj
method.layers=[-1] | method.layers=first-half | method.rank_pattern={q_proj: 0}
training.learning_rate=fast | training.learning_rate=-1 | training.learning_rate=.nan
training.learning_rate=.inf | training.learning_rate=1e999 | training.learning_rate=true
training.epochs=1.5x | training.epochs=0 | training.batch_size=0
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


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["model.double_quantization=false"], "model.double_quantization is for nf4 and fp4"),
        (["model.quantization=int8", "model.double_quantization=false"], "model.quantization is int8"),
        (["model.revision=main"], "model.revision is for bases on the hub"),
        (["method={name: lora, init: olora, start_from: a}"], "leave method.init out"),
        (["method={name: prompt_tuning, init_text: x, start_from: a}"], "leave method.init_text out"),
        (["method={name: ia3, feedforward_modules: [down_proj]}"], "name those too"),
    ],
)
def test_key_that_would_have_no_effect_beside_another_is_refused(write, tmp_path, overrides, told):
    (tmp_path / "base").mkdir()
    assert told in the_problem(write(MINIMAL), overrides).what


def test_keys_of_quantization_and_hub_are_taken_where_they_have_an_effect(write):
    found = load(
        write(MINIMAL), ["model={base: owner/name, revision: main, quantization: fp4, double_quantization: false}"]
    )
    assert (found.model.revision, found.model.double_quantization) == ("main", False)


def test_all_problems_are_told_at_once_in_file_order(write: Any) -> None:
    text = (
        "model: ./base\n"
        "method: {name: lora, rank: 0}\n"
        "objective: dpo\n"
        "data:\n  validation: 1.5\n  packing: 3\n  packing: true\n"
        "training:\n  seed: !x 1\n  learning_rte: 1\n  parallel: dpp\n"
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
        "11 (training.parallel)",
        "override gates.min_score=high",
        "override foo",
    ]


# What is for later


@pytest.mark.parametrize(("section", "table"), [("method", METHOD_NAMES), ("objective", OBJECTIVE_NAMES)])
def test_methods_and_objectives_for_later_are_refused_by_name(write: Any, section: str, table: Any) -> None:
    for name in table.keys() - available(table).keys():
        problem = the_problem(write(MINIMAL), [f"{section}={name}"])
        assert (
            problem.what
            == f"{section} '{name}' is not available in this version; available: {', '.join(available(table))}"
        )
