"""Sources -> a dataset: examples that are ready, the account of all rows, and how often each source is seen."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ftune.data.examples import Account, Rules
from ftune.data.mixture import Mixture
from ftune.data.preparing import Preparation, prepare
from ftune.data.sources import Source
from ftune.data.store import Examples, Indices


@dataclass(frozen=True)
class Dataset:
    """Examples in the order of their files, with the account of where the other rows went."""

    examples: Examples
    account: Account
    weights: tuple[float, ...]
    """How often an epoch sees the rows of each source."""
    source_of: Indices
    """Which source each example comes from, in ascending order."""

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def mixture(self) -> Mixture:
        counts = np.bincount(self.source_of, minlength=len(self.weights))
        return Mixture.of(counts.tolist(), self.weights)

    def select(self, places: Indices) -> "Dataset":
        """Some of the examples, in the same order; the account stays that of the rows that were read."""
        return replace(self, examples=self.examples.select(places), source_of=self.source_of[places])


def load(tokenizer: Any, sources: Sequence[Source], rules: Rules, vocab_size: int | None = None) -> Dataset:
    """All examples of some sources. Raises UserError with every problem found, and when nothing usable is left."""
    prepared = prepare(Preparation(tokenizer, rules, vocab_size), sources)
    source_of = np.repeat(np.arange(len(sources)), prepared.counts)
    weights = tuple(source.weight for source in sources)
    return Dataset(Examples(prepared.table), prepared.account, weights, source_of)
