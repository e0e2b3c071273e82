"""Templates are code out of somebody's folder: what is looked at before one may render a million rows.

jinja2's sandbox keeps them from Python's inside and from ranges above 100,000, but not from loops inside loops, powers
or texts of a gigabyte. So the source is read first, and the first rendering runs under a budget of lines.
"""

import sys
from collections.abc import Callable
from functools import lru_cache
from types import FrameType
from typing import Any

from ftune.chat.rows import WHERE
from ftune.errors import UserError

MAX_LINES = 1_000_000
"""Lines of a compiled template that rendering a few short messages may run; published ones run some hundreds."""
MAX_NUMBER = 100_000
"""The largest number that may stand in a template: what jinja2's sandbox allows a range."""


MAX_FACTOR = 1_000
"""The largest number to multiply by: texts can be multiplied, too."""


class TooLong(Exception):
    """The budget is used up. Raised inside the template, so it must not be one of jinja2's own errors."""


@lru_cache(maxsize=64)
def check_source(source: str) -> None:
    """Refuse a template by its text: syntax, by its line; powers and huge numbers, which nothing bounds later.

    jinja2 computes constants while compiling, so this comes before any compiling.
    """
    import jinja2
    from jinja2 import nodes

    try:
        environment = _environment()
        tree = environment.parse(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"the chat template has a syntax error in line {error.lineno}: {error.message}",
            WHERE,
            "correct the template, or give another one with model.chat_template",
        ) from error
    except RecursionError as error:
        raise _refused("it is nested too deeply") from error
    for kind, known in ((nodes.Filter, environment.filters), (nodes.Test, environment.tests)):
        for node in tree.find_all(kind):
            if node.name not in known:
                raise _refused(f"line {node.lineno} names {node.name!r}, which jinja2 does not have")
    for power in tree.find_all(nodes.Pow):
        raise _refused(f"line {power.lineno} raises to a power, which can fill the memory")
    for product in tree.find_all(nodes.Mul):
        if not any(_is_small(operand) for operand in (product.left, product.right)):
            raise _refused(f"line {product.lineno} multiplies by what is no number up to {MAX_FACTOR}")
    for constant in tree.find_all(nodes.Const):
        if isinstance(constant.value, int | float) and abs(constant.value) > MAX_NUMBER:
            raise _refused(f"line {constant.lineno} holds the number {constant.value:.3g}, above {MAX_NUMBER}")


def _environment() -> Any:
    """What transformers' templates may be written in: jinja2 with break, continue and generation marks."""
    from jinja2 import nodes
    from jinja2.ext import Extension, LoopControlExtension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationMarks(Extension):
        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    return ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationMarks, LoopControlExtension]
    )


def _is_small(operand: Any) -> bool:
    value = getattr(operand, "value", None)
    return isinstance(value, int | float) and abs(value) <= MAX_FACTOR


def _refused(reason: str) -> UserError:
    return UserError(f"the chat template is refused: {reason}", WHERE, "give another one with model.chat_template")


def within_budget(render: Callable[[], Any]) -> Any:
    """What `render` returns, unless it runs more than MAX_LINES lines: a count, so the same on any machine."""
    lines = 0

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != "<template>":  # as jinja2 names what it compiled; compiling is not counted
            return None
        lines += 1
        if lines > MAX_LINES:
            raise TooLong
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        return render()
    except TooLong as error:
        raise _refused(f"rendering two short messages runs over {MAX_LINES:,} lines") from error
    finally:
        sys.settrace(before)
