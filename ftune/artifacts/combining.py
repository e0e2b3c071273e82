"""Several adapters in one model: what each changes in the weights of their base, joined tensor by tensor.

    D_i = W_i - W_0      W_0: the base's weight      W_i: with adapter i merged by its own method, float32
    w_i: the weight of adapter i      d: the density, the share of a tensor's values that is kept

    linear   W = W_0 + sum_i w_i D_i
             task arithmetic, Ilharco et al. 2022 (arXiv 2212.04089)
    ties     T_i = D_i where |D_i| is among the share d of largest ones, else 0;   s = the sign of sum_i T_i;
             W = W_0 + sum_{i: sign T_i = s} w_i T_i / (number of those i)
             trim, elect sign, disjoint merge, Yadav et al. 2023 (arXiv 2306.01708)
    dare     W = W_0 + sum_i w_i m_i D_i / d,   m_i ~ Bernoulli(d): dropped with p = 1 - d, the rest times 1 / (1 - p)
             drop and rescale, Yu et al. 2023 (arXiv 2311.03099)

As changes of weights they add up whatever the methods and ranks. The head of a classifier is new, no change of the
base: of it sum_i w_i H_i is taken whatever is asked for the rest.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from ftune import model as models
from ftune.classifier import HEAD
from ftune.console.progress import task_progress
from ftune.errors import Problem, UserError

DENSITIES = {"ties": 0.2, "dare": 0.5}
"""The papers' own: TIES keeps a fifth; DARE drops half without any loss, and often more."""


@dataclass(frozen=True)
class Combination:
    """How adapters are joined: a weight for each; the density, and the seed of what is dropped, where there is one."""

    kind: str
    weights: tuple[float, ...]
    density: float | None = None
    seed: int | None = None


def combination(
    num_adapters: int, weights: str | None, kind: str, density: float | None = None, seed: int | None = None
) -> Combination:
    """What was asked for on the command line; raises UserError with everything that is wrong with it."""
    problems, values = [], _weights(weights)
    if weights is None:
        problems.append(Problem("several adapters need a weight each", "--weights", "for two: --weights 0.5,0.5"))
    elif values is None:
        problems.append(Problem(f"not numbers: {weights}", "--weights", "numbers with commas between: 0.7,0.3"))
    elif len(values) != num_adapters:
        what = f"{len(values)} weights for {num_adapters} adapters"
        problems.append(Problem(what, "--weights", "give one for each, in the same order"))
    elif 0.0 in values:
        problems.append(Problem("an adapter with weight 0 has no effect", "--weights", "leave that adapter out"))
    if kind not in ("linear", *DENSITIES):
        problems.append(Problem(f"unknown way to combine: {kind}", "--combine", "linear, ties or dare"))
    elif kind not in DENSITIES and density is not None:
        problems.append(Problem(f"{kind} keeps everything, so it has no density", "--density", "leave it out"))
    if kind != "dare" and seed is not None:
        problems.append(Problem(f"nothing is drawn at random by {kind}", "--seed", "leave it out"))
    if density is not None and not 0 < density <= 1:
        problems.append(Problem(f"{density:g} is no share", "--density", "a number above 0, at most 1: what is kept"))
    if problems:
        raise UserError.collect(problems)
    assert values is not None
    kept = DENSITIES.get(kind) if density is None else density
    return Combination(kind, values, kept, (seed or 0) if kind == "dare" else None)


def _weights(text: str | None) -> tuple[float, ...] | None:
    """None where they are no finite numbers."""
    try:
        values = tuple(float(part) for part in (text or "").split(","))
    except ValueError:
        return None
    return values if all(map(math.isfinite, values)) else None


def trim(change: torch.Tensor, density: float) -> torch.Tensor:
    """Only the share `density` of largest magnitudes, the rest 0."""
    kept = change.abs().flatten().topk(int(density * change.numel())).indices
    trimmed = torch.zeros_like(change).flatten()
    trimmed[kept] = change.flatten()[kept]
    return trimmed.reshape(change.shape)


def ties(changes: Sequence[torch.Tensor], weights: Sequence[float], density: float) -> torch.Tensor:
    trimmed = torch.stack([trim(change, density) for change in changes])
    elected = torch.where(trimmed.sum(dim=0) >= 0, 1, -1)
    agrees = trimmed.sign() == elected
    weighted = trimmed * torch.tensor(weights, dtype=trimmed.dtype).reshape(-1, *[1] * (trimmed.ndim - 1))
    return (weighted * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)


def drop_and_rescale(change: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    return change * torch.bernoulli(torch.full_like(change, density), generator=generator) / density


def linear(changes: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    return sum((w * change for w, change in zip(weights, changes, strict=True)), torch.zeros_like(changes[0]))


def generator_of(seed: int, adapter: str, name: str) -> torch.Generator:
    """Random numbers of one adapter's tensor: whatever else is combined and in which order, they stay the same."""
    digest = hashlib.sha256(f"{seed} {adapter} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)


@torch.no_grad()
def write_changes(base: PreTrainedModel, merged: PreTrainedModel, file: Path) -> None:
    """Write D_i of every weight that the adapter changed. `merged` is used up: it holds the changes afterwards."""
    own, changed = base.state_dict(), {}
    for name, parameter in merged.named_parameters():
        parameter.data.sub_(own[name])
        if bool(parameter.any()):
            changed[name] = parameter.data.contiguous()
    save_file(changed, file)


@torch.no_grad()
def apply_changes(base: PreTrainedModel, changes: Sequence[Path], adapters: Sequence[str], how: Combination) -> None:
    """W_0 becomes W, in place; `adapters` are the sha256 that DARE draws by. One tensor of each is read at a time."""
    opened: list[Any] = [safe_open(path, "pt") for path in changes]
    holding = [set(file.keys()) for file in opened]
    names = sorted(set().union(*holding))
    _untie(base, names)
    own = dict(base.named_parameters())
    with task_progress("combining", len(names)) as progress:
        for name in names:
            weight = own[name]
            zero = torch.zeros(weight.shape, dtype=torch.float64)
            found = [
                file.get_tensor(name).double() if name in held else zero
                for file, held in zip(opened, holding, strict=True)
            ]
            joined = _join(name, found, adapters, how)
            weight.data.copy_(weight.data.double() + joined.to(weight.device))
            progress.advance()


def _join(name: str, changes: list[torch.Tensor], adapters: Sequence[str], how: Combination) -> torch.Tensor:
    if how.kind == "linear" or how.density is None or name == HEAD:
        return linear(changes, how.weights)
    if how.kind == "ties":
        return ties(changes, how.weights, how.density)
    assert how.seed is not None
    drawn = [
        drop_and_rescale(change, how.density, generator_of(how.seed, adapter, name))
        for change, adapter in zip(changes, adapters, strict=True)
    ]
    return linear(drawn, how.weights)


def _untie(base: PreTrainedModel, names: Sequence[str]) -> None:
    """Where an adapter trained the head or the embeddings of a tied base in full, they are two tensors from now on."""
    if not models.is_tied(base):
        return
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    own = {f"{path}.weight" for path, module in base.named_modules() if module is head or module is embeddings}
    if own & set(names):
        head.weight = nn.Parameter(embeddings.weight.detach().clone(), requires_grad=False)
        base.config.tie_word_embeddings = False
