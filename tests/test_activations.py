"""What a backward pass needs is kept, made again or put aside: the gradients stay, the memory does not."""

from dataclasses import replace

import pytest
import torch
from conftest import adapter_bytes, make_model, run, save_base, write_recipe
from torch._subclasses.fake_tensor import FakeTensorMode

from ftune import activations, folder, plan, train
from ftune.errors import UserError
from ftune.recipe import TrainingSection, load
from ftune.run import preview
from ftune.run.inputs import require

CPU = torch.device("cpu")
TOKENS = 128
PLAN = train.TrainingPlan(TrainingSection(), 1, True, "auto", 0, found_tokens=TOKENS)
WAYS = [False, "half", True, "offload"]


def layers_made_again(model):
    """How often the layers are passed in a step's forward and backward pass together."""
    passes = []
    for index, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_pre_hook(lambda module, inputs, index=index: passes.append(index))
    ids = torch.tensor([[5, 6, 7, 8]])
    model.train()(ids).logits.square().mean().backward()
    return [passes.count(index) - 1 for index in range(len(model.model.layers))]


@pytest.mark.parametrize(
    ("way", "expected"), [(False, [0, 0, 0, 0]), ("half", [1, 0, 1, 0]), (True, [1] * 4), ("offload", [1] * 4)]
)
def test_the_layers_that_are_made_again(way, expected):
    model = make_model(num_hidden_layers=4)
    activations.set_up(model, way)
    assert layers_made_again(model) == expected


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_what_is_predicted_is_what_autograd_keeps(kind):
    with FakeTensorMode():
        predicted = activations.bytes_by_checkpointing(make_model(kind, num_hidden_layers=8), PLAN)
    assert list(predicted) == WAYS
    assert sorted(predicted.values(), reverse=True) == list(predicted.values())
    one_layer = predicted["offload"] - TOKENS * 64 * 4  # the one that is being made again, without its input
    for way in WAYS[:3]:
        with FakeTensorMode():
            model = make_model(kind, num_hidden_layers=8)
            activations.set_up(model, way)
            kept = sum(activations.kept_bytes(model, PLAN, TOKENS))
        assert kept == pytest.approx(predicted[way] - (one_layer if way else 0), rel=0.02)


def test_half_is_refused_where_a_layer_has_no_say():
    model = make_model()
    model.model.layers[1] = torch.nn.Identity()
    with pytest.raises(UserError, match=r"Identity does not say .*(?s:.)*use true"):
        activations.set_up(model, "half")


def test_auto_makes_as_little_again_as_there_is_room_for(monkeypatch):
    model, peaks = make_model(), {False: 900, "half": 500, True: 200, "offload": 100}
    chosen = []
    for memory in (1000, 978, 600, 300, 50):
        monkeypatch.setattr(activations, "room", lambda device, memory=memory: memory)
        chosen.append(activations.chosen("auto", model, peaks, CPU))
    assert chosen == [False, "half", "half", True, True]
    monkeypatch.setattr(activations, "room", lambda device: 50)
    assert activations.chosen("auto", model, peaks, torch.device("cuda")) == "offload"
    assert [activations.chosen(way, model, peaks, CPU) for way in (False, True, "half")] == [False, True, "half"]


def test_auto_is_the_same_in_all_processes(monkeypatch):
    """They gather layers together, and may have other memory free."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(activations, "room", lambda device: pytest.fail("looked at this process's memory"))
    assert activations.chosen("auto", make_model(), dict.fromkeys(WAYS, 1), CPU) is False
    monkeypatch.setattr(activations, "LARGE", 1000)
    assert activations.chosen("auto", make_model(), dict.fromkeys(WAYS, 1), CPU) is True


def test_a_run_with_little_room_makes_layers_again_and_says_so(workspace, monkeypatch, capsys):
    asked, set_up = [], activations.set_up
    monkeypatch.setattr(activations, "set_up", lambda model, way: (asked.append(way), set_up(model, way)))
    save_base(workspace / "base", num_hidden_layers=8)
    base = {"training": {"max_steps": 2}}
    _, path = run(workspace, **base)
    assert folder.read_json(path / "plan.json")["gradient_checkpointing"] is False
    peak = folder.read_json(path / "plan.json")["memory_bytes"]["training_peak"]
    monkeypatch.setattr(activations, "room", lambda device: int(peak / activations.SHARE) - 1000)
    capsys.readouterr()
    _, path = run(workspace, overwrite=True, **base)
    assert "every other layer are made again" in " ".join(capsys.readouterr().err.split())
    found = folder.read_json(path / "plan.json")
    assert found["gradient_checkpointing"] == "half"
    assert found["memory_bytes"]["training_peak"] < peak
    assert asked == [False, "half"]


def test_a_run_whose_activations_wait_in_main_memory_ends_the_same(workspace, monkeypatch):
    """On a CPU as well, where nobody may ask for it."""
    waits, save_on_cpu = [], torch.autograd.graph.save_on_cpu
    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", lambda **how: (waits.append(how), save_on_cpu(**how))[1])
    adapters = []
    for way in (True, "offload"):
        monkeypatch.setattr(activations, "chosen", lambda *arguments, way=way: way)
        _, path = run(workspace, overwrite=True, training={"max_steps": 2})
        adapters.append(adapter_bytes(path))
    assert adapters[0] == adapters[1]
    assert waits == [{"pin_memory": torch.cuda.is_available()}] * 2


def test_offloading_is_refused_on_a_cpu(workspace):
    loaded = load(write_recipe(workspace, training={"gradient_checkpointing": "offload"}))
    [problem] = preview.check(loaded)["problems"]
    assert "main memory already" in problem["what"]
    with pytest.raises(UserError, match="use true, half or auto"):
        require(loaded)


def test_what_waits_in_main_memory_comes_back_as_it_was():
    model = make_model()
    ids = torch.tensor([[5, 6, 7, 8]])
    gradients = []
    for offloads in (False, True):
        model.zero_grad()
        with train.offloading(replace(PLAN, offloads=offloads)):
            loss = model(ids).logits.square().mean()
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(*gradients, atol=0, rtol=0)


def test_the_plan_of_an_impossible_way_is_of_none(workspace):
    """Prefix tuning without packing keeps its activations, whatever room there is."""
    loaded = load(
        write_recipe(workspace, method={"name": "prefix_tuning"}, data={"train": "train.jsonl", "packing": False})
    )
    found = plan.make_plan(loaded, loaded.method, PLAN)
    assert found.checkpointing is False
