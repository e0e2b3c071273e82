"""The general probe's sums and riddles, worked out again: the keyed answer is right and no other choice is."""

import itertools
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from fractions import Fraction
from math import factorial, gcd, isqrt, lcm

import pytest
from general_kit import ITEMS, find, right, wrong

BARE_SUM = re.compile(r"What is ([\d,.+*/() -]+)\?")


def number(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def worked_out(sum_: str) -> Fraction:
    """The exact value of a sum of whole and decimal numbers."""
    exact = re.sub(r"\d+(?:\.\d+)?", lambda digits: f"Fraction('{digits.group()}')", sum_.replace(",", ""))
    value: Fraction = eval(exact, {"Fraction": Fraction})
    return value


BARE_SUMS = [item for item in ITEMS["arithmetic"] if BARE_SUM.match(item["prompt"])]
# Words of the prompt, and what they come to.
SUMS: dict[str, Fraction | int] = {
    "half of 46": 46 // 2,
    "25 % of 80": Fraction(25, 100) * 80,
    "boxes of 6": 6 * 7,
    "50 coins": 50 - 12 - 9,
    "120 pages": 120 - 75,
    "sides of 9 cm": 4 * 9,
    "2 to the power of 10": 2**10,
    "reduced by 15 %": 60 * Fraction(85, 100),
    "average of 4, 9, 11 and 16": Fraction(4 + 9 + 11 + 16, 4),
    "180 km in 2.5 hours": 180 / Fraction("2.5"),
    "seconds are there in 2 hours": 2 * 60 * 60,
    "5x - 3 = 22": Fraction(22 + 3, 5),
    "area of 84 square cm": Fraction(84, 12),
    "Three pens cost 4.50": Fraction("4.50") / 3 * 7,
    "300 g of rice": Fraction(300, 4) * 6,
    "remainder when 47": 47 % 6,
    "20 % of 250": Fraction(20, 100) * 250,
    "square root of 196": isqrt(196),
    "greatest common divisor of 84 and 126": gcd(84, 126),
    "least common multiple of 12 and 18": lcm(12, 18),
    "rises by 20 % and then falls": 100 - 100 * Fraction(120, 100) * Fraction(80, 100),
    "Two fair coins": Fraction(sum("H" in toss for toss in itertools.product("HT", repeat=2)), 4),
    "13 squared plus 9 squared": 13**2 + 9**2,
    "Pump A": 1 / (Fraction(1, 3) + Fraction(1, 6)),
    "from 1 to 40": sum(range(1, 41)),
    "5 books stand on a shelf": factorial(5),
    "binary number 101101": int("101101", 2),
    "add up to 31 and differ by 7": Fraction(31 + 7, 2),
    "18 % of 350": Fraction(18, 100) * 350,
}


@pytest.mark.parametrize("item", BARE_SUMS, ids=lambda item: item["prompt"][:30])
def test_a_bare_sum_has_this_value(item: dict[str, str]) -> None:
    asked = BARE_SUM.match(item["prompt"])
    assert asked
    value = worked_out(asked.group(1))
    assert number(right(item)) == value
    assert value not in map(number, wrong(item))


@pytest.mark.parametrize("words", SUMS)
def test_a_sum_in_words_has_this_value(words: str) -> None:
    item = find("arithmetic", words)
    assert number(right(item)) == SUMS[words]
    assert SUMS[words] not in map(number, wrong(item))


def is_prime(candidate: str) -> bool:
    return all(int(candidate) % divisor for divisor in range(2, int(candidate)))


def test_the_sums_that_compare_numbers_or_times() -> None:
    largest = find("arithmetic", "is the largest")
    assert max(largest["choices"], key=float) == right(largest)
    prime = find("arithmetic", "is prime")
    assert [choice for choice in prime["choices"] if is_prime(choice)] == [right(prime)]
    film = find("arithmetic", "starts at 18:45")
    assert (datetime(2000, 1, 1, 18, 45) + timedelta(minutes=90)).strftime("%H:%M") == right(film)


def test_every_item_of_arithmetic_was_worked_out() -> None:
    others = {"is the largest", "is prime", "starts at 18:45"}
    checked = {item["id"] for item in BARE_SUMS} | {find("arithmetic", words)["id"] for words in {*SUMS, *others}}
    assert checked == {item["id"] for item in ITEMS["arithmetic"]}


def knights_and_knaves() -> str:
    """A knight (True) says what is so, a knave what is not."""
    worlds = [
        (ada, bo, cy)
        for ada, bo, cy in itertools.product([True, False], repeat=3)
        if ada == bo and bo == (not cy) and cy == (not ada)
    ]
    (alike,) = {(bo == ada, cy == ada) for ada, bo, cy in worlds}
    names = {(True, False): "Bo but not Cy", (False, True): "Cy but not Bo", (True, True): "both Bo and Cy"}
    return names.get(alike, "neither of them")


def the_one_true_statement() -> str:
    states = [
        dict(zip("ABC", state, strict=True))
        for state in itertools.product([True, False], repeat=3)
        if sum(state) == 1
        and state[0] == state[1]
        and state[1] == (not state[2])
        and state[2] == (not state[0] and not state[1])
    ]
    (only,) = states
    return "only " + next(name for name, is_true in only.items() if is_true)


def first_day_the_barrel_is_full() -> str:
    litres, day = 0, 0
    while True:
        day, litres = day + 1, litres + 30
        if litres >= 60:
            return f"on day {day}"
        litres -= 20


def winner() -> str:
    orders = [
        order
        for order in itertools.permutations(["Ivo", "Jan", "Kim", "Lou", "Max"])
        if order.index("Ivo") < order.index("Jan") < order.index("Kim")
        and order.index("Lou") < order.index("Ivo")
        and order[-1] == "Max"
    ]
    assert len({order[0] for order in orders}) == 1
    return orders[0][0]


def tin_labelled_nails() -> str:
    kinds = ["nails", "screws", "hooks"]
    (contents,) = [
        contents
        for contents in itertools.permutations(kinds)
        if all(label != content for label, content in zip(kinds, contents, strict=True)) and contents[1] == "hooks"
    ]
    return contents[0]


def pile_of_books() -> str:
    (order,) = [
        order
        for order in itertools.permutations(["novel", "atlas", "diary", "cookbook"])
        if order.index("novel") < order.index("atlas")
        and order.index("diary") == order.index("novel") - 1
        and order[-1] == "cookbook"
    ]
    return f"the {order[1]}"


def turned(*turns: int) -> str:
    return ["north", "east", "south", "west"][sum(turns) % 4]


def after(day: str, days: int) -> str:
    week = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    return week[(week.index(day) + days) % 7]


def shifted(word: str) -> str:
    return "".join(chr(ord(letter) + 1) for letter in word)


RIDDLES: dict[str, Callable[[], object]] = {
    "knights always tell the truth": knights_and_knaves,
    "Exactly one of these statements": the_one_true_statement,
    "A barrel holds": first_day_the_barrel_is_full,
    "Five runners": winner,
    "every label is wrong": tin_labelled_nails,
    "Four books lie in a pile": pile_of_books,
    "You face north": lambda: turned(1, 1, -1),
    "Today is Tuesday": lambda: after("Tuesday", 3),
    "day after tomorrow is Sunday": lambda: after("Sunday", -3),
    "CAT as DBU": lambda: shifted("SUN") if (shifted("CAT"), shifted("DOG")) == ("DBU", "EPH") else None,
    "3, 6, 9, 12": lambda: 12 + 3,
    "2, 3, 5, 8, 12": lambda: 12 + (12 - 8) + 1,
    "1, 4, 9, 16, 25": lambda: 6**2,
    "2, 6, 14, 30, 62": lambda: 2 * 62 + 2,
    "81, 27, ?, 3, 1": lambda: 27 // 3,
    "A, C, E, G": lambda: chr(ord("G") + 2),
    "AZ, BY, CX": lambda: chr(ord("C") + 1) + chr(ord("X") - 1),
    "Of 30 pupils": lambda: 18 + 15 - (30 - 5),
    "a quarter past three": lambda: abs(15 * 6 - (3 * 30 + 15 / 2)),
    "Six people shake hands": lambda: len(list(itertools.combinations(range(6), 2))),
}
READINGS: dict[str, Callable[[], object]] = {
    "Zoe borrowed a film": lambda: f"{1 + 7 + 7} June",
    "Hamid is two years older": lambda: 1990 - 2,
    "the Nowaks": lambda: f"{2 * 12 + 2 * 6 - 30} euros",
    "Nadia's train": lambda: (datetime(2000, 1, 1, 14, 20) + timedelta(hours=1)).strftime("at %H:%M"),
    "The contract says": lambda: f"{min(60, 200 - 170)} euros",
    "Kaya wrote three drafts": lambda: f"{900 * 2} words",
    "Yara counted 212": lambda: 210 + 2,
    "coffee machine": lambda: {3: "three times"}[1 + 2],
    "Old Sanna": lambda: {9: "nine"}["WxWxWxWxWxW".rindex("W") - 1],
}


@pytest.mark.parametrize("words", RIDDLES)
def test_a_riddle_has_this_solution(words: str) -> None:
    item = find("reasoning", words)
    assert right(item) == str(RIDDLES[words]())


@pytest.mark.parametrize("words", READINGS)
def test_a_text_with_figures_leads_to_this_answer(words: str) -> None:
    item = find("reading", words)
    assert right(item) == str(READINGS[words]())
