"""Features: what a frozen body makes of every example, computed in one pass and kept in a file that is mapped.

A folder of the cache is named by the hash of everything that shaped its contents, and appears complete or not at all.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ftune import batches, folder
from ftune.batches import Features, MicroBatch, Places
from ftune.console.progress import task_progress
from ftune.console.streams import note, warn
from ftune.data import Example
from ftune.errors import UserError
from ftune.model import hidden_states, versions
from ftune.objectives.base import Objective
from ftune.quantities import format_count, format_duration
from ftune.train import TrainingPlan, attending, keep_freed_memory

VALUES = "values.bin"
"""The states, row after row, as the machine holds them."""
FACTS = "facts.json"


@dataclass(frozen=True)
class Source:
    """What makes features: a model whose body is `made_from` these files, and what the objective looks at."""

    model: PreTrainedModel
    objective: Objective
    plan: TrainingPlan
    made_from: Mapping[str, Any]
    after_batch: Callable[[], None] = lambda: None
    """Called after each micro-batch; what it raises ends the pass and leaves nothing in the cache."""

    def facts(self, rows: str, count: int) -> dict[str, Any]:
        """Everything that shapes the features of some rows: `count` states."""
        weight, plan = self.model.get_input_embeddings().weight, self.plan
        return {
            "made_from": {**self.made_from, "versions": versions(), "rows": rows},
            "dtype": str(weight.dtype),
            "device": weight.device.type,
            "attention": plan.attention,
            "packing": plan.packing,
            "micro_batch_tokens": plan.micro_batch_tokens,
            "shape": [count, self.model.config.get_text_config().hidden_size],
        }


def features_of(source: Source, examples: Sequence[Example]) -> Features:
    """The features of all examples: from the cache where everything that shaped them is the same, else computed."""
    whole = batches.collate(examples)
    positions, targets = source.objective.places(whole)
    bounds = np.searchsorted(positions.numpy(), np.asarray(whole.bounds))
    facts = source.facts(_digest(whole, positions), len(positions))
    path = folder.cache_folder("features") / folder.sha256_json(facts)
    if is_whole(path, facts):
        note(f"features of {format_count(len(examples))} rows found in {path}: the pass is skipped")
    else:
        began = time.perf_counter()
        _write(path, facts, lambda values: _compute(values, source, examples, bounds))
        told = format_duration(time.perf_counter() - began)
        note(f"features of {format_count(len(examples))} rows computed in {told}, kept in {path}")
    values = _map(path / VALUES, facts, is_new=False)
    return Features(values, targets, bounds, np.diff(whole.bounds), [example.row_id for example in examples])


def _digest(whole: MicroBatch, positions: torch.Tensor) -> str:
    """sha256 of the rows: their token ids, where each ends, and which positions are looked at."""
    digest = hashlib.sha256()
    for part in (whole.input_ids.numpy(), np.asarray(whole.bounds), positions.numpy()):
        digest.update(f"{part.shape}".encode() + part.astype(np.int64).tobytes())
    return digest.hexdigest()


def is_whole(path: Path, facts: Mapping[str, Any]) -> bool:
    """Whether these very features lie there: same facts, right size, right checksum."""
    if not (path / FACTS).is_file() or not (path / VALUES).is_file():
        return False
    with suppress(UserError):
        if folder.read_json(path / FACTS) == {**facts, "sha256": folder.sha256_file(path / VALUES)}:
            return True
    warn(f"the cached features in {path} are damaged and are computed again")
    return False


def _map(path: Path, facts: Mapping[str, Any], is_new: bool) -> torch.Tensor:
    """A file as a tensor; a new file is filled by writing to it."""
    dtype = getattr(torch, facts["dtype"].removeprefix("torch."))
    count, width = facts["shape"]
    return torch.from_file(str(path), shared=is_new, size=count * width, dtype=dtype).view(count, width)


def _write(path: Path, facts: Mapping[str, Any], fill: Callable[[torch.Tensor], None]) -> None:
    with folder.new_in_cache(path) as new:
        fill(_map(new / VALUES, facts, is_new=True))
        folder.write_json(new / FACTS, {**facts, "sha256": folder.sha256_file(new / VALUES)})


@torch.no_grad()
def _compute(values: torch.Tensor, source: Source, examples: Sequence[Example], bounds: Places) -> None:
    """One pass over all examples, in evaluation mode: no dropout, no gradient."""
    model, plan = source.model, source.plan
    was_training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    if device.type == "cpu":
        keep_freed_memory()
    groups = batches.split([len(example.tokens) for example in examples], plan.micro_batch_tokens, plan.packing)
    with (
        attending(model, plan.packing, plan.attention),
        task_progress("features", len(examples)) as progress,
    ):
        for group in groups:
            batch = batches.collate([examples[i] for i in group]).to(device)
            states = hidden_states(model, batch, plan.packing, source.objective.places(batch)[0]).cpu()
            counts = [int(bounds[i + 1] - bounds[i]) for i in group]
            for i, part in zip(group, torch.split(states, counts), strict=True):
                values[bounds[i] : bounds[i + 1]] = part
            progress.advance(len(group))
            source.after_batch()
    model.train(was_training)
