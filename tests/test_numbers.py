"""The arithmetic of training: memory that runs out, float16, numbers that are none, optimizers; by trust case."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import CHAT_ROWS, adapter_bytes, chat, make_model, make_tokenizer, metrics, run, write_rows
from method_kit import SETTINGS
from safetensors.torch import load_file, save_file
from test_run_resume import Killed, kill_after

from ftune import batches, data, folder, optimizers, train
from ftune.engine import Engine
from ftune.errors import RunError, UserError
from ftune.methods import METHODS
from ftune.methods.base import trainable
from ftune.objectives import classification, sft
from ftune.recipe import TrainingSection
from ftune.run.replaying import replay


@pytest.fixture
def rows(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", CHAT_ROWS)
    return data.load(make_tokenizer(), [data.Source(path)], data.Rules()).examples


def plan(steps=1, packing=True, **training):
    settings = {"learning_rate": 0.1, "batch_size": 8, "optimizer": "sgd", "warmup": 0.0, "schedule": "constant"}
    section = TrainingSection(max_steps=steps, **(settings | training))
    return train.TrainingPlan(section, steps, packing, "auto", 0)


def job(model, plan, method="full", objective=sft):
    made = train.Job(model, METHODS[method], objective, optimizers.make_optimizer(model, plan.training), Engine())
    return replace(made, found=train.begin_finding(model, plan))


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in trainable(model).items()}


def lora(dtype=torch.float32, dropout=0.0):
    model = make_model().to(dtype)
    METHODS["lora"].attach(model, SETTINGS["lora"].model_copy(update={"dropout": dropout}))
    return model


# Out of memory (case 52)


def fails_above(monkeypatch, tokens):
    """A machine with room for so many tokens at once. Returns the sizes of the micro-batches that were tried."""
    plain, tried = sft.summed_loss, []

    def limited(model, batch, packing):
        tried.append(len(batch))
        loss = plain(model, batch, packing)  # at its end, with random numbers drawn
        if len(batch) > tokens:
            raise torch.OutOfMemoryError("out of memory")
        return loss

    monkeypatch.setattr(sft, "summed_loss", limited)
    return tried


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_out_of_memory_makes_the_step_again_in_smaller_micro_batches(rows, monkeypatch, capsys, dropout):
    """Case 52: the same step, one line on screen, and the weights of a run that had that size from the start."""
    tried = fails_above(monkeypatch, 100)
    model = lora(dropout=dropout)
    found = plan(3, micro_batch_tokens="auto")
    steps = list(train.train(job(model, found, "lora"), rows, found))
    said = capsys.readouterr().err
    assert said.count("out of memory") == len(steps[0].skipped) > 0
    assert [len(step.skipped) for step in steps[1:]] == [0, 0]
    with monkeypatch.context() as patch:
        patch.undo()
        size = max(size for size in tried[-3:])
        other = lora(dropout=dropout)
        fixed = plan(3, micro_batch_tokens=int(steps_limit(said)))
        straight = list(train.train(job(other, fixed, "lora"), rows, fixed))
    assert size <= 100
    assert [(s.loss, s.row_ids) for s in steps] == [(s.loss, s.row_ids) for s in straight]
    torch.testing.assert_close(weights(model), weights(other), atol=0, rtol=0)


def steps_limit(said):
    """The last size that the screen names."""
    return said.rpartition("made again with ")[2].split(",")[0]


def test_result_does_not_depend_on_the_size_that_was_found(rows, monkeypatch):
    """Case 52: but for the order in which floats are added."""
    found = plan(3, micro_batch_tokens="auto")
    plenty, little = lora(), lora()
    list(train.train(job(plenty, found, "lora"), rows, found))
    fails_above(monkeypatch, 60)
    list(train.train(job(little, found, "lora"), rows, found))
    torch.testing.assert_close(weights(little), weights(plenty), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("tokens", "packing"), [("auto", True), ("auto", False), (4096, True)])
def test_what_cannot_be_cut_any_further_says_what_to_change(workspace, monkeypatch, tokens, packing):
    """Case 52: one example is never cut, and a fixed size is kept to."""
    tried = fails_above(monkeypatch, 5)
    with pytest.raises(RunError, match="out of memory") as caught:
        run(workspace, training={"micro_batch_tokens": tokens}, data={"packing": packing})
    assert "lower training.micro_batch_tokens" in caught.value.problems[0].hint
    assert len(tried) == 1 if tokens == 4096 or not packing else len(tried) > 1
    assert min(tried) >= 26
    assert not list((workspace / "run").glob("checkpoints/*"))


def test_out_of_memory_on_a_cpu_counts_too():
    assert train.is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not train.is_out_of_memory(RuntimeError("shapes do not match"))


def test_a_resumed_run_goes_on_with_the_size_that_was_found(workspace, monkeypatch):
    """Case 80 with case 52: also where the machine would have more room now, and with dropout."""
    sections = {
        "method": {"name": "lora", "rank": 4, "dropout": 0.1},
        "training": {"max_steps": 6, "batch_size": 8, "checkpoint_every": 2},
    }
    with monkeypatch.context() as patch:
        fails_above(patch, 100)
        _, clean = run(workspace, output={"dir": "clean"}, **sections)
        kill_after(patch, 3)
        with pytest.raises(Killed):
            run(workspace, **sections)
    _, path = run(workspace, resume=True, **sections)
    assert adapter_bytes(path) == adapter_bytes(clean)
    assert [line["loss"] for line in metrics(path)] == [line["loss"] for line in metrics(clean)]
    _, roomy = run(workspace, output={"dir": "roomy"}, **sections)
    assert adapter_bytes(roomy) != adapter_bytes(clean), "dropout should have shown another cut"


# float16 (case 45)


def inject(model, times, value=math.inf, name="layers.0"):
    """The gradient of one tensor is `value` the first so many times."""
    count = iter(range(times))
    parameter = next(p for n, p in trainable(model).items() if name in n and "lora_B" in n)
    return parameter.register_hook(lambda g: torch.full_like(g, value) if next(count, None) is not None else g)


def half_step(rows, steps=2, overflows=0, scale=None):
    model, wanted = lora(torch.float16), plan(steps, optimizer="adamw", learning_rate=0.01)
    made = job(model, wanted, "lora")
    if scale is not None:
        made.found.scaler.load_state_dict({**made.found.scaler.state_dict(), "scale": scale})
    hook = inject(model, overflows) if overflows else None
    done = list(train.train(made, rows, wanted))
    if hook:
        hook.remove()
    return model, made, done


def test_an_overflow_in_float16_is_skipped_and_the_step_made_again(rows):
    """Case 45: step, rows, rate and optimizer are as if it had not been; the scale is halved and stays so."""
    model, made, done = half_step(rows, overflows=2)
    assert [len(step.skipped) for step in done] == [2, 0]
    assert done[0].skipped[0] == "the gradient overflowed float16 at loss scale 65536"
    assert made.found.scaler.get_scale() == 65536 / 4
    straight, _, other = half_step(rows, scale=65536 / 4)
    assert [(s.step, s.loss, s.grad_norm, s.row_ids, s.learning_rate) for s in done] == [
        (s.step, s.loss, s.grad_norm, s.row_ids, s.learning_rate) for s in other
    ]
    torch.testing.assert_close(weights(model), weights(straight), atol=0, rtol=0)
    in_float32 = plan(2, optimizer="adamw", learning_rate=0.01)
    same = list(train.train(job(lora(), in_float32, "lora"), rows, in_float32))
    assert [s.grad_norm for s in done] == pytest.approx([s.grad_norm for s in same], rel=0.02)
    (state, *_) = made.optimizer.state.values()
    assert int(state["step"]) == 2


def test_too_many_overflows_in_a_row_stop_the_run(rows):
    """Case 45: at scale 1 it is not the scale's doing."""
    before = weights(lora(torch.float16))
    model, wanted = lora(torch.float16), plan(2)
    inject(model, 1000)
    with pytest.raises(train.NonFinite, match="non-finite gradient at step 1"):
        list(train.train(job(model, wanted, "lora"), rows, wanted))
    torch.testing.assert_close(weights(model), before, atol=0, rtol=0)


def test_scaling_the_loss_saves_gradients_that_float16_would_lose(rows):
    """Against the same float16 weights computed in float32; without a scale small gradients come out as 0."""

    def gradients(dtype, scale):
        model = make_model(scale=0.02).to(torch.float16).to(dtype)
        METHODS["lora"].attach(model, SETTINGS["lora"])
        made = job(model, plan(), "lora")
        if made.found.scaler.is_enabled():
            made.found.scaler.load_state_dict({**made.found.scaler.state_dict(), "scale": scale})
        train.accumulate(made, train.Share(list(batches.micro_batches(rows, 4096))), plan())
        made.found.scaler.unscale_(made.optimizer)
        return torch.cat([p.grad.flatten() for n, p in trainable(model).items() if "lora_B" in n])

    exact = gradients(torch.float32, 1.0)

    def error(scale):
        return float((gradients(torch.float16, scale) - exact).norm() / exact.norm())

    assert error(65536.0) < 0.05
    assert error(1.0) > 4 * error(65536.0)


def test_scaler_goes_into_the_checkpoint_and_comes_back():
    """Scale and the steps since it last changed."""
    model = lora(torch.float16)
    first, second = train.begin_finding(model, plan()), train.begin_finding(model, plan())
    first.scaler.load_state_dict({**first.scaler.state_dict(), "scale": 1024.0, "_growth_tracker": 7})
    second.restore(folder.json.loads(folder.json.dumps(first.as_dict())))
    assert second.scaler.state_dict() == first.scaler.state_dict()
    assert not train.begin_finding(lora(torch.bfloat16), plan()).scaler.is_enabled()


def test_float16_weights_are_not_trained(workspace):
    """Case 45, also on a GPU."""
    from ftune.model import resolve_dtype

    with pytest.raises(UserError, match="float16 is too narrow for weights that are trained"):
        resolve_dtype("float16", torch.device("cuda"), True, torch.float16)
    assert resolve_dtype("float16", torch.device("cuda"), False, torch.float16) == torch.float16
    assert resolve_dtype("auto", torch.device("cuda"), True, torch.float16) == torch.float32


def test_bfloat16_weights_are_trained_with_a_warning(workspace, capsys):
    """Case 44: nobody chooses that by accident."""
    _, path = run(workspace, method={"name": "full"}, model={"dtype": "bfloat16"})
    assert "rounds small updates away" in capsys.readouterr().err
    assert folder.read_json(path / "manifest.json")["dtypes"] == ["bfloat16"]


def test_every_adapter_tensor_moves_over_a_bfloat16_base(workspace):
    """Case 44: 50 steps of 1e-5."""
    _, path = run(
        workspace, model={"dtype": "bfloat16"},
        training={"learning_rate": 1e-5, "max_steps": 50, "batch_size": 2, "optimizer": "adamw"},
    )  # fmt: skip
    manifest = folder.read_json(path / "manifest.json")
    assert (manifest["dtypes"], manifest["compute_dtype"]) == (["float32"], "bfloat16")
    assert set(manifest["changed"]) == set(manifest["trainable"])
    for name, tensor in load_file(path / "adapter" / "adapter_model.safetensors").items():
        if "lora_B" in name:  # it starts at 0
            assert 1e-5 < float(tensor.abs().max()) < 1e-3


# Numbers that are none (case 46)


def break_base(workspace, value=math.inf):
    file = workspace / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = value
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_loss_that_is_none_leaves_a_replay_that_shows_it_again(workspace, dropout):
    """Case 46: text, metrics, no checkpoint of that step, and the batch to look at."""
    break_base(workspace)
    with pytest.raises(RunError, match=r"non-finite loss at step 1, rows \[train.jsonl:"):
        run(workspace, method={"name": "lora", "rank": 4, "dropout": dropout}, data={"packing": False})
    path = workspace / "run"
    (line,) = folder.read_json_lines(path / "metrics.jsonl")
    assert (line["step"], line["non_finite"], line["value"]) == (1, "loss", "nan")
    found = replay(path)
    assert (found["recorded"], found["replayed"]) == ("nan", "nan")
    assert found["row_ids"] == line["row_ids"]
    assert {file.suffix for file in (path / "replay").iterdir()} == {".json", ".safetensors"}
    assert not list(path.glob("checkpoints/*"))


def test_a_step_that_explodes_is_replayed_from_the_weights_before_it(workspace):
    """Case 46: lr 1e20. The replayed value is the recorded one; no checkpoint of that step or later exists."""
    sections = {
        "training": {
            "learning_rate": 1e20, "max_grad_norm": 1e30, "max_steps": 50, "optimizer": "sgd", "checkpoint_every": 1,
        }
    }  # fmt: skip
    with pytest.raises(train.NonFinite) as caught:
        run(workspace, **sections)
    path, step = workspace / "run", caught.value.step
    found = replay(path)
    assert found["step"] == step > 1
    assert found["recorded"] == found["replayed"] == str(caught.value.value)
    kept = [int(folder_.name.removeprefix("step-")) for folder_ in (path / "checkpoints").glob("step-*")]
    assert max(kept) == step - 1
    assert [line["loss"] for line in metrics(path) if line["step"] >= step] == []
    saved = load_file(path / "replay" / "parameters.safetensors")
    before = load_file(path / "checkpoints" / f"step-{step - 1:06d}" / "parameters.safetensors")
    torch.testing.assert_close(saved, before, atol=0, rtol=0)


def test_a_gradient_that_is_none_is_replayed_and_its_tensors_named(workspace, monkeypatch):
    """A finite loss whose gradient is not: of a hook here, of sqrt(0) elsewhere."""
    plain = sft.summed_loss
    monkeypatch.setattr(sft, "summed_loss", lambda *a: (loss := plain(*a)) + 0 * torch.sqrt(loss * 0))
    with pytest.raises(RunError, match="non-finite gradient at step 1"):
        run(workspace)
    found = replay(workspace / "run")
    assert (found["what"], found["recorded"], found["replayed"]) == ("gradient", "nan", "nan")
    assert any("lora_B" in name for name in found["gradients"])


def test_a_run_that_gets_past_the_step_leaves_no_replay(workspace, monkeypatch):
    with monkeypatch.context() as patch:
        plain = sft.summed_loss
        patch.setattr(sft, "summed_loss", lambda *a: plain(*a) * math.nan)
        with pytest.raises(RunError):
            run(workspace)
    assert (workspace / "run" / "replay").is_dir()
    _, path = run(workspace, resume=True)
    assert not (path / "replay").exists()
    assert [line["step"] for line in folder.read_json_lines(path / "metrics.jsonl")] == [1, 2, 3, 4]


# Optimizers and their parameters (cases 42, 50, 53)


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


# Cutting a step (cases 2 and 3)


def test_a_classifiers_step_does_not_depend_on_its_micro_batches(tmp_path):
    """Case 2: rows weigh alike, however many there are in a micro-batch."""
    from ftune.classifier import Classes, build

    path = write_rows(tmp_path / "rows.jsonl", [{"text": "ab" * (1 + i), "label": "xy"[i % 2]} for i in range(8)])
    found = data.load(make_tokenizer(), [data.Source(path)], data.Rules(format="labelled"))
    examples = data.with_class_ids(found, data.sorted_labels(found.examples), "rows").examples
    steps = []
    for tokens in (10_000, 20, 1):
        model = build(make_model(), Classes(("x", "y"), 0))
        wanted = plan(micro_batch_tokens=tokens)
        (step,) = train.train(job(model, wanted, objective=classification), examples, wanted)
        steps.append(step)
    for step in steps[1:]:
        assert step.loss == pytest.approx(steps[0].loss, rel=1e-5)
        assert step.grad_norm == pytest.approx(steps[0].grad_norm, rel=1e-5)
    assert steps[0].supervised_tokens == 8


def test_the_last_smaller_batch_is_a_step_of_its_own(rows):
    """Case 3: 5 rows by twos against a loop written out here, each window over its own number of tokens."""
    model, wanted = make_model(), plan(3, batch_size=2, micro_batch_tokens=1, max_grad_norm=1e9)
    examples = rows[:5]
    steps = list(train.train(job(model, wanted), examples, wanted))
    assert sorted(row for step in steps for row in step.row_ids) == sorted(example.row_id for example in examples)
    assert [len(step.row_ids) for step in steps] == [2, 2, 1]
    by_hand, by_id = make_model(), {example.row_id: example for example in examples}
    for step in steps:
        total, count = 0.0, 0
        for row_id in step.row_ids:
            tokens = by_id[row_id].tokens
            logits = by_hand(torch.tensor([tokens.input_ids])).logits[0, :-1]
            labels = torch.tensor(tokens.labels[1:])
            total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
            count += int((labels != -100).sum())
        gradients = torch.autograd.grad(total / count, list(by_hand.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(by_hand.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    torch.testing.assert_close(weights(model), weights(by_hand), atol=1e-6, rtol=0)


def test_a_row_longer_than_a_micro_batch_and_a_batch_of_one(workspace):
    """Such a row is a micro-batch of its own; a batch of one row is a step like any other."""
    write_rows(workspace / "train.jsonl", [chat("a" * 60, "b"), chat("c", "d" * 9)])
    outcomes = []
    for tokens in (10, 4096):
        _, path = run(workspace, overwrite=True, training={"batch_size": 1, "micro_batch_tokens": tokens})
        outcomes.append(adapter_bytes(path))
        assert [len(line["row_ids"]) for line in metrics(path)] == [1, 1, 1, 1]
    assert outcomes[0] == outcomes[1]
