"""What differs between runs: recipe keys, data and base by their contents, versions, machines."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ftune.quantities import format_count
from ftune.recipe.document import in_yaml
from ftune.recipe.loading import ABSENT, leaves_of
from ftune.report.finished import Finished

GROUPS = ("recipe", "data", "base", "versions", "machine")
"""The parts of what `differences` returns, but for `moved`, in the order they are told."""
ALWAYS_DIFFERENT = ("output.dir",)
FILES = ("data.train", "data.validation", "data.test", "evaluation.probe")
"""Recipe keys that name files of rows, which are compared by their contents."""
FIGURES = ("rows_in", "rows_used", "supervised_tokens", "duplicates", "contaminated")
MACHINE = ("device", "threads", "optimizer")
NO_FILES = ("off", "general")
DIGITS = 8
"""Of a sha256 that is shown."""
MOST_TOLD = 4

Row = dict[str, Any]
"""`name`, and `values`: one for each run, or ABSENT."""


def differences(runs: Sequence[Finished]) -> dict[str, list[Row]]:
    """By group the rows in which not all runs agree. `moved`: files under other paths with the same contents, which
    are no difference. What a run did not record is ABSENT."""
    contents = {key: [_files(run, key) for run in runs] for key in FILES}
    known = {key for key, found in contents.items() if all(file["sha256"] for files in found for file in files)}
    keys = [dict(leaves_of(run.recipe)) for run in runs]
    bases = [run.manifest.get("base") or {} for run in runs]
    is_base_known = all(bases) and not any("commit" in base for base in bases)

    def is_elsewhere(key: str, values: Sequence[Any]) -> bool:
        """A key that names what is compared by its contents; weights beside it still count."""
        if key == "model.base":
            return is_base_known
        named = next((name for name in known if key == name or key.startswith(f"{name}.")), None)
        return named is not None and len({_in_words(_without_paths(value)) for value in values}) == 1

    recipe = _rows(keys, [key for key in _names(keys) if key not in ALWAYS_DIFFERENT])
    data = [_row(key, found) for key, found in contents.items() if key in known]
    differing = [row for row in data if not _is_one([[f["sha256"] for f in files] for files in row["values"]])]
    moved = [row for row in recipe if is_elsewhere(row["name"], row["values"])]
    base = _rows(bases) + _rows([{"chat template": run.manifest.get("template")} for run in runs])
    return {
        "recipe": [row for row in recipe if row not in moved],
        "data": differing + _rows([_figures(run) for run in runs]),
        "base": base,
        "versions": _rows([run.manifest.get("versions") or {} for run in runs]),
        "machine": _rows([_machine(run) for run in runs]),
        "moved": [row for row in moved if not (base if row["name"] == "model.base" else _of(row, differing))],
    }


def _of(row: Row, others: Sequence[Row]) -> bool:
    return any(row["name"] == other["name"] or row["name"].startswith(f"{other['name']}.") for other in others)


def told(found: Mapping[str, Sequence[Row]]) -> str:
    """The differences in half a sentence, the recipe's first."""
    parts = [*map(_told, _telling(found["recipe"]))]
    for row in found["data"]:
        if row["name"] in FILES and not _of(row, found["recipe"]):
            parts.append(f"the content of {row['name']}")
    if not any(row["name"] in FILES for row in found["data"]):
        parts += [_told(row) for row in found["data"] if row["name"] == "rows_used"]
    if found["base"]:
        parts.append("the base")
    parts += [_told(row) for group in ("versions", "machine") for row in found[group]]
    if not parts:
        return "nothing that was recorded differs"
    more = len(parts) - MOST_TOLD
    if more > 1:
        return f"{', '.join(parts[:MOST_TOLD])} and {more} more differ"
    return f"{', '.join(parts)} differ{'s' * (len(parts) == 1)}"


def in_words(found: Mapping[str, Sequence[Row]]) -> list[tuple[str, list[str]]]:
    """Every row as people read it: its name, and the value of each run."""
    return [
        (str(row["name"]), ["none" if group == "data" and value == [] else shown(value) for value in row["values"]])
        for group in GROUPS
        for row in found[group]
    ]


def shown(value: Any) -> str:
    """A value of a row as people read it."""
    if isinstance(value, list) and value and all(isinstance(one, Mapping) and "sha256" in one for one in value):
        return ", ".join(f"{Path(file['path']).name} {(file['sha256'] or '?')[:DIGITS]}" for file in value)
    if value == ABSENT:
        return "–"
    if isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef"):
        return value[:DIGITS]
    if isinstance(value, int) and not isinstance(value, bool):
        return format_count(value) if value >= 10_000 else str(value)
    return in_yaml(value)


def _telling(rows: Sequence[Row]) -> list[Row]:
    """The method's name first, and without the keys that merely come with another method."""
    is_another = any(row["name"] == "method.name" for row in rows)
    rest = [row for row in rows if not (is_another and row["name"].startswith("method.") and _comes_with(row))]
    return sorted(rest, key=lambda row: row["name"] != "method.name")


def _comes_with(row: Row) -> bool:
    return ABSENT in row["values"] and _is_one([value for value in row["values"] if value != ABSENT])


def _told(row: Row) -> str:
    return f"{row['name']} {' → '.join(map(shown, row['values']))}"


def _names(found: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for one in found for name in one))


def _row(name: str, values: Sequence[Any]) -> Row:
    return {"name": name, "values": list(values)}


def _rows(found: Sequence[Mapping[str, Any]], names: Iterable[str] | None = None) -> list[Row]:
    rows = [_row(name, [one.get(name, ABSENT) for one in found]) for name in names or _names(found)]
    return [row for row in rows if not _is_one(row["values"])]


def _is_one(values: Sequence[Any]) -> bool:
    return len({_in_words(value) for value in values}) == 1


def _in_words(value: Any) -> str:
    """1, 1.0 and true are three values, as in a recipe."""
    return repr(value)


def _files(run: Finished, key: str) -> list[dict[str, Any]]:
    """The files that a recipe key names, with the sha256 of their contents; None where it was not recorded."""
    section, _, name = key.partition(".")
    digests = run.manifest.get("data") or {}
    value = (run.recipe.get(section) or {}).get(name)
    return [{"path": path, "sha256": digests.get(path)} for path in _paths(value) if path not in NO_FILES]


def _paths(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _paths(one)
    elif isinstance(value, Mapping):
        yield from _paths(value.get("path", value.get("hub")))


def _without_paths(value: Any) -> Any:
    if isinstance(value, str):
        return value if value in NO_FILES else "path"
    if isinstance(value, list):
        return [_without_paths(one) for one in value]
    if isinstance(value, Mapping):
        return {**value, "path": "path"} if "path" in value else dict(value)
    return value


def _figures(run: Finished) -> dict[str, Any]:
    data = run.part("data")
    figures = {name: data[name] for name in FIGURES if data.get(name) is not None}
    return figures | {f"dropped, {reason}": count for reason, count in (data.get("dropped") or {}).items() if count}


def _machine(run: Finished) -> dict[str, Any]:
    found = {name: run.manifest[name] for name in MACHINE if name in run.manifest}
    if not run.recipe and "seed" in run.manifest:
        found["seed"] = run.manifest["seed"]
    return found
