"""The arithmetic of training: memory that runs out, float16, numbers that are none, optimizers; by trust case."""

import math

import pytest
import torch
from conftest import adapter_bytes, chat, make_model, make_tokenizer, metrics, run, write_rows
from loop_kit import job, lora, plan, weights
from method_kit import SETTINGS
from safetensors.torch import load_file
from test_run_resume import Killed, kill_after

from ftune import batches, data, folder, train
from ftune.errors import RunError, UserError
from ftune.methods import METHODS
from ftune.methods.base import trainable
from ftune.objectives import classification, sft

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


def test_auto_begins_with_less_where_gradients_are_computed_on_a_cpu():
    found = plan(3, micro_batch_tokens="auto")
    on = {kind: found.for_training(torch.device(kind)).micro_batch_tokens for kind in ("cpu", "cuda")}
    assert on == {"cpu": 1408, "cuda": 4096}
    assert train.begin_finding(lora(), found).micro_batch_tokens == 1408
    assert plan(3, micro_batch_tokens=4096).for_training(torch.device("cpu")).micro_batch_tokens == 4096


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


@pytest.mark.parametrize("instructions", ["avx512_bf16", "amx_bf16", None])
def test_a_cpu_holds_a_base_in_bfloat16_where_it_is_stored_so_and_multiplied_fast(monkeypatch, instructions):
    from ftune.model import resolve_dtype

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {instructions: True, "avx2": True})
    cpu = torch.device("cpu")
    fast = torch.float32 if instructions is None else torch.bfloat16
    assert resolve_dtype("auto", cpu, False, torch.bfloat16) == fast
    for trains_base, stored in ((True, torch.bfloat16), (False, torch.float16), (False, torch.float32)):
        assert resolve_dtype("auto", cpu, trains_base, stored) == torch.float32
    assert resolve_dtype("bfloat16", cpu, False, torch.float32) == torch.bfloat16


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
