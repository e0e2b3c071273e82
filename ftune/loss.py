"""Vocabulary projection and cross-entropy at supervised positions only, in chunks: full logits are never held."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ftune import few_sizes

Head = Callable[[torch.Tensor], torch.Tensor]

CHUNK_ELEMENTS = 2**22
"""Logits held at once; 2**22 are 16 MiB in float32."""
CHUNK_ELEMENTS_OF_TRAINED_HEAD = 2**24
"""More, because beyond it they have to be made again for the gradient of the head."""
FLOAT16_SCALE = 2.0**10
"""What gradients are multiplied by while they wait in float16, which knows nothing between 0 and 6e-8."""
FEWEST_ROWS = 128
"""Rows of logits held at once at least, however large the vocabulary: fewer would not keep a matrix product busy."""


def rows_at_once(vocab_size: int, is_head_trained: bool) -> int:
    """How many positions are projected to the vocabulary together."""
    elements = CHUNK_ELEMENTS_OF_TRAINED_HEAD if is_head_trained else CHUNK_ELEMENTS
    rows = elements // vocab_size
    return max(FEWEST_ROWS, rows - rows % few_sizes.MULTIPLE)


def predicting_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """labels: (1, tokens), unshifted -> the positions (n,) that predict a supervised token, and those tokens (n,).

    Position t predicts token t + 1. A segment's first token carries no label, so nothing is predicted across segments.
    """
    shifted = labels[0, 1:]
    positions = torch.nonzero(shifted != -100).squeeze(1)
    return positions, shifted[positions]


def _chunk_loss(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(head(hidden).float(), targets, reduction="none")


class _Frozen(torch.autograd.Function):
    """The losses under a head that is not trained.

    A state's gradient is that of its own loss alone, dz = softmax(z) - onehot(target) for the logits z: computed with
    the loss, chunk by chunk, it only waits for its factor. So no chunk is made twice, and none waits.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: Head, targets: torch.Tensor, rows: int) -> torch.Tensor:
        losses, gradients = list[torch.Tensor](), list[torch.Tensor]()
        for chunk, wanted in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
            with torch.enable_grad():
                states = chunk.detach().requires_grad_()
                logits = head(states)
            found, dz = _losses_and_gradients(logits.detach().float(), wanted)
            ctx.scale = FLOAT16_SCALE if logits.dtype == torch.float16 else 1.0
            gradients += torch.autograd.grad(logits, states, dz.mul_(ctx.scale).to(logits.dtype))
            losses.append(found)
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factors: torch.Tensor) -> Any:
        [gradients] = ctx.saved_tensors
        return (gradients * (factors / ctx.scale)[:, None]).to(gradients.dtype), None, None, None


def _losses_and_gradients(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy (n,) and its gradient (n, vocabulary), in the memory of the logits, which are float32."""
    logits -= logits.amax(1, keepdim=True)
    of_targets = logits.gather(1, targets[:, None])
    sums = logits.exp_().sum(1, keepdim=True)
    logits /= sums
    logits.scatter_add_(1, targets[:, None], logits.new_full((len(targets), 1), -1.0))
    return (sums.log() - of_targets).squeeze(1), logits


def token_losses(
    head: Head, hidden: torch.Tensor, targets: torch.Tensor, vocab_size: int, rows: int | None = None
) -> torch.Tensor:
    """Cross-entropy of each target in nats, float32: hidden (n, width), targets (n,) -> (n,).

    The logits of `rows` positions at a time (None: of as many as `rows_at_once` says) are made, used and forgotten.
    """
    if few_sizes.costs(hidden) and (more := few_sizes.missing(len(targets))):
        hidden, count = few_sizes.filled(hidden, more), len(targets)
        return token_losses(head, hidden, few_sizes.filled(targets, more), vocab_size, rows)[:count]
    is_trained = torch.is_grad_enabled() and head(hidden[:0].detach()).requires_grad
    rows = rows or rows_at_once(vocab_size, is_trained)
    if torch.is_grad_enabled() and hidden.requires_grad and not is_trained:
        losses: torch.Tensor = _Frozen.apply(hidden, head, targets, rows)  # type: ignore[no-untyped-call]
        return losses
    if len(targets) <= rows:
        return _chunk_loss(head, hidden, targets)
    chunks = zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([_chunk_loss(head, h, t) for h, t in chunks])
    return torch.cat([checkpoint(_chunk_loss, head, h, t, use_reentrant=False) for h, t in chunks])
