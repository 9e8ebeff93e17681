"""A tokenized document, as encoders make it and bins store it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Document:
    """Token ids with BOS and EOS, which of them are trained (None: all), the bytes of the text, and
    the number of its characters that the tokenizer cannot spell."""

    ids: Sequence[int]
    mask: Sequence[bool] | None
    n_bytes: int
    n_unspelled: int = 0
