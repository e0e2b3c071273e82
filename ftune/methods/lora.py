"""LoRA, Hu et al. 2021 (arXiv 2106.09685); rank-stabilized scale, Kalajdzievski 2023 (arXiv 2312.03732).

    h = W x + s B A dropout(x)      A: (r, in)   B: (out, r), starts at 0   s = alpha / r, or alpha / sqrt(r)

Only A and B are trained. Parameters are named as PEFT's files name them: `<path>.lora_A.weight` and `.lora_B.weight`.

PiSSA (Meng et al. 2024, arXiv 2404.02948) and OLoRA (Büyükakyüz 2024, arXiv 2406.01775) start A and B at a part of W
itself. They subtract that part, s B0 A0, from the base; here the base stays as it is and s B0 A0 is subtracted from the
update instead, so the saved adapter is a plain LoRA of rank 2r, [B, -B0] [A; A0], for the original base.
LoRA+ (Hayou et al. 2024, arXiv 2402.12354) trains B with a learning rate of its own.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from ftune.errors import UserError
from ftune.methods import base, low_rank, saved, targets
from ftune.methods.adapted import AdaptedLinear
from ftune.settings import LoraSettings, LowRankSettings


class LoraLinear(AdaptedLinear):
    """A frozen linear layer with a low-rank update beside it."""

    def __init__(self, base_layer: Any, rank: int, alpha: float, settings: LowRankSettings) -> None:
        super().__init__(base_layer)
        self.rank, self.alpha = rank, alpha
        self.scale = alpha / (math.sqrt(rank) if getattr(settings, "rank_stabilized", False) else rank)
        self.dropout = nn.Dropout(settings.dropout)
        self.lora_A = nn.Linear(self.num_in, rank, bias=False, **base.like(base_layer.weight))
        self.lora_B = nn.Linear(rank, self.num_out, bias=False, **base.like(base_layer.weight))
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)
        self.train(base_layer.training)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """s B A dropout(x): (..., in) -> (..., out) in the adapter's dtype; exactly 0 at the start."""
        x = self.dropout(x.to(self.lora_A.weight.dtype))
        update: torch.Tensor = self.lora_B(self.scale * self.lora_A(x))
        if self.start_A is not None:
            update = update - functional.linear(self.scale * functional.linear(x, self.start_A), self.start_B)
        return update

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in) -> (..., out), in the base's dtype."""
        if self.start_A is not None:
            h: torch.Tensor = self.base_layer(x)
            return h + self.update(x).to(h.dtype)
        A, B = self.lora_A.weight, self.lora_B.weight
        dropout = self.dropout.p if self.training else 0.0
        # Without gradients nothing is saved by it, and the layer itself is called: proofs have hooks on it.
        if torch.is_grad_enabled() and type(self.base_layer) is nn.Linear:
            return low_rank.linear(x, self.base_layer.weight, self.bias, A, B, self.scale, dropout)
        return low_rank.added(self.base_layer(x), x, A, B, self.scale, dropout)

    def start_at(self, A: torch.Tensor, B: torch.Tensor) -> None:
        """Let A and B begin elsewhere; what they begin with has no effect."""
        self.lora_A.weight.data.copy_(A)
        self.lora_B.weight.data.copy_(B)
        self.start_A, self.start_B = self.lora_A.weight.detach().clone(), self.lora_B.weight.detach().clone()

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of the whole update, as they are saved."""
        A, B = self.lora_A.weight.detach(), self.lora_B.weight.detach()
        if self.start_A is None:
            return A, B
        return torch.cat([A, self.start_A]), torch.cat([B, -self.start_B], dim=1)

    def delta(self) -> torch.Tensor:
        """The weight update s B A, (out, in) float64."""
        A, B = self.factors()
        return self.scale * (B.double() @ A.double())

    def merged(self) -> nn.Module:
        return self.with_matrix(self.matrix().double() + self.delta())


class LoraEmbedding(base.Adapted):
    """Frozen embeddings with a low-rank update: E + s (B A)^T, A: (r, vocabulary) starts at 0, B: (width, r)."""

    def __init__(self, base_layer: nn.Embedding, rank: int, alpha: float, settings: LoraSettings) -> None:
        super().__init__(base_layer)
        self.rank, self.alpha = rank, alpha
        self.scale = alpha / (math.sqrt(rank) if settings.rank_stabilized else rank)
        vocabulary, width = base_layer.weight.shape
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, vocabulary, **base.like(base_layer.weight)))
        self.lora_embedding_B = nn.Parameter(torch.randn(width, rank, **base.like(base_layer.weight)))

    @property
    def weight(self) -> torch.Tensor:
        weight: torch.Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h: torch.Tensor = self.base_layer(ids)
        update = functional.embedding(ids, self.lora_embedding_A.T) @ self.lora_embedding_B.T
        return h + (self.scale * update).to(h.dtype)

    def merged(self) -> nn.Module:
        delta = (self.lora_embedding_B.double() @ self.lora_embedding_A.double()).T
        self.weight.data = (self.weight.data.double() + self.scale * delta).to(self.weight.dtype)
        return self.base_layer


def adapted_modules(model: PreTrainedModel, settings: LowRankSettings) -> Iterator[tuple[str, nn.Module, int, float]]:
    """Path, module, rank and alpha of everything that gets a low-rank update."""
    found = targets.find_targets(model, settings.target_modules, settings.layers)
    targets.check_patterns(found, {"rank_pattern": settings.rank_pattern, "alpha_pattern": settings.alpha_pattern})
    for path, module in found.items():
        rank = targets.pattern_value(settings.rank_pattern, path, settings.rank)
        yield path, module, rank, targets.pattern_value(settings.alpha_pattern, path, settings.alpha)


def attach(model: PreTrainedModel, settings: LoraSettings, seed: int = 0) -> None:
    base.freeze(model)
    torch.manual_seed(seed)
    for path, module, rank, alpha in adapted_modules(model, settings):
        if isinstance(module, nn.Embedding):
            model.set_submodule(path, LoraEmbedding(module, rank, alpha, settings))
            continue
        layer = LoraLinear(module, rank, alpha, settings)
        if settings.init != "default":
            start_at_part_of_base(layer, settings.init)
        if settings.learning_rate_ratio != 1.0:
            layer.lora_B.weight.learning_rate_scale = settings.learning_rate_ratio  # type: ignore[attr-defined]
        model.set_submodule(path, layer)
    saved.attach(model, settings.modules_to_save)


@torch.no_grad()
def start_at_part_of_base(layer: LoraLinear, init: str) -> None:
    """s B A = the top r singular directions of W (pissa), or the first r of its QR decomposition (olora)."""
    weight = layer.matrix()
    if not base.has_values(weight):
        return layer.start_at(layer.lora_A.weight, layer.lora_B.weight)
    if init == "pissa":
        U, S, V = torch.linalg.svd(weight.float(), full_matrices=False)
        root = (S[: layer.rank] / layer.scale).sqrt()
        B, A = U[:, : layer.rank] * root, root[:, None] * V[: layer.rank]
    else:
        Q, R = torch.linalg.qr(weight.float())
        B, A = Q[:, : layer.rank] / math.sqrt(layer.scale), R[: layer.rank] / math.sqrt(layer.scale)
    missing = layer.rank - len(A)
    layer.start_at(functional.pad(A, (0, 0, 0, missing)), functional.pad(B, (0, missing)))


def set_strength(model: PreTrainedModel, strength: float) -> None:
    saved.set_strength(model, strength)
    base.scaling(LoraLinear, LoraEmbedding)(model, strength)


def merge(model: PreTrainedModel) -> None:
    base.folding(LoraLinear, LoraEmbedding)(model)
    saved.merge(model)


def tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The trainable parameters; where A and B began at a part of the base, the factors of rank 2r."""
    found = base.adapter_tensors(model)
    for path, layer in base.modules_of(model, LoraLinear):
        A, B = layer.factors()
        found |= {f"{base.PREFIX}{path}.lora_A.weight": A, f"{base.PREFIX}{path}.lora_B.weight": B}
    return found


def load_tensors(model: PreTrainedModel, found: Mapping[str, torch.Tensor]) -> None:
    """PEFT saves adapted embeddings themselves beside their update; they must be the base's own."""
    own = dict(model.named_parameters())
    beside = [name for name in found if name.endswith(".base_layer.weight") and name.removeprefix(base.PREFIX) in own]
    for name in beside:
        weight = own[name.removeprefix(base.PREFIX)]
        if found[name].shape != weight.shape or not torch.equal(found[name].to(weight), weight):
            what = f"this adapter brings {name}, which differs from the base's"
            raise UserError(what, "adapter_model.safetensors", "were embeddings resized or trained with it?")
    base.load_adapter_tensors(model, {name: tensor for name, tensor in found.items() if name not in beside})


def peft_config(model: PreTrainedModel, settings: LowRankSettings, base_name: str) -> dict[str, Any]:
    layers = {path: layer for kind in (LoraLinear, LoraEmbedding) for path, layer in base.modules_of(model, kind)}
    rank_stabilized = getattr(settings, "rank_stabilized", False)
    is_doubled = getattr(settings, "init", "default") != "default"
    factor = (math.sqrt(2) if rank_stabilized else 2) if is_doubled else 1
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": settings.rank * (2 if is_doubled else 1),
        "lora_alpha": settings.alpha * factor,
        "lora_dropout": settings.dropout,
        "use_rslora": rank_stabilized,
        "target_modules": targets.names_for_peft(model, set(layers)),
        "rank_pattern": {
            path: layer.rank * (2 if is_doubled else 1) for path, layer in layers.items() if layer.rank != settings.rank
        },
        "alpha_pattern": {
            path: layer.alpha * factor for path, layer in layers.items() if layer.alpha != settings.alpha
        },
        "bias": "none",
        "fan_in_fan_out": any(getattr(layer, "is_transposed", False) for layer in layers.values()),
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": list(settings.modules_to_save) or None,
        "use_dora": False,
    }


UNSUPPORTED = {
    "trainable_token_indices": "trainable tokens",
    "layer_replication": "layer replication",
    "lora_bias": "LoRA biases",
    "exclude_modules": "exclude_modules",
    "target_parameters": "target_parameters",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QA-LoRA",
    "layers_to_transform": "layers_to_transform",
}
"""Keys of PEFT's LoraConfig that change the result and that this version cannot honour."""


def refuse_unsupported(config: Mapping[str, Any]) -> None:
    refused = [name for key, name in UNSUPPORTED.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        refused.append(f"bias: {config['bias']}")
    if refused:
        raise UserError(
            f"this adapter uses {', '.join(refused)}, which this version cannot load", "adapter_config.json"
        )


def common_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that LoRA and its relatives share, out of an adapter_config.json."""
    refuse_unsupported(config)
    return {
        "rank": config["r"],
        "alpha": float(config["lora_alpha"]),
        "dropout": config.get("lora_dropout", 0.0),
        "target_modules": targets.names_from_peft(config),
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": config.get("alpha_pattern") or {},
        "modules_to_save": tuple(config.get("modules_to_save") or ()),
    }


def settings_of(config: Mapping[str, Any]) -> LoraSettings:
    return LoraSettings(**common_settings(config), rank_stabilized=config.get("use_rslora", False))


METHOD = base.Method(
    attach=attach,
    set_strength=set_strength,
    merge=merge,
    peft_config=peft_config,
    is_meant_by=lambda config: config["peft_type"] == "LORA" and not config.get("use_dora"),
    settings_of=settings_of,
    tensors=tensors,
    load_tensors=load_tensors,
)
