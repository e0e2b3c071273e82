"""The supervision audit: where every row and every token went, by source and by role.

Each row that was read has one outcome (used, or the reason it was dropped for) and each of its tokens one fate, so
that all sums agree by construction.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftune import chat

ROLES = (*chat.ROLES, "text")
"""Who a token belongs to; `text` is what lies outside turns."""
NUM_FIGURES = 3 * len(ROLES) + 2
"""What is counted in one row: tokens by role, supervised ones by role, truncated ones by role, ends of turns in all
and supervised ones."""
USED = "used"
SUPERVISED, READ, TRUNCATED = "supervised", "read", "truncated"
"""The fates of a used row's tokens; a dropped row's tokens share its reason."""
NO_LABELS = "no_labels"
NUM_LONGEST = 10
QUANTILES = {"min": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
NUM_BINS = 10
LOG_RATIO = 64
"""Lengths that spread further than this are counted between powers of two, others in even bins."""

Longest = tuple[int, str, str]
Counts = NDArray[np.int64]
Figures = tuple[int, ...]


@dataclass(frozen=True)
class Columns:
    """The figures of many rows, one place a row. Counts are int64; those by role are (rows, len(ROLES))."""

    source: Sequence[str]
    row_id: Sequence[str]
    outcome: Sequence[str]
    """USED, or the reason the row was dropped for."""
    tokens: Counts
    supervised: Counts
    truncated: Counts
    end_of_turn: Counts
    """(rows, 2): how many there are, how many are supervised."""

    @classmethod
    def from_figures(
        cls, source: Sequence[str], row_id: Sequence[str], outcome: Sequence[str], figures: Counts
    ) -> "Columns":
        """figures: (rows, NUM_FIGURES)."""
        by_role = figures[:, :-2].reshape(len(figures), 3, len(ROLES))
        return cls(source, row_id, outcome, by_role[:, 0], by_role[:, 1], by_role[:, 2], figures[:, -2:])


@dataclass
class Audit:
    """The figures of many rows. Its memory grows with sources and distinct lengths, not with rows."""

    rows: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(source, outcome) -> rows."""
    tokens: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """(source, role, fate) -> tokens."""
    rows_with_role: Counter[str] = field(default_factory=Counter)
    rows_without_supervision: int = 0
    end_of_turn: int = 0
    end_of_turn_supervised: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    """Tokens of a row as it came -> rows."""
    longest: list[Longest] = field(default_factory=list)
    """(-tokens, row_id, outcome), in order."""
    duplicates: int | None = None
    contaminated: int | None = None
    """None where nobody looked."""

    def expect(self, source: str) -> None:
        """Name a source before it is read, so that one without any rows is seen too."""
        self.rows[source, USED] += 0

    def add(self, columns: Columns) -> None:
        """Count more rows, each once."""
        read = columns.tokens - columns.supervised - columns.truncated
        assert min(map(_lowest, (read, columns.supervised, columns.truncated))) >= 0, "tokens do not add up"
        groups: dict[tuple[str, str], int] = {}
        pairs = zip(columns.source, columns.outcome, strict=True)
        codes = np.array([groups.setdefault(pair, len(groups)) for pair in pairs], dtype=np.int64)
        self.rows.update(dict(zip(groups, np.bincount(codes).tolist(), strict=True)))
        all_fates = {SUPERVISED: columns.supervised, READ: read, TRUNCATED: columns.truncated}
        for (source, outcome), code in groups.items():
            fates = all_fates if outcome == USED else {outcome: columns.tokens}
            for fate, counts in fates.items():
                for role, count in zip(ROLES, counts[codes == code].sum(axis=0).tolist(), strict=True):
                    self.tokens[source, role, fate] += count
        has_role = (columns.tokens > 0).sum(axis=0).tolist()
        self.rows_with_role.update(dict(zip(ROLES, has_role, strict=True)))
        used = np.array([outcome == USED for outcome in columns.outcome], dtype=bool)
        ends = columns.end_of_turn[used].sum(axis=0).tolist()
        self.end_of_turn += ends[0]
        self.end_of_turn_supervised += ends[1]
        self.rows_without_supervision += int((used & (columns.supervised.sum(axis=1) == 0)).sum())
        self.rows_without_supervision += sum(outcome == NO_LABELS for outcome in columns.outcome)
        self._measure(columns)

    def _measure(self, columns: Columns) -> None:
        lengths = columns.tokens.sum(axis=1)
        values, rows = np.unique(lengths[lengths > 0], return_counts=True)
        self.lengths.update(dict(zip(values.tolist(), rows.tolist(), strict=True)))
        place = max(len(lengths) - NUM_LONGEST, 0)
        least = max(1, int(np.partition(lengths, place)[place])) if len(lengths) else 1
        found = [
            (-int(lengths[place]), columns.row_id[place], columns.outcome[place])
            for place in np.flatnonzero(lengths >= least).tolist()
        ]
        self.longest = nsmallest(NUM_LONGEST, [*self.longest, *found])

    @property
    def rows_in(self) -> int:
        return self.rows.total()

    @property
    def rows_used(self) -> int:
        return sum(count for (_, outcome), count in self.rows.items() if outcome == USED)

    @property
    def dropped(self) -> Counter[str]:
        """Reason -> rows."""
        return _by((outcome, count) for (_, outcome), count in self.rows.items() if outcome != USED and count)

    @property
    def fates(self) -> Counter[str]:
        """Fate -> tokens; together all tokens that came in."""
        return _by((fate, count) for (_, _, fate), count in self.tokens.items())

    @property
    def supervised_tokens(self) -> int:
        return self.fates[SUPERVISED]

    @property
    def sources(self) -> dict[str, dict[str, Any]]:
        """Rows and tokens of each source, in the order in which they were first seen."""
        names = dict.fromkeys(source for source, _ in self.rows)
        return {name: self._source(name) for name in names}

    def _source(self, name: str) -> dict[str, Any]:
        rows = {outcome: count for (source, outcome), count in self.rows.items() if source == name and count}
        fates = _by((fate, count) for (source, _, fate), count in self.tokens.items() if source == name)
        return {
            "rows_in": sum(rows.values()),
            "rows_used": rows.pop(USED, 0),
            "dropped": dict(sorted(rows.items())),
            **_token_counts(fates),
        }

    @property
    def roles(self) -> dict[str, dict[str, int]]:
        """Rows and tokens of each role that occurs; a row counts for every role it holds."""
        found = {}
        for role in (role for role in ROLES if self.rows_with_role[role]):
            fates = _by((fate, count) for (_, of, fate), count in self.tokens.items() if of == role)
            found[role] = {"rows": self.rows_with_role[role], **_token_counts(fates)}
        return found

    def as_dict(self) -> dict[str, Any]:
        """The `data` part of report.json; lengths are tokens of the rows as they came, before truncation."""
        tokens = _token_counts(self.fates)
        kept = (USED, SUPERVISED, READ, TRUNCATED)
        return {
            "rows_in": self.rows_in,
            "rows_used": self.rows_used,
            "dropped": dict(sorted(self.dropped.items())),
            "duplicates": self.duplicates,
            "contaminated": self.contaminated,
            "tokens_in": tokens["tokens_in"],
            "tokens": tokens["tokens"],
            "tokens_truncated": tokens["truncated"],
            "tokens_dropped": {fate: count for fate, count in sorted(self.fates.items()) if count and fate not in kept},
            "supervised_tokens": tokens["supervised"],
            "rows_without_supervision": self.rows_without_supervision,
            "end_of_turn": {"tokens": self.end_of_turn, "supervised": self.end_of_turn_supervised},
            "sources": self.sources,
            "roles": self.roles,
            "quantiles": quantiles(self.lengths),
            "histogram": histogram(self.lengths),
            "longest": [{"row_id": row_id, "tokens": -minus, "outcome": told} for minus, row_id, told in self.longest],
        }


def quantiles(lengths: Mapping[int, int]) -> dict[str, int] | None:
    """The smallest length that at least this share of the rows does not exceed; exact. None without rows."""
    if not lengths:
        return None
    values = np.array(sorted(lengths))
    reached = np.cumsum([lengths[int(value)] for value in values])
    places = {name: np.searchsorted(reached, share * reached[-1]) for name, share in QUANTILES.items()}
    return {name: int(values[place]) for name, place in places.items()}


def histogram(lengths: Mapping[int, int]) -> dict[str, list[int]] | None:
    """Rows by length: bin k counts the lengths from edges[k] up to but not including edges[k + 1]."""
    if not lengths:
        return None
    low, high = min(lengths), max(lengths)
    if high > LOG_RATIO * low:
        edges = [2**power for power in range(low.bit_length() - 1, high.bit_length() + 1)]
    else:
        width = _round_up((high - low + 1) / NUM_BINS)
        edges = list(range(low // width * width, high + width + 1, width))
        edges = edges[: next(place for place, edge in enumerate(edges) if edge > high) + 1]
    counts, _ = np.histogram(list(lengths), bins=edges, weights=list(lengths.values()))
    return {"edges": edges, "counts": [int(count) for count in counts]}


def _round_up(width: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    power = 1
    while True:
        for digit in (1, 2, 5):
            if digit * power >= width:
                return digit * power
        power *= 10


def _by(pairs: Iterable[tuple[str, int]]) -> Counter[str]:
    found: Counter[str] = Counter()
    for name, count in pairs:
        found[name] += count
    return found


def _token_counts(fates: Mapping[str, int]) -> dict[str, int]:
    """`tokens` are those that training sees; what came in beyond them and the truncated was dropped."""
    supervised, read, truncated = (fates.get(fate, 0) for fate in (SUPERVISED, READ, TRUNCATED))
    return {
        "tokens_in": sum(fates.values()),
        "tokens": supervised + read,
        "supervised": supervised,
        "truncated": truncated,
    }


def _lowest(counts: Counts) -> int:
    return int(counts.min(initial=0))
