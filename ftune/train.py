"""The one training loop: it yields a Step after each optimizer step and knows neither methods nor files."""

import math
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from ftune import attention, batches, schedule
from ftune.batches import Features, MicroBatch
from ftune.console.streams import note, warn
from ftune.data import Example, Mixture
from ftune.errors import RunError
from ftune.methods.base import Method, trainable
from ftune.objectives.base import Objective
from ftune.recipe import TrainingSection

MICRO_BATCH_TOKENS = 4096
"""What `micro_batch_tokens: auto` holds at once, unless the machine has no room for it."""
MOST_SKIPPED = 20
"""Attempts at a step that are thrown away before the run stops; halving the first loss scale 16 times makes it 1."""


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


@dataclass(frozen=True)
class TrainingPlan:
    """What the loop needs to know besides model and data; a run and its resumption have equal ones."""

    training: TrainingSection
    total_steps: int
    packing: bool
    attention: str
    seed: int
    mixture: Mixture | None = None
    """How often an epoch sees which examples; None: each once."""
    found_tokens: int | None = None
    """What fits at once, where `auto` was found to be too much."""

    @property
    def micro_batch_tokens(self) -> int:
        asked = self.training.micro_batch_tokens
        return self.found_tokens or (MICRO_BATCH_TOKENS if asked == "auto" else int(asked))


class Found:
    """What a run finds out about its machine on the way. Checkpoints hold it: a resumed run goes on with it.

    Neither changes what a step computes: micro-batches cut its sum differently, and a loss scale is a power of two.
    """

    def __init__(self, micro_batch_tokens: int, scaler: torch.amp.GradScaler) -> None:
        self.micro_batch_tokens = micro_batch_tokens
        self.scaler = scaler
        """Keeps gradients inside the narrow range of float16; does nothing over any other base."""

    def as_dict(self) -> dict[str, Any]:
        return {"micro_batch_tokens": self.micro_batch_tokens, "scaler": self.scaler.state_dict()}

    def restore(self, saved: dict[str, Any]) -> None:
        self.micro_batch_tokens = saved["micro_batch_tokens"]
        if saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])


def begin_finding(model: PreTrainedModel, plan: TrainingPlan) -> Found:
    """What a run assumes before its first step. A base in float16 has its loss scaled."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    device = model.get_input_embeddings().weight.device
    scaler = torch.amp.GradScaler(device.type, enabled=torch.float16 in dtypes)
    return Found(plan.micro_batch_tokens, scaler)


@dataclass(frozen=True)
class Job:
    """What the loop works with."""

    model: PreTrainedModel
    method: Method
    objective: Objective
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    features: Features | None = None
    """What the body makes of the examples, where it never changes and was asked once."""
    found: Found | None = None
    """None: what `begin_finding` says."""


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


def accumulate(job: Job, parts: Sequence[MicroBatch], plan: TrainingPlan) -> tuple[float, int]:
    """Add the gradients of a whole step: the sum of its losses over their number. Returns that loss and the number.

    In float16 the gradients come out multiplied by the loss scale. Raises NonFinite at the first loss that is none.
    """
    scaler = job.found.scaler if job.found else torch.amp.GradScaler(enabled=False)
    weight = sum(job.objective.weight(part) for part in parts)
    total = 0.0
    with attending(job.model, plan.packing and job.features is None, plan.attention):
        for part in parts:
            loss = job.objective.summed_loss(job.model, part.to(job.accelerator.device), plan.packing)
            total += (value := loss.item())
            if not math.isfinite(value):
                raise NonFinite("loss", parts, part.row_ids, value)
            job.accelerator.backward(scaler.scale(loss / weight))
    if (penalty := job.method.penalty(job.model)) is not None:
        job.accelerator.backward(scaler.scale(penalty))
    return total / weight, weight


def _parts(
    features: Features | None, examples: Sequence[Example], indices: Sequence[int], plan: TrainingPlan
) -> list[MicroBatch]:
    """The micro-batches of some examples: of their tokens, or of their features where those were computed before."""
    if features is not None:
        return [features.micro_batch(indices)]
    chosen = [examples[i] for i in indices]
    return list(batches.micro_batches(chosen, plan.micro_batch_tokens, plan.packing))


class NonFinite(RunError):
    """A loss or gradient norm that is no number, before any weight was touched by it."""

    def __init__(self, what: str, parts: Sequence[MicroBatch], row_ids: Sequence[str], value: float, step: int = 0):
        rows = ", ".join(row_ids[:8]) + (", ..." if len(row_ids) > 8 else "")
        super().__init__(
            f"non-finite {what} at step {step}, rows [{rows}]",
            "training",
            "the weights of the step before are untouched; lower training.learning_rate, or look at these rows",
        )
        self.what, self.parts, self.row_ids, self.value, self.step = what, parts, row_ids, value, step


def is_out_of_memory(error: BaseException) -> bool:
    """On a CPU torch has no class of its own for it."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _gradient_norm(parameters: list[nn.Parameter], limit: float | None, accelerator: Accelerator) -> float:
    """The norm before clipping; the gradients are clipped to `limit` where one is given."""
    if limit is None:
        return float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    return float(accelerator.clip_grad_norm_(parameters, limit))


@dataclass(frozen=True)
class _Gradients:
    """What an attempt at a step came to. The gradients themselves lie with the parameters: unscaled, and clipped."""

    loss: float
    weight: int
    norm: float
    tokens: int
    skipped: list[str]


def _smaller(parts: Sequence[MicroBatch], limit: int) -> int | None:
    """Half of what did not fit, as a limit; None where the largest micro-batch is one example, which is never cut."""
    largest = max(parts, key=len)
    return None if len(largest.row_ids) == 1 else min(limit, len(largest)) // 2


def _gradients(
    job: Job, examples: Sequence[Example], indices: Sequence[int], plan: TrainingPlan, step: int
) -> _Gradients:
    """The gradients of a whole step, whatever it takes: an attempt that ran out of memory or overflowed float16 is
    thrown away, and the step made again from its seed, in smaller micro-batches or with half the loss scale."""
    assert job.found is not None
    found, skipped, parameters = job.found, list[str](), trainable(job.model)
    may_shrink = plan.training.micro_batch_tokens == "auto" and job.accelerator.num_processes == 1
    while True:
        limited = replace(plan, found_tokens=found.micro_batch_tokens)
        parts = _parts(job.features, examples, indices, limited)
        seed_step(plan.seed, step)
        job.optimizer.zero_grad(set_to_none=True)
        try:
            loss, weight = accumulate(job, parts, plan)
        except NonFinite as error:
            raise NonFinite("loss", parts, error.row_ids, error.value, step) from None
        except RuntimeError as error:
            smaller = _smaller(parts, found.micro_batch_tokens)
            if not is_out_of_memory(error) or not may_shrink or smaller is None:
                raise
        else:
            found.scaler.unscale_(job.optimizer)
            norm = _gradient_norm(list(parameters.values()), plan.training.max_grad_norm, job.accelerator)
            if math.isfinite(norm):
                return _Gradients(loss, weight, norm, sum(map(len, parts)), skipped)
            scale = found.scaler.get_scale()
            if not found.scaler.is_enabled() or scale <= 1 or len(skipped) == MOST_SKIPPED:
                raise NonFinite("gradient", parts, [examples[i].row_id for i in indices], norm, step)
            found.scaler.update()
            skipped.append(f"the gradient overflowed float16 at loss scale {scale:g}")
            continue
        # Only here, outside of the handler, is what the failed attempt held free again.
        job.optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        told = f"out of memory with micro-batches of up to {found.micro_batch_tokens} tokens"
        note(f"step {step}: {told}; made again with {smaller}, the result stays")
        found.micro_batch_tokens = smaller
        skipped.append(told)


def tell_without_gradient(model: PreTrainedModel, step: int) -> None:
    """A trainable tensor that no gradient reaches stays what it was, whatever the plan says."""
    if names := [name for name, parameter in trainable(model).items() if parameter.grad is None]:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        warn(f"no gradient reached {', '.join(names[:5])}{more} in step {step}: they are not trained by it")


def train(job: Job, examples: Sequence[Example], plan: TrainingPlan, start: int = 0) -> Iterator[Step]:
    """Train from after step `start` to `plan.total_steps`. Raises NonFinite before such a step is taken."""
    model, training = job.model, plan.training
    assert training.learning_rate is not None
    if job.found is None:
        job = replace(job, found=begin_finding(model, plan))
    assert job.found is not None
    mixture = plan.mixture or Mixture.of([len(examples)], [1.0])
    per_epoch = schedule.steps_per_epoch(len(mixture), training.batch_size)
    model.train()
    for step in range(start + 1, plan.total_steps + 1):
        began = time.perf_counter()
        rate = schedule.learning_rate(
            step, plan.total_steps, training.learning_rate, training.schedule, training.warmup
        )
        for group in job.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        indices = batches.step_indices(step, mixture, training.batch_size, plan.seed)
        done = _gradients(job, examples, indices, plan, step)
        if step == start + 1:
            tell_without_gradient(model, step)
        job.found.scaler.step(job.optimizer)
        job.found.scaler.update()
        told = job.method.after_step(model, step, plan.total_steps)
        speed = done.tokens / (time.perf_counter() - began)
        memory = peak_memory(job.accelerator.device)
        row_ids = [examples[i].row_id for i in indices]
        yield Step(
            step, step / per_epoch, done.loss, done.norm, rate, done.weight, done.tokens, speed, memory, row_ids, told,
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
        for part in _parts(features, examples, range(len(examples)), plan):
            losses = token_losses(model, part.to(device), plan.packing)
            total += float(losses.double().sum())
            count += len(losses)
    model.train(was_training)
    return total / count
