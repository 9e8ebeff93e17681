"""Scores of other programs: a number for each segment of a file of translations.

Read are the files that these programs write:

    numbers                  one a line
    comet-score (stdout)     FILE <tab> Segment N <tab> score: X, for one file of translations
    comet-score --to_json    {FILE: [{"src", "mt", "ref", "COMET"}, ...]}
    MetricX                  JSON lines with "prediction"
    raters                   .tsv, .csv or JSON lines with a column "score", or the metric's name

A file is refused if its number of scores differs from that of the segments, or if a score is not
finite.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.metrics import TRANSLATION
from preparation.readers import file_format, read_rows
from runtime.console import FLAGS, UserError

COLUMNS = ("score", "COMET", "prediction")  # in which programs write the score
COMET_LINE = re.compile(r"[^\t]*\tSegment (\d+)\tscore: (\S+)")
COMET_MEAN = re.compile(r"[^\t]*\tscore: \S+")  # the last line, of the whole file
OWN_METRICS = (*TRANSLATION, "eos_rate", "copy_rate", "language_rate", "length_ratio")


def lower_is_better(name: str) -> bool:
    """Return True for a metric of errors: MetricX, whose scores count errors from 0 to 25."""
    return name.casefold().startswith("metricx")


def score_files(specs: Sequence[str], sets: Sequence[str]) -> dict[str, dict[str, Path]]:
    """Return the files of --scores, each NAME=FILE or SUITE/PART/NAME=FILE, by set and name.

    `sets`: the translations of --hypotheses, SUITE/PART each. A NAME alone belongs to the only set.
    """
    files: dict[str, dict[str, Path]] = {key: {} for key in sets}
    for spec in specs:
        full_name, _, file = spec.partition("=")
        key, _, name = full_name.rpartition("/")
        if not name or not file:
            raise UserError(f"--scores {spec}: expected NAME=FILE, as in COMET=comet.txt", FLAGS)
        if not key and len(sets) == 1:
            key = sets[0]
        if key not in files:
            raise UserError(f"--scores {spec}: expected SUITE/PART/NAME=FILE, SUITE/PART as in "
                            f"--hypotheses ({', '.join(sets) or 'none is given'})", FLAGS)
        if name.casefold() in {x.casefold() for x in (*OWN_METRICS, *files[key])}:
            raise UserError(f"--scores {spec}: the name {name} is taken; give another", FLAGS)
        files[key][name] = Path(file)
    return files


def read_scores(file: Path, name: str, n_segments: int) -> list[float]:
    """Read the scores of `n_segments` segments in order. `name`: of the metric."""
    values = _read_values(file, name)
    if len(values) != n_segments:
        raise UserError(f"{file}: {len(values):,} scores, expected {n_segments:,}, one for each "
                        "segment; score the file of --hypotheses")
    scores = []
    for number, value in enumerate(values, 1):
        try:
            if isinstance(value, bool):
                raise ValueError
            score = float(value)
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"{file}: score {number} is {str(value)[:40]!r}, expected a number; "
                            "correct the file") from None
        if not math.isfinite(score):
            raise UserError(f"{file}: score {number} is {value}, expected a finite number; correct "
                            "the file")
        scores.append(score)
    return scores


def _read_values(file: Path, name: str) -> list[Any]:
    if file_format(file) in (".tsv", ".csv", ".jsonl", ".parquet"):
        return [_cell(row.cells, name, file) for row in read_rows(file, skip_blank_lines=True)]
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise UserError(f"--scores {name}: {file} cannot be read ({e.strerror})", FLAGS) from None
    except UnicodeDecodeError as e:
        raise UserError(f"{file}: not UTF-8 (byte {e.start}); save it as UTF-8") from None
    if file.suffix == ".json":
        return _read_comet_json(text, name, file)
    lines = [line.strip() for line in text.rstrip().split("\n")] if text.strip() else []
    if lines and COMET_LINE.match(lines[0]):
        return _read_comet_lines(lines, file)
    return lines


def _cell(cells: Mapping[str, Any], name: str, file: Path) -> Any:
    for column in (name, *COLUMNS):
        if column in cells:
            return cells[column]
    raise UserError(f"{file}: no column {name}, {', '.join(COLUMNS)}; it has "
                    f"{', '.join(map(str, cells))[:80]}; name one so")


def _read_comet_json(text: str, name: str, file: Path) -> list[Any]:
    try:
        systems = json.loads(text)
        segments = systems
        if isinstance(systems, dict):
            [segments] = systems.values()
        if not isinstance(segments, list) or not all(isinstance(x, dict) for x in segments):
            raise ValueError
    except (ValueError, RecursionError):
        raise UserError(f"{file}: expected the output of comet-score --to_json for one file of "
                        "translations; score one file at a time") from None
    return [_cell(segment, name, file) for segment in segments]


def _read_comet_lines(lines: Sequence[str], file: Path) -> list[str]:
    values = []
    for number, line in enumerate(lines, 1):
        match = COMET_LINE.match(line)
        if match and int(match[1]) == len(values):
            values.append(match[2])
        elif match or not COMET_MEAN.fullmatch(line):
            raise UserError(f"{file}, line {number}: expected segment {len(values)} of one file of "
                            f"translations, found {line[:60]!r}; score one file at a time")
    return values
