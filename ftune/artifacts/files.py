"""What is written and read back: adapters in PEFT's layout, merged models, and the card beside each."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ftune import chat, folder
from ftune.errors import RunError, UserError
from ftune.methods import METHODS
from ftune.methods.base import Method, trainable

CARD = "ftune.json"
"""Beside the weights: what they were made from. Other programs ignore it."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""PEFT writes every name below its own two wrappers."""


@dataclass(frozen=True)
class Loaded:
    """An adapter put on a base: how many of its tensors there were, and which method it is."""

    method: str
    num_tensors: int

    @property
    def keys_loaded(self) -> str:
        return f"{self.num_tensors}/{self.num_tensors}"


def save_companions(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """What serving needs beside weights: the tokenizer, its chat template, and where generation stops."""
    tokenizer.save_pretrained(path)
    stops = chat.end_of_turn_ids(tokenizer)
    generation = (
        GenerationConfig.from_dict(model.generation_config.to_dict()) if model.generation_config else GenerationConfig()
    )
    if stops:
        generation.eos_token_id = stops if len(stops) > 1 else stops[0]
    if tokenizer.pad_token_id is not None:
        generation.pad_token_id = tokenizer.pad_token_id
    generation.save_pretrained(path)


def save_adapter(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Any,
    base_name: str,
    card: dict[str, Any],
) -> None:
    """Write the adapter folder whole: exactly the trainable tensors, by the names PEFT gives them."""
    config = METHODS[settings.name].adapter_config(model, settings, base_name)
    tensors = {PREFIX + name: p.detach().cpu().contiguous() for name, p in trainable(model).items()}
    with folder.atomic_folder(path) as temporary:
        save_file(tensors, temporary / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        (temporary / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_companions(temporary, model, tokenizer)
        _write_card(temporary, card)


def save_model(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    card: dict[str, Any],
    prove: Callable[[Path], None] | None = None,
) -> None:
    """Write a plain transformers folder whole, once `prove` accepted its files; refuses weights that are no numbers."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise RunError(
                f"non-finite values in {name}", str(path), "nothing was written; look at the training curves"
            )
    with folder.atomic_folder(path) as temporary:
        model.save_pretrained(temporary)
        save_companions(temporary, model, tokenizer)
        _write_card(temporary, card)
        if prove is not None:
            prove(temporary)


def _write_card(path: Path, card: dict[str, Any]) -> None:
    document = {"format_version": folder.FORMAT_VERSION, **card}
    (path / CARD).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_card(path: Path) -> dict[str, Any]:
    """What ftune recorded beside some weights; empty where another program made them."""
    if not (path / CARD).is_file():
        return {}
    card: dict[str, Any] = folder.read_json(path / CARD)
    if card.get("format_version", 0) > folder.FORMAT_VERSION:
        raise UserError("made by a newer ftune", str(path / CARD), "update ftune")
    return card


def read_adapter_config(path: Path) -> dict[str, Any]:
    config = folder.read_json(path / ADAPTER_CONFIG)
    if not isinstance(config, dict) or "peft_type" not in config:
        raise UserError(
            "not an adapter configuration", str(path / ADAPTER_CONFIG), "name a folder that PEFT or ftune wrote"
        )
    return config


def _method_of(config: dict[str, Any], path: Path) -> tuple[str, Method]:
    name = str(config["peft_type"]).lower()
    if name not in METHODS:
        raise UserError(
            f"adapters of type {config['peft_type']} cannot be loaded in this version", str(path / ADAPTER_CONFIG)
        )
    return name, METHODS[name]


def read_adapter_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors by our names, without PEFT's prefix."""
    file = path / ADAPTER_WEIGHTS
    if not file.is_file():
        pickled = (path / "adapter_model.bin").exists()
        why = "only a pickle (adapter_model.bin), which could run code" if pickled else f"no {ADAPTER_WEIGHTS}"
        raise UserError(f"{why} in this adapter folder", str(path), "save it as safetensors")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise UserError(f"damaged file: {error}", str(file), "restore it, or train again") from error
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


@torch.no_grad()
def load_adapter(model: PreTrainedModel, path: Path) -> Loaded:
    """Put an adapter on its base, strictly: missing, unexpected and misshapen tensors are an error that lists them."""
    config = read_adapter_config(path)
    name, method = _method_of(config, path)
    method.attach(model, method.settings_of(config))
    tensors, parameters = read_adapter_weights(path), trainable(model)
    wrong = {
        "missing": sorted(parameters.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - parameters.keys()),
        "of another shape": sorted(
            n for n in tensors.keys() & parameters.keys() if tensors[n].shape != parameters[n].shape
        ),
    }
    if told := "; ".join(f"{kind}: {', '.join(names)}" for kind, names in wrong.items() if names):
        raise UserError(
            f"the adapter's tensors do not fit the model: {told}", str(path), "is this the base it was trained on?"
        )
    for key, parameter in parameters.items():
        parameter.copy_(tensors[key])
    return Loaded(name, len(tensors))


def adapter_digest(path: Path) -> str:
    """What identifies an adapter: the sha256 of its weights."""
    return folder.sha256_file(path / ADAPTER_WEIGHTS)


def check_base(card: dict[str, Any], base_fingerprint: dict[str, str], digest: str, base_card: dict[str, Any]) -> None:
    """The base must be the one trained on, and must not contain this adapter already."""
    if digest in base_card.get("contains_adapters", []):
        raise UserError(f"this base already contains adapter {digest[:12]}", "base", "merge into the original base")
    trained_on = card.get("base")
    if trained_on is None:
        return
    names = sorted(trained_on.keys() | base_fingerprint.keys())
    weights = [n for n in names if n.endswith((".safetensors", "config.json")) or n == "commit"]
    if changed := [name for name in weights if trained_on.get(name) != base_fingerprint.get(name)]:
        raise UserError(
            f"base fingerprint differs: {', '.join(changed)}", "base", "use the very base this adapter was trained on"
        )
