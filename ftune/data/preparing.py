"""Rows -> examples, chunk by chunk: in this process while they are few, over all cores when they are many.

Many are kept in a cache whose folders are named by the hash of everything that shaped them.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from ftune import folder
from ftune.console.progress import task_progress
from ftune.console.streams import note, warn
from ftune.data.audit import USED
from ftune.data.detection import detect, unused_columns
from ftune.data.examples import MAX_SHOWN, Rules, make_example, reason
from ftune.data.fields import BadRow
from ftune.data.rows import SourceRow
from ftune.data.sources import Source, suffixes
from ftune.data.store import NO_FIGURES, SCHEMA, dropped, open_file, to_batch
from ftune.data.workers import num_workers, ordered
from ftune.errors import Problem, UserError
from ftune.quantities import format_count

CHUNK_ROWS = 500
FEW_CHUNKS = 2
"""So many chunks are prepared in this process and kept in memory; to start others for them would take as long."""
ROWS, FACTS = "rows.arrow", "facts.json"
CODE = Path(__file__).parents[1]


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
            "code": folder.sha256_json([folder.checksums(CODE / part) for part in ("chat", "data")]),
            "versions": {name: version(name) for name in ("transformers", "tokenizers", "jinja2", "pyarrow")},
            "tokenizer": folder.sha256_json([tokenizer.backend_tokenizer.to_str(), template, special]),
            # A template may write today's date.
            "date": date.today().isoformat() if "strftime" in str(template) else None,
            "rules": self.rules.as_dict(),
            "vocab_size": self.vocab_size,
        }


@dataclass(frozen=True)
class Task:
    """Some rows of one source, all of one shape."""

    source: int
    rows: list[SourceRow | Problem]
    shape: str
    suffix: str
    """What makes the row ids unique where an earlier source has the same name."""
    notes: tuple[str, ...] = ()
    """How its source is read, where that was decided by this chunk."""


@dataclass
class Outcome:
    """What became of the rows of a chunk: each has a line in the batch; and the problems that may not be."""

    batch: pa.RecordBatch
    problems: list[Problem]
    notes: Counter[str]


def prepare_chunk(preparation: Preparation, task: Task) -> Outcome:
    """The examples of a chunk, and a line for each of its other rows with the reason it was dropped for."""
    rules, rows, outcomes = preparation.rules, [], []
    problems: list[Problem] = []
    notes = Counter(dict.fromkeys(task.notes, 0))
    for row in task.rows:
        if isinstance(row, Problem):
            rows.append(dropped(row.where))
            outcomes.append("unreadable")
            problems += [row] if rules.on_bad_row == "error" else []
            continue
        try:
            example = make_example(preparation.tokenizer, row, task.shape, rules, preparation.vocab_size)
        except BadRow as error:
            rows.append(dropped(row.row_id, getattr(error, "figures", NO_FIGURES)))
            outcomes.append(reason(error))
            if not rules.may_drop(error):
                problems.append(Problem(f"{error}", f"{row.place} (row {row.row_id})", error.hint))
            continue
        except UserError as error:
            problems += error.problems
            break
        rows.append(replace(example, row_id=example.row_id + task.suffix))
        outcomes.append(USED)
        notes.update(example.notes)
    return Outcome(to_batch(rows, task.source, outcomes), problems, notes)


def tasks_of(sources: Sequence[Source], rules: Rules) -> Iterator[Task]:
    """All rows in chunks. Of `format: auto` the first row that can be read decides the shape of its source."""
    for number, (source, suffix) in enumerate(zip(sources, suffixes(sources), strict=True)):
        rows, shape = source.rows(), None
        while chunk := list(islice(rows, CHUNK_ROWS)):
            readable = next((row for row in chunk if isinstance(row, SourceRow)), None)
            notes: list[str] = []
            if shape is None and readable is not None:
                found = detect(readable.fields, rules.format, readable.place, rules.columns)
                shape = found.shape
                notes += [f"{source.name}: rows are {found.told}"] if rules.format == "auto" else []
                if unused := unused_columns(readable.fields, shape, rules.columns):
                    notes.append(f"{source.name}: columns that are not read: {', '.join(unused)}")
            yield Task(number, chunk, shape or rules.format, suffix, tuple(notes))


class Collected:
    """Problems and notes of all chunks, as many as are told."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.num_problems = self.rows_in = 0
        self.dropped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()

    def add(self, outcome: Outcome) -> None:
        for problem in outcome.problems:
            if problem not in self.problems:
                self.num_problems += 1
                self.problems += [problem] if len(self.problems) < MAX_SHOWN else []
        self.rows_in += len(outcome.batch)
        self.dropped.update(outcome.batch["outcome"].to_pylist())
        for text, count in outcome.notes.items():
            self.notes[text] += count

    def check(self, sources: Sequence[Source]) -> None:
        """Raise UserError with every problem, up to a limit, or when nothing usable is left."""
        problems, hidden = self.problems, self.num_problems - len(self.problems)
        if not self.dropped.pop(USED, 0):
            reasons = ", ".join(f"{reason}: {count}" for reason, count in self.dropped.items())
            told = f"0 usable examples ({self.rows_in} rows in" + (f"; dropped {reasons})" if reasons else ")")
            where = ", ".join(source.place for source in sources)
            problems = [*problems, Problem(told, where, "see the rows named above, if any")]
        if len(problems) + hidden > MAX_SHOWN:
            rest = f"and {len(problems) + hidden - MAX_SHOWN + 1} more problems"
            hint = "data.on_bad_row: skip drops and counts bad rows"
            problems = [*problems[: MAX_SHOWN - 1], Problem(rest, "", hint)]
        if problems:
            raise UserError.collect(problems)


@dataclass(frozen=True)
class Prepared:
    """A line for every row of some sources, in order, and how often which note was made."""

    table: pa.Table
    notes: dict[str, int]


def prepare(preparation: Preparation, sources: Sequence[Source]) -> Prepared:
    """All rows of some sources. Raises UserError with every problem found, and when nothing usable is left."""
    tasks = tasks_of(sources, preparation.rules)
    first = list(islice(tasks, FEW_CHUNKS + 1))
    if len(first) <= FEW_CHUNKS:
        batches: list[pa.RecordBatch] = []
        notes = _collect(preparation, (first, 1), sources, batches.append)
        return Prepared(pa.Table.from_batches(batches, SCHEMA), notes)
    facts = preparation.facts() | {"sources": [[source.name, source.digest] for source in sources]}
    path = folder.cache_folder("data") / folder.sha256_json(facts)
    if (found := _find(path, facts)) is not None:
        note(f"{format_count(len(found.table))} prepared rows found in {path}")
        return found
    notes = _write(path, facts, preparation, sources, chain(first, tasks))
    return Prepared(open_file(path / ROWS), notes)


def _collect(
    preparation: Preparation,
    work: tuple[Iterable[Task], int],
    sources: Sequence[Source],
    keep: Callable[[pa.RecordBatch], object],
) -> dict[str, int]:
    """Hand every batch on; the notes of all rows. `work`: the tasks, and how many workers share them."""
    collected = Collected()
    for outcome in ordered(partial(prepare_chunk, preparation), *work):
        collected.add(outcome)
        keep(outcome.batch)
    collected.check(sources)
    return dict(collected.notes)


def _write(
    path: Path, facts: dict[str, Any], preparation: Preparation, sources: Sequence[Source], tasks: Iterator[Task]
) -> dict[str, int]:
    with folder.new_in_cache(path) as new:
        with (
            pa.OSFile(str(new / ROWS), "wb") as file,
            pa.ipc.new_file(file, SCHEMA) as writer,
            task_progress("preparing rows", sum(source.size() for source in sources)) as progress,
        ):

            def keep(batch: pa.RecordBatch) -> None:
                writer.write_batch(batch)
                progress.advance(len(batch))

            notes = _collect(preparation, (tasks, num_workers()), sources, keep)
        digest = folder.sha256_file(new / ROWS)
        folder.write_json(new / FACTS, {**facts, "notes": notes, "sha256": digest})
    return notes


def _find(path: Path, facts: dict[str, Any]) -> Prepared | None:
    """What the cache holds, where it was made from these very facts and is whole."""
    if not (path / FACTS).is_file() or not (path / ROWS).is_file():
        return None
    with suppress(UserError, KeyError):
        known = folder.read_json(path / FACTS)
        notes, digest = known.pop("notes"), known.pop("sha256")
        if known == facts and digest == folder.sha256_file(path / ROWS):
            return Prepared(open_file(path / ROWS), notes)
    warn(f"the prepared rows in {path} are damaged and are made again")
    return None
