"""The last layer computes what is asked of it, and all where that would not be the same."""

import pytest
import torch
from conftest import make_model

from ftune import attention, comparing, last_layer
from ftune import model as models
from ftune.batches import MicroBatch

TOKENS = torch.arange(3, 12)[None]
BATCH = MicroBatch(TOKENS, torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), torch.full((1, 9), -100), (0, 4, 9), ())
WANTED = torch.tensor([2, 7])


def states(model, positions=None):
    with torch.no_grad(), attention.packed(model):
        return models.hidden_states(model, BATCH, True, positions)


@pytest.fixture
def model():
    return make_model(scale=4.0)


def rows_seen(model):
    """How many positions the MLPs of the last two layers are given."""
    seen = []
    for layer in model.model.layers[-2:]:
        layer.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    return seen


def test_only_wanted_positions_pass_the_last_mlp(model):
    comparing.prove_packing(model, "auto")
    seen, whole = rows_seen(model), states(model)
    assert seen == [9, 9]
    seen.clear()
    torch.testing.assert_close(states(model, WANTED), whole[WANTED], atol=1e-6, rtol=1e-5)
    assert seen == [9, 2]


def test_all_pass_without_the_proof(model):
    seen = rows_seen(model)
    assert torch.equal(states(model, WANTED), states(model)[WANTED])
    assert seen == [9, 9, 9, 9]


@pytest.mark.parametrize("wanted", [torch.tensor([], dtype=torch.long), torch.arange(9)], ids=["none", "all"])
def test_nothing_or_everything_may_be_wanted(model, wanted):
    comparing.prove_packing(model, "auto")
    torch.testing.assert_close(states(model, wanted), states(model)[wanted], atol=1e-6, rtol=1e-5)


def differs_when_cut(module, inputs, output):
    """Not for the proof's rows of 3, 17 and 33, nor for all of them together."""
    return output if output.shape[1] in (3, 17, 33, 53) else output * 1.01


def raises_when_cut(module, inputs, output):
    if output.shape[1] not in (3, 17, 33, 53):
        raise ValueError("some are missing")


@pytest.mark.parametrize("behaviour", [differs_when_cut, raises_when_cut])
def test_a_layer_that_needs_all_positions_stays_whole(model, behaviour):
    model.model.layers[-1].mlp.register_forward_hook(behaviour)
    comparing.prove_packing(model, "auto")
    assert not last_layer.heeds(model)


@pytest.mark.parametrize("is_alone", [True, False])
def test_an_mlp_before_the_attention_stays_whole(model, is_alone):
    """Nobody has told it yet which positions are wanted; those of the pass before are others."""
    layer = model.model.layers[-1]
    layer.before = torch.nn.Linear(64, 64)

    def mlp_first(states, **keywords):
        normed = layer.input_layernorm(states)
        states = states + layer.before(normed) + layer.self_attn(normed, **keywords)[0]
        return states if is_alone else states + layer.mlp(states)

    layer.forward = mlp_first
    comparing.prove_packing(model, "auto")
    assert not last_layer.heeds(model)


def test_a_pass_that_fails_leaves_nothing_behind(model):
    comparing.prove_packing(model, "auto")
    failing = model.model.layers[-1].mlp.act_fn.register_forward_hook(lambda module, inputs, output: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        states(model, WANTED)
    failing.remove()
    whole = states(model)
    torch.testing.assert_close(states(model, WANTED), whole[WANTED], atol=1e-6, rtol=1e-5)


def test_a_part_that_was_wrapped_is_cut_after_another_proof(model):
    comparing.prove_packing(model, "auto")
    last = model.model.layers[-1]
    last.mlp = torch.nn.Sequential(last.mlp)
    comparing.prove_packing(model, "auto")
    seen, whole = rows_seen(model), states(model)
    seen.clear()
    torch.testing.assert_close(states(model, WANTED), whole[WANTED], atol=1e-6, rtol=1e-5)
    assert seen == [9, 2]


def test_the_bound_of_both_proofs_is_sought_once(model, monkeypatch):
    sought, tolerance = [], comparing.tolerance
    monkeypatch.setattr(comparing, "tolerance", lambda *given: (sought.append(given), tolerance(*given))[1])
    comparing.prove_packing(model, "auto")
    assert sought == []  # float32's rounding is below what is always allowed
    monkeypatch.setattr(comparing, "SMALLEST_TOLERANCE", -1.0)
    comparing.prove_packing(model, "auto")
    assert len(sought) == 1
