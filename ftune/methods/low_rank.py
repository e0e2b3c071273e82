"""The products of a low-rank update, with a backward pass that keeps x, A x and which inputs were dropped, and no more.

    y = W x + b + s B A x'       dA = s (B^T dy) x'^T       dB = dy (s A x')^T       dx = W^T dy + s (A^T B^T dy)'

x' is dropout's: some of x set to 0, the others divided by their share. Everything is computed in the dtype of the
base's output; A and B are float32, and so are their gradients.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """W x + b + s B A x' over a frozen matrix: x (..., in), weight (out, in), A (r, in), B (out, r) -> (..., out)."""
    y: torch.Tensor = _Linear.apply(x, weight, bias, A, B, scale, dropout)  # type: ignore[no-untyped-call]
    return y


def added(
    h: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float, dropout: float = 0.0
) -> torch.Tensor:
    """h + s B A x', whatever made h: h (..., out), x (..., in), A (r, in), B (out, r) -> (..., out)."""
    y: torch.Tensor = _Added.apply(h, x, A, B, scale, dropout)  # type: ignore[no-untyped-call]
    return y


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _which_are_kept(x: torch.Tensor, dropout: float) -> torch.Tensor | None:
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout) if dropout else None


def _dropped(x: torch.Tensor, kept: torch.Tensor | None, dropout: float) -> torch.Tensor:
    return x if kept is None else (x * kept).div_(1 - dropout)


def _gradients(dy: torch.Tensor, x: torch.Tensor, z: torch.Tensor, B: torch.Tensor, scale: float) -> Any:
    """dz = s B^T dy, (n, r), and the gradients of A and B, float32; x: (n, in) with some dropped, z = s A x: (n, r)."""
    dz = (dy @ B.to(dy.dtype)).mul_(scale)
    return dz, (dz.T @ x).to(B.dtype), (z.T @ dy).T.to(B.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, A: Any, B: Any, scale: float, dropout: float) -> torch.Tensor:
        rows = _rows(x)
        y = functional.linear(rows, weight, bias)
        kept = _which_are_kept(rows, dropout)
        z = functional.linear(_dropped(rows, kept, dropout), A.to(y.dtype)).mul_(scale)
        ctx.scale, ctx.dropout = scale, dropout
        ctx.save_for_backward(x, weight, A, B, z, kept)
        return y.addmm_(z, B.to(y.dtype).T).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, weight, A, B, z, kept = ctx.saved_tensors
        dy = _rows(dy)
        dz, dA, dB = _gradients(dy, _dropped(_rows(x), kept, ctx.dropout), z, B, ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:
            dx, A = dy @ weight, A.to(dy.dtype)
            dx = dx.addmm_(dz, A) if kept is None else dx.add_(_dropped(dz @ A, kept, ctx.dropout))
            dx = dx.view(x.shape)
        return dx, None, None, dA, dB, None, None


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Any, x: Any, A: Any, B: Any, scale: float, dropout: float) -> torch.Tensor:
        rows = _rows(x).to(h.dtype)
        kept = _which_are_kept(rows, dropout)
        z = functional.linear(_dropped(rows, kept, dropout), A.to(h.dtype)).mul_(scale)
        ctx.scale, ctx.dropout = scale, dropout
        ctx.save_for_backward(x, A, B, z, kept)
        return torch.addmm(_rows(h), z, B.to(h.dtype).T).view(h.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, A, B, z, kept = ctx.saved_tensors
        rows = _dropped(_rows(x).to(dy.dtype), kept, ctx.dropout)
        dz, dA, dB = _gradients(_rows(dy), rows, z, B, ctx.scale)
        dx = None
        if ctx.needs_input_grad[1]:
            dx = _dropped(dz @ A.to(dz.dtype), kept, ctx.dropout).view(x.shape).to(x.dtype)
        return dy, dx, dA, dB, None, None
