"""Whether the statistics keep their promises, by simulation through the real functions.

    python benchmarks/calibration.py               1,000 trials of each, some minutes; writes the results
    python benchmarks/calibration.py --trials 200  quicker, printed only

Scores before and after are drawn from populations whose true means are known: 0/1 scores of several accuracies and
correlations, answers worth 0, a half or 1, and continuous scores. Three promises:

- with no true change, `forgot` comes in at most 5 % of trials: of one suite, and as any verdict of nine and their
  pooled `overall`;
- a true drop of the size that a measurement without change stated as detectable is found in at least 80 % of trials:
  of one suite, and of one among nine;
- 95 % intervals, of a score and of a drop, cover the truth in 93 to 97 % of trials. Where fewer than EXPECTED items are
  expected to change (or to be right, or wrong) there are so few outcomes that no interval can be close to 95 %; those
  are meant to cover more, and have to cover no less.

Written to benchmarks/results/calibration.json.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftune.statistics import (
    Interval,
    drop_interval,
    judge,
    mean_interval,
    minimum_detectable,
    paired_difference,
)

RESULTS = Path(__file__).parent / "results" / "calibration.json"
RESAMPLES = 1_000
DROP = 0.05
SUITES = 9
EXPECTED = 15
Scores = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int, float], tuple[Scores, Scores]]


@dataclass(frozen=True)
class Population:
    """Items of which before and after are drawn; `draw(generator, n, drop)` takes a true drop off the second."""

    name: str
    mean: float
    churn: float
    """The share of items expected to change when nothing does; 1 where every score does."""
    draw: Draw
    largest: float
    """The largest drop there can be."""

    def has_few(self, n: int, drop: float) -> bool:
        """Whether so few items are expected to change that there are few outcomes."""
        return self.churn < 1 and n * (self.churn + drop) < EXPECTED

    def has_few_scores(self, n: int) -> bool:
        return self.churn < 1 and n * min(self.mean, 1 - self.mean) < EXPECTED


def binary(accuracy: float, correlation: float) -> Population:
    """0/1 scores of which a share of 1 - correlation is drawn anew. A drop takes items that were right both times."""
    stay = accuracy * (correlation + (1 - correlation) * accuracy)

    def draw(generator: np.random.Generator, n: int, drop: float) -> tuple[Scores, Scores]:
        before = generator.random(n) < accuracy
        after = np.where(generator.random(n) < correlation, before, generator.random(n) < accuracy)
        is_lost = before & after & (generator.random(n) < drop / stay)
        return before.astype(float), (after & ~is_lost).astype(float)

    churn = 2 * accuracy * (1 - accuracy) * (1 - correlation)
    return Population(f"0/1, {accuracy:g} right, correlation {correlation:g}", accuracy, churn, draw, stay)


def graded(correlation: float) -> Population:
    """Worth 0, a half or 1 with odds of 1 to 1 to 2. A drop makes some answers worth nothing."""
    values, odds = np.array([0.0, 0.5, 1.0]), np.array([0.25, 0.25, 0.5])
    mean = float(values @ odds)

    def draw(generator: np.random.Generator, n: int, drop: float) -> tuple[Scores, Scores]:
        before = generator.choice(values, n, p=odds)
        after = np.where(generator.random(n) < correlation, before, generator.choice(values, n, p=odds))
        return before, np.where(generator.random(n) < drop / mean, 0.0, after)

    churn = (1 - correlation) * float(1 - odds @ odds)
    return Population(f"0, 1/2 or 1, correlation {correlation:g}", mean, churn, draw, mean)


def continuous(spread: float) -> Population:
    """Scores of an item around its own difficulty, which is skewed. A drop takes the same off every item."""

    def draw(generator: np.random.Generator, n: int, drop: float) -> tuple[Scores, Scores]:
        difficulty = 0.25 + generator.beta(4, 2, n) / 2
        noise = generator.uniform(-spread, spread, (2, n))
        return difficulty + noise[0], difficulty + noise[1] - drop

    return Population(f"continuous, noise of {spread:g}", 0.25 + 2 / 3 / 2, 1.0, draw, 0.25)


POPULATIONS = [
    binary(0.3, 0.5),
    binary(0.6, 0.5),
    binary(0.6, 0.9),
    binary(0.9, 0.5),
    graded(0.5),
    graded(0.9),
    continuous(0.1),
    continuous(0.25),
]
SIZES = (50, 100, 200)
Found = dict[str, Any]


def one_suite(trials: int, seed: int) -> Iterator[Found]:
    """Each population at each size: a measurement without change, then one with the drop that it says is detectable."""
    for place, population in enumerate(POPULATIONS):
        for n in SIZES:
            generator = np.random.default_rng([seed, 0, place, n])
            alarms, found, stated, covered, covered_score = 0, [], [], 0, 0
            for _ in range(trials):
                before, after = population.draw(generator, n, 0.0)
                paired = paired_difference(before, after, resamples=RESAMPLES)
                alarms += paired.verdict == "forgot"
                covered += _covers(paired.ci95, 0.0)
                covered_score += _covers(mean_interval(before, resamples=RESAMPLES), population.mean)
                stated.append(drop := paired.minimum_detectable)
                if drop < population.largest:
                    scores = population.draw(generator, n, drop)
                    found.append(paired_difference(*scores, resamples=RESAMPLES).verdict == "forgot")
            yield {
                "population": population.name,
                "n": n,
                "false_alarms": alarms / trials,
                **_power(stated, found),
                "covered": covered / trials,
                "few_changes": population.has_few(n, 0.0),
                "covered_score": covered_score / trials,
                "few_scores": population.has_few_scores(n),
            }


def dropped(trials: int, seed: int) -> Iterator[Found]:
    """Whether the interval of a drop covers a true one of 0.05."""
    for place, population in enumerate(POPULATIONS):
        for n in SIZES:
            generator, covered = np.random.default_rng([seed, 1, place, n]), 0
            for _ in range(trials):
                before, after = population.draw(generator, n, DROP)
                covered += _covers(drop_interval(before, after, resamples=RESAMPLES), DROP)
            few = population.has_few(n, DROP)
            yield {"population": population.name, "n": n, "covered": covered / trials, "few_changes": few}


def _covers(interval: Interval | None, truth: float) -> bool:
    return interval is not None and interval[0] <= truth <= interval[1]


def family_of(generator: np.random.Generator, n: int, drops: Sequence[float]) -> list[tuple[Scores, Scores]]:
    """Suites of one population after the other, each with its true drop."""
    return [POPULATIONS[i % len(POPULATIONS)].draw(generator, n, drop) for i, drop in enumerate(drops)]


def family_alarms(trials: int, seed: int) -> Iterator[Found]:
    """How often a verdict of any suite, or of all items pooled, is `forgot` though nothing changed."""
    for n in (55,):
        generator, alarms, alone = np.random.default_rng([seed, 2, n]), 0, 0
        for _ in range(trials):
            suites = family_of(generator, n, [0.0] * SUITES)
            found = judge(suites, resamples=RESAMPLES)
            before, after = (np.concatenate(scores) for scores in zip(*suites, strict=True))
            pooled = paired_difference(before, after, resamples=RESAMPLES)
            alarms += any(one.verdict == "forgot" for one in (*found, pooled))
            alone += any(one.p_value < 0.05 and one.drop > 0 for one in found)
        yield {"suites": SUITES, "n": n, "false_alarms": alarms / trials, "if_judged_alone": alone / trials}


def family_power(trials: int, seed: int) -> Iterator[Found]:
    """Whether the drop that one suite of nine states as detectable is found; the others do not change."""
    for place in (1, 4, 7):
        population, n = POPULATIONS[place], 100
        generator, found, stated = np.random.default_rng([seed, 3, place]), [], []
        for _ in range(trials):
            drop = minimum_detectable(*population.draw(generator, n, 0.0), SUITES)
            stated.append(drop)
            if drop < population.largest:
                drops = [drop if i == place else 0.0 for i in range(SUITES)]
                found.append(judge(family_of(generator, n, drops), resamples=RESAMPLES)[place].verdict == "forgot")
        yield {"suites": SUITES, "population": population.name, "n": n, **_power(stated, found)}


def _power(stated: Sequence[float], found: Sequence[bool]) -> Found:
    """Without a figure where some trials state more than the population has to lose: the others are no fair choice."""
    power = float(np.mean(found)) if len(found) >= 0.98 * len(stated) else None
    return {"minimum_detectable": round(float(np.mean(stated)), 4), "power": power}


def broken(results: dict[str, list[Found]], trials: int) -> list[str]:
    """Promises that do not hold, by more than three standard errors of so many trials."""

    def slack(rate: float) -> float:
        return 3 * math.sqrt(rate * (1 - rate) / trials)

    told = []
    for part, rows in results.items():
        for row in rows:
            where = f"{part}, {row.get('population', 'all suites')}, n = {row['n']}"
            if row.get("false_alarms", 0.0) > 0.05 + slack(0.05):
                told.append(f"{where}: {row['false_alarms']:.3f} false alarms")
            if (power := row.get("power")) is not None and power < 0.8 - slack(0.8):
                told.append(f"{where}: power {power:.3f}")
            for covered, few in (("covered", "few_changes"), ("covered_score", "few_scores")):
                if covered in row:
                    highest = 1.0 if row[few] else 0.97 + slack(0.97)
                    if not 0.93 - slack(0.93) <= row[covered] <= highest:
                        told.append(f"{where}: {covered} {row[covered]:.3f}")
    return told


PARTS: dict[str, Callable[[int, int], Iterator[Found]]] = {
    "one_suite": one_suite,
    "dropped": dropped,
    "family_alarms": family_alarms,
    "family_power": family_power,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them; the others' results stay")
    options = parser.parse_args()
    results: dict[str, list[Found]] = {}
    for name in options.parts.split(","):
        part = PARTS[name]
        began, results[name] = time.perf_counter(), []
        for row in part(options.trials, options.seed):
            results[name].append(row)
            print(name, *(f"{key}={value}" for key, value in row.items()), flush=True)
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    told = broken(results, options.trials)
    print("\n".join(told) or "every promise holds")
    if options.trials >= 1_000:
        kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        every = {name: results.get(name) or kept.get(name, []) for name in PARTS}
        document = {"trials": options.trials, "seed": options.seed, "resamples": RESAMPLES, **every}
        document["broken"] = broken(every, options.trials)
        RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    sys.exit(bool(told))


if __name__ == "__main__":
    main()
