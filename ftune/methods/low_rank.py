"""The products of a low-rank update, with a backward pass that keeps x and A x alone and makes no copy of either.

    y = W x + b + s B A x        dA = s (B^T dy) x^T        dB = dy (s A x)^T        dx = W^T dy + s A^T B^T dy

Everything is computed in the dtype of the base's output; A and B are float32, and so are their gradients.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, A: torch.Tensor, B: torch.Tensor, scale: float
) -> torch.Tensor:
    """W x + b + s B A x over a frozen matrix: x (..., in), weight (out, in), A (r, in), B (out, r) -> (..., out)."""
    y: torch.Tensor = _Linear.apply(x, weight, bias, A, B, scale)  # type: ignore[no-untyped-call]
    return y


def added(h: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    """h + s B A x, whatever made h: h (..., out), x (..., in), A (r, in), B (out, r) -> (..., out)."""
    y: torch.Tensor = _Added.apply(h, x, A, B, scale)  # type: ignore[no-untyped-call]
    return y


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _factor_gradients(
    dy: torch.Tensor, x: torch.Tensor, z: torch.Tensor, B: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dz = s B^T dy, (n, r), and the gradients of A and B, float32."""
    dz = (dy @ B.to(dy.dtype)).mul_(scale)
    return dz, (dz.T @ _rows(x).to(dy.dtype)).to(B.dtype), (dy.T @ z).to(B.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, A: Any, B: Any, scale: float) -> torch.Tensor:
        y = functional.linear(_rows(x), weight, bias)
        z = functional.linear(_rows(x), A.to(y.dtype)).mul_(scale)
        ctx.scale = scale
        ctx.save_for_backward(x, weight, A, B, z)
        return y.addmm_(z, B.to(y.dtype).T).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, weight, A, B, z = ctx.saved_tensors
        dy = _rows(dy)
        dz, dA, dB = _factor_gradients(dy, x, z, B, ctx.scale)
        dx = (dy @ weight).addmm_(dz, A.to(dy.dtype)).view(x.shape) if ctx.needs_input_grad[0] else None
        return dx, None, None, dA, dB, None


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Any, x: Any, A: Any, B: Any, scale: float) -> torch.Tensor:
        z = functional.linear(_rows(x).to(h.dtype), A.to(h.dtype)).mul_(scale)
        ctx.scale = scale
        ctx.save_for_backward(x, A, B, z)
        return torch.addmm(_rows(h), z, B.to(h.dtype).T).view(h.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, A, B, z = ctx.saved_tensors
        dz, dA, dB = _factor_gradients(_rows(dy), x, z, B, ctx.scale)
        dx = (dz @ A.to(dz.dtype)).view(x.shape).to(x.dtype) if ctx.needs_input_grad[1] else None
        return dy, dx, dA, dB, None
