"""The settings of a command: dataclass defaults < recipe.toml files, left to right < flags.

A command's settings are one flat dataclass. A field's name is its name in code, in a recipe and,
with hyphens, as a flag. A recipe is read as if its lines were flags, so one parser checks every
value. Unknown names, wrong types and numbers out of bounds are refused before a weight is read.
What may be declared beside the fields: runtime/setting_metadata.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import json
import math
import os
import tomllib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, TypeVar, get_origin

from runtime import console
from runtime.console import FLAGS, UserError
from runtime.flag_help import help_text, is_positional
from runtime.openmp import shorten_spin_wait
from runtime.paths import is_utf8, version
from runtime.setting_metadata import Bounds, flag_name, settings_of

T = TypeVar("T")

SMALLEST_FLOAT32, LARGEST_FLOAT32 = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # normal numbers
ONE_TIME = {"resume", "plan", "help", "version"}  # asked of one command, never of a recipe


def read(cls: type[T], argv: list[str], prog: str,
         check: bool = True) -> tuple[T, dict[str, str]]:
    """Read settings from recipe files (leading `*.toml` arguments) and flags.

    Returns them and the origin of each: {field: "default", a recipe's path, or "flag"}. Prints
    and exits on --help and --version. UserError (FLAGS) on anything that cannot be read and, with
    `check`, on numbers out of bounds. Also sets the environment that torch reads when it is
    imported, because commands read their settings before that.
    """
    shorten_spin_wait()
    console.hide_cpp_warnings()
    _check_utf8(argv)
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, prog))
        raise SystemExit(0)
    _print_version(argv)
    settings = None
    origins = {f.name: "default" for f in dataclasses.fields(cls)}
    while argv and argv[0].endswith(".toml"):
        recipe, argv = argv[0], argv[1:]
        values = _read_recipe(cls, recipe)
        words = [word for key, value in values.items() for word in _as_flags(key, value)]
        settings = _parse(cls, words, prog, settings, f"{recipe}: ")
        for key, value in values.items():
            if getattr(settings, key) != value:  # "10" for a number, 5 for a name
                raise UserError(
                    f"{recipe}: {key} = {json.dumps(value)} is a {type(value).__name__}, expected "
                    f"{_type_name(cls, key)}", FLAGS)
            origins[key] = recipe
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name = word[2:].split("=")[0].replace("-", "_")
            if name not in origins:
                name = name.removeprefix("no_")
            _check_known(cls, name, flag_name(name), prog)
            origins[name] = "flag"
    _check_stray_words(cls, argv, prog)
    settings = _parse(cls, argv, prog, settings, f"{prog}: ")
    if check:
        check_bounds(settings, origins)
    return settings, origins


def read_resumed(cls: type[T], argv: list[str], prog: str, saved: Path,
                 may_change: Collection[str]) -> tuple[T, dict[str, str]]:
    """Read the settings of a run that goes on: the file `saved`, and flags over it.

    Only the settings in `may_change` may be changed by flags; any other is refused (FLAGS).
    Bounds are not checked: they may be newer than the run.
    """
    original, _ = read(cls, [str(saved)], prog, check=False)
    settings, origins = read(cls, [str(saved), *argv], prog, check=False)
    changes = changed_settings(dataclasses.asdict(original), dataclasses.asdict(settings))
    refused = [text for name, text in changes if name not in may_change]
    if refused:
        raise UserError(f"--resume: {'; '.join(refused)}; a resumed run cannot change this. Remove "
                        "the flag, or start a new run with another --out", FLAGS)
    return settings, origins


def read_subcommand(commands: dict[str, type], argv: list[str], prog: str,
                    about: str) -> tuple[str, Any]:
    """Read the subcommand that the first argument names, and its settings."""
    _print_version(argv[:1])
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, commands)) + 2
        lines = [f"  {name:<{width}}{(cls.__doc__ or '').splitlines()[0]}"
                 for name, cls in commands.items()]
        print(f"{about}\n\nusage: python {prog} COMMAND ...\n\n" + "\n".join(lines) +
              f"\n\n`python {prog} COMMAND --help` lists its flags.")
        raise SystemExit(0 if argv else FLAGS)
    name = argv[0]
    if name not in commands:
        raise UserError(f"{prog}: unknown command {name!r}; {_nearest(name, commands)}", FLAGS)
    return name, read(commands[name], argv[1:], f"{prog} {name}")[0]


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, str]]:
    """The settings whose values differ, each as (name, text that says how)."""
    return [(name, f"{name.replace('_', '-')} was {old[name]!r}, now {value!r}")
            for name, value in new.items() if old.get(name, value) != value]


def _check_utf8(argv: list[str]) -> None:
    """UserError (FLAGS) for an argument that is not UTF-8: run.json, settings.toml and results.json
    could not record it."""
    for word in argv:
        if not is_utf8(word):
            raise UserError(f"{word!a}: is not UTF-8; rename the file or folder", FLAGS)


def check_bounds(settings: Any, origins: dict[str, str] | None = None,
                 skip: Collection[str] = (), allow_infinite: bool = False) -> None:
    """Raise a UserError (FLAGS) for the first number outside the bounds beside its field."""
    for setting in settings_of(type(settings)):
        value, bounds = getattr(settings, setting.name), setting.bounds or Bounds()
        if type(value) not in (int, float) or setting.name in skip:
            continue
        expected = ""
        if value not in bounds:
            expected = str(bounds)
        elif not allow_infinite:
            expected = _expected_range(value, bounds.may_be_infinite)
        if not expected:
            continue
        origin = (origins or {}).get(setting.name, "flag")
        where = f"{setting.flag} {value}"
        if origin.endswith(".toml"):
            where = f"{origin}: {setting.name} = {value}"
        raise UserError(f"{where}: must be {expected}", FLAGS)


def _expected_range(value: float, may_be_infinite: bool) -> str:
    """What a number must be so that int64 or float32, in which it is used, holds it; or ""."""
    if isinstance(value, int):
        return "" if abs(value) < 2**63 else "within 64 bits, below 2**63"
    if math.isinf(value) and may_be_infinite:
        return ""
    if not math.isfinite(value):
        return "finite"
    if value and not SMALLEST_FLOAT32 <= abs(value) <= LARGEST_FLOAT32:
        return f"0, or within float32: {SMALLEST_FLOAT32:.4g} to {LARGEST_FLOAT32:.4g}"
    return ""


def to_toml(settings: Any) -> str:
    """Settings as a recipe from which they are read again; None is left out."""
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    return "".join(f"{k} = {_toml_value(v)}\n" for k, v in values.items() if v is not None)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)


def _print_version(argv: list[str]) -> None:
    if "--version" in argv:
        print(version())
        raise SystemExit(0)


def _read_recipe(cls: type, path: str) -> dict[str, Any]:
    """The values of a recipe by field name; old names are replaced by RENAMED."""
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe", FLAGS) from None
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be read as TOML ({e})", FLAGS) from None
    values: dict[str, Any] = {}
    for key, value in raw.items():
        values |= _replace_old_name(cls, key.replace("-", "_"), value, path)
    for key, value in values.items():
        if key in ONE_TIME and value is not False:
            raise UserError(f"{path}: {key} = {_toml_value(value)}: belongs to one command, not to "
                            f"a recipe; remove the line, and give {flag_name(key)}", FLAGS)
        _check_known(cls, key, key, path)
        for word in value if isinstance(value, list) else [value]:
            if isinstance(word, str) and (word.startswith("--") or word == "-h"):
                raise UserError(f"{path}: {key}: {word!r} is a flag, expected a value", FLAGS)
    return values


def _replace_old_name(cls: type, key: str, value: Any, path: str) -> dict[str, Any]:
    """The settings that a line of a recipe means today; a changed name or value is reported."""
    renamed = getattr(cls, "RENAMED", {}).get(key)
    if renamed is None:
        return {key: value}
    new = {renamed: value} if isinstance(renamed, str) else renamed(value)
    if new and new != {key: value}:
        lines = ", ".join(f"{name} = {_toml_value(x)}" for name, x in new.items())
        console.info(f"{path}: {key} = {_toml_value(value)} is now called {lines}")
    return new


def _as_flags(key: str, value: Any) -> list[str]:
    """A recipe's line as words of a command line."""
    flag = flag_name(key)
    if isinstance(value, bool):
        return [flag if value else flag_name(f"no_{key}")]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [flag, str(value)]


def _check_known(cls: type, name: str, shown: str, where: str) -> None:
    """Raise a UserError for a name that is not a field, with the nearest one that is."""
    names = [f.name for f in dataclasses.fields(cls)]
    if name in names:
        return
    renamed = getattr(cls, "RENAMED", {}).get(name)
    hint = getattr(cls, "HINTS", {}).get(name)
    if isinstance(renamed, str):
        hint = flag_name(renamed)
    if hint is not None and hint.startswith("--"):
        hint = f"here it is {hint}"
    raise UserError(f"{where}: unknown setting {shown}; {hint or _nearest(name, names)}", FLAGS)


def _check_stray_words(cls: type, argv: list[str], prog: str) -> None:
    """Raise a UserError for a word that is neither a flag nor the value of one.

    tyro names such a word only if no required flag is missing.
    """
    settings = {x.flag: x for x in settings_of(cls)}
    if any(is_positional(x) for x in settings.values()):
        return
    capacity = 0.0  # how many words may still follow the last flag as its values
    for word in argv:
        flag, _, value = word.partition("=")
        flag = flag.replace("_", "-")
        if word.startswith("--") and len(word) > 2:
            setting = settings.get(flag)
            capacity = 1
            if value or setting is None or setting.type is bool:  # None: --no-NAME
                capacity = 0
            elif get_origin(setting.type) in (list, tuple):
                capacity = math.inf
        elif capacity == 0:
            hint = "a recipe stands before all flags" if word.endswith(".toml") else "see --help"
            raise UserError(f"{prog}: {word!r} is neither a flag nor the value of one; {hint}",
                            FLAGS)
        else:
            capacity -= 1


def _nearest(name: str, names: Iterable[str]) -> str:
    names = list(names)
    longer = [x for x in names if name.startswith(f"{x}_")]  # model_name_or_path: model
    close = difflib.get_close_matches(name, names, 1, 0.5) or longer
    if close:
        return f"did you mean {close[0]}?"
    return f"known are {', '.join(names)}"


def _type_name(cls: type, key: str) -> str:
    kind = next(x.type for x in settings_of(cls) if x.name == key)
    return getattr(kind, "__name__", str(kind)) if isinstance(kind, type) else str(kind)


def _parse(cls: type[T], args: list[str], prog: str, default: T | None, where: str) -> T:
    """Let tyro read flags; the box that it prints on an error becomes one line."""
    import tyro

    output = io.StringIO()
    # tyro draws the box as wide as the terminal; this is wide enough for one line
    os.environ.setdefault("COLUMNS", "110")
    options = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            return tyro.cli(cls, args=args, prog=f"python {prog}", **options)
    except SystemExit:
        box = [x.strip(" │|") for x in output.getvalue().splitlines()[1:]]  # without its title
        text = itertools.dropwhile(_is_rule, box)
        reason = " ".join(itertools.takewhile(lambda x: not _is_rule(x), text))
        raise UserError(f"{where}{reason} (see --help)", FLAGS) from None


def _is_rule(line: str) -> bool:
    """Whether a line of tyro's box is only drawing, in Unicode or in ASCII."""
    return not line.strip("─-+╭╮╰╯ ")
