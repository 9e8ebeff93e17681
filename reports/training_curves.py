"""metrics.jsonl of a run: its lines, its curves, and plots of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from reports.page import COLOURS, figure

Curve = tuple[str, list[int], list[float]]  # name, steps, values
STEP_CURVES = (  # key in metrics.jsonl, title, lowest value shown
    ("loss", "loss, nats a token", None), ("lr", "learning rate", 0),
    ("grad_norm", "gradient norm", 0), ("tokens_per_second", "tokens a second", 0),
    ("share", "share of tokens", 0))


def read_metrics(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl. Lines that cannot be read, such as one that a kill cut short, are
    left out and counted in `notes`."""
    lines, unreadable = [], 0
    for text in read_text(path).splitlines():
        try:
            line = json.loads(text)
            lines.append({**line, "step": int(line["step"])})
        except (ValueError, TypeError, KeyError, RecursionError):
            unreadable += 1
    if unreadable:
        plural = "s" if unreadable > 1 else ""
        notes.append(f"{path.name}: {unreadable} unreadable line{plural} left out.")
    return lines


def read_text(path: Path) -> str:
    """A file's text; empty if there is no such file."""
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def finite_numbers(values: Any) -> dict[str, float]:
    """The entries of a table that are finite numbers. Values that were not finite are null."""
    if not isinstance(values, dict):
        return {}
    return {k: x for k, x in values.items() if isinstance(x, int | float) and math.isfinite(x)}


def curves_of(lines: list[dict[str, Any]], key: str) -> list[Curve]:
    """A quantity over the steps: one curve, or one for each name if the quantity is a table."""
    points: dict[str, tuple[list[int], list[float]]] = {}
    for line in lines:
        value = line.get(key)
        table = value if isinstance(value, dict) else {"": value}
        for name, y in finite_numbers(table).items():
            steps, values = points.setdefault(name, ([], []))
            steps.append(line["step"])
            values.append(y)
    return [(name, steps, values) for name, (steps, values) in points.items()]


def plots(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(title, inline SVG) of each curve that has points."""
    drawn = []
    if curves := curves_of(evaluations, "bits_per_byte"):
        drawn.append(("bits per byte", _plot("bits per byte", curves, None, dots=True)))
    for key, title, floor in STEP_CURVES:
        curves = curves_of(steps, key)
        if curves and not (key == "share" and len(curves) == 1):
            drawn.append((title, _plot(title, curves, floor, dots=False)))
    for metric, suites in _main_metrics(evaluations).items():
        drawn.append((metric, _plot(metric, suites, None, dots=True)))
    return drawn


def _main_metrics(evaluations: list[dict[str, Any]]) -> dict[str, list[Curve]]:
    """Metric -> curves of the suites, or parts of suites, whose first metric it is."""
    by_metric: dict[str, list[Curve]] = {}
    seen = set()
    for name, steps, values in curves_of(evaluations, "suites"):
        suite, _, metric = name.rpartition(".")
        if suite not in seen:
            seen.add(suite)
            by_metric.setdefault(metric, []).append((suite, steps, values))
    return by_metric


def _plot(title: str, curves: list[Curve], floor: float | None, dots: bool) -> str:
    """One plot of curves over steps."""
    def draw(axes: Any) -> None:
        for i, (name, x, y) in enumerate(curves):
            axes.plot(x, y, label=name.lstrip("_"), color=COLOURS[i % len(COLOURS)], linewidth=1.4,
                      linestyle="-" if i < len(COLOURS) else "--",
                      marker="o" if dots or len(x) == 1 else None, markersize=3)
        axes.set_ylim(bottom=floor)
        if any(name for name, _, _ in curves):
            axes.legend(frameon=False, fontsize=8)

    return figure(title, draw)
