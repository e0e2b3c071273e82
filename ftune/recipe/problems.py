"""What pydantic found wrong, in a user's words: the key, its value, what it may be, the nearest right key."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from itertools import islice
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ftune.recipe.document import Document, KeyPath, dotted, in_yaml
from ftune.recipe.schema import Recipe
from ftune.settings import METHOD_NAMES, OBJECTIVE_NAMES, Entry, available

# What other tools call it.
ELSEWHERE = {
    "adapter": "method.name",
    "base_model": "model.base",
    "cutoff_len": "data.max_length",
    "dataset": "data.train",
    "load_in_4bit": "model.quantization",
    "load_in_8bit": "model.quantization",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "lora_r": "method.rank",
    "lr": "training.learning_rate",
    "lr_scheduler_type": "training.schedule",
    "micro_batch_size": "training.micro_batch_tokens",
    "model_name_or_path": "model.base",
    "num_train_epochs": "training.epochs",
    "output_dir": "output.dir",
    "per_device_train_batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.batch_size",
    "r": "method.rank",
    "save_steps": "training.checkpoint_every",
    "sequence_len": "data.max_length",
    "use_rslora": "method.rank_stabilized",
    "warmup_ratio": "training.warmup",
}
MOST = 500
"""So many wrong keys are looked into: a user is told fewer."""
TABLES: Mapping[str, Mapping[str, Entry[Any]]] = {"method": METHOD_NAMES, "objective": OBJECTIVE_NAMES}
EXPECTED = {
    "literal_error": "{expected}",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text",
    "string_pattern_mismatch": "file.py:function",
    "tuple_type": "a list",
    "too_short": "a list of at least one",
    "dict_type": "keys with values",
    "model_type": "keys with values",
    "model_attributes_type": "keys with values",
}


def tell(error: ValidationError, document: Document, skip: set[KeyPath]) -> None:
    """Add what a ValidationError says to the document's findings, but for keys at or below those to skip.

    A value that fits no member of a union gives one error for each member; they become one sentence. Where an
    error lies deeper, the user meant the member it belongs to, and the other members' errors are left out.
    """
    by_path: dict[KeyPath, list[Any]] = {}
    for details in error.errors(include_url=False):
        by_path.setdefault(_key_path(details, document), []).append(details)
    around = {path[:length] for path in by_path for length in range(len(path))}
    for path, several in islice(by_path.items(), MOST):
        if path not in around and not any(path[:length] in skip for length in range(len(path) + 1)):
            document.tell(path, *_sentence(path, several, document))


def _key_path(details: Any, document: Document) -> KeyPath:
    """pydantic's location without the names it gives to members of unions."""
    path: KeyPath = ()
    parts: tuple[str | int, ...] = details["loc"]
    for depth, part in enumerate(parts, 1):
        was_written = (*path, part) in document.places
        is_left_out = depth == len(parts) and (details["type"] == "missing" or part in _fields(path))
        if was_written or is_left_out:
            path = (*path, part)
    return path


def _sentence(path: KeyPath, several: list[Any], document: Document) -> tuple[str, str]:
    details = several[0]
    key = dotted(path)
    match details["type"]:
        case "missing":
            description = _description(path)
            return f'missing key "{key}"' + (f": {description}" if description else ""), ""
        case "extra_forbidden":
            return _unknown_key(path, document), ""
        case "union_tag_not_found":
            return f'missing key "{key}.name": one of {", ".join(available(TABLES[key]))}', ""
        case "union_tag_invalid":
            return _unknown_name(key, str(details["ctx"]["tag"]))
        case "ftune":
            return details["msg"], ""
    if details["type"] in ("model_type", "model_attributes_type") and details["input"] is None:
        return f"`{key}` is empty", "write keys below it, or remove it"
    expected = dict.fromkeys(
        EXPECTED[one["type"]].format(**one.get("ctx", {})) if one["type"] in EXPECTED else one["msg"] for one in several
    )
    words = [word for one in several if one["type"] == "literal_error" for word in _words(one)]
    value = document.value(path) if path in document.places else details["input"]
    return f"`{key}: {in_yaml(value)}` must be {' or '.join(expected)}", _closest(str(value), words)


def _closest(word: str, words: list[str]) -> str:
    return next(iter(get_close_matches(word, words, 1)), "")


def _words(details: Any) -> list[str]:
    return [word for word in str(details["ctx"]["expected"]).split("'") if word.strip(" ,") not in ("", "or")]


def _unknown_name(key: str, name: str) -> tuple[str, str]:
    names = ", ".join(available(TABLES[key]))
    if name in TABLES[key]:
        return f"{key} '{name}' is not available in this version; available: {names}", ""
    return f"unknown {key} '{name}'; available: {names}", _closest(name, list(TABLES[key]))


def _unknown_key(path: KeyPath, document: Document) -> str:
    key, section = str(path[-1]), dotted(path[:-1])
    siblings = list(_fields(path[:-1], document))
    right = _nearest(key.replace("-", "_").lower(), siblings)
    if right == f"{section}.{key}":
        having = [name for name, settings in available(METHOD_NAMES).items() if key in settings.model_fields]
        return f'unknown key "{key}": it is a key of {", ".join(having)}'
    if right is None:
        return f'unknown key "{key}"; the keys here are {", ".join(siblings)}'
    return f'unknown key "{key}"; did you mean "{right.removeprefix(section + ".")}"?'


def _nearest(name: str, siblings: list[str]) -> str | None:
    """The key that was meant: one that stands here, the same key at another place, or one spelt nearly so."""
    elsewhere = {key.rpartition(".")[2]: key for key in every_key()} | ELSEWHERE
    if name in siblings:
        return name
    if name in elsewhere:
        return elsewhere[name]
    if close := get_close_matches(name, siblings, 1):
        return close[0]
    close = get_close_matches(name, elsewhere, 1)
    return elsewhere[close[0]] if close else None


def _fields(path: KeyPath, document: Document | None = None) -> dict[str, Any]:
    """The keys that may stand in a mapping of the recipe, with their fields."""
    model: type[BaseModel] | None = Recipe
    for depth, part in enumerate(path):
        if depth == 0 and part in TABLES:
            written = document.value(path[:1]) if document else None
            name = written.get("name") if isinstance(written, dict) else None
            model = available(TABLES[str(part)]).get(str(name))
        elif model is not None and isinstance(part, str) and part in model.model_fields:
            model = next(_models_in(model.model_fields[part].annotation), None)
    return dict(model.model_fields) if model else {}


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def every_key() -> dict[str, Any]:
    """Every key of the recipe by its dotted name, of all available methods and objectives, with its field."""
    keys: dict[str, Any] = {}
    for section, field in Recipe.model_fields.items():
        models = list(available(TABLES[section]).values()) if section in TABLES else _models_in(field.annotation)
        for model in models:
            keys |= {f"{section}.{name}": field for name, field in model.model_fields.items()}
    return keys


def _description(path: KeyPath) -> str:
    field = _fields(path[:-1]).get(str(path[-1]))
    return str(field.description) if field and field.description else ""
