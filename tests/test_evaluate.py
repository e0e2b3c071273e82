"""Generation and scoring. Numbers: trust cases."""

import math

import numpy as np
import pytest
import torch
from conftest import chat, make_model, make_tokenizer, write_rows
from method_kit import SETTINGS, randomize

from ftune import data, evaluate
from ftune.evaluate import TokenLosses, generation, losses
from ftune.methods import METHODS
from ftune.objectives import sft
from ftune.predict import confusion, macro_f1, measure
from ftune.recipe import TrainingSection
from ftune.train import TrainingPlan, mean_loss


@pytest.fixture
def examples(tmp_path):
    rows = [chat("x" * length, "ab") for length in (3, 9, 20, 5)]
    return data.load(make_tokenizer(), [data.Source(write_rows(tmp_path / "rows.jsonl", rows))], data.Rules()).examples


PROMPTS = [[6 + (7 * i + 3 * length) % 90 for i in range(length)] for length in (3, 9, 20)]
"""Token ids, of 3, 9 and 20 tokens."""
ON = ["lora", "full", "ia3", "prefix", "prefix, projection", "prompt", "prompt, deep", "bottleneck, serial"]


def adapted(kind, name):
    """A model with an adapter that changes it; the base alone for `off`."""
    model = make_model(kind, scale=4.0 if "gpt2" in kind else 2.0)
    if name != "off":
        METHODS[SETTINGS[name].name].attach(model, SETTINGS[name], 0)
        randomize(model)
    return model.eval()


@pytest.mark.parametrize("name", ["off", *ON])
@pytest.mark.parametrize("kind", ["llama", "gpt2 untied"])
def test_batched_answers_equal_single_ones(kind, name):
    """Case 104: left padding and masks change nothing, whatever an adapter puts in front."""
    model, tokenizer = adapted(kind, name), make_tokenizer()
    assert len(generation._batches(list(map(len, PROMPTS)), 12)) == 1
    together = evaluate.generate_ids(model, tokenizer, PROMPTS, 12, "test")
    alone = [evaluate.generate_ids(model, tokenizer, [prompt], 12, "test")[0] for prompt in PROMPTS]
    assert together == alone
    assert len(set(map(tuple, alone))) > 1
    if name != "off":
        assert alone != evaluate.generate_ids(adapted(kind, "off"), tokenizer, PROMPTS, 12, "test"), (
            "the adapter is off"
        )


@pytest.mark.parametrize("name", ["off", "lora", "prefix", "prompt, deep"])
def test_padding_that_is_seen_changes_batched_answers(name, monkeypatch):
    """What the test above would notice."""
    model, tokenizer = adapted("llama", name), make_tokenizer()
    alone = [evaluate.generate_ids(model, tokenizer, [prompt], 12, "test")[0] for prompt in PROMPTS]
    honest = model.generate
    monkeypatch.setattr(
        model, "generate", lambda ids, attention_mask, **rest: honest(ids, attention_mask=torch.ones_like(ids), **rest)
    )
    assert evaluate.generate_ids(model, tokenizer, PROMPTS, 12, "test") != alone


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


# Loss and perplexity


def losses_of(sums, counts):
    return TokenLosses(np.array(sums, dtype=float), np.array(counts, dtype=float))


def test_losses_by_row_are_those_of_the_training_objective(examples):
    """Whatever the packing: each row's sum is what the row alone gives, and the mean is that of train.mean_loss."""
    model = make_model()
    for packing, tokens in ((True, 4096), (True, 40), (False, 4096)):
        plan = TrainingPlan(TrainingSection(micro_batch_tokens=tokens), 1, packing, "auto", 0)
        found = evaluate.token_losses(model, examples, plan, "test")
        assert found.counts.tolist() == [example.tokens.num_supervised for example in examples]
        alone = [mean_loss(model, [example], plan, sft.token_losses) for example in examples]
        assert found.sums / found.counts == pytest.approx(alone, rel=1e-5)
        assert found.mean == pytest.approx(mean_loss(model, examples, plan, sft.token_losses), rel=1e-6)
    assert len(set(np.round(found.sums, 6))) > 1


def test_intervals_of_a_loss_weigh_rows_by_their_tokens():
    """By hand: of two rows, one of 1 token and loss 0, one of 3 tokens and loss 4 each, the draws of two give
    0 (once in four), 12 / 4 = 3 (twice) and 4 (once); a mean of row means would give 2 in the middle."""
    found = losses_of([0, 12], [1, 3])
    assert found.mean == 3.0
    ratios = losses._resampled(found.counts, found.sums)[0]
    assert sorted(set(ratios)) == [0.0, 3.0, 4.0]
    assert np.mean(ratios == 3.0) == pytest.approx(0.5, abs=0.02)
    assert evaluate.mean_loss_interval(found) == (0.0, 4.0)
    assert evaluate.mean_loss_interval(found, np.exp) == pytest.approx((1.0, math.exp(4.0)))


def test_the_interval_of_a_fall_is_paired():
    """Rows that differ much but all fall by about 0.5 a token: their fall is known far better than either loss."""
    generator = np.random.default_rng(1)
    counts = generator.integers(1, 30, 200)
    before = losses_of(counts * generator.uniform(1, 5, 200), counts)
    after = losses_of(before.sums - counts * generator.normal(0.5, 0.05, 200), counts)
    low, high = evaluate.fall_interval(before, after)
    assert low < before.mean - after.mean < high
    assert 0.45 < low < high < 0.55
    wide = evaluate.mean_loss_interval(before)
    assert high - low < 0.1 * (wide[1] - wide[0])
    assert evaluate.fall_interval(before, before) is None
    assert evaluate.mean_loss_interval(losses_of([3], [2])) is None, "one row tells nothing of others"


def test_intervals_of_a_loss_cover_the_truth():
    """Rows whose length and loss go together, where the mean of row means is far off: 1.8, and the loss is 2.33."""
    generator = np.random.default_rng(2)
    hits = 0
    for _ in range(200):
        counts = generator.choice([1, 5], 120)
        low, high = evaluate.mean_loss_interval(
            losses_of(counts * np.where(counts == 5, 2.6, 1.0) + counts * generator.normal(0, 0.5, 120), counts)
        )
        hits += low <= (1 * 1.0 + 5 * 2.6) / 6 <= high
    assert 0.91 <= hits / 200 <= 0.99


def test_macro_f1_and_confusion_are_those_of_the_definition():
    expected, predicted = np.array([0, 0, 0, 1, 1, 3]), np.array([0, 0, 1, 1, 0, 0])
    counts = confusion(expected, predicted, 5)
    assert counts[0].tolist() == [2, 1, 0, 0, 0]
    # label 0: 2 * 2 / (3 + 4); label 1: 2 * 1 / (2 + 2); label 3: 0; labels 2 and 4 do not occur
    assert math.isclose(macro_f1(counts), (4 / 7 + 1 / 2 + 0) / 3)
    found = measure("f1", expected, predicted, expected * 0, 5)
    assert found.gain_interval[0] <= found.tuned - found.baseline <= found.gain_interval[1]
