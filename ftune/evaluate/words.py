"""Text -> words, in every script: what ROUGE-L compares, and how BLEU is to split a text."""

import re
import unicodedata

HAN = "\u2e80-\u2fdf\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
OTHERS_WITHOUT_SPACES = "\u3040-\u30ff\u31f0-\u31ff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\uaa60-\uaa7f"
"""Kana; Thai and Lao; Burmese; Khmer; Burmese, extended."""
UNSPACED = re.compile(f"[{HAN}{OTHERS_WITHOUT_SPACES}]")


def words(text: str) -> list[str]:
    """The words of a text, in lower case; in scripts without spaces each character is one.

    A word is a run of letters, digits and the marks on them, so on ASCII text these are the words that ROUGE's
    own implementation has ([a-z0-9]+), which loses all other text. A pictograph is a word of its own; punctuation
    is none.
    """
    found: list[str] = []
    is_open = False  # whether a letter goes on with the last word
    for character in unicodedata.normalize("NFKC", text).lower():
        kind = unicodedata.category(character)
        is_unspaced = bool(UNSPACED.match(character))
        if kind == "Cf":  # joiners and soft hyphens are no letters and end no word
            continue
        if kind[0] == "M":
            if is_open:
                found[-1] += character
        elif kind[0] in "LN" and is_open and not is_unspaced and not UNSPACED.match(found[-1]):
            found[-1] += character
        elif kind[0] in "LN" or kind == "So":
            found.append(character)
            is_open = kind != "So"
        else:
            is_open = False
    return found


def bleu_tokenizer(text: str) -> str:
    """sacrebleu's tokenizer for a text: `13a`, which needs spaces, unless most letters are of scripts without them.

    `zh` takes Chinese characters one by one and the words between them whole; `char` takes every character, which
    stands in for a dictionary of Japanese, Thai, Lao, Khmer or Burmese.
    """
    letters = [character for character in text if character.isalpha()]
    unspaced = [character for character in letters if UNSPACED.match(character)]
    if 2 * len(unspaced) <= len(letters):
        return "13a"
    return "char" if re.search(f"[{OTHERS_WITHOUT_SPACES}]", text) else "zh"
