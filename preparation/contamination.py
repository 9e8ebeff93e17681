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

import csv
import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data import Bin
from preparation import conversations as examples
from preparation import text as corpus
from runtime.console import UserError, say
from tokenization.tokenizer import Tokenizer
from training.datasets import split_weight, stem

N, LEAST = 13, 5  # words
KINDS = (".txt", ".csv", *examples.KINDS)  # of tests
TRAINED = (*corpus.KINDS, ".json")  # files of what was trained on
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
            behind = line.partition(":")[2]  # a pair's sentences stand behind a language's name
            for part in {line, behind, *SENTENCE.split(line), *SENTENCE.split(behind)}:
                whole |= self.whole.get(words(part), set())
        found = words(text)
        for at in range(len(found) - N + 1):
            run |= self.run.get(found[at : at + N], set())
        return whole, run

    def __call__(self, text: str) -> bool:
        """Whether a text holds any item, or a part of one."""
        return any(self.within(text))


def signs(files: Sequence[str]) -> Signs:
    """The signs of test files: of each line, in a .tsv or .csv of each of its cells, and of every
    text in a row of .jsonl, .json and .parquet."""
    tests = {}
    for file in files:
        # one that is named may be of any kind
        paths = [Path(file)] if Path(file).is_file() else corpus.files([file], KINDS)
        tests[file] = [x for path in paths for x in _items(path)]
        if not any(map(words, (text for texts in tests[file] for text in texts))):
            raise UserError(f"{file}: no text in it")
    return Signs(tests)


def _items(path: Path) -> Iterator[list[str]]:
    """The texts of each item of a test file."""
    kind = corpus.kind_of(path)
    if kind in (".jsonl", ".json", ".parquet"):
        yield from (list(_texts(row.cells)) for row in examples.rows(path))
        return

    def lines() -> Iterator[str]:
        for n, piece in enumerate(corpus.read(path, "line", key=""), 1):
            if piece.fault:
                raise UserError(
                    f"{path}, line {n}: {piece.fault}; a test leaves nothing out, mend it")
            yield piece.text

    if kind == ".csv":
        try:
            yield from csv.reader(x + "\n" for x in lines())
        except csv.Error as e:
            raise UserError(f"{path}: not a .csv that can be read ({e})") from None
    else:
        yield from (x.split("\t") if kind == ".tsv" else [x] for x in lines())


def _texts(cell: Any) -> Iterator[str]:
    """Every text in a cell, whatever it is made of."""
    if isinstance(cell, str):
        yield cell
    elif isinstance(cell, Mapping | Sequence):
        for x in cell.values() if isinstance(cell, Mapping) else cell:
            yield from _texts(x)


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
            places = (Path(head), out / "bins" / stem(head))
            found = next((p for p in places if (p / "meta.json").is_file()), None)
            (gone if found is None else there).append(str(found or head))
        model = settings.get("model", "")
        if not model:
            return there, gone


def check(specs: Sequence[str], unit: str, key: str) -> None:
    """UserError for bins or files that are not there, or of which no text comes, before anything
    takes long."""
    for spec in specs:
        if (Path(spec) / "meta.json").is_file():
            Bin(spec)
        elif not [path for path in corpus.files([spec], TRAINED)
                  if any(x.fault or x.text.strip() for x in _pieces(path, unit, key))]:
            raise UserError(f"{spec}: no text in it")


def _pieces(path: Path, unit: str, key: str) -> Iterator[corpus.Piece]:
    """The documents of a file, streamed; where rows have no `key` but several texts, as
    conversations and pairs do, all of a row's."""
    try:
        kind = corpus.kind_of(path)
        first = None if kind == ".txt" else next(examples.rows(path), None)
    except (UserError, UnicodeDecodeError):
        first = None  # reading it as text says what is wrong with it, or counts it
    several = first and key not in first.cells and len(list(_texts(first.cells))) > 1
    if kind != ".json" and not several:
        yield from corpus.read(path, unit, key)
        return
    for row in examples.rows(path):
        yield corpus.Piece("\n".join(_texts(row.cells)), row.size)


def texts(specs: Sequence[str], tokenizer: Tokenizer, unit: str, key: str, read: list[str],
          gone: list[str]) -> Iterator[str]:
    """Every document of bins, decoded, and of files, streamed. What it comes from goes to `read`,
    and what cannot be read to `gone`: a bin of another tokenizer, documents with a fault."""
    for spec in dict.fromkeys(specs):
        if not (Path(spec) / "meta.json").is_file():
            say(f"contamination: reading {spec}")
            fates: Counter[str] = Counter()
            for path in corpus.files([spec], TRAINED):
                for piece in _pieces(path, unit, key):
                    fates[piece.fault] += 1
                    if not piece.fault:
                        yield piece.text
            read += [spec] * bool(fates.pop("", 0))
            gone += [f"{spec} ({n:,} {what})" for what, n in fates.items()]
            continue
        bin = Bin(spec)
        if bin.meta["tokenizer"] != tokenizer.fingerprint:
            gone.append(f"{spec} (another tokenizer)")
            continue
        read.append(spec)
        say(f"contamination: reading {spec}, {bin.meta['tokens']:,} tokens")
        for i in range(len(bin)):
            yield tokenizer.decode(bin.document(i).tolist())
