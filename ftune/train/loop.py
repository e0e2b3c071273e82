"""The one training loop: it yields a Step after each optimizer step and knows neither methods nor files."""

import ctypes
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ftune import batches, schedule
from ftune.batches import Features, MicroBatch
from ftune.console.streams import warn
from ftune.data import Example, Mixture
from ftune.methods.base import trainable
from ftune.train.gradients import Rows, gradients
from ftune.train.job import Job, TrainingPlan, attending, begin_finding

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
GLIBC_KEEPS = {M_TRIM_THRESHOLD: 2**31 - 1, M_MMAP_THRESHOLD: 2**25}
"""Bytes; each is as large as it may be."""


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
    method: dict[str, float]
    """What the method has to tell, such as AdaLoRA's mean rank."""
    skipped: list[str] = field(default_factory=list)
    """Why attempts at this step were thrown away before the one that counts: nothing of them is left."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def peak_memory(device: torch.device) -> int:
    """Bytes: the device's peak of allocated memory; on a CPU, the process's peak resident size."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def keep_freed_memory() -> None:
    """Let the C library keep what a step frees for the next one: given back to the system, it comes again page by page.

    glibc's mallopt(3); other C libraries have none, and keep to their ways.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, size in GLIBC_KEEPS.items():
            mallopt(option, size)


def tell_without_gradient(model: PreTrainedModel, step: int) -> None:
    """A trainable tensor that no gradient reaches stays what it was, whatever the plan says."""
    if names := [name for name, parameter in trainable(model).items() if parameter.grad is None]:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        warn(f"no gradient reached {', '.join(names[:5])}{more} in step {step}: they are not trained by it")


def train(job: Job, examples: Sequence[Example], plan: TrainingPlan, start: int = 0) -> Iterator[Step]:
    """Train from after step `start` to `plan.total_steps`. Raises NonFinite before such a step is taken."""
    model, training, optimizer = job.model, plan.training, job.optimizer
    assert training.learning_rate is not None
    if job.found is None:
        job = replace(job, found=begin_finding(model, plan))
    assert job.found is not None
    mixture = plan.mixture or Mixture.of([len(examples)], [1.0])
    per_epoch = schedule.steps_per_epoch(len(mixture), training.batch_size)
    model.train()
    if job.engine.device.type == "cpu":
        keep_freed_memory()
    for step in range(start + 1, plan.total_steps + 1):
        began = time.perf_counter()
        rate = schedule.learning_rate(
            step, plan.total_steps, training.learning_rate, training.schedule, training.warmup
        )
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        rows = Rows.of(examples, job.features, batches.step_indices(step, mixture, training.batch_size, plan.seed))
        done = gradients(job, rows, plan, step)
        if step == start + 1:
            tell_without_gradient(model, step)
        job.found.scaler.step(optimizer)
        job.found.scaler.update()
        told = job.method.after_step(model, step, plan.total_steps)
        tokens = sum(rows.lengths)
        speed = tokens / (time.perf_counter() - began)
        memory = peak_memory(job.engine.device)
        yield Step(
            step, step / per_epoch, done.loss, done.norm, rate, done.weight, tokens, speed, memory, rows.row_ids, told,
            done.skipped,
        )  # fmt: skip


@torch.no_grad()
def mean_loss(
    model: PreTrainedModel,
    examples: Sequence[Example],
    plan: TrainingPlan,
    token_losses: Callable[[PreTrainedModel, MicroBatch, bool], torch.Tensor],
    features: Features | None = None,
) -> float:
    """The loss per supervised token in nats: the sum over all of them divided by their number, however it is cut."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    device = model.get_input_embeddings().weight.device
    with attending(model, plan.packing and features is None, plan.attention):
        for part in Rows.of(examples, features, range(len(examples))).parts(range(len(examples)), plan):
            losses = token_losses(model, part.to(device), plan.packing)
            total += float(losses.double().sum())
            count += len(losses)
    model.train(was_training)
    return total / count
