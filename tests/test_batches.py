"""Packing keeps every token, isolates samples, and its order is a pure function. Numbers: trust cases."""

import numpy as np
import pytest
import torch
from conftest import CHAT_ROWS, make_model, make_tokenizer, write_rows
from hypothesis import given
from hypothesis import strategies as st

from ftune import attention, batches, comparing, data, last_layer, schedule
from ftune.data import Mixture
from ftune.errors import UserError
from ftune.objectives import sft


@pytest.fixture
def examples(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", CHAT_ROWS)
    return data.load(make_tokenizer(), [data.Source(path)], data.Rules()).examples


ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 8},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8},
    "gpt2": {},
    "gpt_neox": {},
    "phi": {},
    "phi3": {},
    "granite": {"logits_scaling": 3.0},
    "cohere2": {"sliding_window": 8},
    "olmo2": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "starcoder2": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 4},
}


@pytest.mark.parametrize("name", ["auto", "eager"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_packed_rows_give_the_logits_of_single_rows(kind, name):
    """Case 19: weights are large and windows shorter than the rows, so that a missing window or soft cap would show."""
    model = make_model(kind, scale=4.0, **ARCHITECTURES[kind])
    assert comparing.prove_packing(model, name) < 1e-5
    assert last_layer.has_cut(model)


@pytest.mark.parametrize("window", [None, 3])
def test_half_precision_attention_on_a_cpu_has_float32_gradients(window, monkeypatch):
    dtypes, kernel = set(), attention.FLASH_GRADIENTS
    watched = lambda *states, **kwargs: (dtypes.update(t.dtype for t in states[:5]), kernel(*states, **kwargs))[1]  # noqa: E731
    monkeypatch.setattr(attention, "FLASH_GRADIENTS", watched)
    generator = torch.Generator().manual_seed(0)
    query, key, value, gradient = (
        torch.randn((1, 2, 9, 16), generator=generator).bfloat16().requires_grad_() for _ in range(4)
    )
    module, bounds = torch.nn.Module(), (0, 4, 9)

    def attend(*states):
        output, _ = attention._segment_attention(
            module, *states, None, way="sdpa", segment_bounds=bounds, sliding_window=window
        )
        return output

    output = attend(query, key, value)
    wide = [states.detach().float().requires_grad_() for states in (query, key, value)]
    expected = attend(*wide)
    torch.testing.assert_close(output, expected.bfloat16(), atol=1e-2, rtol=1e-2)
    upstream = gradient.detach().transpose(1, 2)
    output.backward(upstream)
    expected.backward(upstream.float())
    for states, theirs in zip((query, key, value), wide, strict=True):
        assert (states.grad.float() - theirs.grad).norm() < 5e-3 * theirs.grad.norm()
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("window", [None, 3])
def test_attention_on_a_cpu_has_the_gradients_of_its_definition(window):
    """All segments are one function there; one of them is as long as the window, one a single token."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn((1, 4, 13, 8), generator=generator).requires_grad_() for _ in range(3)]
    upstream = torch.randn((1, 13, 4, 8), generator=generator)

    def gradients(way):
        output, _ = attention._segment_attention(
            torch.nn.Module(), *states, None, way=way, segment_bounds=(0, 4, 7, 8, 13), sliding_window=window
        )
        return output, *torch.autograd.grad(output, states, upstream)

    torch.testing.assert_close(gradients("sdpa"), gradients("eager"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "shape"), [("bloom", {}), ("falcon", {}), ("gpt_oss", {"head_dim": 16, "num_local_experts": 4})]
)
def test_architecture_that_cannot_be_packed_is_refused(kind, shape):
    with pytest.raises(UserError, match="cannot be packed"):
        comparing.prove_packing(make_model(kind, scale=4.0, **shape), "auto")


def test_other_samples_of_a_pack_do_not_touch_a_samples_loss_or_gradient(examples):
    """Case 19."""
    llama = make_model()

    def measure(group, rows):
        batch = batches.collate(group)
        llama.zero_grad()
        with attention.packed(llama):
            losses = sft.token_losses(llama, batch, True)
        of_rows = torch.tensor([batch.row_ids[k] in rows for k in batch.segment_ids])
        positions, _ = sft.loss.predicting_positions(batch.labels)
        losses[of_rows[positions]].sum().backward()
        return losses[of_rows[positions]].detach(), [p.grad.clone() for p in llama.parameters()]

    row = {examples[0].row_id}
    alone, grads_alone = measure(examples[:1], row)
    packed, grads_packed = measure([examples[5], examples[0], examples[6]], row)
    torch.testing.assert_close(alone, packed, atol=1e-5, rtol=0)
    torch.testing.assert_close(grads_alone, grads_packed, atol=1e-5, rtol=0)


def test_segments_restart_positions_and_predict_nothing_across_borders(examples):
    """Case 20."""
    batch = batches.collate(examples[:5])
    for start, end in zip(batch.bounds, batch.bounds[1:], strict=False):
        assert batch.position_ids[0, start:end].tolist() == list(range(end - start))
        assert batch.labels[0, start] == -100
    assert batch.num_supervised == sum(e.tokens.num_supervised for e in examples[:5])


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 100), st.booleans())
def test_packing_loses_nothing_and_keeps_its_budget(lengths, budget, packing):
    """Case 21."""
    groups = batches.split(lengths, budget, packing)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in group) <= budget or len(group) == 1 for group in groups)


@given(st.integers(1, 40), st.integers(1, 16), st.integers(0, 5))
def test_every_epoch_visits_every_example_once(count, batch_size, seed):
    """Cases 3 and 30: the last, smaller batch is trained on, and a batch larger than the data is one step."""
    per_epoch = schedule.steps_per_epoch(count, batch_size)
    epochs = [
        [
            i
            for step in range(1, per_epoch + 1)
            for i in batches.step_indices(e * per_epoch + step, Mixture((count,), (count,)), batch_size, seed)
        ]
        for e in range(2)
    ]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)


def test_order_depends_on_seed_and_epoch():
    """Case 51."""
    rows = Mixture((20,), (20,))
    orders = {tuple(rows.order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    assert rows.order(0, 0).tolist() == rows.order(0, 0).tolist()


@given(st.lists(st.tuples(st.integers(1, 30), st.sampled_from([0.25, 0.5, 1, 2.5, 3])), min_size=1, max_size=3))
def test_an_epoch_sees_each_source_as_often_as_its_weight_says(sources):
    """Case 32; and no row is seen again before every other row of its source was."""
    counts, weights = zip(*sources, strict=True)
    rows = Mixture.of(counts, weights)
    epochs = [rows.order(3, epoch) for epoch in range(4)]
    assert all(len(epoch) == len(rows) for epoch in epochs)
    start = 0
    for count, wanted in zip(counts, rows.per_epoch, strict=True):
        seen = np.array([np.bincount(epoch, minlength=sum(counts))[start : start + count] for epoch in epochs])
        assert (seen.sum(axis=1) == wanted).all()
        so_far = seen.cumsum(axis=0)
        assert (so_far.max(axis=1) - so_far.min(axis=1) <= 1).all()
        start += count
