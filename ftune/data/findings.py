"""What an audit means: problems that stop a run, with the fix, and warnings that do not."""

from collections.abc import Mapping
from typing import Any

from ftune.data.audit import Audit
from ftune.errors import Problem
from ftune.quantities import format_count

MOST_TRUNCATED = 0.01
LEAST_SUPERVISED = 0.01
MOST_OF_ONE_SOURCE = 0.95
"""Shares of tokens beyond which the user is warned."""

FIXES = {
    "too_long": "raise data.max_length up to the model's context, or set data.too_long: truncate",
    "no_labels": "raise data.max_length, or shorten the prompt",
    "bad_row": "set data.on_bad_row: error to see what is wrong with each row",
    "unreadable": "set data.on_bad_row: error to see what is wrong with each row",
    "duplicate": "its rows stand elsewhere too: take it out of data.train, or set data.deduplicate: off",
    "near_duplicate": "its rows stand elsewhere too: take it out of data.train, or set data.deduplicate: exact",
    "contaminated": "its rows are in validation, test or probe: take it out, or set data.decontaminate: false",
}
"""By the reason for which most rows were dropped."""
STOPPING = "the model would never learn to stop"


def blocking(audit: Audit) -> list[Problem]:
    """What no run should start with; empty when the data can be trained on."""
    if audit.rows_used == 0:
        where = ", ".join(audit.sources)
        return [Problem(f"0 usable examples ({_rows(audit)})", where, _fix(audit.dropped))]
    problems = [
        Problem(f"nothing of this source is used ({_rows_of(figures)})", name, _fix(figures["dropped"]))
        for name, figures in audit.sources.items()
        if not figures["rows_used"]
    ]
    truncated = audit.fates["truncated"]
    if audit.supervised_tokens == 0:
        what = f"no supervised tokens in {_count(audit.rows_used, 'row')}"
        if truncated:
            problems.append(Problem(f"{what}: the answers were cut off", "data.max_length", FIXES["no_labels"]))
        else:
            problems.append(Problem(what, "data.train", "give rows with assistant turns or completions"))
    elif audit.end_of_turn and not audit.end_of_turn_supervised:
        what = f"none of the {_count(audit.end_of_turn, 'end-of-turn token')} is supervised: {STOPPING}"
        if truncated:
            problems.append(Problem(what, "data.max_length", "raise it, or set data.too_long: drop"))
        else:
            hint = "give a template that writes the end-of-turn token right behind the assistant's text"
            problems.append(Problem(what, "model.chat_template", hint))
    return problems


def warnings(audit: Audit, is_language: bool = True) -> list[Problem]:
    """What a user should look at, while training may go on. A classifier, which is no language model, learns one label
    a row, so that the share of supervised tokens says nothing of it."""
    share = _about_share(audit) if is_language else []
    return [*_about_rows(audit), *_about_truncation(audit), *share, *_about_ends(audit), *_about_sources(audit)]


def document(audit: Audit, is_language: bool = True) -> dict[str, Any]:
    """The `data` part of report.json and of `check --json`, with its warnings."""
    return audit.as_dict() | {"warnings": [problem.as_dict() for problem in warnings(audit, is_language)]}


def _about_rows(audit: Audit) -> list[Problem]:
    found = []
    if dropped := audit.dropped:
        what = f"{format_count(dropped.total())} of {_count(audit.rows_in, 'row')} dropped ({_reasons(dropped)})"
        found.append(Problem(what, "data.train", _fix(dropped)))
    kept_bare = audit.rows_without_supervision - audit.dropped["no_labels"]
    if kept_bare and audit.supervised_tokens:
        what = f"{_count(kept_bare, 'used row')} without supervised tokens: nothing is learned from them"
        found.append(Problem(what, "data.train", FIXES["no_labels"]))
    return found


def _about_truncation(audit: Audit) -> list[Problem]:
    truncated, fates = audit.fates["truncated"], audit.fates
    share = _share(truncated, fates["supervised"] + fates["read"] + truncated)
    if share <= MOST_TRUNCATED:
        return []
    what = f"{_percent(share)} of the tokens were cut off ({format_count(truncated)})"
    return [Problem(what, "data.max_length", "raise it, or set data.too_long: drop")]


def _about_share(audit: Audit) -> list[Problem]:
    share = _share(audit.supervised_tokens, audit.supervised_tokens + audit.fates["read"])
    if not 0 < share < LEAST_SUPERVISED:
        return []
    what = f"only {_percent(share)} of the tokens are supervised: most of the time goes into reading prompts"
    return [Problem(what, "data.train", "shorten the prompts, if they hold more than the answers need")]


def _about_ends(audit: Audit) -> list[Problem]:
    missing = audit.end_of_turn - audit.end_of_turn_supervised
    if missing and audit.end_of_turn_supervised:
        what = f"{format_count(missing)} of {_count(audit.end_of_turn, 'end-of-turn token')} not supervised"
        return [Problem(what, "data.max_length", "an answer that was cut off does not teach to stop: raise it")]
    if audit.end_of_turn or not audit.roles.get("assistant", {}).get("supervised"):
        return []
    what = f"the chat template writes no end-of-turn token behind the assistant's text: {STOPPING}"
    return [Problem(what, "model.chat_template", "give a template that writes one")]


def _about_sources(audit: Audit) -> list[Problem]:
    sources = {name: figures["supervised"] for name, figures in audit.sources.items() if figures["rows_used"]}
    if len(sources) < 2:
        return []
    name, most = max(sources.items(), key=lambda item: item[1])
    if (share := _share(most, audit.supervised_tokens)) <= MOST_OF_ONE_SOURCE:
        return []
    what = f"{_percent(share)} of the supervised tokens come from this of {len(sources)} sources"
    return [Problem(what, name, "give the sources weights: data.train: [{path: ..., weight: ...}]")]


def _rows(audit: Audit) -> str:
    return _rows_of({"rows_in": audit.rows_in, "dropped": audit.dropped})


def _rows_of(figures: Mapping[str, Any]) -> str:
    told = f"{_count(figures['rows_in'], 'row')} in"
    return f"{told}; dropped {_reasons(figures['dropped'])}" if figures["dropped"] else told


def _reasons(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{reason.replace('_', ' ')} {format_count(count)}" for reason, count in sorted(dropped.items()))


def _fix(dropped: Mapping[str, int]) -> str:
    if not dropped:
        return "give a file with rows"
    return FIXES.get(max(sorted(dropped), key=lambda reason: dropped[reason]), "see why its rows were dropped")


def _count(number: int, noun: str) -> str:
    return f"{format_count(number)} {noun}" + "s" * (number != 1)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.3g} %"
