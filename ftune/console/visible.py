"""Characters that a terminal would obey or swallow, as ones that can be seen."""

import re
import unicodedata

SIGNS = {"\n": "⏎\n", "\t": "⇥ ", "\xa0": "⍽"}
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of control and format characters, lone surrogates, line and paragraph separators."""
KEPT = "\u200c\u200d"  # joiners, parts of emoji and of written words
EDGE_SPACES = re.compile(r"\A +| +\Z| {2,}| +(?=\n)|(?<=\n) +")


def visible(text: str) -> str:
    """On one line: control and format characters as their pictures or numbers, so that data cannot move the cursor."""
    return signs(text).replace("⏎\n", "⏎")


def visible_lines(text: str) -> str:
    """The same in several lines, with a sign for each space that an eye would miss: at an edge, or one of several."""
    return signs(EDGE_SPACES.sub(lambda found: "␣" * len(found.group()), text))


def in_lines(text: str) -> str:
    """Its own lines, in which control and format characters can be seen; all else as it is."""
    if text.isprintable():
        return text
    return "\n".join("".join(map(_sign, line)) for line in text.split("\n"))


def signs(text: str) -> str:
    """A picture of each character that is none, in front of each line break too."""
    return "".join(map(_sign, text))


def _sign(character: str) -> str:
    if character in SIGNS:
        return SIGNS[character]
    if character.isprintable() or character in KEPT or unicodedata.category(character) not in HIDDEN:
        return character
    if ord(character) < 0x20:
        return chr(0x2400 + ord(character))
    return f"⟨{ord(character):x}⟩"
