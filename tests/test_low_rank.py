"""The products of a low-rank update against their definition, and what their backward pass keeps."""

import pytest
import torch
from torch.nn import functional

from ftune.methods import low_rank

SCALE = 2.0


def made(dtype, num_in=6, num_out=5, rank=2):
    generator = torch.Generator().manual_seed(0)

    def random(*shape, dtype=torch.float64):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    A, B = random(rank, num_in), random(num_out, rank)
    if dtype is not torch.float64:
        A, B = A.float(), B.float()
    return random(2, 3, num_in, dtype=dtype), random(num_out, num_in, dtype=dtype), random(num_out, dtype=dtype), A, B


def over_matrix(x, weight, bias, A, B, dropout=0.0):
    return low_rank.linear(x, weight, bias, A, B, SCALE, dropout)


def over_anything(x, weight, bias, A, B, dropout=0.0):
    return low_rank.added(functional.linear(x, weight, bias), x, A, B, SCALE, dropout)


def by_definition(x, weight, bias, A, B):
    return functional.linear(x, weight, bias) + SCALE * x @ A.to(x.dtype).T @ B.to(x.dtype).T


BOTH = pytest.mark.parametrize("product", [over_matrix, over_anything])


@BOTH
@pytest.mark.parametrize("has_bias", [True, False])
def test_values_and_gradients_are_those_of_the_definition(product, has_bias):
    x, weight, bias, A, B = made(torch.float64)
    bias = bias if has_bias else None
    x, A, B = (tensor.requires_grad_() for tensor in (x, A, B))
    torch.testing.assert_close(product(x, weight, bias, A, B), by_definition(x, weight, bias, A, B))
    assert torch.autograd.gradcheck(lambda x, A, B: product(x, weight, bias, A, B), (x, A, B))


@BOTH
def test_gradients_of_the_factors_are_float32_over_a_bfloat16_base(product):
    x, weight, bias, A, B = made(torch.bfloat16, 64, 48, 4)
    exact = [t.double() for t in (x, weight, bias, A, B)]
    for tensors in ((x, A, B), (exact[0], *exact[3:])):
        for tensor in tensors:
            tensor.requires_grad_()
    y, expected = product(x, weight, bias, A, B), by_definition(*exact)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    expected.sum().backward()
    assert (A.grad.dtype, B.grad.dtype, x.grad.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    for ours, theirs in ((y, expected), (x.grad, exact[0].grad), (A.grad, exact[3].grad), (B.grad, exact[4].grad)):
        assert float((ours.detach().double() - theirs.detach()).norm() / theirs.detach().norm()) < 1e-2


@BOTH
def test_nothing_is_computed_for_inputs_that_want_no_gradient(product):
    x, weight, bias, A, B = made(torch.float64)
    A.requires_grad_()
    B.requires_grad_()
    product(x, weight, bias, A, B).sum().backward()
    assert x.grad is None
    assert A.grad is not None
    assert B.grad is not None


@BOTH
def test_only_the_input_and_its_small_product_are_kept(product):
    x, weight, bias, A, B = made(torch.bfloat16, 64, 48, 4)
    x, A, B = (tensor.requires_grad_() for tensor in (x, A, B))
    inputs = {tensor.untyped_storage().data_ptr() for tensor in (x, weight, bias, A, B)}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        product(x, weight, bias, A, B)
    beside = [tensor for place, tensor in kept.items() if place not in inputs]
    assert [tuple(tensor.shape) for tensor in beside] == [(6, 4)], "s A x for 6 tokens, of rank 4"


@BOTH
def test_dropout_leaves_the_base_alone_and_goes_back_where_it_went(product):
    x, weight, bias, A, B = made(torch.float64)
    x, A, B = (tensor.requires_grad_() for tensor in (x, A, B))

    def same_each_time(x, A, B):
        torch.manual_seed(1)
        return product(x, weight, bias, A, B, dropout=0.4)

    assert torch.autograd.gradcheck(same_each_time, (x, A, B))
    assert torch.equal(product(x, weight, bias, A, torch.zeros_like(B), 0.4), product(x, weight, bias, A, B * 0))
    torch.manual_seed(1)
    kept = torch.empty(6, 6, dtype=torch.bool).bernoulli_(0.6).view(x.shape)
    assert 0 < int(kept.sum()) < kept.numel()
    expected = functional.linear(x, weight, bias) + SCALE * (x * kept / 0.6) @ A.T @ B.T
    torch.testing.assert_close(same_each_time(x, A, B), expected)


@BOTH
def test_dropout_keeps_its_input_on_average(product):
    x, weight, bias, A, B = made(torch.float64)
    torch.manual_seed(0)
    mean = torch.stack([product(x, weight, bias, A, B, 0.3) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, product(x, weight, bias, A, B), atol=0.3, rtol=0.05)
