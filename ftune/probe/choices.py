"""Choices scored by how likely a model finds them, with lm-eval's tokens and lm-eval's normalization."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ftune import batches, chat, loss
from ftune.console.progress import task_progress
from ftune.data import BadRow
from ftune.objectives import sft
from ftune.probe.items import Choice
from ftune.train import TrainingPlan, attending

DELIMITER = " "
"""Between a plain prompt and a choice. A chat template writes what stands there itself."""


@dataclass(frozen=True)
class Weighed:
    """The log-probability of each choice of one item: the sum over its tokens, in nats."""

    sums: tuple[float, ...]
    lengths: tuple[int, ...]
    """Characters of each choice."""

    @property
    def by_sum(self) -> int:
        """What `acc` takes for the model's choice; of equals the first."""
        return int(np.argmax(self.sums))

    @property
    def by_character(self) -> int:
        """What `acc_norm` takes: long choices are not less likely for being long."""
        return int(np.argmax(np.array(self.sums) / np.array(self.lengths, dtype=np.float64)))


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> chat.Tokens:
    """The tokens of a context and what follows it, of which the latter are supervised.

    As lm-eval cuts them: white space at the end of the context belongs to what follows, both are tokenized together,
    and what follows begins where the context's own tokens end. Raises BadRow where no token is left for it.
    """
    trailing = len(context) - len(context.rstrip())
    if trailing:
        context, continuation = context[:-trailing], context[-trailing:] + continuation
    before = _encode(tokenizer, context)
    after = _encode(tokenizer, context + continuation)[len(before) :]
    if not before or not after:
        raise BadRow(f"no token of {continuation!r} can be told from those of its prompt", "write them another way")
    return chat.Tokens(before + after, [False] * len(before) + [True] * len(after))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokenizer's own special tokens are added, unless the text begins with the first of them already.

    A tokenizer that ends every text with an end-of-sequence token would have it stand between prompt and choice, so it
    is taken away there.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=not starts_with_bos(tokenizer, text))["input_ids"]
    is_closed = ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(tokenizer.eos_token or "\0")
    return ids[:-1] if is_closed else ids


def starts_with_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether the text, as a chat template wrote it, has the beginning-of-sequence token already."""
    first = tokenizer.bos_token or tokenizer.eos_token
    return bool(first) and text.startswith(first)


@torch.no_grad()
def weigh(
    model: PreTrainedModel, items: Sequence[Choice], plan: TrainingPlan, description: str = "choices"
) -> list[Weighed]:
    """Every choice of every item, in packed micro-batches; logits are computed where a choice is predicted and nowhere
    else."""
    candidates = [candidate for item in items for candidate in item.candidates]
    sums = np.zeros(len(candidates))
    groups = batches.split([len(c.tokens) for c in candidates], plan.micro_batch_tokens, plan.packing)
    device = model.get_input_embeddings().weight.device
    was_training = model.training
    model.eval()
    with attending(model, plan.packing, plan.attention), task_progress(description, len(candidates)) as progress:
        for group in groups:
            batch = batches.collate([candidates[i] for i in group]).to(device)
            positions, _ = loss.predicting_positions(batch.labels)
            segments = np.searchsorted(batch.bounds, positions.cpu().numpy(), side="right") - 1
            losses = sft.token_losses(model, batch, plan.packing).double().cpu().numpy()
            sums[group] = -np.bincount(segments, losses, minlength=len(group))
            progress.advance(len(group))
    model.train(was_training)
    ends = np.cumsum([len(item.candidates) for item in items])
    lengths = (tuple(len(choice) for choice in item.item.choices) for item in items)
    return [
        Weighed(tuple(map(float, part)), length)
        for part, length in zip(np.split(sums, ends[:-1]) if items else (), lengths, strict=True)
    ]
