"""What the loop works with: what to do, what a run finds out about its machine, and the model with all around it."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ftune import attention
from ftune.batches import Features
from ftune.data import Mixture
from ftune.engine import Engine
from ftune.methods.base import Method
from ftune.objectives.base import Objective
from ftune.recipe import TrainingSection

MICRO_BATCH_TOKENS = 4096
"""What `micro_batch_tokens: auto` holds at once, unless the machine has no room for it."""
MICRO_BATCH_TOKENS_ON_CPU = 1408
"""The same with gradients on a CPU, which more tokens at once hardly make faster."""


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
    offloads: bool = False
    """Whether what a forward pass keeps for the backward pass waits in main memory."""

    @property
    def micro_batch_tokens(self) -> int:
        asked = self.training.micro_batch_tokens
        return self.found_tokens or (MICRO_BATCH_TOKENS if asked == "auto" else int(asked))

    def for_training(self, device: torch.device) -> "TrainingPlan":
        """The plan with as many tokens at once as passes with gradients have on this device."""
        is_free = self.found_tokens is None and self.training.micro_batch_tokens == "auto"
        return replace(self, found_tokens=MICRO_BATCH_TOKENS_ON_CPU) if is_free and device.type == "cpu" else self


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

    def restore(self, saved: dict[str, Any] | None) -> None:
        """What a checkpoint holds; older ones hold none."""
        if saved is None:
            return
        self.micro_batch_tokens = saved["micro_batch_tokens"]
        if saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])


def begin_finding(model: PreTrainedModel, plan: TrainingPlan) -> Found:
    """What a run assumes before its first step. A base in float16 has its loss scaled."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    device = model.get_input_embeddings().weight.device
    scaler = torch.amp.GradScaler(device.type, enabled=torch.float16 in dtypes)
    return Found(plan.for_training(device).micro_batch_tokens, scaler)


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
    found: Found | None = None
    """None: what `begin_finding` says."""


def offloading(plan: TrainingPlan) -> Any:
    """The context of forward passes whose kept tensors wait in main memory, where the plan says so."""
    if not plan.offloads:
        return nullcontext()
    return torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())


def attending(model: PreTrainedModel, packing: bool, name: str) -> Any:
    """The context that forward passes of this run's micro-batches stand in."""
    return attention.packed(model, name) if packing else nullcontext()
