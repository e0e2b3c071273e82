"""Examples -> optimizer steps -> packed micro-batches. The order is a pure function of seed and epoch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ftune import schedule
from ftune.data import Example, Mixture
from ftune.data.mixture import order

Places = NDArray[np.int64]


@dataclass(frozen=True)
class MicroBatch:
    """Whole examples laid end to end; segment k is `bounds[k]:bounds[k+1]` of the token axis.

    input_ids, position_ids, labels: (1, tokens) int64. Positions restart at 0 in each segment; labels are unshifted,
    -100 where nothing is supervised and at each segment's first token.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    bounds: tuple[int, ...]
    row_ids: tuple[str, ...]
    features: torch.Tensor | None = None
    """(n, width): the states that predict, computed before; then `labels` are their targets, (1, n), and no ids."""

    def __len__(self) -> int:
        """Tokens."""
        return self.bounds[-1]

    @property
    def segment_ids(self) -> list[int]:
        """For each token, which segment it belongs to."""
        lengths = np.diff(self.bounds)
        return [int(i) for i in np.repeat(np.arange(len(lengths)), lengths)]

    @property
    def num_supervised(self) -> int:
        return int((self.labels != -100).sum())

    def to(self, device: torch.device | str) -> "MicroBatch":
        tensors = (self.input_ids.to(device), self.position_ids.to(device), self.labels.to(device))
        features = None if self.features is None else self.features.to(device)
        return MicroBatch(*tensors, self.bounds, self.row_ids, features)


@dataclass(frozen=True)
class Features:
    """What a frozen body makes of all examples: `values[bounds[k]:bounds[k + 1]]` is what example k predicts from.

    values: (n, width), mapped from a file; targets: (n,) what is predicted from each; lengths: tokens of each example.
    """

    values: torch.Tensor
    targets: torch.Tensor
    bounds: Places
    lengths: Places
    row_ids: list[str]

    def micro_batch(self, indices: Sequence[int]) -> MicroBatch:
        """The features of some examples, in that order. Without tokens they are small, so one batch holds a step."""
        chosen = np.asarray(indices)
        starts, counts = self.bounds[chosen], np.diff(self.bounds)[chosen]
        ends = np.cumsum(counts)
        places = torch.from_numpy(np.arange(ends[-1]) + np.repeat(starts - ends + counts, counts))
        nothing = torch.empty(1, 0, dtype=torch.long)
        bounds = (0, *np.cumsum(self.lengths[chosen]).tolist())
        row_ids = tuple(self.row_ids[i] for i in indices)
        return MicroBatch(nothing, nothing, self.targets[places][None], bounds, row_ids, self.values[places])


def collate(examples: Sequence[Example]) -> MicroBatch:
    """Pack examples end to end, without padding: training, evaluation and `ftune inspect` all see this."""
    lengths = [len(example.tokens) for example in examples]
    input_ids = [token for example in examples for token in example.tokens.input_ids]
    labels = [label for example in examples for label in example.tokens.labels]
    positions = [position for length in lengths for position in range(length)]
    return MicroBatch(
        torch.tensor([input_ids]),
        torch.tensor([positions]),
        torch.tensor([labels]),
        tuple(int(bound) for bound in np.cumsum([0, *lengths])),
        tuple(example.row_id for example in examples),
    )


def step_indices(step: int, mixture: Mixture, batch_size: int, seed: int) -> list[int]:
    """Which examples optimizer step `step` (1-based) trains on: all a resumed run needs to go on exactly."""
    epoch, position = divmod(step - 1, schedule.steps_per_epoch(len(mixture), batch_size))
    indices: list[int] = order(mixture, seed, epoch)[position * batch_size : (position + 1) * batch_size].tolist()
    return indices


def share(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Deal examples out to `count` processes so that all have about as many tokens; some may get none.

    Longest first, each to the process with the fewest tokens so far (Graham, 1969). The loss does not depend on it.
    """
    if count == 1:
        return [list(range(len(lengths)))]
    shares: list[list[int]] = [[] for _ in range(count)]
    tokens = [0] * count
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        least = tokens.index(min(tokens))
        shares[least].append(i)
        tokens[least] += lengths[i]
    return shares


def split(lengths: Sequence[int], max_tokens: int, packing: bool = True) -> list[list[int]]:
    """Cut examples into micro-batches of at most `max_tokens` tokens (one example may exceed it), longest first.

    First fit by decreasing length (Johnson, 1973). The loss of a step does not depend on this cut.
    """
    by_length = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if not packing:
        return [[i] for i in by_length]
    groups: list[list[int]] = []
    room: list[int] = []
    for i in by_length:
        for k, free in enumerate(room):
            if lengths[i] <= free:
                groups[k].append(i)
                room[k] -= lengths[i]
                break
        else:
            groups.append([i])
            room.append(max_tokens - lengths[i])
    return groups


def micro_batches(examples: Sequence[Example], max_tokens: int, packing: bool = True) -> Iterator[MicroBatch]:
    """The packed micro-batches of one optimizer step, or of an evaluation."""
    for group in split([len(example.tokens) for example in examples], max_tokens, packing):
        yield collate([examples[i] for i in group])
