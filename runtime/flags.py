"""Settings: a command's dataclass < recipe.toml files, left to right < flags.

A command's settings are one flat dataclass; a field's name is its name in code, in a recipe and,
with hyphens, as a flag; the string under it is its help. A recipe is read as if its lines were
flags, so one parser checks every value, and an unknown name or a wrong type stops before any weight
is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import json
import os
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

from runtime import openmp as threads  # noqa: F401, for flags are read before torch is loaded
from runtime.console import FLAGS, UserError

T = TypeVar("T")


def read(cls: type[T], argv: list[str], prog: str) -> tuple[T, dict[str, str]]:
    """Settings from recipe files (leading `*.toml` arguments) and flags, and where each came from.

    The second is {field: "default", a recipe's path, or "flag"}. UserError (FLAGS) on what cannot
    be read.
    """
    settings = None
    origins = {f.name: "default" for f in dataclasses.fields(cls)}
    while argv and argv[0].endswith(".toml"):
        recipe, argv = argv[0], argv[1:]
        values = _recipe(cls, recipe)
        settings = _parse(
            cls, [x for k, v in values.items() for x in _flag(k, v)], prog, settings, f"{recipe}: ")
        for key, value in values.items():
            if getattr(settings, key) != value:  # "10" for a number, 5 for a name
                raise UserError(
                    f"{recipe}: {key} = {json.dumps(value)} is a {type(value).__name__}, expected "
                    f"{_type_of(cls, key)}", FLAGS)
            origins[key] = recipe
    given = [
        a[2:].split("=")[0].replace("-", "_") for a in argv if a.startswith("--") and len(a) > 2]
    for name in given:
        name = name if name in origins else name.removeprefix("no_")
        if name != "help":
            _known(cls, name, f"--{name.replace('_', '-')}", prog)
            origins[name] = "flag"
    return _parse(cls, argv, prog, settings, f"{prog}: "), origins


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, str]]:
    """Names of the settings that are others now, each with words that say so."""
    return [(k, f"{k.replace('_', '-')} was {before[k]!r}, now {x!r}") for k, x in now.items()
            if before.get(k, x) != x]


def go_on(cls: type[T], argv: list[str], prog: str, kept: Path,
          may_change: Collection[str]) -> tuple[T, dict[str, str]]:
    """The settings in `kept` with those flags over them that may change in a run that goes on; any
    other is refused (FLAGS)."""
    before, _ = read(cls, [str(kept)], prog)
    settings, origins = read(cls, [str(kept), *argv], prog)
    changed = changes(dataclasses.asdict(before), dataclasses.asdict(settings))
    if refused := [said for name, said in changed if name not in may_change]:
        raise UserError(f"--resume: {'; '.join(refused)}; that is another run: leave it out, or "
                        "start anew with another --out", FLAGS)
    return settings, origins


def pick(commands: dict[str, type], argv: list[str], prog: str, about: str) -> tuple[str, Any]:
    """The subcommand that the first argument names, and its settings."""
    if not argv or argv[0] in ("-h", "--help"):
        lines = [
            f"  {name:<11}{(cls.__doc__ or '').splitlines()[0]}" for name, cls in commands.items()]
        print(f"{about}\n\nusage: python {prog} COMMAND ...\n\n" + "\n".join(lines) +
              f"\n\n`python {prog} COMMAND --help` lists its flags.")
        raise SystemExit(0 if argv else FLAGS)
    name = argv[0]
    if name not in commands:
        raise UserError(f"{prog}: unknown command {name!r}; {_nearest(name, commands)}", FLAGS)
    return name, read(commands[name], argv[1:], f"{prog} {name}")[0]


def to_toml(settings: Any) -> str:
    """Settings as a recipe that gives them back; what is not set (None) is left out."""
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    return "".join(f"{k} = {_toml(v)}\n" for k, v in values.items() if v is not None)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _recipe(cls: type, path: str) -> dict[str, Any]:
    """A recipe's values by field name."""
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe", FLAGS) from None
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be read as TOML ({e})", FLAGS) from None
    values = {k.replace("-", "_"): v for k, v in raw.items()}
    for key in values:
        _known(cls, key, key, path)
    return values


def _flag(key: str, value: Any) -> list[str]:
    """A recipe's line as flags."""
    name = key.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", str(value)]


def _known(cls: type, name: str, shown: str, where: str) -> None:
    names = [f.name for f in dataclasses.fields(cls)]
    if name not in names:
        raise UserError(f"{where}: unknown setting {shown}; {_nearest(name, names)}", FLAGS)


def _nearest(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name, list(names), 1, 0.5)
    return f"did you mean {close[0]}?" if close else "known are " + ", ".join(names)


def _type_of(cls: type, key: str) -> str:
    kind = next(f.type for f in dataclasses.fields(cls) if f.name == key)
    return kind if isinstance(kind, str) else kind.__name__


def _parse(cls: type[T], args: list[str], prog: str, default: T | None, where: str) -> T:
    """tyro's reading of flags; what it prints in a box when it refuses becomes our one line."""
    import tyro

    said = io.StringIO()
    os.environ.setdefault(
        "COLUMNS", "110")  # a box is drawn as wide as the terminal: wide enough for one line
    wants_help = "--help" in args or "-h" in args
    try:
        with contextlib.nullcontext() if wants_help else contextlib.redirect_stderr(said), \
             contextlib.nullcontext() if wants_help else contextlib.redirect_stdout(said):
            more = {} if default is None else {"default": default}
            return tyro.cli(cls, args=args, prog=f"python {prog}", **more)
    except SystemExit as e:
        if not e.code:
            raise
        box = [x.strip(" │|") for x in said.getvalue().splitlines()[1:]]  # without its title
        words = itertools.dropwhile(_is_rule, box)
        what = " ".join(itertools.takewhile(lambda x: not _is_rule(x), words))
        raise UserError(f"{where}{what} (see --help)", FLAGS) from None


def _is_rule(line: str) -> bool:
    """Whether a line of tyro's box is only drawing, in Unicode or in ASCII."""
    return not line.strip("─-+╭╮╰╯ ")
