"""The processes a run is spread over, and how they hold the model: whole in each (DDP) or in parts (FSDP2).

torchrun starts the processes, accelerate finds them, torch's DDP and `fully_shard` do the work. What was launched, what
the recipe asks for and what is found must agree: accelerate by itself trains everything in every process, or quietly
takes DDP for FSDP.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from types import MethodType
from typing import Any, cast

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from ftune.errors import RunError, UserError
from ftune.methods.base import trainable
from ftune.model import decoder_layers

PATIENCE = timedelta(hours=2)
"""How long processes wait for one another, while the first reads and prepares a large data set, say."""
ASKED = ("MIXED_PRECISION", "GRADIENT_ACCUMULATION_STEPS", "DYNAMO_BACKEND", "USE_DEEPSPEED", "USE_MEGATRON_LM")
"""What `accelerate launch` may ask for, in ACCELERATE_...; it asks for nothing with these values:"""
HARMLESS = ("no", "NO", "false", "1")
LAUNCH = "torchrun --nproc_per_node 2 -m ftune train RECIPE"


def launched() -> int:
    """How many processes the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def has_group() -> bool:
    """Whether the processes of a run have found each other."""
    return distributed.is_available() and distributed.is_initialized()


def single_device() -> torch.device:
    """The device of a command that one process does; raises UserError when several were started."""
    if launched() > 1:
        raise UserError(
            f"{launched()} processes were started for what one does", "torchrun", "only ftune train shares its work"
        )
    device: torch.device = Accelerator(cpu=not torch.accelerator.is_available()).device
    return device


class LostProcess(RunError):
    """Another process of the run has ended, and this one waited for it."""


class Engine:
    """The processes of a run, and this one's place among them."""

    def __init__(self, parallel: str = "auto") -> None:
        """Raises UserError where the launch, the recipe's `training.parallel` and what was found do not agree."""
        _check_launch(parallel)
        patience = InitProcessGroupKwargs(timeout=PATIENCE)
        with telling_lost_processes():
            self.accelerator = Accelerator(
                cpu=not torch.accelerator.is_available(), mixed_precision="no", kwargs_handlers=[patience]
            )
        self.count: int = self.accelerator.num_processes
        self.rank: int = self.accelerator.process_index
        self.device: torch.device = self.accelerator.device
        if self.count != launched():
            what = f"{launched()} processes were started, and each would train alone: the engine found {self.count}"
            raise UserError(what, "training.parallel", f"start them with {LAUNCH}")
        by_itself = "ddp" if self.count > 1 else "none"
        self.strategy = by_itself if parallel == "auto" else parallel
        """none, ddp or fsdp."""
        self.passes: DistributedDataParallel | None = None
        self.parts: FSDPModule | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    @property
    def holds_parts(self) -> bool:
        return self.strategy == "fsdp"

    @property
    def loading_device(self) -> torch.device:
        """Where the base is loaded: parts of it go to the device when it is sharded."""
        return torch.device("cpu") if self.holds_parts else self.device

    def told(self) -> str:
        """How the work is shared, for people; empty for one process."""
        if self.strategy == "none":
            launcher = "accelerate launch started one process" if "ACCELERATE_MIXED_PRECISION" in os.environ else ""
            return f"{launcher}; several are started with {LAUNCH}" if launcher else ""
        how = "each with a part of the model (FSDP2)" if self.holds_parts else "each with the whole model (DDP)"
        return f"{self.count} processes, {how}"

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The first process alone, then the others, who find what it left in the cache."""
        with telling_lost_processes(), self.accelerator.main_process_first():
            yield

    def hold(self, model: PreTrainedModel, fingerprints: Mapping[str, int]) -> None:
        """Take the model, ready to train, in this run's way. `fingerprints`: of its tensors, equal in all processes."""
        if any(other != dict(fingerprints) for other in self.gathered(dict(fingerprints))):
            raise RunError(
                "the processes do not hold the same model", "training.parallel", "give all the same files and versions"
            )
        if self.count > 1 and torch.float16 in {parameter.dtype for parameter in model.parameters()}:
            what = "a base in float16 needs its loss scaled, which is proven for one process only"
            raise UserError(what, "model.dtype", "use bfloat16, or start one process")
        if self.strategy == "ddp":
            self.passes = DistributedDataParallel(_Passes(model), init_sync=False)
        elif self.holds_parts:
            self.parts = shard(model, self.device)

    def passed(self, function: Callable[..., torch.Tensor], model: PreTrainedModel, *args: Any) -> torch.Tensor:
        """What a function makes of the model: a forward pass of DDP's where the model is held so."""
        found: torch.Tensor = function(model, *args) if self.passes is None else self.passes(function, *args)
        return found

    @contextmanager
    def sharing_gradients(self, now: bool) -> Iterator[None]:
        """Inside, gradients are added up over the processes (at a step's last micro-batch), or kept for later."""
        if self.parts is not None:
            self.parts.set_requires_gradient_sync(now)
        with nullcontext() if now or self.passes is None else self.passes.no_sync():
            yield

    def weighted(self, loss: torch.Tensor, weight: float) -> torch.Tensor:
        """A summed loss over the whole step's weight. torch averages gradients over processes: hence the factor."""
        return loss * self.count / weight if self.count > 1 else loss / weight

    def totals(self, *values: float) -> list[float]:
        """The sums over all processes."""
        return self._reduced(values, distributed.ReduceOp.SUM)

    def most(self, value: int) -> int:
        """The largest of all processes' numbers."""
        return int(self._reduced([value], distributed.ReduceOp.MAX)[0])

    def _reduced(self, values: Any, how: Any) -> list[float]:
        if self.count == 1:
            return list(values)
        found = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        with telling_lost_processes():
            distributed.all_reduce(found, how)
        return found.tolist()

    def gathered(self, value: Any) -> list[Any]:
        """What each process has, by rank."""
        if self.count == 1:
            return [value]
        found = [None] * self.count
        with telling_lost_processes():
            distributed.all_gather_object(found, value)
        return found

    def from_main(self, value: Any) -> Any:
        """What the first process has; the others' value is not looked at."""
        if self.count == 1:
            return value
        box = [value]
        with telling_lost_processes():
            distributed.broadcast_object_list(box, device=self.device)
        return box[0]

    def close(self) -> None:
        """Leave the group: nothing waits for this process any more."""
        if has_group():
            distributed.destroy_process_group()


def _check_launch(parallel: str) -> None:
    """What `accelerate launch` and the recipe ask for can be honoured, or is an error."""
    for name in ASKED:
        if (value := os.environ.get(f"ACCELERATE_{name}")) and value not in HARMLESS:
            what = f"accelerate launch asks for {name.lower()}={value}, which ftune does not take from it"
            hint = "leave it out of accelerate's configuration: the recipe says dtypes, batches and how work is shared"
            raise UserError(what, f"ACCELERATE_{name}", hint)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and parallel != "fsdp":
        raise UserError(
            "accelerate launch asks for FSDP and the recipe does not", "training.parallel", "set it to fsdp"
        )
    if parallel != "auto" and "WORLD_SIZE" not in os.environ:
        hint = f"start several with {LAUNCH}, or set parallel: auto"
        raise UserError(f"{parallel} shares work between processes, and one was started", "training.parallel", hint)


class _Passes(nn.Module):
    """Calls a function with the model: such a call is a forward pass to DDP, whatever parts of the model it uses."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Any, *args: Any) -> Any:
        return function(self.model, *args)


def shard(model: PreTrainedModel, device: torch.device) -> FSDPModule:
    """Give each process its part of every tensor, layer by layer. In place: parameters become DTensors.

    What was set on parameters (LoRA+'s `learning_rate_scale`) is kept.
    """
    marked = {name: dict(vars(parameter)) for name, parameter in trainable(model).items()}
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for layer in decoder_layers(model)[1]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for name, parameter in trainable(model).items():
        vars(parameter).update(marked[name])
    # A pass that uses the body and the head one after the other, see `objectives.base.forward_pass`.
    model.within = MethodType(lambda model, function, *args: function(model, *args), model)
    register_fsdp_forward_method(model, "within")
    return cast(FSDPModule, model)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor put together from its parts; all processes must ask for it. Any other is given back as it is."""
    if isinstance(tensor, DTensor):
        with telling_lost_processes():
            return tensor.full_tensor()
    return tensor


def parted(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor as `like` is held: on its device, and in this process the same part."""
    moved = value.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)
    return moved


LOST = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "process group")


@contextmanager
def telling_lost_processes() -> Iterator[None]:
    """A process that waits for one that has ended says so, instead of naming a socket."""
    try:
        yield
    except RuntimeError as error:
        is_lost = isinstance(error, distributed.DistError) or any(sign in str(error) for sign in LOST)
        if not is_lost or isinstance(error, torch.OutOfMemoryError):
            raise
        hint = "see what it said; then start all again with --resume"
        raise LostProcess("another process of this run has ended", "torchrun", hint) from error
