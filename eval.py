"""Evaluate a model: bits per byte of any text, and suites of public tests.

    python eval.py --model out/kin/model --text kin=kin_val.jsonl eng=eng_val.txt --out out/eval
    python eval.py --model out/kin/model --suites sib200 flores --suite-data DIR --baseline out/base

Prints a table and writes OUT/results.json, the answer to each item (OUT/items), translations as
plain files, and OUT/report.html. Every result has a signature that names the choices it depends on:
the suite and its prompt, the length of the context, the dtype. Only results with equal signatures
are comparable; with --baseline they are compared, item by item.
"""

from __future__ import annotations

if __name__ == "__main__":  # before any import that needs this Python
    import os
    import sys

    if getattr(sys.flags, "safe_path", False):  # python -P does not search this folder
        sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from runtime.python_version import require_python

    require_python()

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from runtime import console, flags
from runtime.console import FLAGS, STORAGE, UserError
from runtime.output_paths import try_output_folder
from runtime.setting_metadata import Group, bounded
from runtime.temporary import Temporary, fsync

if TYPE_CHECKING:
    from evaluation.eval_model import EvalModel
    from evaluation.evaluate import EvalText
    from evaluation.results import MetricResult
    from evaluation.suites import Suite
    from evaluation.taught import Taught

AUTO = ["auto"]  # the default of --normalise


@dataclass
class Settings:
    """Evaluate a model on suites and texts, with intervals: a table, results.json, report.html."""

    model: Annotated[str, Group("Most used")] = ""
    """A run's folder, a Hugging Face folder, a PEFT adapter, or a hub id (org/name@revision)."""
    suites: list[str] = field(default_factory=list)
    """Names of suites (the files of evaluation/suites and of languages), or NAME=FILE with the
    suite's data (a path, or hf:org/name/file), or a .toml of your own."""
    suite_data: str = ""
    """The folder with the data of the suites."""
    text: list[str] = field(default_factory=list)
    """Texts to measure, each NAME=FILE: .txt, .jsonl, .tsv, .parquet, also .gz."""
    baseline: str = ""
    """The --out of an earlier evaluation, to compare with by a paired test."""
    seeds: list[str] = field(default_factory=list)
    """Evaluations of several runs of one setting, the --out of each: prints each figure as one row
    with its mean and spread over the runs, and writes OUT/seeds.json. Nothing is measured."""
    out: str = "out/eval"
    """Folder for results.json, report.html and the answers."""
    limit: int = bounded(0, at_least=0)
    """Only this many items of each suite, of each right choice its share and evenly spaced, and the
    first documents of each text, for a quick check; results are marked PARTIAL. 0: all."""
    prompts: Annotated[list[str], Group("Suites")] = field(default_factory=list)
    """Only these prompts of each suite, such as 1 3 taught. Default: all public prompts, and
    `taught`: as the model was taught to translate or to chat, if its prompt.json says so."""
    shots: int = bounded(0, at_least=0)
    """Number of few-shot examples before each item."""
    chat_template: bool = False
    """Ask the suites as conversations, in the model's chat template (lm-eval's
    --apply_chat_template): for models that were trained on conversations."""
    template_kwargs: list[str] = field(default_factory=list)
    """With --chat-template: variables of the template, KEY=VALUE or a JSON object, as in
    enable_thinking=false. Default: those that the model was trained with."""
    beams: int = bounded(1, at_least=1)
    """Number of beams for answers and translations. 1: greedy, as for published figures."""
    max_new_tokens: int = bounded(0, at_least=0)
    """Maximum number of tokens of an answer. 0: as the suite says."""
    hypotheses: list[str] = field(default_factory=list)
    """Translations of another system, each NAME=FILE, such as flores/eng-kin=nllb.txt, one sentence
    a line. They are scored like a model's; no --model is needed."""
    scores: list[str] = field(default_factory=list)
    """Scores of the --hypotheses by another program, each NAME=FILE, such as COMET=comet.txt: a
    number for each sentence, as comet-score, MetricX and raters write them. With several
    --hypotheses: flores/eng-kin/COMET=comet.txt."""
    documents: Annotated[Literal["auto", "file", "line", "block"], Group("Texts")] = "auto"
    """What a document of a .txt is. auto: decided from the file. Results for different documents
    are not comparable."""
    text_key: str = "text"
    """The column of the text in a .jsonl, .tsv or .parquet."""
    trained_on: Annotated[list[str], Group("Contamination")] = field(default_factory=list)
    """Bins or files (text, conversations, pairs) that the model was trained on, which are searched
    for the tests' sentences. Default: those that the run's own settings name."""
    overlap: bool = True
    """Search the training text for the tests' sentences."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Group("Model")] = "auto"
    """Where the model runs. auto: on a GPU if there is one."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "fp32"
    """Of matrix products. bf16 is faster and changes results by some thousandths; publish fp32."""
    quant: Literal["none", "int8", "nf4"] = "none"
    """int8: the matrices of layers and the output head in 8 bits, as in sample.py; nf4: the
    matrices of layers in 4 bits, as in QLoRA."""
    max_length: int = 0
    """Maximum length of the context in tokens. 0: the model's own."""
    normalise: Annotated[list[str], Group("Model")] = field(default_factory=AUTO.copy)
    """Cleaning steps for questions and texts, as of prepare.py text. auto: those of the model's
    training text, which its prompt.json names; for a text of the --baseline those used there.
    none, all, or steps by name. References are never cleaned."""
    lm_eval_compat: bool = False
    """Count as lm-evaluation-harness 0.4.13 does by default: the BOS of a text is scored after
    another BOS, and log p is rounded to the dtype of matrix products."""

    HINTS: ClassVar[dict[str, str]] = {  # names of lm-evaluation-harness
        "tasks": "--suites", "num_fewshot": "--shots", "output_path": "--out",
        "apply_chat_template": "--chat-template", "max_gen_toks": "--max-new-tokens",
        "num_beams": "--beams", "batch_size": "batches are formed by length; there is no such "
                                              "setting"}


def main(s: Settings) -> None:
    """Read what was asked for, load the model, measure, print, write."""
    from evaluation import evaluate
    from evaluation.baseline import Baseline
    from evaluation.segment_scores import score_files
    from reports.evaluation_report import write_evaluation_report

    if s.seeds:
        compare_seeds(s)
        return
    check_settings(s)
    options = evaluate.Options(s.shots, s.limit, s.max_new_tokens, s.beams)
    baseline = Baseline(Path(s.baseline)) if s.baseline else None
    texts = evaluate.read_texts(s.text, s.documents, s.text_key, s.limit)
    suites = []
    if s.model:
        suites = evaluate.read_suites(s.suites, s.suite_data, s.prompts, options)
    try_outputs(Path(s.out), [text.name for text in texts])
    with results_file(Path(s.out)) as write:  # opened now, not after an hour of measuring
        evaluation = evaluate.Evaluation(Path(s.out), baseline)
        evaluate.check_hypotheses(s.hypotheses)
        files = score_files(s.scores, [spec.partition("=")[0] for spec in s.hypotheses])
        hypotheses = []  # first: whatever can fail at once comes before what takes hours
        for spec in s.hypotheses:
            hypotheses += evaluate.measure_hypotheses(evaluation, spec, s.suites, s.suite_data,
                                                      s.limit, files[spec.partition("=")[0]])
        results, settings, contamination = [], dataclasses.asdict(s), None
        if baseline:
            settings["baseline_model"] = baseline.model
        if s.model:
            if s.overlap:
                check_training_text(s)
            model, taught = open_model(s)
            settings |= model_settings(model)
            cleaned_texts = evaluate.clean_texts(
                texts, taught.normaliser("text"), baseline if s.normalise == AUTO else None)
            suites = evaluate.as_taught(suites, taught, s.prompts, s.chat_template)
            if baseline:
                evaluate.check_baseline(baseline, cleaned_texts, suites, model, options)
            if s.overlap:
                contamination = find_contamination(s, texts, suites, model)
            for text in cleaned_texts:
                results += evaluate.measure_text(evaluation, text, model)
            for suite in suites:
                results += evaluate.measure_suite(evaluation, suite, model, options)
        results += hypotheses
        write({"model": s.model or "hypotheses", "command": shlex.join(["python", *sys.argv]),
               "settings": settings, "results": results, "contamination": contamination})
    print_results(results, contamination, s.limit, settings.get("baseline_model", ""))
    warn_missing_spbleu(evaluation.metric_names)
    console.info(f"wrote {Path(s.out) / 'results.json'} and {write_evaluation_report(Path(s.out))}")


def compare_seeds(s: Settings) -> None:
    """Print and write the spread of the figures over the runs of --seeds."""
    from evaluation.seeds import format_spread, spread_over_runs
    from runtime.temporary import write_text

    if s.model or s.suites or s.text or s.hypotheses:
        raise UserError("--seeds: goes without --model, --suites, --text and --hypotheses, because "
                        "it reads evaluations; remove them", FLAGS)
    rows = spread_over_runs([Path(folder) for folder in s.seeds])
    print(console.printable(format_spread(rows)))
    file = Path(s.out) / "seeds.json"
    text = json.dumps({"runs": s.seeds, "results": rows}, indent=1, ensure_ascii=False)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text + "\n")
    except OSError as e:
        raise UserError(f"--out {s.out}: cannot be written ({e.strerror}); name another folder",
                        STORAGE) from None
    console.info(f"wrote {file}")


def check_settings(s: Settings) -> None:
    """Raise UserError for flags that are out of range or do not go together."""
    if not (s.text or s.suites or s.hypotheses):
        raise UserError("nothing to measure: give --suites NAME ..., or --text NAME=FILE ...",
                        FLAGS)
    flags.check_bounds(s)
    suites = {spec.partition("=")[0] for spec in s.suites}
    suites_of_hypotheses = {spec.partition("/")[0] for spec in s.hypotheses}
    if not s.model and (s.text or suites - suites_of_hypotheses):
        raise UserError("name a model: --model FOLDER or a hub id; without one only what "
                        "--hypotheses names is measured", FLAGS)
    if s.chat_template and not (s.model and s.suites):
        raise UserError("--chat-template: goes with --model and --suites (a text is measured "
                        "without a template); remove it", FLAGS)
    if s.template_kwargs and not s.chat_template:
        raise UserError("--template-kwargs: has no effect without --chat-template; give that too",
                        FLAGS)
    if s.template_kwargs:
        from tokenization.chat_template import read_template_kwargs

        read_template_kwargs(s.template_kwargs)


def try_outputs(out: Path, texts: Sequence[str]) -> None:
    """Raise UserError unless results, report, and the records of these texts can be written."""
    from evaluation.results import TEXT_PREFIX, record_name

    records = [f"{record_name(TEXT_PREFIX + name)}.jsonl" for name in texts]
    try_output_folder(out, ("results.json", "report.html"))
    try_output_folder(out / "items", records)


@contextmanager
def results_file(out: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Create OUT; yields a function that writes OUT/results.json, whole or not at all."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        temporary = Temporary(out / "results.json")
    except OSError as e:
        raise UserError(f"--out {out}: cannot be written ({e.strerror}); name another folder",
                        STORAGE) from None

    def write(evaluation: Mapping[str, Any]) -> None:
        text = json.dumps(evaluation, indent=1, ensure_ascii=False) + "\n"
        temporary.path.write_text(text, encoding="utf-8")
        fsync(temporary.path)
        temporary.replace()

    with temporary:
        yield write


def open_model(s: Settings) -> tuple[EvalModel, Taught]:
    """Load the model and its tokenizer, and read what it was taught; check the flags that depend on
    them."""
    from checkpoints.huggingface import load_model
    from checkpoints.model_folder import base_model_dir, resolve_model_dir, stop_ids
    from evaluation.eval_model import EvalModel
    from evaluation.taught import Taught
    from inference.cpu_linear import optimize_for_inference
    from inference.prompt_format import USES, PromptFormat
    from languages.language import DEFAULT_LANGUAGE, language_of
    from preparation.text import build_normaliser
    from runtime.device import compute_dtype
    from runtime.distributed import Distributed
    from tokenization.chat_template import read_template_kwargs

    ranks = Distributed.start(s.device)
    dtype = compute_dtype(ranks.device, s.dtype)
    model, tokenizer = load_model(s.model, ranks.device, dtype, quant=s.quant)
    model.eval()
    optimize_for_inference(model, keep_head_weight=True)
    context = model.config.max_position_embeddings
    if not 0 <= s.max_length <= context:
        raise UserError(f"--max-length {s.max_length}: expected 1 to {context}, the model's "
                        "context, or 0 for all of it", FLAGS)
    folder = resolve_model_dir(s.model)
    folders = (folder, base_model_dir(folder))
    prompt_format = PromptFormat(folders, tokenizer,
                                 template_kwargs=read_template_kwargs(s.template_kwargs))
    if s.chat_template and prompt_format.own_template is None:
        raise UserError(f"--chat-template: {s.model} has no chat template; remove the flag, or "
                        "use a model that was trained on conversations", FLAGS)
    taught = Taught.read(folders)
    if s.normalise != AUTO:
        normaliser = build_normaliser(s.normalise, [language_of(DEFAULT_LANGUAGE)])
        taught = dataclasses.replace(
            taught, normalisers=dict.fromkeys(USES, normaliser) if normaliser else {})
    is_asked_in_chat = taught.is_chat or (taught.translation and taught.translation.as_chat)
    model = EvalModel(
        model, tokenizer, s.max_length, s.quant, s.lm_eval_compat,
        chat_template=prompt_format.own_template if s.chat_template else None,
        taught_template=prompt_format.template if is_asked_in_chat else None,
        stop_ids=frozenset(stop_ids(folder, tokenizer)))
    return model, taught


def model_settings(model: EvalModel) -> dict[str, Any]:
    """Return what the settings in results.json say about the model as it was opened."""
    import torch

    return {"dtype": model.dtype_name, "max_length": model.max_length,
            "device": str(model.model.device), "torch": torch.__version__,
            "tokenizer": model.tokenizer.fingerprint}


def check_training_text(s: Settings) -> None:
    """Raise UserError for a --trained-on that cannot be read."""
    from preparation.contamination import require_text

    require_text(s.trained_on, s.documents, s.text_key)


def find_contamination(s: Settings, texts: Sequence[EvalText], suites: Sequence[Suite],
                       model: EvalModel) -> dict[str, Any]:
    """Search the text that the model was trained on for the tests' sentences."""
    from evaluation import evaluate
    from preparation.contamination import TrainingText, bins_of_run

    specs, missing = s.trained_on, []
    if not specs:
        specs, missing = bins_of_run(s.model)
    training = TrainingText(specs, model.tokenizer, s.documents, s.text_key)
    return evaluate.find_contamination(training, missing, texts, suites, s.limit)


def print_results(results: Sequence[MetricResult], contamination: Mapping[str, Any] | None,
                  limit: int, baseline: str) -> None:
    """Print the table, contaminated items, and whether the results are partial. `baseline`: the
    model that the baseline measured."""
    from evaluation.results import format_table

    print(console.printable(format_table(results, baseline)))
    for name, n in (contamination or {}).get("tests", {}).items():
        if n["any"]:
            print(console.printable(
                f"CONTAMINATED: {n['any']:,} of {n['items']:,} items of {name} stand in the "
                f"training text ({n['whole']:,} whole, {n['run']:,} by a run of words)"))
    if any(r["partial"] for r in results):
        print(f"PARTIAL: {limit} items only; do not publish these results")


def warn_missing_spbleu(metric_names: set[str]) -> None:
    """Print that spBLEU was asked for and left out, if its tokenizer is not on this machine."""
    from evaluation.metrics import has_spbleu

    if "spBLEU" in metric_names and not has_spbleu():
        console.info("spBLEU is left out: its tokenizer is not on this machine (docs/formats.md)")


if __name__ == "__main__":
    SETTINGS, _ = console.run(lambda: flags.read(Settings, sys.argv[1:], "eval.py"))
    console.run(lambda: main(SETTINGS))
