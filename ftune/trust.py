"""What lies in a model's folder and could do more than hold weights: refused before anything is loaded from it.

transformers asks for consent before it runs code, but on a terminal it may ask the person, it takes a class of its own
where it has one, whatever the folder says, and it reads shards wherever the index says they lie.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import cached_file

from ftune.errors import Problem, UserError
from ftune.recipe import ModelSection
from ftune.stored import REPAIR, is_inside, read_object

CONFIGURATIONS = ("config.json", "tokenizer_config.json", "generation_config.json")
INDEX = "model.safetensors.index.json"
CODE = "auto_map"
"""Under this key transformers looks for classes in files beside the weights."""
KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
"""Where a name with a slash is that of a repository, whose compiled code is loaded."""
MOST = {re.compile(r"^(n|num)_.*(layer|block)s?$"): 512, re.compile(r"^(n|num)_.*(expert|head)s?$"): 4096}
"""Of parts of a model. The largest that are published have 126 layers and some hundred experts."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def check_code(settings: ModelSection) -> None:
    """Raise UserError where code comes with the model, the tokenizer or their settings, unless the recipe wants it."""
    if settings.trust_remote_code:
        return
    problems = []
    for name in CONFIGURATIONS:
        path = find(settings, name)
        for told in () if path is None else named_code(read_object(path)):
            what = f"{name} wants code run that comes with the model: {told}"
            hint = f"take it out of {name} if transformers has the model itself; or set model.trust_remote_code: true"
            problems.append(Problem(what, f"model.base: {settings.base}", hint))
    if isinstance(settings.base, Path) and (settings.base / "custom_generate").is_dir():
        hint = "remove the folder, or set model.trust_remote_code: true"
        problems.append(Problem("code comes with the model: custom_generate/", f"model.base: {settings.base}", hint))
    if problems:
        raise UserError.collect(problems)


def named_code(document: Any) -> Iterator[str]:
    """The code that a configuration names, at any depth: a model inside a model has a configuration of its own."""
    if isinstance(document, dict):
        for key, value in document.items():
            if key == CODE and value:
                yield f"{CODE}: {', '.join(_leaves(value))}"
            elif key in KERNELS and (kernels := [text for text in _leaves(value) if "/" in text]):
                yield f"{key}: {kernels[0]}"
            else:
                yield from named_code(value)
    elif isinstance(document, list):
        for value in document:
            yield from named_code(value)


def check_values(config: Any) -> None:
    """Raise ValueError where a configuration that transformers took has another type than what ftune reads in it, or
    more layers or experts than a model can have: to build them would never end."""
    text, names = config.get_text_config(), config.architectures
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"config.json says architectures: {names!r}")
    for key in ("vocab_size", "hidden_size", "num_hidden_layers"):
        value = getattr(text, key, None)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"config.json says {key}: {value!r}")
    _check_parts(config.to_dict())


def _check_parts(document: Any) -> None:
    for key, value in document.items() if isinstance(document, dict) else ():
        _check_parts(value)
        if "drop" in str(key) and isinstance(value, int | float) and not 0 <= value <= 1:
            raise ValueError(f"config.json says {key}: {value}, which is no share")
        for counted, most in MOST.items():
            if counted.search(str(key)) and isinstance(value, int) and value > most:
                raise ValueError(f"config.json says {key}: {value:.4g}, and no model has more than {most:,}")


def _leaves(value: Any) -> list[str]:
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for part in value for leaf in _leaves(part)] if isinstance(value, list) else [str(value)]


def check_weights(settings: ModelSection) -> None:
    """Raise UserError for weights that are a pickle, that lie elsewhere, or that an adapter would be put on."""
    base, index = settings.base, find(settings, INDEX)
    if index is not None:
        shards(index)
    elif isinstance(base, Path) and not (base / "model.safetensors").is_file():
        pickles = sorted(file.name for file in base.iterdir() if file.suffix in PICKLES)
        if pickles:
            what = f"no safetensors here, only what may run code when it is read: {', '.join(pickles)}"
            raise UserError(what, f"model.base: {base}", "save the weights as safetensors")
    if isinstance(base, Path) and (base / "adapter_config.json").is_file():
        what = "an adapter lies in this model folder too, which transformers would put on top unasked"
        raise UserError(what, f"model.base: {base}", "keep adapters in folders of their own")


def shards(index: Path) -> dict[str, str]:
    """The file of each tensor, out of an index; raises UserError where one is no safetensors file beside it."""
    files = read_object(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise UserError("it does not say which tensor lies in which file", str(index), REPAIR)
    for name in files.values():
        if not isinstance(name, str) or not is_inside(name) or not name.endswith(".safetensors"):
            hint = "name safetensors files of its own folder"
            raise UserError(f"it names {name!r} as a file of weights", str(index), hint)
    return files


@contextmanager
def telling_damage(file: Path) -> Iterator[None]:
    """Around the reading of a safetensors file: what a damaged one leads to becomes a UserError."""
    try:
        yield
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"damaged file: {error}", str(file), "restore it, or make it again") from error


def find(settings: ModelSection, name: str) -> Path | None:
    """A file of the base: of a folder its own, of a hub id the cached one, fetched where it can be. None if none."""
    if isinstance(settings.base, Path):
        path = settings.base / name
        return path if path.is_file() else None
    return _of_hub(settings.base, settings.revision or "main", name)


@cache
def _of_hub(base: str, revision: str, name: str) -> Path | None:
    try:
        found = cached_file(
            base,
            name,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):  # what cannot be had is told by the loader
        return None
    return None if found is None else Path(found)
