"""The frame of every benchmark: sides in processes of their own, in turn; medians; one page.

A program here is one job (a training step, loading, ...). It names functions that run in a child
process, and one `job` that calls them in turn and returns Markdown; `main` does the rest: flags,
the section in docs/benchmarks.md, the exit code. README.md in this folder shows one whole.

A slow minute is slow for all sides because they run in turn. The parent stays small, for a child's
peak of memory begins with its parent's: nothing heavy is imported at the top of a benchmark.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/benchmarks.md"
UNIT = 2**30 if sys.platform == "darwin" else 2**20  # of the system's peak of memory, in a GB


@dataclass
class Settings:
    """How a job is run. `size`: full; quick, so that all jobs end in ten minutes; tiny: does it
    run?"""

    size: str
    rounds: int  # processes a side
    cases: list[str]  # of the job's own, empty: all
    write: bool = False  # into the page, pictures too
    faults: list[str] = field(default_factory=list)  # sides that disagree: the program fails


def main(module: str, title: str, children: dict[str, Callable[..., Any]],
         job: Callable[[Settings], str], cases: Sequence[str] = (), rounds: int = 2) -> int:
    """A benchmark's whole program: answer as a child, or run the job, print and write its section.

    `children` are the functions that may run in a process of their own, by name; `job` returns
    Markdown and adds to `faults` what makes its figures worthless. Only options that the job has a
    use for are offered: --cases where it has some, --rounds where these are not 0.
    """
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(children[sys.argv[2]](*json.loads(sys.argv[3]))))
        return 0
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=title)
    parser.set_defaults(rounds=None, cases=[])
    parser.add_argument("--quick", action="store_true", help="fewer and smaller measurements")
    parser.add_argument("--tiny", action="store_true",
                        help="a second's work a side, nothing is written: does it run?")
    if rounds:
        parser.add_argument("--rounds", type=int, help=f"processes a side ({rounds})")
    if cases:
        parser.add_argument("--cases", nargs="+", choices=list(cases))
    parser.add_argument("--write", action="store_true",
                        help="put the section into docs/benchmarks.md")
    s = parser.parse_args()
    if s.tiny and (s.quick or s.write):
        parser.error("--tiny: not with --quick or --write, for its figures are none")
    if s.rounds is not None and s.rounds < 1:
        parser.error(f"--rounds {s.rounds}: expected one or more")
    size = "tiny" if s.tiny else "quick" if s.quick else "full"
    settings = Settings(size, s.rounds or (rounds if size == "full" else 0) or 1, s.cases, s.write)
    command = shlex.join(["python", "-m", module, *sys.argv[1:]])
    text = f"## {title}\n\n```bash\n{command}\n```\n\n{job(settings)}\n"
    print(text)
    for fault in settings.faults:
        print(f"FAULT: {fault}", file=sys.stderr)
    if s.write and not settings.faults:
        write(module, text)
    return 1 if settings.faults else 0


def child(module: str, name: str, *args: Any) -> Any:
    """What a function of a benchmark gives in a new process; a dict also gets `gb`, the most memory
    the process held as the system counts it, in GB of 2^30 bytes, pages of mapped files included.
    """
    command = [sys.executable, "-m", module, "--child", name, json.dumps(args)]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complained:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=complained)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        complained.seek(0)
        if process.returncode:
            sys.exit(f"{name} {' '.join(map(str, args))}: exit code {process.returncode}\n"
                     f"{complained.read()[-4000:]}")
        found = json.loads(said.read().splitlines()[-1])
    return {"gb": usage.ru_maxrss / UNIT, **found} if isinstance(found, dict) else found


def in_turn(module: str, rounds: int, sides: dict[str, tuple[str, list]]) -> dict[str, list[dict]]:
    """{side: (child's name, its arguments)} -> {side: its results}, `rounds` times all in turn."""
    found: dict[str, list[dict]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, (name, args) in sides.items():
            found[side].append(child(module, name, *args))
            print(f"{module}: {side} done", file=sys.stderr, flush=True)
    return found


@dataclass
class Spread:
    """Median, least and most of what was measured, and how often."""

    median: float
    least: float
    most: float
    n: int

    @classmethod
    def of(cls, found: Sequence[float]) -> Spread:
        return cls(statistics.median(found), min(found), max(found), len(found))


def ratio(above: Sequence[Sequence[float]], below: Sequence[Sequence[float]],
          unit: str = "") -> str:
    """`1.44 (1.31 to 1.52 by round)`: what was measured above over what was below, `unit` behind
    it. Each round has a ratio, of its medians, for its sides ran one behind the other; the median
    of these, and the least and the most of several."""
    rounds = Spread.of([statistics.median(a) / statistics.median(b)
                        for a, b in zip(above, below, strict=True)])
    said = f"{rounds.median:.2f}{unit}"
    return f"{said} ({rounds.least:.2f} to {rounds.most:.2f} by round)" if rounds.n > 1 else said


def std(width: int) -> float:
    """Of a random model's weights: transformers' own; larger where --tiny makes them so few that
    another rope, or an MLP left out, would not show in a loss."""
    return 0.02 if width > 64 else 0.15


def installed(library: str) -> bool:
    """Whether a peer can be measured here."""
    return importlib.util.find_spec(library) is not None


def versions(*libraries: str) -> str:
    """`torch 2.13.0, ...`, of those that are installed; of the others, that they are not."""
    return ", ".join(f"{x} {version(x)}" if installed(x) else f"{x} not installed"
                     for x in libraries)


def peak_gb() -> float:
    """The most memory this process has held so far, in GB of 2^30 bytes."""
    return getrusage(RUSAGE_SELF).ru_maxrss / UNIT


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown; a column of numbers only is set to the right."""
    cells = [[str(x) for x in row] for row in rows]
    numeric = [all(c[i][:1].isdigit() or c[i] in ("", "-") for c in cells)
               for i in range(len(head))]
    lines = [head, ["---:" if x else "---" for x in numeric], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """k of the y = c x^k that fits best, by least squares of the logarithms."""
    a, b = [math.log(v) for v in x], [math.log(v) for v in y]
    return statistics.linear_regression(a, b).slope


def plot(name: str, lines: dict[str, tuple[Sequence[float], Sequence[float]]], across: str,
         up: str) -> str:
    """Draw {label: (x, y)} on logarithmic axes into docs/plots/NAME.svg; the Markdown that shows
    it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": name, "font.size": 9}):
        figure = Figure((5.2, 3.2), layout="constrained")
        axes = figure.add_subplot(xlabel=across, ylabel=up, xscale="log", yscale="log")
        for label, (x, y) in lines.items():
            axes.plot(x, y, marker="o", markersize=3, label=label)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        file = PAGE.parent / "plots" / f"{name}.svg"
        file.parent.mkdir(exist_ok=True)
        figure.savefig(file, metadata={"Date": None})
    return f"![{up} against {across}](plots/{name}.svg)"


def write(name: str, text: str) -> None:
    """Put a section between its marks in docs/benchmarks.md, in place of what stood there; what a
    person wrote stands behind them."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(begin)
    _, ended, after = rest.partition(end)
    if rest and not ended:
        sys.exit(f"{PAGE}: {begin.strip()} has no {end.strip()} behind it; nothing is written")
    PAGE.write_text(f"{before if rest else page.rstrip() + chr(10) * 2}{begin}{text}{end}{after}",
                    encoding="utf-8")
