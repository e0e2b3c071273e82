"""How the time and the memory of LoRA training grow with the rows, their length, the rank and the layers.

    python benchmarks/growth.py --runs 5

Along each axis everything else stays; every point is the median of interleaved runs, each in a process of its own.
Writes benchmarks/results/growth.json, and draws docs/images/growth.svg. Wants an idle machine.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from speed import REPOSITORY, run, versions

RESULTS = REPOSITORY / "benchmarks" / "results" / "growth.json"
PICTURE = REPOSITORY / "docs" / "images" / "growth.svg"
LENGTH, BATCH, STEPS = 180, 8, 5
AXES: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "rows": [(steps * BATCH, {"steps": steps + 1}) for steps in (4, 8, 16)],
    # As many tokens in a step, whatever the length of its rows.
    "tokens a row": [(length, {"length": length, "batch_size": 1440 // length}) for length in (90, 180, 360, 720)],
    "rank": [(rank, {"rank": rank}) for rank in (4, 16, 64, 256)],
    "layers": [(layers, {"layers": layers}) for layers in (2, 4, 8, 16)],
}
"""What grows -> its values, and the case of each. The first step of a run is not timed."""


def measure(axis: str, num_runs: int) -> list[dict[str, Any]]:
    """The median seconds and peak bytes at each value."""
    found: dict[int, list[dict[str, Any]]] = {value: [] for value, _ in AXES[axis]}
    for number in range(num_runs):
        for value, changes in AXES[axis]:
            found[value].append(
                run({"side": "ftune", "length": LENGTH, "batch_size": BATCH, "steps": STEPS, **changes})
            )
            print(f"{number + 1} {axis} {value}: {seconds(found[value][-1]):.2f} s", file=sys.stderr, flush=True)
    return [
        {
            "value": value,
            "tokens": those[0]["tokens"],
            "seconds": median(seconds(one) for one in those),
            "peak_bytes": median(one["peak_bytes"] for one in those),
        }
        for value, those in found.items()
    ]


def seconds(one: dict[str, Any]) -> float:
    return float(one["tokens"] / one["tokens_per_second"])


def draw(axes: dict[str, list[dict[str, Any]]]) -> None:
    """Time and memory along each axis, from zero, so that what is in proportion looks like it."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "growth"
    from matplotlib import pyplot

    size = (3 * len(axes), 5)
    figure, places = pyplot.subplots(2, len(axes), figsize=size, squeeze=False, layout="constrained")
    for (time_of, memory_of), (axis, points) in zip(places.T, axes.items(), strict=True):
        values = [point["value"] for point in points]
        per_step = [1440 * point["seconds"] / point["tokens"] for point in points]
        times = [point["seconds"] for point in points] if axis == "rows" else per_step
        time_of.plot(values, times, marker="o", color="#2a6f97")
        memory_of.plot(values, [point["peak_bytes"] / 1e9 for point in points], marker="o", color="#a4508b")
        time_of.set(title=axis, ylabel="seconds" if axis == "rows" else "seconds for 1,440 tokens")
        memory_of.set(xlabel=axis, ylabel="peak memory, GB")
        for place in (time_of, memory_of):
            place.set(xlim=(0, max(values) * 1.05), ylim=(0, place.get_ylim()[1] * 1.1))
            place.grid(alpha=0.3)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, metadata={"Date": None})


def table(axes: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| what grows | to | tokens | seconds | us a token | peak MB |", "|---|---:|---:|---:|---:|---:|"]
    for axis, points in axes.items():
        for point in points:
            lines.append(
                f"| {axis} | {point['value']} | {point['tokens']:,} | {point['seconds']:.2f} "
                f"| {1e6 * point['seconds'] / point['tokens']:.0f} | {point['peak_bytes'] / 1e6:,.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", default=",".join(AXES), help=f"of {', '.join(AXES)}; several with commas between")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    known = json.loads(options.results.read_text()) if options.results.is_file() else {"axes": {}}
    for axis in options.axes.split(",") if options.runs else []:
        known["axes"][axis] = measure(axis, options.runs)
        known |= {"runs": options.runs, "versions": versions()}
        options.results.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    axes = {axis: known["axes"][axis] for axis in AXES if axis in known["axes"]}
    draw(axes)
    print(table(axes))


if __name__ == "__main__":
    main()
