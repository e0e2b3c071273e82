"""Contamination: planted leaks are all found in every shape, and clean rows raise no alarm."""

import csv
import json
import pickle
import random
import string
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ftune.clean import Contamination, Hit, Item, contamination, from_hits
from ftune.clean.letters import Letters
from tests.test_clean import sentence

REPOSITORY = Path(__file__).parent.parent
Pair = tuple[str, str]

MARKS = string.punctuation
MANNERS: dict[str, Callable[[str], str]] = {
    "verbatim": str,
    "upper case": str.upper,
    "title case": str.title,
    "without punctuation": lambda text: text.translate(str.maketrans("", "", MARKS)),
    "spaces for punctuation": lambda text: text.translate(str.maketrans(MARKS, " " * len(MARKS))),
    "other punctuation": lambda text: text.translate(str.maketrans(MARKS, (".,;:!?" * 6)[: len(MARKS)])),
    "more white space": lambda text: "\n\t  " + text.replace(" ", "  \n") + "  ",
    "full width": lambda text: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text),
    "inside a longer row": lambda text: f"Some words come first. {text.rstrip()}. And then some more words follow.",
    "inside a sentence": lambda text: f"well then {text} thanks a lot",
}
SHAPES: dict[str, Callable[[str, str], Pair]] = {
    "prompt and completion": lambda question, answer: (question, answer),
    "conversation": lambda question, answer: (f"Hello there!\nHow can I help?\n{question}", answer),
    "plain text": lambda question, answer: ("", f"{question}\n{answer}"),
    "labelled": lambda question, answer: (question, "label"),
}
SHAPES_OF_ITEM_AND_ROW = [
    (item, row)
    for item in ("prompt and completion", "plain text", "labelled")
    for row in SHAPES
    if (item, row) != ("plain text", "labelled")  # which has no room for the answer of a text
]
ITEMS = [(f"{sentence(('item', i), 9)}, isn't it?".capitalize(), sentence(("answer", i), 6)) for i in range(200)]
CLEAN = [(f"{sentence(('row', i), 9)}, isn't it?".capitalize(), sentence(("other", i), 6)) for i in range(400)]
CHINESE = [
    ("国会的转发是什么意思？请解释一下。", "意思是再次发布。"),
    ("请介绍一下北京大学的历史和现在的情况。", "北京大学成立于1898年。"),
]
OTHER_SCRIPTS = [
    ("ประเทศไทยมีกี่จังหวัดและจังหวัดใดใหญ่ที่สุด", "เจ็ดสิบหก"),
    ("日本で一番高い山は何ですか？教えてください。", "富士山です。"),
    ("대한민국의 수도는 어디이며 인구는 얼마나 됩니까?", "서울"),
    ("Сколько планет вращается вокруг нашего Солнца?", "восемь"),
]


def build(pairs: Iterable[Pair]) -> Contamination:
    return Contamination([Item(f"test:{i}", *pair) for i, pair in enumerate(pairs)])


def hits(items: Contamination, rows: Sequence[Pair]) -> list[Hit]:
    found = []
    for start in range(0, len(rows), 300):
        questions, answers = zip(*rows[start : start + 300], strict=True)
        found += [hit._replace(row=hit.row + start) for hit in items.find(questions, answers)]
    return found


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize(("item_shape", "row_shape"), SHAPES_OF_ITEM_AND_ROW)
def test_every_planted_leak_is_found_and_told_with_its_item(manner: str, item_shape: str, row_shape: str) -> None:
    items = build(SHAPES[item_shape](*pair) for pair in ITEMS)
    change = MANNERS[manner]
    if "plain text" in (item_shape, row_shape):
        question_and_answer = [(change(f"{question}\n{answer}"), "") for question, answer in ITEMS]
        planted = [SHAPES[row_shape](*pair) for pair in question_and_answer]
    else:
        planted = [SHAPES[row_shape](change(question), answer) for question, answer in ITEMS]
    found = hits(items, CLEAN[:200] + planted + CLEAN[200:])
    assert [(hit.row, hit.item_id) for hit in found] == [(200 + i, f"test:{i}") for i in range(len(ITEMS))]


@pytest.mark.parametrize("pair", CHINESE + OTHER_SCRIPTS, ids=lambda pair: pair[0][:4])
def test_leaks_are_found_in_every_script(pair: Pair) -> None:
    items = build([*ITEMS, *CHINESE, *OTHER_SCRIPTS])
    question, answer = pair
    rows = [
        (question.upper(), answer),
        (question.rstrip("。？?") + " ！", answer),
        ("", f"前面的话。{question}。{answer}"),
        (f"Answer this: {question}", "I do not know."),
    ]
    expected = f"test:{[*ITEMS, *CHINESE, *OTHER_SCRIPTS].index(pair)}"
    assert [(hit.row, hit.item_id) for hit in hits(items, rows)] == [(i, expected) for i in range(4)]
    assert not hits(build([pair]), [p for p in CHINESE + OTHER_SCRIPTS if p != pair])


def test_rows_copied_many_times_are_all_found() -> None:
    found = hits(build(ITEMS), [ITEMS[i % 3] for i in range(2000)])
    assert [(hit.row, hit.item_id, hit.kind) for hit in found] == [(i, f"test:{i % 3}", "equal") for i in range(2000)]


def test_an_item_listed_many_times_is_no_template() -> None:
    items = build([*ITEMS[:100], *[ITEMS[0]] * 100])
    assert [hit.item_id for hit in hits(items, [(f"well then {ITEMS[0][0]} thanks", "x")])] == ["test:0"]


def test_most_of_an_item_is_enough_and_half_of_it_is_not() -> None:
    words = sentence("long", 40).split()
    items = build([(" ".join(words), "yes"), *ITEMS])
    ((row, item_id, kind, share),) = hits(items, [(" ".join(words[:36] + sentence("else", 30).split()), "no")])
    assert (row, item_id, kind) == (0, "test:0", "overlap")
    assert 0.8 <= share <= 0.95
    assert not hits(items, [(" ".join(words[:28] + sentence("else", 30).split()), "no")])


def test_a_shared_template_is_no_leak_but_what_fills_it_is() -> None:
    preamble = "You are a careful assistant. Read the following review and tell whether its author liked the film: "
    reviews = [sentence(("review", i), 12) for i in range(60)]
    items = build([(preamble + review, "positive") for review in reviews[:30]])
    assert not hits(items, [(preamble + review, "positive") for review in reviews[30:]])
    assert len(hits(items, [("Please do this. " + preamble + review, "x") for review in reviews[:30]])) == 30


def test_asking_the_same_of_everything_is_no_leak() -> None:
    items = build([("Write a short story about anything you like.", sentence(i, 30)) for i in range(50)])
    same = "Write a short story about anything you like."
    assert not hits(items, [(same, sentence(("mine", i), 30)) for i in range(50)])
    assert [hit.item_id for hit in hits(items, [(same, sentence(7, 30).upper())])] == ["test:7"]


@pytest.mark.parametrize(
    ("item", "row", "is_leak"),
    [
        (("yes", "affirm"), ("Yes!", "affirm"), True),
        (("yes", "affirm"), ("yes", "positive"), False),
        (("thank you", "thanks"), ("thank you so much for the help", "thanks"), False),
        (("Is the shop open on Sunday?", "yes"), ("is the shop open on sunday", "no"), True),
        (("I lost my card and wallet.", "lost"), ("Hello! I lost my card and wallet. What now?", "lost"), True),
        (("I lost my card and wallet.", "lost"), ("When I lost my card and wallet I paid for it", "lost"), False),
        (("What is 12 + 4, please tell?", "16"), ("what is 12+4 please tell", "16"), True),
        (("What is 12 + 4, please tell?", "16"), ("What is 12 - 4, please tell?", "8"), False),
        (("What is 12 + 4, please tell?", "16"), ("What is 1 + 24, please tell?", "25"), False),
        (("not ( True and False ) is what", "True"), ("( not True ) and False is what", "False"), False),
        (("Who earned 1,000 dollars in May?", "Ann"), ("who earned 1000 dollars in may", "Ann"), True),
        (
            ("Sort these numbers upwards for me: 7, 6", "6 7"),
            ("Sort these numbers upwards for me: 7, 6, 3", "3"),
            False,
        ),
        (("Sort these numbers upwards for me: 7, 6", "6 7"), ("Sort these numbers upwards for me: 7, 65", "7"), False),
        (("👍👍", "good"), ("👍👍", "good"), True),
        (("??", "odd"), ("!!", "odd"), False),
        (("", ""), ("", ""), False),
    ],
)
def test_short_rows_numbers_and_signs(item: Pair, row: Pair, is_leak: bool) -> None:
    assert bool(hits(build([item]), [row])) is is_leak


def test_no_hash_decides_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With hashes of 6 bits nearly everything is a candidate; the letters have the last word."""
    planted = [(MANNERS["inside a longer row"](question), answer) for question, answer in ITEMS[:20]]
    rows = CLEAN[:100] + planted + ITEMS[:20]
    expected = [(hit.row, hit.item_id, hit.kind) for hit in hits(build(ITEMS[:40]), rows)]
    assert len(expected) == 40
    mixed = contamination.mixed
    monkeypatch.setattr(contamination, "mixed", lambda values: mixed(values) >> 58)
    assert [(hit.row, hit.item_id, hit.kind) for hit in hits(build(ITEMS[:40]), rows)] == expected


def test_hits_depend_neither_on_batches_nor_on_the_process() -> None:
    rows = CLEAN[:50] + [(MANNERS["inside a longer row"](question), answer) for question, answer in ITEMS[:50]]
    items = build(ITEMS)
    expected = hits(items, rows)
    assert len(expected) == 50
    travelled = pickle.loads(pickle.dumps(items))
    alone = [hit._replace(row=i) for i, row in enumerate(rows) for hit in hits(travelled, [row])]
    assert alone == expected


def test_without_items_or_rows_there_is_nothing_to_find() -> None:
    assert not build([]).find(["a"], ["b"])
    assert not build([("", " ")]).find(["a"], [""])
    assert not build(ITEMS).find([], [])


def test_a_contaminated_row_is_told_with_its_twin() -> None:
    rows = [CLEAN[0], ITEMS[3]]
    (twin,) = from_hits(hits(build(ITEMS), rows), ["train.jsonl:1", "train.jsonl:2"].__getitem__)
    assert twin.as_dict() == {"row_id": "train.jsonl:2", "twin_id": "test:3", "reason": "equal", "share": 1.0}


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def turns(messages: list[dict[str, Any]], key: str) -> Pair:
    return "\n".join(message[key] for message in messages[:-1]), messages[-1][key]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


REAL: dict[str, Callable[[Path], list[Pair]]] = {
    "gsm8k": lambda d: [(r["question"], r["answer"]) for r in json_lines(d / "gsm8k/train.jsonl")],
    "banking77": lambda d: [(r["text"], r["category"]) for r in table(d / "banking77/train.csv")],
    "snips": lambda d: [(r["text"], r["intent"]) for r in json_lines(d / "snips/train.jsonl")],
    "e2e_nlg": lambda d: [(r["mr"], r["ref"]) for r in table(d / "e2e_nlg/dev.csv")],
    "sgd_chat": lambda d: [turns(r["messages"], "content") for r in json_lines(d / "sgd_chat/train.jsonl")],
    "arc_easy": lambda d: [(r["query"], r["choices"][r["gold"]]) for r in json_lines(d / "arc_easy/test_sample.jsonl")],
    "bbh": lambda d: [(r["input"], r["target"]) for r in json_lines(d / "bbh/bbh.jsonl")],
    "dpo_zh": lambda d: [
        ("\n".join(m["value"] for m in r["conversations"]), r["chosen"]["value"])
        for r in json.loads((d / "dpo_mix/dpo_zh.json").read_text(encoding="utf-8"))
    ],
    "tinystories": lambda d: [("", r["text"]) for r in json_lines(d / "tinystories/stories.jsonl")],
    "wikitext2": lambda d: [
        ("", line) for line in (d / "wikitext2/valid.txt").read_text(encoding="utf-8").splitlines() if len(line) > 60
    ],
}


def halves(real_data: Path, name: str) -> tuple[list[Pair], list[Pair]]:
    """Random halves without questions in common (case and punctuation aside), so that alarms between them are false."""
    pairs = REAL[name](real_data / "data")
    distinct = {tuple(Letters.of([q or a]).codes.tolist()): (q, a) for q, a in pairs}
    rows = random.Random(0).sample(list(distinct.values()), len(distinct))
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


@pytest.mark.parametrize("name", REAL)
def test_clean_real_rows_raise_fewer_than_one_false_alarm_in_200(name: str, real_data: Path) -> None:
    items, rows = halves(real_data, name)
    alarms = hits(build(items), rows)
    assert len(alarms) / len(rows) < 0.005, [(rows[hit.row], hit) for hit in alarms[:5]]


@pytest.mark.parametrize("name", REAL)
def test_all_leaks_planted_in_real_rows_are_found(name: str, real_data: Path) -> None:
    items, rows = halves(real_data, name)
    contaminated = build(items)
    inside = {"inside a longer row": 16, "inside a sentence": 48}
    # Fewer letters may be an accident there; and of a sum like ((-1 + 3) * 4) the letters alone are not the question.
    for manner, change in MANNERS.items():
        least = inside.get(manner, 13)
        chosen = [(q, a) for q, a in items[:150] if Letters.of([q or a]).sizes[0] >= least]
        for planted in (
            [(change(q), a) if q else ("", change(a)) for q, a in chosen],
            [("", change(f"{q}\n{a}")) for q, a in chosen],
        ):
            found = {hit.row for hit in hits(contaminated, rows[:40] + planted)}
            missed = [planted[i] for i in range(len(planted)) if 40 + i not in found]
            assert not missed, f"{manner}: {len(missed)} of {len(planted)}, e.g. {missed[:3]}"


def test_nothing_of_gsm8ks_test_set_is_in_its_training_set(real_data: Path) -> None:
    test = [(r["question"], r["answer"]) for r in json_lines(real_data / "data/gsm8k/test.jsonl")]
    assert not hits(build(test), REAL["gsm8k"](real_data / "data"))


def test_the_quickstart_has_no_alarm_that_is_not_a_whole_question_asked_again() -> None:
    def rows(*names: str) -> list[Pair]:
        lines = [row for name in names for row in json_lines(REPOSITORY / "recipes/quickstart" / name)]
        return [turns(row["messages"], "content") if "messages" in row else ("", row["text"]) for row in lines]

    items, training = rows("test.jsonl", "probe.jsonl"), rows("train.jsonl", "rehearsal.jsonl")
    for hit in hits(build(items), training):
        asked = training[hit.row][0].removeprefix("Please answer: ").removeprefix("A question: ")
        assert asked == items[int(hit.item_id.removeprefix("test:"))][0]
