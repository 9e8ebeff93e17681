"""Contamination: which items of a test are in the training text.

An item is found if one of its sentences is a line or a sentence of the training text, or if 13
consecutive words of it are (Brown et al. 2020, appendix C). Case and punctuation are ignored;
sentences of fewer than 5 words are not searched for.

The training text is decoded from the bins, because these are what was trained on. The settings of
a run name its bins and the run that its model came from. `prepare.py text --without TESTS` uses the
same index to leave contaminated documents out.
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data import Bin
from preparation.readers import (
    ROW_FORMATS,
    TEXT_FORMATS,
    RawDocument,
    file_format,
    list_files,
    read_cells,
    read_documents,
    read_rows,
)
from preparation.specs import bin_name, split_weight
from runtime.console import UserError, info
from tokenization.tokenizer import Tokenizer

NGRAM = 13  # words
MIN_SENTENCE = 5  # words
TEST_FORMATS = (".txt", ".csv", *ROW_FORMATS)
TRAINING_FORMATS = (*TEXT_FORMATS, ".json")
WORD = re.compile(r"[^\W_]+")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")

Item = tuple[str, int]  # name of the test, number of the item
Tests = Mapping[str, Sequence[Sequence[str]]]  # by name, the texts of each item


def words_of(text: str) -> tuple[str, ...]:
    """The words of a text in lower case, without punctuation."""
    return tuple(WORD.findall(text.lower()))


class ContaminationIndex:
    """The sentences and the n-grams of all items of some tests; called with a text, whether any
    item is in it."""

    def __init__(self, tests: Tests):
        self.sentences: dict[tuple[str, ...], set[Item]] = defaultdict(set)
        self.ngrams: dict[tuple[str, ...], set[Item]] = defaultdict(set)
        for name, items in tests.items():
            for i, texts in enumerate(items):
                for text in texts:
                    self._add(words_of(text), (name, i))

    def _add(self, words: tuple[str, ...], item: Item) -> None:
        if len(words) >= MIN_SENTENCE:
            self.sentences[words].add(item)
        for start in range(len(words) - NGRAM + 1):
            self.ngrams[words[start : start + NGRAM]].add(item)

    def matches(self, text: str) -> tuple[set[Item], set[Item]]:
        """The items of which a sentence is in the text, and those of which an n-gram is."""
        by_sentence: set[Item] = set()
        by_ngram: set[Item] = set()
        for line in text.split("\n"):
            # a translation stands behind the name of its language and a colon
            behind_colon = line.partition(":")[2]
            for sentence in {line, behind_colon, *SENTENCE_END.split(line),
                             *SENTENCE_END.split(behind_colon)}:
                by_sentence |= self.sentences.get(words_of(sentence), set())
        text_words = words_of(text)
        for start in range(len(text_words) - NGRAM + 1):
            by_ngram |= self.ngrams.get(text_words[start : start + NGRAM], set())
        return by_sentence, by_ngram

    def __call__(self, text: str) -> bool:
        return any(self.matches(text))


def index_files(specs: Sequence[str]) -> ContaminationIndex:
    """The index of test files: the lines of a text file, the cells of a .tsv or .csv, and every
    text in the rows of .jsonl, .json and .parquet files."""
    tests = {}
    for spec in specs:
        # a single file may be of any format
        paths = [Path(spec)] if Path(spec).is_file() else list_files([spec], TEST_FORMATS)
        tests[spec] = [item for path in paths for item in _read_items(path)]
        if not any(words_of(text) for texts in tests[spec] for text in texts):
            raise UserError(f"{spec}: no text in it")
    return ContaminationIndex(tests)


def _read_items(path: Path) -> Iterator[list[str]]:
    """The texts of each item of a test file."""
    if file_format(path) in (".jsonl", ".json", ".parquet"):
        for row in read_rows(path):
            yield list(_texts_in(row.cells))
    else:
        yield from read_cells(path)


def _texts_in(value: Any) -> Iterator[str]:
    """Every text in a cell, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for x in value.values():
            yield from _texts_in(x)
    elif isinstance(value, Sequence):
        for x in value:
            yield from _texts_in(x)


def count_contaminated(tests: Tests, training: Iterable[str]) -> dict[str, dict[str, int]]:
    """Count the items of each test that are in the training texts.

    Returns by name {"items", "whole", "run", "any"}: how many items there are, and how many were
    found by a sentence, by an n-gram, and by either.
    """
    index = ContaminationIndex(tests)
    by_sentence: set[Item] = set()
    by_ngram: set[Item] = set()
    for text in training:
        sentence_items, ngram_items = index.matches(text)
        by_sentence |= sentence_items
        by_ngram |= ngram_items
    counts = {}
    for name, items in tests.items():
        counts[name] = {"items": len(items)}
        for key, matched in (("whole", by_sentence), ("run", by_ngram),
                             ("any", by_sentence | by_ngram)):
            counts[name][key] = sum(test == name for test, _ in matched)
    return counts


def bins_of_run(model: str) -> tuple[list[str], list[str]]:
    """The bins that the model of a run was trained on, with those of the runs it came from; and
    the names of those that are no longer there. Both lists are empty if the model is not of a run.
    """
    bins, missing = [], []
    visited: set[Path] = set()
    while True:
        run = next((p for p in (Path(model), Path(model).parent)
                    if (p / "settings.toml").is_file()), None)
        if run is None or run in visited:  # a run's first model may lie in the run's own folder
            return bins, missing
        visited.add(run)
        try:
            settings = tomllib.loads((run / "settings.toml").read_text(encoding="utf-8"))
        except ValueError:
            return bins, [*missing, f"{run}/settings.toml (damaged)"]
        for weighted_spec in settings.get("data", []):
            spec, _ = split_weight(weighted_spec)
            folders = (Path(spec), run / "bins" / bin_name(spec))
            folder = next((p for p in folders if (p / "meta.json").is_file()), None)
            if folder is None:
                missing.append(spec)
            else:
                bins.append(str(folder))
        model = settings.get("model", "")
        if not model:
            return bins, missing


def require_text(specs: Sequence[str], unit: str, key: str) -> None:
    """UserError for a bin or file that is not there, or that holds no text; to be called before
    any long work."""
    for spec in specs:
        if _is_bin(spec):
            Bin(spec)
            continue
        with_text = [path for path in list_files([spec], TRAINING_FORMATS)
                     if any(x.fault or x.text.strip()
                            for x in _read_training_file(path, unit, key))]
        if not with_text:
            raise UserError(f"{spec}: no text in it")


@dataclass
class TrainingText:
    """The documents of bins (decoded) and files, as a stream. `read` and `unread` list, after the
    iteration, which of them were read, and which could not be (bins of another tokenizer,
    documents with a fault)."""

    specs: Sequence[str]
    tokenizer: Tokenizer
    unit: str = "auto"
    key: str = "text"
    read: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[str]:
        for spec in dict.fromkeys(self.specs):
            yield from self._read_bin(spec) if _is_bin(spec) else self._read_files(spec)

    def _read_bin(self, spec: str) -> Iterator[str]:
        bin = Bin(spec)
        if bin.meta["tokenizer"] != self.tokenizer.fingerprint:
            self.unread.append(f"{spec} (another tokenizer)")
            return
        self.read.append(spec)
        info(f"contamination: reading {spec}, {bin.meta['tokens']:,} tokens")
        for i in range(len(bin)):
            yield self.tokenizer.decode(bin.document(i).tolist())

    def _read_files(self, spec: str) -> Iterator[str]:
        info(f"contamination: reading {spec}")
        n_read = 0
        faults: Counter[str] = Counter()
        for path in list_files([spec], TRAINING_FORMATS):
            for document in _read_training_file(path, self.unit, self.key):
                if document.fault:
                    faults[document.fault] += 1
                else:
                    n_read += 1
                    yield document.text
        if n_read:
            self.read.append(spec)
        self.unread += [f"{spec} ({count:,} {fault})" for fault, count in faults.items()]


def _is_bin(spec: str) -> bool:
    return (Path(spec) / "meta.json").is_file()


def _read_training_file(path: Path, unit: str, key: str) -> Iterator[RawDocument]:
    """The documents of a file, as a stream. If its rows have no `key` but several texts, as those
    of conversations and pairs do, a document is all texts of a row."""
    if file_format(path) == ".json" or _has_several_texts(path, key):
        for row in read_rows(path):
            yield RawDocument("\n".join(_texts_in(row.cells)), row.n_bytes)
    else:
        yield from read_documents(path, unit, key)


def _has_several_texts(path: Path, key: str) -> bool:
    if file_format(path) == ".txt":
        return False
    try:
        first = next(read_rows(path), None)
    except UserError:
        return False  # read_documents says what is wrong with the file, or counts it
    return first is not None and key not in first.cells and len(list(_texts_in(first.cells))) > 1
