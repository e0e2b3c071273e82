"""Generation and scoring: the same prompts, decoding and scorer for the base, the few-shot base and the tuned model."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ftune import chat
from ftune.console.progress import task_progress
from ftune.data import Example
from ftune.plan import GENERATION_TOKENS


def question(example: Example) -> list[chat.Message]:
    """The turns before the answer that is scored."""
    if "messages" in example.fields:
        messages: list[chat.Message] = example.fields["messages"]
        return messages[:-1]
    return [{"role": "user", "content": example.fields["prompt"]}]


def expected(example: Example) -> str:
    """The answer the model should give."""
    if "messages" in example.fields:
        return str(example.fields["messages"][-1]["content"])
    return str(example.fields["completion"])


def has_answer(example: Example) -> bool:
    """Whether an answer can be generated and compared."""
    if "messages" in example.fields:
        last = example.fields["messages"][-1]
        return bool(last["role"] == "assistant" and last.get("content") and not last.get("tool_calls"))
    return "completion" in example.fields


def prompt_ids(tokenizer: PreTrainedTokenizerBase, example: Example, shots: Sequence[Example] = ()) -> list[int]:
    """The prompt's token ids, with solved examples in front: as earlier turns, or as text without a template."""
    if tokenizer.chat_template:
        asked = question(example)
        system = [message for message in asked if message["role"] == "system"]
        solved = [
            message
            for shot in shots
            for message in [*question(shot), {"role": "assistant", "content": expected(shot)}]
            if message["role"] != "system"
        ]
        text = chat.render_prompt(
            tokenizer, [*system, *solved, *(m for m in asked if m["role"] != "system")], example.fields.get("tools")
        )
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    solved_text = "".join(f"{shot.fields['prompt']}{expected(shot)}\n\n" for shot in shots)
    ids = list(tokenizer(solved_text + example.fields["prompt"])["input_ids"])
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id and len(ids) > 1 else ids


def choose_shots(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """The training examples shown to the base, fixed by the seed."""
    usable = [example for example in examples if has_answer(example)]
    chosen = np.random.default_rng([seed, 4]).permutation(len(usable))[:count]
    return [usable[i] for i in chosen]


def _batches(lengths: Sequence[int], new_tokens: int) -> list[list[int]]:
    """Prompts of like length together, so that left padding is short."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if groups and (len(groups[-1]) + 1) * (lengths[i] + new_tokens) <= GENERATION_TOKENS:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    description: str,
) -> list[str]:
    """The greedy answer to each prompt, up to the end of its turn. Prompts are padded on the left and masked."""
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
    answers = [""] * len(prompts)
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
                answers[i] = tokenizer.decode(row[:end], skip_special_tokens=False)
            progress.advance(len(group))
    model.generation_config = own_config
    model.train(was_training)
    return answers


def exact_match(wanted: str, answer: str) -> float:
    """1.0 when both are the same text, white space at the ends aside."""
    return float(wanted.strip() == answer.strip())


def contains(wanted: str, answer: str) -> float:
    return float(wanted.strip() in answer)


def json_match(wanted: str, answer: str) -> float:
    """1.0 when both are the same JSON value, whatever its spacing and the order of its keys."""
    try:
        return float(bool(json.loads(wanted) == json.loads(answer)))
    except json.JSONDecodeError:
        return 0.0


METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "contains": contains,
    "json_match": json_match,
}


METRICS_OF_LOSS: dict[str, Callable[[float], float]] = {"loss": float}
"""Metrics that are made of the loss per token, in nats; lower is better."""


@dataclass(frozen=True)
class Scored:
    """The answers of one model to a set of items, and the score of each."""

    answers: list[str]
    scores: list[float]

    @property
    def mean(self) -> float:
        return sum(self.scores) / len(self.scores)


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    metric: str,
    max_new_tokens: int,
    description: str,
    shots: Sequence[Example] = (),
) -> Scored:
    """Answers and their scores, in the order of the examples."""
    prompts = [prompt_ids(tokenizer, example, shots) for example in examples]
    answers = generate(model, tokenizer, prompts, max_new_tokens, description)
    scores = [METRICS[metric](expected(e), answer) for e, answer in zip(examples, answers, strict=True)]
    return Scored(answers, scores)


def sample_rows(
    examples: Sequence[Example], base: Scored, few_shot: Scored | None, tuned: Scored
) -> list[dict[str, Any]]:
    """The lines of samples.jsonl."""
    return [
        {
            "row_id": example.row_id,
            "prompt": "\n".join(f"{m['role']}: {m['content']}" for m in question(example)),
            "expected": expected(example),
            "base": base.answers[i],
            "few_shot": few_shot.answers[i] if few_shot else None,
            "tuned": tuned.answers[i],
            "scores": {
                "zero_shot": base.scores[i],
                "few_shot": few_shot.scores[i] if few_shot else None,
                "tuned": tuned.scores[i],
            },
        }
        for i, example in enumerate(examples)
    ]
