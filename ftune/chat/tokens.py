"""Rendered rows -> token ids with the supervised mask, and the tokens that generation must stop at."""

from typing import Any
from weakref import WeakKeyDictionary

from ftune.chat.rows import Rendered, TextTokens
from ftune.chat.shape import shape_of
from ftune.chat.template import Template, template_of
from ftune.errors import UserError


def tokenize(tokenizer: Any, rendered: Rendered) -> TextTokens:
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
    # The tokenizer's own call spends three times as long on options that are never used here.
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    encoded = backend.encode(rendered.text, add_special_tokens=rendered.adds_special_tokens)
    input_ids: list[int] = encoded.ids
    offsets: list[tuple[int, int]] = encoded.offsets
    spans = [*rendered.spans, (len(rendered.text) + 1, len(rendered.text) + 1)]
    supervised, straddling, current = [], 0, 0
    for start, end in offsets:
        while spans[current][1] <= start:
            current += 1
        first, last = spans[current]
        supervised.append(first <= start < end)
        straddling += start < first < end or start < last < end
    if rendered.ends_with_eos and tokenizer.eos_token_id is not None and input_ids[-1:] != [tokenizer.eos_token_id]:
        input_ids.append(tokenizer.eos_token_id)
        supervised.append(True)
    starts = [start for start, _ in offsets]
    starts += [len(rendered.text)] * (len(input_ids) - len(starts))
    return TextTokens(input_ids, supervised, straddling=straddling, starts=tuple(starts))


_ENDS: WeakKeyDictionary[Template, tuple[int, ...]] = WeakKeyDictionary()


def end_of_turn_ids(tokenizer: Any) -> list[int]:
    """The ids generation must stop at: what the template trains as the end of an assistant turn, and eos."""
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if not tokenizer.chat_template:
        return eos
    template = template_of(tokenizer)
    if template not in _ENDS:
        end = tokenizer(shape_of(template).end_of_turn, add_special_tokens=False)["input_ids"]
        is_new = end and end[-1] in template.control_tokens and end[-1] not in eos
        _ENDS[template] = (end[-1],) if is_new else ()
    return [*eos, *_ENDS[template]]
