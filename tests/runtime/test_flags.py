"""Settings: their order, their origins, and one line for what cannot be read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import flags as config
from runtime.console import FLAGS, UserError


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
    settings, origins = config.read(Settings, [first, second, "--data", "z", "--no-fast"], "x.py")
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
        config.read(Settings, argv, "x.py")
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
        config.read(Settings, [str(tmp_path / "r.toml")], "x.py")
    assert "r.toml" in str(e.value) and e.value.code == FLAGS


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12).filter(
    lambda x: not x.startswith("-"))


@given(
    st.builds(Settings, st.integers(-9, 99), st.floats(allow_nan=False, allow_infinity=False), TEXT,
              st.sampled_from("ab"), st.lists(TEXT, max_size=3), st.booleans())
)
def test_settings_written_as_a_recipe_come_back(tmp_path_factory, settings):
    path = tmp_path_factory.mktemp("r") / "r.toml"
    path.write_text(config.to_toml(settings), encoding="utf-8")
    assert config.read(Settings, [str(path)], "x.py")[0] == settings


def test_a_command_picks_its_part(capsys):
    name, settings = config.pick({"one": Settings}, ["one", "--steps", "4"], "x.py", "about")
    assert name == "one" and settings.steps == 4
    with pytest.raises(UserError, match="did you mean one"):
        config.pick({"one": Settings}, ["onee"], "x.py", "about")
    with pytest.raises(SystemExit) as e:
        config.pick({"one": Settings}, ["--help"], "x.py", "about")
    assert e.value.code == 0 and "Something to set." in capsys.readouterr().out
