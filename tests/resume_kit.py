"""The training stage of a run alone, on a model so small that it can be stopped and resumed at every step."""

import copy
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from conftest import chat, metrics, save_base, write_recipe, write_rows

from ftune import folder, recipe, signals
from ftune.engine import Engine
from ftune.folder import RunFolder
from ftune.run import resuming
from ftune.run.fitting import Circumstances, fit
from ftune.run.inputs import attach_method, digests, load_base, require
from ftune.settings import METHOD_NAMES
from ftune.trackers import Trackers

STEPS = 12
TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
KEYS = ("step", "epoch", "loss", "grad_norm", "learning_rate", "supervised_tokens", "row_ids", "method")
METHODS = {
    "lora": {"rank": 2, "alpha": 4, "dropout": 0.2},
    "qlora": {"rank": 2, "alpha": 4, "dropout": 0.2},
    "dora": {"rank": 2, "alpha": 4, "dropout": 0.2},
    "adalora": {"initial_rank": 4, "target_rank": 2, "dropout": 0.2},
    "vera": {"rank": 8, "dropout": 0.2},
    "bottleneck": {"size": 4},
    "prefix_tuning": {"virtual_tokens": 2, "projection": True},
    "prompt_tuning": {"virtual_tokens": 2, "depth": "deep"},
} | {name: {} for name in ("full", "linear_probe", "ia3", "bitfit")}
assert METHODS.keys() == METHOD_NAMES.keys()
LABELLED = [{"text": "abcdefgh"[i % 5 :] * (1 + i % 3), "label": "xyz"[i % 3]} for i in range(18)]
ASKED = [chat("say " + "abcdefgh"[i % 8] * (1 + i % 5), "abcdefgh"[i % 8] * (1 + i % 3)) for i in range(12)]


def make_place(path: Path) -> Path:
    """A base with biases, two files of rows to be mixed, and one with labels."""
    save_base(path / "base", "qwen2", **TINY, num_key_value_heads=1)
    write_rows(path / "train.jsonl", ASKED)
    write_rows(path / "more.jsonl", [chat(f"what is {i}", "xy" * (1 + i % 2)) for i in range(9)])
    write_rows(path / "labels.jsonl", LABELLED)
    return path


def sections_of(method: str, objective: str = "sft", **training: object) -> dict:
    """Shuffled, mixed by weights, in micro-batches that hold two rows; the last step of an epoch is smaller."""
    mixture = [{"path": "train.jsonl", "weight": 1.5}, {"path": "more.jsonl", "weight": 0.75}]
    # Few rows to a step: every step of a packed run takes two micro-batches or more.
    steps = {"max_steps": STEPS, "batch_size": 4, "micro_batch_tokens": 60, "optimizer": "adamw", "schedule": "cosine"}
    found = {
        "method": {"name": method, **METHODS[method]},
        "training": {**steps, "warmup": 0.2, "weight_decay": 0.1, "learning_rate": 0.02, **training},
        "data": {"train": mixture},
    }
    if objective == "classification":
        more = {"objective": {"name": objective}, "evaluation": {"metric": "accuracy"}}
        return found | more | {"data": {"train": "labels.jsonl"}}
    return found


@dataclass
class Stage:
    """A recipe whose rows and base are read once, to be trained from any checkpoint."""

    place: Path
    sections: dict

    def __post_init__(self):
        self.settings = self.load()
        self.inputs = require(self.settings)
        self.base = load_base(self.settings, self.inputs, Engine().device)
        self.made_from = digests(self.settings, self.inputs)

    def load(self, **training):
        changed = self.sections["training"] | training
        return recipe.load(write_recipe(self.place, **(self.sections | {"training": changed})))

    def train(self, path: Path, watch=None, **training):
        """From the newest checkpoint in a folder to the end, exactly as a run does it."""
        settings = self.load(**training) if training else self.settings
        model = copy.deepcopy(self.base)
        attach_method(settings, self.inputs, model)
        run = RunFolder(path)
        path.mkdir(parents=True, exist_ok=True)
        folder.settle(path)
        folder.settle(run.checkpoints)
        with signals.held() as stop:
            beginning = resuming.begin(run, self.made_from)
            around = Circumstances(beginning, watch, stop, Trackers(settings, run, False, ()))
            fit(settings, self.inputs, model, Engine(), run, around)
        return model


def outcome(path: Path, step: int = STEPS):
    """The bytes of the last checkpoint, and the lines of all steps without their times."""
    last = path / "checkpoints" / f"step-{step:06d}"
    tensors = {file.name: file.read_bytes() for file in last.glob("*.safetensors")}
    return tensors, [[line[key] for key in KEYS] for line in metrics(path)]


def stopped_at(clean: Path, step: int, path: Path) -> Path:
    """A run folder as it was when the run was killed some time after this step's checkpoint."""
    name = f"checkpoints/step-{step:06d}"
    shutil.copytree(clean / name, path / name)
    shutil.copy(clean / "metrics.jsonl", path / "metrics.jsonl")
    return path


@contextmanager
def without_waiting_for_disks(monkeypatch):
    """Syncing changes no byte; a test that saves hundreds of checkpoints can do without."""
    with monkeypatch.context() as patch:
        patch.setattr(folder.os, "fsync", lambda descriptor: None)
        yield
