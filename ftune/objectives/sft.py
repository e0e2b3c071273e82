"""Supervised fine-tuning: cross-entropy of each supervised token given all before it in its sample."""

import torch
from transformers import PreTrainedModel

from ftune import loss
from ftune.batches import MicroBatch
from ftune.model import head, hidden_states


def token_losses(model: PreTrainedModel, batch: MicroBatch, packing: bool) -> torch.Tensor:
    """The loss of every supervised token in nats: (supervised tokens,) float32."""
    positions, targets = loss.predicting_positions(batch.labels)
    hidden = hidden_states(model, batch, packing)[positions]
    return loss.token_losses(head(model), hidden, targets, model.get_input_embeddings().weight.shape[0])


def summed_loss(model: PreTrainedModel, batch: MicroBatch, packing: bool) -> torch.Tensor:
    return token_losses(model, batch, packing).sum()


def weight(batch: MicroBatch) -> int:
    return batch.num_supervised
