"""Comparison with an earlier evaluation, item by item, by a paired test.

The earlier evaluation is read from its folder: results.json, and the records in items/. It is
refused if a choice in COMPARED_CHOICES differs (such as the prompt or the number of shots; the
dtype may differ), if the version of the metrics differs, or if it was made of other items.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from evaluation.results import METRICS_VERSION, MetricResult, SampleLog, read_records
from evaluation.significance import paired_test
from runtime.console import FLAGS, UserError, info

if TYPE_CHECKING:
    from evaluation.metrics import Measure
    from evaluation.results import Comparison
    from evaluation.tasks import Task

# choices in a signature that must be equal
COMPARED_CHOICES = ("version", "suite", "prompt", "shots", "beams", "new", "unit", "compat", "chat")
# keys of a record that say which item it is of
ITEM_KEYS = ("gold", "source", "reference", "bytes")


class Baseline:
    """An earlier evaluation, from its folder."""

    def __init__(self, folder: Path):
        try:
            evaluation = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            self.results: list[MetricResult] = evaluation["results"]
            self.model: str = evaluation["model"]
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"--baseline {folder}: no results.json there; give the --out of an "
                            "earlier evaluation", FLAGS) from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"--baseline {folder}: results.json is damaged; give the --out of "
                            "another evaluation, or evaluate again") from None
        self.folder = folder

    def records(self, name: str, choices: Mapping[str, object],
                items: Sequence[Mapping]) -> list[SampleLog] | None:
        """Return the baseline's records of NAME (as `record_name`), None if it has none.

        `choices` are those of our signature; `items` are our records, or at least their parts that
        say which items they are of. A file of translations ("SUITE.PART.file") is compared with
        the first prompt of the same part if the baseline has no such file. Raises UserError if the
        baseline was made with other choices or of other items.
        """
        signatures = {r["items"]: r["signature"] for r in reversed(self.results) if "items" in r}
        if name not in signatures and name.endswith(".file"):
            part = name.removesuffix("file")
            name = min((x for x in signatures if x.startswith(part)), default=name)
        if name not in signatures:
            return None
        file = self.folder / "items" / f"{name}.jsonl"
        try:
            records = read_records(file)
        except (OSError, ValueError):
            raise UserError(f"--baseline {self.folder}: {file.name} is missing or damaged, and a "
                            "paired test needs it; evaluate again") from None
        self._check_choices(name, choices, parse_signature(signatures[name]))
        if _identities(records) != _identities(items):
            raise UserError(f"--baseline {self.folder}: {name} was measured on other items "
                            f"({len(records)} there, {len(items)} here); evaluate again to compare")
        return records

    def choices_of(self, name: str) -> dict[str, str] | None:
        """Return the choices of the signature of the records NAME; None if there are none."""
        signatures = [r["signature"] for r in self.results if r.get("items") == name]
        return parse_signature(signatures[0]) if signatures else None

    def _check_choices(self, name: str, choices: Mapping[str, object],
                       baseline_choices: Mapping[str, str]) -> None:
        ours = {"version": str(METRICS_VERSION)} | {k: str(v) for k, v in choices.items()}
        theirs = dict(baseline_choices)
        for side in (ours, theirs):
            if "dtype" in side:  # the figures of a model, not of a file
                side.setdefault("compat", "none")
                side.setdefault("chat", "none")
            if "unit" in side:  # a suite's records hold its questions as published
                side.setdefault("cleaned", "none")
        for key in (*COMPARED_CHOICES, *(("cleaned",) if "unit" in ours else ())):
            if key in ours and key in theirs and ours[key] != theirs[key]:
                raise UserError(f"--baseline {self.folder}: {name} has {key} {theirs[key]} there "
                                f"and {ours[key]} here; evaluate again to compare")

    def compare(self, name: str, results: Sequence[MetricResult], measures: Sequence[Measure],
                task: Task, records: Sequence[SampleLog]) -> list[Measure | None]:
        """Add the comparison with the baseline to each of our results; return the baseline's
        measure for each, None if it has none."""
        old_records = self.records(name, parse_signature(results[0]["signature"]), records)
        if old_records is None:
            info(f"{name}: not in the baseline {self.folder}, so not compared")
            return [None] * len(results)
        by_name = {m.name: m for m in task.metrics(old_records)}
        old_measures = [by_name.get(measure.name) for measure in measures]
        for result, measure, old in zip(results, measures, old_measures, strict=True):
            if old is not None:
                result["baseline"] = compare_measures([measure], [old])
        return old_measures


def compare_measures(ours: Sequence[Measure], baseline: Sequence[Measure]) -> Comparison:
    """The mean of the baseline's measures (one for each prompt), and the paired test of ours
    against it."""
    value = float(np.mean([m.value for m in baseline]))
    return {"value": value, **paired_test(ours, baseline)}


def parse_signature(signature: str) -> dict[str, str]:
    """Return the choices of a signature by name. Ours come first; sacrebleu's, after them, has a
    `version` of its own, which is left out."""
    pairs = [choice.split(":", 1) for choice in signature.split("|") if ":" in choice]
    return dict(reversed(pairs))


def _identities(records: Sequence[Mapping]) -> list[list[object]]:
    return [[r.get(key) for key in ITEM_KEYS] for r in records]
