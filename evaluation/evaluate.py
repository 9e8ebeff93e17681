"""Measuring: texts, suites and another system's translations in, results and record files out.

`eval.py` is the command. Each `measure_*` function answers one thing that was asked for, writes its
records to OUT/items and returns its results. Whatever can be refused is refused by the functions
that read (`read_texts`, `read_suites`, `check_baseline`) before the model is asked.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data import sha256
from evaluation.baseline import compare_measures
from evaluation.results import (
    METRICS_VERSION,
    TEXT_PREFIX,
    FileInfo,
    MetricResult,
    SampleLog,
    group_results,
    mean_result,
    metric_result,
    read_hypotheses,
    record_name,
    write_parallel_files,
    write_records,
)
from evaluation.segment_scores import read_scores
from evaluation.significance import RESAMPLES, SEED
from evaluation.suites import Item, Prompt, Suite, load_suite
from evaluation.tasks import DocumentLikelihood, SuiteTask, Task, Translation
from evaluation.taught import TAUGHT, Taught
from languages.language import DEFAULT_LANGUAGE, identifier_for, language_of
from languages.normalise import Normaliser, cleaning_of
from preparation.contamination import TrainingText, count_contaminated
from preparation.readers import detect_document_unit, file_format, list_files
from preparation.readers import read_texts as read_documents
from preparation.text import build_normaliser
from runtime.console import FLAGS, UserError, info, progress

if TYPE_CHECKING:
    from evaluation.baseline import Baseline
    from evaluation.eval_model import EvalModel
    from evaluation.metrics import Measure

    ComparedMeasure = tuple[Measure, Measure | None]  # ours and the baseline's


NOT_CLEANED = "none"  # in place of the steps of a normaliser


@dataclass
class EvalText:
    """A text to measure: the documents of its files, the first --limit of them."""

    name: str
    unit: str  # what a document is
    files: list[Path]
    documents: list[str]
    partial: bool
    normaliser: Normaliser | None = None  # by which the documents are cleaned

    @property
    def suite(self) -> str:
        """The name of the suite in its results."""
        return TEXT_PREFIX + self.name

    def cleaned(self, normaliser: Normaliser | None) -> EvalText:
        """Return the text with its documents normalised."""
        if normaliser is None:
            return self
        documents = [normaliser(document)[0] for document in self.documents]
        return replace(self, documents=documents, normaliser=normaliser)


@dataclass(frozen=True)
class Options:
    """How suites are asked."""

    shots: int = 0
    limit: int = 0  # items of each suite (`Suite.subset`); 0: all
    max_new_tokens: int = 0  # 0: as each suite says
    beams: int = 1


@dataclass
class Measurement:
    """The records of a text, or of one prompt of a suite, and how they were made."""

    suite: str
    task: Task
    records: Sequence[SampleLog]
    choices: dict[str, object]  # what the figures depend on: their signature
    partial: bool
    details: dict[str, Any]  # further keys of MetricResult
    prompt: Prompt | None = None
    groups: Sequence[str] = ()

    @property
    def name(self) -> str:
        """The name of the file of records."""
        if self.prompt is None:
            return record_name(self.suite)
        return record_name(self.suite, self.prompt.name, self.prompt.part)

    def signature(self) -> str:
        """Return the choices that the figures depend on, as text."""
        choices = dict(self.choices)
        if self.partial:
            choices["limit"] = len(self.records)
        choices["ci"] = f"{self.task.unit},{RESAMPLES},{SEED}"
        choices["version"] = METRICS_VERSION
        return "|".join(f"{key}:{value}" for key, value in choices.items())

    def prompt_details(self) -> dict[str, str]:
        """Return the keys of a result that say which prompt it is of."""
        if self.prompt is None:
            return {}
        details = {"prompt": self.prompt.name, "part": self.prompt.part}
        if self.prompt.excluded_from_mean:
            details["aside"] = self.prompt.excluded_from_mean
        return details


@dataclass
class Evaluation:
    """The folder that results go to, and the baseline that they are compared with."""

    out: Path
    baseline: Baseline | None = None
    metric_names: set[str] = field(default_factory=set)  # that any measured suite asked for
    unidentified: set[str] = field(default_factory=set)  # target languages without an identifier

    def add(self, measured: Measurement) -> tuple[list[MetricResult], list[ComparedMeasure]]:
        """Score the records, compare them with the baseline's and write them. Returns the results,
        and the measures that they come from, each with the baseline's."""
        signature, prompt = measured.signature(), measured.prompt_details()
        measures = measured.task.metrics(measured.records)
        results = [metric_result(measured.suite, measure, signature, **prompt,
                                 partial=measured.partial, **measured.details,
                                 items=measured.name)
                   for measure in measures]
        old_measures: list[Measure | None] = [None] * len(measures)
        if self.baseline:
            old_measures = self.baseline.compare(measured.name, results, measures, measured.task,
                                                 measured.records)
        if measured.groups:
            results += group_results(measured.suite, measures[0], measured.records,
                                     measured.groups, signature, **prompt,
                                     partial=measured.partial)
        folder = self.out / "items"
        write_records(folder / f"{measured.name}.jsonl", measured.records)
        if isinstance(measured.task, Translation):
            self._warn_unidentified(measured.task.target_language)
            name = measured.name
            if measured.partial:
                name += ".PARTIAL"
            write_parallel_files(folder, name, measured.records)
        return results, list(zip(measures, old_measures, strict=True))

    def _warn_unidentified(self, code: str) -> None:
        """Print once per language that language_rate is left out."""
        if identifier_for([code]) is None and code not in self.unidentified:
            self.unidentified.add(code)
            info(f"language_rate is left out for {code}: languages/ has no identifier for it")


def read_texts(specs: Sequence[str], documents: str, key: str, limit: int) -> list[EvalText]:
    """Read the texts of --text, NAME=FILE each. `documents`, `key`: --documents, --text-key."""
    texts: list[EvalText] = []
    for spec in specs:
        name, _, file_spec = spec.partition("=")
        if not name or "/" in name or not file_spec:
            raise UserError(f"--text {spec}: expected NAME=FILE, as in kin=kin_val.jsonl, the name "
                            "without a /", FLAGS)
        if name in (text.name for text in texts):
            raise UserError(f"--text {spec}: the name {name} is taken; give each text its own",
                            FLAGS)
        files = list_files([file_spec])
        all_documents = read_documents(file_spec, documents, key)
        text = EvalText(name, document_unit(files, documents, key), files,
                        all_documents[: limit or None], 0 < limit < len(all_documents))
        texts.append(text)
        info(f"{name}: {len(all_documents)} documents (a document is a {text.unit})")
    return texts


def document_unit(files: Sequence[Path], documents: str, key: str) -> str:
    """Return what a document of these files is, such as "line" or "record.text"."""
    units = set()
    for file in files:
        if file_format(file) != ".txt":
            units.add(f"record.{key}")
        elif documents == "auto":
            units.add(detect_document_unit(file))
        else:
            units.add(documents)
    return "+".join(sorted(units))


def read_suites(specs: Sequence[str], data_folder: str, prompts: Sequence[str],
                options: Options) -> list[Suite]:
    """Load the suites of --suites with only the prompts that --prompts names (without any: all),
    and make every item once, so that faults of a suite are reported now."""
    suites: list[Suite] = []
    for spec in specs:
        suite = load_suite(spec, data_folder)
        if prompts:
            _select_prompts(suite, prompts)
        if suite.name in (other.name for other in suites):
            raise UserError(f"--suites {spec}: {suite.name} is named twice; name it once", FLAGS)
        for prompt in suite.prompts:
            suite.items(prompt, options.shots, options.limit)
        suites.append(suite)
        info(f"{suite.name}: {len(suite.rows)} items, {len(suite.prompts)} prompts "
            f"({suite.about})")
    chosen = {prompt.name for suite in suites for prompt in suite.prompts}
    missing = [name for name in prompts if name not in (*chosen, TAUGHT)]
    if missing:
        raise UserError(f"--prompts {' '.join(missing)}: no suite has such a prompt; remove it",
                        FLAGS)
    return suites


def clean_texts(texts: Sequence[EvalText], normaliser: Normaliser | None,
                baseline: Baseline | None) -> list[EvalText]:
    """Return the texts cleaned as the training text of a model was; those of the baseline as they
    were cleaned there, because only measurements of equal bytes can be compared."""
    cleaned = []
    for text in texts:
        theirs = baseline.choices_of(record_name(text.suite)) if baseline else None
        text_normaliser = normaliser
        if theirs is not None:
            ours = _cleaning(normaliser).get("cleaned", NOT_CLEANED)
            steps = theirs.get("cleaned", NOT_CLEANED)
            if steps != ours:
                language = language_of(DEFAULT_LANGUAGE)
                text_normaliser = build_normaliser(steps.split("+"), [language])
                info(f"{text.name}: cleaned by {steps}, as in the baseline; by --normalise auto it "
                     f"is {ours}, as the model's training text")
        cleaned.append(text.cleaned(text_normaliser))
    return cleaned


def as_taught(suites: Sequence[Suite], taught: Taught, prompts: Sequence[str],
              in_chat: bool) -> list[Suite]:
    """Return the suites as a model is asked them (`Taught.suite_for`). `prompts`, `in_chat`:
    --prompts, --chat-template. Raises UserError if --prompts names `taught` and it has none."""
    add_prompts = not prompts or TAUGHT in prompts
    asked = [taught.suite_for(suite, add_prompts, in_chat) for suite in suites]
    for suite in asked:
        if not suite.prompts:
            raise UserError(f"--prompts {TAUGHT}: the model's prompt.json has no prompt for suite "
                            f"{suite.name}; name public prompts, such as 1", FLAGS)
    return asked


def _select_prompts(suite: Suite, names: Sequence[str]) -> None:
    prompts = [prompt for prompt in suite.prompts if prompt.name in names]
    if not prompts and TAUGHT not in names:
        known = ", ".join(dict.fromkeys(prompt.name for prompt in suite.prompts))
        raise UserError(f"--prompts {' '.join(names)}: suite {suite.name} has {known}; name one "
                        "of them", FLAGS)
    suite.prompts = prompts


def suite_choices(task: SuiteTask, model: EvalModel, shots: int) -> dict[str, object]:
    """Return what the figures of a suite's prompt depend on."""
    taught_as = task.prompt.taught_as
    choices = {**task.suite.signature(task.prompt), "shots": 0 if taught_as else shots}
    if taught_as:
        choices["asked"] = f"{TAUGHT},{taught_as}"
    return {**choices, **_cleaning(task.suite.normaliser), **model.signature(),
            **model.chat_signature(taught_as), **task.signature()}


def text_choices(text: EvalText, model: EvalModel) -> dict[str, object]:
    """Return what the figures of a text depend on."""
    return {"unit": text.unit, **_cleaning(text.normaliser), **model.signature()}


def _cleaning(normaliser: Normaliser | None) -> dict[str, str]:
    """Return the steps by which what is asked was cleaned, if any, for a signature."""
    steps = cleaning_of(normaliser)["steps"]
    return {"cleaned": "+".join(steps)} if steps else {}


def items_of(suite: Suite, prompt: Prompt, options: Options) -> list[Item]:
    """Return the items of a prompt; a taught one is asked without examples."""
    return suite.items(prompt, 0 if prompt.taught_as else options.shots, options.limit)


def check_baseline(baseline: Baseline, texts: Sequence[EvalText], suites: Sequence[Suite],
                   model: EvalModel, options: Options) -> None:
    """Raise UserError now, and not after hours, if the baseline was measured otherwise."""
    for text in texts:
        items = [{"bytes": len(document.encode())} for document in text.documents]
        baseline.records(record_name(text.suite), text_choices(text, model), items)
    for suite in suites:
        for prompt in suite.prompts:
            task = suite.task(prompt, options.max_new_tokens, options.beams)
            items = [task.item_fields(item) for item in items_of(suite, prompt, options)]
            baseline.records(record_name(suite.name, prompt.name, prompt.part),
                             suite_choices(task, model, options.shots), items)


def measure_text(evaluation: Evaluation, text: EvalText, model: EvalModel) -> list[MetricResult]:
    """Measure bits per byte of one text."""
    start = time.perf_counter()
    task = DocumentLikelihood()
    ids = model.tokenizer.encode_batch(text.documents)
    n_bytes = [len(document.encode()) for document in text.documents]
    n_tokens = sum(map(len, ids))
    n_unspelled = sum(map(model.tokenizer.count_unspelled, text.documents))
    if n_unspelled:
        info(f"{text.name}: the tokenizer has no token for {n_unspelled:,} characters; their bytes "
             "count, and they cost the model nothing")
    ids = model.with_scored_bos(ids)
    with progress(text.name, sum(map(len, ids))) as advance:
        nats = model.rolling_nats(ids, advance)
    model.check_finite(nats, text.name)
    records = [task.record(x, n) for x, n in zip(nats, n_bytes, strict=True)]
    details = {"bytes": sum(n_bytes), "tokens": n_tokens, **_provenance(start, text.files)}
    results, _ = evaluation.add(Measurement(
        text.suite, task, records, text_choices(text, model), text.partial, details))
    return results


def measure_suite(evaluation: Evaluation, suite: Suite, model: EvalModel,
                  options: Options) -> list[MetricResult]:
    """Measure all prompts of one suite, and their means."""
    evaluation.metric_names |= set(suite.metrics)
    results: list[MetricResult] = []
    # measures of one part and metric, of all prompts that count in the mean
    same_metric: dict[tuple[str, str], list[ComparedMeasure]] = {}
    for prompt in suite.prompts:
        prompt_results, measures = _measure_prompt(evaluation, suite, prompt, model, options)
        results += prompt_results
        if not prompt.excluded_from_mean:
            for measure, old in measures:
                same_metric.setdefault((prompt.part, measure.name), []).append((measure, old))
    for (part, _), pairs in same_metric.items():
        if len(pairs) < 2:
            continue
        signature = f"suite:{suite.name}.{suite.version}|prompts:{len(pairs)}"
        measures = [measure for measure, _ in pairs]
        old_measures = [old for _, old in pairs if old is not None]
        result = mean_result(suite.name, measures, signature, part=part, prompt="mean",
                             partial=0 < options.limit < len(suite.rows))
        if len(old_measures) == len(measures):
            result["baseline"] = compare_measures(measures, old_measures)
        elif old_measures:
            name = " ".join(filter(None, (suite.name, part, measures[0].name)))
            info(f"{name}: the baseline has {len(old_measures)} of {len(measures)} prompts, so the "
                 "mean is not compared")
        results.append(result)
    return results


def _measure_prompt(evaluation: Evaluation, suite: Suite, prompt: Prompt, model: EvalModel,
                    options: Options) -> tuple[list[MetricResult], list[ComparedMeasure]]:
    start = time.perf_counter()
    items = items_of(suite, prompt, options)
    task = suite.task(prompt, options.max_new_tokens, options.beams)
    title = " ".join(filter(None, (suite.name, prompt.part, prompt.name)))
    with progress(title, task.n_requests(items)) as advance:
        records = task.records(model, items, advance)
    for record in records:
        model.check_finite(np.array(record.get("logp", ())), title)
    return evaluation.add(Measurement(
        suite.name, task, records, suite_choices(task, model, options.shots),
        len(items) < len(suite.rows), _provenance(start, suite.files), prompt, suite.groups))


def measure_hypotheses(evaluation: Evaluation, spec: str, suite_specs: Sequence[str],
                       data_folder: str, limit: int,
                       score_files: Mapping[str, Path] | None = None) -> list[MetricResult]:
    """Score another system's translations, SUITE/PART=FILE. `suite_specs`, `data_folder`:
    --suites, --suite-data; `score_files`: scores of other programs, by name."""
    start = time.perf_counter()
    name, _, file = spec.partition("=")
    suite_name, _, part = name.partition("/")
    specs_of_suite = [x for x in suite_specs if x.partition("=")[0] == suite_name]
    suite = load_suite(specs_of_suite[0] if specs_of_suite else suite_name, data_folder)
    parts = dict.fromkeys(prompt.part for prompt in suite.prompts)
    if not file or suite.task_type is not Translation or part not in parts:
        raise UserError(f"--hypotheses {spec}: expected SUITE/PART=FILE, as in "
                        f"flores/eng-kin=file.txt; {suite.name} has {', '.join(parts)}", FLAGS)
    evaluation.metric_names |= set(suite.metrics)
    prompt = Prompt("file", "", "", part=part)
    task = Translation(suite, prompt)
    indices = suite.subset(limit)
    hypotheses = read_hypotheses(Path(file), len(suite.rows), name)
    score_files = score_files or {}
    scores = {name: read_scores(file, name, len(suite.rows)) for name, file in score_files.items()}
    records = [task.file_record(suite.rows[i], hypotheses[i], {k: x[i] for k, x in scores.items()})
               for i in indices]
    results, _ = evaluation.add(Measurement(
        suite.name, task, records, {"suite": f"{suite.name}.{suite.version}"},
        len(records) < len(suite.rows),
        _provenance(start, [*suite.files, Path(file), *score_files.values()]), prompt,
        suite.groups))
    return results


def check_hypotheses(specs: Sequence[str]) -> None:
    """Raise UserError if --hypotheses names a suite's part twice."""
    names = [spec.partition("=")[0] for spec in specs]
    for spec, name in zip(specs, names, strict=True):
        if names.count(name) > 1:
            raise UserError(f"--hypotheses {spec}: {name} is given twice; evaluate one system at a "
                            "time, each with its own --out", FLAGS)


def find_contamination(training: TrainingText, missing: Sequence[str], texts: Sequence[EvalText],
                       suites: Sequence[Suite], limit: int) -> dict[str, Any]:
    """Return the items of texts and suites that stand in the training text, as results.json keeps
    it. `missing`: training data that is known of but no longer there."""
    tests = {text.suite: [[document] for document in text.documents] for text in texts}
    for suite in suites:
        tests[suite.name] = [[cell for cell in row.values() if isinstance(cell, str)]
                             for row in (suite.rows[i] for i in suite.subset(limit))]
    counts = count_contaminated(tests, training) if training.specs else {}
    unread = [*missing, *training.unread]
    if unread:
        info(f"contamination: could not be read: {', '.join(unread)}")
    elif not training.specs:
        info("contamination: what the model was trained on is not known; name it with --trained-on")
    return {"read": training.read, "gone": unread, "tests": counts if training.read else {}}


def _provenance(start: float, files: Sequence[Path]) -> dict[str, Any]:
    """Return seconds since `start`, and the files with their hashes."""
    infos: list[FileInfo] = [{"path": str(file), "sha256": sha256(file)} for file in files]
    return {"seconds": round(time.perf_counter() - start, 2), "files": infos}
