"""Where rows come from, by the name they have in row ids, and how often each source's rows are seen."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ftune import folder
from ftune.data.rows import SourceRow, read_rows
from ftune.errors import Problem


@dataclass(frozen=True)
class Source:
    """A file of rows; `weight` says how often an epoch sees each of them."""

    path: Path
    weight: float = 1.0
    commit: str | None = None
    """Of the hub, where the file comes from there."""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def place(self) -> str:
        return str(self.path)

    def rows(self) -> Iterator[SourceRow | Problem]:
        return read_rows(self.path)

    @cached_property
    def digest(self) -> str:
        """sha256 of the content: a file that changed in place is another one, whatever its date."""
        return folder.sha256_file(self.path)

    def size(self) -> int:
        """About how many rows it holds, for a progress bar: its lines."""
        with self.path.open("rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))


def suffixes(sources: Sequence[Source]) -> list[str]:
    """What is put behind the row ids of each source, so that two of one name are told apart."""
    seen: Counter[str] = Counter()
    found = []
    for source in sources:
        seen[source.name] += 1
        found.append(f"#{seen[source.name]}" if seen[source.name] > 1 else "")
    return found
