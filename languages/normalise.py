"""Cleaning of text in steps. Each step counts its changes and can be turned off.

`spaces` and `nfc` suit every language. Steps for one language stand in the folder of that language.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.console import FLAGS, UserError

Step = Callable[[str], tuple[str, int]]  # text -> (clean text, number of changes)


@dataclass(frozen=True)
class Normaliser:
    """Named steps in the order of application. It can be sent to another process.

    `languages`: codes of the languages whose steps the names are of.
    """

    steps: tuple[tuple[str, Step], ...]
    languages: tuple[str, ...] = ()

    def __call__(self, text: str) -> tuple[str, dict[str, int]]:
        """Return the clean text and the number of changes by step."""
        counts = {}
        for name, step in self.steps:
            text, counts[name] = step(text)
        return text, counts

    def to_json(self) -> dict[str, Any]:
        """Return the steps as meta.json and prompt.json have them."""
        return {"languages": list(self.languages), "steps": [name for name, _ in self.steps]}


INVISIBLE = re.compile("[\u200b\u200c\u200d\u2060\ufeff\u00ad]")  # zero-width, soft hyphen
BLANKS = re.compile(r" [^\S\n]+|[^\S\n ][^\S\n]*")  # every run of blanks except one plain space
LINE_ENDS = re.compile(r" +(?=\n|$)|(?<=\n) +|^ +")
EMPTY_LINES = re.compile(r"\n{3,}")


def nfc(text: str) -> tuple[str, int]:
    """Compose characters (Unicode NFC). Counts one change for a text that differs."""
    composed = text if text.isascii() else unicodedata.normalize("NFC", text)
    return composed, int(composed != text)


def spaces(text: str) -> tuple[str, int]:
    """Keep one plain space between words, no space at the ends of a line and at most one empty
    line. Counts the places that changed."""
    invisible = blanks = line_ends = empty_lines = 0
    # Most texts need no change. These tests are faster than regular expressions that find nothing.
    printable = text.replace("\n", "").isprintable()  # no invisible character, no blank but " "
    if not printable:
        text, invisible = INVISIBLE.subn("", text)
    if not printable or "  " in text:
        text, blanks = BLANKS.subn(" ", text)
    if " \n" in text or "\n " in text or text[:1] == " " or text[-1:] == " ":
        text, line_ends = LINE_ENDS.subn("", text)
    if "\n\n\n" in text:
        text, empty_lines = EMPTY_LINES.subn("\n\n", text)
    return text, invisible + blanks + line_ends + empty_lines


# The order matters: an invisible character may stand between a letter and its accent.
COMMON_STEPS: dict[str, Step] = {"spaces": spaces, "nfc": nfc}


def normaliser(names: Sequence[str], available: Mapping[str, Step],
               languages: Sequence[str] = ()) -> Normaliser:
    """Return the normaliser of the named steps, in the order of `available`.

    Raises UserError for an unknown step.
    """
    for name in names:
        if name not in available:
            raise UserError(f"--normalise {name}: no such step; there are {', '.join(available)}, "
                            "and none", FLAGS)
    steps = tuple((name, step) for name, step in available.items() if name in names)
    return Normaliser(steps, tuple(languages))


def cleaning_of(normalise: Normaliser | None) -> dict[str, Any]:
    """Return the steps of a normaliser as meta.json has them; no steps for None."""
    return (normalise or Normaliser(())).to_json()
