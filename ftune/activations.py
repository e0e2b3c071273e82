"""What a backward pass needs of its forward pass: kept, made again (gradient checkpointing), or kept in main memory."""

from collections.abc import Mapping
from typing import Literal

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ftune.batches import MicroBatch
from ftune.engine import launched
from ftune.errors import UserError
from ftune.model import decoder_layers, hidden_states
from ftune.train import TrainingPlan, attending

Checkpointing = Literal["half", "offload"] | bool
"""Every layer is made again (true), every other one, or none; offload: every one, its input waits in main memory."""

TOLD: Mapping[Checkpointing, str] = {
    False: "",
    "half": "the activations of every other layer are made again in the backward pass",
    True: "the activations of all layers are made again in the backward pass",
    "offload": "the activations of all layers are made again in the backward pass, from inputs in main memory",
}
KEY = "training.gradient_checkpointing"
LARGE = 10**9
"""Parameters from which `auto` makes all layers again in a run of several processes."""
SHARE = 0.92
"""Of a device's memory; the runtime has the rest."""


def kept_bytes(model: PreTrainedModel, plan: TrainingPlan, num_tokens: int) -> tuple[int, int]:
    """What autograd keeps of one forward pass, in bytes: of the layers, and of what is before and after them.

    Counted by hooks on the real forward, in FakeTensorMode; the kernels of a GPU keep what `sdpa` keeps on a CPU.
    """
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}
    of_layers: set[int] = set()
    layers, is_inside = decoder_layers(model)[1], False

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in parameters and storage not in kept:
            kept[storage] = tensor
            if is_inside:
                of_layers.add(storage)
        return tensor

    def go(inside: bool) -> None:
        nonlocal is_inside
        is_inside = inside

    ids = torch.zeros(1, num_tokens, dtype=torch.long)
    batch = MicroBatch(ids, ids, ids, (0, num_tokens), ())
    model.train()
    hooks = (
        layers[0].register_forward_pre_hook(lambda *inputs: go(inside=True)),
        layers[-1].register_forward_hook(lambda *outputs: go(inside=False)),
    )
    with (
        attending(model, plan.packing, "eager" if plan.attention == "eager" else "sdpa"),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        output = hidden_states(model, batch, plan.packing)
    for hook in hooks:
        hook.remove()
    sizes = {storage: tensor.untyped_storage().nbytes() for storage, tensor in kept.items()}
    inside = sum(sizes[storage] for storage in of_layers)
    return inside, sum(sizes.values()) - inside + output.numel() * output.element_size()


def bytes_by_checkpointing(model: PreTrainedModel, plan: TrainingPlan) -> dict[Checkpointing, int]:
    """Activations of a micro-batch, the most first. They grow in proportion to the tokens: a short forward is enough.

    A layer that is made again keeps its input alone, and one such layer at a time holds everything.
    """
    sample = min(plan.micro_batch_tokens, 128)
    in_layers, outside = (size * plan.micro_batch_tokens // sample for size in kept_bytes(model, plan, sample))
    config = model.config.get_text_config()
    layers = config.num_hidden_layers
    one_layer = in_layers // layers
    one_input = plan.micro_batch_tokens * config.hidden_size * next(model.parameters()).element_size()
    again = layers // 2
    return {
        False: outside + in_layers,
        "half": outside + (layers - again) * one_layer + again * one_input + one_layer,
        True: outside + layers * one_input + one_layer,
        "offload": one_input + one_layer,
    }


def room(device: torch.device) -> int:
    """Bytes of the device's memory: what is free of it changes, and a run that goes on should do the same again."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return int(psutil.virtual_memory().total)


def chosen(
    asked: Checkpointing | Literal["auto"],
    model: PreTrainedModel,
    peaks: Mapping[Checkpointing, int],
    device: torch.device,
) -> Checkpointing:
    """What `auto` means: as little again as there is room for, by the peak of memory that is expected of each way."""
    if asked != "auto":
        return asked
    if launched() > 1:  # What is made again is gathered again: all processes must do the same.
        return bool(model.num_parameters() >= LARGE)
    ways = [way for way in peaks if _is_possible(way, model, device)]
    limit = SHARE * room(device)
    return next((way for way in ways if peaks[way] <= limit), ways[-1])


def _is_possible(way: Checkpointing, model: PreTrainedModel, device: torch.device) -> bool:
    if way == "half":
        return all(isinstance(layer, GradientCheckpointingLayer) for layer in decoder_layers(model)[1])
    return way != "offload" or device.type == "cuda"


def check(asked: Checkpointing | Literal["auto"], device: torch.device) -> None:
    """Raises UserError where there is no second memory to put anything in."""
    if asked == "offload" and device.type == "cpu":
        raise UserError("activations of a CPU lie in main memory already", f"{KEY}: offload", "use true, half or auto")


def set_up(model: PreTrainedModel, checkpointing: Checkpointing) -> None:
    """Have the layers made again in the backward pass that are to be. Raises UserError where a layer cannot be."""
    if checkpointing is False:
        return
    model.activation_checkpointing_enable({"use_reentrant": False})
    if checkpointing == "half":
        for layer in decoder_layers(model)[1][1::2]:
            _keep(layer)


def _keep(layer: nn.Module) -> None:
    if not isinstance(layer, GradientCheckpointingLayer):
        raise UserError(
            f"{type(layer).__name__} does not say by itself whether it is made again", f"{KEY}: half", "use true"
        )
    layer.gradient_checkpointing = False
