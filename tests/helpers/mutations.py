"""Damaged files: JSON values, text and bytes, changed by a seeded random generator."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

ODD = [0, -1, 1, 2, 7, 2**31, 2**53, 2**63, 10**30, 1e999, float("nan"), 0.5, "x", "", None, True,
       [], {}, [1], [[]], "F16", "BF16", "F32", "I64", "\u0000", "é" * 50]


def places(x: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every place inside a JSON value, as a path."""
    yield path
    items = []
    if isinstance(x, dict):
        items = x.items()
    elif isinstance(x, list):
        items = enumerate(x)
    for k, v in items:
        yield from places(v, (*path, k))


def mutate(x: dict, draw: random.Random, odd: list = ODD) -> dict:
    """One to three changes: a value replaced, moved by a little, removed, renamed or repeated."""
    x = copy.deepcopy(x)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        *parents, last = draw.choice([p for p in places(x) if p])
        at = x
        for k in parents:
            at = at[k]
        kind = draw.randrange(5)
        if kind == 0:
            at[last] = copy.deepcopy(draw.choice(odd))
        elif kind == 1 and type(at[last]) in (int, float):
            at[last] += draw.choice((-8, -4, -2, -1, 1, 2, 4, 8, 1024))
        elif kind == 2:
            del at[last]
        elif kind == 3 and isinstance(at, dict):
            at[draw.choice((f"{last}x", "", "a", "../a", "__metadata__"))] = at.pop(last)
        elif isinstance(at, list):
            at.insert(draw.randrange(len(at) + 1), copy.deepcopy(draw.choice([at[last], *odd])))
        if not any(p for p in places(x)):
            break
    return x


def swap_values(x: dict, draw: random.Random) -> dict:
    """Two values of an object in each other's place."""
    x = copy.deepcopy(x)
    a, b = draw.choice(list(x)), draw.choice(list(x))
    x[a], x[b] = x[b], x[a]
    return x


def damage_bytes(content: bytes, draw: random.Random) -> bytes:
    """Bytes changed, removed, inserted or repeated, or an end cut off."""
    damaged = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        if not damaged:
            break
        at, kind = draw.randrange(len(damaged)), draw.randrange(5)
        if kind == 0:
            damaged[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del damaged[at : at + draw.randrange(1, 20)]
        elif kind == 2:
            damaged[at:at] = draw.randbytes(draw.randrange(1, 9))
        elif kind == 3:
            part = damaged[at : at + draw.randrange(1, 60)]
            damaged[at:at] = part  # keys may now stand twice
        else:
            del damaged[at:]
    return bytes(damaged)


def damage_json(content: bytes, draw: random.Random, odd: list) -> bytes:
    """A JSON file damaged in its values or in its text."""
    value = json.loads(content)
    kind = draw.randrange(6)
    if kind == 0:
        return damage_bytes(content, draw)
    if kind == 1 and value:
        return json.dumps(swap_values(value, draw)).encode()
    if kind == 2 and value:  # what json.dumps cannot write
        key = draw.choice(list(value))
        text = draw.choice(("9" * 5000, "1e999", "-1e999", "NaN", "-Infinity", "1" * 400 + ".5",
                            "[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, '"\\ud800"',
                            '"' + "x" * 100_000 + '"', "9" * 60))
        raw = json.dumps({**value, key: "PLACE"}).replace('"PLACE"', text, 1)
        return raw.encode()
    return json.dumps(mutate(value, draw, odd)).encode() if value else content
