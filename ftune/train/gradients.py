"""The gradients of one optimizer step, whatever it takes: micro-batches, processes, and the memory there is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from ftune import batches
from ftune.batches import Features, MicroBatch
from ftune.console.streams import note
from ftune.data import Example
from ftune.engine import whole
from ftune.errors import RunError
from ftune.methods.base import trainable
from ftune.train.job import Found, Job, TrainingPlan, attending, offloading

MOST_SKIPPED = 20
"""Attempts at a step that are thrown away before the run stops; halving the first loss scale 16 times makes it 1."""


@dataclass(frozen=True)
class Gradients:
    """What an attempt at a step came to. The gradients themselves lie with the parameters: unscaled, and clipped."""

    loss: float
    weight: int
    norm: float
    skipped: list[str]


@dataclass(frozen=True)
class Rows:
    """The rows of one step, each looked up once."""

    row_ids: list[str]
    lengths: list[int]
    """Tokens."""
    examples: Sequence[Example]
    features: Features | None
    indices: Sequence[int]

    @classmethod
    def of(cls, examples: Sequence[Example], features: Features | None, indices: Sequence[int]) -> "Rows":
        if features is not None:
            row_ids = [features.row_ids[i] for i in indices]
            return cls(row_ids, features.lengths[np.asarray(indices)].tolist(), (), features, indices)
        chosen = [examples[i] for i in indices]
        return cls([e.row_id for e in chosen], [len(e.tokens) for e in chosen], chosen, None, indices)

    def parts(self, places: Sequence[int], plan: TrainingPlan) -> list[MicroBatch]:
        """The micro-batches of some of them: of tokens, or of features where those were computed before."""
        if self.features is not None:
            return [self.features.micro_batch([self.indices[k] for k in places])]
        return list(batches.micro_batches([self.examples[k] for k in places], plan.micro_batch_tokens, plan.packing))


@dataclass(frozen=True)
class Share:
    """What one process computes of a step."""

    parts: list[MicroBatch]
    fillers: Sequence[MicroBatch] = ()
    """Passes that weigh nothing: every process makes as many, since each takes part in all that is shared."""


def share_of(job: Job, rows: Rows, plan: TrainingPlan) -> Share:
    engine = job.engine
    own = batches.share(rows.lengths, engine.count)[engine.rank]
    parts = rows.parts(own, plan) if own else []
    missing = engine.most(len(parts)) - len(parts)
    return Share(parts, rows.parts([rows.lengths.index(min(rows.lengths))], plan) * missing if missing else ())


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Dropout depends on seed, step and process alone: nothing to save, nothing that an evaluation could shift."""
    entropy = [seed, step, rank] if rank else [seed, step]
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]) % 2**63)


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


def accumulate(job: Job, share: Share, plan: TrainingPlan) -> tuple[float, int]:
    """Add the gradients of a whole step: the sum of its losses over their number. Returns that loss and the number.

    In float16 the gradients come out multiplied by the loss scale. Raises NonFinite where the loss is none.
    """
    engine, scaler = job.engine, job.found.scaler if job.found else torch.amp.GradScaler(enabled=False)
    weight = round(engine.totals(sum(job.objective.weight(part) for part in share.parts))[0])
    passes = [(part, 1.0) for part in share.parts] + [(part, 0.0) for part in share.fillers]
    total, lost = 0.0, list[tuple[tuple[str, ...], float]]()
    with attending(job.model, plan.packing and job.features is None, plan.attention):
        for number, (part, factor) in enumerate(passes, 1):
            with engine.sharing_gradients(now=number == len(passes)):
                with offloading(plan):
                    loss = engine.passed(job.objective.summed_loss, job.model, part.to(engine.device), plan.packing)
                if not math.isfinite(value := loss.item()):
                    lost.append((part.row_ids, value))
                torch.autograd.backward(scaler.scale(engine.weighted(loss * factor, weight)))
            total += value * factor
    total = engine.totals(total)[0]
    if not math.isfinite(total):
        everyone = [found for those in engine.gathered(lost) for found in those]
        parts = [part for those in engine.gathered(share.parts) for part in those]
        raise NonFinite("loss", parts, [row_id for row_ids, _ in everyone for row_id in row_ids], everyone[0][1])
    if (penalty := job.method.penalty(job.model)) is not None:
        torch.autograd.backward(scaler.scale(penalty))
    return total / weight, weight


def _gradient_norm(parameters: list[nn.Parameter], limit: float | None) -> float:
    """The norm before clipping; the gradients are clipped to `limit` where one is given."""
    if limit is None:
        return float(whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])))
    return float(whole(nn.utils.clip_grad_norm_(parameters, limit)))


def _smaller(parts: Sequence[MicroBatch], limit: int) -> int | None:
    """Half of what did not fit, as a limit; None where the largest micro-batch is one example, which is never cut."""
    largest = max(parts, key=len)
    return None if len(largest.row_ids) == 1 else min(limit, len(largest)) // 2


def gradients(job: Job, rows: Rows, plan: TrainingPlan, step: int) -> Gradients:
    """The gradients of a whole step: an attempt that ran out of memory or overflowed float16 is thrown away, and the
    step made again from its seed, in smaller micro-batches or with half the loss scale."""
    assert job.found is not None
    found, skipped, parameters = job.found, list[str](), list(trainable(job.model).values())
    may_shrink = plan.training.micro_batch_tokens == "auto" and job.engine.count == 1
    while True:
        share = share_of(job, rows, replace(plan, found_tokens=found.micro_batch_tokens))
        seed_step(plan.seed, step, job.engine.rank)
        job.optimizer.zero_grad(set_to_none=True)
        try:
            loss, weight = accumulate(job, share, plan)
        except NonFinite as error:
            raise NonFinite("loss", error.parts, error.row_ids, error.value, step) from None
        except RuntimeError as error:
            smaller = _smaller(share.parts, found.micro_batch_tokens)
            if not is_out_of_memory(error) or not may_shrink or smaller is None:
                raise
        else:
            found.scaler.unscale_(job.optimizer)
            norm = _gradient_norm(parameters, plan.training.max_grad_norm)
            if math.isfinite(norm):
                return Gradients(loss, weight, norm, skipped)
            scale = found.scaler.get_scale()
            if not found.scaler.is_enabled() or scale <= 1 or len(skipped) == MOST_SKIPPED:
                parts = [part for those in job.engine.gathered(share.parts) for part in those]
                raise NonFinite("gradient", parts, rows.row_ids, norm, step)
            found.scaler.update()
            skipped.append(f"the gradient overflowed float16 at loss scale {scale:g}")
            continue
        # Only here, outside of the handler, is what the failed attempt held free again.
        _make_room(job, found, smaller, step, skipped)


def _make_room(job: Job, found: Found, smaller: int, step: int, skipped: list[str]) -> None:
    job.optimizer.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    told = f"out of memory with micro-batches of up to {found.micro_batch_tokens} tokens"
    note(f"step {step}: {told}; made again with {smaller}, the result stays")
    found.micro_batch_tokens = smaller
    skipped.append(told)
