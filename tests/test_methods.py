"""One contract over every method and architecture. Numbers: trust cases."""

from itertools import pairwise

import pytest
import torch
from conftest import make_model, make_tokenizer, save_base
from method_kit import CONTRACT, ROWS, SETTINGS, assert_same, logits, randomize
from transformers import AutoModelForCausalLM

from ftune import attention, comparing, few_sizes, last_layer
from ftune import model as models
from ftune.artifacts import files
from ftune.batches import collate
from ftune.chat import Tokens
from ftune.data import Example
from ftune.errors import UserError
from ftune.methods import METHODS
from ftune.methods.base import trainable
from ftune.recipe import ModelSection
from ftune.settings import METHOD_NAMES, LoraSettings


@pytest.fixture(params=CONTRACT, ids=" ".join)
def pair(request):
    return request.param


@pytest.fixture
def kind(pair):
    return pair[0]


@pytest.fixture
def settings(pair):
    return SETTINGS[pair[1]]


@pytest.fixture
def method(settings):
    return METHODS[settings.name]


def test_starts_equal_to_the_base(kind, method, settings):
    """What stands in front of the text changes it from the start; all else starts without any effect."""
    base = logits(make_model(kind))
    model = make_model(kind)
    method.attach(model, settings)
    assert (comparing.max_difference(logits(model), base) == 0) != hasattr(settings, "virtual_tokens")


def test_trains_what_it_says_and_leaves_the_rest_bit_identical(kind, method, settings):
    """Case 57: changed == trainable, after a real optimizer step on every parameter that has a gradient."""
    model = make_model(kind)
    of_the_base = {id(parameter) for parameter in model.parameters()}
    method.attach(model, settings)
    if not method.trains_base:
        assert not any(id(parameter) in of_the_base for parameter in trainable(model).values())
    randomize(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.tensor([ROWS[1]])).logits.square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(trainable(model))
    assert all(p.dtype == torch.float32 for p in trainable(model).values())


def test_merge_gives_the_same_logits_or_refuses(kind, method, settings):
    """Cases 62 and 72."""
    model = make_model(kind)
    base, modules = logits(model), {type(module) for module in model.modules()}
    method.attach(model, settings)
    tuned = logits(randomize(model))
    assert comparing.max_difference(tuned, base) > 1e-3
    if not METHOD_NAMES[settings.name].abilities.merging:
        with pytest.raises(UserError, match="cannot be merged"):
            method.merge(model)
        return
    method.merge(model)
    assert_same(logits(model), tuned)
    assert {type(module) for module in model.modules()} == modules


def test_works_on_the_meta_device(kind, method, settings):
    with torch.device("meta"):
        model = make_model(kind)
    method.attach(model, settings)
    real = make_model(kind)
    method.attach(real, settings)
    assert {n: p.shape for n, p in trainable(model).items()} == {n: p.shape for n, p in trainable(real).items()}
    assert all(p.is_meta for p in model.parameters())


def packed_batch():
    """Three rows of unequal length."""
    tokens = [Tokens(row, [True] * len(row)) for row in ROWS]
    return collate([Example(str(i), "", row, {}) for i, row in enumerate(tokens)])


def test_packed_rows_give_the_logits_of_single_rows(kind, method, settings):
    """Case 19, with whatever the method puts in front of every sample."""
    model = make_model(kind)
    method.attach(model, settings)
    randomize(model)
    comparing.prove_packing(model, "auto")
    with torch.no_grad(), attention.packed(model):
        batch = packed_batch()
        packed = models.head(model)(models.hidden_states(model, batch, packing=True))
    assert_same([packed[start:end] for start, end in pairwise(batch.bounds)], logits(model))


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_gradients_are_the_same_where_the_last_layer_is_cut(kind, method, settings, is_checkpointed):
    """Past its attention it computes the positions that something is learned from alone."""

    def gradients(positions):
        model.zero_grad()
        with attention.packed(model):
            states = models.hidden_states(model, packed_batch(), True, positions)
            (states if positions is not None else states[wanted]).square().mean().backward()
        return {name: p.grad for name, p in trainable(model).items() if "lm_head" not in name}

    wanted = torch.tensor([1, 2, 5, 9])
    model = make_model(kind)
    method.attach(model, settings)
    comparing.prove_packing(randomize(model), "auto")
    assert last_layer.has_cut(model)
    if is_checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
        for layer in models.decoder_layers(model)[1]:
            layer.training = True  # which checkpoints it, and leaves the dropout in it off
    torch.testing.assert_close(gradients(wanted), gradients(None), atol=1e-6, rtol=1e-5)


def test_gradients_are_the_same_in_few_sizes(kind, method, settings, monkeypatch):
    """Every layer passes a multiple of tokens, and nothing of what is filled in reaches a gradient."""
    model, sizes, wanted = make_model(kind), set(), torch.tensor([1, 2, 5, 9])
    method.attach(model, settings)
    comparing.prove_packing(randomize(model), "auto")
    for layer in models.decoder_layers(model)[1]:
        layer.register_forward_pre_hook(lambda layer, inputs: sizes.add(inputs[0].shape[1]))

    def gradients(fills):
        monkeypatch.setattr(few_sizes, "costs", lambda states: fills)
        model.zero_grad()
        sizes.clear()
        with attention.packed(model):
            models.hidden_states(model, packed_batch(), True, wanted).square().mean().backward()
        return {name: p.grad for name, p in trainable(model).items() if "lm_head" not in name}

    as_they_are = gradients(False)
    assert all(few_sizes.missing(size) for size in sizes)
    torch.testing.assert_close(gradients(True), as_they_are, atol=1e-6, rtol=1e-5)
    assert not any(few_sizes.missing(size) for size in sizes)


def test_gradients_are_the_same_under_gradient_checkpointing(kind, method, settings):
    """Case 43: a frozen base, and still a gradient for every trainable parameter."""

    def gradients(checkpointing):
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {}
        model = make_model(kind, **no_dropout)
        method.attach(model, settings)
        randomize(model).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        with attention.packed(model):
            models.hidden_states(model, packed_batch(), packing=True).square().mean().backward()
        return {name: p.grad for name, p in trainable(model).items() if "lm_head" not in name}

    plain, checkpointed = gradients(False), gradients(True)
    assert all(float(g.abs().sum()) > 0 for g in plain.values())
    torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-5)


def test_generates_in_a_padded_batch_with_a_cache_as_alone_without(kind, method, settings):
    model = make_model(kind)
    method.attach(model, settings)
    randomize(model)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    rows = [torch.tensor([row]) for row in ROWS]
    alone = [model.generate(row, attention_mask=torch.ones_like(row), use_cache=False, **options)[0] for row in rows]
    width = max(map(len, ROWS))
    padded = torch.tensor([[0] * (width - len(row)) + row for row in ROWS])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ROWS])
    batched = model.generate(padded, attention_mask=mask, use_cache=True, **options)[:, width:]
    assert torch.equal(batched, torch.stack([output[-8:] for output in alone]))


@pytest.fixture
def adapter(kind, method, settings, tmp_path):
    """A trained adapter, saved, beside its base: (base folder, adapter folder, live logits)."""
    if method.trains_base:
        pytest.skip("a whole model, no adapter")
    base = save_base(tmp_path / "base", kind)
    model = AutoModelForCausalLM.from_pretrained(base)
    method.attach(model, settings)
    randomize(model)
    card = {"method": settings.model_dump(mode="json")}
    files.save_adapter(tmp_path / "adapter", model, make_tokenizer(), settings, str(base), card)
    return base, tmp_path / "adapter", logits(model)


def test_saved_adapter_reloads_to_the_same_logits(adapter):
    base, path, live = adapter
    model = models.load_base(ModelSection(base=base), torch.float32, torch.device("cpu"))
    files.load_adapter(model, path)
    assert_same(logits(model), live)


@pytest.mark.parametrize(
    ("rank", "alpha", "rank_stabilized", "scale"), [(16, 16, False, 1.0), (16, 16, True, 4.0), (16, 32, False, 2.0)]
)
def test_merged_update_is_scale_times_b_times_a(rank, alpha, rank_stabilized, scale):
    """Case 62."""
    model = make_model()
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    settings = LoraSettings(rank=rank, alpha=alpha, rank_stabilized=rank_stabilized)
    METHODS["lora"].attach(model, settings)
    layer = randomize(model).model.layers[0].mlp.up_proj
    expected = scale * layer.lora_B.weight @ layer.lora_A.weight
    assert (tuple(layer.lora_A.weight.shape), tuple(layer.lora_B.weight.shape)) == ((rank, 64), (128, rank))
    METHODS["lora"].merge(model)
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight - before, expected, atol=1e-6, rtol=0)


def test_deep_prompt_reaches_every_layer():
    model = make_model()
    METHODS["prompt_tuning"].attach(model, SETTINGS["prompt, deep"])
    model(torch.tensor([ROWS[1]])).logits.square().mean().backward()
    assert all(float(gradient.abs().sum()) > 0 for gradient in model.prompt_embeddings.grad)
