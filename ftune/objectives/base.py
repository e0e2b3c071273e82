"""The shape an objective has."""

from typing import Protocol

import torch
from transformers import PreTrainedModel

from ftune.batches import MicroBatch


class Objective(Protocol):
    """A module of this shape. The loop divides the step's summed loss by its summed weight, whatever the split."""

    def summed_loss(self, model: PreTrainedModel, batch: MicroBatch, packing: bool) -> torch.Tensor:
        """The sum of the losses of a micro-batch: a float32 scalar with a gradient."""

    def weight(self, batch: MicroBatch) -> int:
        """What the sum is counted in: supervised tokens, say."""
