"""Attention over packed samples on a GPU, all of them in one call: flash attention, or FlexAttention for soft caps."""

from collections.abc import Callable
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import torch

from ftune.errors import UserError

FLASH, FLEX = "flash_attention_2", "flex_attention"
FLASH_CAPABILITY, FLASH_TORCH = (8, 0), (2, 12)
"""Of the card, and the version whose kernel takes windows and shared keys."""
LARGEST_HEAD = 256
BLOCK = 128
"""FlexAttention's tile, in tokens."""


def check(way: str, packing: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Raises UserError where a run asks for a kernel that it cannot have."""
    if way not in (FLASH, FLEX):
        return
    if not packing:
        hint = "set data.packing: true, or use sdpa"
        raise UserError("this kernel is for packed rows", f"model.attention: {way}", hint)
    _refuse(way, obstacle_of_device(way, dtype, device))


def check_states(way: str, *states: Any) -> None:
    """Raises UserError where the kernel that was asked for cannot attend over these states, as in `obstacle`."""
    _refuse(way, obstacle(way, *states))


def _refuse(way: str, reason: str | None) -> None:
    if reason is not None:
        raise UserError(reason, f"model.attention: {way}", "use auto, which takes what there is, or sdpa")


@cache
def obstacle_of_device(way: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why this device has no such kernel for this dtype; None where it has."""
    if device.type != "cuda":
        return f"{way} needs a GPU"
    if way == FLASH:
        if torch.cuda.get_device_capability(device) < FLASH_CAPABILITY:
            return "flash attention needs a GPU of compute capability 8.0 or more"
        if not torch.backends.cuda.is_flash_attention_available():
            return "this build of torch has no flash attention"
        if torch.__version__ < FLASH_TORCH:  # type: ignore[operator]  # TorchVersion compares with tuples
            return "flash attention of packed rows needs torch 2.12 or later"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"flash attention takes 16 bits, and these weights are {str(dtype).removeprefix('torch.')}"
    return None


def obstacle(
    way: str, query: torch.Tensor, value: torch.Tensor, has_prefix: bool, dropout: float, softcap: float | None
) -> str | None:
    """Why all segments cannot be one call this way; None where they can."""
    if has_prefix:
        return f"{way} knows no prefix before every row"
    if dropout > 0:
        return f"{way} knows no dropout of attention weights, which the base's configuration asks for"
    size = query.shape[-1]
    if size != value.shape[-1]:
        return f"{way} wants values as large as keys"
    if way == FLASH and softcap is not None:
        return "flash attention knows no soft cap: flex_attention does"
    if way == FLASH and (size > LARGEST_HEAD or size % 8):
        return f"flash attention wants heads of at most {LARGEST_HEAD}, a multiple of 8, and these are {size}"
    return obstacle_of_device(way, query.dtype, query.device)


def flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: tuple[int, ...],
    window: int | None,
    scale: float,
) -> torch.Tensor:
    """Flash attention for segments of any lengths (Dao 2023, arXiv 2307.08691), by torch's kernel.

    query: (1, heads, tokens, size); key, value: (1, kv heads, tokens, size) -> (1, tokens, heads, size).
    """
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    offsets, longest = _offsets(bounds, query.device), max(end - start for start, end in pairwise(bounds))
    seen = (-1 if window is None else window - 1, 0)
    found = varlen_attn(q, k, v, offsets, offsets, longest, longest, scale=scale, window_size=seen, enable_gqa=True)
    assert isinstance(found, torch.Tensor)  # A pair only where the log-sums are asked for.
    return found[None]


@lru_cache(maxsize=1)
def _offsets(bounds: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """All layers of a forward pass ask for the same."""
    return torch.tensor(bounds, dtype=torch.int32, device=device)


def flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: tuple[int, ...],
    window: int | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """FlexAttention (Dong et al. 2024, arXiv 2412.05496), compiled; scores = c * tanh(scores / c) with a soft cap c.

    query, key, value: (1, heads, tokens, size) -> (1, tokens, heads, size).
    """
    changed = None if softcap is None else _capped(softcap)
    mask = _block_mask(bounds, window, query.device)
    found: torch.Tensor = _compiled()(query, key, value, score_mod=changed, block_mask=mask, scale=scale)
    return found.transpose(1, 2).contiguous()


@cache
def _compiled() -> Callable[..., Any]:
    """As one graph: past torch's limit of compilations it is an error, not a slow pass that holds all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True)


@cache
def _capped(softcap: float) -> Callable[..., torch.Tensor]:
    def capped(score: torch.Tensor, *place: torch.Tensor) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


@lru_cache(maxsize=2)
def _block_mask(bounds: tuple[int, ...], window: int | None, device: torch.device) -> Any:
    """Which keys are seen, for whole blocks: no mask of all tokens by all tokens is ever made.

    Query q sees the keys from first[q] to q. Neither end ever falls, so a block's first and last query say all of it.
    All layers of a forward pass ask for one or two of these: with a window, and without.
    """
    from torch.nn.attention.flex_attention import BlockMask

    tokens = bounds[-1]
    queries = torch.arange(tokens, device=device)
    starts = torch.tensor(bounds[:-1], device=device)
    first = starts.repeat_interleave(torch.tensor([end - start for start, end in pairwise(bounds)], device=device))
    if window is not None:
        first = torch.maximum(first, queries - window + 1)

    def sees(batch: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (first[q] <= k) & (k <= q)

    begin = torch.arange(0, tokens, BLOCK, device=device)
    end = (begin + BLOCK - 1).clamp(max=tokens - 1)
    touched = (end >= first[begin, None]) & (begin <= end[:, None])
    # As torch has it, a tile that reaches beyond the last token is never whole.
    is_inside = begin + BLOCK <= tokens
    whole = (begin >= first[end, None]) & (end <= begin[:, None]) & is_inside & is_inside[:, None]
    return BlockMask.from_kv_blocks(
        *_listed(touched & ~whole), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(tokens, tokens)
    )


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(query blocks, key blocks) bool -> how many of each row, and which, those first."""
    found = blocks.int().argsort(dim=1, descending=True, stable=True).int()
    return blocks.sum(dim=1, dtype=torch.int32)[None, None], found[None, None]
