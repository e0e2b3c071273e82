"""Products of few sizes, where every size costs time and memory once and for all.

For 16 bits on a CPU, oneDNN compiles a product for every number of rows that it meets, and keeps it: about half a
millisecond and 0.6 MB each, over a run more than a gigabyte (NOTES.md). So sizes are filled up to a multiple. A packed
pass gets a segment of its own at the end, which no other sees and nothing reads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from ftune.last_layer import KEYWORD

MULTIPLE = 32
OF_TOKENS = ("input_ids", "inputs_embeds", "position_ids")
"""A decoder's keyword arguments of shape (1, tokens, ...)."""


def costs(states: torch.Tensor) -> bool:
    """Whether every size of a product of such states costs anything."""
    return states.device.type == "cpu" and states.dtype.itemsize == 2


def missing(size: int) -> int:
    """So many more make it a multiple."""
    return -size % MULTIPLE


def filled(values: torch.Tensor, more: int, dim: int = 0) -> torch.Tensor:
    """The first value again and again at the end."""
    shape = [more if axis == dim else -1 for axis in range(values.ndim)]
    return torch.cat([values, values.narrow(dim, 0, 1).expand(shape)], dim=dim)


@contextmanager
def few_sizes(model: PreTrainedModel) -> Iterator[None]:
    """Inside, packed passes are filled up where their sizes cost anything."""
    if not costs(model.get_input_embeddings().weight):
        yield
        return
    tokens = 0

    def fill(decoder: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
        nonlocal tokens
        tokens = keywords["segment_bounds"][-1]
        return arguments, _fill(keywords)

    def cut(decoder: Any, arguments: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[:, :tokens]
        return output

    # Behind the hooks of a method, which may put virtual tokens into the input.
    handles = (
        model.base_model.register_forward_pre_hook(fill, with_kwargs=True),
        model.base_model.register_forward_hook(cut),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _fill(keywords: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a packed pass, of more tokens and more wanted positions."""
    bounds = keywords["segment_bounds"]
    size = bounds[-1] + missing(bounds[-1])
    changed = dict(keywords)
    if size > bounds[-1]:
        given = {name: keywords[name] for name in OF_TOKENS if keywords.get(name) is not None}
        changed |= {name: filled(value, size - bounds[-1], 1) for name, value in given.items()}
        changed["segment_bounds"] = (*bounds, size)
    if (wanted := keywords.get(KEYWORD)) is not None:
        is_free = torch.ones(size, dtype=torch.bool)
        is_free[wanted] = False
        changed[KEYWORD] = torch.cat([wanted, is_free.nonzero()[: missing(len(wanted)), 0]])
    return changed
