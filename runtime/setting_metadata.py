"""What a settings class declares beside its fields: help texts, bounds and groups of --help.

    @dataclass
    class Settings:
        model: Annotated[str, Group("Most used")] = "demo"
        '''The string under a field is its help.'''
        seed: int = bounded(1, at_least=0)
        lora_rank: Annotated[int, Group("LoRA")] = bounded(16, at_least=1)
        lora_dropout: float = bounded(0.0, at_least=0, below=1)

A class may also have two tables, as class variables:

- `RENAMED`: old names in recipes and settings.toml. Each leads to the new name, or to a function
  that takes the old value and returns the new settings, or raises a UserError.
- `HINTS`: names that other trainers use. Each leads to our flag ("--lr"), or to a sentence.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Group:
    """The heading under which --help lists this field and those after it."""

    title: str


@dataclass(frozen=True)
class Bounds:
    """The interval that a number must lie in."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    may_be_infinite: bool = False

    def __contains__(self, x: float) -> bool:
        return ((self.at_least is None or x >= self.at_least)
                and (self.above is None or x > self.above)
                and (self.at_most is None or x <= self.at_most)
                and (self.below is None or x < self.below))

    def __str__(self) -> str:
        limits = {"at least": self.at_least, "above": self.above,
                  "at most": self.at_most, "below": self.below}
        return " and ".join(f"{name} {x:g}" for name, x in limits.items() if x is not None)


def bounded(default: Any, **bounds: Any) -> Any:
    """A dataclass field with a default and `Bounds`."""
    return field(default=default, metadata={"bounds": Bounds(**bounds)})


@dataclass(frozen=True)
class Setting:
    """A field of a settings class, with its bounds, group and help text."""

    name: str
    type: Any  # without Annotated
    default: Any  # dataclasses.MISSING where one must be given
    help: str
    group: str
    bounds: Bounds | None
    metadata: tuple[Any, ...]

    @property
    def flag(self) -> str:
        return flag_name(self.name)


def flag_name(name: str) -> str:
    """The flag of a setting: `lora_rank` -> `--lora-rank`."""
    return "--" + name.replace("_", "-")


def settings_of(cls: type) -> list[Setting]:
    """The settings of a class, in the order of its fields."""
    hints, texts, group = get_type_hints(cls, include_extras=True), docstrings(cls), "Settings"
    settings = []
    for f in dataclasses.fields(cls):
        kind, metadata = hints[f.name], ()
        if get_origin(kind) is Annotated:
            kind, *metadata = get_args(kind)
        group = next((x.title for x in metadata if isinstance(x, Group)), group)
        bounds = f.metadata.get("bounds")
        default = f.default
        if f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        settings.append(Setting(f.name, kind, default, texts.get(f.name, ""), group, bounds,
                                tuple(metadata)))
    return settings


@functools.cache
def docstrings(cls: type) -> dict[str, str]:
    """The string that stands under each field, by the field's name."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    return dict(_strings_under_fields(body.body))


def _strings_under_fields(lines: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for line, following in itertools.pairwise(lines):
        if isinstance(line, ast.AnnAssign) and isinstance(following, ast.Expr):
            text = getattr(following.value, "value", None)
            if isinstance(text, str):
                yield line.target.id, " ".join(text.split())
