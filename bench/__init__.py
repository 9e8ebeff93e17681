"""The common part of all benchmarks: sides in processes of their own, in turn; medians; one page.

Each program here measures one job (a training step, loading, ...). It has functions that run in
child processes, and a `job` that calls them in turn and returns Markdown. `main` does the rest:
flags, the section in docs/benchmarks.md, the exit code. README.md in this folder has an example.

Sides run in turn, so that a slow minute of the machine is slow for all of them: `in_turn` runs one
process after the other; `alternate` keeps one process per side and gives each a turn, so that
compared measurements are seconds apart. A child's peak memory begins with its parent's, therefore
no benchmark imports a heavy library at its top.
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
    """The options of a job. `size`: full; quick (all jobs in ten minutes); tiny (a test that the
    benchmark runs)."""

    size: str
    rounds: int  # processes per side, or turns of each process
    cases: list[str]  # empty: all
    write: bool = False  # into docs/benchmarks.md and docs/plots/
    faults: list[str] = field(default_factory=list)  # sides that disagree: the program fails


def main(module: str, title: str, children: dict[str, Callable[..., Any]],
         job: Callable[[Settings], str], cases: Sequence[str] = (), rounds: int = 2,
         quick: int = 1, unit: str = "processes") -> int:
    """The program of a benchmark: answer as a child, or run the job, print and write its section.

    `children` are the functions that may run in a child process, by name. `job` returns Markdown
    and adds to `faults` what makes its figures invalid. `--cases` exists if the job has cases,
    `--rounds` if `rounds` is not 0: the number of `unit` per side, `quick` of them with --quick.
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
    """Run in a child process: for each line read, print a line of JSON with the function's result,
    or with the next value of a generator. ValueError if a number in it is not finite."""
    with os.fdopen(os.dup(1), "w") as output:
        os.dup2(2, 1)  # what a library prints must not be read as a result
        result = function(*args)
        results = result if isinstance(result, Iterator) else iter([result])
        for _ in sys.stdin:
            line = json.dumps(next(results), allow_nan=False)  # NaN passes every comparison
            print(line, file=output, flush=True)


class Child:
    """A function of a benchmark in a new process. If it fails, the program ends and prints the
    child's standard error."""

    def __init__(self, module: str, name: str, *args: Any, **environment: str):
        self.what = " ".join(map(str, (name, *args)))
        self.complained = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "--child", name, json.dumps(args)], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.complained,
            env=os.environ | environment)

    def turn(self) -> Any:
        """The function's result, or the next value of a generator."""
        with suppress(BrokenPipeError):
            print(file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            self.end()
        return json.loads(line)

    def end(self) -> float:
        """End the process -> its peak memory in GB of 2^30 bytes, pages of mapped files included.
        """
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
    """The result of a benchmark's function in a new process; a dict also gets `gb`, its peak."""
    one = Child(module, name, *args)
    result, gb = one.turn(), one.end()
    return {"gb": gb, **result} if isinstance(result, dict) else result


def in_turn(module: str, rounds: int, sides: dict[str, tuple[str, list]]) -> dict[str, list[dict]]:
    """Run all sides in turn, `rounds` times: {side: (child's name, its arguments)} -> {side: its
    results}."""
    results: dict[str, list[dict]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, (name, args) in sides.items():
            results[side].append(child(module, name, *args))
            print(f"{module}: {side} done", file=sys.stderr, flush=True)
    return results


def alternate(module: str, turns: int,
              sides: dict[str, tuple[str, list]]) -> dict[str, tuple[dict, list[dict]]]:
    """{side: (generator's name, its arguments)} -> {side: (what it yields first, its turns)}.

    All processes exist at the same time, and all but one wait. The first value of each comes from
    its setup and gets `gb`; after that each side has `turns` turns.
    """
    processes, results = {}, {}
    for side, (name, args) in sides.items():
        processes[side] = Child(module, name, *args)
        results[side] = processes[side].turn(), []
        print(f"{module}: {side} ready", file=sys.stderr, flush=True)
    for _ in range(turns):
        for side, process in processes.items():
            results[side][1].append(process.turn())
    for side, process in processes.items():
        results[side][0]["gb"] = process.end()
    return results


@dataclass
class Spread:
    """The median, the smallest and the largest of n measurements."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, found: Sequence[float]) -> Spread:
        return cls(statistics.median(found), min(found), max(found), len(found))


def ratio(above: Sequence[float], below: Sequence[float], unit: str = "") -> str:
    """`1.44 (quartiles 1.38, 1.52)`: the median of the ratios of two series, followed by `unit`.

    Each round (or turn) has its own ratio, because its measurements follow each other directly.
    With two or three rounds, the smallest and the largest ratio are given in place of quartiles.
    """
    each = sorted(a / b for a, b in zip(above, below, strict=True))
    median = f"{statistics.median(each):.2f}{unit}"
    if len(each) > 3:
        low, _, high = statistics.quantiles(each, n=4)
        return f"{median} (quartiles {low:.2f}, {high:.2f})"
    if len(each) > 1:
        return f"{median} ({each[0]:.2f} to {each[-1]:.2f} by round)"
    return median


def std(width: int) -> float:
    """The standard deviation of a random model's weights: transformers' default. For --tiny it is
    larger, so that an error in the rotary embedding or the MLP is visible in the loss."""
    return 0.02 if width > 64 else 0.15


def installed(library: str) -> bool:
    """Whether a peer can be measured here."""
    return importlib.util.find_spec(library) is not None


def versions(*libraries: str) -> str:
    """The versions of libraries, such as `torch 2.13.0, litgpt not installed`."""
    return ", ".join(f"{x} {version(x)}" if installed(x) else f"{x} not installed"
                     for x in libraries)


def peak_gb() -> float:
    """The peak memory of this process so far, in GB of 2^30 bytes."""
    return getrusage(RUSAGE_SELF).ru_maxrss / UNIT


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table. A column that holds only numbers is aligned to the right."""
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
    """Replace the section between its marks in docs/benchmarks.md. Text outside the marks, written
    by hand, is not changed."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    page = PAGE.read_text(encoding="utf-8")
    head, _, rest = page.partition(begin)
    _, ended, after = rest.partition(end)
    if rest and not ended:
        sys.exit(f"{PAGE}: {begin.strip()} has no {end.strip()} behind it; nothing is written")
    PAGE.write_text(f"{head if rest else page.rstrip() + chr(10) * 2}{begin}{text}{end}{after}",
                    encoding="utf-8")
