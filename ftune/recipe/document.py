"""YAML as recipes use it: plain data, the scalars of YAML 1.2, and for every key the line it stands on."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from ftune.errors import Problem, UserError
from ftune.settings import NUMBER

KeyPath: TypeAlias = tuple[str | int, ...]
NULL = re.compile(r"~|null|Null|NULL|")
BOOLEAN = re.compile(r"true|True|TRUE|false|False|FALSE")
# Longer ones are read as floats, and those with a leading zero (012) stay text.
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
FLOAT = re.compile(rf"{NUMBER.pattern}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
TAG = "tag:yaml.org,2002:"
MAX_BYTES = 2**18
"""Of a recipe: the largest of ours have 2,000, and to read a million takes minutes."""
NO_SHARING = "anchors, aliases (*name) and merge keys (<<) are not read in a recipe"

# `model: ./base` is `model: {base: ./base}`.
SHORT_FORMS = {"model": "base", "method": "name", "objective": "name"}


class _CoreLoader(yaml.SafeLoader):
    """PyYAML with the scalars of YAML 1.2. Only its node tree is used: nothing is ever constructed."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=NO_SHARING, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


for _name, _pattern, _first in (
    ("null", NULL, "~nN"),
    ("bool", BOOLEAN, "tTfF"),
    ("int", INTEGER, "-+0123456789"),
    ("float", FLOAT, "-+.0123456789"),
    ("merge", re.compile("<<"), "<"),
):
    _CoreLoader.add_implicit_resolver(TAG + _name, re.compile(rf"(?:{_pattern.pattern})\Z"), [*_first, ""])


class _CoreDumper(yaml.SafeDumper):
    """Writes what `_CoreLoader` reads, with no more quotes than that needs."""

    yaml_implicit_resolvers = _CoreLoader.yaml_implicit_resolvers


@dataclass(frozen=True)
class Place:
    """Where a value was written: a line of the recipe file, or the override numbered `order` (line 0)."""

    source: str
    line: int
    order: int = 0

    def where(self, path: KeyPath) -> str:
        if not self.line:
            return self.source
        return f"{self.source}:{self.line} ({dotted(path)})" if path else f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Finding:
    """Something wrong with a key; in the order of file, then overrides, they make the error a user reads."""

    path: KeyPath
    place: Place
    what: str
    hint: str = ""

    @property
    def order(self) -> tuple[int, int]:
        return self.place.order, self.place.line

    def problem(self) -> Problem:
        return Problem(self.what, self.place.where(self.path), self.hint)


@dataclass
class Document:
    """A tree of plain data, the place of each of its keys, and what was wrong in reading it."""

    data: dict[str | int, Any]
    places: dict[KeyPath, Place]
    findings: list[Finding] = field(default_factory=list)
    unread: set[KeyPath] = field(default_factory=set)
    """Keys whose value could not be read, so that nothing else can be said about it."""

    def place(self, path: KeyPath) -> Place:
        """The place of a key, or of the nearest one around it that was written."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places[path]

    def tell(self, path: KeyPath, what: str, hint: str = "", place: Place | None = None) -> None:
        self.findings.append(Finding(path, place or self.place(path), what, hint))

    def value(self, path: KeyPath) -> Any:
        """What stands at a key path that was written."""
        node: Any = self.data
        for part in path:
            node = node[part]
        return node


def dotted(path: KeyPath) -> str:
    """`data.train[0].path`, as people write it."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def read(path: Path) -> Document:
    """The document of a recipe file; raises UserError when there is none to speak of."""
    source = str(path)
    try:
        content = path.read_bytes()
        if len(content) > MAX_BYTES:
            raise UserError(
                f"a recipe of {len(content):,} bytes; {MAX_BYTES:,} are enough", source, "is this a recipe?"
            )
        text = content.decode("utf-8")
    except FileNotFoundError as error:
        raise UserError("no such recipe", source, "`ftune init` writes one") from error
    except OSError as error:
        raise UserError(f"the recipe cannot be read: {error.strerror}", source) from error
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text, from byte {error.start} on", source) from error
    node = _compose(text, source)
    document = Document({}, {(): Place(source, 1)})
    if node is None:
        raise UserError("the recipe is empty", source, "`ftune init` writes one to start from")
    if not isinstance(node, yaml.MappingNode):
        raise UserError("a recipe is a mapping of keys to values", f"{source}:{node.start_mark.line + 1}")
    document.data = _value(node, (), document, Place(source, 1))
    return document


def read_value(text: str, source: str) -> Any:
    """A value written as in a recipe, on a command line; raises UserError with all that is wrong with it."""
    document = Document({}, {(): Place(source, 0)})
    node = _compose(text, source)
    value = None if node is None else _value(node, (), document, Place(source, 0))
    if document.findings:
        raise UserError.collect(finding.problem() for finding in document.findings)
    return value


def override(document: Document, text: str, order: int) -> None:
    """Set the key that `a.b=c` names, in place; what it replaces is forgotten, with what was wrong there."""
    place = Place(f"override {text}", 0, order)
    name, equals, value = text.partition("=")
    path: KeyPath = tuple(name.strip().split("."))
    if not equals or not all(path):
        return document.tell((), "an override is KEY=VALUE", "for example method.rank=8", place)
    try:
        node = _compose(value, place.source)
    except UserError as error:
        return document.tell(path, error.problems[0].what, "quote the value as YAML wants it", place)
    parent: dict[str | int, Any] = document.data
    for depth, part in enumerate(path[:-1], 1):
        child = _as_mapping(document, parent.get(part), path[:depth], place)
        if child is None:
            return document.tell(path, f"`{dotted(path[:depth])}` is no mapping, it has no keys", "", place)
        parent[part] = parent = child
    document.findings = [finding for finding in document.findings if finding.path[: len(path)] != path]
    document.unread = {key for key in document.unread if key[: len(path)] != path}
    document.places = {key: old for key, old in document.places.items() if key[: len(path)] != path}
    document.places[path] = place
    parent[path[-1]] = None if node is None else _value(node, path, document, place)


def _as_mapping(document: Document, value: Any, path: KeyPath, place: Place) -> dict[str | int, Any] | None:
    """The mapping an override goes into: as written, from a short form, or new. None if it cannot be one."""
    if isinstance(value, str) and path[0] in SHORT_FORMS and len(path) == 1:
        key = SHORT_FORMS[path[0]]
        document.places[*path, key] = document.places[path]
        return {key: value}
    if value is None:
        document.places[path] = place
        return {}
    return value if isinstance(value, dict) else None


def _compose(text: str, source: str) -> yaml.Node | None:
    try:
        return _CoreLoader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        context = error.context or ""
        if error.problem == NO_SHARING or "alias" in context:
            raise UserError(NO_SHARING, where, "write it out; quote a text that begins with *") from error
        if "expected a single document" in context:
            raise UserError("a recipe is one YAML document", where, "remove the --- line") from error
        raise UserError(f"not valid YAML: {context}{context and ', '}{error.problem}", where) from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: escapes such as "\UFFFFFFFF"
        raise UserError(f"not valid YAML: {str(error).splitlines()[0]}", source) from error
    except RecursionError as error:
        raise UserError("nested too deeply", source) from error


def _value(node: yaml.Node, path: KeyPath, document: Document, place: Place) -> Any:
    """A node as plain data; keys are always text. Other tags than plain data has are told, never followed."""
    if isinstance(node, yaml.MappingNode) and node.tag == TAG + "map":
        return _mapping(node, path, document, place)
    if isinstance(node, yaml.SequenceNode) and node.tag == TAG + "seq":
        items = []
        for index, item in enumerate(node.value):
            document.places[*path, index] = here = _place_of(item, place)
            items.append(_value(item, (*path, index), document, here))
        return items
    if isinstance(node, yaml.ScalarNode):
        text: str = node.value
        if node.tag in (TAG + "str", TAG + "merge") and (whole := _without_surrogates(text)) is not None:
            return whole
        if node.tag == TAG + "null" and NULL.fullmatch(text):
            return None
        if node.tag == TAG + "bool" and BOOLEAN.fullmatch(text):
            return text.lower() == "true"
        if node.tag == TAG + "int" and INTEGER.fullmatch(text):
            return int(text)
        if node.tag == TAG + "float" and FLOAT.fullmatch(text):
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    document.unread.add(path)
    if node.tag == TAG + "str":
        document.tell(path, f"`{dotted(path)}` has half a surrogate pair, which is no text")
    else:
        tag = node.tag.replace(TAG, "!!")
        document.tell(path, f"the YAML tag {tag} is refused", "a recipe is plain data; write the value itself")
    return None


def _without_surrogates(text: str) -> str | None:
    """Text as JSON's escapes mean it: two halves of a surrogate pair are one character; None if one stands alone."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        return None


def _mapping(node: yaml.MappingNode, path: KeyPath, document: Document, place: Place) -> dict[str | int, Any]:
    values: dict[str | int, Any] = {}
    for key_node, value_node in node.value:
        here = _place_of(key_node, place)
        is_text = isinstance(key_node, yaml.ScalarNode) and key_node.tag.startswith(TAG)
        key = _without_surrogates(key_node.value) if is_text else None
        if key is None:
            document.tell(path, "a key must be plain text", "", here)
        elif key_node.tag == TAG + "merge":
            document.tell(path, NO_SHARING, "write the values out", here)
        elif key in values:
            first = document.places[*path, key].line
            lines = f" (lines {first} and {here.line})" if here.line else ""
            document.tell((*path, key), f'duplicate key "{key}"{lines}', "keep one of them", here)
        else:
            document.places[*path, key] = here
            values[key] = None
            values[key] = _value(value_node, (*path, key), document, here)
    return values


def _place_of(node: yaml.Node, around: Place) -> Place:
    """Inside an override every value is where the override is."""
    return Place(around.source, node.start_mark.line + 1) if around.line else around


def in_yaml(value: Any) -> str:
    """A value as it would be written on one line of a recipe."""
    text = yaml.dump(
        value, Dumper=_CoreDumper, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False
    )
    text = text.removesuffix("\n").removesuffix("\n...")
    return text if len(text) <= 80 else text[:77] + "..."
