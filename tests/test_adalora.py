"""AdaLoRA's budget: the paper's schedule, PEFT's allocation, ranks that really shrink and stay."""

import copy

import pytest
import torch
from conftest import make_model
from method_kit import ROWS
from peft import AdaLoraConfig, get_peft_model

from ftune.methods import METHODS, adalora
from ftune.settings import AdaloraSettings

STEPS = 40
SETTINGS = AdaloraSettings(initial_rank=6, target_rank=2, alpha=6, initial_fraction=0.2, final_fraction=0.3)


def test_budget_falls_from_the_initial_to_the_target_rank_as_a_cubic():
    """Equation 12 of the paper, for 10 layers: 60 triplets down to 20 between steps 8 and 28."""
    budgets = [adalora.budget(step, STEPS, 60, 20, SETTINGS) for step in range(STEPS + 1)]
    assert budgets[:9] == [60] * 9
    assert budgets[18] == int(20 + 40 * 0.5**3)
    assert budgets[28:] == [20] * 13
    assert budgets == sorted(budgets, reverse=True)


def train(model, steps, after):
    """A few steps on fixed rows; `after` is called as the loop does."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        for row in ROWS:
            ids = torch.tensor([row])
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        after(step)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_ranks_are_pruned_as_peft_prunes_them():
    """The same start, gradients and schedule: the same singular values are left after every step."""
    ours = make_model()
    theirs = get_peft_model(
        copy.deepcopy(ours),
        AdaLoraConfig(
            task_type="CAUSAL_LM", target_modules="all-linear", init_r=6, target_r=2, lora_alpha=6, total_step=STEPS,
            tinit=8, tfinal=12, deltaT=1, orth_reg_weight=0.0,
        ),
    )  # fmt: skip
    METHODS["adalora"].attach(ours, SETTINGS.model_copy(update={"orthogonal_weight": 0.0}))
    layers = {path: module for path, module in ours.named_modules() if isinstance(module, adalora.AdaloraLinear)}
    with torch.no_grad():
        for path, layer in layers.items():
            for name in adalora.TRIPLET:
                theirs.get_submodule(f"base_model.model.{path}").get_submodule(name)["default"].copy_(
                    getattr(layer, name)
                )
    kept = {"ours": [], "theirs": []}

    def after_ours(step):
        adalora.after_step(ours, step, STEPS)
        kept["ours"].append([(layer.lora_E != 0).sum().item() for layer in layers.values()])

    def after_theirs(step):
        theirs.base_model.update_and_allocate(step)
        found = [theirs.get_submodule(f"base_model.model.{path}").lora_E["default"] for path in layers]
        kept["theirs"].append([(values != 0).sum().item() for values in found])

    train(ours, STEPS, after_ours)
    train(theirs, STEPS, after_theirs)
    assert kept["ours"] == kept["theirs"]
    assert sum(kept["ours"][-1]) == 2 * len(layers)
    assert len(set(kept["ours"][-1])) > 1, "some layers keep more than others"


def test_orthogonality_penalty_pulls_the_factors_towards_orthonormal_rows():
    model = make_model()
    METHODS["adalora"].attach(model, SETTINGS)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    first = adalora.penalty(model).item()
    for _ in range(200):
        optimizer.zero_grad()
        adalora.penalty(model).backward()
        optimizer.step()
    layer = adalora.layers_of(model)[0]
    assert adalora.penalty(model).item() < 0.1 * first
    torch.testing.assert_close(layer.lora_A @ layer.lora_A.T, torch.eye(6), atol=0.1, rtol=0)
