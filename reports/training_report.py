"""A run on one page: report.html, a single file that needs no other, for a browser, a phone or paper.

It reads only what a run left behind (metrics.jsonl, run.json, settings.toml, samples.txt), so a report
can be made again at any time. It comes last in a run, so it must not fail: what is missing, cut short
or damaged is said on the page.
"""

from __future__ import annotations

import io
import json
import math
import re
import statistics
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

STYLE = """:root { color-scheme: light dark; --ink: #1c2733; --soft: #5d6b7a; --line: #d9dfe5; --paper: #fff;
  --card: #f6f8fa; --good: #1a7f4b; --bad: #b3372f; }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #e4e9ee; --soft: #9aa7b4;
  --line: #323c46; --paper: #12171c; --card: #1a2128; --good: #5fc992; --bad: #f08a80; } }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; } summary { color: var(--soft); cursor: pointer; margin-top: .6rem; }
.soft { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); }
pre { background: var(--card); padding: .7rem .9rem; margin: .2rem 0 0; border-radius: 6px;
  font: .85em/1.45 ui-monospace, monospace; white-space: pre-wrap; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); } th { color: var(--soft); font-weight: 500; }
td.n, th.n { text-align: right; white-space: nowrap; } .facts td { overflow-wrap: anywhere; }
.facts td:first-child { width: 9rem; overflow-wrap: normal; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1rem; }
.plots figure { margin: 0; } .plots svg { width: 100%; height: auto; color: var(--ink); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .6rem 1rem; }
@media (max-width: 34rem) { th, td { padding-right: .5rem; } td.n .soft { display: block; }
  .facts td:first-child { width: 6rem; } }
@media print { body { max-width: none; padding: 0; } h2, h3 { break-after: avoid; }
  figure, .pair, tr { break-inside: avoid; } }
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>
{{ style | safe }}</style></head><body>
<h1>{{ title }}</h1>
<p class="soft">{{ summary }}</p>
{% for note in notes %}<p class="bad">{{ note }}</p>{% endfor %}
{% if command %}<pre>{{ command }}</pre>{% endif %}
<h2>Bits per byte, before and after</h2>
{% if table %}<div class="wide"><table><tr><th>text</th><th class="n">before</th>
<th class="n">after</th><th class="n">change</th><th class="n">best</th></tr>
{% for x in table %}<tr><td>{{ x.name }}</td><td class="n">{{ "%.4f" % x.before }}</td>
<td class="n">{{ "%.4f" % x.after }}</td>
<td class="n {{ 'good' if x.change < 0 else 'bad' }}">{{ "%+.1f" % (100 * x.change) }} %</td>
<td class="n">{{ "%.4f" % x.best }} <span class="soft">step {{ x.at }}</span></td></tr>
{% endfor %}</table></div>
<p class="soft">Of held-out text. Lower is better; comparable between tokenizers. Before is step {{ first }}, after is
step {{ last }}.</p>{% else %}<p>{{ "No held-out text." if suites else "No evaluation in metrics.jsonl." }}</p>{% endif %}
{% if suites %}<h2>Suites, before and after</h2>
<div class="wide"><table><tr><th>figure</th><th class="n">before</th><th class="n">after</th>
<th class="n">change</th></tr>
{% for x in suites %}<tr><td>{{ x.name }}</td><td class="n">{{ "%.4f" % x.before }}</td>
<td class="n">{{ "%.4f" % x.after }}</td><td class="n">{{ "%+.4f" % (x.after - x.before) }}</td></tr>
{% endfor %}</table></div>
<p class="soft">Of a part of each suite, with one prompt: a hint during training. eval.py measures the whole, with
intervals.</p>{% endif %}
<h2>Curves</h2>
{% if plots %}<div class="plots">{% for name, svg in plots %}
<figure role="img" aria-label="{{ name }}">{{ svg | safe }}</figure>{% endfor %}</div>
{% else %}<p>No steps in metrics.jsonl.</p>{% endif %}
<h2>Samples, before and after</h2>
{% for prompt, continued in samples %}<h3>{{ prompt }} …</h3><div class="pair">
{% for step, text in continued %}<div><span class="soft">step {{ step }}</span><pre>{{ text }}</pre></div>
{% endfor %}</div>{% else %}<p>No samples.txt, or nothing in it.</p>{% endfor %}
<h2>Settings</h2>
{% macro rows(pairs) %}<div class="wide"><table class="facts">{% for k, v in pairs %}<tr><td>{{ k }}</td>
<td>{{ v }}</td></tr>{% endfor %}</table></div>{% endmacro %}
{% if settings %}{% if chosen %}<p class="soft">Other than the defaults:</p>
{{ rows(chosen) }}{% endif %}<details><summary>all {{ settings | length }} settings</summary>
{{ rows(settings) }}</details>{% else %}<p>No settings.toml.</p>{% endif %}
<h2>What was run</h2>
{% if facts %}{{ rows(facts) }}{% else %}<p>No run.json.</p>{% endif %}
</body></html>
"""
COLOURS = ["#2f7fd1", "#d1782f", "#3a9d6a", "#a35bc4", "#8a8f98"]  # read on white and on black
INK = "#010203"  # stands for the colour of the text around a plot

Curve = tuple[str, list[int], list[float]]  # name, steps, values


def run_report(out: Path) -> Path:
    """Write OUT/report.html from what the run left in OUT; gives its path."""
    import jinja2

    out, notes = Path(out), []
    lines = read_metrics(out / "metrics.jsonl", notes)
    steps = [x for x in lines if "loss" in x]
    looks = [x for x in lines if _numbers(x.get("bits_per_byte")) or _numbers(x.get("suites"))]
    if looks and "stopped" in looks[-1]:
        notes.append(f"Stopped at step {looks[-1]['step']} by a guard: {looks[-1]['stopped']}")
    about = _parsed(out / "run.json", json.loads, notes)
    settings = _parsed(out / "settings.toml", tomllib.loads, notes)
    last = looks[-1]["step"] if looks else 0
    if settings.get("best") and (step := about.get("model_step", last)) != last:
        notes.append(f"The model is that of step {step}, the best of {settings.get('best')}.")
    chosen, command = about.pop("changed_settings", None) or {}, about.pop("command", "")
    shown = [(k.replace("_", "-"), _shown(v)) for k, v in settings.items()]
    page = jinja2.Environment(autoescape=True).from_string(PAGE).render(
        style=STYLE, title=f"{settings.get('mode', 'run')}: {out.resolve().name}", command=command, notes=notes,
        summary=_summary(about, steps), table=_table(looks, "bits_per_byte"),
        suites=_table(looks, "suites"), plots=plots(steps, looks),
        first=looks[0]["step"] if looks else 0, last=last,
        samples=_samples(_text(out / "samples.txt")), settings=shown,
        chosen=[(k, v) for k, v in shown if k.replace("-", "_") in chosen],
        facts=[(k.replace("_", " "), _shown(v)) for k, v in about.items()])
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _parsed(path: Path, parse: Callable[[str], Any], notes: list[str]) -> dict[str, Any]:
    """A file's table; empty, and a note, if it is not one."""
    text = _text(path)
    try:
        found = parse(text) if text else {}
    except (ValueError, RecursionError):  # both parsers' errors are ValueErrors
        found = None
    if isinstance(found, dict):
        return found
    notes.append(f"{path.name} is damaged and left out.")
    return {}


def read_metrics(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; one that a kill cut short is counted and left out."""
    found, bad = [], 0
    for text in _text(path).splitlines():
        try:
            line = json.loads(text)
            found.append({**line, "step": int(line["step"])})
        except (ValueError, TypeError, KeyError, RecursionError):
            bad += 1
    if bad:
        notes.append(f"{path.name}: {bad} unreadable line{'s' * (bad > 1)} left out.")
    return found


def _numbers(values: Any) -> dict[str, float]:
    """What in a table is a finite number; a step that was not finite has null."""
    table = values if isinstance(values, dict) else {}
    return {k: x for k, x in table.items() if isinstance(x, int | float) and math.isfinite(x)}


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_shown(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if type(value) is int else str(value)


def _summary(about: dict[str, Any], steps: list[dict[str, Any]]) -> str:
    parts = [about.get("model"), about.get("device"), about.get("started")]
    n = _numbers(about.get("parameters"))
    if {"total", "trained"} <= n.keys():
        parts.append(f"{n['trained']:,} of {n['total']:,} parameters trained")
    if steps:
        parts.append(f"{steps[-1]['step']:,} steps, {_shown(steps[-1].get('tokens', '?'))} tokens")
        if speeds := [y for x in steps for y in _numbers({"": x.get("tokens_per_second")}).values()]:
            parts.append(f"{statistics.median(speeds):,.0f} tokens a second (median)")
        if peaks := [y for x in steps for y in _numbers({"": x.get("memory_gb")}).values()]:
            parts.append(f"{max(peaks):.2f} GB at most")
    return " · ".join(str(p) for p in parts if p)


def _curves(lines: list[dict[str, Any]], key: str) -> list[Curve]:
    """A quantity over the steps, or one curve for each name in it."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for line in lines:
        value = line.get(key)
        for name, y in _numbers(value if isinstance(value, dict) else {"": value}).items():
            xs, ys = found.setdefault(name, ([], []))
            xs.append(line["step"]), ys.append(y)
    return [(name, xs, ys) for name, (xs, ys) in found.items()]


def _table(looks: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The first, last and least of each held-out text's bits per byte, or of a suite's figure."""
    rows = []
    for name, xs, ys in _curves(looks, key):
        best, at = min(zip(ys, xs, strict=True))
        change = ys[-1] / ys[0] - 1 if ys[0] else math.nan
        rows.append({"name": name, "before": ys[0], "after": ys[-1], "best": best, "at": at,
                     "change": change})
    return rows


def plots(steps: list[dict[str, Any]], looks: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(name, inline SVG) of every curve there is something to draw of."""
    found = []
    for lines, key, title, floor in (
            (looks, "bits_per_byte", "bits per byte", None), (steps, "loss", "loss, nats a token", None),
            (steps, "lr", "learning rate", 0), (steps, "grad_norm", "gradient norm", 0),
            (steps, "tokens_per_second", "tokens a second", 0), (steps, "share", "share of tokens", 0)):
        curves = _curves(lines, key)
        if curves and not (key == "share" and len(curves) == 1):
            found.append((title, _plot(title, curves, floor, dots=lines is looks)))
    main: dict[str, dict[str, Curve]] = {}  # of each suite, or part of one, the first figure
    for name, xs, ys in _curves(looks, "suites"):
        suite, _, metric = name.rpartition(".")
        if not any(suite in others for others in main.values()):
            main.setdefault(metric, {})[suite] = (suite, xs, ys)
    return found + [(metric, _plot(metric, list(curves.values()), None, dots=True))
                    for metric, curves in main.items()]


def _plot(title: str, curves: list[Curve], floor: float | None, dots: bool) -> str:
    """One plot of curves over steps."""
    def draw(axes: Any) -> None:
        for i, (name, x, y) in enumerate(curves):
            axes.plot(x, y, label=name.lstrip("_"), color=COLOURS[i % len(COLOURS)], linewidth=1.4,
                      linestyle="-" if i < len(COLOURS) else "--",
                      marker="o" if dots or len(x) == 1 else None, markersize=3)
        axes.set_ylim(bottom=floor)
        if any(name for name, _, _ in curves):
            axes.legend(frameon=False, fontsize=8)

    return figure(title, draw)


def figure(title: str, draw: Callable[[Any], None], height: float = 2.5) -> str:
    """An inline SVG in the page's own text colour, so that light and dark both read."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9, "font.family": "sans-serif",
             "text.parse_math": False}  # a source may be called a$b$
    style |= dict.fromkeys(("text.color", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context(style):
        drawn = Figure(figsize=(4, height), layout="constrained")
        axes = drawn.add_subplot()
        draw(axes)
        axes.set_title(title, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        file = io.StringIO()
        drawn.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg"):].replace(INK, "currentColor")
    prefix = re.sub(r"\W", "", title)  # ids must not meet those of the next plot on the page
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)


def _samples(text: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """(prompt, (step, continuation) first and last) for each prompt continued at both."""
    _, *parts = re.split(r"^== step (\d+)$", text, flags=re.MULTILINE)
    blocks = []
    for step, block in zip(parts[::2], parts[1::2], strict=True):
        parted = (x.partition("\n") for x in block.split("\n-- ")[1:])
        blocks.append((step, {prompt: more.strip("\n") for prompt, _, more in parted}))
    ends = blocks[:1] + blocks[1:][-1:]
    prompts = [p for p in ends[0][1] if all(p in block for _, block in ends)] if ends else []
    return [(p, [(step, block[p]) for step, block in ends]) for p in prompts]
