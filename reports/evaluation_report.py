"""An evaluation on one page: OUT/report.html, a single file for a browser, a phone or paper.

It reads what eval.py left in OUT (results.json, items/) and, where the model is a run's, the run's
metrics.jsonl. What comes first is what one asks first: how much better, at what price in English,
and whether the figures can be believed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evaluation import metrics
from evaluation.results import read_records
from reports import training_report as report

SHOWN = 5  # best and worst translations
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>
{{ style | safe }}
.banner { border: 2px solid var(--bad); border-radius: 6px; padding: .5rem .8rem; }
.three { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .4rem 1rem;
  border-bottom: 1px solid var(--line); padding: .5rem 0; break-inside: avoid; }
.three b { display: block; color: var(--soft); font-weight: 500; font-size: .8rem; }
@media (min-width: 34rem) { td.m { white-space: nowrap; } }
@media (max-width: 34rem) { .wide table { font-size: .8rem; } .spare { display: none; }
  .wide th, .wide td { padding-right: .3rem; } .wide td.n .soft { white-space: normal; } }
@media print { .wide { overflow: visible; } .wide table { font-size: .75rem; }
  .wide td.n .soft { display: block; } .wide td.m { white-space: normal; } }
</style></head><body>
<h1>{{ title }}</h1>
<p class="soft">{{ summary }}</p>
{% if partial %}<p class="bad banner">PARTIAL: only the first items were measured. These figures are
a quick look and not for publishing.</p>{% endif %}
{% for note in notes %}<p class="bad">{{ note }}</p>{% endfor %}
<pre>{{ command }}</pre>
{% macro change(r) %}{% if r.baseline %}<td class="n spare">{{ number(r.baseline.value) }}</td>
<td class="n {{ tone(r) }}">{{ "%+.4f" % r.baseline.difference }}
<span class="soft">{{ "%+.3f" % r.baseline.low }} to {{ "%+.3f" % r.baseline.high }}</span>
<span class="soft">p {{ "%.3f" % r.baseline.p }}</span></td>
{% else %}<td class="n spare">–</td><td class="n">–</td>{% endif %}{% endmacro %}
{% macro value(r) %}<td class="n">{{ number(r.value) }}{% if r.low is not none %}
<span class="soft">{{ number(r.low) }} to {{ number(r.high) }}</span>{% endif %}</td>{% endmacro %}
{% macro head(first) %}<tr>{% for x in first %}<th{{ " class=spare" if x in ("documents", "tokens/byte") }}>{{ x }}</th>{% endfor %}<th class="n">value, 95 %</th>
{% if compared %}<th class="n spare">before</th><th class="n">difference, 95 %</th>{% endif %}
</tr>{% endmacro %}
{% if texts %}<h2>Languages, and what was forgotten</h2>
<div class="wide"><table>{{ head(["text", "documents", "tokens/byte"]) }}
{% for r in texts %}<tr><td>{{ r.suite[5:] }}{{ mark(r) }}</td><td class="spare">{{ "{:,}".format(r.n) }}</td>
<td class="spare">{{ "%.4f" % (r.tokens / r.bytes) }}</td>
{{ value(r) }}{% if compared %}{{ change(r) }}{% endif %}</tr>{% endfor %}</table></div>
<p class="soft">Bits per byte: lower is better, and comparable between tokenizers.</p>{% endif %}
{% for name, part, rows, means in suites %}<h2>{{ name }}{{ " " + part if part }}</h2>
{% if means %}<div class="wide"><table><tr><th>mean over prompts</th><th class="n">value, 95 %</th>
<th class="n">least to most</th></tr>
{% for r in means %}<tr><td class="m">{{ r.metric }}{{ mark(r) }}</td>{{ value(r) }}
<td class="n">{{ number(r.least) }} to {{ number(r.most) }}</td></tr>{% endfor %}</table></div>{% endif %}
<details{{ " open" if not means or compared }}><summary>each prompt, {{ "{:,}".format(rows[0].n) }} items</summary>
<div class="wide"><table>{{ head(["prompt", "figure"]) }}
{% for r in rows %}<tr><td>{{ r.prompt }}{{ "*" if r.aside }}</td><td class="m">{{ r.metric }}{{ mark(r) }}</td>
{{ value(r) }}{% if compared %}{{ change(r) }}{% endif %}</tr>{% endfor %}</table></div></details>
{% for r in rows | selectattr("aside", "defined") | unique(attribute="prompt") %}
<p class="soft">* {{ r.prompt }} is not in the mean: {{ r.aside }}.</p>{% endfor %}
{% if (name, part) in plots %}<div class="plots">{% for title, svg in plots[(name, part)] %}
<figure role="img" aria-label="{{ title }}">{{ svg | safe }}</figure>{% endfor %}</div>{% endif %}
{% for title, lines in shown.get((name, part), []) %}<h3>{{ title }}</h3>
{% for x in lines %}<div class="three">{% for label, text in x %}<div><b>{{ label }}</b>{{ text }}</div>
{% endfor %}</div>{% endfor %}{% endfor %}{% endfor %}
<h2>Contamination</h2>
{% if tests %}<div class="wide"><table><tr><th>test</th><th class="n">items</th><th class="n">whole</th>
<th class="n">13 words in a row</th><th class="n">either</th></tr>
{% for name, x in tests.items() %}<tr><td>{{ name }}</td><td class="n">{{ "{:,}".format(x["items"]) }}</td>
<td class="n">{{ x.whole }}</td><td class="n">{{ x.run }}</td>
<td class="n {{ 'bad' if x.any else '' }}">{{ x.any }} ({{ "%.1f" % (100 * x.any / x["items"]) }} %)</td></tr>
{% endfor %}</table></div><p class="soft">Items found in {{ read | join(", ") }}.</p>
{% elif gone %}<p>Not known: nothing that the model was trained on could be read.</p>
{% else %}<p>Not looked for: what the model was trained on is not known, or --no-overlap was given.</p>{% endif %}
{% if gone %}<p class="bad">Could not be read: {{ gone | join(", ") }}.</p>{% endif %}
{% if curves %}<h2>The run</h2><div class="plots">{% for title, svg in curves %}
<figure role="img" aria-label="{{ title }}">{{ svg | safe }}</figure>{% endfor %}</div>{% endif %}
<h2>How it was measured</h2>
<div class="wide"><table class="facts">{% for k, v in facts %}<tr><td>{{ k }}</td><td>{{ v }}</td></tr>
{% endfor %}</table></div>
<details><summary>{{ signatures | length }} signatures</summary><pre>{{ signatures | join("\n") }}</pre></details>
</body></html>
"""


def write(out: Path) -> Path:
    """Write OUT/report.html from OUT's files; gives its path."""
    import jinja2

    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    results, settings = found["results"], found["settings"]
    contamination = found.get("contamination") or {}
    notes: list[str] = []
    compared = any("baseline" in r for r in results)
    if settings.get("baseline") and not compared:
        notes.append("Nothing here was also measured in the baseline.")
    facts = [("model", found["model"]), ("baseline", settings.get("baseline") or "none")]
    facts += [(k.replace("_", " "), settings[k]) for k in
              ("dtype", "device", "max_length", "shots", "beams", "torch") if k in settings]
    files = {f["path"]: f["sha256"] for r in results for f in r.get("files", [])}
    facts += [(path, f"sha256 {sha[:16]}") for path, sha in files.items()]
    page = jinja2.Environment(autoescape=True).from_string(PAGE).render(
        style=report.STYLE, title=f"evaluation: {_short(found['model'])}",
        summary=_summary(results, settings), notes=notes, command=found["command"],
        partial=any(r["partial"] for r in results), compared=compared,
        texts=[r for r in results if r["suite"].startswith("text:")], suites=_suites(results),
        plots=_groups(results), shown=_translations(out, results), facts=facts,
        tests=contamination.get("tests", {}), read=contamination.get("read", []),
        gone=contamination.get("gone", []), curves=_curves(found["model"], notes),
        signatures=dict.fromkeys(f"{r['suite']} {r.get('prompt', '')} {r['metric']}: "
                                 f"{r['signature']}" for r in results),
        number=lambda x: f"{x:.2f}" if abs(x) >= 10 else f"{x:.4f}",
        mark=lambda r: " (PARTIAL)" if r["partial"] else "", tone=_tone)
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _short(model: str) -> str:
    parts = Path(model).parts
    return parts[-2] if len(parts) > 1 and parts[-1] == "model" else parts[-1] if parts else "?"


def _summary(results: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    seconds = sum({r["items"]: r["seconds"] for r in results if "items" in r}.values())
    parts = [settings.get("device"), settings.get("dtype"), f"{len(results)} figures",
             f"{seconds:,.0f} seconds"]
    return " · ".join(str(p) for p in parts if p)


def _tone(r: dict[str, Any]) -> str:
    """Whether a difference is good or bad news, where it is any: only below p 0.05."""
    b = r["baseline"]
    falls = r["metric"] in ("bits_per_byte", "copy_rate")
    if b["p"] >= 0.05 or not b["difference"] or r["metric"] == "length_ratio":
        return ""
    return "good" if (b["difference"] > 0) != falls else "bad"


def _suites(results: list[dict[str, Any]]) -> list[tuple[str, str, list, list]]:
    """(suite, part, figures of each prompt, their means) in the order they were measured."""
    found: dict[tuple[str, str], tuple[list, list]] = {}
    for r in results:
        if not r["suite"].startswith("text:") and "group" not in r:
            rows, means = found.setdefault((r["suite"], r.get("part", "")), ([], []))
            (means if "least" in r else rows).append(r)
    return [(name, part, rows, means) for (name, part), (rows, means) in found.items() if rows]


def _groups(results: list[dict[str, Any]]) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """Plots of the figures by group: a dot and its interval for each noun class, each distance."""
    by: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for r in results:
        if "group" in r:
            column, _, _ = r["group"].partition(" ")
            by.setdefault((r["suite"], r.get("part", "")), {}).setdefault(column, []).append(r)
    found = {}
    for key, columns in by.items():
        found[key] = [(f"{rows[0]['metric']} by {column}", _dots(rows, column))
                      for column, rows in columns.items()]
    return found


def _dots(rows: list[dict[str, Any]], column: str) -> str:
    def draw(axes: Any) -> None:
        names = [r["group"].partition(" ")[2] for r in rows]
        for i, r in enumerate(rows):
            if r["low"] is not None:
                axes.plot([i, i], [r["low"], r["high"]], color=report.COLOURS[0], linewidth=1.4)
            axes.plot([i], [r["value"]], "o", color=report.COLOURS[0], markersize=4)
        axes.axhline(0.5, color=report.COLOURS[4], linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(names)), names, fontsize=8)

    return report.figure(f"{rows[0]['metric']} by {column}", draw)


def _translations(out: Path, results: list[dict[str, Any]],
                  ) -> dict[tuple[str, str], list[tuple[str, list]]]:
    """The best and the worst translations of each part's first prompt, by chrF++ of the sentence,
    beside source and reference."""
    found: dict[tuple[str, str], list[tuple[str, list]]] = {}
    for r in results:
        key = (r["suite"], r.get("part", ""))
        if "items" not in r or not r["metric"].startswith("chrF") or key in found:
            continue
        records = read_records(out / "items" / f"{r['items']}.jsonl")
        scores = metrics.sentence_scores([x["hypothesis"] for x in records],
                                         [x["reference"] for x in records])
        order = sorted(range(len(records)), key=lambda i: (-scores[i], i))
        n = min(SHOWN, (len(order) + 1) // 2)
        found[key] = [(f"{what} translations, prompt {r['prompt']}", [
            [("source", records[i]["source"]), ("reference", records[i]["reference"]),
             (f"said, chrF++ {scores[i]:.1f}", records[i]["hypothesis"][:600] or "(nothing)")]
            for i in some]) for what, some in (("Best", order[:n]), ("Worst", order[-n:][::-1]))]
    return found


def _curves(model: str, notes: list[str]) -> list[tuple[str, str]]:
    """The curves of the run that made the model, where it is one's."""
    folder = next((p for p in (Path(model), Path(model).parent)
                   if (p / "metrics.jsonl").is_file()), None)
    if folder is None or not model:
        return []
    lines = report.read_metrics(folder / "metrics.jsonl", notes)
    return report.plots([x for x in lines if "loss" in x],
                        [x for x in lines if isinstance(x.get("bits_per_byte"), dict)])[:2]
