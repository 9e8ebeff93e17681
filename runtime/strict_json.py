"""Strict reading of JSON objects from files that we did not write.

Refused: duplicate keys, NaN and infinities, text that is not UTF-8, nesting that is too deep, and
values that are not objects. Python's own reader accepts most of these.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runtime.console import UserError


def strict_json(text: bytes, where: Any) -> dict[str, Any]:
    """Parse a JSON object strictly; `where` names its source in the UserError."""
    try:
        value = json.loads(
            text.decode(), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except RecursionError:
        raise UserError(f"{where}: JSON nested too deeply; not a model's file") from None
    except ValueError as e:  # broken, not UTF-8, or refused by one of the two functions below
        raise UserError(f"{where}: not valid JSON ({e}); download the file again") from None
    if type(value) is not dict:
        raise UserError(f"{where}: a JSON {type(value).__name__}, expected an object")
    return value


def read_json(file: Path) -> dict[str, Any]:
    """Read a file's JSON object strictly."""
    return strict_json(file.read_bytes(), file)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"duplicate key {key!r}")
        values[key] = value
    return values


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not a JSON number")
