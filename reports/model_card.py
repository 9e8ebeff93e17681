"""The model card: README.md of a model's folder, from what the model's and the run's files say.

Every sentence and number comes from a file. What no file says is left out or called unknown, and
paths of the machine that trained the model are not written.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from checkpoints.model_folder import ADAPTER_CONFIG, CONFIG_FILE, MERGE_RECORD, tensor_infos
from evaluation.results import describe_comparisons
from reports.page import render
from reports.training_curves import read_metrics
from runtime.console import UserError, printable
from runtime.model_files import has_model_file, read_model_file, read_model_json
from runtime.strict_json import read_json, strict_json
from tokenization.tokenizer import FILES

WRITTEN_BY_US = "# written by export.py card"  # in the front matter: this README.md may be replaced
LICENCES = {  # a pattern in a LICENSE file -> the licence's name on the hub
    r"LLAMA 3\.3 COMMUNITY": "llama3.3", r"LLAMA 3\.2 COMMUNITY": "llama3.2",
    r"LLAMA 3\.1 COMMUNITY": "llama3.1", r"LLAMA 3 COMMUNITY": "llama3",
    r"LLAMA 2 COMMUNITY": "llama2", r"Gemma Terms of Use": "gemma",
    r"Apache License\s+Version 2\.0": "apache-2.0", r"\A\s*(The )?MIT License": "mit"}
PRIVATE_SETTINGS = (  # mostly paths
    "model", "data", "val", "suite_data", "out", "resume", "plan", "track")


def model_card(folder: Path, run_dir: str, results: Sequence[str], languages: Sequence[str],
               licence: str) -> str:
    """The text of a card. `run_dir` and `licence` may be empty: they are then unknown, and the
    base's."""
    run = read_json(run_file(run_dir, "run.json")) if run_dir else {}
    adapter = {}
    if has_model_file(folder, ADAPTER_CONFIG):
        adapter = read_model_json(folder, ADAPTER_CONFIG)
    merged = read_merge_record(folder)
    base = _base_facts(folder, run, adapter, merged)
    licence_note = ""
    if not licence:
        licence, licence_note = licence_of(base["licence_dir"], folder)
    tags = ["lora", "peft", "kinyarwanda_ft_llm"] if adapter else ["kinyarwanda_ft_llm"]
    front_matter = {
        "language": list(languages), "license": licence,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation", "tags": tags}
    if base["hub_id"]:
        front_matter = {"base_model": base["hub_id"], **front_matter}
    parameters, architecture = 0, ""
    if not adapter:
        parameters = sum(torch.Size(x.shape).numel() for x in tensor_infos(folder).values())
        names = read_model_json(folder, CONFIG_FILE).get("architectures")
        architecture = (names or ["unknown"])[0]
    return render(
        "model_card.md", {"cell": cell}, written_by_us=WRITTEN_BY_US,
        front_matter={k: json.dumps(v, ensure_ascii=False) for k, v in front_matter.items()},
        title=(Path(run_dir) if run_dir else folder).resolve().name, adapter=adapter,
        parameters=parameters, architecture=architecture, n_merged=len(merged),
        base_name=base["name"] or "unknown",
        base_is_local=bool(base["name"] and not base["hub_id"]),
        base_commit=base["commit"] or "unknown", licence_note=licence_note,
        results=[results_section(Path(x)) for x in results],
        has_tokenizer=any(has_model_file(folder, x) for x in FILES[:2]),
        **(_run_facts(Path(run_dir), run) if run else {"run": None}))


def run_file(run_dir: str, name: str) -> Path:
    """A file of a run's folder. UserError if it is not there."""
    file = Path(run_dir) / name
    if not file.is_file():
        raise UserError(f"--run {run_dir}: no {name} here, so this is not the folder of a run; "
                        "check --run")
    return file


def _base_facts(folder: Path, run: dict[str, Any], adapter: dict[str, Any],
                merged: list[dict[str, Any]]) -> dict[str, Any]:
    """The base of a model: its public name, hub id and commit, and the folder of its licence."""
    last_merge = merged[-1] if merged else {}
    trained_from = str(Path(run["model"]).absolute()) if run.get("model") else ""  # always a folder
    path = str(adapter.get("base_model_name_or_path") or last_merge.get("base") or trained_from)
    if adapter and not Path(path).is_dir() and (folder / path).is_dir():
        path = str(folder / path)
    name, commit = public_name(path)
    is_hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)
    return {"name": name, "hub_id": name if is_hub_id else None,
            "commit": commit or adapter.get("revision") or last_merge.get("revision"),
            "licence_dir": Path(path if adapter else trained_from or path)}


def public_name(path: str) -> tuple[str, str | None]:
    """What a base is called in public: hub id and commit, or only the name of a local folder."""
    folder = Path(path).expanduser()
    if not folder.is_dir() and not folder.is_absolute():
        return path, None  # a hub id, or nothing
    folder = folder.resolve()
    repo = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repo.startswith("models--"):
        return repo.removeprefix("models--").replace("--", "/"), folder.name
    if folder.name == "model":
        return folder.parent.name, None
    return folder.name, None


def licence_of(base: Path, folder: Path) -> tuple[str, str]:
    """The base's licence by its card or its LICENSE file, and a sentence that says so; `other` if
    it is not known."""
    folders = [folder]
    if base.is_dir() and str(base) != ".":
        folders = [base, folder]
    for candidate in folders:
        licence = _licence_in_card(candidate)
        if licence and candidate == base:
            return licence, f"The base's card says its licence is {licence}."
        for file in sorted(candidate.glob("LICENSE*")):
            start = read_model_file(candidate, file.name).decode("utf-8", "replace")[:3000]
            for pattern, name in LICENCES.items():
                if re.search(pattern, start):
                    return name, f"Its licence is the base's, by {file.name}: {name}."
    return "other", "The base's licence is not known here; find it before using or sharing this."


def read_card(folder: Path) -> str:
    """The text of README.md in a folder; "" if there is none."""
    if not has_model_file(folder, "README.md"):
        return ""
    return read_model_file(folder, "README.md").decode("utf-8", "replace")


def _licence_in_card(folder: Path) -> str | None:
    """The licence in the front matter of a card that we did not write."""
    text = read_card(folder)
    front_matter = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    if not front_matter or WRITTEN_BY_US in text:
        return None
    licence = re.search(r"^license:\s*[\"']?([\w.-]+)", front_matter[1], re.MULTILINE)
    return licence[1] if licence else None


def cell(x: Any) -> str:
    """A value in a table or a line of markdown, with markdown's own characters escaped."""
    if type(x) is int:
        return f"{x:,}"
    if type(x) is float:
        return f"{x:.4f}"
    text = ", ".join(map(str, x)) if isinstance(x, list) else str(x)
    return re.sub(r"([|<>*`\[\]\\])", r"\\\1", printable(" ".join(text.split())))


def _run_facts(out: Path, run: dict[str, Any]) -> dict[str, Any]:
    """What a run's folder says: data, settings, bits per byte before and after."""
    lines = read_metrics(out / "metrics.jsonl", [])
    trained = next((x for x in reversed(lines) if "tokens" in x), {})
    changed = run.get("changed_settings") or {}
    settings = [(k, v) for k, v in changed.items() if k not in PRIVATE_SETTINGS]
    bits_per_byte, best_step = _bits_per_byte(lines, run, changed)
    facts = {
        "step": trained.get("step", "an unknown number"), "steps": run.get("steps", "unknown"),
        "tokens": f"{trained['tokens']:,}" if "tokens" in trained else "an unknown number of",
        "dtype": run.get("dtype", "unknown"), "device": run.get("device", "unknown"),
        "commit": run.get("commit") or "unknown", "settings": settings,
        "mode": changed.get("mode", "cpt"), "bits_per_byte": bits_per_byte, "best_step": best_step}
    return {"run": facts, **_data_facts(out, run, trained.get("share") or {})}


def _data_facts(out: Path, run: dict[str, Any], shares: dict[str, float]) -> dict[str, Any]:
    """What is known about each source: a row of the table, notes, or that its ledger is gone."""
    rows, notes, unknown = [], [], []
    for name, sha in (run.get("data") or {}).items():
        meta = next((m for m in _bins(out) if m["sha256"].get("tokens.bin") == sha), None)
        if meta is None:
            unknown.append(name)
            continue
        documents, n_bytes = meta["ledger"]["documents"], meta["ledger"]["bytes"]
        rows.append([name, *_counts(documents), *_counts(n_bytes), meta["tokens"],
                     shares.get(name, "unknown")])
        outcomes = {k: n for k, n in documents.items() if n}
        if outcomes.get("cut"):
            notes.append(f"{outcomes['cut']:,} that were kept of {cell(name)} are cut to fit a "
                         "row.")
        dropped = [f"{n:,} {cell(k)}" for k, n in outcomes.items()
                   if k not in ("read", "kept", "cut", "duplicate")]
        if dropped:
            notes.append(f"Also left out of {cell(name)}: {', '.join(dropped)}.")
    return {"sources": rows, "source_notes": notes, "unknown_sources": unknown}


def _counts(ledger: dict[str, int]) -> tuple[int, int, int]:
    """Read, kept, duplicates."""
    return (ledger.get("read", 0), ledger.get("kept", 0) + ledger.get("cut", 0),
            ledger.get("duplicate", 0))


def _bits_per_byte(lines: list[dict[str, Any]], run: dict[str, Any],
                   changed: dict[str, Any]) -> tuple[list[list[Any]], int | None]:
    """Rows [text, before, after], and the step of --best's model if it is not the last evaluated
    one. No rows unless there were two evaluations."""
    evaluations = {x["step"]: x["bits_per_byte"] for x in lines if "bits_per_byte" in x}
    if len(evaluations) < 2:
        return [], None
    last = max(evaluations)
    step = run.get("model_step", last) if changed.get("best") else last
    before, after = evaluations[min(evaluations)], evaluations.get(step, {})
    rows = [[name, value, after.get(name) or "unknown"]
            for name, value in before.items() if value is not None]
    return rows, step if step != last else None


def _bins(out: Path) -> Iterator[dict[str, Any]]:
    """meta.json of every bin that a run prepared, or that its settings name."""
    settings = out / "settings.toml"
    specs = []
    if settings.exists():
        specs = tomllib.loads(settings.read_text("utf-8")).get("data", [])
    folders = sorted((out / "bins").glob("*"))
    folders += [Path(x) for spec in specs for x in (spec, spec.rpartition(":")[0]) if x]
    for folder in folders:
        if (folder / "meta.json").is_file():
            meta = read_json(folder / "meta.json")
            if "ledger" in meta and "sha256" in meta:
                yield meta


def results_section(file: Path) -> str:
    """The section of a card about one results.json: one row a suite, then all results, then the
    signatures. UserError if the file is not one."""
    try:
        evaluation = strict_json(file.read_bytes(), file)
        results = evaluation["results"]
        rows = [_result_row(r) for r in results]
        main_rows = [[_with_mark(r), _what_is_measured(r), *_measured(r), *_difference(r)]
                     for r in _main_results(results)]
        signatures = _signature_lines(results)
        notes = dict.fromkeys(f"{r['suite']}, prompt {r.get('prompt')}: {r['aside']}"
                              for r in results if "aside" in r)
        settings = evaluation.get("settings") or {}
        baseline = public_name(str(settings.get("baseline_model") or "the baseline"))[0]
        comparisons = describe_comparisons(results, cell(baseline))
        contamination = _contamination(evaluation.get("contamination") or {})
    except OSError as e:
        raise UserError(f"--results {file}: cannot be read ({e.strerror}); check --results"
                        ) from None
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"--results {file}: not as eval.py writes it ({e!r}); name a results.json"
                        ) from None
    return render(
        "model_card_results.md", {"cell": cell}, main_rows=main_rows, rows=rows,
        signatures=signatures, notes=list(notes),
        model=public_name(str(evaluation.get("model")))[0], comparisons=comparisons,
        partial=any(r.get("partial") for r in results), contamination=contamination).rstrip("\n")


def _main_results(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One result of each suite, or part of a suite: the first metric, as the mean over prompts if
    there is one."""
    chosen: dict[tuple[str, str], dict[str, Any]] = {}
    for r in results:
        if "group" in r or "aside" in r:
            continue
        first = chosen.setdefault((r["suite"], r.get("part", "")), r)
        if "prompts" in r and "prompts" not in first and r["metric"] == first["metric"]:
            chosen[r["suite"], r.get("part", "")] = r
    return list(chosen.values())


def _result_row(r: dict[str, Any]) -> list[Any]:
    """A result as a row of the table of all results."""
    return [_with_mark(r), _what_is_measured(r), *_measured(r)]


def _with_mark(r: dict[str, Any]) -> str:
    """The suite, marked if only a part of it was measured."""
    return r["suite"] + (" (PARTIAL)" if r.get("partial") else "")


def _measured(r: dict[str, Any]) -> list[Any]:
    """Metric, value, interval, number of items, chance."""
    interval = "unknown"
    if r.get("low") is not None:
        interval = f"{r['low']:.4f} to {r['high']:.4f}"
    return [r["metric"], r["value"], interval, r["n"], r.get("chance", "-")]


def _difference(r: dict[str, Any]) -> list[str]:
    """The difference from the baseline, its interval, and p."""
    if "baseline" not in r:
        return ["-", "-", "-"]
    comparison = r["baseline"]
    return [f"{comparison['difference']:+.4f}",
            f"{comparison['low']:+.4f} to {comparison['high']:+.4f}", f"{comparison['p']:.3f}"]


def _signature_lines(results: list[dict[str, Any]]) -> list[str]:
    """Each signature once, after the suite, part, prompt and metrics that have it; lines of a code
    block."""
    metrics: dict[tuple[str, str], list[str]] = {}  # (what is measured, signature) -> its metrics
    for r in results:
        prompt = "mean" if "prompts" in r else r.get("prompt", "")
        measured = " ".join(x for x in (r["suite"], r.get("part"), prompt) if x)
        metrics.setdefault((measured, r["signature"]), []).append(r["metric"])
    lines = [f"{measured} ({', '.join(dict.fromkeys(names))}): {signature}"
             for (measured, signature), names in metrics.items()]
    return [printable(" ".join(line.split())).replace("`", "'") for line in lines]


def _what_is_measured(r: dict[str, Any]) -> str:
    """The part, prompt and group of a result, with * if it is not in the mean."""
    prompt = r.get("prompt", "")
    if "prompts" in r:
        prompt = f"mean of {r['prompts']}"
    if "aside" in r:
        prompt += "*"
    return " ".join(x for x in (r.get("part"), prompt, r.get("group")) if x) or "-"


def _contamination(report: dict[str, Any]) -> str:
    """What results.json says about test items in the training text, without any path."""
    missing, tests = report.get("gone") or [], report.get("tests") or {}
    statements = []
    if not tests:
        statements.append("not known, the training text was not searched")
    contaminated = [f"{x['any']:,} of {x['items']:,} items of {cell(name)} ({x['whole']:,} whole, "
                    f"{x['run']:,} by a run of words)" for name, x in tests.items() if x["any"]]
    if contaminated:
        statements.append(f"{', '.join(contaminated)} are in the training text")
    clean = [cell(name) for name, x in tests.items() if not x["any"]]
    if clean:
        statements.append(f"none found of {', '.join(clean)}")
    if missing:
        statements.append(f"{len(missing)} source(s) of it could not be read, or only in part")
    return "; ".join(statements)


def read_merge_record(folder: Path) -> list[dict[str, Any]]:
    """The adapters that were merged into a folder's model, oldest first."""
    if not has_model_file(folder, MERGE_RECORD):
        return []
    merges = read_model_json(folder, MERGE_RECORD).get("merges")
    if type(merges) is not list or not all(type(x) is dict for x in merges):
        raise UserError(f"{folder / MERGE_RECORD}: `merges` is not a list of objects; download it "
                        "again")
    return merges
