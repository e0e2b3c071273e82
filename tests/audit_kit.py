"""Rows as the audit counts them, drawn or written down; for the tests of the audit and of its views."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from ftune.data.audit import NO_LABELS, ROLES, USED, Audit, Columns, Counts

UNHURRIED = settings(deadline=None, max_examples=50)
REASONS = ["too_long", "bad_row", NO_LABELS]


@dataclass(frozen=True)
class RowFigures:
    """What is counted in one row. The mappings go from role to tokens; a role that is missing has none."""

    source: str
    row_id: str
    tokens: Mapping[str, int] = field(default_factory=dict)
    """As the row came, before anything was cut off; empty where it was dropped before it had tokens."""
    supervised: Mapping[str, int] = field(default_factory=dict)
    truncated: Mapping[str, int] = field(default_factory=dict)
    end_of_turn: int = 0
    """Tokens that end an assistant's turn, those that were cut off too."""
    end_of_turn_supervised: int = 0
    dropped: str | None = None
    """The reason; None for a row that is trained on."""


def columns_of(rows: Sequence[RowFigures]) -> Columns:
    def by_role(mappings: Iterable[Mapping[str, int]]) -> Counts:
        cells = [mapping.get(role, 0) for mapping in mappings for role in ROLES]
        return np.array(cells, dtype=np.int64).reshape(-1, len(ROLES))

    assert all(row.tokens.keys() <= set(ROLES) for row in rows), "a role without a place"
    ends = [(row.end_of_turn, row.end_of_turn_supervised) for row in rows]
    return Columns(
        [row.source for row in rows],
        [row.row_id for row in rows],
        [row.dropped or USED for row in rows],
        by_role(row.tokens for row in rows),
        by_role(row.supervised for row in rows),
        by_role(row.truncated for row in rows),
        np.array(ends, dtype=np.int64).reshape(-1, 2),
    )


@st.composite
def figures(draw: st.DrawFn) -> RowFigures:
    roles = draw(st.lists(st.sampled_from(ROLES), unique=True))
    tokens = {role: draw(st.integers(1, 5000)) for role in roles}
    truncated = {role: draw(st.integers(0, count)) for role, count in tokens.items()}
    supervised = {role: draw(st.integers(0, count - truncated[role])) for role, count in tokens.items()}
    ends = draw(st.integers(0, 5))
    return RowFigures(
        source=draw(st.sampled_from(["a.jsonl", "b.jsonl", "[bold]c.csv"])),
        row_id=f"row:{draw(st.integers(0, 10**6))}",
        tokens=tokens,
        supervised=supervised,
        truncated=truncated,
        end_of_turn=ends,
        end_of_turn_supervised=draw(st.integers(0, ends)),
        dropped=draw(st.none() | st.sampled_from(REASONS)),
    )


ROWS = st.lists(figures(), max_size=30)


def audit_of(rows: list[RowFigures]) -> Audit:
    audit = Audit()
    audit.add(columns_of(rows))
    return audit


def good(source: str = "a.jsonl", number: int = 1, supervised: int = 40, **changes: Any) -> RowFigures:
    tokens = {"user": 60, "assistant": 50}
    values = {"tokens": tokens, "supervised": {"assistant": supervised}, "end_of_turn": 1, "end_of_turn_supervised": 1}
    return RowFigures(source, f"{source}:{number}", **(values | changes))
