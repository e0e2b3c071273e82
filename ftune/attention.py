"""Attention over packed samples without padding or dense masks, on unmodified transformers modules.

transformers lets a model's attention be replaced by a registered function, and hands it any extra keyword argument of
the model's forward. Ours gets the segment bounds and runs causal attention over each segment: no sample sees another.
"""

import math
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

from ftune import attention_on_gpu as on_gpu
from ftune import last_layer
from ftune.few_sizes import few_sizes

UNDERSTOOD = {
    "is_causal", "position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states",
    last_layer.KEYWORD,
}  # fmt: skip
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


FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_GRADIENTS = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
"""What `scaled_dot_product_attention` calls on a CPU."""


class _OnCpu(torch.autograd.Function):
    """Attention of all segments on a CPU: what is kept besides the inputs is the output itself, not its parts.

    query, key, value: (1, heads, tokens, size) -> (1, tokens, heads, size). The gradients are computed in float32:
    torch's kernel takes 1 to 6 times as long for them in 16 bits (2.13, AVX512-BF16).
    """

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, lengths: Any, window: Any, scale: float) -> torch.Tensor:
        output: torch.Tensor = query.new_empty(query.transpose(1, 2).shape)
        log_sums = []
        for q, k, v, out in _segments(lengths, query, key, value, output.transpose(1, 2)):
            mask = _added_mask(q, window)
            found, log_sum = FLASH(q, k, v, 0.0, mask is None, attn_mask=mask, scale=scale)
            out.copy_(found)
            log_sums.append(log_sum)
        ctx.save_for_backward(query, key, value, output, *log_sums)
        ctx.lengths, ctx.window, ctx.scale = lengths, window, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        query, key, value, output, *log_sums = ctx.saved_tensors
        states = (query, key, value)
        gradients = [torch.empty_like(tensor) for tensor in states]
        given = (gradient.transpose(1, 2), *states, output.transpose(1, 2), *gradients)
        for segment, log_sum in zip(_segments(ctx.lengths, *given), log_sums, strict=True):
            mask = _added_mask(segment[1], ctx.window)
            wide = (tensor.float() for tensor in segment[:5])
            found = FLASH_GRADIENTS(*wide, log_sum, 0.0, mask is None, attn_mask=mask, scale=ctx.scale)
            for place, values in zip(segment[5:], found, strict=True):
                place.copy_(values)
        return *gradients, None, None, None


def _segments(lengths: list[int], *states: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The part of each that belongs to the same segment; states: (1, heads, tokens, size).

    Split, not sliced: the gradient of a slice is as long as the whole, which for many segments costs their square.
    """
    return zip(*(torch.split(tensor, lengths, dim=2) for tensor in states), strict=True)


def _added_mask(query: torch.Tensor, window: int | None) -> torch.Tensor | None:
    """(tokens, tokens) float32, added to the scores of a segment that is longer than the window; None: causal."""
    tokens = query.shape[2]
    if window is None or tokens <= window:
        return None
    seen = _banded_mask(tokens, tokens, window, query.device)
    return torch.zeros(seen.shape, device=query.device).masked_fill_(~seen, -math.inf)


def _segment_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    way: str,
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
    asked = (query, value, bool(prefix), dropout, softcap)
    if way == "auto":
        way = "sdpa" if on_gpu.obstacle(on_gpu.FLASH, *asked) else on_gpu.FLASH
    elif way in (on_gpu.FLASH, on_gpu.FLEX):
        on_gpu.check_states(way, *asked)
    if way == on_gpu.FLASH:
        return on_gpu.flash(query, key, value, segment_bounds, sliding_window, scale), None
    if groups > 1:
        key, value, *prefix = (states.repeat_interleave(groups, dim=1) for states in (key, value, *prefix))
    if way == on_gpu.FLEX:
        return on_gpu.flex(query, key, value, segment_bounds, sliding_window, scale, softcap), None
    lengths = [end - start for start, end in pairwise(segment_bounds)]
    is_eager = way == "eager" or softcap is not None
    is_plain = not (is_eager or prefix or dropout > 0)
    if is_plain and query.device.type == "cpu" and key.shape == value.shape:
        output: torch.Tensor = _OnCpu.apply(query, key, value, lengths, sliding_window, scale)  # type: ignore[no-untyped-call]
        return output, None
    outputs = []
    for q, k, v in _segments(lengths, query, key, value):
        if prefix:
            k, v = (torch.cat([front, states], dim=2) for front, states in zip(prefix, (k, v), strict=True))
        window = sliding_window if sliding_window is not None and k.shape[2] > sliding_window else None
        band = partial(_banded_mask, q.shape[2], k.shape[2], window, query.device)
        if is_eager:
            outputs.append(_eager_segment(q, k, v, band(), scale, dropout, softcap))
        else:
            mask = band() if window is not None or prefix else None
            causal = mask is None
            outputs.append(functional.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The segment bounds say all that a mask could."""


NATIVE = ("sdpa", "eager")
"""What transformers' own attention has as well; with the others it has its default wherever rows are not packed."""
NAMES = {
    "auto": "ftune_packed",
    "sdpa": "ftune_packed_rows",
    "eager": "ftune_packed_eager",
    on_gpu.FLASH: "ftune_packed_varlen",
    on_gpu.FLEX: "ftune_packed_blocks",
}
"""`model.attention` -> the name the packed function is registered under; transformers takes any name with "flash" in
it for its own."""

for _way, _name in NAMES.items():
    AttentionInterface.register(_name, partial(_segment_attention, way=_way))
    AttentionMaskInterface.register(_name, _no_mask)


@contextmanager
def packed(model: PreTrainedModel, attention: str = "auto") -> Iterator[None]:
    """Inside, the model attends by segments: every forward must be given `segment_bounds` and `use_cache=False`."""
    native = model.config._attn_implementation
    model.set_attn_implementation(NAMES[attention])
    try:
        with few_sizes(model):
            yield
    finally:
        model.set_attn_implementation(native)
