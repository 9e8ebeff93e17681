"""Cleaning of Kinyarwanda text, in steps that are counted and can each be turned off.

Almost every source mixes U+0027 and U+2019 in elisions (n'umwana, n’umwana): to a tokenizer these
are two spellings of each such word. Quotation marks are left alone: only a mark between two letters
is an elision.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import partial

from log import FLAGS, UserError

ELISION = re.compile(r"(?<=[^\W\d_])[’‘ʼ`´](?=[^\W\d_])")
UNSEEN = re.compile("[\u200b\u200c\u200d\u2060\ufeff\u00ad]")  # zero-width, soft hyphen
BLANKS = re.compile(r"[^\S\n]+")  # runs of any blank but the newline
ENDS = re.compile(r" +(?=\n|$)|(?<=\n) +|^ +")
LINES = re.compile(r"\n{3,}")


def nfc(text: str) -> tuple[str, int]:
    """Composed characters (Unicode NFC); counts texts changed."""
    composed = unicodedata.normalize("NFC", text)
    return composed, int(composed != text)


def apostrophe(text: str) -> tuple[str, int]:
    """One apostrophe, U+0027, where a vowel is elided; counts apostrophes changed."""
    return ELISION.subn("'", text)


def spaces(text: str) -> tuple[str, int]:
    """One plain blank between words, none at the ends of a line, one empty line at most; counts
    places changed."""
    once, n = UNSEEN.subn("", text)
    n += sum(m.group() != " " for m in BLANKS.finditer(once))
    once, m = ENDS.subn("", BLANKS.sub(" ", once))
    once, k = LINES.subn("\n\n", once)
    return once, n + m + k


# in the order they are taken: an unseen character may part a letter from its accent, or from its
# apostrophe
STEPS: dict[str, Callable[[str], tuple[str, int]]] = {"spaces": spaces, "nfc": nfc,
                                                      "apostrophe": apostrophe}


def normaliser(steps: Sequence[str]) -> Callable[[str], tuple[str, dict[str, int]]]:
    """A text -> (clean text, changes by step); UserError for an unknown step. Can be sent to
    another process."""
    for step in steps:
        if step not in STEPS:
            raise UserError(
                f"--normalise {step}: no such step; there are {', '.join(STEPS)}, and none", FLAGS)
    return partial(_clean, tuple(step for step in STEPS if step in steps))


def _clean(steps: tuple[str, ...], text: str) -> tuple[str, dict[str, int]]:
    counts = {}
    for step in steps:
        text, counts[step] = STEPS[step](text)
    return text, counts
