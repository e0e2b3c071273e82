"""Classification: cross-entropy of a row's label given the state of its last token, which has read the whole row."""

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from ftune.batches import MicroBatch
from ftune.model import head
from ftune.objectives.base import forward_pass, states_and_targets


def places(batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """The last token of each row, which carries its class id: rows are packed, so there is no padding to pool."""
    positions = torch.nonzero(batch.labels[0] != -100).squeeze(1)
    return positions, batch.labels[0, positions]


@forward_pass
def row_logits(model: PreTrainedModel, batch: MicroBatch, packing: bool) -> torch.Tensor:
    """(rows, labels) float32."""
    pooled, _ = states_and_targets(model, batch, packing, places)
    return head(model)(pooled).float()


@forward_pass
def token_losses(model: PreTrainedModel, batch: MicroBatch, packing: bool) -> torch.Tensor:
    """The loss of every row in nats: (rows,) float32."""
    pooled, targets = states_and_targets(model, batch, packing, places)
    return functional.cross_entropy(head(model)(pooled).float(), targets, reduction="none")


def summed_loss(model: PreTrainedModel, batch: MicroBatch, packing: bool) -> torch.Tensor:
    return token_losses(model, batch, packing).sum()


def weight(batch: MicroBatch) -> int:
    """Rows: each has one label."""
    return batch.num_supervised
