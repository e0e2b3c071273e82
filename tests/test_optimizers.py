"""Optimizers and their parameters. Trust cases 42, 50, 53."""

import pytest
import torch
from conftest import make_model, run
from loop_kit import job, lora, plan, weights
from method_kit import SETTINGS

from ftune import folder, optimizers, train
from ftune.methods import METHODS
from ftune.methods.base import trainable


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_weight_decay_shrinks_matrices_and_nothing_else(name):
    """Case 50: one step of zero gradients, decay 0.5, rate 0.1."""
    for settings in ("full", "dora", "ia3", "bottleneck, serial"):
        model = make_model("qwen2")
        METHODS[SETTINGS[settings].name].attach(model, SETTINGS[settings])
        before = weights(model)
        for parameter in trainable(model).values():
            parameter.grad = torch.zeros_like(parameter)
        optimizers.make_optimizer(model, plan(optimizer=name, weight_decay=0.5).training).step()
        groups = optimizers.decay_groups(model)
        assert sorted(groups["decayed"] + groups["not_decayed"]) == sorted(before)
        for tensor_name, now in weights(model).items():
            shrinks = tensor_name in groups["decayed"]
            assert shrinks == (now.ndim > 1)
            torch.testing.assert_close(now, before[tensor_name] * (0.95 if shrinks else 1.0), atol=1e-7, rtol=0)


def test_manifest_lists_what_is_decayed_and_what_is_not(workspace):
    """Case 50."""
    _, path = run(workspace, method={"name": "dora", "rank": 4}, training={"weight_decay": 0.1})
    manifest = folder.read_json(path / "manifest.json")
    groups = manifest["weight_decay"]
    assert sorted(groups["decayed"] + groups["not_decayed"]) == sorted(manifest["trainable"])
    assert all("magnitude" in name for name in groups["not_decayed"])
    assert groups["not_decayed"]


@pytest.mark.parametrize("name", SETTINGS)
def test_optimizer_has_every_trainable_parameter_once(name):
    """Case 53, with those that have learning rates of their own."""
    kind = "qwen2" if name == "bitfit" else "llama"
    model = make_model(kind)
    METHODS[SETTINGS[name].name].attach(model, SETTINGS[name])
    made = optimizers.make_optimizer(model, plan(optimizer="adamw", weight_decay=0.1).training)
    ids = [id(parameter) for group in made.param_groups for parameter in group["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(parameter) for parameter in trainable(model).values()}
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_a_tensor_that_no_gradient_reaches_is_named(rows, capsys):
    """Case 53."""
    model = lora()
    model.forgotten = torch.nn.Parameter(torch.zeros(3))
    wanted = plan(2)
    list(train.train(job(model, wanted, "lora"), rows, wanted))
    said = capsys.readouterr().err
    assert said.count("no gradient reached forgotten in step 1") == 1


def test_eight_bit_adamw_of_bitsandbytes_is_adamw_on_a_cpu():
    """The first step is AdamW's exactly (its moments are rounded after it), later ones within their 8 bits."""
    torch.manual_seed(0)
    start = torch.randn(128, 64)
    gradients = [torch.randn(128, 64) * 10 ** torch.randn(128, 1) for _ in range(20)]

    def path(name):
        model = torch.nn.Module()
        model.weight = torch.nn.Parameter(start.clone())
        model.get_input_embeddings = lambda: model
        made = optimizers.make_optimizer(model, plan(optimizer=name, learning_rate=1e-3, weight_decay=0.1).training)
        seen = []
        for gradient in gradients:
            model.weight.grad = gradient.clone()
            made.step()
            seen.append(model.weight.detach().clone())
        return seen, made.state[model.weight]

    (exact, _), (rounded, state) = path("adamw"), path("adamw_8bit")
    assert state["state1"].dtype == torch.uint8
    torch.testing.assert_close(rounded[0], exact[0], atol=1e-7, rtol=1e-5)
    moved = (exact[-1] - start).norm()
    assert float((rounded[-1] - exact[-1]).norm() / moved) < 0.1
