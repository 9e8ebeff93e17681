"""The text of --help: a command's settings in groups, each with its values, default and meaning."""

from __future__ import annotations

import dataclasses
import textwrap
import types
from itertools import groupby
from typing import Any, Literal, Union, get_args, get_origin

from runtime.setting_metadata import Setting, settings_of

WIDTH = 100


def help_text(cls: type, prog: str) -> str:
    """The whole text of `python PROG --help`."""
    settings = settings_of(cls)
    positional = [x for x in settings if is_positional(x)]
    names = "".join(f" {x.name.upper()} ..." for x in positional)
    about = textwrap.fill(" ".join((cls.__doc__ or "").split()), WIDTH)
    lines = [f"usage: python {prog} [RECIPE.toml ...]{names} [--FLAG VALUE ...]", "", about]
    for title, group in groupby(settings, lambda x: x.group):
        lines += ["", f"{title}:"]
        for setting in group:
            lines += setting_lines(setting)
    lines += ["", "Other:", "  --help, -h", "      Print this text.", "  --version",
              "      Print the version and the git commit."]
    return "\n".join(lines)


def setting_lines(setting: Setting) -> list[str]:
    """A setting in --help: its flag, values and default on one line, its meaning below."""
    if is_positional(setting):
        head = f"  {setting.name.upper()} ..."
    elif setting.type is bool:
        head = f"  {setting.flag}, --no-{setting.flag.removeprefix('--')}"
    else:
        head = f"  {setting.flag} {value_name(setting.type)}"
    notes = [shown_default(setting.default)]
    if setting.bounds is not None:
        notes.append(str(setting.bounds))
    return [f"{head}  ({'; '.join(notes)})",
            *textwrap.wrap(setting.help, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)]


def value_name(kind: Any) -> str:
    """How --help writes the values of a type: {a,b}, INT, TEXT ..."""
    origin = get_origin(kind)
    if origin is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    if origin in (Union, types.UnionType):
        return "|".join(value_name(x).strip("{}") for x in get_args(kind) if x is not type(None))
    if origin in (list, tuple):
        return f"{value_name(get_args(kind)[0])} ..."
    return {int: "INT", float: "NUMBER", str: "TEXT"}.get(kind, str(kind))


def shown_default(default: Any) -> str:
    """A default as a person would give it."""
    if default is dataclasses.MISSING:
        return "required"
    if default is None or default == "" or default == []:
        return "default: none"
    if isinstance(default, bool):
        return "default: on" if default else "default: off"
    if isinstance(default, list | tuple):
        return "default: " + " ".join(map(str, default))
    return f"default: {default}"


def is_positional(setting: Setting) -> bool:
    """Whether the setting is given without a flag (tyro.conf.Positional)."""
    from tyro.conf import Positional

    return get_args(Positional[int])[1] in setting.metadata
