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

from ftune.report.curves import Across, Series, chart

RESULTS = REPOSITORY / "benchmarks" / "results" / "growth.json"
PICTURE = REPOSITORY / "docs" / "images" / "growth.svg"
LENGTH, BATCH, STEPS = 180, 8, 5
AXES: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "rows": [(steps * BATCH, {"steps": steps + 1}) for steps in (8, 16, 32)],
    # Every size of a product in 16 bits costs memory on a CPU, and here no two micro-batches are alike.
    "rows in bfloat16": [
        (steps * BATCH, {"steps": steps + 1, "dtype": "bfloat16", "length": None}) for steps in (8, 16, 32, 64)
    ],
    # As many tokens in a step, whatever the length of its rows.
    "tokens a row": [(length, {"length": length, "batch_size": 1440 // length}) for length in (90, 180, 360, 720)],
    "rank": [(rank, {"rank": rank}) for rank in (4, 16, 64, 256)],
    "layers": [(layers, {"layers": layers}) for layers in (2, 4, 8, 16)],
}
"""What grows -> its values, and the case of each. The first step of a run is not timed."""


def measure(axis: str, num_runs: int) -> list[dict[str, Any]]:
    """The median seconds and peak bytes at each value, and how often the seconds before: the median over the rounds,
    because this machine's speed changes from one to the next."""
    found: dict[int, list[dict[str, Any]]] = {value: [] for value, _ in AXES[axis]}
    for number in range(num_runs):
        for value, changes in AXES[axis]:
            found[value].append(
                run({"side": "ftune", "length": LENGTH, "batch_size": BATCH, "steps": STEPS, **changes})
            )
            print(f"{number + 1} {axis} {value}: {seconds(found[value][-1]):.2f} s", file=sys.stderr, flush=True)
    points: list[dict[str, Any]] = []
    for value, those in found.items():
        taken = [seconds(one) for one in those]
        before = points[-1]["runs"] if points else None
        points.append(
            {
                "value": value,
                "tokens": those[0]["tokens"],
                "seconds": median(taken),
                "times_before": before and median(now / then for now, then in zip(taken, before, strict=True)),
                "peak_bytes": median(one["peak_bytes"] for one in those),
                "runs": taken,
            }
        )
    return points


def seconds(one: dict[str, Any]) -> float:
    return float(one["tokens"] / one["tokens_per_second"])


def draw(axes: dict[str, list[dict[str, Any]]]) -> str:
    """Time above memory along each axis, from zero, so that what is in proportion looks like it: an SVG."""
    parts = []
    for column, (axis, points) in enumerate(axes.items()):
        is_of_rows = axis.startswith("rows")
        tokens = [point["tokens"] if is_of_rows else 1440 for point in points]
        seconds = [count * point["seconds"] / point["tokens"] for count, point in zip(tokens, points, strict=True)]
        unit = "seconds" if is_of_rows else "seconds for 1,440 tokens"
        gigabytes = [point["peak_bytes"] / 1e9 for point in points]
        values = [point["value"] for point in points]
        for row, (title, heights) in enumerate(((unit, seconds), ("peak memory, GB", gigabytes))):
            parts.append(panel(axis, title, list(zip(values, heights, strict=True)), 290 * column + 45, 230 * row + 30))
    size = f"{290 * len(axes) + 20} 480"
    style = "text{font:12px sans-serif;fill:#555}path{fill:none;stroke:#2a6f97}line{stroke:#999;stroke-opacity:.4}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}"><style>{style}</style>{"".join(parts)}</svg>\n'
    )


def panel(axis: str, title: str, points: list[tuple[float, float]], left: float, top: float) -> str:
    """One curve with its axes, 220 wide and 150 high."""
    drawn = chart(title, "", [Series("", "line", points), Series("", "dots", points)], False, Across(axis))
    assert drawn is not None
    parts = [f'<text y="-8">{title}</text><text x="220" y="185" text-anchor="end">{axis}</text>']
    for tick in drawn.y_ticks:
        y = 1.5 * tick.place
        parts.append(f'<line x2="220" y1="{y:.1f}" y2="{y:.1f}"/><text x="-6" y="{y + 4:.1f}" text-anchor="end">')
        parts.append(f"{tick.label}</text>")
    for tick in drawn.x_ticks:
        parts.append(f'<text x="{2.2 * tick.place:.1f}" y="168" text-anchor="middle">{tick.label}</text>')
    for _, kind, path in drawn.paths:
        stroke = 'stroke-linecap="round" stroke-width="8"' if kind == "dots" else 'stroke-width="2"'
        shape = f'<path d="{path}" {stroke} vector-effect="non-scaling-stroke"/>'
        parts.append(f'<g transform="scale(.22 .15)">{shape}</g>')
    return f'<g transform="translate({left} {top})">{"".join(parts)}</g>'


def table(axes: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| what grows | to | tokens | seconds | times the line above | us a token | peak MB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for axis, points in axes.items():
        for point in points:
            times = f"{point['times_before']:.2f}" if point["times_before"] else ""
            lines.append(
                f"| {axis} | {point['value']} | {point['tokens']:,} | {point['seconds']:.2f} | {times} "
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
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(draw(axes), encoding="utf-8")
    print(table(axes))


if __name__ == "__main__":
    main()
