"""Duplicates, near duplicates and splits: what counts as the same, and that no cluster straddles a split."""

import json
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftune import clean
from ftune.clean.letters import WINDOW, Letters
from ftune.errors import UserError

WORDS = re.findall(
    r"\w+",
    "river stone candle window garden letter market harbour silver engine copper meadow winter bridge ladder basket "
    "copy island forest signal pocket mirror thunder velvet orchard lantern saddle whistle carpet barrel falcon",
)


def sentence(seed: object, num_words: int) -> str:
    chosen = random.Random(str(seed))
    return " ".join(chosen.choice(WORDS) + str(chosen.randrange(100)) for _ in range(num_words))


def letters_of(text: str) -> list[int]:
    return Letters.of([text]).codes.tolist()[:-1]


def shingles(text: str) -> set[str]:
    """The shingles of the near duplicates, written once more and plainly."""
    letters = Letters.of([text])
    spelled = "".join(map(chr, letters.codes[:-1]))
    return {spelled[i : i + WINDOW] for i in np.flatnonzero(letters.starts[: len(spelled) - WINDOW + 1])}


def jaccard(one: str, other: str) -> float:
    first, second = shingles(one), shingles(other)
    return len(first & second) / len(first | second)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is it?", "  what IS it !!"),
        ("don't stop", "dont stop"),
        ("don't stop", "don t stop"),
        ("１２ apples, Ｆｕｌｌ width", "12 apples full width"),
        ("Stra\u00dfe", "STRASSE"),
        ("cafe\u0301", "caf\u00e9"),
        ("国会的转发。", "国会 的 转发"),
        ("a\u200bb\u00adc", "abc"),
        ("\ufb01ne", "fine"),
    ],
)
def test_case_width_spacing_and_punctuation_do_not_count_among_letters(one: str, other: str) -> None:
    assert letters_of(one) == letters_of(other) != []


@pytest.mark.parametrize(("one", "other"), [("naïve", "naive"), ("good 👍", "good 👎"), ("กำ", "กา"), ("1", "2")])
def test_accents_vowel_signs_and_emoji_are_letters(one: str, other: str) -> None:
    assert letters_of(one) != letters_of(other)


def test_every_character_begins_a_word_where_a_script_has_no_spaces() -> None:
    for text in ("ประเทศไทย", "国会的转发", "ひらがな"):
        letters = Letters.of([text])
        assert letters.starts[:-1].sum() == len(text)
    assert Letters.of(["two words"]).starts[:-1].sum() == 2


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=6))
def test_what_is_computed_of_a_text_does_not_depend_on_its_batch(texts: list[str]) -> None:
    signatures = clean.sketches(texts)
    alone = clean.Sketches.joined([clean.sketches([text]) for text in texts])
    assert np.array_equal(signatures.slots, alone.slots)
    assert np.array_equal(signatures.bands, alone.bands)
    assert np.array_equal(clean.digests(texts), np.concatenate([clean.digests([text]) for text in texts]))
    letters = Letters.of(texts)
    parts = np.split(letters.codes, letters.bounds[1:-1])
    assert [part[:-1].tolist() for part in parts] == [letters_of(text) for text in texts]


def test_rows_are_duplicates_but_for_line_ends_outer_space_and_ways_to_write_a_character() -> None:
    texts = ["def f():\n  return 1", "def f():  \r\n  return 1\n\n", "caf\u00e9", "cafe\u0301", "other", "other"]
    assert clean.first_twins(clean.digests(texts)).tolist() == [-1, 0, -1, 2, -1, 4]


@pytest.mark.parametrize(
    "other", ["Def f():\n  return 1", "def f()\n  return 1", "def f():\n    return 1", "def f():\n\n  return 1"]
)
def test_case_punctuation_and_indentation_make_another_row(other: str) -> None:
    assert clean.first_twins(clean.digests(["def f():\n  return 1", other])).tolist() == [-1, -1]


def test_the_first_of_several_copies_is_their_twin() -> None:
    rows = [random.Random(0).randrange(40) for _ in range(500)]
    expected = [rows.index(row) if rows.index(row) < i else -1 for i, row in enumerate(rows)]
    assert clean.first_twins(clean.digests([sentence(row, 5) for row in rows])).tolist() == expected


def near(texts: Sequence[str]) -> set[tuple[int, int]]:
    first, second, _ = clean.near_pairs(clean.sketches(texts))
    return set(zip(first.tolist(), second.tolist(), strict=True))


@pytest.mark.parametrize(("num_words", "is_near"), [(5, False), (10, False), (100, True), (300, True)])
def test_one_changed_word_leaves_long_texts_near_and_short_ones_apart(num_words: int, is_near: bool) -> None:
    texts = [sentence(i, num_words) for i in range(50)]
    changed = []
    for text in texts:
        words = text.split()
        words[num_words // 2] = "elephants"
        changed.append(" ".join(words))
    expected = {(i, i + 50) for i in range(50)} if is_near else set()
    assert near(texts + changed) == expected


def test_other_case_punctuation_and_width_are_near() -> None:
    text = sentence(0, 30)
    assert near(
        [text, text.upper().replace(" ", ", "), "".join(chr(ord(c) + 0xFEE0) if c != " " else c for c in text)]
    ) == {
        (0, 1),
        (0, 2),
    }


def test_short_texts_do_not_collapse_together() -> None:
    texts = ["", "!", "?", "yes", "no", "a", "12 + 4", "12 - 4", "1 + 24", "(1) 2", "1 (2)", "好", "不好", "👍", "👎"]
    assert near(texts) == set()
    assert near(["Yes!", "yes"]) == {(0, 1)}


def test_the_estimate_is_as_exact_as_it_says() -> None:
    one, other = [], []
    for i in range(200):
        words = sentence(i, 60).split()
        one.append(" ".join(words))
        other.append(" ".join(words[: 30 + i % 25] + sentence(("other", i), 6).split()))
    signatures = clean.sketches(one + other)
    rows = np.arange(200)
    errors = signatures.similarity(rows, rows + 200) - np.array(list(map(jaccard, one, other)))
    assert abs(errors.mean()) < 0.01
    assert errors.std() < 0.05


def test_signatures_and_digests_are_the_same_in_every_process() -> None:
    code = (
        "import json; from ftune import clean; texts = ['One river, two stones and three long candles.', 'short'];"
        "s = clean.sketches(texts); arrays = [s.slots, s.bands, clean.digests(texts)];"
        "print(json.dumps([array.tolist() for array in arrays]))"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    texts = ["One river, two stones and three long candles.", "short"]
    here = clean.sketches(texts)
    assert json.loads(outputs[0]) == [here.slots.tolist(), here.bands.tolist(), clean.digests(texts).tolist()]
    assert outputs[0] == outputs[1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30))
def test_clusters_are_the_connected_rows(pairs: list[tuple[int, int]]) -> None:
    expected = list(range(20))
    for _ in range(20):
        for one, other in pairs:
            expected[one] = expected[other] = min(expected[one], expected[other])
    one, other = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    assert clean.clusters(20, (one, other)).tolist() == expected


def test_clusters_do_not_depend_on_the_order_of_rows() -> None:
    texts = [sentence(i // 4, 80) + f" ending{i}" for i in range(80)]
    order = random.Random(3).sample(range(80), 80)

    def partition(rows: list[int]) -> set[frozenset[int]]:
        signatures = clean.sketches([texts[i] for i in rows])
        members = defaultdict(set)
        for row, head in zip(rows, clean.clusters(80, clean.near_pairs(signatures)[:2]), strict=True):
            members[head].add(row)
        return set(map(frozenset, members.values()))

    assert partition(order) == partition(list(range(80))) == {frozenset(range(i, i + 4)) for i in range(0, 80, 4)}


def twelve_of_each(num_texts: int) -> tuple[list[str], np.ndarray]:
    texts = [sentence(i // 12, 20) + ("!" * (i % 12)) for i in range(num_texts * 12)]
    return texts, clean.clusters(len(texts), clean.near_pairs(clean.sketches(texts))[:2])


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.37, 0.5, 0.99])
@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_no_cluster_straddles_the_split_and_the_fraction_holds_within_one(fraction: float, seed: int) -> None:
    texts, clusters = twelve_of_each(25)
    is_validation = clean.split_fraction(clean.digests(texts), clusters, fraction, seed)
    assert len(set(clusters)) == 25
    assert not set(clusters[is_validation]) & set(clusters[~is_validation])
    assert 0 < is_validation.sum() < len(texts)
    assert abs(is_validation.sum() - fraction * len(texts)) <= 12


def test_rows_without_twins_give_the_fraction_exactly() -> None:
    keys = clean.digests([sentence(i, 8) for i in range(1000)])
    assert clean.split_fraction(keys, np.arange(1000), 0.123).sum() == 123


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_each_side_of_a_split_keeps_a_row(fraction: float) -> None:
    keys = clean.digests([sentence(i, 8) for i in range(10)])
    assert clean.split_fraction(keys, np.arange(10), fraction).sum() == (1 if fraction < 0.5 else 9)


def test_the_split_depends_on_content_and_seed_not_on_order() -> None:
    texts, clusters = twelve_of_each(40)
    keys = clean.digests(texts)
    chosen = clean.split_fraction(keys, clusters, 0.2, seed=5)
    order = np.array(random.Random(1).sample(range(len(texts)), len(texts)))
    shuffled = clean.clusters(len(texts), clean.near_pairs(clean.sketches([texts[i] for i in order]))[:2])
    assert np.array_equal(clean.split_fraction(keys[order], shuffled, 0.2, seed=5), chosen[order])
    assert not np.array_equal(clean.split_fraction(keys, clusters, 0.2, seed=6), chosen)


def test_a_cluster_that_is_too_large_is_passed_over() -> None:
    keys = clean.digests([sentence(i, 8) for i in range(100)])
    clusters = np.where(np.arange(100) < 60, 0, np.arange(100))
    for seed in range(20):
        is_validation = clean.split_fraction(keys, clusters, 0.1, seed)
        assert is_validation.sum() == 10
        assert not is_validation[:60].any()


@pytest.mark.parametrize(("num_rows", "fraction"), [(1, 0.5), (0, 0.5), (10, 0.0), (10, 1.0), (10, -0.1), (10, 5.0)])
def test_a_split_that_cannot_be_is_refused(num_rows: int, fraction: float) -> None:
    with pytest.raises(UserError, match=r"fraction|too few"):
        clean.split_fraction(clean.digests(["x"] * num_rows), np.arange(num_rows), fraction)
    with pytest.raises(UserError, match="1: too few"):
        clean.split_fraction(clean.digests(["x"] * 3), np.zeros(3, dtype=np.int64), 0.5)


def test_what_is_removed_is_told_with_its_twin() -> None:
    long = sentence(0, 60)
    texts, ids = [long, "other", long, long + " end", "other"], ["a", "b", "c", "d", "e"]
    twins = clean.first_twins(clean.digests(texts))
    assert [t.as_dict() for t in clean.from_first_twins(twins, ids.__getitem__)] == [
        {"row_id": "c", "twin_id": "a", "reason": "duplicate", "share": 1.0},
        {"row_id": "e", "twin_id": "b", "reason": "duplicate", "share": 1.0},
    ]
    signatures = clean.sketches(texts)
    found = list(clean.from_clusters(clean.clusters(5, clean.near_pairs(signatures)[:2]), signatures, ids.__getitem__))
    assert [(t.row_id, t.twin_id, t.reason) for t in found] == [
        (row, twin, "near_duplicate") for row, twin in [("c", "a"), ("d", "a"), ("e", "b")]
    ]
    assert found[0].share == 1.0 > found[1].share > 0.8


def test_near_duplicates_of_real_rows_are_found_and_real(real_data: Path) -> None:
    rows = [json.loads(line) for line in (real_data / "data/bbh/bbh.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [f"{row['input']}\n{row['target']}" for row in rows]
    sets = list(map(shingles, texts))
    holders = defaultdict(list)
    alike = set()
    for i, own in enumerate(sets):
        shared = Counter(j for shingle in own for j in holders[shingle])
        alike |= {(j, i) for j, n in shared.items() if n >= 0.8 * (len(own) + len(sets[j]) - n)}
        for shingle in own:
            holders[shingle].append(i)
    first, second, _ = clean.near_pairs(clean.sketches(texts))
    clusters = clean.clusters(len(texts), (first, second))
    assert len(alike) > 100
    assert np.mean([clusters[i] == clusters[j] for i, j in alike]) > 0.95
    assert min(jaccard(texts[i], texts[j]) for i, j in zip(first, second, strict=True) if sets[i]) > 0.65
