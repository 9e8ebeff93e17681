"""What all reports share: templates rendered by jinja2, and plots as inline SVG.

A page is a single file: style and plots are part of it. Values are escaped in .html templates.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).with_name("templates")
COLOURS = ["#2f7fd1", "#d1782f", "#3a9d6a", "#a35bc4", "#8a8f98"]  # readable on white and black
TEXT_COLOUR = "#010203"  # replaced by the page's own text colour


def render(template: str, filters: dict[str, Callable[[Any], str]] | None = None,
           **values: Any) -> str:
    """The text of a template in reports/templates with these values and filters."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, undefined=jinja2.StrictUndefined,
        autoescape=jinja2.select_autoescape(["html"]))
    environment.filters.update(filters or {})
    return environment.get_template(template).render(**values)


def figure(title: str, x_label: str, y_label: str, draw: Callable[[Any], None]) -> str:
    """A plot as inline SVG, in the page's text colour, so that it is readable in light and dark.

    `draw` draws on matplotlib's axes. The labels name the quantity and its unit.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    style: dict[str, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9,
        "font.family": "sans-serif", "text.parse_math": False}  # a source may be named a$b$
    for key in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"):
        style[key] = TEXT_COLOUR
    with matplotlib.rc_context(style):
        plot = Figure(figsize=(4, 2.6), layout="constrained")
        axes = plot.add_subplot()
        draw(axes)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel(x_label, fontsize=8)
        axes.set_ylabel(y_label, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        file = io.StringIO()
        plot.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg"):].replace(TEXT_COLOUR, "currentColor")
    prefix = re.sub(r"\W", "", title)  # the ids of all plots on a page must differ
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
