"""Payloads that leave a mark when they run, the commands that could meet them, and what a folder looked like before."""

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import CHAT_ROWS, save_base, write_recipe, write_rows

from ftune import checkpoint, folder
from ftune.cli import app
from ftune.console import streams
from ftune.errors import FtuneError
from ftune.recipe import load
from ftune.run.training import train_run

PICKLES = (
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "scaler.ckpt",
    "cache.npy",
    "cache.npz",
)
"""What other trainers leave beside weights."""


class Bomb:
    """Unpickled, it creates a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def pickled(path: Path, mark: Path) -> Path:
    """A file as torch.save makes it, which leaves the mark when it is loaded without care."""
    torch.save({"weight": Bomb(mark)}, path)
    return path


def change(path: Path, **values: Any) -> Path:
    """A JSON file with other values; a dotted name goes into it."""
    document = json.loads(path.read_text(encoding="utf-8"))
    for name, value in values.items():
        inner = document
        *around, last = name.split("__")
        for part in around:
            inner = inner.setdefault(part, {})
        inner[last] = value
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Said:
    """How a command ended, and all that it printed."""

    code: int
    text: str


def command(*arguments: object) -> Said:
    """A command in this process, through the very parser and functions of the console script.

    Anything but an FtuneError goes on: what the console script would call unexpected is a fault here.
    """
    out = io.StringIO()
    streams.results.cache_clear()
    streams.messages.cache_clear()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                code = app([str(argument) for argument in arguments], standalone_mode=False) or 0
            except FtuneError as error:
                streams.print_error(error)
                code = int(error.exit_code)
    finally:
        streams.results.cache_clear()
        streams.messages.cache_clear()
    return Said(int(code), out.getvalue())


def tree(*folders: Path, without: Iterable[Path] = ()) -> dict[str, str]:
    """Every file, folder and link below some folders, links not followed, with what it holds."""
    left_out = [str(path) for path in without]
    found = {}
    for top in folders:
        for place, names, files in os.walk(top):
            for name in [*names, *files]:
                path = Path(place, name)
                if any(str(path) == one or str(path).startswith(one + os.sep) for one in left_out):
                    continue
                if path.is_symlink():
                    found[str(path)] = f"link to {os.readlink(path)}"
                elif path.is_dir():
                    found[str(path)] = "folder"
                else:
                    found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def seal(path: Path) -> None:
    """Make a checkpoint's checksums those of its files, whatever they hold."""
    digests = folder.checksums(path, [checkpoint.SUMS])
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    (path / checkpoint.SUMS).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def unchanged(*folders: Path, without: Iterable[Path] = ()) -> Iterator[None]:
    """Inside, nothing below these folders is written, removed or changed; apart from what is left out."""
    before = tree(*folders, without=without)
    yield
    assert tree(*folders, without=without) == before


@dataclass(frozen=True)
class Lab:
    """A base, rows, a recipe, its finished run (`run`), and the same run before it was finished (`half`)."""

    root: Path

    def __getattr__(self, name: str) -> Path:
        return self.root / {"recipe": "recipe.yaml", "unfinished": "half.yaml", "mark": "MARK"}.get(name, name)

    @property
    def commands(self) -> dict[str, list[object]]:
        """Every command that reads a model, rows, a run or an adapter."""
        return {
            "check": ["check", self.recipe],
            "inspect": ["inspect", self.recipe],
            "plan": ["plan", self.recipe],
            "train": ["train", self.recipe, "output.dir=new"],
            "overwrite": ["train", self.recipe, "--overwrite"],
            "resume": ["train", self.unfinished, "--resume"],
            "compare": ["compare", self.recipe, "--methods", "lora"],
            "eval": ["eval", self.run, "--force"],
            "eval an adapter": ["eval", self.run / "adapter", "--recipe", self.recipe, "--force"],
            "merge": ["merge", self.run, "--output", self.root / "out", "--force"],
            "verify": ["verify", self.run, "--force"],
            "generate": ["generate", self.run, "hi", "--max-new-tokens", "2"],
            "generate of a model": ["generate", self.base, "hi", "--max-new-tokens", "2"],
            "verify a model": ["verify", self.base],
            "report": ["report", self.run],
        }


def build(root: Path) -> Lab:
    """A lab as all tests of a file share it; each gets a fresh copy at the same path, which its run's files name."""
    lab = Lab(root)
    root.mkdir()
    save_base(root / "base")
    write_rows(root / "train.jsonl", CHAT_ROWS[:12])
    write_rows(root / "test.jsonl", CHAT_ROWS[12:14])
    sections = {
        "data": {"test": "test.jsonl"},
        "training": {"max_steps": 2, "checkpoint_every": 1},
        "evaluation": {"max_new_tokens": 2},
    }
    text = write_recipe(root, **sections, output={"dir": "half"}).read_text(encoding="utf-8")
    lab.unfinished.write_text(text, encoding="utf-8")
    train_run(load(lab.unfinished))
    train_run(load(write_recipe(root, **sections, output={"dir": "run"})))
    for path in (lab.half / "manifest.json", lab.half / "report.json", lab.half / "checkpoints" / "step-000002"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return lab


def fresh(lab: Lab, kept: Path) -> Lab:
    """The lab as it was built."""
    if lab.root.exists():
        shutil.rmtree(lab.root)
    shutil.copytree(kept, lab.root)
    return lab


def refused(lab: Lab, names: Iterable[str], told: str) -> None:
    """Every one of these commands refuses, says why, leaves no mark and writes nothing."""
    assert not lab.mark.exists()
    for name in names:
        with unchanged(lab.root.parent):
            said = command(*lab.commands[name])
        # `ftune verify` tells every check, the one that could not be made as one that failed.
        assert said.code == 2 or (said.code == 1 and name.startswith("verify")), (name, said)
        assert told in " ".join(said.text.split()), (name, said.text)
        assert not lab.mark.exists(), name
