"""Supervised fine-tuning: cross-entropy of each supervised token given all before it in its sample."""

import torch
from transformers import PreTrainedModel

from ftune import loss
from ftune.batches import MicroBatch
from ftune.model import head
from ftune.objectives.base import forward_pass, states_and_targets


def places(batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    return loss.predicting_positions(batch.labels)


@forward_pass
def token_losses(model: PreTrainedModel, batch: MicroBatch, packing: bool) -> torch.Tensor:
    """The loss of every supervised token in nats: (supervised tokens,) float32."""
    hidden, targets = states_and_targets(model, batch, packing, places)
    return loss.token_losses(head(model), hidden, targets, model.get_input_embeddings().weight.shape[0])


def summed_loss(model: PreTrainedModel, batch: MicroBatch, packing: bool) -> torch.Tensor:
    return token_losses(model, batch, packing).sum()


def weight(batch: MicroBatch) -> int:
    return batch.num_supervised
