"""Measure a model: bits per byte of any text, and the suites of public tests in suites/.

    python eval.py --model out/kin/model --text kin=kin_val.jsonl eng=eng_val.txt --out out/eval
    python eval.py --model out/kin/model --suites sib200 flores --suite-data DIR --baseline out/base

Prints a table and writes OUT/results.json, what was answered to each item (OUT/items), translations
as plain files, and OUT/report.html. A figure is worth what it says of how it was made, so each has
a signature that names every choice: the suite and its prompt, how long a context is, which dtype.
Figures of one signature compare; with --baseline they are compared, item by item.
"""

from __future__ import annotations

if __name__ == "__main__":  # before any import that needs this Python
    from runtime.python_version import require_python

    require_python()

import dataclasses
import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from runtime import console as log
from runtime import flags as config
from runtime.console import FLAGS, STORAGE, UserError


@dataclass
class Settings:
    """Measure a model on suites and texts, with intervals: a table, results.json, report.html."""

    model: str = ""
    """A run's folder, a Hugging Face folder, a PEFT adapter, or a hub id (org/name@revision)."""
    suites: list[str] = field(default_factory=list)
    """Names of suites (the files of suites/), or NAME=FILE where the data are elsewhere (a path,
    or hf:org/name/file), or a .toml of your own."""
    suite_data: str = ""
    """The folder that holds the suites' data."""
    prompts: list[str] = field(default_factory=list)
    """Only these prompts of each suite, such as 1 3; without any, all."""
    shots: int = 0
    """Examples before each item."""
    chat_template: bool = False
    """Ask the suites in conversation, as the model's chat template writes it (lm-eval's
    --apply_chat_template): for models taught to converse."""
    beams: int = 1
    """Beams of answers and translations; 1: greedy, as published figures are."""
    max_new_tokens: int = 0
    """Tokens of an answer at most; 0: as the suite says."""
    text: list[str] = field(default_factory=list)
    """Texts to measure, each NAME=FILE: .txt, .jsonl, .tsv, .parquet, also .gz."""
    documents: Literal["auto", "file", "line", "block"] = "auto"
    """What a document of a .txt is; auto looks at the file. Figures of other documents differ."""
    text_key: str = "text"
    """Where a .jsonl, .tsv or .parquet keeps its text."""
    hypotheses: list[str] = field(default_factory=list)
    """Another system's translations, each NAME=FILE, such as flores/eng-kin=nllb.txt: a line a
    sentence. They are judged as a model's are; no --model is needed."""
    baseline: str = ""
    """An earlier evaluation's --out, to compare with by a paired test."""
    trained_on: list[str] = field(default_factory=list)
    """Bins or files (text, conversations, pairs) the model was trained on, looked through for the
    tests' sentences; without any, those that the run's own settings name."""
    overlap: bool = True
    """Look for the tests' sentences in the training text."""
    limit: int = 0
    """Only so many items of each suite and text: a quick look, marked PARTIAL. 0: all."""
    max_length: int = 0
    """Tokens of context at most; 0: the model's own."""
    out: str = "out/eval"
    """Folder for results.json, report.html and what was answered."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "fp32"
    """Of products; bf16 is faster and moves figures by some thousandths: publish fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    quant: Literal["none", "int8", "nf4"] = "none"
    """int8: the layers' matrices and the head in eight bits, as sample.py keeps them; nf4: the
    layers' in four, as QLoRA does."""
    lm_eval_compat: bool = False
    """Count as lm-evaluation-harness 0.4.13 does if told nothing: a text's BOS is scored behind
    another, and log p is rounded to the dtype of products."""


if __name__ == "__main__":  # before torch is loaded, so that --help and a wrong flag answer at once
    SETTINGS, _ = log.run(lambda: config.read(Settings, sys.argv[1:], "eval.py"))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from checkpoints.huggingface import load_model  # noqa: E402
from checkpoints.model_folder import base_model_dir, resolve_model_dir, stop_ids  # noqa: E402
from data import sha256  # noqa: E402
from evaluation import metrics, suites, tasks  # noqa: E402
from evaluation import results as judge  # noqa: E402
from evaluation.results import Record, Result  # noqa: E402
from evaluation.suites import Prompt, Suite  # noqa: E402
from inference.cpu_linear import optimize_for_inference  # noqa: E402
from inference.prompt_format import PromptFormat  # noqa: E402
from model import Llama  # noqa: E402
from preparation import readers  # noqa: E402
from preparation.contamination import (  # noqa: E402
    TrainingText,
    bins_of_run,
    count_contaminated,
    require_text,
)
from preparation.readers import detect_document_unit, file_format, list_files  # noqa: E402
from reports import evaluation_report as sheet  # noqa: E402
from runtime.distributed import Ranks  # noqa: E402
from runtime.dtypes import FLAG_NAMES  # noqa: E402
from tokenization.chat_template import Template  # noqa: E402
from tokenization.tokenizer import Tokenizer  # noqa: E402


@dataclass
class Text:
    """A text to measure: its documents as they stand in the files, cut off at --limit."""

    name: str
    unit: str  # what a document is
    files: list[Path]
    documents: list[str]
    partial: bool


@dataclass
class Reader:
    """The model that is measured, and how it is used."""

    model: Llama
    tokenizer: Tokenizer
    length: int
    quant: str = "none"
    compat: bool = False
    template: Template | None = None
    ends: frozenset[int] = frozenset()  # of an answer

    @property
    def kept(self) -> torch.dtype:
        """What log p is rounded to and added up in."""
        return self.model.compute_dtype if self.compat else torch.float64

    @property
    def choices(self) -> dict[str, Any]:
        """Its part of a signature."""
        found = {"start": "eos" if self.tokenizer.bos is None else "bos", "window": self.length,
                 "dtype": name_of(self.model),
                 "sum": name_of(self.model) if self.compat else "fp64"}
        found |= {"quant": self.quant} if self.quant != "none" else {}
        return found | ({"compat": "lm-eval,0.4.13"} if self.compat else {})


class Evaluation:
    """What was found so far, and the folder it goes to."""

    def __init__(self, s: Settings):
        self.s, self.out = s, Path(s.out)
        self.results: list[Result] = []
        self.wanted: set[str] = set()  # figures of any suite
        self.baseline = judge.Baseline(Path(s.baseline)) if s.baseline else None

    def add(self, name: str, kind: str, records: list[Record], choices: dict[str, Any],
            suite: Suite | None = None, prompt: Prompt | None = None, **more: Any,
            ) -> list[metrics.Measure]:
        """Judge the records of one suite's part with one prompt (or of a text), compare them with
        the baseline's, and keep all of it."""
        partial = more["partial"]
        choices = choices | ({"limit": len(records)} if partial else {})
        unit = "documents" if kind == "text" else "items"
        choices |= {"ci": f"{unit},{metrics.RESAMPLES},{metrics.SEED}", "version": judge.VERSION}
        signature = "|".join(f"{k}:{v}" for k, v in choices.items())
        wanted = suite.metrics if suite else ()
        self.wanted |= {*wanted}
        answers, part = (suite.answers if suite else ()), (prompt.part if prompt else "")
        said = {"prompt": prompt.name, "part": part} if prompt else {}
        said |= {"aside": prompt.aside} if prompt and prompt.aside else {}
        items = judge.stem(name, prompt)
        measures = judge.measures(kind, records, wanted, answers, part)
        found = [judge.result(name, m, signature, **said, **more, items=items) for m in measures]
        if self.baseline:
            self.baseline.compare(items, found, measures, kind, records, wanted, answers, part)
        self.results += found
        if suite and suite.groups:
            self.results += judge.groups(name, measures[0], records, suite.groups, signature,
                                         **said, partial=partial)
        stem = self.out / "items" / (items + ".PARTIAL" * partial)
        judge.write_records(stem.with_name(f"{items}.jsonl"), records)
        if kind == "translate":
            judge.write_sides(stem, records)
        return measures


def read_texts(s: Settings) -> list[Text]:
    """The texts of --text, read and checked before any weight is."""
    texts: list[Text] = []
    for item in s.text:
        name, _, spec = item.partition("=")
        if not name or "/" in name or not spec:
            raise UserError(f"--text {item}: expected NAME=FILE, as in kin=kin_val.jsonl, the name "
                            "without a /", FLAGS)
        if name in (t.name for t in texts):
            raise UserError(f"--text {item}: the name {name} is taken; give each its own", FLAGS)
        files = list_files([spec])
        documents = readers.read_texts(spec, s.documents, s.text_key)
        partial = 0 < s.limit < len(documents)
        texts.append(Text(name, unit(files, s), files, documents[: s.limit or None], partial))
        log.say(f"{name}: {len(documents)} documents (a document is a {texts[-1].unit})")
    return texts


def unit(files: list[Path], s: Settings) -> str:
    """What a document of these files is, in a word or two."""
    units = set()
    for file in files:
        if file_format(file) != ".txt":
            units.add(f"record.{s.text_key}")
        elif s.documents == "auto":
            units.add(detect_document_unit(file))
        else:
            units.add(s.documents)
    return "+".join(sorted(units))


def read_suites(s: Settings) -> list[Suite]:
    """The suites of --suites, with their rows, and only the prompts asked for."""
    found = []
    for spec in s.suites:
        suite = suites.load(spec, s.suite_data)
        if s.prompts:
            kept = [p for p in suite.prompts if p.name in s.prompts]
            if not kept:
                names = ", ".join(dict.fromkeys(p.name for p in suite.prompts))
                raise UserError(f"--prompts {' '.join(s.prompts)}: suite {suite.name} has {names}",
                                FLAGS)
            suite.prompts = kept
        if suite.name in (x.name for x in found):
            raise UserError(f"--suites {spec}: {suite.name} is named twice", FLAGS)
        for prompt in suite.prompts:
            suite.items(prompt, s.shots, s.limit)  # what is wrong with it shows now
        found.append(suite)
        log.say(f"{suite.name}: {len(suite.rows)} items, {len(suite.prompts)} prompts "
                f"({suite.about})")
    if none := [x for x in s.prompts if x not in (p.name for y in found for p in y.prompts)]:
        raise UserError(f"--prompts {' '.join(none)}: no suite has such a prompt", FLAGS)
    return found


def choices(s: Settings, suite: Suite, prompt: Prompt, r: Reader) -> dict[str, Any]:
    """What figures of a suite's prompt depend on: the most of their signature."""
    found = dict(x.split(":", 1) for x in suite.signature(prompt).split("|"))
    found |= {"shots": s.shots, **r.choices}
    if r.template is not None:
        found |= {"chat": hashlib.sha256(r.template.source.encode()).hexdigest()[:8]}
    if suite.kind != "choose":
        found |= {"new": s.max_new_tokens or suite.new_tokens, "beams": s.beams}
    return found


def check_baseline(e: Evaluation, texts: list[Text], asked: list[Suite], r: Reader) -> None:
    """UserError where the baseline measured otherwise, now and not after hours."""
    for text in texts if e.baseline else ():
        e.baseline.find(judge.stem(f"text:{text.name}"), {"unit": text.unit, **r.choices},
                        [{"bytes": len(x.encode())} for x in text.documents])
    for suite in asked if e.baseline else ():
        for prompt in suite.prompts:
            e.baseline.find(judge.stem(suite.name, prompt), choices(e.s, suite, prompt, r),
                            [tasks.known(suite, prompt, x)
                             for x in suite.items(prompt, e.s.shots, e.s.limit)])


def measure_text(e: Evaluation, text: Text, r: Reader) -> None:
    """Bits per byte of one text."""
    began = time.perf_counter()
    ids = r.tokenizer.encode_batch(text.documents)
    n_bytes = [len(document.encode()) for document in text.documents]
    n_tokens, bos = sum(map(len, ids)), r.tokenizer.bos
    if r.compat and bos is not None:
        ids = [[bos, *x] for x in ids]
    with log.progress(text.name, sum(map(len, ids))) as move:
        nats = tasks.document_nats(r.model, ids, tasks.start_token(r.tokenizer), r.length, move,
                                   r.kept)
    _finite(nats, text.name, r)
    records = [{"nats": float(x), "bytes": n} for x, n in zip(nats, n_bytes, strict=True)]
    e.add(f"text:{text.name}", "text", records, {"unit": text.unit, **r.choices},
          partial=text.partial, bytes=sum(n_bytes), tokens=n_tokens, **_made(began, text.files))


def measure_suite(e: Evaluation, suite: Suite, r: Reader) -> None:
    """All prompts of one suite, and their mean."""
    s, means = e.s, {}
    for prompt in suite.prompts:
        began = time.perf_counter()
        items = suite.items(prompt, s.shots, s.limit)
        name = " ".join(filter(None, (suite.name, prompt.part, prompt.name)))
        new = s.max_new_tokens or suite.new_tokens
        n = sum(len(x.choices) for x in items) if suite.kind == "choose" else len(items)
        with log.progress(name, n) as move:
            records = tasks.records(r.model, r.tokenizer, suite, prompt, items, r.length, new,
                                    s.beams, move, r.kept, r.template, r.ends)
        if suite.kind == "choose":
            _finite(np.concatenate([x["logp"] for x in records]), name, r)
        measures = e.add(suite.name, suite.kind, records, choices(s, suite, prompt, r), suite,
                         prompt, partial=len(items) < len(suite.rows),
                         **_made(began, suite.files))
        if not prompt.aside:
            for m in measures:
                means.setdefault((prompt.part, m.name), []).append(m)
    for (part, _), alike in means.items():
        if len(alike) > 1:
            e.results.append(judge.mean_result(
                suite.name, alike, f"suite:{suite.name}.{suite.version}|prompts:{len(alike)}",
                part=part, prompt="mean", partial=0 < s.limit < len(suite.rows)))


def measure_hypotheses(e: Evaluation, spec: str) -> None:
    """Another system's translations of a suite's part."""
    name, _, file = spec.partition("=")
    began, (suite_name, _, part) = time.perf_counter(), name.partition("/")
    given = next((x for x in e.s.suites if x.partition("=")[0] == suite_name), suite_name)
    suite = suites.load(given, e.s.suite_data)
    parts = list(dict.fromkeys(p.part for p in suite.prompts))
    if not file or suite.kind != "translate" or part not in parts:
        raise UserError(f"--hypotheses {spec}: expected SUITE/PART=FILE, as in "
                        f"flores/eng-kin=file.txt; {suite.name} has {', '.join(parts)}", FLAGS)
    if [x.partition("=")[0] for x in e.s.hypotheses].count(name) > 1:
        raise UserError(f"--hypotheses {spec}: {name} is given twice; judge one system at a time, "
                        "each with its own --out", FLAGS)
    source, target = part.split("-")
    prompt = Prompt("file", "", "", part=part)
    rows = suite.rows[: e.s.limit or None]
    said = judge.read_hypotheses(Path(file), len(suite.rows), name)
    records = [{"source": str(row[source]), "reference": str(row[target]), "hypothesis": text,
                "end": ""} for row, text in zip(rows, said, strict=False)]
    e.add(suite.name, "translate", records, {"suite": f"{suite.name}.{suite.version}"}, suite,
          prompt, partial=len(rows) < len(suite.rows), **_made(began, [*suite.files, Path(file)]))


def _made(began: float, files: Sequence[Path]) -> dict[str, Any]:
    return {"seconds": round(time.perf_counter() - began, 2),
            "files": [{"path": str(file), "sha256": sha256(file)} for file in files]}


def _finite(values: np.ndarray, name: str, r: Reader) -> None:
    if not np.isfinite(values).all():
        raise UserError(f"{name}: the model's numbers overflow in {name_of(r.model)}; "
                        "take --dtype fp32")


def name_of(model: Llama) -> str:
    """The model's compute dtype as --dtype calls it."""
    return FLAG_NAMES[model.compute_dtype]


def main(s: Settings) -> None:
    """Read what is asked, load the model, measure, print, write."""
    if not (s.text or s.suites or s.hypotheses):
        raise UserError("nothing to measure: --suites NAME ..., or --text NAME=FILE ...", FLAGS)
    for name, least in (("limit", 0), ("shots", 0), ("beams", 1), ("max_new_tokens", 0)):
        if getattr(s, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(s, name)}: expected {least} or "
                            "more", FLAGS)
    if not s.model and (s.text or {x.partition("=")[0] for x in s.suites}
                        - {x.partition("/")[0] for x in s.hypotheses}):
        raise UserError("name a model: --model FOLDER or a hub id; without one only what "
                        "--hypotheses names is measured", FLAGS)
    if s.chat_template and not (s.model and s.suites):
        raise UserError("--chat-template: goes with --model and --suites; a text is measured as it "
                        "is", FLAGS)
    e = Evaluation(s)
    texts, asked = read_texts(s), read_suites(s) if s.model else []
    file = e.out / "results.json"
    aside = file.with_suffix(f".tmp{os.getpid()}")
    try:
        e.out.mkdir(parents=True, exist_ok=True)
        aside.touch()  # now, not after an hour of measuring
    except OSError as error:
        raise UserError(f"--out {s.out}: cannot be written ({error.strerror})", STORAGE) from None
    try:
        settings, contamination = dataclasses.asdict(s), None
        for spec in s.hypotheses:  # whatever can fail at once comes before what takes hours
            measure_hypotheses(e, spec)
        others, e.results = e.results, []
        if s.model:
            if s.overlap:
                require_text(s.trained_on, s.documents, s.text_key)
            reader = open_model(s)
            settings |= {"dtype": name_of(reader.model), "max_length": reader.length,
                         "device": str(reader.model.device), "torch": torch.__version__,
                         "tokenizer": reader.tokenizer.fingerprint}
            check_baseline(e, texts, asked, reader)
            if s.overlap:
                contamination = look_for_overlap(s, texts, asked, reader.tokenizer)
            for text in texts:
                measure_text(e, text, reader)
            for suite in asked:
                measure_suite(e, suite, reader)
        e.results += others
        found = {"model": s.model or "hypotheses", "command": shlex.join(["python", *sys.argv]),
                 "settings": settings, "results": e.results, "contamination": contamination}
        aside.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)
    print(log.printable(judge.table(e.results)))
    for name, n in (contamination or {}).get("tests", {}).items():
        if n["any"]:
            print(log.printable(
                f"CONTAMINATED: {n['any']:,} of {n['items']:,} items of {name} stand in the "
                f"training text ({n['whole']:,} whole, {n['run']:,} by a run of words)"))
    if any(r["partial"] for r in e.results):
        print(f"PARTIAL: the first {s.limit} items only; these figures are not for publishing")
    if "spBLEU" in e.wanted and not metrics.has_spbleu():
        log.say("spBLEU is left out: its tokenizer is not on this machine (docs/formats.md)")
    log.say(f"wrote {file} and {sheet.write(e.out)}")


def look_for_overlap(s: Settings, texts: list[Text], asked: list[Suite],
                     tokenizer: Tokenizer) -> dict[str, Any]:
    """Items of the tests that stand in the training text, as results.json keeps it."""
    specs, missing = s.trained_on, []
    if not specs:
        specs, missing = bins_of_run(s.model)
    tests = {f"text:{t.name}": [[x] for x in t.documents] for t in texts}
    tests |= {x.name: [[v for v in row.values() if isinstance(v, str)]
                       for row in x.rows[: s.limit or None]] for x in asked}
    training = TrainingText(specs, tokenizer, s.documents, s.text_key)
    counts = count_contaminated(tests, training) if specs else {}
    missing += training.unread
    if missing:
        log.say(f"contamination: could not be read: {', '.join(missing)}")
    elif not specs:
        log.say("contamination: what the model was trained on is not known; name it with "
                "--trained-on")
    return {"read": training.read, "gone": missing, "tests": counts if training.read else {}}


def open_model(s: Settings) -> Reader:
    """The model, its tokenizer, and how much it reads at once."""
    ranks = Ranks.start(s.device)
    dtype = ranks.compute_dtype(s.dtype)
    model, tokenizer = load_model(s.model, ranks.device, dtype, quant=s.quant)
    model.eval().model.compute_dtype = dtype
    optimize_for_inference(model, keep_head_weight=True)
    context = model.config.max_position_embeddings
    if not 0 <= s.max_length <= context:
        raise UserError(f"--max-length {s.max_length}: expected 1 to {context}, the model's "
                        "context, or 0 for all of it", FLAGS)
    folder = resolve_model_dir(s.model)
    folders = (folder, base_model_dir(folder))
    template = PromptFormat(folders, tokenizer).own_template if s.chat_template else None
    if s.chat_template and template is None:
        raise UserError(f"--chat-template: {s.model} has no chat template; leave it out, or take "
                        "a model that was taught to converse", FLAGS)
    return Reader(model, tokenizer, s.max_length or context, s.quant, s.lm_eval_compat, template,
                  frozenset(stop_ids(folder, tokenizer)))


if __name__ == "__main__":
    log.run(lambda: main(SETTINGS))
