"""Words shared by the base model's skills (base_skills.py) and the quickstart's requests.

Both draw on the same two hundred words on purpose: a model of three million weights copies only words it
has met.
"""


def listed(text: str) -> list[str]:
    return text.split()


NAMES = listed(
    "Tom Mia Ben Lily Anna Max Sam Lucy Tim Sue Jack Emma Leo Rosa Finn Kate Noah Ella Adam Ruby Dan "
    "Nora Paul Jane Mark Amy Peter Sara Luke Zoe"
)
COLORS = listed("red blue green yellow black white brown pink orange purple gray gold")
ROOMS = listed("kitchen bedroom bathroom garage garden hall office attic cellar nursery")
THINGS = listed(
    "ball kite cup book hat box pen key bag lamp coin drum doll car boat bell brush clock rope spoon "
    "plate shoe coat chair ring flag map tent stone sled"
)
FOODS = listed(
    "apple bread cake soup rice milk cheese egg pear fish corn tea plum honey salad pasta lemon butter pizza salt"
)
ANIMALS = listed("dog cat horse cow pig sheep duck hen goat frog bird mouse bear fox lion rabbit bee snake owl whale")
DAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = listed("January February March April May June July August September October November December")
# What an application's fields are called. Mixed into lists and made-up formats, so that their embeddings are
# trained: a low-rank adapter leaves embeddings frozen.
FIELDS = listed(
    "name item room color day hour minutes people level list count text label door locked repeat "
    "degrees arguments timer light message alarm table heating set send add lock true false to low medium "
    "high shopping packing party front back side order code type place note unit group owner size price state"
)
QUALITIES = listed(
    "big small hot cold old new fast slow happy sad clean dirty wet dry full empty dark bright soft hard"
)

OPPOSITES = [
    ("big", "small"), ("hot", "cold"), ("old", "new"), ("fast", "slow"), ("happy", "sad"), ("clean", "dirty"),
    ("wet", "dry"), ("full", "empty"), ("dark", "bright"), ("soft", "hard"), ("up", "down"),
    ("left", "right"), ("in", "out"), ("open", "closed"), ("day", "night"), ("yes", "no"),
    ("high", "low"), ("long", "short"),
    ("good", "bad"), ("front", "back"), ("true", "false"), ("early", "late"), ("rich", "poor"),
    ("thick", "thin"),
]  # fmt: skip
IRREGULAR_PLURALS = {"mouse": "mice", "sheep": "sheep", "fish": "fish"}
CATEGORIES = {
    "animal": ANIMALS, "color": COLORS, "food": FOODS, "room": ROOMS, "person": NAMES, "day": DAYS,
    "month": MONTHS,
}  # fmt: skip

ALL_WORDS = [*dict.fromkeys(NAMES + COLORS + ROOMS + THINGS + FOODS + ANIMALS + DAYS + FIELDS + QUALITIES)]


def plural(word: str) -> str:
    if word in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[word]
    if word.endswith(("s", "x", "sh", "ch")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"
