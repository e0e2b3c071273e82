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
from torch import nn
from transformers import PreTrainedModel

from ftune import attention, batches, schedule
from ftune.batches import Features, MicroBatch
from ftune.data import Example, Mixture
from ftune.engine import Engine, whole
from ftune.errors import RunError, UserError
from ftune.methods.base import Method
from ftune.objectives.base import Objective
from ftune.recipe import TrainingSection

BITSANDBYTES = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
}
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
    method: dict[str, float]
    """What the method has to tell, such as AdaLoRA's mean rank."""

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

    @property
    def micro_batch_tokens(self) -> int:
        asked = self.training.micro_batch_tokens
        return MICRO_BATCH_TOKENS if asked == "auto" else int(asked)


@dataclass(frozen=True)
class Job:
    """What the loop works with."""

    model: PreTrainedModel
    method: Method
    objective: Objective
    optimizer: torch.optim.Optimizer
    engine: Engine
    features: Features | None = None
    """What the body makes of the examples, where it never changes and was asked once."""


def resolve_optimizer(requested: str, device: torch.device) -> str:
    """The optimizer that `auto` means here; raises UserError for a paged one on a CPU.

    Paged memory is CUDA's; bitsandbytes would fall back to ordinary memory there with no more than a warning.
    """
    if requested == "auto":
        return "paged_adamw_32bit" if device.type == "cuda" else "adamw"
    if requested.startswith("paged") and device.type != "cuda":
        plain = requested.removeprefix("paged_").removesuffix("_32bit")
        hint = f"use {plain}, which computes the same"
        raise UserError(f"{requested} needs a GPU: there is no paged memory here", "training.optimizer", hint)
    return requested


def make_optimizer(model: PreTrainedModel, training: TrainingSection) -> torch.optim.Optimizer:
    """The optimizer over every trainable parameter; weight decay only on matrices.

    A parameter's `learning_rate_scale` multiplies its learning rate (LoRA+).
    """
    grouped: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decay = training.weight_decay if parameter.ndim >= 2 else 0.0
            grouped.setdefault((decay, getattr(parameter, "learning_rate_scale", 1.0)), []).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": decay, "scale": scale} for (decay, scale), parameters in grouped.items()
    ]
    assert training.learning_rate is not None
    name = resolve_optimizer(training.optimizer, model.get_input_embeddings().weight.device)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=training.learning_rate)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=training.learning_rate)
    import bitsandbytes

    made: torch.optim.Optimizer = getattr(bitsandbytes.optim, BITSANDBYTES[name])(groups, lr=training.learning_rate)
    return made


def peak_memory(device: torch.device) -> int:
    """Bytes: the device's peak of allocated memory; on a CPU, the process's peak resident size."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def attending(model: PreTrainedModel, packing: bool, name: str) -> Any:
    """The context that forward passes of this run's micro-batches stand in."""
    return attention.packed(model, name) if packing else nullcontext()


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Dropout depends on seed, step and process alone: nothing to save, nothing that an evaluation could shift."""
    entropy = [seed, step, rank] if rank else [seed, step]
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]) % 2**63)


def _accumulate(job: Job, share: "_Share", plan: TrainingPlan) -> tuple[float, int]:
    """Add the gradients of a whole step: the sum of its losses over their number. Returns that loss and the number."""
    engine = job.engine
    weight = round(engine.totals(sum(job.objective.weight(part) for part in share.parts))[0])
    passes = [(part, 1.0) for part in share.parts] + [(part, 0.0) for part in share.fillers]
    total, lost = 0.0, list[str]()
    for number, (part, factor) in enumerate(passes, 1):
        with engine.sharing_gradients(now=number == len(passes)):
            loss = engine.passed(job.objective.summed_loss, job.model, part.to(engine.device), plan.packing)
            if not math.isfinite(value := loss.item()):
                lost += part.row_ids
            engine.backward(loss * factor, weight)
        total += value * factor
    total = engine.totals(total)[0]
    if not math.isfinite(total):
        raise _NonFinite([row_id for rows in engine.gathered(lost) for row_id in rows])
    if (penalty := job.method.penalty(job.model)) is not None:
        engine.accelerator.backward(penalty)
    return total / weight, weight


@dataclass(frozen=True)
class _Share:
    """What one process computes of a step."""

    parts: list[MicroBatch]
    fillers: list[MicroBatch]
    """Passes that weigh nothing: every process makes as many, since each takes part in all that is shared."""


def _share(job: Job, examples: Sequence[Example], indices: Sequence[int], plan: TrainingPlan) -> _Share:
    engine = job.engine
    lengths = [len(examples[i].tokens) for i in indices]
    own = batches.share(lengths, engine.count)[engine.rank]
    parts = _parts(job.features, examples, [indices[k] for k in own], plan) if own else []
    missing = engine.most(len(parts)) - len(parts)
    shortest = indices[lengths.index(min(lengths))]
    return _Share(parts, _parts(job.features, examples, [shortest], plan) * missing if missing else [])


def _parts(
    features: Features | None, examples: Sequence[Example], indices: Sequence[int], plan: TrainingPlan
) -> list[MicroBatch]:
    """The micro-batches of some examples: of their tokens, or of their features where those were computed before."""
    if features is not None:
        return [features.micro_batch(indices)]
    chosen = [examples[i] for i in indices]
    return list(batches.micro_batches(chosen, plan.micro_batch_tokens, plan.packing))


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


def _gradient_norm(parameters: list[nn.Parameter], limit: float | None) -> float:
    """The norm before clipping; the gradients are clipped to `limit` where one is given."""
    if limit is None:
        return float(whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])))
    return float(whole(nn.utils.clip_grad_norm_(parameters, limit)))


def train(job: Job, examples: Sequence[Example], plan: TrainingPlan, start: int = 0) -> Iterator[Step]:
    """Train from after step `start` to `plan.total_steps`. Raises RunError before a non-finite step is taken."""
    model, training = job.model, plan.training
    assert training.learning_rate is not None
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Its state lies where it belongs already; accelerate would copy it, out of paged memory too.
    optimizer = job.engine.accelerator.prepare(job.optimizer, device_placement=[False])
    mixture = plan.mixture or Mixture.of([len(examples)], [1.0])
    per_epoch = schedule.steps_per_epoch(len(mixture), training.batch_size)
    model.train()
    for step in range(start + 1, plan.total_steps + 1):
        began = time.perf_counter()
        rate = schedule.learning_rate(
            step, plan.total_steps, training.learning_rate, training.schedule, training.warmup
        )
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        indices = batches.step_indices(step, mixture, training.batch_size, plan.seed)
        share = _share(job, examples, indices, plan)
        seed_step(plan.seed, step, job.engine.rank)
        optimizer.zero_grad(set_to_none=True)
        try:
            with attending(model, plan.packing and job.features is None, plan.attention):
                loss, weight = _accumulate(job, share, plan)
        except _NonFinite as error:
            raise _stop(step, "loss", error.row_ids) from None
        norm = _gradient_norm(parameters, training.max_grad_norm)
        row_ids = [examples[i].row_id for i in indices]
        if not math.isfinite(norm):
            raise _stop(step, "gradient", row_ids)
        optimizer.step()
        told = job.method.after_step(model, step, plan.total_steps)
        tokens = sum(len(examples[i].tokens) for i in indices)
        speed = tokens / (time.perf_counter() - began)
        memory = peak_memory(job.engine.device)
        yield Step(step, step / per_epoch, loss, norm, rate, weight, tokens, speed, memory, row_ids, told)


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
