"""How far the tuned model's next-token distributions lie from the base's."""

from collections.abc import Sequence

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from ftune import batches, loss
from ftune.console.progress import task_progress
from ftune.data import Example
from ftune.model import head, hidden_states
from ftune.train import TrainingPlan, attending

POSITIONS = 512
"""Positions whose whole distributions are held at once."""


@torch.no_grad()
def kl_to_base(
    base: PreTrainedModel,
    tuned: PreTrainedModel,
    examples: Sequence[Example],
    plan: TrainingPlan,
    description: str = "divergence from the base",
) -> float | None:
    """Mean over supervised positions of KL(tuned || base) = sum_v p_tuned (log p_tuned - log p_base), in nats; None
    where there is none."""
    total, count = 0.0, 0
    device = base.get_input_embeddings().weight.device
    base.eval()
    tuned.eval()
    ours, theirs = (attending(model, plan.packing, plan.attention) for model in (base, tuned))
    with ours, theirs, task_progress(description, len(examples)) as progress:
        for part in batches.micro_batches(examples, plan.micro_batch_tokens, plan.packing):
            batch = part.to(device)
            positions, _ = loss.predicting_positions(batch.labels)
            states = [hidden_states(model, batch, plan.packing, positions) for model in (base, tuned)]
            for before, after in zip(*(torch.split(state, POSITIONS) for state in states), strict=True):
                log_base = functional.log_softmax(head(base)(before).float(), dim=-1)
                log_tuned = functional.log_softmax(head(tuned)(after).float(), dim=-1)
                total += float(functional.kl_div(log_base, log_tuned, reduction="sum", log_target=True))
                count += len(before)
            progress.advance(len(part.row_ids))
    return max(0.0, total / count) if count else None
