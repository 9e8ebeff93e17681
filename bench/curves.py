"""Several runs in one table: bits per byte of each held-out text before and after training.

    python -m bench.curves out/noreplay out/replay25 out/lora25 --svg docs/forgetting.svg

It reads metrics.jsonl only, prints a Markdown table, and draws bits per byte over trained tokens:
one panel for each text, one line for each run.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any


def read(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return a run's steps, and its evaluations with the number of tokens trained before each."""
    steps, evaluations, tokens = [], [], 0
    try:
        lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    except (OSError, ValueError) as e:
        sys.exit(f"error: {run}/metrics.jsonl: cannot be read ({e}); name a run's folder")
    for x in lines:
        if "bits_per_byte" in x:
            evaluations.append({**x, "tokens": tokens})
        elif "loss" in x:
            steps.append(x)
            tokens = x["tokens"]
    if len(evaluations) < 2:
        sys.exit(f"error: {run}/metrics.jsonl: {len(evaluations)} evaluations, "
                 "expected two or more")
    return steps, evaluations


def table(runs: list[Path]) -> str:
    """Return a Markdown table: a row per run, bits per byte of each text before and after."""
    by_run = {run.name: read(run) for run in runs}
    texts = list(dict.fromkeys(
        text for _, evaluations in by_run.values() for text in evaluations[0]["bits_per_byte"]))
    head = ["run", "tokens", *(f"{k} before | {k} after | change" for k in texts), "minutes"]
    lines = ["| " + " | ".join(head) + " |", "|---|--:|" + "--:|" * (3 * len(texts) + 1)]
    for name, (steps, evaluations) in by_run.items():
        cells = [name, f"{steps[-1]['tokens'] / 1e6:.2f} M"]
        for k in texts:
            first, last = (x["bits_per_byte"][k] for x in (evaluations[0], evaluations[-1]))
            cells += [f"{first:.4f}", f"{last:.4f}", f"{last / first - 1:+.1%}"]
        totals = [0, *(step["tokens"] for step in steps)]
        counts = [after - before for before, after in pairwise(totals)]
        seconds = sum(n / x["tokens_per_second"] for n, x in zip(counts, steps, strict=True))
        lines.append("| " + " | ".join([*cells, f"{seconds / 60:.0f}"]) + " |")
    return "\n".join(lines)


def draw(runs: list[Path], svg: Path) -> None:
    """Draw bits per byte over trained tokens, a panel for each text."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    by_run = {run.name: read(run)[1] for run in runs}
    texts = list(dict.fromkeys(
        text for evaluations in by_run.values() for text in evaluations[0]["bits_per_byte"]))
    figure, panels = plt.subplots(1, len(texts), figsize=(5 * len(texts), 3.6), squeeze=False)
    for panel, text in zip(panels[0], texts, strict=True):
        for name, evaluations in by_run.items():
            panel.plot([x["tokens"] / 1e6 for x in evaluations],
                       [x["bits_per_byte"][text] for x in evaluations], label=name, marker=".")
        panel.set(title=text, xlabel="million trained tokens", ylabel="bits per byte")
        panel.grid(alpha=0.3)
    panels[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(svg, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--svg", type=Path, help="draw the curves into this file")
    flags = parser.parse_args()
    print(table(flags.runs))
    if flags.svg:
        draw(flags.runs, flags.svg)
