"""The report of an evaluation: OUT/report.html, a single file for a browser, a phone or paper.

It reads what eval.py wrote into OUT (results.json, items/) and, if the model belongs to a run, the
run's metrics.jsonl. The order is that of a reader's questions: how much better is the model, what
was forgotten, and can the figures be trusted. Effect sizes stand before p. A difference is coloured
only if its p is at most 0.05, and green only if the result is above chance.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evaluation import metrics
from evaluation.results import describe_comparisons, is_above_chance, read_records
from evaluation.significance import LEVEL
from reports.page import COLOURS, figure, render
from reports.training_curves import metric_label, plots, read_metrics
from reports.training_report import format_duration

N_EXAMPLES = 5  # best and worst translations
LOWER_IS_BETTER = ("bits_per_byte", "copy_rate")
SETTINGS_SHOWN = ("dtype", "device", "max_length", "shots", "beams", "torch")

Results = list[dict[str, Any]]
SuitePart = tuple[str, str]  # suite, part; the part is empty if the suite has none


def write_evaluation_report(out: Path) -> Path:
    """Write OUT/report.html from the files in OUT; returns its path."""
    evaluation = json.loads((out / "results.json").read_text(encoding="utf-8"))
    results, settings = evaluation["results"], evaluation["settings"]
    contamination = evaluation.get("contamination") or {}
    notes: list[str] = []
    compared = any("baseline" in r for r in results)
    baseline = baseline_name(settings)
    if settings.get("baseline") and not compared:
        notes.append("None of these metrics was also measured in the baseline.")
    page = render(
        "evaluation_report.html", title=f"evaluation: {_short_name(evaluation['model'])}",
        summary=_summary(results, settings), notes=notes, command=evaluation["command"],
        partial=any(r["partial"] for r in results), compared=compared, baseline=baseline,
        comparisons=describe_comparisons(results, baseline),
        has_chance=any("chance" in r for r in results),
        texts=[r for r in results if r["suite"].startswith("text:")], suites=_suites(results),
        plots=_group_plots(results), translations=_translations(out, results),
        facts=_facts(evaluation), files=_files(results), tests=contamination.get("tests", {}),
        sources_read=contamination.get("read", []),
        sources_missing=contamination.get("gone", []), curves=_curves(evaluation["model"], notes),
        signatures=_signatures(results), number=_format_number, bound=_format_bound,
        partial_mark=_partial_mark, tone=_tone)
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _short_name(model: str) -> str:
    """The name of a model's folder, or of the run that a folder `model` lies in."""
    parts = Path(model).parts
    if not parts:
        return "?"
    if len(parts) > 1 and parts[-1] == "model":
        return parts[-2]
    return parts[-1]


def baseline_name(settings: dict[str, Any]) -> str:
    """What the baseline is called: the short name of its model, or of its folder in results.json
    that do not name the model; "the baseline" if the model's name says nothing."""
    model = settings.get("baseline_model") or settings.get("baseline") or ""
    if model == settings.get("model"):  # both would have the same name
        model = settings.get("baseline") or ""
    return _short_name(model) if model not in ("", "hypotheses") else "the baseline"


def _summary(results: Results, settings: dict[str, Any]) -> str:
    seconds = {r["items"]: r["seconds"] for r in results if "items" in r}
    facts = [settings.get("device"), settings.get("dtype"), f"{len(results)} results",
             f"measured in {format_duration(sum(seconds.values()))}"]
    return " · ".join(str(x) for x in facts if x)


def _facts(evaluation: dict[str, Any]) -> list[tuple[str, Any]]:
    """(name, value) of what the results depend on: model and settings."""
    settings = evaluation["settings"]
    facts = [("model", evaluation["model"]), ("baseline", settings.get("baseline") or "none")]
    if settings.get("baseline_model"):
        facts.append(("baseline's model", settings["baseline_model"]))
    return facts + [(k.replace("_", " "), settings[k]) for k in SETTINGS_SHOWN if k in settings]


def _files(results: Results) -> list[tuple[str, str]]:
    """(path, hash) of each file that was evaluated."""
    files = {file["path"]: file["sha256"] for r in results for file in r.get("files", [])}
    return [(path, f"sha256 {sha[:16]}") for path, sha in files.items()]


def _signatures(results: Results) -> list[str]:
    lines = [f"{r['suite']} {r.get('prompt', '')} {r['metric']}: {r['signature']}" for r in results]
    return list(dict.fromkeys(lines))


def _format_number(x: float) -> str:
    return f"{x:.2f}" if abs(x) >= 10 else f"{x:.4f}"


def _format_bound(x: float, sign: str = "") -> str:
    """The end of an interval, with fewer digits than the value; `sign` "+": always signed."""
    digits = 2 if abs(x) >= 10 else 3
    return f"{x:{sign}.{digits}f}"


def _partial_mark(r: dict[str, Any]) -> str:
    return " (PARTIAL)" if r["partial"] else ""


def _tone(r: dict[str, Any]) -> str:
    """Whether a difference is good or bad. Neither if p is above 0.05, for a gain that ends at
    chance, and for a loss that began there."""
    baseline = r["baseline"]
    difference = baseline["difference"]
    if baseline["p"] > LEVEL or not difference or r["metric"] == "length_ratio":
        return ""
    if r["metric"] in LOWER_IS_BETTER:
        difference = -difference
    if difference > 0:
        return "good" if is_above_chance(r) else ""
    return "bad" if "chance" not in r or baseline["value"] > r["chance"] else ""


def _suites(results: Results) -> list[tuple[str, str, Results, Results]]:
    """(suite, part, metrics of each prompt, their means over prompts), in measured order."""
    suites: dict[SuitePart, tuple[Results, Results]] = {}
    for r in results:
        if r["suite"].startswith("text:") or "group" in r:
            continue
        rows, means = suites.setdefault((r["suite"], r.get("part", "")), ([], []))
        if "least" in r:
            means.append(r)
        else:
            rows.append(r)
    return [(name, part, rows, means) for (name, part), (rows, means) in suites.items() if rows]


def _group_plots(results: Results) -> dict[SuitePart, list[tuple[str, str]]]:
    """Plots of the metrics by group, such as a noun class: a dot and its interval for each."""
    columns: dict[SuitePart, dict[str, Results]] = {}
    for r in results:
        if "group" in r:
            column, _, _ = r["group"].partition(" ")
            by_column = columns.setdefault((r["suite"], r.get("part", "")), {})
            by_column.setdefault(column, []).append(r)
    return {key: [(f"{rows[0]['metric']} by {column}", _plot_groups(rows, column))
                  for column, rows in by_column.items()] for key, by_column in columns.items()}


def _plot_groups(rows: Results, column: str) -> str:
    metric = rows[0]["metric"]
    chance = [r["chance"] for r in rows if "chance" in r]

    def draw(axes: Any) -> None:
        names = [r["group"].partition(" ")[2] for r in rows]
        for i, r in enumerate(rows):
            if r["low"] is not None:
                axes.plot([i, i], [r["low"], r["high"]], color=COLOURS[0], linewidth=1.4)
            axes.plot([i], [r["value"]], "o", color=COLOURS[0], markersize=4)
        if len(chance) == len(rows):
            axes.plot(range(len(rows)), chance, color=COLOURS[4], linewidth=1, linestyle=":",
                      label="chance")
            axes.legend(frameon=False, fontsize=8)
        axes.set_xticks(range(len(names)), names, fontsize=8)

    return figure(f"{metric} by {column}", column, metric_label(metric), draw)


def _translations(out: Path, results: Results) -> dict[SuitePart, list[tuple[str, list]]]:
    """The best and worst translations of each part's first prompt, by sentence chrF++, with source
    and reference."""
    examples: dict[SuitePart, list[tuple[str, list]]] = {}
    for r in results:
        key = (r["suite"], r.get("part", ""))
        if "items" not in r or not r["metric"].startswith("chrF") or key in examples:
            continue
        records = read_records(out / "items" / f"{r['items']}.jsonl")
        scores = metrics.sentence_scores([x["hypothesis"] for x in records],
                                         [x["reference"] for x in records])
        order = sorted(range(len(records)), key=lambda i: (-scores[i], i))
        n = min(N_EXAMPLES, (len(order) + 1) // 2)
        worst_first = order[-n:][::-1]
        examples[key] = [
            (f"{title} translations, prompt {r['prompt']}",
             [_example(records[i], scores[i]) for i in indices])
            for title, indices in (("Best", order[:n]), ("Worst", worst_first))]
    return examples


def _example(record: dict[str, Any], score: float) -> list[tuple[str, str]]:
    return [("source", record["source"]), ("reference", record["reference"]),
            (f"translation, chrF++ {score:.1f}", record["hypothesis"][:600] or "(nothing)")]


def _curves(model: str, notes: list[str]) -> list[tuple[str, str]]:
    """The first two curves of the run that the model belongs to; none if there is no such run."""
    if not model:
        return []
    for folder in (Path(model), Path(model).parent):
        file = folder / "metrics.jsonl"
        if file.is_file():
            lines = read_metrics(file, notes)
            steps = [x for x in lines if "loss" in x]
            evaluations = [x for x in lines if isinstance(x.get("bits_per_byte"), dict)]
            return plots(steps, evaluations)[:2]
    return []
