"""The one training loop: it yields a Step after each optimizer step and knows neither methods nor files."""

import math
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from ftune import attention, batches, schedule
from ftune.batches import MicroBatch
from ftune.data import Example
from ftune.errors import RunError
from ftune.objectives.base import Objective
from ftune.recipe import TrainingSection

MICRO_BATCH_TOKENS = 4096
"""What `micro_batch_tokens: auto` holds at once."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step was; a line of metrics.jsonl. `loss` is the mean over its supervised tokens, in nats."""

    step: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    supervised_tokens: int
    tokens: int
    tokens_per_second: float
    memory: int
    row_ids: list[str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TrainingPlan:
    """What the loop needs to know besides model and data; a run and its resumption have equal ones."""

    training: TrainingSection
    total_steps: int
    packing: bool
    attention: str
    seed: int

    @property
    def micro_batch_tokens(self) -> int:
        asked = self.training.micro_batch_tokens
        return MICRO_BATCH_TOKENS if asked == "auto" else int(asked)


def make_optimizer(model: PreTrainedModel, training: TrainingSection) -> torch.optim.Optimizer:
    """The optimizer over every trainable parameter; weight decay only on matrices."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    assert training.learning_rate is not None
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=training.learning_rate)
    return torch.optim.AdamW(groups, lr=training.learning_rate)


def peak_memory(device: torch.device) -> int:
    """Bytes: the device's peak of allocated memory; on a CPU, the process's peak resident size."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def attending(model: PreTrainedModel, packing: bool, name: str) -> Any:
    """The context that forward passes of this run's micro-batches stand in."""
    return attention.packed(model, name) if packing else nullcontext()


def seed_step(seed: int, step: int) -> None:
    """Dropout of a step depends on seed and step alone: nothing to save, nothing that an evaluation could shift."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]) % 2**63)


def _accumulate(
    model: PreTrainedModel,
    parts: Sequence[MicroBatch],
    objective: Objective,
    plan: TrainingPlan,
    accelerator: Accelerator,
) -> tuple[float, int]:
    """Add the gradients of a whole step: the sum of its losses over their number. Returns that loss and the number."""
    weight = sum(objective.weight(part) for part in parts)
    total = 0.0
    for part in parts:
        loss = objective.summed_loss(model, part.to(accelerator.device), plan.packing)
        if not math.isfinite(value := loss.item()):
            raise _NonFinite(part.row_ids)
        accelerator.backward(loss / weight)
        total += value
    return total / weight, weight


class _NonFinite(Exception):
    def __init__(self, row_ids: Sequence[str]) -> None:
        super().__init__()
        self.row_ids = row_ids


def _stop(step: int, what: str, row_ids: Sequence[str]) -> RunError:
    rows = ", ".join(row_ids[:8]) + (", ..." if len(row_ids) > 8 else "")
    return RunError(
        f"non-finite {what} at step {step}, rows [{rows}]",
        "training",
        "the weights of the step before are untouched; lower training.learning_rate, or look at these rows",
    )


def _gradient_norm(parameters: list[nn.Parameter], limit: float | None, accelerator: Accelerator) -> float:
    """The norm before clipping; the gradients are clipped to `limit` where one is given."""
    if limit is None:
        return float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    return float(accelerator.clip_grad_norm_(parameters, limit))


def train(
    model: PreTrainedModel,
    examples: Sequence[Example],
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    plan: TrainingPlan,
    accelerator: Accelerator,
    start: int = 0,
) -> Iterator[Step]:
    """Train from after step `start` to `plan.total_steps`. Raises RunError before a non-finite step is taken."""
    training = plan.training
    assert training.learning_rate is not None
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = accelerator.prepare(optimizer)
    per_epoch = schedule.steps_per_epoch(len(examples), training.batch_size)
    model.train()
    for step in range(start + 1, plan.total_steps + 1):
        began = time.perf_counter()
        rate = schedule.learning_rate(
            step, plan.total_steps, training.learning_rate, training.schedule, training.warmup
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        indices = batches.step_indices(step, len(examples), training.batch_size, plan.seed)
        parts = list(batches.micro_batches([examples[i] for i in indices], plan.micro_batch_tokens, plan.packing))
        seed_step(plan.seed, step)
        optimizer.zero_grad(set_to_none=True)
        try:
            with attending(model, plan.packing, plan.attention):
                loss, weight = _accumulate(model, parts, objective, plan, accelerator)
        except _NonFinite as error:
            raise _stop(step, "loss", error.row_ids) from None
        norm = _gradient_norm(parameters, training.max_grad_norm, accelerator)
        row_ids = [examples[i].row_id for i in indices]
        if not math.isfinite(norm):
            raise _stop(step, "gradient", row_ids)
        optimizer.step()
        tokens = sum(map(len, parts))
        speed = tokens / (time.perf_counter() - began)
        memory = peak_memory(accelerator.device)
        yield Step(step, step / per_epoch, loss, norm, rate, weight, tokens, speed, memory, row_ids)


@torch.no_grad()
def mean_loss(
    model: PreTrainedModel,
    examples: Sequence[Example],
    plan: TrainingPlan,
    token_losses: Callable[[PreTrainedModel, MicroBatch, bool], torch.Tensor],
) -> float:
    """The loss per supervised token in nats: the sum over all of them divided by their number, however it is cut."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    device = model.get_input_embeddings().weight.device
    with attending(model, plan.packing, plan.attention):
        for part in batches.micro_batches(examples, plan.micro_batch_tokens, plan.packing):
            losses = token_losses(model, part.to(device), plan.packing)
            total += float(losses.double().sum())
            count += len(losses)
    model.train(was_training)
    return total / count
