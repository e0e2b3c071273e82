"""What is asked and what should come back: the prompt of an example, with or without solved ones in front."""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from ftune import chat
from ftune.data import Example


def question(example: Example) -> list[chat.Message]:
    """The turns before the answer that is scored."""
    if "messages" in example.fields:
        messages: list[chat.Message] = example.fields["messages"]
        return messages[:-1]
    return [{"role": "user", "content": example.fields["prompt"]}]


def prompt_text(example: Example) -> str:
    """The question as samples.jsonl has it, for people: a line for each turn."""
    return "\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in question(example))


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
