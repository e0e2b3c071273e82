"""Comparing models on fixed rows: their logits, what rounding alone may change, and whether packing is exact."""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ftune import attention, last_layer
from ftune.batches import MicroBatch
from ftune.errors import UserError
from ftune.model import decoder_layers, head, hidden_states, is_classifier, is_linear

PROOF_LENGTHS = (3, 17, 33)
"""Lengths of the rows on which packed attention is compared with single rows."""
ROUNDINGS = 8
"""How often one rounding everywhere is the bound; merges lie at 0.9 to 3.7 of it, see NOTES.md."""
SMALLEST_TOLERANCE = 1e-5
UNFIT = (LookupError, TypeError, ValueError, NotImplementedError, RuntimeError)
"""What an architecture raises whose modules do not take what they are given."""


@torch.no_grad()
def logits_of(model: PreTrainedModel, rows: list[list[int]]) -> list[torch.Tensor]:
    """Float32 logits of single rows by the model's own forward, attention and head: the reference for every proof.

    One tensor a row: (tokens, vocabulary), of a classifier (labels,).
    """
    was_training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    result = [model(torch.tensor([row], device=device), use_cache=False).logits[0].float().cpu() for row in rows]
    model.train(was_training)
    return result


def proof_rows(vocab_size: int, max_positions: int | None) -> list[list[int]]:
    """Fixed pseudo-random rows to compare models on."""
    generator = torch.Generator().manual_seed(0)
    lengths = [min(length, max_positions or length) for length in PROOF_LENGTHS]
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


def proof_rows_for(model: PreTrainedModel) -> list[list[int]]:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    rows = proof_rows(vocabulary, getattr(model.config, "max_position_embeddings", None))
    if is_classifier(model):
        # A classifier of transformers takes a padding token for padding wherever it stands.
        pad = model.config.get_text_config().pad_token_id
        rows = [[token if token != pad else (token + 1) % vocabulary for token in row] for row in rows]
    return rows


def max_difference(ours: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    """The largest absolute difference between two lists of logits; infinite when one is not a number."""
    worst = max(float((a - b).abs().max()) for a, b in zip(ours, reference, strict=True))
    return worst if worst == worst else float("inf")


@torch.no_grad()
def tolerance(model: PreTrainedModel, reference: list[torch.Tensor]) -> float:
    """How far equal computations in another order may lie from a model's `reference` logits on the proof rows.

    Some times what moves them when every linear layer rounds another way, up or down at random. So it grows with the
    dtype's rounding and with how much this very model amplifies it.
    """
    generator = torch.Generator().manual_seed(0)

    def round_another_way(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
        return output + signs * rounding(module, inputs[0], output)

    hooks = [m.register_forward_hook(round_another_way) for m in model.modules() if is_linear(m)]
    try:
        moved = max_difference(logits_of(model, proof_rows_for(model)), reference)
    finally:
        for hook in hooks:
            hook.remove()
    return max(SMALLEST_TOLERANCE, ROUNDINGS * moved)


def _is_rounding(difference: float, bound: Callable[[], float]) -> bool:
    """Whether it is within the tolerance; `bound` takes some forward passes, so it is asked only where it decides."""
    return difference <= SMALLEST_TOLERANCE or difference <= bound()


def rounding(module: nn.Module, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """What the last bits of y = W x are worth, of the output's shape: one unit in y's last place, or, where the
    products cancel, one in that of the sum's random walk, sqrt(sum_j (w_ij x_j)^2), in float32, which sums are held in.
    """
    worth = torch.finfo(output.dtype).eps * output.abs()
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return worth
    squares = weight.double() ** 2 if isinstance(module, Conv1D) else (weight.double() ** 2).T
    walk = torch.finfo(torch.float32).eps * ((inputs.double() ** 2) @ squares).sqrt()
    return torch.maximum(worth, walk.to(output.dtype))


@torch.no_grad()
def prove_packing(model: PreTrainedModel, attention_name: str) -> float:
    """Compare packed rows with single rows on this very model; returns the largest logit difference.

    Some architectures accept the replaced attention and are silently wrong, so nothing is packed before this holds.
    Where its last layer gives the same for chosen positions, it computes those alone from now on (`last_layer`).
    """
    rows = proof_rows_for(model)
    reference = logits_of(model, rows)
    bounds = (0, *torch.tensor([len(row) for row in rows]).cumsum(0).tolist())
    device = model.get_input_embeddings().weight.device
    batch = MicroBatch(
        torch.tensor([[token for row in rows for token in row]]),
        torch.tensor([[position for row in rows for position in range(len(row))]]),
        torch.tensor([[-100] * bounds[-1]]),
        bounds,
        (),
    ).to(device)
    try:
        logits = _packed_logits(model, batch, attention_name)
    except UNFIT as error:
        raise _cannot_pack(model, str(error)) from error
    packed = [logits[end - 1] if is_classifier(model) else logits[start:end] for start, end in pairwise(bounds)]
    difference, bound = max_difference(packed, reference), cache(lambda: tolerance(model, reference))
    if not _is_rounding(difference, bound):
        raise _cannot_pack(model, f"logits of packed rows differ from single rows by {difference:.2g}")
    _cut_last_layer(model, batch, attention_name, logits, bound)
    return difference


def _packed_logits(
    model: PreTrainedModel, batch: MicroBatch, attention_name: str, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """(tokens or positions, vocabulary) float32."""
    was_training = model.training
    model.eval()
    try:
        with attention.packed(model, attention_name):
            return head(model)(hidden_states(model, batch, True, positions)).float().cpu()
    finally:
        model.train(was_training)


def _cut_last_layer(
    model: PreTrainedModel,
    batch: MicroBatch,
    attention_name: str,
    logits: torch.Tensor,
    bound: Callable[[], float],
) -> None:
    """Let the last layer compute wanted positions only, where that gives these `logits` there.

    Twice, because a part before the attention would still know the positions of the pass before.
    """
    several = [torch.arange(start, len(batch), 3, device=batch.input_ids.device) for start in (1, 2)]
    try:
        last_layer.cut(model, decoder_layers(model)[1][-1])
        found = [_packed_logits(model, batch, attention_name, positions) for positions in several]
        difference = max_difference(found, [logits[positions.cpu()] for positions in several])
        is_exact = last_layer.has_cut(model) and _is_rounding(difference, bound)
    except (*UNFIT, UserError):
        is_exact = False
    if not is_exact:
        last_layer.leave_whole(model)


def _cannot_pack(model: PreTrainedModel, reason: str) -> UserError:
    return UserError(
        f"rows cannot be packed for {type(model).__name__}: {reason}",
        "data.packing",
        "set data.packing: false to train row by row",
    )
