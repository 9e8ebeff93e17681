"""Several runs beside each other: what each held-out text cost before, after and at its best.

    python -m bench.curves out/noreplay out/replay25 out/lora25 --svg docs/forgetting.svg

It reads metrics.jsonl and nothing else, prints a table in markdown, and draws bits per byte over
trained tokens: one panel for each text, one line for each run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def read(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A run's steps and its evaluations, each with the tokens trained before it."""
    steps, looks, tokens = [], [], 0
    try:
        lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    except (OSError, ValueError) as e:
        sys.exit(f"error: {run}/metrics.jsonl: cannot be read ({e}); name a run's folder")
    for x in lines:
        if "bits_per_byte" in x:
            looks.append({**x, "tokens": tokens})
        elif "loss" in x:
            steps.append(x)
            tokens = x["tokens"]
    if len(looks) < 2:
        sys.exit(f"error: {run}/metrics.jsonl: {len(looks)} evaluations, expected two or more")
    return steps, looks


def table(runs: list[Path]) -> str:
    """Markdown: a line for each run, before and after for each text."""
    by_run = {run.name: read(run) for run in runs}
    texts = list(dict.fromkeys(
        text for _, looks in by_run.values() for text in looks[0]["bits_per_byte"]))
    head = ["run", "tokens", *(f"{k} before | {k} after | change" for k in texts), "minutes"]
    lines = ["| " + " | ".join(head) + " |", "|---|--:|" + "--:|" * (3 * len(texts) + 1)]
    for name, (steps, looks) in by_run.items():
        cells = [name, f"{steps[-1]['tokens'] / 1e6:.2f} M"]
        for k in texts:
            first, last = (x["bits_per_byte"][k] for x in (looks[0], looks[-1]))
            cells += [f"{first:.4f}", f"{last:.4f}", f"{last / first - 1:+.1%}"]
        counts = [b["tokens"] - a["tokens"] for a, b in zip([{"tokens": 0}, *steps[:-1]], steps,
                                                            strict=True)]
        seconds = sum(n / x["tokens_per_second"] for n, x in zip(counts, steps, strict=True))
        lines.append("| " + " | ".join([*cells, f"{seconds / 60:.0f}"]) + " |")
    return "\n".join(lines)


def draw(runs: list[Path], svg: Path) -> None:
    """Bits per byte over trained tokens, a panel for each text."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    by_run = {run.name: read(run)[1] for run in runs}
    texts = list(dict.fromkeys(k for looks in by_run.values() for k in looks[0]["bits_per_byte"]))
    figure, panels = plt.subplots(1, len(texts), figsize=(5 * len(texts), 3.6), squeeze=False)
    for panel, text in zip(panels[0], texts, strict=True):
        for name, looks in by_run.items():
            panel.plot([x["tokens"] / 1e6 for x in looks],
                       [x["bits_per_byte"][text] for x in looks], label=name, marker=".")
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
