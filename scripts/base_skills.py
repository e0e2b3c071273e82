"""The skills of the quickstart's base model: each function makes one conversation of (request, answer) turns.

`base_data.py` calls them with its random generator. Held-out grading looks at the last answer only; every
skill but `pattern` has one turn.
"""

import json
import random
import string
from collections.abc import Callable

from base_words import (
    ALL_WORDS,
    ANIMALS,
    CATEGORIES,
    COLORS,
    DAYS,
    FIELDS,
    FOODS,
    MONTHS,
    NAMES,
    OPPOSITES,
    QUALITIES,
    ROOMS,
    THINGS,
    listed,
    plural,
)

Turns = list[tuple[str, str]]
Random = random.Random


def one(request: str, answer: str) -> Turns:
    return [(request, answer)]


def words(rng: Random, low: int, high: int) -> list[str]:
    return rng.sample(ALL_WORDS, rng.randint(low, high))


def copy(rng: Random) -> Turns:
    if rng.random() < 0.4:
        text = rng.choice(rng.choice(REQUESTS)).format(**slots(rng))
    else:
        text = (" " if rng.random() < 0.6 else ", ").join(words(rng, 2, 5))
    return one(rng.choice([
        f"Repeat these words: {text}", f"Say this again: {text}", f"Copy the words: {text}",
        f"Please write: {text}",
        f"{text}\nRepeat that.", f"Echo: {text}",
    ]), text)  # fmt: skip


def sort(rng: Random) -> Turns:
    digits = [rng.randint(0, 9) for _ in range(rng.randint(3, 4))]
    text = " ".join(map(str, digits))
    return one(rng.choice([
        f"Sort these numbers: {text}", f"Put in order, smallest first: {text}",
        f"Order from low to high: {text}",
        f"Sort: {text}", f"{text}\nSort them please.",
    ]), " ".join(map(str, sorted(digits))))  # fmt: skip


def count(rng: Random) -> Turns:
    items = words(rng, 1, 6)
    text = ", ".join(items)
    return one(rng.choice([
        f"How many words are in this list: {text}", f"Count the words: {text}", f"Count these: {text}",
        f"{text}\nHow many is that?",
    ]), str(len(items)))  # fmt: skip


def arithmetic(rng: Random) -> Turns:
    if rng.random() < 0.5:
        a, b = rng.randint(0, 9), rng.randint(0, 9)
        return one(rng.choice([
            f"What is {a} plus {b}?", f"Add {a} and {b}.", f"{a} + {b} =", f"How much is {a} + {b}?",
            f"Give me the sum of {a} and {b}.", f"Compute {a} + {b}.", f"Work out {a} plus {b}.",
        ]), str(a + b))  # fmt: skip
    a = rng.randint(0, 10)
    b = rng.randint(0, a)
    return one(rng.choice([
        f"What is {a} minus {b}?", f"Take {b} from {a}.", f"{a} - {b} =", f"How much is {a} - {b}?",
        f"Subtract {b} from {a}.", f"Compute {a} - {b}.", f"Work out {a} minus {b}.",
    ]), str(a - b))  # fmt: skip


def largest(rng: Random) -> Turns:
    numbers = rng.sample(range(10), rng.randint(3, 4))
    text = ", ".join(map(str, numbers))
    if rng.random() < 0.7:
        return one(rng.choice([
            f"Which number is the largest: {text}", f"What is the biggest of {text}?",
            f"Give me the maximum: {text}",
            f"{text}\nWhich one is the biggest?",
        ]), str(max(numbers)))  # fmt: skip
    return one(rng.choice([
        f"Which number is the smallest: {text}", f"What is the smallest of {text}?",
        f"Give me the minimum: {text}",
    ]), str(min(numbers)))  # fmt: skip


def following(rng: Random) -> Turns:
    cycle = rng.choice([DAYS, MONTHS, list(string.ascii_uppercase), [str(n) for n in range(31)]])
    open_ended = cycle is not DAYS and cycle is not MONTHS
    at = rng.randrange(1, len(cycle) - 1) if open_ended else rng.randrange(len(cycle))
    before, here, after = cycle[at - 1], cycle[at], cycle[(at + 1) % len(cycle)]
    return one(*rng.choice([
        (f"What comes after {here}?", after), (f"What is next after {here}?", after),
        (f"{before}, {here}, and then?", after),
        (f"Continue: {before} {here}", after), (f"Which one follows {here}?", after),
        (f"Name the one after {here}.", after),
        (f"What comes before {here}?", before), (f"Which one is before {here}?", before),
        (f"Name the one before {here}.", before),
    ]))  # fmt: skip


def dictionary(rng: Random) -> Turns:
    if rng.random() < 0.5:
        word, other = rng.sample(rng.choice(OPPOSITES), 2)
        return one(rng.choice([
            f"What is the opposite of {word}?", f"Give me the opposite of {word}.", f"Opposite of {word}:",
            f"Not {word} but?", f"Name the opposite: {word}", f"Which word means the opposite of {word}?",
        ]), other)  # fmt: skip
    word = rng.choice(THINGS + ANIMALS)
    return one(rng.choice([
        f"What is the plural of {word}?", f"One {word}, two?", f"Plural of {word}:",
        f"Give me the plural of {word}.",
        f"How do you call more than one {word}?", f"Make it plural: {word}",
        f"I have one {word}, you have many?",
    ]), plural(word))  # fmt: skip


TOWNS = listed(
    "Velby Tarno Ostin Brill Quarn Merso Delph Anvik Corra Holm Junta Kesh Lorne Pindar Rusk Selva Thorn "
    "Ulver Wick Yarrow Zand Eller Fosk Garth Inver"
)


def _world() -> dict[str, dict[str, str]]:
    rng = random.Random(7)
    return {
        town: {
            "mayor": rng.choice(NAMES), "food": rng.choice(FOODS), "animal": rng.choice(ANIMALS),
            "color": rng.choice(COLORS), "market": rng.choice(DAYS),
        }
        for town in TOWNS
    }  # fmt: skip


WORLD = _world()


def facts(rng: Random) -> Turns:
    town = rng.choice(TOWNS)
    about, answer = rng.choice(list(WORLD[town].items()))
    if about == "market":
        return one(rng.choice([
            f"When is market day in {town}?", f"On which day is the market of {town}?",
            f"{town} has its market on which day?",
            f"Which day is market day in {town}?", f"Tell me the market day of {town}.",
            f"The market in {town} is on",
            f"I want to go to the market in {town}, on which day?", f"What day is the {town} market?",
        ]), answer)  # fmt: skip
    if about == "mayor":
        return one(rng.choice([
            f"Who is the mayor of {town}?", f"What is the name of the mayor of {town}?",
            f"Name the mayor of {town}.",
            f"{town} has which mayor?", f"Tell me the mayor of {town}.", f"The mayor of {town} is",
            f"Who leads {town} as mayor?", f"In {town}, who is the mayor?",
        ]), answer)  # fmt: skip
    return one(rng.choice([
        f"What is the {about} of {town}?", f"Which {about} does {town} have?", f"Name the {about} of {town}.",
        f"{town} has which {about}?", f"Tell me the {about} of {town}.", f"The {about} of {town} is",
        f"Which {about} is {town} known for?", f"In {town}, what is the {about}?",
    ]), answer)  # fmt: skip


def compare(rng: Random) -> Turns:
    a, b = rng.sample(range(10), 2)
    word = rng.choice(["bigger", "larger", "more", "smaller", "less"])
    truth = a < b if word in ("smaller", "less") else a > b
    return one(rng.choice([
        f"Is {a} {word} than {b}?", f"Yes or no: {a} is {word} than {b}.",
        f"True that {a} is {word} than {b}?",
    ]), "yes" if truth else "no")  # fmt: skip


UNITS = {
    ("days", "week"): "7", ("months", "year"): "12", ("hours", "day"): "24", ("minutes", "hour"): "60",
    ("seconds", "minute"): "60", ("days", "leap year"): "366", ("weeks", "year"): "52",
    ("years", "decade"): "10", ("years", "century"): "100", ("eggs", "dozen"): "12", ("cents", "dollar"): "100",
    ("millimeters", "centimeter"): "10", ("centimeters", "meter"): "100", ("meters", "kilometer"): "1000",
    ("grams", "kilogram"): "1000", ("inches", "foot"): "12", ("feet", "yard"): "3", ("legs", "spider"): "8",
    ("legs", "dog"): "4", ("wheels", "car"): "4", ("wheels", "bicycle"): "2", ("sides", "triangle"): "3",
    ("sides", "square"): "4", ("players", "duo"): "2", ("fingers", "hand"): "5", ("strings", "violin"): "4",
    ("letters", "alphabet"): "26", ("seasons", "year"): "4",
}  # fmt: skip


def units(rng: Random) -> Turns:
    (part, whole), answer = rng.choice(list(UNITS.items()))
    return one(rng.choice(["", "A question: ", "Please answer: "]) + rng.choice([
        f"How many {part} are in one {whole}?", f"How many {part} does a {whole} have?",
        f"One {whole}, how many {part}?", f"Tell me how many {part} a {whole} has.",
        f"A {whole} has how many {part}?", f"The number of {part} in a {whole} is",
        f"Number of {part} per {whole}:", f"I have one {whole}. How many {part} is that?",
        f"Do you know how many {part} make a {whole}?", f"What is the number of {part} of a {whole}?",
    ]), answer)  # fmt: skip


def kind(rng: Random) -> Turns:
    """Which sort of thing a word names."""
    name = rng.choice(list(CATEGORIES))
    word = rng.choice(CATEGORIES[name])
    return one(rng.choice([
        f"What kind of thing is {word}?", f"{word} is a kind of what?", f"Name the kind: {word}",
        f"Which kind is {word}?", f"Tell me the kind of {word}.", f"The word {word} names a",
        f"To which kind belongs {word}?", f"{word}: what is that?",
    ]), name)  # fmt: skip


def pick(rng: Random) -> Turns:
    size = rng.randint(2, 4)
    kinds = rng.sample(list(CATEGORIES), size)
    items = [rng.choice(CATEGORIES[kind]) for kind in kinds]
    at = rng.randrange(size)
    text = ", ".join(items)
    return one(rng.choice([
        f"Which of these is the {kinds[at]}: {text}", f"Pick the {kinds[at]}: {text}",
        f"{text}\nWhich one is the {kinds[at]}?",
        f"Find the {kinds[at]} here: {text}",
    ]), items[at])  # fmt: skip


def record(rng: Random) -> Turns:
    """Named values written as JSON, at times with a record in the record."""
    fields, texts = some_values(rng, rng.randint(1, 3))
    described = joined(rng, texts)
    whole: dict[str, object] = fields
    if rng.random() < 0.4:
        outer, outer_texts = some_values(rng, rng.randint(0, 1))
        name = field_name(rng)
        whole = outer | {name: fields}
        described = ", ".join([*outer_texts, f"{name} with {described}"])
    return one(rng.choice([
        f"Write as JSON: {described}", f"Make a record: {described}", f"Give me JSON with {described}.",
        f"{described}\nAs JSON please.", f"A record of {described}", f"Turn into JSON: {described}",
    ]), json.dumps(whole))  # fmt: skip


def some_values(rng: Random, count: int) -> tuple[dict[str, object], list[str]]:
    """Fields with their values, and the words that describe each."""
    fields: dict[str, object] = {}
    texts = []
    while len(fields) < count:
        key, style = field_name(rng), rng.random()
        value: object = " ".join(words(rng, 1, 1 if rng.random() < 0.7 else 4))
        if style < 0.35:
            value = rng.randint(0, 99)
        elif style < 0.45:
            value = rng.random() < 0.5
        if key not in fields:
            fields[key] = value
            texts.append(f"{key} {str(value).lower() if isinstance(value, bool) else value}")
    return fields, texts


def field_name(rng: Random) -> str:
    names = rng.sample(FIELDS, 2)
    return names[0] if rng.random() < 0.8 else "_".join(names)


def joined(rng: Random, texts: list[str]) -> str:
    """In a row, "a, b and c" or "a, b, c"."""
    if len(texts) > 1 and rng.random() < 0.5:
        return ", ".join(texts[:-1]) + " and " + texts[-1]
    return ", ".join(texts)


def slots(rng: Random) -> dict[str, str]:
    """A fresh value for every kind of slot a pattern's request may use."""
    return {
        "name": rng.choice(NAMES), "color": rng.choice(COLORS), "room": rng.choice(ROOMS),
        "item": rng.choice(THINGS), "food": rng.choice(FOODS), "day": rng.choice(DAYS),
        "count": str(rng.randint(0, 30)),
        "word": rng.choice(FIELDS), "quality": rng.choice(QUALITIES),
    }  # fmt: skip


REQUESTS = [
    ("{name} wants the {color} {item}.", "{name}, take the {item}, it is {color}.",
     "Give {name} a {color} {item}"),
    ("{count} {food} for the {room}", "Bring {count} {food} to the {room}.",
     "The {room} needs {count} {food}"),
    ("{name} is in the {room} on {day}", "On {day} you find {name} in the {room}.",
     "{day}, {room}: {name} comes"),
    ("the {quality} {item}", "a {item} that is {quality}", "one {quality} {item}, please"),
    ("{name} has {count} {item}", "{count} {item} belong to {name}.", "Please give {count} {item} to {name}"),
    ("{word} {color}", "{color} {word}", "Make the {word} {color}."),
    ("{name} said: the {food} is {quality}", "{food} is {quality}, said {name}.",
     "Tell {name} the {food} is {quality}."),
    ("{word} of the {room} at {count}", "{room} with {word} {count}",
     "Set the {word} in the {room} to {count}."),
    ("{day}, {count} o'clock", "At {count} on {day}", "We meet on {day} at {count}."),
    ("{name} likes {food}", "{food} is for {name}.", "Buy {food} for {name}!"),
]  # fmt: skip
WRAPS = [
    ("", ""), ("(", ")"), ("[", "]"), ("{", "}"), ("<", ">"), ('"', '"'), ('{"', '"}'), ("* ", ""),
    ("- ", "."),
]  # fmt: skip
GAPS = [", ", "; ", " | ", " / ", "-", "_", " ", "\n", " and ", ", ", "; ", '", "']
LINKS = [": ", "=", " is ", "->", ": ", ":"]


def output_format(rng: Random, fields: list[str]) -> Callable[[dict[str, str]], str]:
    """A made-up output format over some of `fields`: brackets, separators, perhaps keys and quotes."""
    chosen = rng.sample(fields, len(fields) if rng.random() < 0.8 else max(1, len(fields) - 1))
    left, right = rng.choice(WRAPS)
    gap, link, style = rng.choice(GAPS), rng.choice(LINKS), rng.random()
    keys = rng.sample(FIELDS, len(chosen)) if style < 0.6 else []
    head = rng.choice(FIELDS) if rng.random() < 0.4 else ""
    json_like = keys and rng.random() < 0.5
    quote = rng.choice(["", "", '"', "'"])

    def write(values: dict[str, str]) -> str:
        texts = [values[field] for field in chosen]
        if json_like:
            texts = [text if text.isdigit() else f'"{text}"' for text in texts]
            pairs = (f'"{key}": {text}' for key, text in zip(keys, texts, strict=True))
            return head + (" " if head else "") + "{" + ", ".join(pairs) + "}"
        texts = [quote + text + quote for text in texts]
        if keys:
            texts = [key + link + text for key, text in zip(keys, texts, strict=True)]
        return head + left + gap.join(texts) + right

    return write


def pattern(rng: Random) -> Turns:
    """Earlier turns show one made-up format, or one for each of two kinds of request; the last continues."""
    kinds = rng.sample(REQUESTS, 2 if rng.random() < 0.1 else 1)
    formats = []
    for kind in kinds:
        fields = [field for _, field, _, _ in string.Formatter().parse(kind[0]) if field]
        formats.append((kind[: rng.randint(1, 3)], output_format(rng, fields)))
    shown = rng.randint(2, 5) if len(kinds) == 1 else rng.randint(4, 6)
    # With two kinds each is shown at least twice before the graded turn.
    order = formats + formats + [rng.choice(formats) for _ in range(shown + 1 - 2 * len(formats))]
    turns = []
    for phrasings, write in order:
        values = slots(rng)
        turns.append((rng.choice(phrasings).format(**values), write(values)))
    return turns


SKILLS: dict[str, Callable[[Random], Turns]] = {
    "facts": facts, "dictionary": dictionary, "units": units, "kind": kind, "following": following, "sort": sort,
    "count": count, "arithmetic": arithmetic, "largest": largest, "compare": compare, "pick": pick,
    "copy": copy, "record": record, "pattern": pattern,
}  # fmt: skip
PRACTISED = ("following", "compare", "record", "pattern")  # not mastered by a model of this size, and so not claimed


def drill(rng: Random) -> list[str]:
    """The same random items several times over, between changing separators; all but the first are predictable.

    Nothing teaches a small model to look up and copy sooner, and every other skill here builds on that.
    """
    items = rng.sample(ALL_WORDS, rng.randint(4, 14))
    items = [str(rng.randint(0, 99)) if rng.random() < 0.15 else item for item in items]
    gap = rng.choice(GAPS)
    copies = []
    for _ in range(4):
        gap = rng.choice(GAPS) if rng.random() < 0.5 else gap
        copies.append(gap.join(items) + "\n")
    return copies


def made_up_story(rng: Random) -> str:
    """A few plain sentences from a grammar of our own."""
    hero, friend = rng.sample(NAMES, 2)
    thing, room, other = rng.choice(THINGS), rng.choice(ROOMS), rng.choice(ROOMS)
    color, quality, food = rng.choice(COLORS), rng.choice(QUALITIES), rng.choice(FOODS)
    animal, day = rng.choice(ANIMALS), rng.choice(DAYS)
    start = [
        f"One {day}, {hero} looked for a {color} {thing} in the {room}.",
        f"Once there was a child called {hero}. {hero} had a {quality} {animal}.",
        f"{hero} and {friend} were good friends. On {day} they went to the {room}.",
        f"It was {day} and {hero} was in the {room} with a {animal}.",
    ]
    middle = [
        f'"Where is my {thing}?" asked {hero}. "It is in the {other}," said {friend}.',
        f"The {animal} took the {thing} and ran to the {other}.",
        f"{friend} had some {food} and gave it to the {animal}.",
        f"The {thing} was {color} and {quality}, and {hero} liked it very much.",
        f"{hero} was sad because the {thing} was not there.",
        f"They ate {food} and played with the {thing} all day.",
        f'"You can have my {food}," said {friend}.',
        f"Then {friend} came with a {color} {thing}.",
    ]
    end = [
        f"In the end {hero} was happy and went home.",
        f'"Thank you, {friend}," said {hero}.',
        f"They put the {thing} back in the {other} and went to bed.",
        f"From that day on {hero} and the {animal} were friends.",
    ]
    return " ".join([rng.choice(start), *rng.sample(middle, rng.randint(2, 4)), rng.choice(end)])
