"""The shape an objective has, and what its loss is computed from."""

from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol, TypeVar, cast

import torch
from transformers import PreTrainedModel

from ftune.batches import MicroBatch
from ftune.model import hidden_states

Places = Callable[[MicroBatch], tuple[torch.Tensor, torch.Tensor]]
F = TypeVar("F", bound=Callable[..., Any])


def forward_pass(function: F) -> F:
    """A function that uses a model's body and head one after the other, as one forward pass of the model: where
    processes hold parts of it (FSDP), they are put together around the whole."""

    @wraps(function)
    def passed(model: PreTrainedModel, *args: Any) -> Any:
        within = getattr(model, "within", None)
        return function(model, *args) if within is None else within(function, *args)

    return cast(F, passed)


class Objective(Protocol):
    """A module of this shape. The loop divides the step's summed loss by its summed weight, whatever the split."""

    def places(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The positions whose states predict something, (n,), and what they should predict, (n,)."""

    def token_losses(self, model: PreTrainedModel, batch: MicroBatch, packing: bool) -> torch.Tensor:
        """The loss at each of these positions, in nats: (n,) float32."""

    def summed_loss(self, model: PreTrainedModel, batch: MicroBatch, packing: bool) -> torch.Tensor:
        """The sum of the losses of a micro-batch: a float32 scalar with a gradient."""

    def weight(self, batch: MicroBatch) -> int:
        """What the sum is counted in: supervised tokens, say."""


def states_and_targets(
    model: PreTrainedModel, batch: MicroBatch, packing: bool, places: Places
) -> tuple[torch.Tensor, torch.Tensor]:
    """The states that predict, (n, width), and their targets, (n,): computed now, or those the batch brings along."""
    if batch.features is not None:
        return batch.features, batch.labels[0]
    positions, targets = places(batch)
    return hidden_states(model, batch, packing, positions), targets
