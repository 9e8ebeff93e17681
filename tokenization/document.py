"""A tokenized document: what chat templates and readers make, and what a bin is written from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Document:
    """Token ids with BOS and EOS, which of them are trained (None: all), bytes of the text."""

    ids: Sequence[int]
    mask: Sequence[bool] | None
    n_bytes: int
