"""The architecture, as a list: each file may import only what stands above it here."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ftune

PACKAGE = Path(ftune.__file__).parent

# Lowest first: modules and packages of ftune/. Inside a package any order without a circle is fine.
LAYERS = [
    "errors",
    "signals",
    "settings",
    "recipe",
    "schedule",
    "stored",
    "folder",
    "quantities",
    "statistics",
    "console",
    "lock",
    "trackers",
    "chat",
    "data",
    "clean",
    "batches",
    "last_layer",
    "few_sizes",
    "attention_on_gpu",
    "attention",
    "loss",
    "quantized",
    "trust",
    "model",
    "comparing",
    "classifier",
    "methods",
    "objectives",
    "engine",
    "checkpoint",
    "optimizers",
    "train",
    "features",
    "activations",
    "plan",
    "artifacts",
    "predict",
    "evaluate",
    "probe",
    "report",
    "run",
    "process",
    "cli",
    "__main__",
]
WITHOUT_TORCH = ["errors", "signals", "settings", "recipe", "schedule", "stored", "folder", "lock", "trackers"]
HEAVY = {"torch", "transformers", "accelerate", "datasets", "bitsandbytes", "peft", "matplotlib"}
LONGEST_FILE = 320
LONGEST_FUNCTION = 80

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def label(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that a file imports anywhere, inside functions too; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_on_import(tree: ast.Module) -> Iterator[str]:
    """The packages that merely importing the file loads: those outside functions and TYPE_CHECKING."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (name.split(".")[0] for name in imported_names(node))
        waiting.extend(ast.iter_child_nodes(node))


def own_layers(path: Path) -> set[str]:
    """The other layers of ftune that a file imports; the version in the package root is anyone's to read."""
    parts = [name.split(".") for name in imported_names(TREES[path])]
    return {p[1] for p in parts if p[0] == "ftune" and len(p) > 1 and p[1] != "__version__"} - {layer_of(path)}


@pytest.mark.parametrize("path", FILES, ids=label)
def test_a_file_imports_only_what_is_above_it_in_the_list(path: Path) -> None:
    assert layer_of(path) in LAYERS, f"{label(path)} has no place in the architecture: add it to LAYERS"
    place = LAYERS.index(layer_of(path))
    for layer in own_layers(path):
        assert layer in LAYERS, f"{label(path)} imports ftune.{layer}, which has no place in the architecture"
        assert LAYERS.index(layer) < place, f"{label(path)} imports ftune.{layer}, which comes later"


def test_no_package_has_an_import_circle_inside() -> None:
    modules = {".".join(["ftune", *path.relative_to(PACKAGE).with_suffix("").parts]): path for path in FILES}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    needs = {
        name: {
            longest
            for imported in imported_names(TREES[path])
            if (longest := next((m for m in (imported, imported.rpartition(".")[0]) if m in modules), None))
        }
        - {name}
        for name, path in modules.items()
    }
    while free := [name for name, wanted in needs.items() if not wanted]:
        for name in free:
            del needs[name]
        needs = {name: wanted - set(free) for name, wanted in needs.items()}
    assert not needs, f"these import each other: {sorted(needs)}"


def test_nobody_imports_from_the_package_root() -> None:
    for path in FILES:
        assert "ftune" not in set(imported_names(TREES[path])), f"{label(path)}: import the module that you need"


@pytest.mark.parametrize("path", FILES, ids=label)
def test_only_the_console_imports_rich(path: Path) -> None:
    if layer_of(path) != "console":
        assert not {name for name in imported_names(TREES[path]) if name.split(".")[0] == "rich"}


@pytest.mark.parametrize("path", [p for p in FILES if layer_of(p) in WITHOUT_TORCH], ids=label)
def test_what_answers_at_once_imports_nothing_heavy(path: Path) -> None:
    assert not HEAVY & set(imported_on_import(TREES[path]))


@pytest.mark.parametrize("path", FILES, ids=label)
def test_a_file_stays_readable(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"{label(path)} has {lines} lines: make it a package of the same import name"
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{label(path)}:{node.lineno} {node.name} has {length} lines"


def test_no_file_is_a_drawer() -> None:
    names = {part for path in FILES for part in path.relative_to(PACKAGE).with_suffix("").parts}
    assert not names & {"utils", "util", "common", "helpers", "helper", "misc"}
