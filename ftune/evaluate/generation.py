"""Greedy answers, in batches that change nothing: what a prompt gets alone it gets among others."""

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ftune import chat
from ftune.console.progress import task_progress
from ftune.plan import GENERATION_TOKENS


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    description: str,
) -> list[str]:
    """The greedy answer to each prompt as text, up to the end of its turn."""
    ids = generate_ids(model, tokenizer, prompts, max_new_tokens, description)
    return [tokenizer.decode(answer, skip_special_tokens=False) for answer in ids]


@torch.no_grad()
def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    description: str,
) -> list[list[int]]:
    """The token ids of the greedy answer to each prompt, up to the end of its turn and without it.

    Prompts are padded on the left and masked.
    """
    was_training, own_config = model.training, model.generation_config
    model.eval()
    device = model.get_input_embeddings().weight.device
    # A base may ship sampling or penalties of its own; what is measured is the plain greedy answer.
    model.generation_config = GenerationConfig()
    stops = chat.end_of_turn_ids(tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0]
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stops or None, pad_token_id=pad, use_cache=True
    )
    answers: list[list[int]] = [[] for _ in prompts]
    with task_progress(description, len(prompts)) as progress:
        for group in _batches([len(prompt) for prompt in prompts], max_new_tokens):
            width = max(len(prompts[i]) for i in group)
            padded = [[pad] * (width - len(prompts[i])) + prompts[i] for i in group]
            mask = [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in group]
            output = model.generate(
                torch.tensor(padded, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=settings,
            )
            for i, row in zip(group, output[:, width:].tolist(), strict=True):
                end = next((k for k, token in enumerate(row) if token in stops), len(row))
                answers[i] = row[:end]
            progress.advance(len(group))
    model.generation_config = own_config
    model.train(was_training)
    return answers


def _batches(lengths: Sequence[int], new_tokens: int) -> list[list[int]]:
    """Prompts of like length together, so that left padding is short."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if groups and (len(groups[-1]) + 1) * (lengths[i] + new_tokens) <= GENERATION_TOKENS:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
