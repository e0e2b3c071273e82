"""AdaLoRA, Zhang et al. 2023 (arXiv 2303.10512): a singular value decomposition whose rank is spent where it matters.

    h = W x + s P (E * (Q dropout(x)))     Q: (r, in)   P: (out, r)   E: (r, 1), starts at 0   s = alpha / r

Q, E, P are `lora_A`, `lora_E`, `lora_B` in PEFT's files. A penalty keeps P and Q orthogonal. All ranks together have a
budget that falls from r to the target: constant at first, then cubic, then constant again. At each allocation the
triplets of least importance lose their E; from the final phase on they stay lost. Importance is the product of smoothed
sensitivity |w dL/dw| and its uncertainty, summed over a triplet (equations 8 to 11).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ftune.methods import base, lora, low_rank, targets
from ftune.methods.adapted import AdaptedLinear
from ftune.settings import AdaloraSettings

BETA = 0.85
"""Smoothing of sensitivity and of uncertainty."""
ALLOCATIONS = 50
"""How often the budget is allocated anew, had it the whole run for it."""
TRIPLET = ("lora_A", "lora_E", "lora_B")


class AdaloraLinear(AdaptedLinear):
    kept: torch.Tensor

    def __init__(self, base_layer: Any, settings: AdaloraSettings) -> None:
        super().__init__(base_layer)
        self.settings = settings
        # PEFT adds 1e-5 to the rank it divides by; with it both give the same logits.
        self.scale = settings.alpha / (settings.initial_rank + 1e-5)
        self.dropout = nn.Dropout(settings.dropout)
        self.make_triplets(settings.initial_rank, base_layer.weight)
        self.train(base_layer.training)

    def make_triplets(self, rank: int, weight: torch.Tensor) -> None:
        where = base.like(weight)
        self.lora_A = nn.Parameter(torch.randn(rank, self.num_in, **where) * 0.02)
        self.lora_E = nn.Parameter(torch.zeros(rank, 1, **where))
        self.lora_B = nn.Parameter(torch.randn(self.num_out, rank, **where) * 0.02)
        self.register_buffer("kept", torch.ones(rank, 1, dtype=torch.bool, device=weight.device))
        for name in TRIPLET:
            self.register_buffer(f"sensitivity_{name}", torch.zeros_like(getattr(self, name).data))
            self.register_buffer(f"uncertainty_{name}", torch.zeros_like(getattr(self, name).data))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        A, dropout = self.lora_A * self.lora_E, self.dropout.p if self.training else 0.0
        return low_rank.added(self.base_layer(x), x, A, self.lora_B, self.scale, dropout)

    def merged(self) -> nn.Module:
        delta = self.lora_B.double() @ (self.lora_A.double() * self.lora_E.double())
        return self.with_matrix(self.matrix().double() + self.scale * delta)

    @torch.no_grad()
    def observe(self) -> None:
        """Smooth each weight's sensitivity |w dL/dw| and how uncertain it is."""
        for name in TRIPLET:
            weight = getattr(self, name)
            sensitivity, uncertainty = getattr(self, f"sensitivity_{name}"), getattr(self, f"uncertainty_{name}")
            now = (weight * weight.grad).abs()
            sensitivity.lerp_(now, 1 - BETA)
            uncertainty.lerp_((now - sensitivity).abs(), 1 - BETA)

    def importance(self) -> torch.Tensor:
        """Of each triplet: its singular value's, plus the means of its two vectors': (r,)."""
        A, E, B = (getattr(self, f"sensitivity_{n}") * getattr(self, f"uncertainty_{n}") for n in TRIPLET)
        importance: torch.Tensor = E[:, 0] + A.mean(dim=1) + B.mean(dim=0)
        return importance

    @torch.no_grad()
    def keep(self, kept: torch.Tensor) -> None:
        self.kept.copy_(kept[:, None])
        self.lora_E.mul_(self.kept)


def attach(model: PreTrainedModel, settings: AdaloraSettings, seed: int = 0) -> None:
    base.freeze(model)
    torch.manual_seed(seed)
    modules = targets.find_targets(model, settings.target_modules, settings.layers)
    targets.refuse_embeddings(modules)
    for path, module in modules.items():
        model.set_submodule(path, AdaloraLinear(module, settings))


def layers_of(model: PreTrainedModel) -> list[AdaloraLinear]:
    return [layer for _, layer in base.modules_of(model, AdaloraLinear)]


def penalty(model: PreTrainedModel) -> torch.Tensor:
    """orthogonal_weight times the mean over all P and Q of ||P^T P - I|| (Frobenius)."""
    layers = layers_of(model)
    grams = [gram for layer in layers for gram in (layer.lora_A @ layer.lora_A.T, layer.lora_B.T @ layer.lora_B)]
    distances = [torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device)) for gram in grams]
    return layers[0].settings.orthogonal_weight * torch.stack(distances).mean()


def budget(step: int, total_steps: int, initial: int, target: int, settings: AdaloraSettings) -> int:
    """How many triplets may live after a step: b0, then b + (b0 - b) (1 - progress)^3, then b (equation 12)."""
    first, last = phases(total_steps, settings)
    progress = min(1.0, max(0.0, (step - first) / max(1, last - first)))
    return int(target + (initial - target) * (1 - progress) ** 3)


def phases(total_steps: int, settings: AdaloraSettings) -> tuple[int, int]:
    """The step at which the budget begins to fall, and the one at which it has reached the target."""
    last = max(1, total_steps - int(settings.final_fraction * total_steps))
    return min(int(settings.initial_fraction * total_steps), last - 1), last


def after_step(model: PreTrainedModel, step: int, total_steps: int) -> dict[str, float]:
    """Observe importance, and allocate the budget when it is due; afterwards what was pruned stays pruned."""
    layers = layers_of(model)
    settings = layers[0].settings
    first, last = phases(total_steps, settings)
    if step <= last:
        for layer in layers:
            layer.observe()
    if step == last or (first < step < last and step % max(1, total_steps // ALLOCATIONS) == 0):
        triplets = sum(len(layer.kept) for layer in layers)
        target = min(triplets, settings.target_rank * len(layers))
        allocate(layers, budget(step, total_steps, triplets, target, settings))
    elif step > last:
        for layer in layers:
            layer.keep(layer.kept[:, 0])
    return {"mean_rank": sum(float(layer.kept.sum()) for layer in layers) / len(layers)}


def allocate(layers: list[AdaloraLinear], budget: int) -> None:
    """Keep the `budget` most important triplets of all layers."""
    scores = torch.cat([layer.importance() for layer in layers])
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[torch.topk(scores, budget).indices] = True
    for layer, part in zip(layers, torch.split(kept, [len(layer.kept) for layer in layers]), strict=True):
        layer.keep(part)


def tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The triplets that are kept; which they were of all, the rank pattern tells."""
    found: dict[str, torch.Tensor] = {}
    for path, layer in base.modules_of(model, AdaloraLinear):
        kept, prefix = layer.kept[:, 0], f"{base.PREFIX}{path}."
        found |= {prefix + "lora_A": layer.lora_A.detach()[kept], prefix + "lora_E": layer.lora_E.detach()[kept]}
        found |= {prefix + "lora_B": layer.lora_B.detach()[:, kept]}
    return found


def load_tensors(model: PreTrainedModel, found: Mapping[str, torch.Tensor]) -> None:
    for path, layer in base.modules_of(model, AdaloraLinear):
        saved = found.get(f"{base.PREFIX}{path}.lora_E")
        if saved is not None and len(saved) != len(layer.lora_E):
            layer.make_triplets(len(saved), layer.base_layer.weight)
    base.load_adapter_tensors(model, found)


def peft_config(model: PreTrainedModel, settings: AdaloraSettings, base_name: str) -> dict[str, Any]:
    layers = dict(base.modules_of(model, AdaloraLinear))
    return {
        "peft_type": "ADALORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "init_r": settings.initial_rank,
        "target_r": settings.target_rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "orth_reg_weight": settings.orthogonal_weight,
        # The budget was spent; PEFT wants a schedule all the same.
        "total_step": 3,
        "tinit": 0,
        "tfinal": 1,
        "deltaT": 1,
        "rank_pattern": {f"{path}.lora_E": layer.kept[:, 0].tolist() for path, layer in layers.items()},
        "target_modules": targets.names_for_peft(model, set(layers)),
        "fan_in_fan_out": any(layer.is_transposed for layer in layers.values()),
        "bias": "none",
        "inference_mode": True,
        "modules_to_save": None,
    }


def settings_of(config: Mapping[str, Any]) -> AdaloraSettings:
    lora.refuse_unsupported(config)
    targets.refuse_keys(config, ("modules_to_save",))
    return AdaloraSettings(
        initial_rank=config["init_r"],
        target_rank=min(config["target_r"], config["init_r"]),
        alpha=float(config["lora_alpha"]),
        dropout=config.get("lora_dropout", 0.0),
        target_modules=targets.names_from_peft(config),
        orthogonal_weight=config.get("orth_reg_weight", 0.5),
    )


METHOD = base.Method(
    attach=attach,
    set_strength=base.scaling(AdaloraLinear),
    merge=base.folding(AdaloraLinear),
    peft_config=peft_config,
    is_meant_by=lambda config: config["peft_type"] == "ADALORA",
    settings_of=settings_of,
    tensors=tensors,
    load_tensors=load_tensors,
    penalty=penalty,
    after_step=after_step,
)
