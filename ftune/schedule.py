"""Pure functions of the step number: the learning rate, how many steps there are, and where epochs end."""

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]


def learning_rate(step: int, total: int, peak: float, schedule: Schedule, warmup: float) -> float:
    """The learning rate that optimizer step `step` (1-based, of `total`) uses.

    Warm-up is linear over `ceil(warmup * total)` steps, from peak / steps up to peak; after it the rate decays
    towards 0, which would be reached at step `total + 1`. With no warm-up the first step uses the peak.
    """
    num_warmup = math.ceil(warmup * total)
    if step <= num_warmup:
        return peak * step / num_warmup
    if schedule == "constant":
        return peak
    progress = (step - 1 - num_warmup) / (total - num_warmup)
    if schedule == "linear":
        return peak * (1 - progress)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Optimizer steps in one pass; the last, smaller batch counts."""
    return math.ceil(num_examples / batch_size)


def total_steps(num_examples: int, batch_size: int, epochs: float | None, max_steps: int | None) -> int:
    """Optimizer steps of the whole run; at least one."""
    if max_steps is not None:
        return max_steps
    assert epochs is not None
    return max(1, math.ceil(steps_per_epoch(num_examples, batch_size) * epochs - 1e-9))


def is_due(step: int, total: int, every: int | None, per_epoch: int) -> bool:
    """Whether something done every `every` steps (None: at the end of each epoch) is due after `step`."""
    return step % (every or per_epoch) == 0 or step == total
