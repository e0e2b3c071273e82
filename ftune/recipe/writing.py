"""The schema as people and programs read it: JSON Schema, the page of all keys, commented starter recipes."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from ftune.errors import UserError
from ftune.recipe.document import SHORT_FORMS, in_yaml
from ftune.recipe.schema import DataFile, Recipe
from ftune.settings import METHOD_NAMES, OBJECTIVE_NAMES, available

TASKS: Mapping[str, Mapping[str, Any]] = {
    "chat": {"data.format": "messages", "evaluation.metric": "exact_match", "evaluation.max_new_tokens": 128},
    "completion": {
        "data.format": "prompt_completion",
        "evaluation.metric": "exact_match",
        "evaluation.max_new_tokens": 128,
    },
    "text": {"data.format": "text", "evaluation.metric": "loss", "evaluation.few_shot": 0},
    "classification": {
        "objective.name": "classification",
        "data.format": "labelled",
        "evaluation.metric": "accuracy",
    },
}
STARTER: Mapping[str, Any] = {
    "model.base": "./base",
    "data.train": "train.jsonl",
    "data.max_length": 1024,
    "training.epochs": 3,
    "training.batch_size": 16,
    "output.dir": "runs/{recipe}",
}
EXAMPLES: Mapping[str, Any] = {"data.test": "test.jsonl", "data.validation": "validation.jsonl"}
FEW_KEYS = 5
"""So many of a method's keys are set in a starter; the rest stands there as comments."""

INTRODUCTION = """\
# The recipe

Every key that a recipe may have. This page is made from the schema (`ftune/recipe/schema.py`,
`ftune/settings.py`); `ftune schema` prints the same as JSON Schema, and `ftune init` writes a recipe to start
from.

- Only `model`, `method` and `data.train` must be given. `model: ./base`, `method: lora` and `objective: sft`
  are short forms.
- Relative paths are relative to the recipe's folder. `model.base` is a folder when one is there or when it is
  written like a path (`./base`, `/models/base`); else it is a hub id.
- Any key can be set on the command line: `ftune train recipe.yaml method.rank=8`.
- YAML is read as YAML 1.2 reads it: `1e-4` is a number; `no`, `on`, `off`, `012` and `1_000` are text.
  Duplicate keys, anchors and object tags are refused.
"""


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe file, short forms included; editors complete and check recipes with it."""
    schema = Recipe.model_json_schema()
    tables = {"method": list(available(METHOD_NAMES)), "objective": list(available(OBJECTIVE_NAMES))}
    for section in SHORT_FORMS:
        short = {"type": "string", "enum": tables[section]} if section in tables else {"type": "string"}
        long = schema["properties"][section]
        kept = {key: long.pop(key) for key in ("description", "default") if key in long}
        schema["properties"][section] = {"anyOf": [short, long], **kept}
    # What a validator fills in need not be written.
    schema["required"] = ["model", "method", "data"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "ftune recipe"}


def _sections() -> Iterator[tuple[str, str, type[BaseModel]]]:
    """Heading, key and model of each part of a recipe; a method is a part of its own."""
    for key, field in Recipe.model_fields.items():
        if key == "method":
            yield from ((f"method: {name}", key, model) for name, model in available(METHOD_NAMES).items())
        elif key == "objective":
            yield from ((f"objective: {name}", key, model) for name, model in available(OBJECTIVE_NAMES).items())
        else:
            assert isinstance(field.annotation, type)
            yield key, key, field.annotation
        if key == "data":
            yield "data.train, each of a list", "data.train[]", DataFile


def documentation() -> str:
    """Markdown with a table of every key: values, default, description."""
    lines = [INTRODUCTION]
    for heading, section, model in _sections():
        lines += [f"## {heading}\n", "| key | values | default | |", "|---|---|---|---|"]
        schema = model.model_json_schema()
        for key, facts in schema["properties"].items():
            name = f"{section}.{key}"
            cells = [
                f"`{name}`",
                " or ".join(_kinds(facts, schema)),
                _default(name, facts, model),
                facts["description"],
            ]
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


def _default(name: str, facts: dict[str, Any], model: type[BaseModel]) -> str:
    return f"`{in_yaml(facts['default'])}`" if "default" in facts else "must be given"


def _kinds(facts: dict[str, Any], schema: dict[str, Any]) -> Iterator[str]:
    """What a value may be, out of its JSON Schema: enumerated values, or a kind in words with bounds."""
    if "$ref" in facts:
        target = schema["$defs"][facts["$ref"].rpartition("/")[2]]
        yield "`{" + ", ".join(target["properties"]) + "}`"
    elif "anyOf" in facts:
        for member in facts["anyOf"]:
            yield from _kinds(member, schema)
    elif "enum" in facts or "const" in facts:
        yield from (f"`{in_yaml(value)}`" for value in facts.get("enum") or [facts["const"]])
    elif facts["type"] == "array":
        yield f"list of {' or '.join(_kinds(facts['items'], schema))}"
    elif facts["type"] == "object":
        yield f"`{{text: {next(_kinds(facts['additionalProperties'], schema))}}}`"
    elif facts["type"] == "boolean":
        yield from ("`true`", "`false`")
    elif facts["type"] == "null":
        yield "`null`"
    elif facts["type"] == "string":
        yield ("path" if facts.get("format") == "path" else "`file.py:function`" if "pattern" in facts else "text")
    else:
        bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
        limits = [f"{sign} {facts[bound]}" for bound, sign in bounds.items() if bound in facts]
        yield " ".join(["whole number" if facts["type"] == "integer" else "number", " and ".join(limits)]).strip()


def starter(method: str, task: str) -> str:
    """A recipe to start from, every key explained; UserError for an unknown method or task."""
    settings = available(METHOD_NAMES).get(method)
    if settings is None:
        raise UserError(
            f"no method '{method}' in this version", "--method", "use " + " or ".join(available(METHOD_NAMES))
        )
    if task not in TASKS:
        raise UserError(f"no task '{task}'", "--task", "use " + " or ".join(TASKS))
    shown = {**STARTER, **TASKS[task]}
    shown |= {f"{s}.{key}": v for s, values in settings.recipe_defaults.items() for key, v in values.items()}
    shown |= {f"method.{key}": field.default for key, field in list(settings.model_fields.items())[:FEW_KEYS]}
    lines = [
        f"# A recipe of ftune: {method}, {task}. Check it with `ftune check`, run it with `ftune train`.",
        "",
    ]
    for _, section, model in _sections():
        if section == "data.train[]" or (section == "method" and model is not settings):
            continue
        if section == "objective" and model.model_fields["name"].default != shown.get("objective.name"):
            continue
        lines.append(f"{section}:" if any(key.startswith(f"{section}.") for key in shown) else f"# {section}:")
        lines += _starter_lines(section, model, shown)
    return "\n".join(lines) + "\n"


def _starter_lines(section: str, model: type[BaseModel], shown: Mapping[str, Any]) -> Iterator[str]:
    """One line a key: set when shown, else commented out at its default."""
    for key, field in model.model_fields.items():
        name = f"{section}.{key}"
        value = shown[name] if name in shown else EXAMPLES.get(name, field.get_default(call_default_factory=True))
        text = in_yaml(list(value) if isinstance(value, tuple) else value)
        line = f"{'  ' if name in shown else '  # '}{key}: {text}"
        yield f"{line:<32} # {field.description}"
