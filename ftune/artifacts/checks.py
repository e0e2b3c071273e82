"""What must hold of a folder besides its logits: whole, in the base's dtype, tied as it was, tokenizer and stops."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from ftune import chat, trust
from ftune import model as models
from ftune.artifacts import companions
from ftune.errors import RunError, UserError
from ftune.recipe import ModelSection

ROLES = {
    "configuration": ("config.json",),
    "weights": ("model.safetensors", trust.INDEX),
    "tokenizer": ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model"),
    "tokenizer configuration": ("tokenizer_config.json",),
    "generation settings": (companions.GENERATION,),
    "image or audio settings": companions.PROCESSORS,
}
"""What a model folder's files are for, whatever they are called."""
REQUIRED = frozenset(("configuration", "weights", "tokenizer", "tokenizer configuration"))
OF_AN_ADAPTER = re.compile(r"lora_|vera_|ia3_|base_layer|bias_change|prompt_embeddings|base_model\.model\.")
"""Names that no plain model has."""
NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
}
"""safetensors' own, of the dtypes that a base can be stored in."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, whether it held, and what was seen."""

    name: str
    passed: bool
    told: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Expected:
    """What a folder must agree with; None where nobody knows it, so that it is not checked."""

    tokenizer: dict[str, Any] | None = None
    """The identity of the one trained with."""
    base: Path | None = None
    """The base's folder, for the files that it has."""
    dtype: torch.dtype | None = None


def require(checks: Sequence[Check], output: Path) -> None:
    """Raise RunError that tells every check that did not hold."""
    if failed := [f"{check.name}: {check.told}" for check in checks if not check.passed]:
        raise RunError("; ".join(failed), str(output), "nothing was written; serve the adapter itself")


def of_files(path: Path, expected: Expected) -> list[Check]:
    """A whole model's folder, before anything is loaded from it."""
    dtypes, is_classifier = stored_dtypes(path), models.is_classifier(models.load_config(ModelSection(base=path)))
    found = [_files(path, is_classifier, expected, dtypes)]
    if expected.dtype is not None:
        found.append(_dtype(path, expected.dtype, dtypes))
    return found + of_companions(path, expected.tokenizer, is_classifier)


def of_ties(path: Path, model: PreTrainedModel, is_tied: bool | None) -> list[Check]:
    """Head and embeddings of a model that was loaded from the folder; nothing of a classifier, which has its own head.

    One tensor or two, after loading, in the configuration and in the files alike.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        return []
    loaded, dtypes = models.is_tied(model), stored_dtypes(path)
    names = [f"{name}.weight" for name, module in model.named_modules() if module is head or module is embeddings]
    wrong = []
    if is_tied is not None and loaded != is_tied:
        wrong.append(f"they load as {_count(loaded)}, but were {_count(is_tied)} when trained")
    if bool(getattr(model.config, "tie_word_embeddings", False)) != loaded:
        wrong.append(f"they load as {_count(loaded)}, and config.json says otherwise")
    if loaded and dtypes.keys() >= set(names) and not torch.equal(*(_tensor(path, name) for name in names)):
        wrong.append("they are one tensor, but the file holds two that differ")
    told = f"head and embeddings are {_count(loaded)}" + (", as trained" if is_tied is not None else "")
    return [Check("tied_embeddings", not wrong, "head and embeddings: " + "; ".join(wrong) if wrong else told)]


def of_companions(path: Path, trained_with: dict[str, Any] | None, is_classifier: bool) -> list[Check]:
    """What lies beside an adapter's or a model's weights; nothing where there is no tokenizer (PEFT writes none)."""
    if not (path / "tokenizer_config.json").is_file():
        if trained_with is None:
            return []
        return [Check("tokenizer", False, "there is none in this folder any more")]
    tokenizer = models.load_tokenizer(ModelSection(base=path))
    found = [] if trained_with is None else _tokenizer(companions.identity(tokenizer), trained_with)
    if trained_with is not None and not is_classifier:
        found.append(_stops(path, tokenizer))
    return found


def stored_dtypes(path: Path) -> dict[str, str]:
    """The dtype of every tensor in a model folder, by name, from the files' headers; raises UserError without them."""
    shards = sorted(set(_shards(path).values())) or [ROLES["weights"][0]]
    if missing := [name for name in shards if not (path / name).is_file()]:
        raise UserError(f"weights are missing: {', '.join(missing)}", str(path), "restore them, or merge again")
    found: dict[str, str] = {}
    for name in shards:
        with trust.telling_damage(path / name), safe_open(path / name, "pt") as file:
            found |= {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    return found


def _shards(path: Path) -> dict[str, str]:
    """The file of each tensor, out of the index; empty where there is none."""
    index = path / trust.INDEX
    return trust.shards(index) if index.is_file() else {}


def _tensor(path: Path, name: str) -> torch.Tensor:
    shard = _shards(path).get(name, ROLES["weights"][0])
    with safe_open(path / shard, "pt") as file:
        found: torch.Tensor = file.get_tensor(name)
    return found


def roles_of(path: Path) -> set[str]:
    return {role for role, names in ROLES.items() if any((path / name).is_file() for name in names)}


def _files(path: Path, is_classifier: bool, expected: Expected, dtypes: dict[str, str]) -> Check:
    required = REQUIRED | (roles_of(expected.base) if expected.base is not None else set())
    if is_classifier:
        required -= {"generation settings"}
    wrong = [f"no {role}" for role in sorted(required - roles_of(path))]
    wrong += [f"the index lists {name}, which no file holds" for name in sorted(_shards(path).keys() - dtypes.keys())]
    if (path / "adapter_config.json").is_file():
        wrong.append("an adapter lies in it too, which transformers would put on top")
    if foreign := sorted(name for name in dtypes if OF_AN_ADAPTER.search(name)):
        wrong.append(f"{foreign[0]} belongs to an adapter, not to a plain model")
    return Check("files", not wrong, "; ".join(wrong) or f"complete: {len(dtypes)} tensors and what belongs to them")


def _dtype(path: Path, dtype: torch.dtype, dtypes: dict[str, str]) -> Check:
    """Of nearly all weights, and in the configuration; a base may hold single tensors in another."""
    wanted, name = NAMES.get(dtype, ""), str(dtype).removeprefix("torch.")
    stored = Counter(dtypes.values()).most_common(1)[0][0]
    told = models.stored_dtype(models.load_config(ModelSection(base=path)))
    if stored == wanted and told == dtype:
        return Check("dtype", True, f"{name}, as the base's")
    names = f"the weights are {stored} and config.json says {str(told).removeprefix('torch.')}"
    return Check("dtype", False, f"{names}, but the base is {name}")


def _count(is_tied: bool) -> str:
    return "one tensor" if is_tied else "two tensors"


def _tokenizer(found: dict[str, Any], trained: dict[str, Any]) -> list[Check]:
    words = {"vocabulary": "vocabulary", "special_tokens": "special tokens", "encodings": "encoding of texts"}
    differing = [word for key, word in words.items() if key in trained and found[key] != trained[key]]
    told = f"another {', another '.join(differing)} than was trained with" if differing else "the one trained with"
    checks = [Check("tokenizer", not differing, told)]
    if "chat_template" in trained:
        is_same = found["chat_template"] == trained["chat_template"]
        what = "the one trained with" if found["chat_template"] else "none, as in training"
        checks.append(Check("chat_template", is_same, what if is_same else "another than was trained with"))
    return checks


def _stops(path: Path, tokenizer: Any) -> Check:
    wanted, found = chat.end_of_turn_ids(tokenizer), companions.stops_of(path)
    if found is None:
        return Check("stops", False, f"no {companions.GENERATION}, so nothing says where an answer ends")
    if missing := [token_id for token_id in wanted if token_id not in found]:
        names = ", ".join(f"{tokenizer.convert_ids_to_tokens(i)} ({i})" for i in missing)
        return Check("stops", False, f"{companions.GENERATION} does not name {names}, with which a trained answer ends")
    if not wanted:
        return Check("stops", True, "the tokenizer has no token that ends an answer")
    names = " or ".join(str(tokenizer.convert_ids_to_tokens(i)) for i in wanted)
    return Check("stops", True, f"an answer ends at {names}")
