"""The report of a training run: OUT/report.html, a single file for a browser, a phone or paper.

It reads only what the run wrote (metrics.jsonl, run.json, settings.toml, samples.txt), so it can be
made again at any time. It is written at the end of a run and must not fail: a file that is missing
or damaged is named on the page.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reports.page import render
from reports.training_curves import curves_of, finite_numbers, plots, read_metrics, read_text
from runtime.console import FLAGS, UserError
from runtime.output_paths import try_output_file

TIME_FORMAT = "%Y-%m-%d %H:%M:%S"  # of `started` and `finished` in run.json
SHOWN_CHANGE = 0.0005  # smaller relative changes are shown as 0.0 % and not coloured
HASHES = ("commit", "model_commit", "tokenizer", "data")  # keys of run.json that are folded


def write_training_report(out: Path, finished: str = "") -> Path:
    """Write OUT/report.html from the files of the run in OUT; returns its path. `finished` is the
    time at which the run ended; without it, that of run.json."""
    path = Path(out) / "report.html"
    path.write_text(_render_report(Path(out), finished), encoding="utf-8")
    return path


def check_training_report(out: Path) -> None:
    """Make the report as it is now, with an example of a plot, and write nothing. UserError if that
    fails, or if OUT/report.html cannot be written."""
    try_output_file(out / "report.html")
    try:
        _render_report(out, "")
        plots([{"step": 1, "loss": 1.0}], [], "cpt")
    except ImportError as e:
        raise UserError(f"the report of the run needs the package {e.name}, which is not "
                        "installed; run pip install -r requirements.txt", FLAGS) from None


def _render_report(out: Path, finished: str) -> str:
    """The page, from the files of the run in OUT."""
    notes: list[str] = []
    lines = read_metrics(out / "metrics.jsonl", notes)
    steps = [x for x in lines if "loss" in x]
    evaluations = [x for x in lines
                   if finite_numbers(x.get("bits_per_byte")) or finite_numbers(x.get("suites"))]
    run = _parse_file(out / "run.json", json.loads, notes)
    settings = _parse_file(out / "settings.toml", tomllib.loads, notes)
    notes += _notes_on_the_end(evaluations, run, settings)
    run["finished"] = finished or run.get("finished", "")
    changed_names = run.pop("changed_settings", None) or {}
    command = run.pop("command", "")
    rows = [(name.replace("_", "-"), _format(value)) for name, value in settings.items()]
    facts = {name: (name.replace("_", " "), _format(x)) for name, x in run.items() if x != ""}
    return render(
        "training_report.html", title=f"{settings.get('mode', 'run')}: {out.resolve().name}",
        summary=_summary(run, steps), notes=notes, command=command,
        table=_before_and_after(evaluations, "bits_per_byte"),
        suites=_before_and_after(evaluations, "suites"),
        first=evaluations[0]["step"] if evaluations else 0,
        last=evaluations[-1]["step"] if evaluations else 0,
        plots=plots(steps, evaluations, settings.get("mode", "cpt")),
        samples=_samples(read_text(out / "samples.txt")), settings=rows,
        changed=[(k, v) for k, v in rows if k.replace("-", "_") in changed_names],
        facts=[fact for name, fact in facts.items() if name not in HASHES],
        hashes=[fact for name, fact in facts.items() if name in HASHES])


def _parse_file(path: Path, parse: Callable[[str], Any], notes: list[str]) -> dict[str, Any]:
    """The table in a file. If the file is damaged, an empty table and a note."""
    text = read_text(path)
    if not text:
        return {}
    try:
        table = parse(text)
    except (ValueError, RecursionError):  # the errors of both parsers are ValueErrors
        table = None
    if isinstance(table, dict):
        return table
    notes.append(f"{path.name} is damaged and left out.")
    return {}


def _notes_on_the_end(evaluations: list[dict[str, Any]], run: dict[str, Any],
                      settings: dict[str, Any]) -> list[str]:
    """Notes if the run was stopped, or if its model is not that of the last step."""
    notes = []
    last = 0
    if evaluations:
        last = evaluations[-1]["step"]
        if "stopped" in evaluations[-1]:
            notes.append(f"Stopped at step {last} by --stop-if {evaluations[-1]['stopped']}")
    step = run.get("model_step", last)
    if settings.get("best") and step != last:
        notes.append(f"The model is that of step {step}, the best of {settings.get('best')}.")
    return notes


def _format(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_format(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if type(value) is int else str(value)


def _summary(run: dict[str, Any], steps: list[dict[str, Any]]) -> str:
    """One line: model, device, time, parameters, steps, speed, memory; what is not known is left
    out."""
    facts = [run.get("model"), run.get("device"), *_times(run, steps)]
    n = finite_numbers(run.get("parameters"))
    if {"total", "trained"} <= n.keys():
        facts.append(f"{n['trained']:,} of {n['total']:,} parameters trained")
    if steps:
        tokens = _format(steps[-1].get("tokens", "?"))
        facts.append(f"{steps[-1]['step']:,} steps, {tokens} tokens")
        for name, _, speeds in curves_of(steps, "tokens_per_second"):
            if not name:
                facts.append(f"{statistics.median(speeds):,.0f} trained tokens per second (median)")
        for name, _, memory in curves_of(steps, "memory_gb"):
            if not name:
                facts.append(f"{max(memory):.2f} GB at most")
    return " · ".join(str(x) for x in facts if x)


def _times(run: dict[str, Any], steps: list[dict[str, Any]]) -> list[str]:
    """When the run started, how long it took, and how long its steps took."""
    times = []
    if run.get("started"):
        times.append(f"started {run['started']}")
    try:
        start, end = (time.mktime(time.strptime(run[key], TIME_FORMAT))
                      for key in ("started", "finished"))
        times.append(f"finished after {format_duration(end - start)}")
    except (KeyError, TypeError, ValueError, OverflowError):
        pass  # the run has not ended, or run.json was changed by hand
    seconds = 0.0
    for before, step in zip([{"tokens": 0}, *steps], steps, strict=False):
        numbers = finite_numbers({"before": before.get("tokens"), "after": step.get("tokens"),
                                  "speed": step.get("tokens_per_second")})
        if len(numbers) == 3 and numbers["speed"] > 0:
            seconds += (numbers["after"] - numbers["before"]) / numbers["speed"]
    if seconds > 0:
        times.append(f"steps took {format_duration(seconds)}")
    return times


def format_duration(seconds: float) -> str:
    """A duration in the two largest units that it has, such as "2 h 5 min"."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60} s"
    if s < 86400:
        return f"{s // 3600} h {s % 3600 // 60} min"
    return f"{s // 86400} d {s % 86400 // 3600} h"


def _before_and_after(evaluations: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """For each text or metric: its first, last and lowest value, and the relative change."""
    rows = []
    for name, steps, values in curves_of(evaluations, key):
        best, best_step = min(zip(values, steps, strict=True))
        change = values[-1] / values[0] - 1 if values[0] else math.nan
        tone = ""
        if abs(change) >= SHOWN_CHANGE:
            tone = "good" if change < 0 else "bad"
        rows.append({"name": name, "before": values[0], "after": values[-1], "best": best,
                     "best_step": best_step, "change": change, "tone": tone,
                     "first_step": steps[0], "last_step": steps[-1]})
    return rows


def _samples(text: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """(prompt, [(step, continuation)]) at the first and last step, for each prompt that was
    continued at both."""
    _, *pieces = re.split(r"^== step (\d+)$", text, flags=re.MULTILINE)
    blocks = []
    for step, block in zip(pieces[::2], pieces[1::2], strict=True):
        continuations = {}
        for sample in block.split("\n-- ")[1:]:
            prompt, _, continuation = sample.partition("\n")
            continuations[prompt] = continuation.strip("\n")
        blocks.append((step, continuations))
    if not blocks:
        return []
    ends = blocks[:1] + blocks[1:][-1:]
    prompts = [p for p in ends[0][1] if all(p in block for _, block in ends)]
    return [(p, [(step, block[p]) for step, block in ends]) for p in prompts]
