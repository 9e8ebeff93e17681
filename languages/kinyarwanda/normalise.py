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

from runtime.console import FLAGS, UserError

# the marks come first: they are sought for quickly, and what stands before them is looked at then
ELISION = re.compile(r"[’‘ʼ`´](?<=[^\W\d_].)(?=[^\W\d_])")
UNSEEN = re.compile("[\u200b\u200c\u200d\u2060\ufeff\u00ad]")  # zero-width, soft hyphen
ODD = re.compile(r" [^\S\n]+|[^\S\n ][^\S\n]*")  # runs of any blank but the newline, save " "
ENDS = re.compile(r" +(?=\n|$)|(?<=\n) +|^ +")
LINES = re.compile(r"\n{3,}")


def nfc(text: str) -> tuple[str, int]:
    """Composed characters (Unicode NFC); counts texts changed."""
    composed = text if text.isascii() else unicodedata.normalize("NFC", text)
    return composed, int(composed != text)


def apostrophe(text: str) -> tuple[str, int]:
    """One apostrophe, U+0027, where a vowel is elided; counts apostrophes changed."""
    return ELISION.subn("'", text)


def spaces(text: str) -> tuple[str, int]:
    """One plain blank between words, none at the ends of a line, one empty line at most; counts
    places changed."""
    n = odd = ends = lines = 0
    # most text needs nothing, which is seen sooner than each expression finds nothing
    printable = text.replace("\n", "").isprintable()  # no unseen character, no blank but " "
    if not printable:
        text, n = UNSEEN.subn("", text)
    if not printable or "  " in text:
        text, odd = ODD.subn(" ", text)
    if " \n" in text or "\n " in text or text[:1] == " " or text[-1:] == " ":
        text, ends = ENDS.subn("", text)
    if "\n\n\n" in text:
        text, lines = LINES.subn("\n\n", text)
    return text, n + odd + ends + lines


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
