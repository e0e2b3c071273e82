"""The metrics of answers: each gives (expected, answer) a score from 0 to 1, higher is better."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from ftune.evaluate.words import bleu_tokenizer, words

NO_JSON = object()


def exact_match(wanted: str, answer: str) -> float:
    """1.0 when both are the same text, white space at the ends aside."""
    return float(wanted.strip() == answer.strip())


def contains(wanted: str, answer: str) -> float:
    return float(wanted.strip() in answer)


def json_match(wanted: str, answer: str) -> float:
    """1.0 when both are the same JSON value, whatever its spacing and the order of its keys."""
    right = read_json(wanted)
    return float(right is not NO_JSON and _is_same(right, read_json(answer)))


def read_json(text: str) -> Any:
    """The value of a JSON text, NO_JSON where it is none: broken, endless digits, or brackets nested without end."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return NO_JSON


def _is_same(first: Any, second: Any) -> bool:
    """Equality of JSON values: 1 is 1.0, but true is not 1, as it is in Python."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_is_same(value, second[key]) for key, value in first.items())
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_is_same, first, second))
    return bool(first == second)


def field_shares(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """For each key of the expected objects, the share of items that have it and whose answer has the same value there.

    `pairs`: expected and answered texts. Expected values that are no objects count nowhere.
    """
    right: dict[str, list[bool]] = {}
    for wanted, answer in pairs:
        target, found = read_json(wanted), read_json(answer)
        if isinstance(target, dict):
            values = found if isinstance(found, dict) else {}
            for key, value in target.items():
                right.setdefault(key, []).append(key in values and _is_same(value, values[key]))
    return {key: sum(hits) / len(hits) for key, hits in right.items()}


def unexpected_share(pairs: Sequence[tuple[str, str]]) -> float:
    """The share of items with an expected object whose answer is an object with keys that were not expected."""
    objects = [(wanted, read_json(answer)) for text, answer in pairs if isinstance(wanted := read_json(text), dict)]
    extra = [isinstance(found, dict) and bool(found.keys() - wanted.keys()) for wanted, found in objects]
    return sum(extra) / len(extra) if extra else 0.0


def rouge_l(wanted: str, answer: str) -> float:
    """ROUGE-L's F1 (Lin 2004) over the words of any script; an expected answer without words must be met exactly."""
    if not words(wanted):
        return exact_match(wanted, answer)
    return float(_rouge().score(wanted, answer)["rougeL"].fmeasure)


@cache
def _rouge() -> Any:
    from rouge_score import rouge_scorer, tokenizers

    class Words(tokenizers.Tokenizer):  # type: ignore[misc]
        def tokenize(self, text: str) -> list[str]:
            return words(text)

    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=Words())


def bleu(wanted: str, answer: str) -> float:
    """Sentence BLEU (Papineni 2002) with exponential smoothing, over as many n-gram orders as the answer has."""
    score = _bleu(bleu_tokenizer(wanted), True).sentence_score(answer, [wanted]).score
    return min(1.0, float(score) / 100)


def corpus_bleu(wanted: Sequence[str], answers: Sequence[str]) -> tuple[float, str]:
    """BLEU of all items together, from 0 to 1, and sacrebleu's signature of how it was computed."""
    scorer = _bleu(bleu_tokenizer("".join(wanted)), False)
    score = scorer.corpus_score(list(answers), [list(wanted)]).score
    return min(1.0, float(score) / 100), str(scorer.get_signature())


@cache
def _bleu(tokenizer: str, has_effective_order: bool) -> Any:
    from sacrebleu.metrics import BLEU

    # force: no warning that a text might be tokenized already
    return BLEU(effective_order=has_effective_order, tokenize=tokenizer, force=True)


METRICS: Mapping[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "contains": contains,
    "json_match": json_match,
    "rouge_l": rouge_l,
    "bleu": bleu,
}
QUICK = ("exact_match", "contains", "json_match")
"""Those that score thousands of answers in no time."""
