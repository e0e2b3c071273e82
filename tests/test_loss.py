"""The loss is the sum over supervised tokens divided by their number. Numbers: trust cases."""

import math

import pytest
import torch
from conftest import CHAT_ROWS, make_model, make_tokenizer, write_rows
from torch.nn import functional

from ftune import attention, batches, data, loss, optimizers, train
from ftune.chat import Tokens
from ftune.data import Example
from ftune.engine import Engine
from ftune.methods import METHODS
from ftune.model import head
from ftune.objectives import sft
from ftune.recipe import TrainingSection

KINDS = {
    "llama": {},
    "gpt2": {},
    "granite": {"logits_scaling": 3.0},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 1.0},
}


def example(num_prompt, num_answer, row_id="r:1", seed=0):
    ids = torch.randint(6, 100, (num_prompt + num_answer,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Example(row_id, "", Tokens(ids, [False] * num_prompt + [True] * num_answer), {})


def plan(**training):
    section = TrainingSection(**({"learning_rate": 0.1, "max_steps": 1} | training))
    return train.TrainingPlan(section, 1, True, "auto", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_hand_written_shifted_cross_entropy(kind):
    """Case 14: position t predicts token t + 1, with the architecture's own logits."""
    model = make_model(kind, scale=2.0, **KINDS[kind])
    rows = [example(4, 5, seed=1), example(2, 7, seed=2)]
    by_hand = []
    for row in rows:
        logits = model(torch.tensor([row.tokens.input_ids])).logits[0]
        labels = torch.tensor(row.tokens.labels)
        by_hand.append(functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum"))
    with attention.packed(model):
        ours = sft.summed_loss(model, batches.collate(rows), True)
    torch.testing.assert_close(ours, sum(by_hand), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_neither_loss_nor_gradient(kind, is_trained):
    """Nor does it matter whether the head is trained; the losses have weights, as in preference objectives."""
    model = make_model(kind, **KINDS[kind]).requires_grad_(is_trained)
    hidden, targets, factors = torch.randn(37, 64, requires_grad=True), torch.randint(102, (37,)), torch.randn(37)
    wanted = [hidden, *([model.get_output_embeddings().weight] if is_trained else [])]

    def measure(rows):
        losses = loss.token_losses(head(model), hidden, targets, 102, rows)
        return losses, torch.autograd.grad(losses @ factors, wanted)

    whole = functional.cross_entropy(head(model)(hidden).float(), targets, reduction="none")
    gradients = torch.autograd.grad(whole @ factors, wanted)
    for rows in (1, 5, 36, None):
        parts, of_parts = measure(rows)
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
        torch.testing.assert_close(of_parts, gradients, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("is_trained", [True, False])
def test_logits_are_never_held_whole(is_trained):
    """The largest tensor that the loss makes has a chunk's rows, in the forward and in the backward pass."""
    model, largest = make_model().requires_grad_(is_trained), 0

    def watched(hidden):
        nonlocal largest
        largest = max(largest, len(hidden))
        return head(model)(hidden)

    hidden = torch.randn(50, 64, requires_grad=True)
    loss.token_losses(watched, hidden, torch.zeros(50, dtype=torch.long), 102, 8).sum().backward()
    assert largest == 8


def test_a_frozen_heads_logits_are_made_once():
    """What waits for the backward pass is as large as the states; a head that is trained makes its chunks again."""
    model, made = make_model(), 0
    hidden = torch.randn(50, 64, requires_grad=True)

    def counted(states):
        nonlocal made
        made += len(states)
        return head(model)(states)

    for is_trained, times in ((False, 1), (True, 2)):
        model.requires_grad_(is_trained)
        made = 0
        losses = loss.token_losses(counted, hidden, torch.zeros(50, dtype=torch.long), 102, 8)
        if not is_trained:
            assert [kept.shape for kept in losses.grad_fn.saved_tensors] == [hidden.shape]
        losses.sum().backward()
        assert made == 50 * times


def test_gradients_of_sure_predictions_do_not_vanish_in_float16():
    """They are computed before the loss scale is known."""
    torch.manual_seed(0)
    weight, targets = torch.randn(50, 16), torch.arange(8)
    states = 1.2 * weight[:8]  # each says what its target is: the probabilities of all others are small

    def gradient(dtype):
        hidden = states.to(dtype).requires_grad_()
        losses = loss.token_losses(lambda h: h @ weight.to(dtype).T, hidden, targets, 50)
        (65536 * losses.mean()).backward()
        return hidden.grad.float()

    narrow, wide = gradient(torch.float16), gradient(torch.float32)
    assert torch.all((narrow - wide).norm(dim=1) < 0.03 * wide.norm(dim=1))


def test_rows_at_once_hold_a_bounded_number_of_logits():
    assert loss.rows_at_once(32_000, False) * 32_000 <= 2**22
    assert loss.rows_at_once(32_000, True) * 32_000 <= 2**24
    assert loss.rows_at_once(152_000, False) == 128


@pytest.fixture
def rows(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", CHAT_ROWS)
    return data.load(make_tokenizer(), [data.Source(path)], data.Rules()).examples[:8]


def one_step(examples, tokens, packing=True, **training):

    model = make_model()
    section = TrainingSection(
        learning_rate=0.1, max_steps=1, batch_size=8, optimizer="sgd", micro_batch_tokens=tokens, warmup=0.0, **training
    )
    plan = train.TrainingPlan(section, 1, packing, "auto", 0)
    job = train.Job(model, METHODS["full"], sft, optimizers.make_optimizer(model, section), Engine())
    [step] = train.train(job, examples, plan)
    return step, {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("tokens", "packing"), [(40, True), (90, True), (1, False)])
def test_step_does_not_depend_on_its_micro_batches(rows, tokens, packing):
    """Cases 1 and 2: loss, gradient norm and new weights are those of one micro-batch."""
    step, weights = one_step(rows, 10_000)
    cut, cut_weights = one_step(rows, tokens, packing)
    assert cut.loss == pytest.approx(step.loss, rel=1e-5)
    assert cut.grad_norm == pytest.approx(step.grad_norm, rel=1e-4)
    torch.testing.assert_close(cut_weights, weights, atol=1e-6, rtol=0)


def test_step_loss_weighs_tokens_and_not_rows():
    """Case 1: rows of 1 and 9 supervised tokens."""
    short, long = example(3, 1, "short", 1), example(3, 9, "long", 2)
    alone = {row.row_id: one_step([row], 1000)[0].loss for row in (short, long)}
    for tokens in (1000, 1):
        step, _ = one_step([short, long], tokens)
        assert step.supervised_tokens == 10
        assert step.loss == pytest.approx((alone["short"] + 9 * alone["long"]) / 10, rel=1e-5)


@pytest.mark.parametrize("tokens", [1, 30, 60, 10_000])
def test_evaluation_loss_is_the_mean_over_tokens_however_it_is_cut(rows, tokens):
    """Case 48."""
    model = make_model()
    sums, count = 0.0, 0
    for row in rows:
        logits = model(torch.tensor([row.tokens.input_ids])).logits[0, :-1].detach()
        labels = torch.tensor(row.tokens.labels[1:])
        sums += float(functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    ours = train.mean_loss(model, rows, plan(micro_batch_tokens=tokens), sft.token_losses)
    assert ours == pytest.approx(sums / count, abs=1e-6)


def test_clipping_is_of_the_whole_steps_gradient(rows):
    """Case 42: the weights move by exactly the limit, the logged norm is the one before clipping."""
    before = {name: p.detach().clone() for name, p in make_model().named_parameters()}
    for tokens in (40, 10_000):
        step, after = one_step(rows, tokens, max_grad_norm=0.1)
        moved = math.sqrt(sum(float((after[n] - before[n]).square().sum()) for n in before)) / 0.1
        assert step.grad_norm > 0.1
        assert moved == pytest.approx(0.1, rel=1e-3)
