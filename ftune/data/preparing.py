"""Rows -> examples, chunk by chunk: in this process while they are few, over all cores when they are many.

Many are kept in a cache whose folders are named by the hash of everything that shaped them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from ftune import __version__, folder
from ftune.console.progress import task_progress
from ftune.console.streams import note, warn
from ftune.data.examples import MAX_SHOWN, Account, BadRow, Rules, detect_format, make_example, reason, renamed
from ftune.data.rows import SourceRow
from ftune.data.sources import Source, suffixes
from ftune.data.store import SCHEMA, open_file, to_batch
from ftune.data.workers import num_workers, ordered
from ftune.errors import Problem, UserError
from ftune.quantities import format_count

CHUNK_ROWS = 500
FEW_CHUNKS = 8
"""So many chunks are prepared in this process and kept in memory; to start others for them would take longer."""
ROWS, FACTS = "rows.arrow", "facts.json"


@dataclass(frozen=True)
class Preparation:
    """Everything that shapes an example besides its row."""

    tokenizer: Any
    rules: Rules
    vocab_size: int | None

    def facts(self) -> dict[str, Any]:
        tokenizer, template = self.tokenizer, self.tokenizer.chat_template
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        return {
            "versions": {"ftune": __version__, "format": folder.FORMAT_VERSION},
            "tokenizer": folder.sha256_json([tokenizer.backend_tokenizer.to_str(), template, special]),
            # A template may write today's date.
            "date": date.today().isoformat() if "strftime" in str(template) else None,
            "rules": self.rules.as_dict(),
            "vocab_size": self.vocab_size,
        }


@dataclass
class Outcome:
    """What became of some rows: the examples, the account of all, and the first problems of those that may not go."""

    batches: list[pa.RecordBatch] = field(default_factory=list)
    account: Account = field(default_factory=Account)
    problems: list[Problem] = field(default_factory=list)
    num_problems: int = 0

    def blame(self, problem: Problem) -> None:
        if problem in self.problems:
            return
        self.num_problems += 1
        if len(self.problems) < MAX_SHOWN:
            self.problems.append(problem)

    def add(self, other: "Outcome") -> None:
        """Account and problems of more rows; their examples go elsewhere."""
        self.account.add(other.account)
        unseen = other.num_problems - len(other.problems)
        for problem in other.problems:
            self.blame(problem)
        self.num_problems += unseen

    def told(self) -> list[Problem]:
        """The problems that are told one by one, and a line for the rest."""
        if self.num_problems <= MAX_SHOWN:
            return self.problems
        rest = f"and {self.num_problems - MAX_SHOWN + 1} more problems"
        return [*self.problems[: MAX_SHOWN - 1], Problem(rest, "", "data.on_bad_row: skip drops and counts bad rows")]


@dataclass(frozen=True)
class Task:
    """Some rows of one source, all of one shape."""

    source: int
    rows: list[SourceRow | Problem]
    shape: str
    suffix: str
    """What makes the row ids unique where an earlier source has the same name."""


def prepare_chunk(preparation: Preparation, task: Task) -> tuple[int, Outcome]:
    """The source of a chunk and what became of its rows; every one is in the account."""
    outcome, examples, rules = Outcome(), [], preparation.rules
    for row in task.rows:
        outcome.account.rows_in += 1
        if isinstance(row, Problem):
            outcome.account.dropped["unreadable"] += 1
            if rules.on_bad_row == "error":
                outcome.blame(row)
            continue
        try:
            example = make_example(preparation.tokenizer, row, task.shape, rules, preparation.vocab_size)
        except BadRow as error:
            outcome.account.dropped[reason(error)] += 1
            if not rules.may_drop(error):
                outcome.blame(Problem(f"{error}", f"{row.place} (row {row.row_id})", error.hint))
            continue
        except UserError as error:
            for problem in error.problems:
                outcome.blame(problem)
            continue
        examples.append(replace(example, row_id=example.row_id + task.suffix))
        outcome.account.count(example)
    if examples:
        outcome.batches.append(to_batch(examples))
    return task.source, outcome


def tasks_of(sources: Sequence[Source], rules: Rules) -> Iterator[Task]:
    """All rows in chunks. Of `format: auto` the first row that can be read decides the shape of its source."""
    for number, (source, suffix) in enumerate(zip(sources, suffixes(sources), strict=True)):
        rows, shape = source.rows(), None
        while chunk := list(islice(rows, CHUNK_ROWS)):
            for row in chunk:
                if shape is None and isinstance(row, SourceRow):
                    with suppress(BadRow):  # of a column that is not there, told with its row
                        shape = detect_format(renamed(row.fields, rules.columns), rules.format, row.place)
            yield Task(number, chunk, shape or rules.format, suffix)


@dataclass(frozen=True)
class Prepared:
    """The examples of some sources, in order, with the account of all their rows."""

    table: pa.Table
    account: Account
    counts: list[int]
    """Examples of each source."""


def prepare(preparation: Preparation, sources: Sequence[Source]) -> Prepared:
    """All examples of some sources. Raises UserError with every problem found, and when nothing usable is left."""
    tasks = tasks_of(sources, preparation.rules)
    first = list(islice(tasks, FEW_CHUNKS + 1))
    if len(first) <= FEW_CHUNKS:
        batches: list[pa.RecordBatch] = []
        counts, whole = _collect(ordered(partial(prepare_chunk, preparation), first, 1), sources, batches.append)
        return Prepared(pa.Table.from_batches(batches, SCHEMA), whole.account, counts)
    facts = preparation.facts() | {"sources": [[source.name, source.digest()] for source in sources]}
    path = folder.cache_folder("data") / folder.sha256_json(facts)
    if (found := _find(path, facts)) is None:
        _write(path, facts, preparation, sources, chain(first, tasks))
        found = _find(path, facts)
        assert found is not None
    else:
        note(f"{format_count(found.account.rows_used)} prepared rows found in {path}")
    return found


def _collect(
    found: Iterator[tuple[int, Outcome]], sources: Sequence[Source], keep: Callable[[pa.RecordBatch], object]
) -> tuple[list[int], Outcome]:
    """Hand every batch on; how many examples each source gave, and the outcome of all rows."""
    counts, whole = [0] * len(sources), Outcome()
    for source, outcome in found:
        whole.add(outcome)
        counts[source] += outcome.account.rows_used
        for batch in outcome.batches:
            keep(batch)
    if not whole.account.rows_used:
        whole.blame(_nothing_usable(sources, whole.account))
    if problems := whole.told():
        raise UserError.collect(problems)
    return counts, whole


def _nothing_usable(sources: Sequence[Source], account: Account) -> Problem:
    reasons = ", ".join(f"{reason}: {count}" for reason, count in account.dropped.items())
    told = f" ({account.rows_in} rows in; dropped {reasons})" if reasons else f" ({account.rows_in} rows in)"
    where = ", ".join(source.place for source in sources)
    return Problem("0 usable examples" + told, where, "see the rows named above, if any")


def _write(
    path: Path, facts: dict[str, Any], preparation: Preparation, sources: Sequence[Source], tasks: Iterator[Task]
) -> None:
    with folder.new_in_cache(path) as new:
        with (
            pa.OSFile(str(new / ROWS), "wb") as file,
            pa.ipc.new_file(file, SCHEMA) as writer,
            task_progress("preparing rows", sum(source.size() for source in sources)) as progress,
        ):

            def keep(batch: pa.RecordBatch) -> None:
                writer.write_batch(batch)
                progress.advance(len(batch))

            outcomes = ordered(partial(prepare_chunk, preparation), tasks, num_workers())
            counts, whole = _collect(outcomes, sources, keep)
        document = {"account": whole.account.as_dict(), "counts": counts}
        folder.write_json(new / FACTS, {**facts, **document, "sha256": folder.sha256_file(new / ROWS)})


def _find(path: Path, facts: dict[str, Any]) -> Prepared | None:
    """What the cache holds, where it was made from these very facts and is whole."""
    if not (path / FACTS).is_file() or not (path / ROWS).is_file():
        return None
    with suppress(UserError):
        known = folder.read_json(path / FACTS)
        account, counts, digest = known.pop("account"), known.pop("counts"), known.pop("sha256")
        if known == facts and digest == folder.sha256_file(path / ROWS):
            return Prepared(open_file(path / ROWS), Account.from_dict(account), counts)
    warn(f"the prepared rows in {path} are damaged and are made again")
    return None
