"""The general probe's instructions and formats, judged by machine: only the keyed reply obeys."""

import csv
import io
import json
import re
from collections.abc import Callable
from datetime import date, datetime, timedelta

import pytest
import yaml
from general_kit import find, right, wrong

Judge = Callable[[str], bool]


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z']+", text)


def sentences(text: str) -> list[str]:
    return re.findall(r"[^.!?]+[.!?]", text)


def is_exactly(wanted: str) -> Judge:
    return lambda reply: reply == wanted


def alternates(reply: str) -> bool:
    kind = {"Everest": "mountain", "Etna": "mountain", "Nile": "river", "Rhine": "river"}
    return [kind[name] for name in reply.split(", ")] == ["mountain", "river"] * 2


def counts_countries_backwards(reply: str) -> bool:
    names = re.findall(r"(\w+);", reply)
    return len(names) == 3 and names == sorted(names, reverse=True) and reply.endswith(";")


SIZES = ["ant", "mouse", "sheep", "elephant"]
LETTER_FREE = re.compile(r"[^sS]*")
# Words of the instruction, and what a reply must be to obey it.
INSTRUCTIONS: dict[str, Judge] = {
    "the word 'winter'": is_exactly("winter".upper()),
    "Name exactly three fruits": lambda reply: len(reply.split(", ")) == 3,
    "Count from five": is_exactly(", ".join(map(str, range(5, 0, -1)))),
    "Grass is usually": lambda reply: len(words(reply)) == 1,
    "pear, fig, lime": is_exactly(", ".join(sorted(["pear", "fig", "lime"]))),
    "a question of your own": lambda reply: reply.endswith("?"),
    "The kettle sings": is_exactly("The kettle sings at dawn."),
    "begins with the letter b": lambda reply: reply.startswith("b"),
    "the number twelve": is_exactly(str(12)),
    "a numbered list of two pets": lambda reply: bool(re.fullmatch(r"1\. \w+\n2\. \w+", reply)),
    "exactly four words": lambda reply: len(words(reply)) == 4,
    "the letter s.": lambda reply: bool(LETTER_FREE.fullmatch(reply)) and "cat" in reply,
    "begins with the word 'Never'": lambda reply: reply.startswith("Never") and reply.endswith("!"),
    "from the smallest to the largest": is_exactly(", ".join(SIZES)),
    "in two sentences": lambda reply: len(sentences(reply)) == 2,
    "begins with the letter t": lambda r: len(words(r)) == 5 and all(w[0] in "tT" for w in words(r)),
    "hot, big, fast": is_exactly("cold, small, slow"),
    "Quiet rivers": lambda reply: reply == words("Quiet rivers carry heavy stones")[2],
    "in at most six words": lambda reply: len(words(reply)) <= 6 and {"Meeting", "Wednesday"} <= set(words(reply)),
    "with 'river' first": lambda r: len(sentences(r)) == 1 and -1 < r.find("river") < r.find("lamp"),
    "reverse alphabetical order": counts_countries_backwards,
    "exactly two lines": lambda reply: [len(words(line)) for line in reply.split("\n")] == [3, 2],
    "more than four letters": lambda reply: max(map(len, words(reply))) <= 4,
    "days of the weekend": is_exactly("-".join(["Saturday", "Sunday"]).upper()),
    "number 91 is prime": is_exactly("left" if all(91 % k for k in range(2, 91)) else "right"),
    "report its length in words": lambda reply: reply == {4: "four words"}[len(words("Please sing a song"))],
    "a title of five words": lambda r: (
        len(words(r)) == 5 and [w[0].isupper() for w in words(r)] == [True] + [False] * 4
    ),
    "'moon' twice": is_exactly(" ".join(["sun"] + ["moon"] * 2 + ["star"] * 3)),
    "letters of 'planet'": is_exactly(".".join(reversed("planet"))),
    "two rivers and two mountains": alternates,
    "exactly one comma": lambda reply: reply.count(",") == 1 and "and" not in words(reply),
}
REPLIES: dict[str, str] = {
    "word 'ready'": "ready".upper(),
    "word 'lantern'": " ".join(["lantern"] * 3),
    "Green apples": ["Green", "apples", "taste", "sour"][1],
    "mango, kiwi, banana": ", ".join(sorted(["mango", "kiwi", "banana"])),
    "word 'cloud'": "-".join("cloud"),
    "from 4 to 8": " ".join(map(str, range(4, 9))),
    "QX-4471-b": "QX-4471-b",
    "tree, flower, bush": max(["tree", "flower", "bush"], key=len).upper(),
    "last letter of the word 'garden'": "garden"[-1],
    "Replace every 'a'": "banana".replace("a", "o"),
    "red green blue": " ".join(reversed(["red", "green", "blue"])),
    "seven is greater than nine": "up" if 7 > 9 else "down",
    "'harbour'": "[harbour]",
    "The small boat": str(len(["The", "small", "boat", "drifted", "slowly", "home"])),
    "Sand Tall Orange": "".join(word[0] for word in ["Sand", "Tall", "Orange", "Near", "Early"]).lower(),
}


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_only_the_keyed_reply_obeys(instruction: str) -> None:
    item = find("instruction_following", instruction)
    obeys = INSTRUCTIONS[instruction]
    assert obeys(right(item))
    assert not [reply for reply in wrong(item) if obeys(reply)]


@pytest.mark.parametrize("instruction", REPLIES)
def test_the_reply_to_an_instruction_is_this(instruction: str) -> None:
    assert right(find("instruction_following", instruction)) == REPLIES[instruction]


def parses(read: Callable[[str], object]) -> Judge:
    """Whether a text can be read at all."""

    def judge(text: str) -> bool:
        try:
            read(text)
        except (ValueError, yaml.YAMLError):
            return False
        return True

    return judge


def reads_as(read: Callable[[str], object], value: object) -> Judge:
    readable = parses(read)
    return lambda text: readable(text) and read(text) == value


def row(text: str) -> list[str]:
    return next(csv.reader(io.StringIO(text)))


def matched(pattern: str) -> Judge:
    return lambda text: re.search(pattern, text) is not None


def matching(yes: list[str], no: list[str]) -> Judge:
    """A regular expression that finds all of the first texts and none of the others."""
    return lambda pattern: all(re.search(pattern, t) for t in yes) and not any(re.search(pattern, t) for t in no)


# Not dots between groups of the hour: fromisoformat also reads short forms that people do not write.
def is_time_of_day(text: str) -> bool:
    return bool(re.fullmatch(r"\d\d:\d\d", text)) and parses(lambda t: datetime.strptime(t, "%H:%M"))(text)


FORMATS: dict[str, Judge] = {
    "lines is valid JSON?": parses(json.loads),
    "valid JSON array": parses(json.loads),
    '{"a": {"b"': reads_as(str, str(json.loads('{"a": {"b": [10, 20, 30]}}')["a"]["b"][1])),
    "as a boolean?": lambda text: parses(json.loads)(text) and json.loads(text) is True,
    "How many keys": is_exactly(str(len(json.loads('{"x": 1, "y": {"z": 2, "w": 3}}')))),
    "inside a JSON string": lambda text: parses(json.loads)(f'"{text}"') and json.loads(f'"{text}"') == '"',
    "no telephone number": reads_as(json.loads, {"name": "Ana", "phone": None, "cats": 2}),
    "header 'city,country'": reads_as(row, ["Bergen, old town", "Norway"]),
    "header is 'id,name,price'": is_exactly(row("7,lamp,19")[2]),
    "row 'a,,c,'": is_exactly(str(len(row("a,,c,")))),
    "quoted CSV field": lambda text: row(f'"a{text}b",c') == ['a"b', "c"],
    "list of two strings": reads_as(yaml.safe_load, ["tea", "milk"]),
    "text 012 as a string": reads_as(yaml.safe_load, {"code": "012"}),
    "comment begin in YAML": lambda text: yaml.safe_load(f"a: 1 {text} b") == {"a": 1},
    "same as this YAML": reads_as(json.loads, yaml.safe_load("port: 80\nhosts:\n  - a\n  - b")),
    "4 July 2023": is_exactly(date(2023, 7, 4).isoformat()),
    "24-hour notation": is_time_of_day,
    "does not exist": lambda text: not parses(date.fromisoformat)(text),
    r"^\d{3}-\d{2}$": matched(r"^\d{3}-\d{2}$"),
    "^[a-z]+[0-9]?$": matched("^[a-z]+[0-9]?$"),
    "'color' and 'colour'": matching(["color", "colour"], ["coloor", "colr", "colouur"]),
    "^ab*c$": matched("^ab*c$"),
    "optional minus sign": matching(["0", "-7", "1234"], ["", "-", "--7", "7-", "1.5"]),
    "^(ha){2,3}!$": matched("^(ha){2,3}!$"),
}
TURNED: dict[str, object] = {
    'the key "city"': {"city": "Oslo"},
    "JSON array of numbers": [1, 2, 3],
    "Mara is 31": {"name": "Mara", "age": 31},
    "Turn this CSV": list(csv.DictReader(io.StringIO("id,fruit\n5,plum\n"))),
    'Add the key "open"': {**json.loads('{"shop": "Lido"}'), "open": True},
    'Remove the key "b"': {k: v for k, v in json.loads('{"a": 1, "b": 2, "c": 3}').items() if k != "b"},
    "Turn this YAML": yaml.safe_load("size: 4\ntags:\n  - red\n  - new\n"),
    "Sort this JSON array": sorted([9, 2, 7, 4]),
}
WRITTEN: dict[str, str] = {
    "9 March 2018": date(2018, 3, 9).isoformat(),
    "half past two": datetime(2000, 1, 1, 12 + 2, 30).strftime("%H:%M"),
    "1999-12-31": (date(1999, 12, 31) + timedelta(days=1)).isoformat(),
    "one CSV row": ",".join(["red", "green", "blue"]),
    "which name has the id 2": {"1": "Ada", "2": "Bo", "3": "Cy"}["2"],
    'value of "total"': str(json.loads('{"items": [3, 4], "total": 7, "paid": false}')["total"]),
}


@pytest.mark.parametrize("asked", FORMATS)
def test_only_the_keyed_text_has_the_format(asked: str) -> None:
    item = find("formats", asked)
    fits = FORMATS[asked]
    assert fits(right(item))
    assert not [text for text in wrong(item) if fits(text)]


@pytest.mark.parametrize("asked", TURNED)
def test_the_json_that_is_wanted_is_this(asked: str) -> None:
    item = find("formats", asked)
    assert item["metric"] == "json_match"
    assert json.loads(right(item)) == TURNED[asked]


@pytest.mark.parametrize("asked", WRITTEN)
def test_the_text_that_is_wanted_is_this(asked: str) -> None:
    assert right(find("formats", asked)) == WRITTEN[asked]
