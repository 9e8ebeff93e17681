"""Strict reading of JSON objects from files that we did not write.

Refused: duplicate keys, NaN and infinities, numbers that no program means (`1e999`, 65 digits),
text that is not UTF-8 or not Unicode, nesting deeper than 64, more than 4 million objects and
lists, and values that are not objects. Python's own reader accepts most of these.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from runtime.console import UserError

MAX_DEPTH = 64  # published files have up to 10
MAX_INTEGER_DIGITS = 64  # published: 31, model_max_length of transformers
MAX_VALUES = 1 << 22  # objects and lists; Gemma 3's tokenizer.json has 520,000
MAX_FLOAT_CHARS = 400  # the longest exact float64 has about 330 digits before its point
ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def strict_json(text: bytes, where: Any) -> dict[str, Any]:
    """Parse a JSON object strictly; `where` names its source in the UserError."""
    if text.count(b"{") + text.count(b"[") > MAX_VALUES:  # each needs 56 bytes or more
        raise UserError(f"{where}: more than {MAX_VALUES:,} objects and lists; download the file "
                        "again")
    try:
        value = json.loads(
            text.decode(), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant,
            parse_int=_parse_int, parse_float=_parse_float)
        if ESCAPED_SURROGATE.search(text):
            # half of a pair is not a character, and could not be written to any file
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise _nested_too_deeply(where) from None
    except ValueError as e:  # broken, not UTF-8, or refused by one of the functions below
        raise UserError(f"{where}: not valid JSON ({e}); download the file again") from None
    if type(value) is not dict:
        raise UserError(f"{where}: a JSON {type(value).__name__}, expected an object")
    _check_depth(value, where)
    return value


def read_json(file: Path) -> dict[str, Any]:
    """Read a file's JSON object strictly. For files of a model's folder: read_model_json."""
    return strict_json(file.read_bytes(), file)


def shorten(value: Any) -> str:
    """A value as a message shows it: its repr, at most 80 characters of it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"duplicate key {shorten(key)}")
            seen.add(key)
    return values


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not a JSON number")


def _parse_int(digits: str) -> int:
    if len(digits) > MAX_INTEGER_DIGITS:
        raise ValueError(f"the number {digits[:20]}... has {len(digits)} digits, expected at most "
                         f"{MAX_INTEGER_DIGITS}")
    return int(digits)


def _parse_float(text: str) -> float:
    number = float(text) if len(text) <= MAX_FLOAT_CHARS else math.inf
    if not math.isfinite(number):
        raise ValueError(f"{shorten(text)} is too large or too long for a number")
    return number


def _check_depth(value: Any, where: Any) -> None:
    """UserError if objects and lists are nested deeper than MAX_DEPTH; level by level."""
    level = [value]
    for _ in range(MAX_DEPTH):
        children: list[Any] = []
        for parent in level:
            values = parent.values() if type(parent) is dict else parent
            children += [x for x in values if type(x) is dict or type(x) is list]
        level = children
        if not level:
            return
    raise _nested_too_deeply(where)


def _nested_too_deeply(where: Any) -> UserError:
    return UserError(f"{where}: JSON nested deeper than {MAX_DEPTH} levels; download the file "
                     "again")
