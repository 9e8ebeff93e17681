"""Cleaning of Kinyarwanda text: one apostrophe in elisions.

Almost every source mixes U+0027 and U+2019 in elisions (n'umwana, n’umwana). For a tokenizer these
are two spellings of each such word. Quotation marks are not changed: only a mark between two
letters is an elision.
"""

from __future__ import annotations

import re

# The marks come first in the expression, because a search for them is fast.
ELISION = re.compile(r"[’‘ʼ`´](?<=[^\W\d_].)(?=[^\W\d_])")


def apostrophe(text: str) -> tuple[str, int]:
    """Write U+0027 where a vowel is elided. Counts the apostrophes that changed."""
    return ELISION.subn("'", text)
