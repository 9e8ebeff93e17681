"""Stop conditions (`--stop-if`): they end a run after an evaluation whose metrics are too bad.

    --stop-if 'eng>+5%' 'sib200.acc<0.2'

A condition names a metric and a limit: an absolute value, or a change against step 0 in percent.
Metrics are the bits per byte of held-out texts, by the text's name, and SUITE[.PART].METRIC.
Whether a run was stopped is not saved. It follows from the conditions and metrics.jsonl, so a
resumed run stops again, or continues if it was given other conditions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from runtime.console import FLAGS, UserError, read_metrics_line

Metrics = Mapping[str, float | None]  # None: not finite

NUMBER = r"(\d+\.?\d*|\.\d+)"
ABSOLUTE = re.compile(rf"\s*([^<>]+?)\s*([<>])\s*(-?){NUMBER}\s*")
RELATIVE = re.compile(rf"\s*([^<>]+?)\s*([<>])\s*([+-]?){NUMBER}\s*%\s*")


@dataclass(frozen=True)
class StopCondition:
    """A metric, and the limit above or below which it ends the run."""

    text: str  # as given to --stop-if
    metric: str
    above: bool  # whether values above the limit end the run, or values below it
    limit: float  # with `percent`: of the change against step 0
    percent: bool

    @classmethod
    def parse(cls, text: str) -> StopCondition:
        """Read NAME>VALUE, NAME<VALUE, NAME>+P% or NAME<-P%."""
        relative = RELATIVE.fullmatch(text)
        if relative:
            metric, comparison, sign, number = relative.groups()
            expected_sign = "+" if comparison == ">" else "-"
            if sign != expected_sign:
                raise cls._unreadable(text, "; a change is against step 0, so "
                                            f"{metric}{comparison}{expected_sign}{number}%")
            return cls(text, metric, comparison == ">", float(sign + number), percent=True)
        absolute = ABSOLUTE.fullmatch(text)
        if not absolute or absolute[3]:
            raise cls._unreadable(text)
        metric, comparison, _, number = absolute.groups()
        return cls(text, metric, comparison == ">", float(number), percent=False)

    @staticmethod
    def _unreadable(text: str, hint: str = "") -> UserError:
        return UserError(f"--stop-if {text}: expected NAME>VALUE or NAME<VALUE, or a change in "
                         f"percent, such as 'eng>+5%'{hint} (use quotes: a shell reads a bare > as "
                         "a redirection)", FLAGS)

    def violation(self, first: Metrics, metrics: Metrics) -> str:
        """Say how the metrics violate the condition; "" if they do not. `first` are step 0's.

        A metric that is not finite violates every condition on it; a missing one violates none.
        """
        if self.metric not in metrics:
            return ""
        value, start = metrics[self.metric], first.get(self.metric)
        if value is None:
            return f"{self.text}: {self.metric} is not finite"
        if self.percent and not start:
            return ""
        compared = 100 * (value / start - 1) if self.percent else value
        violated = compared > self.limit if self.above else compared < self.limit
        if not violated:
            return ""
        change = f", {value / start - 1:+.1%} against {start:.4f} at step 0" if start else ""
        return f"{self.text}: {self.metric} is {value:.4f}{change}"


@dataclass
class EarlyStopping:
    """A run's stop conditions, the metrics of step 0, and what ended the run."""

    conditions: list[StopCondition] = field(default_factory=list)
    first: Metrics = field(default_factory=dict)
    stop_reason: str = ""

    @classmethod
    def parse(cls, texts: Sequence[str]) -> EarlyStopping:
        """Read the values of --stop-if."""
        return cls([StopCondition.parse(text) for text in texts])

    def check_metrics(self, texts: Sequence[str], suite_metrics: Sequence[str],
                      main_metrics: Mapping[str, list[str]]) -> None:
        """UserError for a condition on what is neither a held-out text nor a metric of a suite.

        `main_metrics` are the main metrics of each suite, one for each of its parts. A suite's bare
        name stands for its main metric if it has just one.
        """
        for i, condition in enumerate(self.conditions):
            if condition.metric in (*texts, *suite_metrics):
                continue
            candidates = main_metrics.get(condition.metric, [])
            if len(candidates) != 1:
                names = [*texts, *(candidates or suite_metrics)]
                raise UserError(f"--stop-if {condition.text}: no metric {condition.metric}; "
                                f"measured are {', '.join(names) or 'none'}", FLAGS)
            self.conditions[i] = replace(condition, metric=candidates[0])

    def update(self, step: int, metrics: Metrics) -> None:
        """Take the metrics of an evaluation; set `stop_reason` if they violate a condition.

        UserError if step 0 violates one already, or has no value to measure a change against.
        """
        if step == 0:
            self.first = metrics
            for condition in self.conditions:
                self._check_step_0(condition, metrics)
        violations = [x.violation(self.first, metrics) for x in self.conditions]
        self.stop_reason = "; ".join(x for x in violations if x)

    @staticmethod
    def _check_step_0(condition: StopCondition, metrics: Metrics) -> None:
        violation = condition.violation({}, metrics)
        if violation:
            raise UserError(f"--stop-if {violation} before the first step; continue with --resume "
                            "and another value", FLAGS)
        if condition.percent and not metrics.get(condition.metric):
            raise UserError(f"--stop-if {condition.text}: {condition.metric} is 0 at step 0, so "
                            "there is no change in percent; continue with --resume and an absolute "
                            "value", FLAGS)

    def resume(self, file: Path, step: int) -> None:
        """Decide again at the evaluation of `step`, from the metrics.jsonl of the run."""
        evaluations = read_evaluations(file)
        self.first = evaluations.get(0, {})
        if step == 0:
            return
        for condition in self.conditions:
            if condition.percent and not self.first.get(condition.metric):
                raise UserError(f"--stop-if {condition.text}: step 0 has no {condition.metric} in "
                                f"{file}, so there is no change; give an absolute value", FLAGS)
        if step in evaluations:
            self.update(step, evaluations[step])


def read_evaluations(file: Path) -> dict[int, dict[str, float | None]]:
    """The metrics of each evaluation in metrics.jsonl, by step; a truncated line is skipped."""
    if not file.exists():
        return {}
    evaluations = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        entry = read_metrics_line(line)
        parts = [entry[key] for key in ("suites", "bits_per_byte") if key in entry]
        if parts and type(entry.get("step")) is int and all(isinstance(x, dict) for x in parts):
            evaluations[entry["step"]] = {name: x for part in parts for name, x in part.items()}
    return evaluations
