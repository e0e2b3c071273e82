"""Attention over packed samples without padding or dense masks, on unmodified transformers modules.

transformers lets a model's attention be replaced by a registered function, and hands it any extra keyword argument of
the model's forward. Ours gets the segment bounds and runs causal attention once per segment: no sample sees another.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

UNDERSTOOD = {"is_causal", "position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states"}
"""Keyword arguments that cannot change the result here; any other that is not None is refused, never ignored."""


def _banded_mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(queries, keys) bool, the queries at the last positions: query i sees key j when i - window < j <= i."""
    i, j = torch.arange(keys - queries, keys, device=device)[:, None], torch.arange(keys, device=device)[None, :]
    return i >= j if window is None else (i >= j) & (i - j < window)


def _eager_segment(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    dropout: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention by its definition, softmax in float32; needed for soft caps: scores = c * tanh(scores / c)."""
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return functional.dropout(weights, dropout) @ value


class _WideGradients(torch.autograd.Function):
    """Attention in 16 bits on a CPU, with its gradients computed in float32.

    torch's kernel takes 1 to 6 times as long for the gradients in 16 bits as in float32 (2.13, AVX512-BF16): the pass
    made again in float32, forwards and backwards, takes less.
    """

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, mask: Any, scale: float) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        return _attention(query, key, value, mask, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        *states, mask = ctx.saved_tensors
        query, key, value = (tensor.detach().float().requires_grad_() for tensor in states)
        with torch.enable_grad():
            output = _attention(query, key, value, mask, ctx.scale)
        gradients = torch.autograd.grad(output, (query, key, value), gradient.float())
        return *(found.to(gradient.dtype) for found in gradients), None, None


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """One segment's: (1, heads, queries, size), (1, heads, keys, size) twice -> (1, heads, queries, size).

    mask: (queries, keys) bool; None: causal.
    """
    return functional.scaled_dot_product_attention(
        query, key, value, mask, dropout_p=dropout, is_causal=mask is None, scale=scale
    )


def _segment_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    eager: bool,
    segment_bounds: tuple[int, ...] | None = None,
    prefix_states: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query: (1, heads, tokens, size); key, value: (1, kv heads, tokens, size) -> (1, tokens, heads, size).

    prefix_states: for each layer, keys and values that every segment has in front (prefix tuning).
    """
    unknown = sorted(name for name, value in kwargs.items() if value is not None and name not in UNDERSTOOD)
    if unknown or attention_mask is not None or segment_bounds is None:
        reason = f"arguments {', '.join(unknown)}" if unknown else "a mask, or no segment bounds"
        raise NotImplementedError(f"packed attention was given {reason}")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    groups = query.shape[1] // key.shape[1]
    prefix: list[torch.Tensor] = [] if prefix_states is None else list(prefix_states[module.layer_idx])  # type: ignore[index]
    if groups > 1:
        key, value, *prefix = (states.repeat_interleave(groups, dim=1) for states in (key, value, *prefix))
    is_wide = query.device.type != "cpu" or query.dtype == torch.float32
    outputs = []
    lengths = [end - start for start, end in pairwise(segment_bounds)]
    # Split, not sliced: the gradient of a slice is as long as the whole, which for many segments costs their square.
    for q, k, v in zip(*(torch.split(states, lengths, dim=2) for states in (query, key, value)), strict=True):
        if prefix:
            k, v = (torch.cat([front, states], dim=2) for front, states in zip(prefix, (k, v), strict=True))
        window = sliding_window if sliding_window is not None and k.shape[2] > sliding_window else None
        band = partial(_banded_mask, q.shape[2], k.shape[2], window, query.device)
        if eager or softcap is not None:
            outputs.append(_eager_segment(q, k, v, band(), scale, dropout, softcap))
            continue
        mask = band() if window is not None or prefix else None
        if is_wide or dropout > 0:
            outputs.append(_attention(q, k, v, mask, scale, dropout))
        else:
            outputs.append(_WideGradients.apply(q, k, v, mask, scale))  # type: ignore[no-untyped-call]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _sdpa(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    return _segment_attention(module, *args, eager=False, **kwargs)


def _eager(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    return _segment_attention(module, *args, eager=True, **kwargs)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The segment bounds say all that a mask could."""


NAMES = {"auto": "ftune_packed", "sdpa": "ftune_packed", "eager": "ftune_packed_eager"}
"""`model.attention` -> the name the packed function is registered under."""

AttentionInterface.register("ftune_packed", _sdpa)
AttentionInterface.register("ftune_packed_eager", _eager)
for _name in set(NAMES.values()):
    AttentionMaskInterface.register(_name, _no_mask)


@contextmanager
def packed(model: PreTrainedModel, attention: str = "auto") -> Iterator[None]:
    """Inside, the model attends by segments: every forward must be given `segment_bounds` and `use_cache=False`."""
    native = model.config._attn_implementation
    model.set_attn_implementation(NAMES[attention])
    try:
        yield
    finally:
        model.set_attn_implementation(native)
