"""A model card: what a model's files and its run's files say, as README.md.

One idea: nothing is invented. Every sentence and number comes from a file; what no file says is
left out or said to be unknown, and paths of the machine that trained it stay there.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from checkpoints.model_folder import ADAPTER_CONFIG, CONFIG_FILE, MERGE_RECORD, tensor_infos
from checkpoints.safetensors_header import resolve_inside
from runtime import console as log
from runtime.console import UserError
from runtime.strict_json import read_json, strict_json
from tokenization.tokenizer import FILES

WRITTEN = "# written by export.py card"  # in the front matter: this README.md may be replaced
LICENCES = {
    r"LLAMA 3\.3 COMMUNITY": "llama3.3", r"LLAMA 3\.2 COMMUNITY": "llama3.2",
    r"LLAMA 3\.1 COMMUNITY": "llama3.1", r"LLAMA 3 COMMUNITY": "llama3",
    r"LLAMA 2 COMMUNITY": "llama2", r"Gemma Terms of Use": "gemma",
    r"Apache License\s+Version 2\.0": "apache-2.0", r"\A\s*(The )?MIT License": "mit"}
PRIVATE = ("model", "data", "val", "suite_data", "out", "resume", "plan", "track")  # paths, mostly


def text(folder: Path, s: Any) -> Iterator[str]:
    """The card, line by line."""
    run = read_json(run_file(s.run, "run.json")) if s.run else {}
    words = read_json(folder / ADAPTER_CONFIG) if (folder / ADAPTER_CONFIG).exists() else {}
    past = merges(folder)
    last = past[-1] if past else {}
    home = str(Path(run["model"]).absolute()) if run.get("model") else ""  # always a folder
    path = str(words.get("base_model_name_or_path") or last.get("base") or home)
    if words and not Path(path).is_dir() and (folder / path).is_dir():
        path = str(folder / path)
    name, revision = identity(path)
    revision = revision or words.get("revision") or last.get("revision")
    licence, why = (s.licence, "") if s.licence else licence_of(
        Path(path if words else home or path), folder)
    hub_id = name if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) else None

    yield from ["---", WRITTEN + "; a README.md without this line is never replaced"]
    if hub_id:
        yield f"base_model: {json.dumps(hub_id)}"
    for k, v in {"language": s.language, "license": licence,
                 "library_name": "peft" if words else "transformers",
                 "pipeline_tag": "text-generation",
                 "tags": [*["lora", "peft"] * bool(words), "kinyarwanda_ft_llm"]}.items():
        yield f"{k}: {json.dumps(v, ensure_ascii=False)}"
    title = cell((Path(s.run) if s.run else folder).resolve().name)
    yield from ["---", "", f"# {title}", "", "## What it is", ""]
    if words:
        yield (f"A LoRA adapter, rank {words.get('r')}, alpha {words.get('lora_alpha')}, on "
               f"{cell(', '.join(words.get('target_modules') or []))}.")
    else:
        n = sum(torch.Size(x.shape).numel() for x in tensor_infos(folder).values())
        kind = (read_json(folder / CONFIG_FILE).get("architectures") or ["unknown"])[0]
        yield f"A language model, {cell(kind)}, {n:,} parameters."
    if past:
        yield f"{len(past)} LoRA adapter(s) were merged into it."
    base = f"{cell(name)}{'' if hub_id else ', a local folder'}" if name else "unknown"
    yield f"Its base is {base}, commit {cell(revision or 'unknown')}. {why}".rstrip()
    yield from (run_lines(Path(s.run), run) if run else
                ["", "How it was trained is not recorded here: this card was made without a run."])
    for result in s.results:
        yield from result_lines(Path(result))
    yield from use_lines(folder, bool(words))
    yield from [
        "", "## Limits", "",
        "- Bits per byte say how well text is predicted, not whether answers or translations are "
        "right.", "- It can write what is false, and repeat what its training texts hold."]
    if run.get("changed_settings", {}).get("mode", "cpt") == "cpt" and run:
        yield "- This run continued text; it did not teach following instructions or chat."
    yield "- What is not on this card was not measured, or is not known here. That includes safety."


def run_file(run: str, name: str) -> Path:
    """A file of a run's folder; UserError if it is not there."""
    if not (Path(run) / name).is_file():
        raise UserError(f"--run {run}: no {name} here, so this is no run's folder; check --run")
    return Path(run) / name


def identity(path: str) -> tuple[str, str | None]:
    """How a base is called in public: hub id and commit, or a local folder's own name alone."""
    folder = Path(path).expanduser()
    if not folder.is_dir() and not folder.is_absolute():
        return path, None  # a hub id, or nothing
    folder = folder.resolve()
    repo = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repo.startswith("models--"):
        return repo.removeprefix("models--").replace("--", "/"), folder.name
    return (folder.parent.name if folder.name == "model" else folder.name), None


def licence_of(base: Path, folder: Path) -> tuple[str, str]:
    """The base's licence by its card or its LICENSE file; else `other`, and a sentence that says
    so."""
    for place in (base, folder) if base.is_dir() and str(base) != "." else (folder,):
        card = place / "README.md"
        text = card.read_text("utf-8", "replace") if card.exists() else ""
        front = re.match(r"---\n(.*?)\n---", text, re.S)
        said = front and re.search(r"^license:\s*[\"']?([\w.-]+)", front[1], re.M)
        if said and place == base and WRITTEN not in text:
            return said[1], f"The base's card says its licence is {said[1]}."
        for file in sorted(place.glob("LICENSE*")):
            start = file.read_text("utf-8", "replace")[:3000]
            for pattern, name in LICENCES.items():
                if re.search(pattern, start):
                    return name, f"Its licence is the base's, by {file.name}: {name}."
    return "other", "The base's licence is not known here; find it before using or sharing this."


def cell(x: Any) -> str:
    """A value in a table or a line of markdown, as the text it is."""
    text = ", ".join(map(str, x)) if isinstance(x, list) else str(x)
    return re.sub(r"([|<>*`\[\]\\])", r"\\\1", log.printable(" ".join(text.split())))


def rows(head: list[str], lines: list[list[Any]]) -> list[str]:
    """A table in markdown."""
    shown = [[f"{x:,}" if type(x) is int else f"{x:.4f}" if type(x) is float else cell(x)
              for x in line] for line in lines]
    return ["", *("| " + " | ".join(x) + " |" for x in (head, ["---"] * len(head), *shown))]


def run_lines(out: Path, run: dict[str, Any]) -> Iterator[str]:
    """What a run's folder says: data, settings, bits per byte before and after."""
    changed = run.get("changed_settings") or {}
    steps = []
    if (out / "metrics.jsonl").exists():
        for line in (out / "metrics.jsonl").read_text("utf-8", "replace").splitlines():
            try:
                steps.append(json.loads(line))
            except ValueError:
                break  # cut short by a kill: what follows is no part of the run
    trained = next((x for x in reversed(steps) if "tokens" in x), {})
    shares = trained.get("share") or {}
    yield from ["", "## Data"]
    lines, notes, unknown = [], [], []
    for name, sha in (run.get("data") or {}).items():
        meta = next((m for m in bins(out) if m["sha256"].get("tokens.bin") == sha), None)
        if meta is None:
            unknown.append(name)
            continue
        ledger = meta["ledger"]
        counts = [(x.get("read", 0), x.get("kept", 0) + x.get("cut", 0), x.get("duplicate", 0))
                  for x in (ledger["documents"], ledger["bytes"])]
        lines.append([name, *counts[0], *counts[1], meta["tokens"], shares.get(name, "unknown")])
        fates = {k: n for k, n in ledger["documents"].items() if n}
        if fates.get("cut"):
            notes.append(f"{fates['cut']:,} that were kept of {cell(name)} are cut to fit a row.")
        if left := [f"{n:,} {cell(k)}" for k, n in fates.items()
                    if k not in ("read", "kept", "cut", "duplicate")]:
            notes.append(f"Also left out of {cell(name)}: {', '.join(left)}.")
    if lines:
        yield from rows(["source", "documents read", "kept", "duplicates", "bytes read", "kept",
                         "duplicates", "tokens in the bin", "share of what was trained"], lines)
    for note in notes:
        yield from ["", note]
    if unknown:
        yield from ["", f"Of {cell(unknown)} the ledger is not there any more, so nothing is known "
                    "here."]
    if not lines and not unknown:
        yield from ["", "The run's folder does not say what it was trained on."]
    yield from ["", "## Training", ""]
    tokens = f"{trained['tokens']:,}" if "tokens" in trained else "an unknown number of"
    yield (f"{trained.get('step', 'an unknown number')} of {run.get('steps', 'unknown')} steps, "
           f"{tokens} trained tokens, products in "
           f"{cell(run.get('dtype', 'unknown'))}, on {cell(run.get('device', 'unknown'))}; "
           f"kinyarwanda_ft_llm at commit {cell(run.get('commit') or 'unknown')}. Settings that "
           "differ from its defaults:")
    settings = [[k, v] for k, v in changed.items() if k not in PRIVATE]
    yield from rows(["setting", "value"], [[k, str(v)] for k, v in settings]) if settings else [
        "", "none."]
    seen = {x["step"]: x["bits_per_byte"] for x in steps if "bits_per_byte" in x}
    if len(seen) > 1:
        last = max(seen)
        after = run.get("model_step", last) if changed.get("best") else last
        if after != last:
            yield from ["", f"The model is that of step {after}, the best that was evaluated."]
        yield from ["", "Bits per byte of text held out of training (lower is better), before and "
                    "after:"]
        yield from rows(["text", "before", "after"], [
            [k, v, seen.get(after, {}).get(k) or "unknown"]
            for k, v in seen[min(seen)].items() if v is not None])


def bins(out: Path) -> Iterator[dict[str, Any]]:
    """meta.json of every bin that a run prepared, or named in its settings."""
    settings = out / "settings.toml"
    specs = tomllib.loads(settings.read_text("utf-8")).get("data", []) if settings.exists() else []
    named = [Path(x) for spec in specs for x in (spec, spec.rpartition(":")[0]) if x]
    for place in (*sorted((out / "bins").glob("*")), *named):
        if (place / "meta.json").is_file():
            meta = read_json(place / "meta.json")
            if "ledger" in meta and "sha256" in meta:
                yield meta


def result_lines(file: Path) -> Iterator[str]:
    """A results.json as a table, and what is to be known of its figures."""
    try:
        found = strict_json(file.read_bytes(), file)
        lines = [[x["suite"] + " (PARTIAL)" * bool(x.get("partial")), what(x), x["metric"],
                  x["value"],
                  f"{x['low']:.4f} to {x['high']:.4f}" if x.get("low") is not None else "unknown",
                  x["n"], x["signature"]] for x in found["results"]]
        seen = contamination(found.get("contamination") or {})
    except OSError as e:
        raise UserError(f"--results {file}: cannot be read ({e.strerror})") from None
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"--results {file}: not as eval.py writes it ({e!r})") from None
    yield from ["", f"## Evaluation: {cell(identity(str(found.get('model')))[0])}"]
    yield from rows(["suite", "part, prompt", "metric", "value", "95 % interval", "n", "signature"],
                    lines)
    if any(x.get("partial") for x in found["results"]):
        yield from ["", "PARTIAL: only the first items were measured; not for comparison."]
    for note in dict.fromkeys(f"{x['suite']}, prompt {x.get('prompt')}: {x['aside']}"
                              for x in found["results"] if "aside" in x):
        yield from ["", f"{cell('*')} not in the mean: {cell(note)}."]
    yield from ["", f"Contamination: {seen}."]


def what(result: dict[str, Any]) -> str:
    """Which of a suite's figures a result is: its part, prompt and group; * where it is in no
    mean."""
    prompt = f"mean of {result['prompts']}" if "prompts" in result else result.get("prompt", "")
    named = (result.get("part"), prompt + "*" * ("aside" in result), result.get("group"))
    return " ".join(filter(None, named)) or "-"


def contamination(found: dict[str, Any]) -> str:
    """What results.json says of test items in the training text; no path of it is told."""
    gone, tests = found.get("gone") or [], found.get("tests") or {}
    unread = f"; {len(gone)} source(s) of it could not be read, or not whole" if gone else ""
    if not tests:
        return "not known, the training text was not looked through" + unread
    hits = [f"{x['any']:,} of {x['items']:,} items of {cell(k)} ({x['whole']:,} whole, "
            f"{x['run']:,} by a run of words)" for k, x in tests.items() if x["any"]]
    none = [cell(k) for k, x in tests.items() if not x["any"]]
    said = [f"{', '.join(hits)} stand in the training text"] * bool(hits)
    return "; ".join(said + [f"none found of {', '.join(none)}"] * bool(none)) + unread


def use_lines(folder: Path, adapter: bool) -> list[str]:
    """How the model is used, by others' programs and by this one."""
    home, cls = ("peft", "AutoPeftModelForCausalLM") if adapter else (
        "transformers", "AutoModelForCausalLM")
    own = any((folder / x).exists() for x in FILES[:2])
    return [
        "", "## How to use", "", "```python", *([
            f"from {home} import {cls}", "from transformers import AutoTokenizer"] if adapter else [
            f"from {home} import {cls}, AutoTokenizer"]), "",
        "name = \"...\"  # this folder, or its name on the hub",
        f"model = {cls}.from_pretrained(name)",
        f"tokenizer = AutoTokenizer.from_pretrained({'name' if own else '...'})"
        + ("" if own else "  # the base's"),
        "inputs = tokenizer(\"Umwana\", return_tensors=\"pt\")",
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))", "```", "",
        "With kinyarwanda_ft_llm: `python sample.py --model NAME --prompt \"Umwana\"`."]


def merges(folder: Path) -> list[dict[str, Any]]:
    """What was merged into a folder's model so far."""
    if not (folder / MERGE_RECORD).exists():
        return []
    found = read_json(resolve_inside(folder, MERGE_RECORD)).get("merges")
    if type(found) is not list or not all(type(x) is dict for x in found):
        raise UserError(f"{folder / MERGE_RECORD}: `merges` is no list of objects; fetch it again")
    return found
