"""Several runs of one setting (seeds): each figure becomes one row, with its spread over the runs.

The runs are evaluations, folders with a results.json. They are refused if a figure was measured in
different ways, that is, if its signatures differ.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.results import TEXT_PREFIX, MetricResult
from runtime.console import FLAGS, UserError, info

KEYS = ("suite", "part", "group", "prompt", "metric")  # that say which figure a result is


def read_run(folder: Path) -> list[MetricResult]:
    """Return the results of an evaluation's folder, or of a results.json."""
    file = folder / "results.json" if folder.is_dir() else folder
    try:
        results = json.loads(file.read_text(encoding="utf-8"))["results"]
        for result in results:
            texts = [result[key] for key in ("suite", "metric", "signature")]
            if not all(isinstance(x, str) for x in texts):
                raise ValueError
            float(result["value"])
    except OSError as e:
        raise UserError(f"--seeds {folder}: no results.json there ({e.strerror}); give the --out "
                        "of an evaluation", FLAGS) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--seeds {folder}: results.json is damaged; evaluate again") from None
    return results


def spread_over_runs(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Return a row for each figure that all runs have: its mean, standard deviation (of a sample,
    n - 1), lowest and highest value. Raises UserError if its signatures differ."""
    if len(folders) < 2:
        raise UserError("--seeds: expected at least two evaluations; name the --out of each", FLAGS)
    runs = [{_key(result): result for result in read_run(folder)} for folder in folders]
    rows = []
    for key, first in runs[0].items():
        results = [run.get(key) for run in runs]
        if None in results:
            continue
        for folder, result in zip(folders, results, strict=True):
            if result["signature"] != first["signature"]:
                raise UserError(
                    f"--seeds {folder}: {' '.join(filter(None, key))} has the signature "
                    f"{result['signature']}, in {folders[0]} {first['signature']}; evaluate all "
                    "runs alike", FLAGS)
        values = [float(result["value"]) for result in results]
        rows.append({name: first[name] for name in (*KEYS, "signature") if name in first} | {
            "mean": statistics.fmean(values), "standard_deviation": statistics.stdev(values),
            "lowest": min(values), "highest": max(values), "runs": len(values)})
    n_left_out = len({key for run in runs for key in run}) - len(rows)
    if n_left_out:
        info(f"--seeds: {n_left_out} figures are not in all runs, so they are left out")
    if not rows:
        raise UserError("--seeds: the runs have no figure in common; evaluate them alike", FLAGS)
    return rows


def format_spread(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a table of text."""
    lines = [("suite", "prompt", "metric", "mean", "standard deviation", "lowest to highest",
              "runs")]
    for row in rows:
        name = " ".join(filter(None, (row["suite"].removeprefix(TEXT_PREFIX), row.get("part"),
                                      row.get("group"))))
        lines.append((name, row.get("prompt", ""), row["metric"], f"{row['mean']:.4f}",
                      f"{row['standard_deviation']:.4f}",
                      f"{row['lowest']:.4f} to {row['highest']:.4f}", str(row["runs"])))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
                     .rstrip() for line in lines)


def _key(result: MetricResult) -> tuple[str, ...]:
    return tuple(str(result.get(key, "")) for key in KEYS)
