"""Runs beside each other: the table's figures are those of metrics.jsonl, and the plot is drawn."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from runtime.paths import ROOT


def run(folder: Path, *values: float) -> Path:
    folder.mkdir()
    lines = []
    for i, x in enumerate(values):
        if i:
            lines.append({"step": i, "tokens": 600 * i, "loss": 1.0, "tokens_per_second": 10.0})
        lines.append({"step": i, "bits_per_byte": {"kin": x, "eng": 2 * x}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def curves(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "bench.curves", *map(str, args)], cwd=ROOT,
                          capture_output=True, text=True)


def test_a_run_is_a_line_with_before_after_and_the_time_of_its_steps(tmp_path):
    a, b = run(tmp_path / "a", 4.0, 3.0, 2.0), run(tmp_path / "b", 4.0, 5.0)
    process = curves(a, b, "--svg", tmp_path / "x.svg")
    assert process.stdout.splitlines()[2:] == [
        "| a | 0.00 M | 4.0000 | 2.0000 | -50.0% | 8.0000 | 4.0000 | -50.0% | 2 |",
        "| b | 0.00 M | 4.0000 | 5.0000 | +25.0% | 8.0000 | 10.0000 | +25.0% | 1 |"]
    assert (tmp_path / "x.svg").read_text().count("<path") > 8


def test_a_folder_that_is_no_run_is_said_in_a_line(tmp_path):
    process = curves(tmp_path)
    assert process.returncode == 1
    assert process.stderr.startswith("error: ") and "metrics" in process.stderr
    assert "Traceback" not in process.stderr and len(process.stderr.splitlines()) == 1
    process = curves(run(tmp_path / "a", 4.0))
    assert process.returncode == 1 and "1 evaluations" in process.stderr
