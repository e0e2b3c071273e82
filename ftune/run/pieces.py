"""Token ids -> the text that each adds, for people to look at."""

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


def pieces(tokenizer: Any, input_ids: Sequence[int]) -> list[str]:
    """One text a token, which joined are the text of all. A character that takes several tokens stands at the one that
    completes it, the others are empty; what never becomes a character stands, as U+FFFD, at the last token.

    Where the tokens are no text that can be read from left to right (bytes in an order that UTF-8 does not have), each
    is decoded alone."""
    stream = DecodeStream(skip_special_tokens=False)
    try:
        found = [stream.step(tokenizer.backend_tokenizer, token) or "" for token in input_ids]
    except Exception:  # tokenizers raises nothing more special
        return [tokenizer.decode([token]) for token in input_ids]
    whole = tokenizer.decode(list(input_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    joined = "".join(found)
    if not whole.startswith(joined):
        return [tokenizer.decode([token]) for token in input_ids]
    if found:
        found[-1] += whole[len(joined) :]
    return found
