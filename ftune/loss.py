"""Vocabulary projection and cross-entropy at supervised positions only, in chunks: full logits are never held."""

from collections.abc import Callable

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

Head = Callable[[torch.Tensor], torch.Tensor]

CHUNK_ELEMENTS = 2**24
"""Logits held at once; 2**24 are 64 MiB in float32."""


def predicting_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """labels: (1, tokens), unshifted -> the positions (n,) that predict a supervised token, and those tokens (n,).

    Position t predicts token t + 1. A segment's first token carries no label, so nothing is predicted across segments.
    """
    shifted = labels[0, 1:]
    positions = torch.nonzero(shifted != -100).squeeze(1)
    return positions, shifted[positions]


def _chunk_loss(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(head(hidden).float(), targets, reduction="none")


def token_losses(
    head: Head, hidden: torch.Tensor, targets: torch.Tensor, vocab_size: int, chunk_elements: int = CHUNK_ELEMENTS
) -> torch.Tensor:
    """Cross-entropy of each target in nats, float32: hidden (n, width), targets (n,) -> (n,).

    More logits than `chunk_elements` are made, used and forgotten chunk by chunk, and made again for the gradient.
    """
    rows = max(1, chunk_elements // vocab_size)
    if len(targets) <= rows:
        return _chunk_loss(head, hidden, targets)
    chunks = zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([_chunk_loss(head, h, t) for h, t in chunks])
    return torch.cat([checkpoint(_chunk_loss, head, h, t, use_reentrant=False) for h, t in chunks])
