"""A run on one page: report.html, a single file that needs no other, for a browser, a phone or
paper.

It reads only what a run left behind (metrics.jsonl, run.json, settings.toml, samples.txt), so a
report can be made again at any time, and says what is missing instead of failing.
"""

from __future__ import annotations

import io
import json
import math
import re
import tomllib
from pathlib import Path
from typing import Any

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>
:root { color-scheme: light dark; --ink: #1c2733; --soft: #5d6b7a; --line: #d9dfe5; --paper: #fff; --card: #f6f8fa;
  --good: #1a7f4b; --bad: #b3372f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ee; --soft: #9aa7b4; --line: #323c46; --paper: #12171c;
  --card: #1a2128; --good: #5fc992; --bad: #f08a80; } }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
.soft { color: var(--soft); } code, pre { font: .85em/1.45 ui-monospace, monospace; }
pre { background: var(--card); padding: .7rem .9rem; border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .6rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; } td.n, th.n { text-align: right; } .good { color: var(--good); }
.bad { color: var(--bad); } .plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1rem; }
.plots figure { margin: 0; } .plots svg { width: 100%; height: auto; color: var(--ink); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 0 1rem; }
td:not(.n) { overflow-wrap: anywhere; } .n { white-space: nowrap; } @media print { body { max-width: none; } h2 { break-after: avoid; } figure, pre { break-inside: avoid; } }
</style></head><body>
<h1>{{ title }}</h1>
<p class="soft">{{ summary }}</p>
{% if command %}<pre>{{ command }}</pre>{% endif %}
<h2>Bits per byte, before and after</h2>
{% if table %}<div class="wide"><table><tr><th>held-out text</th><th class="n">before</th><th class="n">after</th>
<th class="n">best</th><th class="n">change</th></tr>
{% for x in table %}<tr><td>{{ x.name }}</td><td class="n">{{ "%.4f" % x.before }}</td><td class="n">{{ "%.4f" % x.after }}</td>
<td class="n">{{ "%.4f" % x.best }} <span class="soft">at step {{ x.at }}</span></td>
<td class="n {{ 'good' if x.change < 0 else 'bad' }}">{{ "%+.1f" % (100 * x.change) }} %</td></tr>{% endfor %}</table></div>
<p class="soft">Lower is better; comparable between tokenizers. Before is step {{ first }}, after is step {{ last }}.</p>
{% else %}<p>No evaluation in metrics.jsonl.</p>{% endif %}
<h2>Curves</h2>
{% if plots %}<div class="plots">{% for svg in plots %}<figure>{{ svg | safe }}</figure>{% endfor %}</div>
{% else %}<p>No steps in metrics.jsonl.</p>{% endif %}
<h2>Samples, before and after</h2>
{% for s in samples %}<p><b>{{ s.prompt }}</b> …</p><div class="pair"><pre>{{ s.before }}</pre><pre>{{ s.after }}</pre></div>
{% else %}<p>No samples.txt, or nothing in it.</p>{% endfor %}
<h2>What was run</h2>
{% if facts %}<div class="wide"><table>{% for k, v in facts %}<tr><th>{{ k }}</th><td>{{ v }}</td></tr>{% endfor %}</table></div>
{% else %}<p>No run.json.</p>{% endif %}
<h2>Settings</h2>
{% if settings %}<div class="wide"><table>{% for k, v in settings %}<tr><th>{{ k }}</th><td>{{ v }}</td></tr>{% endfor %}</table></div>
{% else %}<p>No settings.toml.</p>{% endif %}
</body></html>
"""


def run_report(out: Path) -> Path:
    """Write OUT/report.html from what the run left in OUT; gives its path."""
    import jinja2

    out = Path(out)
    lines = [json.loads(x) for x in _text(out / "metrics.jsonl").splitlines() if x.strip()]
    steps = [x for x in lines if "loss" in x]
    looks = [x for x in lines if x.get("bits_per_byte")]
    about = json.loads(_text(out / "run.json") or "{}")
    settings = tomllib.loads(_text(out / "settings.toml"))
    changed = about.pop("changed_settings", {})
    page = (
        jinja2.Environment(autoescape=True)
        .from_string(PAGE)
        .render(
            title=f"{settings.get('mode', 'run')}: {out.name}",
            command=about.pop("command", ""),
            summary=_summary(about, steps),
            table=_table(looks),
            plots=_plots(steps, looks),
            first=looks[0]["step"] if looks else 0,
            last=looks[-1]["step"] if looks else 0,
            samples=_samples(_text(out / "samples.txt")),
            facts=[(k, _shown(v)) for k, v in about.items()],
            settings=[
                (k.replace("_", "-") + (" *" if k in changed else ""), _shown(v))
                for k, v in settings.items()
            ],
        )
    )
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_shown(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if type(value) is int else str(value)


def _summary(about: dict[str, Any], steps: list[dict]) -> str:
    parts = [about.get("model", ""), about.get("device", ""), about.get("started", "")]
    if "parameters" in about:
        parts.insert(
            1,
            f"{about['parameters']['trained']:,} of {about['parameters']['total']:,} parameters trained",
        )
    if steps:
        parts.append(f"{steps[-1]['step']} steps, {steps[-1]['tokens']:,} tokens")
    return " · ".join(p for p in parts if p)


def _table(looks: list[dict]) -> list[dict[str, Any]]:
    """Each held-out text's first, last and best bits per byte."""
    rows = []
    for name in looks[0]["bits_per_byte"] if looks else ():
        series = [
            (x["bits_per_byte"][name], x["step"]) for x in looks if name in x["bits_per_byte"]
        ]
        (before, _), (after, _), (best, at) = series[0], series[-1], min(series)
        rows.append({"name": name, "before": before, "after": after, "best": best, "at": at,
                     "change": after / before - 1 if before else math.nan})
    return rows


def _plots(steps: list[dict], looks: list[dict]) -> list[str]:
    """Curves as inline SVG, drawn in the page's own text colour so that light and dark both
    read."""
    drawn = []
    if looks:
        names = list(looks[0]["bits_per_byte"])
        drawn.append(
            _plot(
                "bits per byte",
                [
                    (n, [x["step"] for x in looks], [x["bits_per_byte"].get(n) for x in looks])
                    for n in names
                ],
                dots=True,
            )
        )
    for key, title in (
        ("loss", "loss, nats a token"),
        ("lr", "learning rate"),
        ("grad_norm", "gradient norm"),
        ("tokens_per_second", "tokens a second"),
    ):
        series = [(x["step"], x.get(key)) for x in steps]
        if any(y is not None for _, y in series):
            drawn.append(_plot(title, [("", [x for x, _ in series], [y for _, y in series])]))
    if steps and len(steps[-1].get("share", {})) > 1:
        drawn.append(
            _plot(
                "share of tokens",
                [
                    (n, [x["step"] for x in steps], [x["share"].get(n) for x in steps])
                    for n in steps[-1]["share"]
                ],
            )
        )
    return drawn


def _plot(title: str, curves: list[tuple[str, list, list]], dots: bool = False) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    ink = "#010203"  # replaced below: SVG then takes the colour of the text around it
    with matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": title,
            "text.color": ink,
            "axes.edgecolor": ink,
            "xtick.color": ink,
            "ytick.color": ink,
            "font.size": 9,
            "font.family": "sans-serif",
        }
    ):
        figure = Figure(figsize=(4, 2.5), layout="constrained")
        axes = figure.add_subplot()
        for (name, x, y), colour in zip(
            curves, ("#2f7fd1", "#d1782f", "#3a9d6a", "#a35bc4", "#8a8f98") * 9, strict=False
        ):
            axes.plot(
                x,
                [math.nan if v is None else v for v in y],
                label=name,
                color=colour,
                linewidth=1.4,
                marker="o" if dots else None,
                markersize=3,
            )
        axes.set_title(title, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        if any(name for name, _, _ in curves):
            axes.legend(frameon=False, fontsize=8)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg"):].replace(ink, "currentColor")
    prefix = re.sub(r"\W", "", title)  # ids must not meet those of the next plot on the page
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)


def _samples(text: str) -> list[dict[str, str]]:
    """Continuations at the first and the last evaluation, prompt by prompt."""
    blocks = text.split("== step ")[1:]
    if not blocks:
        return []

    def pairs(block: str) -> dict[str, str]:
        parted = (x.partition("\n") for x in block.split("\n-- ")[1:])
        return {prompt: continued for prompt, _, continued in parted}

    before, after = pairs(blocks[0]), pairs(blocks[-1])
    return [
        {"prompt": p, "before": before[p].strip("\n"), "after": after.get(p, "").strip("\n")}
        for p in before
    ]
