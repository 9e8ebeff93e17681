"""Settings: their order, their origins, and one line for what cannot be read."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import settings as settings_of_test
from hypothesis import strategies as st

from runtime import flags
from runtime.console import FLAGS, UserError
from runtime.flag_help import help_text
from runtime.paths import ROOT
from runtime.setting_metadata import Group, bounded, settings_of
from training.settings import Settings as TrainSettings


@dataclass
class Settings:
    """Something to set."""

    steps: int = 3
    lr: float = 1e-3
    name: str = "x"
    kind: Literal["a", "b"] = "a"
    data: list[str] = field(default_factory=list)
    fast: bool = False


def test_flags_go_over_recipes_and_recipes_over_defaults_left_to_right(tmp_path):
    (tmp_path / "1.toml").write_text("steps = 5\nlr = 1\nfast = true\n")
    (tmp_path / "2.toml").write_text('lr = 2e-5\ndata = ["p", "q"]\n')
    first, second = str(tmp_path / "1.toml"), str(tmp_path / "2.toml")
    settings, origins = flags.read(Settings, [first, second, "--data", "z", "--no-fast"], "x.py")
    assert settings == Settings(steps=5, lr=2e-5, data=["z"], fast=False)
    assert origins == {"steps": first, "lr": second, "name": "default", "kind": "default",
                       "data": "flag", "fast": "flag"}


@pytest.mark.parametrize(
    "argv, word",
    [(["--stepps", "3"], "did you mean steps"), (["--steps", "three"], "steps"),
     (["--kind", "c"], "'a', 'b'"), (["--steps", "3", "4"], "4"),
     (["none.toml"], "no such recipe")],
)
def test_what_cannot_be_read_is_one_line(argv, word):
    with pytest.raises(UserError, match=word) as e:
        flags.read(Settings, argv, "x.py")
    assert e.value.code == FLAGS and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "line, word",
    [('steps = "10"', "expected int"), ("name = 5", "expected str"),
     ("stps = 1", "did you mean steps"), ("steps = 1.5", "steps"), ("steps = ", "TOML"),
     ("data = 3", "expected list")],
)
def test_a_recipe_is_held_to_its_types(tmp_path, line, word):
    (tmp_path / "r.toml").write_text(line + "\n")
    with pytest.raises(UserError, match=word) as e:
        flags.read(Settings, [str(tmp_path / "r.toml")], "x.py")
    assert "r.toml" in str(e.value) and e.value.code == FLAGS


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12).filter(
    lambda x: not x.startswith("-"))


@settings_of_test(deadline=None)  # other processes may be busy
@given(
    st.builds(Settings, st.integers(-9, 99), st.floats(allow_nan=False, allow_infinity=False), TEXT,
              st.sampled_from("ab"), st.lists(TEXT, max_size=3), st.booleans())
)
def test_settings_written_as_a_recipe_come_back(tmp_path_factory, settings):
    path = tmp_path_factory.mktemp("r") / "r.toml"
    path.write_text(flags.to_toml(settings), encoding="utf-8")
    assert flags.read(Settings, [str(path)], "x.py", check=False)[0] == settings


@dataclass
class Required:
    """Something with a setting that must be given."""

    model: str
    out: str
    rows: float | None = None
    data: list[str] = field(default_factory=list)
    fast: bool = False


@pytest.mark.parametrize(
    "argv",
    [["stray"], ["stray", "--model", "x"], ["--model", "x", "stray"], ["--model=x", "stray"],
     ["--fast", "stray"], ["--no-fast", "stray"], ["--rows", "3", "stray"],
     ["--data", "a", "b", "--fast", "stray"], ["--model", "x", "--out", "y", "stray"]],
)
def test_a_stray_word_is_named_even_if_a_required_flag_is_missing(argv):
    with pytest.raises(UserError, match=r"^x[.]py merge: 'stray' is neither") as e:
        flags.read_subcommand({"merge": Required}, ["merge", *argv], "x.py", "")
    assert e.value.code == FLAGS


def test_a_recipe_behind_a_flag_is_named():
    with pytest.raises(UserError, match=r"'late\.toml' .*; a recipe stands before all flags"):
        flags.read(Settings, ["--fast", "late.toml"], "x.py")


@pytest.mark.parametrize(
    "argv",
    [["--steps", "-3"], ["--lr", "-1e-3"], ["--name", "-"], ["--name", ""], ["--name=a=b"],
     ["--data", "a", "b", "-"], ["--data", "--fast"], ["--name", "late.toml"]],
)
def test_the_values_of_flags_are_not_stray_words(argv):
    flags.read(Settings, argv, "x.py")


def test_the_first_argument_names_a_subcommand(capsys):
    name, settings = flags.read_subcommand(
        {"one": Settings}, ["one", "--steps", "4"], "x.py", "about"
    )
    assert name == "one" and settings.steps == 4
    with pytest.raises(UserError, match="did you mean one"):
        flags.read_subcommand({"one": Settings}, ["onee"], "x.py", "about")
    with pytest.raises(SystemExit) as e:
        flags.read_subcommand({"one": Settings}, ["--help"], "x.py", "about")
    assert e.value.code == 0 and "Something to set." in capsys.readouterr().out


def upgrade_mode(value: object) -> dict[str, object]:
    if value == "old":
        return {"kind": "b"}
    raise UserError("mode: only an older version can read it", FLAGS)


@dataclass
class Declared:
    """What may be declared beside fields."""

    RENAMED: ClassVar[dict] = {"count": "steps", "mode": upgrade_mode}
    HINTS: ClassVar[dict[str, str]] = {"max_steps": "--steps", "packing": "rows are always packed"}

    steps: Annotated[int, Group("Most used")] = bounded(3, at_least=1)
    """How long to train, in steps."""
    kind: Literal["a", "b"] = "a"
    """A choice."""
    dropout: Annotated[float, Group("Adapter")] = bounded(0.0, at_least=0, below=1)
    """The share
    of zeros."""
    rows: int | Literal["auto"] = bounded(4, at_least=1)
    """Rows."""
    clip: float = bounded(1.0, above=0, may_be_infinite=True)
    """The largest norm."""
    fast: bool = False
    """Be fast."""


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--dropout", "1.2"], "--dropout 1.2: must be at least 0 and below 1"),
        (["--dropout", "nan"], "--dropout nan: must be at least 0 and below 1"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--rows", "0"], "--rows 0: must be at least 1"),
        (["--clip", "0"], "--clip 0.0: must be above 0"),
    ],
)
def test_a_number_out_of_bounds_is_refused_with_its_own_bounds(argv, message):
    with pytest.raises(UserError) as e:
        flags.read(Declared, argv, "x.py")
    assert str(e.value) == message and e.value.code == FLAGS


def test_numbers_within_bounds_and_words_are_accepted():
    settings, _ = flags.read(
        Declared, ["--rows", "auto", "--clip", "inf", "--dropout", "0.999", "--steps", "1"], "x.py")
    assert settings == Declared(1, "a", 0.999, "auto", math.inf)


def test_a_recipe_out_of_bounds_is_named(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text("dropout = 1.0\n")
    with pytest.raises(UserError, match=r"r\.toml: dropout = 1\.0: must be at least 0 and below 1"):
        flags.read(Declared, [str(recipe)], "x.py")


def test_old_names_in_a_recipe_are_read_and_said_once(tmp_path, capsys):
    recipe = tmp_path / "settings.toml"
    recipe.write_text('count = 7\nmode = "old"\n')
    settings, origins = flags.read(Declared, [str(recipe)], "x.py")
    assert settings == Declared(steps=7, kind="b")
    assert origins["steps"] == origins["kind"] == str(recipe)
    said = capsys.readouterr().err
    assert said.count("count = 7 is now called steps = 7") == 1
    assert said.count('mode = "old" is now called kind = "b"') == 1
    recipe.write_text("mode = 3\n")
    with pytest.raises(UserError, match="only an older version"):
        flags.read(Declared, [str(recipe)], "x.py")


@pytest.mark.parametrize("argv, answer", [
    (["--max-steps", "3"], "unknown setting --max-steps; here it is --steps"),
    (["--max_steps=3"], "here it is --steps"), (["--packing"], "rows are always packed"),
    (["--count", "3"], "here it is --steps"), (["--rows-or-so", "3"], "did you mean rows?")])
def test_names_of_other_trainers_and_old_names_are_answered_with_ours(argv, answer):
    with pytest.raises(UserError, match=answer.replace("?", r"\?")) as e:
        flags.read(Declared, argv, "x.py")
    assert e.value.code == FLAGS


def test_help_shows_groups_flags_values_defaults_bounds_and_texts(capsys):
    with pytest.raises(SystemExit) as e:
        flags.read(Declared, ["--steps", "5", "--help"], "x.py")
    text = capsys.readouterr().out
    assert e.value.code == 0 and text == help_text(Declared, "x.py") + "\n"
    for line in ("usage: python x.py [RECIPE.toml ...] [--FLAG VALUE ...]", "Most used:",
                 "  --steps INT  (default: 3; at least 1)", "      How long to train, in steps.",
                 "  --kind {a,b}  (default: a)", "Adapter:", "      The share of zeros.",
                 "  --rows INT|auto  (default: 4; at least 1)",
                 "  --fast, --no-fast  (default: off)"):
        assert f"\n{line}\n" in f"\n{text}"
    assert text.index("Most used") < text.index("--kind") < text.index("Adapter")


def test_a_setting_has_the_string_under_it_as_its_help():
    assert {x.name: x.help for x in settings_of(Declared)}["dropout"] == "The share of zeros."


COMMANDS = ["train.py", "sample.py", "eval.py", "prepare.py", "export.py"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_prints_its_version(command):
    version = subprocess.run([sys.executable, ROOT / command, "--version"], capture_output=True,
                             text=True, check=True).stdout
    assert version.startswith("kinyarwanda_ft_llm 0.1.0") and version.count("\n") == 1


def test_the_names_of_other_trainers_are_not_ours_and_lead_to_flags_that_exist():
    names = {f.name for f in dataclasses.fields(TrainSettings)}
    for name, answer in TrainSettings.HINTS.items():
        assert name not in names
        for word in answer.split():
            flag = word.strip("().,:;")
            assert not flag.startswith("--") or flag[2:].replace("-", "_") in names, answer
    with pytest.raises(UserError, match=r"--learning-rate; here it is --lr$"):
        flags.read(TrainSettings, ["--learning-rate", "1e-4"], "train.py")
