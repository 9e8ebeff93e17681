"""Contamination: which items of a test stand in the training text, whole or in a run of 13 words.

A figure of a test that was trained on says nothing. Two signs are counted: the whole sentence is a
line or a sentence of the training text, or a run of N words stands in it (Brown et al. 2020,
appendix C). Letters are made small and punctuation goes before comparing; what has fewer than LEAST
words is no sign of anything.

The training text is read from the bins themselves, decoded: that is what was trained on, whatever
has become of the files. A run's settings name its bins, and the run that its model came from.
Better than counting is leaving out: `prepare.py text --without TESTS` asks here too.
"""

from __future__ import annotations

import re
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import corpus
from data import Bin
from log import say
from sources import split_weight
from tokenizer import Tokenizer

N, LEAST = 13, 5  # words
WORD = re.compile(r"[^\W_]+")
SENTENCE = re.compile(r"(?<=[.!?])\s+")


def words(text: str) -> tuple[str, ...]:
    return tuple(WORD.findall(text.lower()))


class Signs:
    """What betrays items of tests in a text; `tests` gives by name the texts of each item."""

    def __init__(self, tests: dict[str, list[list[str]]]):
        self.whole: dict[tuple[str, ...], set[tuple[str, int]]] = defaultdict(set)  # sentences
        self.run: dict[tuple[str, ...], set[tuple[str, int]]] = defaultdict(set)  # of N words
        for name, items in tests.items():
            for i, texts in enumerate(items):
                for found in map(words, texts):
                    if len(found) >= LEAST:
                        self.whole[found].add((name, i))
                    for at in range(len(found) - N + 1):
                        self.run[found[at : at + N]].add((name, i))

    def within(self, text: str) -> tuple[set[tuple[str, int]], set[tuple[str, int]]]:
        """The items that stand whole in a text, and those of which a run of words does."""
        whole, run = set(), set()
        for line in text.split("\n"):
            for part in {line, *SENTENCE.split(line)}:
                whole |= self.whole.get(words(part), set())
        found = words(text)
        for at in range(len(found) - N + 1):
            run |= self.run.get(found[at : at + N], set())
        return whole, run

    def __call__(self, text: str) -> bool:
        """Whether a text holds any item, or a part of one."""
        return any(self.within(text))


def signs(files: Sequence[str]) -> Signs:
    """The signs of test files: of each line of a .txt, of each text of the other kinds."""
    return Signs({file: [[x] for x in corpus.texts(file, "line")] for file in files})


def find(tests: dict[str, list[list[str]]], training: Iterable[str]) -> dict[str, dict[str, int]]:
    """Items of each test found in the training texts; tests: by name, the texts of each item.

    Gives by name {"items", "whole", "run", "any"}: how many there are, how many are found whole,
    by a run of N words, and in either way. An item counts once.
    """
    sought = Signs(tests)
    hit: dict[str, set[tuple[str, int]]] = {"whole": set(), "run": set()}
    for text in training:
        for how, items in zip(hit, sought.within(text), strict=True):
            hit[how] |= items
    either = hit["whole"] | hit["run"]
    return {name: {"items": len(items), **{
        how: sum(x == name for x, _ in found) for how, found in (*hit.items(), ("any", either))}}
        for name, items in tests.items()}


def trained_on(model: str) -> tuple[list[str], list[str]]:
    """The bins that a run's model was trained on, and those of the runs it came from; then what of
    them is no longer there. Both are empty where the model is no run's."""
    there, gone, seen = [], [], set()
    while True:
        out = next((p for p in (Path(model), Path(model).parent)
                    if (p / "settings.toml").is_file()), None)
        if out is None or out in seen:  # a run may have begun with a folder that lies in its own
            return there, gone
        seen.add(out)
        try:
            settings = tomllib.loads((out / "settings.toml").read_text(encoding="utf-8"))
        except ValueError:
            return there, [*gone, f"{out}/settings.toml (damaged)"]
        for spec in settings.get("data", []):
            head, _ = split_weight(spec)
            stem = Path(head).name.split(".")[0]
            own = out / "bins" / "".join(c if c.isalnum() or c in "-_" else "_" for c in stem)
            found = next((p for p in (Path(head), own) if (p / "meta.json").is_file()), None)
            (gone if found is None else there).append(str(found or head))
        model = settings.get("model", "")
        if not model:
            return there, gone


def texts(specs: Sequence[str], tokenizer: Tokenizer, gone: list[str]) -> Iterator[str]:
    """Every document of bins, decoded, and of files of text; a bin of another tokenizer cannot be
    read, and goes to `gone`."""
    for spec in dict.fromkeys(specs):
        if not (Path(spec) / "meta.json").is_file():
            yield from corpus.texts(spec)
            continue
        bin = Bin(spec)
        if bin.meta["tokenizer"] != tokenizer.fingerprint:
            gone.append(f"{spec} (another tokenizer)")
            continue
        say(f"contamination: reading {spec}, {bin.meta['tokens']:,} tokens")
        for i in range(len(bin)):
            yield tokenizer.decode(bin.document(i).tolist())
