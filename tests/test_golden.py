"""Golden losses: a tiny run of each method, digit by digit. They change on purpose only: `scripts/test --golden`."""

from pathlib import Path

import pytest
from conftest import write_recipe

from ftune import folder, recipe
from ftune.run.training import train_run

GOLDEN = Path(__file__).parent / "golden"
METHODS = {
    "lora": {"name": "lora", "rank": 4, "alpha": 8, "dropout": 0.1},
    "full": {"name": "full"},
    "dora": {"name": "dora", "rank": 4, "dropout": 0.1},
    "adalora": {"name": "adalora", "initial_rank": 4, "target_rank": 2},
    "vera": {"name": "vera", "rank": 16},
    "ia3": {"name": "ia3"},
    "bottleneck": {"name": "bottleneck", "size": 8},
    "prefix_tuning": {"name": "prefix_tuning", "virtual_tokens": 3},
    "prompt_tuning": {"name": "prompt_tuning", "virtual_tokens": 3},
}


@pytest.mark.parametrize("name", METHODS)
def test_losses_are_the_golden_ones(workspace, request, name):
    loaded = recipe.load(
        write_recipe(
            workspace, method=METHODS[name], training={"max_steps": 8, "schedule": "cosine", "optimizer": "adamw"}
        )
    )
    train_run(loaded)
    lines = folder.read_json_lines(loaded.output.dir / "metrics.jsonl")
    figures = [f"{line['loss']:.9g} {line['grad_norm']:.9g}" for line in lines]
    file = GOLDEN / f"{name}.txt"
    if request.config.getoption("--golden"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(figures) + "\n")
    golden = [[float(figure) for figure in line.split()] for line in file.read_text().splitlines()]
    ours = [[float(figure) for figure in line.split()] for line in figures]
    # Processors sum in different orders: the same to the last digit on one machine, to 1e-5 on any.
    assert len(ours) == len(golden)
    assert all(a == pytest.approx(b, rel=1e-5) for a, b in zip(ours, golden, strict=True))
