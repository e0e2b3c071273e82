"""What is written and read back: adapters in PEFT's layout, merged models, and the card beside each."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ftune import classifier, folder, stored
from ftune import model as models
from ftune.artifacts.companions import identity, save_companions
from ftune.classifier import Classes
from ftune.errors import RunError, UserError
from ftune.methods import METHODS
from ftune.methods.head import TASK, head_of, method_of, without_head
from ftune.recipe import ModelSection
from ftune.settings import METHOD_NAMES, available
from ftune.trust import telling_damage

CARD = "ftune.json"
"""Beside the weights: what they were made from. Other programs ignore it."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
SIZES = ("rank", "initial_rank", "virtual_tokens", "size")
REMAKE = "restore the folder, or train again"


@dataclass(frozen=True)
class Loaded:
    """An adapter put on a base: how many of its tensors there were, and which method it is."""

    method: str
    num_tensors: int

    @property
    def keys_loaded(self) -> str:
        return f"{self.num_tensors}/{self.num_tensors}"


def save_adapter(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Any,
    base_name: str,
    card: dict[str, Any],
) -> None:
    """Write the adapter folder whole: in PEFT's layout where PEFT has the method, else beside our own card alone."""
    method = method_of(settings.name, model)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in method.tensors(model).items()}
    with folder.atomic_folder(path) as temporary:
        save_file(tensors, temporary / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        if (config := peft_config(model, settings, base_name)) is not None:
            (temporary / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_companions(temporary, model, tokenizer)
        # Not in a config.json: beside an adapter, transformers would take that for a whole model's folder.
        labels = {"labels": _card_of_classes(model)} if models.is_classifier(model) else {}
        _write_card(temporary, {**card, "tokenizer": identity(tokenizer), **labels})


def _card_of_classes(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config
    return {
        "id2label": {str(i): label for i, label in config.id2label.items()},
        "label2id": config.label2id,
        "pad_token_id": config.get_text_config().pad_token_id,
    }


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
        _write_card(temporary, {**card, "tokenizer": identity(tokenizer), "tied": models.is_tied(model)})
        if prove is not None:
            prove(temporary)


def _write_card(path: Path, card: dict[str, Any]) -> None:
    document = {"format_version": folder.FORMAT_VERSION, **card}
    (path / CARD).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_card(path: Path) -> dict[str, Any]:
    """What ftune recorded beside some weights; empty where another program made them."""
    if not (path / CARD).is_file():
        return {}
    card = stored.read_object(path / CARD)
    with stored.as_written(path / CARD):
        if card.get("format_version", 0) > folder.FORMAT_VERSION:
            raise UserError("made by a newer ftune", str(path / CARD), "update ftune")
    return card


def peft_config(model: PreTrainedModel, settings: Any, base_name: str) -> dict[str, Any] | None:
    """The adapter_config.json of PEFT's format; None where PEFT has no such adapter (a deep prompt, a bottleneck)."""
    make = method_of(settings.name, model).peft_config
    return None if make is None or getattr(settings, "depth", "") == "deep" else make(model, settings, base_name)


def is_adapter(path: Path) -> bool:
    """Whether this is an adapter's folder, PEFT's or our own."""
    return (path / ADAPTER_CONFIG).is_file() or (path / ADAPTER_WEIGHTS).is_file()


def read_adapter_config(path: Path) -> dict[str, Any]:
    """PEFT's configuration of an adapter; empty where PEFT has no such adapter and our card says what it is."""
    if not (path / ADAPTER_CONFIG).is_file():
        return {}
    config = stored.read_object(path / ADAPTER_CONFIG)
    if not isinstance(config.get("peft_type"), str):
        raise UserError(
            "not an adapter configuration", str(path / ADAPTER_CONFIG), "name a folder that PEFT or ftune wrote"
        )
    return config


def read_settings(path: Path) -> Any:
    """What an adapter is: the settings of its method, out of PEFT's configuration or our card."""
    with stored.as_written(path / ADAPTER_CONFIG):
        config = without_head(read_adapter_config(path))
    if not config:
        card = read_card(path)
        if "method" not in card:
            raise UserError(f"neither {ADAPTER_CONFIG} nor {CARD} says what this adapter is", str(path), REMAKE)
        with stored.as_written(path / CARD):
            settings = available(METHOD_NAMES)[card["method"]["name"]]
            return settings.model_validate({**card["method"], "start_from": None})
    with stored.as_written(path / ADAPTER_CONFIG):
        for method in METHODS.values():
            if method.is_meant_by(config) and method.settings_of is not None:
                return method.settings_of(config)
    raise UserError(
        f"adapters of type {config['peft_type']} cannot be loaded in this version", str(path / ADAPTER_CONFIG)
    )


def read_classes(path: Path) -> Classes | None:
    """What an adapter's or a model's folder says its classifier tells apart; None of a language model.

    An adapter that PEFT wrote has no names for its classes: then they are numbered.
    """
    if (path / "config.json").is_file():
        config = models.load_config(ModelSection(base=path))
        return classifier.classes_of(config) if models.is_classifier(config) else None
    if labels := read_card(path).get("labels"):
        with stored.as_written(path / CARD):
            names = labels["id2label"]
            return Classes(tuple(str(names[str(i)]) for i in range(len(names))), labels["pad_token_id"])
    if not is_adapter(path) or read_adapter_config(path).get("task_type") != TASK:
        return None
    head = head_of(read_adapter_weights(path))
    return Classes(tuple(f"LABEL_{i}" for i in range(len(head))), None)


def read_adapter_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors by the names they have in the file."""
    file = weights_of(path)
    with telling_damage(file):
        tensors: dict[str, torch.Tensor] = load_file(file)
    return tensors


def weights_of(path: Path) -> Path:
    """The file of an adapter's weights; raises UserError where there is none, or only a pickle."""
    file = path / ADAPTER_WEIGHTS
    if not file.is_file():
        pickled = (path / "adapter_model.bin").exists()
        why = "only a pickle (adapter_model.bin), which could run code" if pickled else f"no {ADAPTER_WEIGHTS}"
        raise UserError(f"{why} in this adapter folder", str(path), "save it as safetensors")
    return file


@torch.no_grad()
def load_adapter(model: PreTrainedModel, path: Path) -> Loaded:
    """Put an adapter on its base, strictly: missing, unexpected and misshapen tensors are an error that lists them."""
    settings = read_settings(path)
    check_size(settings, path)
    method_of(settings.name, model).attach(model, settings)
    return load_weights(model, settings.name, path)


def check_size(settings: Any, path: Path) -> None:
    """What an adapter says of its size decides how much memory is taken for it: its own tensors must be as large."""
    with telling_damage(weights_of(path)), safe_open(weights_of(path), "pt") as file:
        longest = max((max(file.get_slice(name).get_shape(), default=0) for name in file.keys()), default=0)  # noqa: SIM118
    for key in SIZES:
        if getattr(settings, key, 0) > longest:
            what = f"this adapter says {key} {getattr(settings, key)}, and no tensor of its file is that large"
            raise UserError(what, str(path), REMAKE)


def load_weights(model: PreTrainedModel, method: str, path: Path) -> Loaded:
    """Put an adapter's tensors on a model that has its method attached."""
    tensors = read_adapter_weights(path)
    method_of(method, model).load_tensors(model, tensors)
    return Loaded(method, len(tensors))


def adapter_digest(path: Path) -> str:
    """What identifies an adapter: the sha256 of its weights."""
    return folder.sha256_file(weights_of(path))


def check_base(
    card: dict[str, Any],
    base_fingerprint: dict[str, str],
    digest: str,
    base_card: dict[str, Any],
    is_forced: bool = False,
) -> list[str]:
    """The base must be the one trained on, unless another is forced, and must not contain this adapter already.

    Returns the files that differ.
    """
    if digest in base_card.get("contains_adapters", []):
        raise UserError(f"this base already contains adapter {digest[:12]}", "base", "merge into the original base")
    changed = changed_base(card, base_fingerprint)
    if changed and not is_forced:
        hint = "use the very base this adapter was trained on (merge, eval and verify go on with --force)"
        raise UserError(f"base fingerprint differs: {', '.join(changed)}", "base", hint)
    return changed


def changed_base(card: dict[str, Any], base_fingerprint: dict[str, str]) -> list[str]:
    """The files of a base (or its commit) that are not those which a card records; none where it records no base."""
    trained_on = card.get("base")
    if trained_on is None:
        return []
    names = sorted(trained_on.keys() | base_fingerprint.keys())
    weights = [n for n in names if n.endswith((".safetensors", "config.json", ".py")) or n == "commit"]
    return [name for name in weights if trained_on.get(name) != base_fingerprint.get(name)]
