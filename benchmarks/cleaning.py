"""How fast rows are cleaned, and in how much memory: rows a second of each stage, one process, one thread.

Synthetic rows of 60 words on average out of 50,000; 1 % are exact copies, 1 % near ones, 0.1 % hold one of 3,000 items.
Texts are made batch by batch, as workers would read them, so that the memory is that of the cleaning.

    OMP_NUM_THREADS=1 python benchmarks/cleaning.py --rows 1000000 --output benchmarks/results/cleaning.json
"""

import argparse
import json
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ftune import clean

BATCH = 500
NUM_ITEMS = 3_000
NUM_WORDS = 50_000
MEAN_WORDS = 60
LETTERS = "etaoinshrdlucmfwypvbgk"


def make_words(generator: np.random.Generator) -> list[str]:
    sizes = generator.integers(2, 10, NUM_WORDS)
    return ["".join(generator.choice(list(LETTERS), size)) for size in sizes]


def make_row(words: list[str], seed: int) -> tuple[str, str]:
    """A question and an answer; a rank drawn evenly in its logarithm makes some words as frequent as in a language."""
    generator = np.random.default_rng(seed)
    size = int(generator.integers(MEAN_WORDS // 3, MEAN_WORDS * 5 // 3))
    chosen = [words[int(rank) - 1] for rank in np.exp(generator.uniform(0, np.log(NUM_WORDS), size))]
    return " ".join(chosen[: size // 2]) + "?", " ".join(chosen[size // 2 :]) + "."


def batches(words: list[str], num_rows: int) -> Iterator[tuple[list[str], list[str]]]:
    for start in range(0, num_rows, BATCH):
        rows = []
        for row in range(start, min(start + BATCH, num_rows)):
            kind = row % 1000
            seed = NUM_ITEMS + (row - 37 if kind % 100 in (50, 51) else row)
            question, answer = make_row(words, seed if kind else row // 1000 % NUM_ITEMS)
            rows.append((question, f"{answer} changed" if kind % 100 == 51 else answer))
        yield [question for question, _ in rows], [answer for _, answer in rows]


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--output", type=Path, help="a file to write the figures to as well")
    arguments = parser.parse_args()
    words = make_words(np.random.default_rng(0))
    clean.sketches(["the tables of letters, once"])
    before, seconds = peak_mib(), defaultdict[str, float](float)

    def timed(name: str, call: Callable[..., Any], *values: Any) -> Any:
        started = time.process_time()
        result = call(*values)
        seconds[name] += time.process_time() - started
        return result

    items = [clean.Item(str(i), *make_row(words, i)) for i in range(NUM_ITEMS)]
    contamination = timed("index of the items", clean.Contamination, items)
    digests, sketches, num_hits = [], [], 0
    for questions, answers in batches(words, arguments.rows):
        texts = [f"{question}\n{answer}" for question, answer in zip(questions, answers, strict=True)]
        digests.append(timed("digests", clean.digests, texts))
        sketches.append(timed("sketches", clean.sketches, texts))
        num_hits += len(timed("contamination", contamination.find, questions, answers))
    keys, signatures = np.concatenate(digests), clean.Sketches.joined(sketches)
    del digests, sketches
    twins = timed("exact twins", clean.first_twins, keys)
    first, second, _ = timed("near pairs", clean.near_pairs, signatures)
    clusters = timed("clusters", clean.clusters, len(keys), (first, second))
    timed("split", clean.split_fraction, keys, clusters, 0.05)
    rates = {name: round(arguments.rows / spent) for name, spent in seconds.items() if name != "index of the items"}
    figures = {
        "rows": arguments.rows,
        "items": NUM_ITEMS,
        "cpu_seconds": {name: round(spent, 2) for name, spent in seconds.items()},
        "rows_per_second": rates,
        "exact_and_contamination_rows_per_second": round(
            arguments.rows / sum(seconds[name] for name in ("digests", "exact twins", "contamination"))
        ),
        "all_rows_per_second": round(arguments.rows / sum(seconds.values())),
        "peak_mib": round(peak_mib()),
        "of_that_before_mib": round(before),
        "exact_duplicates": int((twins >= 0).sum()),
        "near_duplicates": int((clusters != np.arange(len(clusters))).sum()),
        "contaminated": num_hits,
    }
    text = json.dumps(figures, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
