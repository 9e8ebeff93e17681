"""The kinds of tasks: what a model is asked for each item, and how its answers are scored.

    MultipleChoice        the likeliest of some continuations is the answer
    ExactMatch            a generated answer is compared with the right one
    Translation           a generated translation is compared with a reference
    DocumentLikelihood    bits per byte of a text

A `SuiteTask` is one prompt of a suite. It makes requests from items, records from answers, and
metrics from records; it needs no model for the last, so saved records can be scored again.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from evaluation import metrics
from evaluation.eval_model import Answer, Continuation, Truncation, warn_truncated
from evaluation.likelihood import no_progress
from evaluation.metrics import Measure
from evaluation.segment_scores import lower_is_better
from languages.language import identifier_for

if TYPE_CHECKING:
    from evaluation.eval_model import EvalModel, Progress
    from evaluation.results import (
        AnswerRecord,
        ChoiceRecord,
        DocumentRecord,
        SampleLog,
        TranslationRecord,
    )
    from evaluation.suites import Item, Prompt, Suite

EMPTY = 1e-9  # the length of an empty choice, by which log p is divided

# what log p of a choice is divided by, for each kind of accuracy
CHOICE_LENGTHS: dict[str, Callable[[str], float]] = {
    "acc": lambda choice: 1.0,
    "acc_norm": len,
    "acc_bytes": lambda choice: len(choice.encode()),
}
ANSWER_SCORES = {"exact_match": metrics.exact_match, "f1": metrics.word_f1}


class Task(Protocol):
    """What scores records: every kind of task has these."""

    unit: ClassVar[str]  # what the confidence interval resamples

    def metrics(self, records: Sequence[SampleLog]) -> list[Measure]:
        """Return the metrics of some records, in the order in which they are reported."""


class DocumentLikelihood:
    """Bits per byte of documents."""

    unit: ClassVar[str] = "documents"

    def record(self, nats: float, n_bytes: int) -> DocumentRecord:
        """Return the record of a document: -log p in nats, and UTF-8 bytes."""
        return {"nats": float(nats), "bytes": n_bytes}

    def metrics(self, records: Sequence[DocumentRecord]) -> list[Measure]:
        """Return bits per byte."""
        return [metrics.bits_per_byte_of(np.array([r["nats"] for r in records]),
                                         np.array([r["bytes"] for r in records]))]


class SuiteTask(ABC):
    """One prompt of a suite."""

    kind: ClassVar[str]  # in a suite's .toml, by lm-evaluation-harness's names
    old_kind: ClassVar[str]  # the earlier name, which is still read
    known_metrics: ClassVar[tuple[str, ...]]
    unit: ClassVar[str] = "items"
    required_keys: ClassVar[tuple[str, ...]] = ()  # that a suite's .toml must have
    needs_text_gold: ClassVar[bool] = False  # whether a suite without right answers is refused

    def __init__(self, suite: Suite, prompt: Prompt, max_new_tokens: int = 0, beams: int = 1):
        """`max_new_tokens` 0: as the suite says."""
        self.suite = suite
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens or suite.new_tokens
        self.beams = beams

    @classmethod
    def columns(cls, prompt: Prompt) -> set[str]:
        """Return columns that every row must have, in addition to those in the templates."""
        return set()

    @classmethod
    def gold(cls, text: str, choices: Sequence[str]) -> int | str:
        """Return the right answer that a rendered template names."""
        return text

    @abstractmethod
    def signature(self) -> dict[str, object]:
        """Return what figures of this task depend on in addition to suite, prompt and model."""

    @abstractmethod
    def n_requests(self, items: Sequence[Item]) -> int:
        """Return how many requests the items make."""

    @abstractmethod
    def item_fields(self, item: Item) -> dict[str, Any]:
        """Return the part of an item's record that is known before the model is asked."""

    @abstractmethod
    def records(self, model: EvalModel, items: Sequence[Item], progress: Progress = no_progress,
                on_truncation: Callable[[Truncation], object] = warn_truncated) -> list[SampleLog]:
        """Ask the model about each item; return the records in order."""

    @abstractmethod
    def metrics(self, records: Sequence[SampleLog]) -> list[Measure]:
        """Return the metrics of some records, in the order in which they are reported."""

    @abstractmethod
    def example_record(self) -> SampleLog:
        """Return a made-up record."""

    def metric_names(self) -> list[str]:
        """Return the names of the metrics, before anything is measured."""
        return [m.name for m in self.metrics([self.example_record()])]


class MultipleChoice(SuiteTask):
    """The likeliest continuation is the answer; by its sum of log p, or normalised by length."""

    kind = "multiple_choice"
    old_kind = "choose"
    known_metrics = ("acc", "acc_norm", "acc_bytes", "f1")

    @classmethod
    def gold(cls, text: str, choices: Sequence[str]) -> int:
        """Return the index of the right choice: the rendered text is a choice or its index."""
        if text in choices:
            return choices.index(text)
        if text.isdigit() and int(text) < len(choices):
            return int(text)
        raise ValueError(f"the right answer is {text!r}, which is none of {list(choices)[:8]}")

    def signature(self) -> dict[str, object]:
        return {}

    def n_requests(self, items: Sequence[Item]) -> int:
        return sum(len(item.choices) for item in items)

    def requests(self, item: Item, context: str, delimiter: str,
                 number: int = 0) -> list[Continuation]:
        """Return a request for each choice; `number` is the item's index."""
        return [Continuation(context, delimiter + choice, number) for choice in item.choices]

    def records(self, model: EvalModel, items: Sequence[Item], progress: Progress = no_progress,
                on_truncation: Callable[[Truncation], object] = warn_truncated,
                ) -> list[ChoiceRecord]:
        delimiter = model.delimiter(self.suite.delimiter, self.prompt.taught_as)
        requests = []
        contexts = model.contexts(items, self.prompt.taught_as)
        for number, (item, context) in enumerate(zip(items, contexts, strict=True)):
            requests += self.requests(item, context, delimiter, number)
        scores = iter(model.loglikelihood(requests, progress, on_truncation))
        return [self.record(item, [next(scores) for _ in item.choices]) for item in items]

    def item_fields(self, item: Item) -> dict[str, Any]:
        return {"gold": item.gold}

    def record(self, item: Item, logp: Sequence[float]) -> ChoiceRecord:
        """Return the record of an item: log p of each choice, and the columns of its groups."""
        groups = {column: item.row[column] for column in self.suite.groups}
        return {**self.item_fields(item), "logp": list(logp), "choices": list(item.choices),
                **groups}

    def metrics(self, records: Sequence[ChoiceRecord]) -> list[Measure]:
        gold = [r["gold"] for r in records]
        n_choices = [len(r["choices"]) for r in records]
        measures = {}
        for name, length in CHOICE_LENGTHS.items():
            predictions = [best_choice(r["logp"], [length(c) for c in r["choices"]])
                           for r in records]
            correct = [float(a == b) for a, b in zip(gold, predictions, strict=True)]
            measures[name] = metrics.accuracy(name, correct, n_choices)
            if name == "acc":
                measures["f1"] = metrics.weighted_f1(gold, predictions, n_choices)
        return [measures[name] for name in self.suite.metrics]

    def example_record(self) -> ChoiceRecord:
        return {"gold": 0, "logp": [0.0], "choices": ["a"]}


class GenerationTask(SuiteTask):
    """A task whose answers are generated."""

    def signature(self) -> dict[str, object]:
        return {"new": self.max_new_tokens, "beams": self.beams}

    def n_requests(self, items: Sequence[Item]) -> int:
        return len(items)

    @property
    def stop(self) -> Sequence[str]:
        """The texts that end an answer, in addition to EOS."""
        return self.suite.stop

    @abstractmethod
    def record(self, item: Item, answer: Answer) -> SampleLog:
        """Return the record of an item."""

    def records(self, model: EvalModel, items: Sequence[Item], progress: Progress = no_progress,
                on_truncation: Callable[[Truncation], object] = warn_truncated) -> list[SampleLog]:
        contexts = model.contexts(items, self.prompt.taught_as)
        answers = model.generate_until(contexts, self.stop, self.max_new_tokens, self.beams,
                                       progress, on_truncation)
        return [self.record(item, answer) for item, answer in zip(items, answers, strict=True)]


class ExactMatch(GenerationTask):
    """An answer is compared with the right one, whole or by what a pattern extracts from it."""

    kind = "exact_match"
    old_kind = "match"
    known_metrics = ("exact_match", "f1")
    required_keys = ("answers",)
    needs_text_gold = True

    def item_fields(self, item: Item) -> dict[str, Any]:
        return {"gold": item.gold}

    def record(self, item: Item, answer: Answer) -> AnswerRecord:
        return {**self.item_fields(item), "answer": answer.text, "end": answer.end}

    def metrics(self, records: Sequence[AnswerRecord]) -> list[Measure]:
        measures = []
        for extraction in self.suite.answers:
            note = "" if extraction["name"] == "whole" else f", {extraction['name']}"
            answers = [extract_answer(r["answer"], extraction.get("last")) for r in records]
            for name in self.suite.metrics:
                scores = [ANSWER_SCORES[name](r["gold"], answer)
                          for r, answer in zip(records, answers, strict=True)]
                measures.append(metrics.mean(name + note, scores))
        return measures

    def example_record(self) -> AnswerRecord:
        return {"gold": "a", "answer": "a", "end": "eos"}


class Translation(GenerationTask):
    """A translation is compared with a reference. `part` of the prompt is the direction, two
    columns: SOURCE-TARGET."""

    kind = "translation"
    old_kind = "translate"
    known_metrics = tuple(metrics.TRANSLATION)

    @classmethod
    def columns(cls, prompt: Prompt) -> set[str]:
        return set(prompt.part.split("-"))

    @property
    def stop(self) -> Sequence[str]:
        return ("\n",) if self.prompt.taught_as else self.suite.stop  # as sample.py --translate

    @property
    def source(self) -> str:
        """The source column."""
        return self.prompt.part.partition("-")[0]

    @property
    def target(self) -> str:
        """The target column."""
        return self.prompt.part.partition("-")[2]

    @property
    def target_language(self) -> str:
        """The code of the target language."""
        return self.suite.language(self.target).code

    def item_fields(self, item: Item) -> dict[str, Any]:
        return {"source": str(item.row[self.source]), "reference": item.gold}

    def record(self, item: Item, answer: Answer) -> TranslationRecord:
        return {**self.item_fields(item), "hypothesis": answer.text, "end": answer.end}

    def file_record(self, row: Mapping[str, Any], hypothesis: str,
                    scores: Mapping[str, float] | None = None) -> TranslationRecord:
        """Return the record of a translation that another system made. `scores`: of the segment by
        other programs, by name."""
        record: TranslationRecord = {
            "source": str(row[self.source]), "reference": str(row[self.target]),
            "hypothesis": hypothesis, "end": ""}
        if scores:
            record["scores"] = dict(scores)
        return record

    def metrics(self, records: Sequence[TranslationRecord]) -> list[Measure]:
        """Scores as they are, then with one spelling of marks that readers do not distinguish, if
        one of the two languages has such marks; then the rates of common failures."""
        sources = [r["source"] for r in records]
        hypotheses = [r["hypothesis"] for r in records]
        references = [r["reference"] for r in records]
        measures = self._scores("", hypotheses, references)
        spelling = self._same_spelling()
        if spelling:
            note, respell = spelling
            measures += self._scores(f", {note}", [respell(x) for x in hypotheses],
                                     [respell(x) for x in references])
        measures += _measures_of_scores(records)
        if all(r["end"] for r in records):
            measures.append(metrics.mean("eos_rate", [r["end"] == "eos" for r in records]))
        copies = [x.strip().casefold().startswith(y.strip().casefold())
                  for x, y in zip(hypotheses, sources, strict=True)]
        measures.append(metrics.mean("copy_rate", copies, higher_is_better=False))
        identify = identifier_for([self.target_language])
        if identify:
            right = [identify(x) == self.target_language for x in hypotheses]
            measures.append(metrics.mean("language_rate", right))
        lengths = [[len(x) for x in texts] for texts in (hypotheses, references)]
        return [*measures, metrics.ratio("length_ratio", *lengths)]

    def _scores(self, note: str, hypotheses: Sequence[str],
                references: Sequence[str]) -> list[Measure]:
        return [metrics.translation(name, hypotheses, references, note)
                for name in self.suite.metrics if name != "spBLEU" or metrics.has_spbleu()]

    def _same_spelling(self) -> tuple[str, Callable[[str], str]] | None:
        for column in (self.target, self.source):
            same_spelling = self.suite.language(column).same_spelling
            if same_spelling:
                return same_spelling
        return None

    def example_record(self) -> TranslationRecord:
        return {"source": "a", "reference": "a", "hypothesis": "a", "end": "eos"}


def _measures_of_scores(records: Sequence[TranslationRecord]) -> list[Measure]:
    """Return the mean of each score that other programs gave to all of the segments."""
    scores = [r.get("scores", {}) for r in records]
    names = [name for name in scores[0] if all(name in x for x in scores)] if scores else []
    return [metrics.mean(name, [x[name] for x in scores], not lower_is_better(name))
            for name in names]


TASKS: tuple[type[SuiteTask], ...] = (MultipleChoice, ExactMatch, Translation)


def task_type(kind: str) -> type[SuiteTask]:
    """Return the class of tasks of a suite's `kind`, also by its earlier name; ValueError if there
    is none."""
    for cls in TASKS:
        if kind in (cls.kind, cls.old_kind):
            return cls
    raise ValueError(f"kind {kind!r}: expected {', '.join(cls.kind for cls in TASKS)}")


def best_choice(logp: Sequence[float], lengths: Sequence[float]) -> int:
    """Return the index of the choice with the highest log p over its length."""
    return int(np.argmax(np.array(logp) / np.maximum(np.array(lengths, np.float64), EMPTY)))


def extract_answer(answer: str, pattern: str | None = None) -> str:
    """Return the answer without spaces around it, or the last match of a pattern (of its first
    group that is not empty); "[invalid]" without a match."""
    if pattern is None:
        return answer.strip()
    matches = re.findall(pattern, answer)
    if not matches:
        return "[invalid]"
    last = matches[-1]
    if not isinstance(last, str):  # a tuple of groups
        last = next(filter(None, last), "[invalid]")
    return last.strip()
