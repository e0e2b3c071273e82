"""The kernels that attend over all packed rows in one call. Where there is no GPU, flash attention's is stood in for by
its definition, and FlexAttention runs uncompiled: what is tested is everything that they are given."""

from itertools import pairwise

import pytest
import torch
from conftest import make_model
from hypothesis import given
from hypothesis import strategies as st
from test_batches import ARCHITECTURES
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention import varlen
from torch.torch_version import TorchVersion

from ftune import attention, comparing, last_layer
from ftune import attention_on_gpu as on_gpu
from ftune.errors import UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
KERNELS = [on_gpu.FLASH, on_gpu.FLEX]
LENGTHS = (1, 40, 128, 7, 140)


def varlen_by_definition(q, k, v, offsets, key_offsets, longest, longest_key, *, scale, window_size, enable_gqa):
    """torch's `varlen_attn` as its documentation has it; q: (tokens, heads, size), k, v: (tokens, kv heads, size)."""
    assert offsets.dtype == torch.int32
    assert torch.equal(offsets, key_offsets)
    assert longest == longest_key == max(end - start for start, end in pairwise(offsets.tolist()))
    assert enable_gqa
    left, right = window_size
    assert right == 0
    outputs = []
    for start, end in pairwise(offsets.tolist()):
        place = torch.arange(end - start)
        distance = place[:, None] - place[None, :]
        seen = (distance >= 0) if left < 0 else (distance >= 0) & (distance <= left)
        rows = (states[start:end].transpose(0, 1) for states in (q, k, v))
        found = torch.nn.functional.scaled_dot_product_attention(*rows, seen, scale=scale, enable_gqa=True)
        outputs.append(found.transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def kernels(monkeypatch):
    """Both kernels on a CPU."""
    monkeypatch.setattr(on_gpu, "obstacle_of_device", lambda *facts: None)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_by_definition)
    monkeypatch.setattr(on_gpu, "_compiled", lambda: flex_module.flex_attention)
    monkeypatch.setattr(flex_module, "_validate_device", lambda *states: None)


@pytest.mark.parametrize("way", KERNELS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_packed_rows_give_the_logits_of_single_rows(kernels, kind, way):
    """Case 19."""
    model = make_model(kind, scale=4.0, **ARCHITECTURES[kind])
    if kind == "gemma2" and way == on_gpu.FLASH:
        with pytest.raises(UserError, match="no soft cap: flex_attention does"):
            comparing.prove_packing(model, way)
        return
    assert comparing.prove_packing(model, way) < 1e-5
    assert last_layer.has_cut(model)


def states(dtype=torch.float32, device="cpu", kv_heads=2, size=16):
    """query, key, value, and the gradient of the output."""
    generator, tokens = torch.Generator().manual_seed(0), sum(LENGTHS)
    shapes = [(1, 4, tokens, size), (1, kv_heads, tokens, size), (1, kv_heads, tokens, size), (1, tokens, 4, size)]
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def attend(way, given, **settings):
    """The output over LENGTHS, and the gradients of query, key and value."""
    bounds = (0, *torch.tensor(LENGTHS).cumsum(0).tolist())
    *inputs, upstream = given
    output, _ = attention._segment_attention(
        torch.nn.Module(), *inputs, None, way=way, segment_bounds=bounds, **settings
    )
    return output.detach(), *torch.autograd.grad(output, inputs, upstream)


@pytest.mark.parametrize("window", [None, 1, 30])
@pytest.mark.parametrize(("way", "softcap"), [(on_gpu.FLASH, None), (on_gpu.FLEX, None), (on_gpu.FLEX, 2.0)])
def test_the_gradients_are_those_of_the_definition(kernels, way, softcap, window):
    settings = {"sliding_window": window, "softcap": softcap, "scaling": 0.7}
    ours, theirs = (attend(name, states(), **settings) for name in (way, "eager"))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.none() | st.integers(1, 400))
def test_blocks_are_those_that_torch_finds_in_a_mask_of_all_tokens(lengths, window):
    """Compiled, FlexAttention looks at the tokens of touched blocks only, and asks nothing in whole ones."""
    bounds = (0, *torch.tensor(lengths).cumsum(0).tolist())
    row = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))

    def sees(batch, head, q, k):
        is_seen = (row[q] == row[k]) & (q >= k)
        return is_seen if window is None else is_seen & (q - k < window)

    ours = on_gpu._block_mask(bounds, window, torch.device("cpu"))
    theirs = flex_module.create_block_mask(sees, None, None, bounds[-1], bounds[-1], device="cpu")
    for kind in ("kv", "full_kv", "q", "full_q"):
        assert listed(ours, kind) == listed(theirs, kind)
    place = torch.arange(bounds[-1])
    assert torch.equal(ours.mask_mod(None, None, place[:, None], place), sees(None, None, place[:, None], place))


def listed(mask, kind):
    """The blocks of each row."""
    counts, indices = getattr(mask, f"{kind}_num_blocks")[0, 0], getattr(mask, f"{kind}_indices")[0, 0]
    return [sorted(row[:count].tolist()) for count, row in zip(counts, indices, strict=True)]


def test_auto_is_flash_attention_where_it_can_be(kernels, monkeypatch):
    calls = []
    monkeypatch.setattr(on_gpu, "flash", lambda query, *rest: calls.append(1) or query.transpose(1, 2))
    for settings in ({}, {"sliding_window": 9}, {"softcap": 2.0}, {"dropout": 0.1}):
        attention._segment_attention(
            torch.nn.Module(), *states()[:3], None, way="auto", segment_bounds=(0, sum(LENGTHS)), **settings
        )
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("way", "facts", "words"),
    [
        (on_gpu.FLASH, {"size": 20}, "multiple of 8, and these are 20"),
        (on_gpu.FLASH, {"size": 264}, "at most 256"),
        (on_gpu.FLASH, {"softcap": 2.0}, "no soft cap"),
        (on_gpu.FLEX, {"dropout": 0.1}, "no dropout"),
        (on_gpu.FLEX, {"has_prefix": True}, "no prefix"),
        (on_gpu.FLEX, {"value_size": 8}, "values as large as keys"),
    ],
)
def test_a_kernel_that_was_asked_for_is_never_replaced(kernels, way, facts, words):
    size = facts.get("size", 16)
    query, value = torch.zeros(1, 4, 9, size), torch.zeros(1, 4, 9, facts.get("value_size", size))
    with pytest.raises(UserError, match=words):
        on_gpu.check_states(
            way, query, value, facts.get("has_prefix", False), facts.get("dropout", 0.0), facts.get("softcap")
        )


def test_a_run_is_told_before_anything_is_loaded_what_it_cannot_have():
    cpu = torch.device("cpu")
    for way in KERNELS:
        with pytest.raises(UserError, match=f"{way} needs a GPU"):
            on_gpu.check(way, True, torch.bfloat16, cpu)
        with pytest.raises(UserError, match="packed rows"):
            on_gpu.check(way, False, torch.bfloat16, cpu)
    for way in ("auto", *attention.NATIVE):
        on_gpu.check(way, False, torch.float32, cpu)


@pytest.mark.parametrize(
    ("capability", "is_built", "version", "dtype", "words"),
    [
        ((7, 5), True, "2.13.0", torch.bfloat16, "compute capability 8.0"),
        ((9, 0), False, "2.13.0", torch.bfloat16, "this build of torch"),
        ((9, 0), True, "2.9.1+cu128", torch.bfloat16, "torch 2.12 or later"),
        ((9, 0), True, "2.13.0", torch.float32, "16 bits, and these weights are float32"),
        ((9, 0), True, "2.12.0", torch.bfloat16, None),
        ((9, 0), True, "2.13.0+cu130", torch.bfloat16, None),
    ],
)
def test_flash_attention_needs_a_card_a_build_and_16_bits(monkeypatch, capability, is_built, version, dtype, words):
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: is_built)
    told = on_gpu.obstacle_of_device.__wrapped__(on_gpu.FLASH, dtype, torch.device("cuda"))
    assert (told is None) if words is None else (words in told)


def test_no_name_is_taken_by_transformers_for_its_own_flash_attention():
    assert not any("flash" in name for name in attention.NAMES.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize(("way", "softcap"), [(on_gpu.FLASH, None), (on_gpu.FLEX, None), (on_gpu.FLEX, 2.0)])
def test_on_a_gpu_the_kernels_are_the_definition_up_to_rounding(way, softcap, window):
    settings = {"sliding_window": window, "softcap": softcap}
    narrow = states(torch.bfloat16, "cuda", size=64)
    ours = attend(way, narrow, **settings)
    theirs = attend("eager", [t.detach().float().requires_grad_() for t in narrow], **settings)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.float() - b).norm() < 1e-2 * b.norm()
