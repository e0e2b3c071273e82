"""Where every size of a product costs something there are few of them, and the result is as without."""

import pytest
import torch
from conftest import make_model
from test_batches import ARCHITECTURES

from ftune import attention, batches, comparing, few_sizes
from ftune import model as models
from ftune.chat.rows import Tokens
from ftune.data import Example
from ftune.methods import METHODS
from ftune.objectives import sft
from ftune.settings import PromptTuningSettings


def batch_of(*lengths):
    """Rows of these lengths, the last third of each supervised."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 90, (length,), generator=generator).tolist() for length in lengths]
    rows = [Tokens(row, [place >= 2 * len(row) // 3 for place in range(len(row))]) for row in ids]
    return batches.collate([Example(str(number), "", row, {}) for number, row in enumerate(rows)])


def losses_and_gradients(model, batch):
    model.zero_grad()
    with attention.packed(model):
        losses = sft.token_losses(model, batch, True)
    losses.sum().backward()
    return losses.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lengths", [(1, 40, 9), (32,), (63, 1), (2,)])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_losses_and_gradients_are_those_without(kind, lengths, monkeypatch):
    model, batch = make_model(kind, **ARCHITECTURES[kind]), batch_of(*lengths)
    comparing.prove_packing(model, "auto")
    plain = losses_and_gradients(model, batch)
    monkeypatch.setattr(few_sizes, "costs", lambda states: True)
    torch.testing.assert_close(losses_and_gradients(model, batch), plain, atol=2e-5, rtol=1e-4)


def sizes_of(model, batches_):
    """The numbers of rows that the model's linear layers are given in training on these."""
    sizes = set()
    for module in model.modules():
        if models.is_linear(module):
            module.register_forward_pre_hook(lambda module, inputs: sizes.add(inputs[0].shape[:-1].numel()))
    for batch in batches_:
        losses_and_gradients(model, batch)
    return sizes - {0}


@pytest.mark.parametrize("is_head_trained", [False, True])
def test_in_16_bits_on_a_cpu_every_size_is_a_multiple(is_head_trained):
    model = make_model(vocab_size=30_000).bfloat16()
    comparing.prove_packing(model, "auto")
    model.get_output_embeddings().requires_grad_(is_head_trained)
    sizes = sizes_of(model, [batch_of(5, 9), batch_of(100, 77), batch_of(*[60] * 30)])
    assert len(sizes) > 3
    assert not any(few_sizes.missing(size) for size in sizes)


@pytest.mark.parametrize("virtual_tokens", [0, 3])
def test_the_states_are_those_of_the_real_tokens(virtual_tokens, monkeypatch):
    model, batch = make_model(), batch_of(5, 9)
    if virtual_tokens:
        METHODS["prompt_tuning"].attach(model, PromptTuningSettings(virtual_tokens=virtual_tokens))

    def states():
        with torch.no_grad(), attention.packed(model):
            return models.hidden_states(model, batch, True)

    plain = states()
    monkeypatch.setattr(few_sizes, "costs", lambda states: True)
    torch.testing.assert_close(states(), plain, atol=1e-6, rtol=1e-5)


def test_elsewhere_sizes_are_what_they_are():
    model = make_model()
    comparing.prove_packing(model, "auto")
    assert sizes_of(model, [batch_of(5, 9)]) == {14, 5}


def test_nothing_is_left_on_the_model():
    model = make_model().bfloat16()
    decoder = model.base_model
    before = len(decoder._forward_pre_hooks), len(decoder._forward_hooks)
    with attention.packed(model):
        assert len(decoder._forward_hooks) == before[1] + 1
    assert (len(decoder._forward_pre_hooks), len(decoder._forward_hooks)) == before
