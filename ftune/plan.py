"""What a run will need: parameters, memory and steps, counted by the code that trains, on tensors without contents."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from ftune import activations, attention_on_gpu, classifier, quantized, schedule
from ftune.activations import Checkpointing
from ftune.classifier import Classes
from ftune.loss import rows_at_once
from ftune.methods import METHODS
from ftune.methods.base import attached, layer_of, trainable
from ftune.methods.head import method_of
from ftune.model import base_dtype, decoder_layers, is_classifier, shape_of
from ftune.recipe import ModelSection, Recipe
from ftune.settings import METHOD_NAMES, MethodSettings
from ftune.train import TrainingPlan

CARDS = {
    "8 GB (RTX 4060)": 8,
    "12 GB (RTX 4070)": 12,
    "16 GB (T4, RTX 4080)": 16,
    "24 GB (RTX 4090, L4)": 24,
    "40 GB (A100)": 40,
    "48 GB (L40S)": 48,
    "80 GB (A100, H100)": 80,
    "141 GB (H200)": 141,
}
"""Memory of common cards in GB (10^9 bytes); a run fits when its training peak leaves 8 % to the runtime."""
GENERATION_TOKENS = 8192
"""Tokens that one batch of generation holds in its cache."""
SMALLEST_IN_8_BITS = 4096
"""bitsandbytes keeps the moments of smaller tensors in float32."""
UNREAD_CLASSES = Classes(("0", "1"), None)
"""What a plan without data counts the head of a classifier with."""


@dataclass(frozen=True)
class Memory:
    """Bytes. `loss` is the largest chunk of logits with its gradient; peaks are sums of what lives at once."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    training_peak: int
    evaluation_peak: int
    merge_peak: int


@dataclass(frozen=True)
class Prediction:
    """plan.json: what was predicted before anything was loaded."""

    method: str
    total: int
    trainable: int
    memory: Memory
    steps: dict[str, int] | None
    targets: dict[str, int]
    """How many modules of each name the method goes on; none where it trains weights themselves, or goes in front."""
    layers: list[int]
    """The transformer layers in which they lie."""
    checkpointing: Checkpointing = False
    """What `training.gradient_checkpointing` comes to on this machine."""

    def told_targets(self) -> str:
        """`lora on 14 modules: q_proj 2, ... (layers 0 to 1)`; empty where there are none."""
        if not self.targets:
            return ""
        named = ", ".join(f"{name} {count}" for name, count in self.targets.items())
        places = f" (layers {ranges(self.layers)})" if self.layers else ""
        return f"{self.method} on {sum(self.targets.values())} modules: {named}{places}"

    def as_dict(self) -> dict[str, Any]:
        peak = self.memory.training_peak
        return {
            "method": self.method,
            "parameters": {
                "total": self.total,
                "trainable": self.trainable,
                "percent": 100 * self.trainable / self.total,
            },
            "memory_bytes": asdict(self.memory),
            "steps": self.steps,
            "targets": self.targets,
            "layers": self.layers,
            "gradient_checkpointing": self.checkpointing,
            "fits": {card: peak <= size * 10**9 * activations.SHARE for card, size in CARDS.items()},
        }


def _bytes(tensors: list[nn.Parameter]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _trains_head(model: PreTrainedModel) -> bool:
    head = model.score if is_classifier(model) else model.get_output_embeddings()
    return any(parameter.requires_grad for parameter in head.parameters())


def optimizer_bytes(name: str, trained: list[nn.Parameter]) -> int:
    """AdamW's two moments: in float32, or in 8 bits with two float32 constants for each 256."""
    if name == "sgd":
        return 0
    counts = [p.numel() for p in trained]
    if not name.endswith("8bit"):
        return 8 * sum(counts)
    return sum(2 * n + 8 * -(-n // 256) if n >= SMALLEST_IN_8_BITS else 8 * n for n in counts)


def base_of(settings: ModelSection, method: MethodSettings) -> ModelSection:
    """The base as a method holds it by default: never quantized where it is trained itself."""
    if METHODS[method.name].trains_base:
        return settings.model_copy(update={"quantization": "none"})
    usual = method.recipe_defaults.get("model", {})
    return settings.model_copy(update=dict(usual)) if settings.quantization == "none" else settings


def make_plan(
    recipe: Recipe,
    settings: Any,
    run: TrainingPlan,
    supervised_tokens: int | None = None,
    classes: Classes | None = None,
) -> Prediction:
    """The plan of one method (`settings`) under a recipe; `supervised_tokens` is None when no data were read."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = run.for_training(device)
    method = METHODS[settings.name]
    dtype = base_dtype(recipe.model, device, method.trains_base)
    attention_on_gpu.check(recipe.model.attention, recipe.data.packing, dtype, device)
    with FakeTensorMode():
        model = shape_of(recipe.model, dtype)
        if recipe.objective.name == "classification":
            model = classifier.build(model, classes or UNREAD_CLASSES)
        plain = weights = _bytes(list(model.parameters()))
        if (base := base_of(recipe.model, settings)).quantization != "none":
            weights = quantized.weight_bytes(model, base)
        base_parameters = {id(parameter) for parameter in model.parameters()}
        method_of(settings.name, model).attach(model, settings)
        kept = activations.bytes_by_checkpointing(model, run)
    trained = list(trainable(model).values())
    adapter = _bytes([p for p in model.parameters() if id(p) not in base_parameters])
    gradients = _bytes(trained)
    state = optimizer_bytes(recipe.training.optimizer, trained)
    vocabulary = model.config.num_labels if is_classifier(model) else model.get_input_embeddings().weight.shape[0]
    loss = 3 * 4 * vocabulary * min(run.micro_batch_tokens, rows_at_once(vocabulary, _trains_head(model)))
    held = weights + adapter + gradients + state + loss
    checkpointing: Checkpointing = False
    if recipe.data.packing or METHOD_NAMES[settings.name].abilities.checkpointing:
        peaks = {way: held + size for way, size in kept.items()}
        checkpointing = activations.chosen(recipe.training.gradient_checkpointing, model, peaks, device)
    memory = Memory(
        weights=weights,
        adapter=adapter,
        gradients=gradients,
        optimizer=state,
        activations=kept[checkpointing],
        loss=loss,
        training_peak=held + kept[checkpointing],
        # The proof of a merge holds plain weights, whatever was trained over.
        evaluation_peak=adapter + max(2 * weights + _cache_bytes(model, GENERATION_TOKENS), plain),
        merge_peak=2 * plain + adapter,
    )
    total = sum(p.numel() for p in model.parameters())
    steps = None
    if supervised_tokens is not None and run.mixture is not None:
        per_epoch = schedule.steps_per_epoch(len(run.mixture), recipe.training.batch_size)
        steps = {"per_epoch": per_epoch, "total": run.total_steps, "supervised_tokens": supervised_tokens}
    targets, layers = targets_of(model)
    return Prediction(
        settings.name, total, sum(p.numel() for p in trained), memory, steps, targets, layers, checkpointing
    )


def targets_of(model: PreTrainedModel) -> tuple[dict[str, int], list[int]]:
    """Of a model with a method attached: its modules counted by the last part of their names, and their layers."""
    paths, (layers_path, _) = attached(model), decoder_layers(model)
    places = {place for path in paths if (place := layer_of(path, layers_path)) is not None}
    return dict(Counter(path.rpartition(".")[2] for path in paths)), sorted(places)


def ranges(numbers: list[int]) -> str:
    """Rising numbers in short: 0 to 3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _cache_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Keys and values of every layer for that many tokens."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * tokens * next(model.parameters()).element_size())


def with_measured(planned: Prediction, peak_memory: int, steps: dict[str, int]) -> dict[str, Any]:
    """plan.json after training: the same keys, as measured; parts that were not measured apart are null."""
    document = planned.as_dict()
    memory: dict[str, int | None] = dict.fromkeys(document["memory_bytes"])
    memory["training_peak"] = peak_memory
    return {**document, "measured": {"parameters": document["parameters"], "memory_bytes": memory, "steps": steps}}
