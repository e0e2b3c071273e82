"""Virtual tokens in front of every sample, for prefix and prompt tuning: hooks on the decoder, unseen from outside.

Packed micro-batches get them in front of each segment; rows padded on the left, in front of the padding; a cache gets
them once, when it is empty. Positions of the real tokens begin after them, and the last hidden state is that of the
real tokens alone.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from transformers import PreTrainedModel

from ftune.errors import UserError
from ftune.last_layer import KEYWORD
from ftune.methods import base

Keywords = dict[str, Any]


def with_keywords(arguments: tuple[Any, ...], keywords: Keywords) -> Keywords:
    """Some architectures hand the token ids to their decoder by position."""
    return {**({"input_ids": arguments[0]} if arguments else {}), **keywords}


def shift_positions(keywords: Keywords, count: int) -> None:
    """Real tokens begin after `count` virtual ones, whoever counts."""
    for name in ("position_ids", "cache_position"):
        if keywords.get(name) is not None:
            keywords[name] = keywords[name] + count


def extend_mask(keywords: Keywords, count: int) -> None:
    """Every token sees the virtual ones: (batch, tokens) -> (batch, count + tokens)."""
    mask = keywords.get("attention_mask")
    if mask is not None:
        if mask.ndim != 2:
            what = "virtual tokens cannot be put in front of rows with an attention mask of their own making"
            raise UserError(what, "method.name", "take a method that puts nothing in front of the text")
        keywords["attention_mask"] = torch.cat([mask.new_ones(len(mask), count), mask], dim=1)


def is_first_pass(keywords: Keywords) -> bool:
    """Whether no virtual tokens lie in the cache yet."""
    cache = keywords.get("past_key_values")
    return cache is None or cache.get_seq_length() == 0


def hook(model: PreTrainedModel, before: Callable[[Keywords], Keywords], after: Callable[[Any], Any]) -> None:
    """Let `before` change the decoder's keyword arguments, and `after` its output."""
    decoder = model.base_model
    decoder.register_forward_pre_hook(
        lambda module, arguments, keywords: ((), before(with_keywords(arguments, keywords))), with_kwargs=True
    )
    decoder.register_forward_hook(lambda module, inputs, output: after(output))


class InFront:
    """Prompt embeddings put in front of the input: (count, width), one set for all samples."""

    def __init__(self, model: PreTrainedModel, count: int) -> None:
        self.model, self.count = model, count
        self.virtual: torch.Tensor | None = None
        """Where the virtual tokens of the current pass lie on the token axis; None where there are none."""
        self.real: torch.Tensor | None = None
        hook(model, self.before, self.after)

    def prompt(self) -> torch.Tensor:
        prompt: torch.Tensor = self.model.prompt_embeddings
        return prompt if prompt.ndim == 2 else prompt[0]

    def before(self, keywords: Keywords) -> Keywords:
        self.virtual = self.real = None
        if (bounds := keywords.get("segment_bounds")) is not None:
            return self.into_segments(keywords, bounds)
        extend_mask(keywords, self.count)
        if not is_first_pass(keywords):
            shift_positions(keywords, self.count)
            return keywords
        ids = keywords.pop("input_ids")
        self.set_places([(0, self.count + ids.shape[1])], ids.device)
        self.put_in_front(keywords, ids, [(0, ids.shape[1])])
        return keywords

    def into_segments(self, keywords: Keywords, bounds: tuple[int, ...]) -> Keywords:
        """input_ids: (1, tokens) -> inputs_embeds: (1, tokens + count for each segment, width), with new bounds."""
        moved = tuple(bound + k * self.count for k, bound in enumerate(bounds))
        ids = keywords.pop("input_ids")
        self.set_places(list(pairwise(moved)), ids.device)
        self.put_in_front(keywords, ids, list(pairwise(bounds)))
        keywords["segment_bounds"] = moved
        if KEYWORD in keywords:
            assert self.real is not None
            keywords[KEYWORD] = self.real[keywords[KEYWORD]]
        return keywords

    def set_places(self, segments: list[tuple[int, int]], device: torch.device) -> None:
        virtual = [torch.arange(start, start + self.count, device=device) for start, _ in segments]
        real = [torch.arange(start + self.count, end, device=device) for start, end in segments]
        self.virtual, self.real = torch.cat(virtual), torch.cat(real)

    def put_in_front(self, keywords: Keywords, ids: torch.Tensor, segments: list[tuple[int, int]]) -> None:
        embedded = self.model.get_input_embeddings()(ids)
        prompt = self.prompt().to(embedded.dtype).expand(len(ids), -1, -1)
        positions = keywords.get("position_ids")
        parts, places = [], []
        for start, end in segments:
            parts += [prompt, embedded[:, start:end]]
            if positions is not None:
                own = positions[:, start:end] + self.count
                places += [torch.arange(self.count, device=ids.device).expand(len(own), -1), own]
        keywords["inputs_embeds"] = torch.cat(parts, dim=1)
        if positions is not None:
            keywords["position_ids"] = torch.cat(places, dim=1)
        keywords.pop("cache_position", None)

    def after(self, output: Any) -> Any:
        if self.real is not None:
            output.last_hidden_state = output.last_hidden_state[:, self.real]
        return output


def vocabulary_ids(model: PreTrainedModel, count: int, seed: int) -> torch.Tensor:
    """Random tokens that the prompt may start as: (count,)."""
    weight = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(weight.shape[0], (count,), generator=generator).to(weight.device)


def save_under_peft_name(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """PEFT writes prompts and prefixes as one tensor without its wrappers' names."""
    return {"prompt_embeddings": model.prompt_embeddings.detach()}


def load_from_peft_name(model: PreTrainedModel, found: Any) -> None:
    base.copy_strictly({"prompt_embeddings": model.prompt_embeddings}, found)
