"""Sources -> a dataset: examples that are ready, what became of every row, and how often each source is seen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftune.data.audit import NUM_FIGURES, USED, Audit, Columns
from ftune.data.examples import Rules
from ftune.data.mixture import Mixture
from ftune.data.preparing import Preparation, prepare
from ftune.data.sources import Source
from ftune.data.store import Examples, Indices


@dataclass(frozen=True)
class Dataset:
    """Examples in the order of their sources, and what became of every row that was read."""

    examples: Examples
    sources: tuple[Source, ...]
    outcomes: NDArray[np.object_]
    """For every row of the table: used, or the reason it is no example."""
    notes: Mapping[str, int]
    """What a user would want to know of how rows were read, and how many it happened to; 0 for a whole source."""
    duplicates: int | None = None
    contaminated: int | None = None
    """How many rows were found to be so; None where nobody looked."""

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def mixture(self) -> Mixture:
        found = self.examples.table["source"].to_numpy()[self.examples.indices]
        counts = np.bincount(found, minlength=len(self.sources))
        return Mixture.of(counts.tolist(), [source.weight for source in self.sources])

    @cached_property
    def audit(self) -> Audit:
        """Where every row and every token went."""
        table, audit = self.examples.table, Audit(duplicates=self.duplicates, contaminated=self.contaminated)
        names = np.array([source.name for source in self.sources], dtype=object)
        for name in names:
            audit.expect(name)
        for batch in table.to_batches():
            source = names[batch["source"].to_numpy()].tolist()
            figures = batch["figures"].flatten().to_numpy().reshape(-1, NUM_FIGURES)
            outcomes = self.outcomes[audit.rows_in : audit.rows_in + len(batch)].tolist()
            audit.add(Columns.from_figures(source, batch["row_id"].to_pylist(), outcomes, figures))
        return audit

    def without(self, gone: Mapping[str, Indices]) -> "Dataset":
        """Some examples fewer: the places of those that are gone, by the reason the audit tells."""
        outcomes = self.outcomes.copy()
        for reason, places in gone.items():
            outcomes[self.examples.indices[places]] = reason
        kept = np.setdiff1d(np.arange(len(self)), np.concatenate([np.zeros(0, np.int64), *gone.values()]))
        return replace(self, examples=self.examples.select(kept), outcomes=outcomes)

    def only(self, places: Indices) -> "Dataset":
        """Some examples as a data set of their own, which knows nothing of the others."""
        table = self.examples.table.take(self.examples.indices[places])
        return Dataset(Examples(table), self.sources, np.full(len(places), USED, object), {})


def load(tokenizer: Any, sources: Sequence[Source], rules: Rules, vocab_size: int | None = None) -> Dataset:
    """All examples of some sources. Raises UserError with every problem found, and when nothing usable is left."""
    prepared = prepare(Preparation(tokenizer, rules, vocab_size), sources)
    # One string an outcome, not one a row.
    coded = prepared.table["outcome"].combine_chunks().dictionary_encode()
    outcomes = coded.dictionary.to_numpy(zero_copy_only=False)[coded.indices.to_numpy()]
    examples = Examples(prepared.table, np.flatnonzero(outcomes == USED))
    return Dataset(examples, tuple(sources), outcomes, prepared.notes)
