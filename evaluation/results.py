"""The files of an evaluation: records of items, results, the table; another system's translations.

A record is what was answered to one item, a line of OUT/items/NAME.jsonl. It holds everything that
the item's metrics need, so an earlier evaluation can be compared from its files alone. A result is
one metric, an entry of `results` in OUT/results.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

import numpy as np

from evaluation.significance import LEVEL, confidence_interval
from runtime.console import FLAGS, UserError

if TYPE_CHECKING:
    from evaluation.metrics import Measure

METRICS_VERSION = 2  # one more whenever a metric would come out differently
TEXT_PREFIX = "text:"  # of the suite's name in the results of a text
LINE_BREAKS = re.compile(r"[\r\n\x0b\x0c\x1c-\x1e\x85\u2028\u2029]+")  # as str.splitlines


class DocumentRecord(TypedDict):
    """A document of a text."""

    nats: float  # -log p
    bytes: int  # in UTF-8


class ChoiceRecord(TypedDict):
    """A multiple-choice item; the columns of the suite's `groups` are further keys."""

    gold: int  # index of the right choice
    logp: list[float]  # of each choice, in nats
    choices: list[str]


class AnswerRecord(TypedDict):
    """An item with a generated answer."""

    gold: str
    answer: str
    end: str  # why the answer ended: eos, stop, length


class TranslationRecord(TypedDict):
    """A sentence, its reference and a translation."""

    scores: NotRequired[dict[str, float]]  # of the segment by other programs, by name
    source: str
    reference: str
    hypothesis: str
    end: str  # as in AnswerRecord; "" for another system's translation


SampleLog = DocumentRecord | ChoiceRecord | AnswerRecord | TranslationRecord


class FileInfo(TypedDict):
    """A file that was evaluated."""

    path: str
    sha256: str


class Comparison(TypedDict):
    """A result of the baseline, and the paired test against it."""

    value: float
    difference: float  # ours minus the baseline's
    low: float  # of the difference's 95 % interval
    high: float
    p: float


class MetricResult(TypedDict, total=False):
    """One metric in results.json; docs/formats.md describes the keys."""

    suite: str
    metric: str
    value: float
    low: float | None  # 95 % interval; None for a single item
    high: float | None
    n: int  # items
    chance: float  # what guessing gives; only if answers are chosen from several
    signature: str
    part: str  # a direction of translation
    prompt: str
    group: str  # "COLUMN VALUE": only items with this value
    aside: str  # why the prompt is excluded from the mean
    least: float  # of a mean over prompts: its lowest and highest value, and how many
    most: float
    prompts: int
    partial: bool  # whether --limit left items out
    bytes: int  # of a text
    tokens: int
    seconds: float
    files: list[FileInfo]
    items: str  # name of the file of records
    baseline: Comparison


def record_name(suite: str, prompt: str = "", part: str = "") -> str:
    """Return the name of the file of records, without suffix, in OUT/items."""
    return ".".join(filter(None, (suite.replace(TEXT_PREFIX, "text."), part, prompt)))


def metric_result(suite: str, measure: Measure, signature: str,
                  **details: object) -> MetricResult:
    """Return a metric with its confidence interval. `details`: further keys of MetricResult."""
    low, high = confidence_interval([measure]) or (None, None)
    signature = "|".join(filter(None, (signature, measure.signature)))
    return {"suite": suite, "metric": measure.name, "value": measure.value, "low": low,
            "high": high, "n": len(measure.counts), **_chance([measure]), "signature": signature,
            **details}


def mean_result(suite: str, measures: Sequence[Measure], signature: str,
                **details: object) -> MetricResult:
    """Return the mean of one metric over several prompts, with its lowest and highest value."""
    values = [m.value for m in measures]
    low, high = confidence_interval(measures) or (None, None)
    return {"suite": suite, "metric": measures[0].name, "value": float(np.mean(values)),
            "low": low, "high": high, "n": len(measures[0].counts), **_chance(measures),
            "least": min(values), "most": max(values), "prompts": len(values),
            "signature": signature, **details}


def _chance(measures: Sequence[Measure]) -> dict[str, float]:
    """Return the key `chance` of a mean of measures; no key if there is nothing to guess."""
    levels = [m.chance for m in measures if m.chance is not None]
    return {"chance": float(np.mean(levels))} if len(levels) == len(measures) else {}


def is_above_chance(r: MetricResult) -> bool:
    """Return True if the interval of a result is above chance, or if there is no chance level."""
    return "chance" not in r or (r["low"] is not None and r["low"] > r["chance"])


def group_results(suite: str, measure: Measure, records: Sequence[Mapping], columns: Sequence[str],
                  signature: str, **details: object) -> list[MetricResult]:
    """Return a metric for the items of each value of some columns, such as each noun class."""
    results = []
    for column in columns:
        values = np.array([str(r[column]) for r in records])
        for value in sorted(set(values), key=lambda v: (len(v), v)):
            results.append(metric_result(suite, measure.subset(values == value), signature,
                                         group=f"{column} {value}", **details))
    return results


def describe_comparisons(results: Sequence[MetricResult], baseline: str) -> str:
    """Return how many results are compared with the baseline, and how many of so many comparisons
    would have p <= 0.05 by chance; "" if none is."""
    n = sum("baseline" in r for r in results)
    if n < 2:
        return f"1 comparison with {baseline}." if n == 1 else ""
    return (f"{n} comparisons with {baseline}. Between equal models {LEVEL * n:.2g} of {n} would "
            f"have p <= {LEVEL} on average.")


def format_table(results: Sequence[MetricResult], baseline: str = "the baseline") -> str:
    """Return the results as lines of text: a table, the number of comparisons with the baseline,
    the lengths of texts, what no mean includes. Columns that no result fills are left out."""
    rows = [("suite", "prompt", "metric", "value", "95 % interval", "chance", "items",
             "difference", "95 % interval", "p")]
    rows += [_table_row(r) for r in results]
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in zip(*columns, strict=True):
        cells = [cell.ljust(width) if columns[i][0] in ("suite", "metric") else cell.rjust(width)
                 for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    if comparisons := describe_comparisons(results, baseline):
        lines.append(comparisons)
    for r in results:
        if "tokens" in r:
            lines.append(f"{r['suite']}: {r['bytes']:,} bytes, {r['tokens']:,} tokens, "
                         f"{r['tokens'] / r['bytes']:.4f} tokens/byte")
    excluded = dict.fromkeys(f"{r['suite']} {r['prompt']} {r['aside']}"
                             for r in results if "aside" in r)
    if excluded:
        lines.append("* not in the mean: " + "; ".join(excluded))
    return "\n".join(lines)


def _table_row(r: MetricResult) -> tuple[str, ...]:
    name = " ".join(filter(None, (r["suite"].removeprefix(TEXT_PREFIX), r.get("part"),
                                  r.get("group"))))
    if r["partial"]:
        name += " (PARTIAL)"
    prompt = r.get("prompt", "")
    if "aside" in r:
        prompt += "*"
    if "least" in r:
        prompt = f"mean of {r['prompts']}"
    interval = "-"
    if r["low"] is not None:
        interval = f"{r['low']:.4f} to {r['high']:.4f}"
    chance = f"{r['chance']:.4f}" if "chance" in r else ""
    comparison = ("", "", "")
    if "baseline" in r:
        b = r["baseline"]
        comparison = (f"{b['difference']:+.4f}", f"{b['low']:+.4f} to {b['high']:+.4f}",
                      f"{b['p']:.3f}")
    return (name, prompt, r["metric"], f"{r['value']:.4f}", interval, chance, f"{r['n']:,}",
            *comparison)


def write_records(file: Path, records: Sequence[SampleLog]) -> None:
    """Write one JSON object a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in records]
    file.write_text("".join(lines), encoding="utf-8")


def read_records(file: Path) -> list[SampleLog]:
    """Read what `write_records` wrote. Raises OSError, ValueError.

    Only \\n ends a record: an answer may hold other line breaks of Unicode.
    """
    lines = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def write_parallel_files(folder: Path, name: str, records: Sequence[TranslationRecord]) -> None:
    """Write NAME.src, NAME.hyp and NAME.ref, one sentence a line, for sacrebleu and for neural
    metrics (COMET, MetricX), which run outside. Line breaks become spaces."""
    for suffix, key in ((".src", "source"), (".hyp", "hypothesis"), (".ref", "reference")):
        lines = [" ".join(LINE_BREAKS.split(r[key])) + "\n" for r in records]
        (folder / (name + suffix)).write_text("".join(lines), encoding="utf-8")


def read_hypotheses(file: Path, n: int, name: str) -> list[str]:
    """Read another system's translations of `name`, which has n sentences, one a line."""
    try:
        lines = file.read_bytes().decode().split("\n")
    except OSError as e:
        raise UserError(f"--hypotheses {name}: {file} cannot be read ({e.strerror})", FLAGS) \
            from None
    except UnicodeDecodeError as e:
        raise UserError(f"{file}: not UTF-8 (byte {e.start}); save it as UTF-8") from None
    if lines[-1] == "":
        lines = lines[:-1]
    lines = [line.removesuffix("\r") for line in lines]
    if len(lines) != n:
        raise UserError(f"{file}: {len(lines):,} lines, {name} has {n:,} sentences; line n must be "
                        "the translation of sentence n, an empty line where there is none")
    return lines
