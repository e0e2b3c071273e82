"""The form of the general probe: what a line is, how many there are, and that no trick of form gives an answer away."""

import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from general_kit import GENERAL, ITEMS, PROSE, SUITES, Item, every_item, right

CHOICE_KEYS = ["id", "suite", "prompt", "choices", "answer"]
ANSWER_KEYS = ["id", "suite", "prompt", "completion", "metric"]
TEXT_KEYS = ["id", "suite", "text"]
LONGEST_COMPLETION = 60
"""Characters; about 30 tokens at the very most."""
ALIKE = 0.7
"""Share of common runs of three words from which two prompts count as the same."""


def texts(item: Item) -> list[str]:
    return [item[key] for key in ("prompt", "text", "completion") if key in item] + item.get("choices", [])


@pytest.mark.parametrize("name", [*SUITES, "prose"])
def test_a_file_is_utf_8_with_unix_line_ends(name: str) -> None:
    raw = (GENERAL / f"{name}.jsonl").read_bytes()
    assert raw.decode("utf-8")
    assert b"\r" not in raw
    assert raw.endswith(b"}\n")
    assert b"\n\n" not in raw


def test_the_folder_holds_the_suites_and_nothing_else() -> None:
    assert {path.stem for path in GENERAL.glob("*.jsonl")} == {*SUITES, "prose"}


def test_an_item_has_exactly_its_keys_and_clean_text() -> None:
    for item in [*every_item(), *PROSE]:
        keys = TEXT_KEYS if item["suite"] == "prose" else CHOICE_KEYS if "choices" in item else ANSWER_KEYS
        assert list(item) == keys, item
        for text in texts(item):
            assert text, item["id"]
            assert text == text.strip() == unicodedata.normalize("NFC", text), f"{item['id']}: {text!r}"
            odd = {c for c in text if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Co", "Cn"}} - {"\n"}
            assert not odd, f"{item['id']}: {odd!r} in {text!r}"


def test_a_choice_item_has_one_answer_among_four_different_choices() -> None:
    for item in (item for item in every_item() if "choices" in item):
        assert type(item["answer"]) is int
        assert item["answer"] in range(4), item["id"]
        assert len(item["choices"]) == len(set(item["choices"])) == 4, item["id"]
        assert not any("of the above" in choice for choice in item["choices"]), item["id"]


def test_a_free_answer_is_short_and_scored_by_a_known_metric() -> None:
    for item in (item for item in every_item() if "completion" in item):
        assert item["metric"] in {"exact_match", "contains", "json_match"}, item["id"]
        assert len(item["completion"]) <= LONGEST_COMPLETION, item["id"]
        assert "\n" not in item["completion"], item["id"]
        if item["metric"] == "json_match":
            json.loads(item["completion"])


def test_ids_are_the_suite_and_a_running_number() -> None:
    for suite in SUITES:
        assert [item["id"] for item in ITEMS[suite]] == [f"{suite}-{k + 1:03d}" for k in range(len(ITEMS[suite]))]
        assert {item["suite"] for item in ITEMS[suite]} == {suite}
    assert [item["id"] for item in PROSE] == [f"prose-{k + 1:02d}" for k in range(len(PROSE))]


def test_there_are_enough_items_in_every_suite() -> None:
    assert len(SUITES) >= 8
    assert len(every_item()) >= 460
    assert min(len(items) for items in ITEMS.values()) >= 50
    free = Counter(item["suite"] for item in every_item() if "completion" in item)
    assert min(free[suite] for suite in ("arithmetic", "instruction_following", "formats", "code")) >= 14
    assert free["languages"] >= 6


def test_the_passages_of_prose_are_of_like_length() -> None:
    assert len(PROSE) == 24
    assert all(90 <= len(passage["text"].split()) <= 160 for passage in PROSE)


def test_the_readme_counts_the_items() -> None:
    readme = (GENERAL / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \|", readme, re.MULTILINE)
    counted = {
        suite: (sum("choices" in item for item in items), sum("completion" in item for item in items))
        for suite, items in ITEMS.items()
    }
    assert {name: (int(choices), int(free)) for name, choices, free in rows} == counted
    assert f"{len(every_item())} items" in readme


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    words = re.findall(r"\w+|[^\w\s]", text.casefold())
    return frozenset(tuple(words[k : k + 3]) for k in range(max(1, len(words) - 2)))


def test_no_two_items_ask_the_same() -> None:
    known = [(item["id"], shingles(item.get("prompt", item.get("text", "")))) for item in [*every_item(), *PROSE]]
    for (one, a), (other, b) in itertools.combinations(known, 2):
        assert len(a & b) < ALIKE * len(a | b), f"{one} and {other} are nearly the same"


def answers(suite: str) -> list[int]:
    return [item["answer"] for item in ITEMS[suite] if "choices" in item]


@pytest.mark.parametrize("suite", SUITES)
def test_the_right_answer_stands_in_each_place_equally_often(suite: str) -> None:
    counts = Counter(answers(suite))
    assert max(counts.values()) - min(counts[place] for place in range(4)) <= 1


@pytest.mark.parametrize("suite", SUITES)
def test_the_places_of_the_right_answers_show_no_pattern(suite: str) -> None:
    places = answers(suite)
    assert max(len(list(run)) for _, run in itertools.groupby(places)) <= 4
    for step in range(1, 7):
        turns = Counter((later - earlier) % 4 for earlier, later in zip(places, places[step:], strict=False))
        assert max(turns.values()) < 0.5 * (len(places) - step), f"each {step} items"


def share_of(pick: Callable[[Sequence[int]], int], items: Sequence[Item]) -> float:
    """How often somebody is right who always picks the longest (shortest) choice, and any of several equally long."""
    hits = 0.0
    for item in items:
        lengths = [len(choice) for choice in item["choices"]]
        chosen = pick(lengths)
        hits += (len(right(item)) == chosen) / lengths.count(chosen)
    return hits / len(items)


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("pick", [max, min], ids=["longest", "shortest"])
def test_length_does_not_give_the_answer_away(suite: str, pick: Callable[[Sequence[int]], int]) -> None:
    choice_items = [item for item in ITEMS[suite] if "choices" in item]
    assert 0.15 <= share_of(pick, choice_items) <= 0.35


def test_the_languages_are_many_and_of_many_scripts() -> None:
    letters = {c for item in ITEMS["languages"] for text in texts(item) for c in text if c.isalpha()}
    scripts = {unicodedata.name(c).split()[0] for c in letters}
    wanted = "LATIN CYRILLIC GREEK ARABIC HEBREW DEVANAGARI BENGALI THAI CJK HIRAGANA HANGUL"
    assert scripts >= set(wanted.split())
