"""What is measured between steps beside held-out text, and what ends a run: suites and guards.

    --suites sib200 agreement --suite-data DIR --stop-if 'eng>+5%' 'sib200.acc<0.2'

A **figure** has a name: a held-out text's (its bits per byte), or SUITE[.PART].METRIC. A **guard**
says beyond what a figure ends the run: an absolute value, or a change against step 0 in percent.

The one idea: whether a run is stopped is not kept anywhere. It follows from its guards and the
figures in metrics.jsonl, so a run that goes on says so again, or goes on under another guard.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from evaluation.eval_model import EvalModel, Truncation, warn_truncated
from evaluation.suites import Item, Prompt, Suite, load_suite
from model import Llama
from runtime.console import FLAGS, UserError
from runtime.distributed import Distributed
from tokenization.tokenizer import Tokenizer
from training.settings import Settings

Figures = Mapping[str, float | None]  # None: it was not finite


@dataclass(frozen=True)
class Guard:
    """A figure's name, and the value above or below which a run ends."""

    text: str
    name: str
    above: bool
    limit: float  # with `percent`: of the change against step 0
    percent: bool

    @classmethod
    def of(cls, text: str) -> Guard:
        """Read NAME>VALUE, NAME<VALUE, NAME>+P% or NAME<-P%."""
        m = re.fullmatch(r"\s*([^<>]+?)\s*([<>])\s*([+-]?)(\d+\.?\d*|\.\d+)\s*(%?)\s*", text)
        sign = m and {"%": "+" if m[2] == ">" else "-", "": ""}[m[5]]
        if not m or m[3] != sign:
            why = "" if not m or not m[5] else \
                f"; a change is against step 0, so {m[1]}{m[2]}{sign}{m[4]}%"
            raise UserError(f"--stop-if {text}: expected NAME>VALUE or NAME<VALUE, or a change in "
                            f"percent, such as 'eng>+5%'{why} (in quotes: a shell takes a bare > "
                            "for itself)", FLAGS)
        return cls(text, m[1], m[2] == ">", float(m[3] + m[4]), bool(m[5]))

    def broken(self, first: Figures, now: Figures) -> str:
        """How a figure is beyond the guard, in words; "" where it is not.

        A figure that is not finite is beyond all guards; one that was not measured, beyond none.
        """
        if self.name not in now:
            return ""
        x = now[self.name]
        if x is None:
            return f"{self.text}: {self.name} is not finite"
        before, change = first.get(self.name), ""
        if before:
            change = f", {x / before - 1:+.1%} against {before:.4f} at step 0"
        if self.percent and not before:
            return ""
        y = 100 * (x / before - 1) if self.percent else x
        if not (y > self.limit if self.above else y < self.limit):
            return ""
        return f"{self.text}: {self.name} is {x:.4f}{change}"


@dataclass
class Guards:
    """A run's suites and guards, what step 0 gave, and what ended the run."""

    suites: list[Suite] = field(default_factory=list)
    guards: list[Guard] = field(default_factory=list)
    first: Figures = field(default_factory=dict)
    stopped: str = ""

    @classmethod
    def start(cls, s: Settings) -> Guards:
        """Read --suites and --stop-if (of train.Settings); UserError on what is wrong."""
        guards, found = [Guard.of(x) for x in s.stop_if], []
        for spec in s.suites:
            suite = load_suite(spec, s.suite_data)
            if suite.name in (x.name for x in found):
                raise UserError(f"--suites {spec}: {suite.name} is named twice", FLAGS)
            suite.rows = spread(suite.rows, s.suite_items)
            first: dict[str, Prompt] = {}
            for prompt in suite.prompts:
                first.setdefault(prompt.part, prompt)
            suite.prompts = list(first.values())
            for prompt in suite.prompts:
                suite.items(prompt)  # what is wrong with it shows now
            found.append(suite)
        read = cls(found, guards)
        if s.val:  # else it takes the sources to know
            read.check(x.partition("=")[0] for x in s.val)
        return read

    @property
    def names(self) -> list[str]:
        """Names of the suites' figures, the first of each part its main one."""
        return [name for suite in self.suites for prompt in suite.prompts
                for name in _named(suite, prompt, suite.task(prompt).metric_names())]

    def check(self, texts: Iterable[str]) -> None:
        """UserError for a guard on what is not measured; a suite's bare name is its main figure."""
        texts, names = list(texts), self.names
        for i, guard in enumerate(self.guards):
            if guard.name in (*texts, *names):
                continue
            main = [_named(x, p, x.metrics[:1])[0] for x in self.suites if x.name == guard.name
                    for p in x.prompts]
            if len(main) != 1:
                there = ", ".join([*texts, *(main or names)]) or "nothing"
                raise UserError(f"--stop-if {guard.text}: no figure {guard.name}; measured are "
                                f"{there}", FLAGS)
            self.guards[i] = Guard(guard.text, main[0], guard.above, guard.limit, guard.percent)

    def measure(self, model: Llama, tokenizer: Tokenizer, ranks: Distributed,
                ends: Collection[int] = ()) -> dict[str, float]:
        """The suites' figures, by name: one prompt, greedy, answers of half a context at most that
        end at EOS, or one of `ends`."""
        context, found = model.config.max_position_embeddings, {}
        eval_model = EvalModel(model, tokenizer, stop_ids=frozenset(ends))
        for suite in self.suites:
            for prompt in suite.prompts:
                task = suite.task(prompt, min(suite.new_tokens, context // 2))
                ask = partial(task.records, eval_model)
                measures = task.metrics(_shared(ask, suite.items(prompt), ranks))
                names = _named(suite, prompt, [m.name for m in measures])
                found |= dict(zip(names, (m.value for m in measures), strict=True))
        return found

    def words(self, figures: Figures) -> str:
        """The main figure of each suite, or of each of its parts, for people."""
        main = [name for x in self.suites for p in x.prompts
                for name in _named(x, p, x.metrics[:1])]
        return ", ".join(f"{x} {figures[x]:.4f}" for x in main if figures.get(x) is not None)

    def look(self, step: int, figures: Figures) -> None:
        """Take what an evaluation found; `stopped` says which guards it is beyond.

        UserError where step 0 is beyond one already, or gives nothing to measure a change by.
        """
        if step == 0:
            self.first = figures
        for guard in self.guards if step == 0 else ():
            if said := guard.broken({}, figures):
                raise UserError(f"--stop-if {said} before the first step; go on with "
                                "--resume and another value", FLAGS)
            if guard.percent and not figures.get(guard.name):
                raise UserError(f"--stop-if {guard.text}: {guard.name} is 0 at step 0, of which "
                                "there is no percentage; go on with --resume and a value", FLAGS)
        self.stopped = "; ".join(filter(None, (x.broken(self.first, figures)
                                               for x in self.guards)))

    def resume(self, file: Path, step: int) -> None:
        """Look again at the evaluation that a run stands at, by its metrics.jsonl."""
        looks = evaluations(file)
        self.first = looks.get(0, {})
        for guard in self.guards:
            if step and guard.percent and not self.first.get(guard.name):
                raise UserError(f"--stop-if {guard.text}: step 0 has no {guard.name} in {file}, so "
                                "there is no change; name a value", FLAGS)
        if step in looks and step:
            self.look(step, looks[step])


def _shared(ask: Callable[..., list[Any]], items: Sequence[Item], ranks: Distributed) -> list[Any]:
    """What `ask` finds of items, of which each rank asks its share; of a model that is cut among
    ranks (fsdp) all ask all, for they compute together."""
    if ranks.world_size == 1 or ranks.fsdp_modules:
        return ask(items)
    mine, cut = items[ranks.rank :: ranks.world_size], []
    try:
        part = ask(mine, on_truncation=cut.append) if mine else []
    except UserError:
        part = None
    said = [json.loads(x) for x in ranks.all_gather_text(json.dumps([part, cut], default=str))]
    if any(part is None for part, _ in said):
        return ask(items)  # all meet the fault, and name its place among all items
    if cut := [x for _, told in said for x in told]:
        warn_truncated(Truncation(sum(x[0] for x in cut), sum(x[1] for x in cut), cut[0][2]))
    found: list[Any] = [None] * len(items)
    for rank, (part, _) in enumerate(said):
        found[rank :: ranks.world_size] = part
    return found


def _named(suite: Suite, prompt: Prompt, metrics: Sequence[str]) -> list[str]:
    return [".".join(filter(None, (suite.name, prompt.part, name))) for name in metrics]


def spread(rows: list[Any], n: int) -> list[Any]:
    """`n` of some rows, evenly from first to last, for files are sorted; 0: all."""
    return rows if not 0 < n < len(rows) else [rows[i * len(rows) // n] for i in range(n)]


def finite(figures: Figures) -> dict[str, float | None]:
    """Figures as JSON has them, which knows no NaN."""
    return {k: x if x is not None and math.isfinite(x) else None for k, x in figures.items()}


def evaluations(file: Path) -> dict[int, dict[str, float | None]]:
    """The figures of each evaluation in metrics.jsonl, by step; a line cut short is left out."""
    found = {}
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    for line in text.splitlines():
        try:
            x = json.loads(line)
        except ValueError:
            continue
        if "bits_per_byte" in x or "suites" in x:
            found[x["step"]] = {**x.get("suites", {}), **x.get("bits_per_byte", {})}
    return found
