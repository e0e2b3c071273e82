"""Generation and scoring. Numbers: trust cases."""

import math

import numpy as np
import pytest
from conftest import chat, make_model, make_tokenizer, write_rows

from ftune import data, evaluate
from ftune.evaluate import METRICS
from ftune.predict import confusion, macro_f1, measure


@pytest.fixture
def examples(tmp_path):
    rows = [chat("x" * length, "ab") for length in (3, 9, 20, 5)]
    return data.load(make_tokenizer(), [data.Source(write_rows(tmp_path / "rows.jsonl", rows))], data.Rules()).examples


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_batched_answers_equal_single_ones(examples, kind, monkeypatch):
    """Case 104: left padding and masks change nothing."""
    model, tokenizer = make_model(kind, scale=2.0), make_tokenizer()
    prompts = [evaluate.prompt_ids(tokenizer, example) for example in examples]
    together = evaluate.generate(model, tokenizer, prompts, 12, "test")
    alone = [evaluate.generate(model, tokenizer, [prompt], 12, "test")[0] for prompt in prompts]
    assert together == alone
    assert len(set(alone)) > 1


def test_a_models_own_sampling_and_penalties_are_left_out(examples):
    model, tokenizer = make_model(scale=2.0), make_tokenizer()
    prompts = [evaluate.prompt_ids(tokenizer, example) for example in examples]
    plain = evaluate.generate(model, tokenizer, prompts, 12, "test")
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.do_sample = True
    assert evaluate.generate(model, tokenizer, prompts, 12, "test") == plain
    assert model.generation_config.repetition_penalty == 50.0


def test_prompt_is_what_servers_send(examples):
    tokenizer = make_tokenizer()
    asked = examples[0].fields["messages"][:-1]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert evaluate.prompt_ids(tokenizer, examples[0]) == ids
    with_shot = tokenizer.decode(evaluate.prompt_ids(tokenizer, examples[0], [examples[3]]))
    assert with_shot == tokenizer.apply_chat_template(
        [*examples[3].fields["messages"], *asked], add_generation_prompt=True, tokenize=False
    )


def test_solved_examples_are_fixed_by_the_seed(examples):
    assert evaluate.choose_shots(examples, 2, 0) == evaluate.choose_shots(examples, 2, 0)
    assert len({tuple(e.row_id for e in evaluate.choose_shots(examples, 4, seed)) for seed in range(8)}) > 1


@pytest.mark.parametrize(
    ("metric", "wanted", "answer", "score"),
    [
        ("exact_match", "ab", " ab\n", 1.0),
        ("exact_match", "ab", "abc", 0.0),
        ("contains", "ab", "xaby", 1.0),
        ("contains", "ab", "ba", 0.0),
        ("json_match", '{"a": 1, "b": 2}', '{"b":2,"a":1}', 1.0),
        ("json_match", '{"a": 1}', '{"a": "1"}', 0.0),
        ("json_match", '{"a": 1}', "{a: 1", 0.0),
    ],
)
def test_metrics_score_as_named(metric, wanted, answer, score):
    assert METRICS[metric](wanted, answer) == score


def test_macro_f1_and_confusion_are_those_of_the_definition():
    expected, predicted = np.array([0, 0, 0, 1, 1, 3]), np.array([0, 0, 1, 1, 0, 0])
    counts = confusion(expected, predicted, 5)
    assert counts[0].tolist() == [2, 1, 0, 0, 0]
    # label 0: 2 * 2 / (3 + 4); label 1: 2 * 1 / (2 + 2); label 3: 0; labels 2 and 4 do not occur
    assert math.isclose(macro_f1(counts), (4 / 7 + 1 / 2 + 0) / 3)
    found = measure("f1", expected, predicted, expected * 0, 5)
    assert found.gain_interval[0] <= found.tuned - found.baseline <= found.gain_interval[1]
