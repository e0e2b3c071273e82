"""How changes of weights are joined: the formulas, with PEFT as judge, and what cannot be asked for."""

import pytest
import torch
from peft.utils import merge_utils

from ftune.artifacts import combining
from ftune.artifacts.combining import Combination
from ftune.errors import UserError


@pytest.fixture
def changes():
    """Three tensors of one shape, with zeros among them as an adapter of one layer leaves them."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(24, 16, generator=generator) * (torch.rand(24, 16, generator=generator) < 0.8) for _ in "abc"]


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.7, 0.3, -0.2)])
@pytest.mark.filterwarnings("ignore:The density 1.0")  # PEFT's own
def test_ties_trims_elects_and_merges_as_peft_does(changes, density, weights):
    judge = merge_utils.ties(changes, torch.tensor(weights), density)
    torch.testing.assert_close(combining.ties(changes, weights, density), judge)
    for change in changes:
        assert torch.equal(combining.trim(change, density), merge_utils.prune(change, density, "magnitude"))


def test_ties_by_hand():
    """The largest half of each stays; where signs differ the heavier side wins alone, and is averaged."""
    changes = [torch.tensor([4.0, -3.0, 0.1, 0.2]), torch.tensor([2.0, 5.0, 0.3, 0.1])]
    assert combining.ties(changes, (1.0, 1.0), 0.5).tolist() == [3.0, 5.0, 0.0, 0.0]
    assert combining.ties(changes, (1.0, 1.0), 1.0).tolist() == pytest.approx([3.0, 5.0, 0.2, 0.15])


def test_dare_drops_and_rescales_as_peft_does(changes):
    torch.manual_seed(7)
    judge = merge_utils.random_pruning(changes[0], 0.3, rescale=True)
    ours = combining.drop_and_rescale(changes[0], 0.3, torch.Generator().manual_seed(7))
    assert torch.equal(ours, judge)
    kept = float((ours != 0).sum() / (changes[0] != 0).sum())
    assert 0.2 < kept < 0.4
    many = [combining.drop_and_rescale(changes[0], 0.3, combining.generator_of(0, str(i), "x")) for i in range(2000)]
    torch.testing.assert_close(torch.stack(many).mean(dim=0), changes[0], atol=0.3, rtol=0)


def test_linear_is_task_arithmetic_as_peft_does_it(changes):
    judge = merge_utils.task_arithmetic(changes, torch.tensor([0.7, 0.3, -0.2]))
    torch.testing.assert_close(combining.linear(changes, (0.7, 0.3, -0.2)), judge)


def test_what_is_dropped_depends_on_seed_adapter_and_tensor_alone():
    def drawn(*key):
        return torch.rand(4, generator=combining.generator_of(*key)).tolist()

    assert drawn(0, "a", "x") == drawn(0, "a", "x")
    assert len({tuple(drawn(*key)) for key in [(0, "a", "x"), (1, "a", "x"), (0, "b", "x"), (0, "a", "y")]}) == 4


WRONG = [
    ({"weights": None}, "several adapters need a weight each"),
    ({"weights": "0.5"}, "1 weights for 2 adapters"),
    ({"weights": "0.5,x"}, "not numbers"),
    ({"weights": "0.5,nan"}, "not numbers"),
    ({"weights": "0.5,0"}, "weight 0 has no effect"),
    ({"kind": "mean"}, "unknown way to combine: mean"),
    ({"density": 0.5}, "linear keeps everything"),
    ({"kind": "ties", "density": 0.0}, "0 is no share"),
    ({"kind": "dare", "density": 1.5}, "1.5 is no share"),
    ({"kind": "ties", "seed": 1}, "nothing is drawn at random by ties"),
]


@pytest.mark.parametrize(("asked", "told"), WRONG, ids=[told for _, told in WRONG])
def test_wrong_combination_is_refused_in_words(asked, told):
    with pytest.raises(UserError, match=told):
        combining.combination(**{"num_adapters": 2, "weights": "0.7,0.3", "kind": "linear", **asked})


def test_every_mistake_is_told_at_once_and_defaults_are_the_papers():
    with pytest.raises(UserError) as caught:
        combining.combination(2, "1", "linear", 3.0, 1)
    assert len(caught.value.problems) == 4
    assert combining.combination(2, "1,1", "ties") == Combination("ties", (1.0, 1.0), 0.2, None)
    assert combining.combination(2, "1,1", "dare") == Combination("dare", (1.0, 1.0), 0.5, 0)
    assert combining.combination(2, "0.7,-0.3", "linear") == Combination("linear", (0.7, -0.3), None, None)
