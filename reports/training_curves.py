"""metrics.jsonl of a run: its lines, its curves, and plots of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from evaluation import metrics
from reports.page import COLOURS, figure

MARKED_POINTS = 50
Curve = tuple[str, list[int], list[float]]  # name, steps, values
STEP_CURVES = (  # key in metrics.jsonl, title, label of the y axis
    ("lr", "learning rate", "learning rate"),
    ("grad_norm", "gradient norm", "L2 norm before clipping"),
    ("tokens_per_second", "speed", "trained tokens per second"),
    ("share", "mixture", "share of all tokens so far"))
PREFERENCE_MODES = ("dpo", "cpo")  # their loss is not a mean over tokens


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


def plots(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]],
          mode: str = "cpt") -> list[tuple[str, str]]:
    """(title, inline SVG) of each curve that has points."""
    drawn = []
    if curves := curves_of(evaluations, "bits_per_byte"):
        title = "bits per byte of held-out text"
        drawn.append((title, _plot(title, "bits per byte", curves)))
    drawn += _loss_plots(steps, evaluations, mode)
    for key, title, label in STEP_CURVES:
        curves = curves_of(steps, key)
        if curves and not (key == "share" and len(curves) == 1):
            drawn.append((title, _plot(title, label, curves, floor=0)))
    for metric, suites in _main_metrics(evaluations).items():
        title = f"{metric} of suites"
        drawn.append((title, _plot(title, metric_label(metric), suites)))
    return drawn


def _loss_plots(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]],
                mode: str) -> list[tuple[str, str]]:
    """The training loss and the loss of each held-out text in one plot; in two if their units
    differ."""
    training = [("training", x, y) for _, x, y in curves_of(steps, "loss")]
    held_out = [(f"held-out {name}", x, y)
                for name, x, y in curves_of(evaluations, "held_out_loss")]
    if mode in PREFERENCE_MODES:
        groups = [("training loss", "loss per pair", training),
                  ("loss of held-out text", "nats per token", held_out)]
    else:
        groups = [("loss", "nats per token", training + held_out)]
    return [(title, _plot(title, label, curves)) for title, label, curves in groups if curves]


def metric_label(metric: str) -> str:
    """The label of an axis: a metric and its range."""
    name = metric.partition(",")[0]
    if name in metrics.TRANSLATION:
        return f"{metric} (0 to 100)"
    if name == "bits_per_byte":
        return "bits per byte"
    return metric if name == "length_ratio" else f"{metric} (0 to 1)"


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


def _plot(title: str, label: str, curves: list[Curve], floor: float | None = None) -> str:
    """One plot of curves over steps. Curves of few points have markers."""
    def draw(axes: Any) -> None:
        for i, (name, x, y) in enumerate(curves):
            axes.plot(x, y, label=name.lstrip("_"), color=COLOURS[i % len(COLOURS)], linewidth=1.4,
                      linestyle="-" if i < len(COLOURS) else "--",
                      marker="o" if len(x) <= MARKED_POINTS else None, markersize=3)
        axes.set_ylim(bottom=floor)
        if any(name for name, _, _ in curves):
            axes.legend(frameon=False, fontsize=8)

    return figure(title, "step", label, draw)
