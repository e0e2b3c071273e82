"""The tasks that methods are measured on: the quickstart, and two real sets that lie below $FTUNE_REAL_DATA.

Banking77 (Casanueva et al. 2020, CC-BY-4.0): 77 intents of customers' questions. E2E NLG (Novikova et al. 2017,
CC-BY-SA-4.0): a meaning representation into a sentence; no representation of the test set occurs in training.
"""

import csv
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[1]
BANKING_ROWS, BANKING_TEST = 4000, 1000
REHEARSED = 200
"""Rows of each skill; the shipped recipe rehearses those that are hard to keep more often."""
E2E_ROWS, E2E_TEST = 1500, 30
"""Training rows, and meaning representations that are kept for the test set; each has several sentences."""


def real_data() -> Path:
    if not (found := os.environ.get("FTUNE_REAL_DATA")):
        raise SystemExit("set FTUNE_REAL_DATA to the folder of the real models and data sets")
    return Path(found)


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def write_table(path: Path, rows: list[dict[str, str]]) -> str:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path.name


def quickstart(folder: Path) -> Path:
    """The shipped recipe with a smaller rehearsal, of every skill as many rows: nothing but the method is changed."""
    sys.path.append(str(REPOSITORY / "scripts"))
    from make_quickstart_data import SEED, make_rehearsal

    parts = REPOSITORY / "recipes" / "quickstart"
    rows = make_rehearsal(REHEARSED, SEED, parts / "probe.jsonl", {})
    (folder / "rehearsal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = yaml.safe_load((REPOSITORY / "recipes" / "quickstart.yaml").read_text(encoding="utf-8"))
    recipe["model"] = str(parts / "base")
    recipe["data"] |= {"train": [str(parts / "train.jsonl"), "rehearsal.jsonl"], "test": str(parts / "test.jsonl")}
    recipe["evaluation"]["probe"] = str(parts / "probe.jsonl")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def banking77(folder: Path, model: str = "stories260K") -> Path:
    """Which of 77 intents a question has."""
    rows = read_table(real_data() / "data" / "banking77" / "train.csv")
    random.Random(0).shuffle(rows)
    chosen = rows[: BANKING_ROWS + BANKING_TEST]
    return _recipe(folder, chosen[BANKING_TEST:], chosen[:BANKING_TEST], {
        "model": str(real_data() / "models" / model),
        "objective": "classification",
        "data": {"columns": {"text": "text", "label": "category"}, "max_length": 128, "too_long": "truncate"},
    })  # fmt: skip


def banking77_gpt2(folder: Path) -> Path:
    """The same on a GPT-2, which has biases."""
    return banking77(folder, "slm4096-gpt2-char")


def e2e_nlg(folder: Path) -> Path:
    """Sentences from meaning representations, measured by the loss per token: the model is too small to be scored."""
    rows = read_table(real_data() / "data" / "e2e_nlg" / "dev.csv")
    meanings = sorted({row["mr"] for row in rows})
    kept = set(random.Random(0).sample(meanings, E2E_TEST))
    train, test = ([row for row in rows if (row["mr"] in kept) == held] for held in (False, True))
    return _recipe(folder, random.Random(0).sample(train, E2E_ROWS), test, {
        "model": str(real_data() / "models" / "stories260K"),
        "data": {"columns": {"prompt": "mr", "completion": "ref"}, "max_length": 400},
        "training": {"epochs": 1},
        "evaluation": {"metric": "loss"},
    })  # fmt: skip


def _recipe(folder: Path, train: list[dict[str, str]], test: list[dict[str, str]], sections: dict[str, Any]) -> Path:
    data = {"train": write_table(folder / "train.csv", train), "test": write_table(folder / "test.csv", test)}
    path = folder / "recipe.yaml"
    document = {**sections, "method": "lora", "data": {**data, **sections["data"]}}
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return path


TASKS = {"quickstart": quickstart, "banking77": banking77, "banking77, GPT-2": banking77_gpt2, "e2e_nlg": e2e_nlg}
