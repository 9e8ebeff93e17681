"""The frame of every benchmark: sides in processes of their own, in turn; medians; one page.

A program here is one job (a training step, loading, ...). It names functions that run in a child
process, and one `job` that calls them in turn and returns Markdown; `main` does the rest: flags,
the section in docs/benchmarks.md, the exit code. README.md in this folder shows one whole.

A slow minute is slow for all sides because they run in turn: `in_turn` one process behind the
other, `alternate` a turn of each, of processes that stand side by side, so that what is compared is
seconds apart. The parent stays small, for a child's peak of memory begins with its parent's:
nothing heavy is imported at the top of a benchmark.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

from runtime.openmp import shorten_spin_wait

shorten_spin_wait()  # for all sides, before torch is imported

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/benchmarks.md"
UNIT = 2**30 if sys.platform == "darwin" else 2**20  # of the system's peak of memory, in a GB


@dataclass
class Settings:
    """How a job is run. `size`: full; quick, so that all jobs end in ten minutes; tiny: does it
    run?"""

    size: str
    rounds: int  # processes a side, or turns of one
    cases: list[str]  # of the job's own, empty: all
    write: bool = False  # into the page, pictures too
    faults: list[str] = field(default_factory=list)  # sides that disagree: the program fails


def main(module: str, title: str, children: dict[str, Callable[..., Any]],
         job: Callable[[Settings], str], cases: Sequence[str] = (), rounds: int = 2,
         quick: int = 1, unit: str = "processes") -> int:
    """A benchmark's whole program: answer as a child, or run the job, print and write its section.

    `children` are the functions that may run in a process of their own, by name; `job` returns
    Markdown and adds to `faults` what makes its figures worthless. Only options that the job has a
    use for are offered: --cases where it has some, --rounds, so many `unit` a side (`quick` of them
    with --quick), where these are not 0.
    """
    if sys.argv[1:2] == ["--child"]:
        answer(children[sys.argv[2]], json.loads(sys.argv[3]))
        return 0
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=title)
    parser.set_defaults(rounds=None, cases=[])
    parser.add_argument("--quick", action="store_true", help="fewer and smaller measurements")
    parser.add_argument("--tiny", action="store_true",
                        help="a second's work a side, nothing is written: does it run?")
    if rounds:
        parser.add_argument("--rounds", type=int,
                            help=f"{unit} a side ({rounds}; {quick} with --quick)")
    if cases:
        parser.add_argument("--cases", nargs="+", choices=list(cases))
    parser.add_argument("--write", action="store_true",
                        help="put the section into docs/benchmarks.md")
    s = parser.parse_args()
    if s.tiny and (s.quick or s.write):
        parser.error("--tiny: not with --quick or --write, for its figures are none")
    if s.rounds is not None and s.rounds < 1:
        parser.error(f"--rounds {s.rounds}: expected one or more")
    size = "full"
    if s.tiny:
        size = "tiny"
    elif s.quick:
        size = "quick"
    usual = {"full": rounds, "quick": quick, "tiny": 1}[size]
    settings = Settings(size, s.rounds or usual or 1, s.cases, s.write)
    command = shlex.join(["python", "-m", module, *sys.argv[1:]])
    text = (f"## {title}\n\n<!-- not run: measures; minutes to hours -->\n"
            f"```bash\n{command}\n```\n\n{job(settings)}\n")
    print(text)
    for fault in settings.faults:
        print(f"FAULT: {fault}", file=sys.stderr)
    if s.write and not settings.faults:
        write(module, text)
    return 1 if settings.faults else 0


def answer(function: Callable[..., Any], args: list) -> None:
    """As a child: a line of JSON for each line read, what the function returns or, of a generator,
    what it yields next. ValueError, and so the program's end, if a number of it is not finite."""
    with os.fdopen(os.dup(1), "w") as said:
        os.dup2(2, 1)  # what a library prints is no result
        found = function(*args)
        given = found if isinstance(found, Iterator) else iter([found])
        for _ in sys.stdin:
            line = json.dumps(next(given), allow_nan=False)  # NaN passes every comparison
            print(line, file=said, flush=True)


class Child:
    """A function of a benchmark in a new process; the program ends with what it said if it fails.
    """

    def __init__(self, module: str, name: str, *args: Any, **environment: str):
        self.what = " ".join(map(str, (name, *args)))
        self.complained = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "--child", name, json.dumps(args)], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.complained,
            env=os.environ | environment)

    def turn(self) -> Any:
        """What it returns, or yields next."""
        with suppress(BrokenPipeError):
            print(file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            self.end()
        return json.loads(line)

    def end(self) -> float:
        """Let it go; the most memory it held as the system counts it, in GB of 2^30 bytes, pages of
        mapped files included."""
        with suppress(BrokenPipeError):
            self.process.stdin.close()  # type: ignore[union-attr]
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = code = os.waitstatus_to_exitcode(status)
        self.process.stdout.close()  # type: ignore[union-attr]
        with self.complained:
            self.complained.seek(0)
            if code:
                sys.exit(f"{self.what}: exit code {code}\n{self.complained.read()[-4000:]}")
        return usage.ru_maxrss / UNIT


def child(module: str, name: str, *args: Any) -> Any:
    """What a function of a benchmark gives in a new process; a dict also gets `gb`, as `Child.end`
    says."""
    one = Child(module, name, *args)
    found, gb = one.turn(), one.end()
    return {"gb": gb, **found} if isinstance(found, dict) else found


def in_turn(module: str, rounds: int, sides: dict[str, tuple[str, list]]) -> dict[str, list[dict]]:
    """{side: (child's name, its arguments)} -> {side: its results}, `rounds` times all in turn."""
    found: dict[str, list[dict]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, (name, args) in sides.items():
            found[side].append(child(module, name, *args))
            print(f"{module}: {side} done", file=sys.stderr, flush=True)
    return found


def alternate(module: str, turns: int,
              sides: dict[str, tuple[str, list]]) -> dict[str, tuple[dict, list[dict]]]:
    """{side: (generator's name, its arguments)} -> {side: (what it yields first, its turns)}.

    All sides' processes are there at once and wait while others work: the first of each, which is
    its setting up and gets `gb`, then `turns` times a turn of each.
    """
    processes, found = {}, {}
    for side, (name, args) in sides.items():
        processes[side] = Child(module, name, *args)
        found[side] = processes[side].turn(), []
        print(f"{module}: {side} ready", file=sys.stderr, flush=True)
    for _ in range(turns):
        for side, process in processes.items():
            found[side][1].append(process.turn())
    for side, process in processes.items():
        found[side][0]["gb"] = process.end()
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


def ratio(above: Sequence[float], below: Sequence[float], unit: str = "") -> str:
    """`1.44 (quartiles 1.38, 1.52)`: what was measured above over what was below, `unit` behind it.

    Each round, or turn, has a ratio, for in it the sides ran one behind the other; the median of
    these, and between what its middle half lies: of two or three the least and the most.
    """
    each = sorted(a / b for a, b in zip(above, below, strict=True))
    said = f"{statistics.median(each):.2f}{unit}"
    if len(each) > 3:
        low, _, high = statistics.quantiles(each, n=4)
        return f"{said} (quartiles {low:.2f}, {high:.2f})"
    return f"{said} ({each[0]:.2f} to {each[-1]:.2f} by round)" if len(each) > 1 else said


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
