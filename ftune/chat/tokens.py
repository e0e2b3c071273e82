"""Rendered rows -> token ids with the supervised mask, and the tokens that generation must stop at."""

from typing import Any

from ftune.chat.rows import Rendered, Tokens
from ftune.chat.shape import shape_of
from ftune.chat.template import template_of
from ftune.errors import UserError


def tokenize(tokenizer: Any, rendered: Rendered) -> Tokens:
    """Token ids of the whole text (so that tokens at a joint are those of inference) and the supervised mask.

    A token is supervised when its first character lies in a span; one that straddles the joint between prompt and
    answer belongs to the prompt, where inference will have it. Those that straddle either end are counted.
    """
    if not tokenizer.is_fast:
        raise UserError(
            "this tokenizer cannot say which characters a token covers, so answers cannot be told from prompts",
            "model.base",
            "convert it to a tokenizer.json",
        )
    encoded = tokenizer(
        rendered.text, add_special_tokens=rendered.adds_special_tokens, return_offsets_mapping=True, verbose=False
    )
    input_ids: list[int] = list(encoded["input_ids"])
    spans = [*rendered.spans, (len(rendered.text) + 1, len(rendered.text) + 1)]
    supervised, straddling, current = [], 0, 0
    for start, end in encoded["offset_mapping"]:
        while spans[current][1] <= start:
            current += 1
        first, last = spans[current]
        supervised.append(first <= start < end)
        straddling += start < first < end or start < last < end
    if rendered.ends_with_eos and tokenizer.eos_token_id is not None and input_ids[-1:] != [tokenizer.eos_token_id]:
        input_ids.append(tokenizer.eos_token_id)
        supervised.append(True)
    return Tokens(input_ids, supervised, straddling=straddling)


def end_of_turn_ids(tokenizer: Any) -> list[int]:
    """The ids generation must stop at: what the template trains as the end of an assistant turn, and eos."""
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        template = template_of(tokenizer)
        end = tokenizer(shape_of(template).end_of_turn, add_special_tokens=False)["input_ids"]
        if end and end[-1] in template.control_tokens and end[-1] not in ids:
            ids.append(end[-1])
    return ids
