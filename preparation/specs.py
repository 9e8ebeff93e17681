"""Data specs as --data takes them, SPEC[:WEIGHT], and the names of bins that are made of files."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from runtime.console import FLAGS, UserError


def split_weight(spec: str) -> tuple[str, float | None]:
    """Split `SPEC[:WEIGHT]` into the spec and its weight, or None."""
    head, _, tail = spec.rpartition(":")
    try:
        weight = float(tail)
    except ValueError:
        return spec, None
    if not head:
        return spec, None
    if not 0 < weight < float("inf"):
        raise UserError(f"--data {spec}: the weight is {tail}, expected a number above 0", FLAGS)
    return head, weight


def read_weighted_name(word: str, known: Collection[str], error: str) -> tuple[str, float]:
    """Split `NAME[:WEIGHT]`, weight 1 if absent; UserError(error) for another name or a weight that
    is not a finite number above 0."""
    name, _, text = word.partition(":")
    try:
        weight = float(text or 1)
    except ValueError:
        weight = 0.0
    if name not in known or not 0 < weight < float("inf"):
        raise UserError(error, FLAGS)
    return name, weight


def bin_name(spec: str) -> str:
    """The name of the bin of files: that of the file; that of its folder if a glob leaves no
    letter of the file's name."""
    names = (component.split(".")[0] for component in reversed(Path(spec).parts))
    return folder_name(next((x for x in names if any(map(str.isalnum, x))), "text"))


def folder_name(name: str) -> str:
    """A name that a folder can have: other characters than letters, digits, - and _ become _."""
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
