"""A run's own files are damaged: --resume makes them again, or ends in one line."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from helpers.train_runs import (
    assert_same_run,
    make_settings,
    read_losses,
    run_ranks,
    send_signal_at,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

SHAPE = {"steps": 4, "save_every": 2, "eval_every": 2, "tokens_per_step": 64}
MADE_AGAIN = [("settings.toml", "missing"), ("settings.toml", "empty"), ("settings.toml", "cut"),
              ("settings.toml", "zeros"), ("run.json", "cut"), ("run.json", "zeros"),
              ("samples.txt", "bytes"), ("samples.txt", "missing"), ("metrics.jsonl", "zeros")]
ONE_LINE = [("metrics.jsonl", "folder"), ("run.json", "folder"), ("samples.txt", "folder"),
            ("settings.toml", "folder")]
QUICK = [("settings.toml", "cut"), ("metrics.jsonl", "zeros"), ("run.json", "folder")]


def slow_but(quick: list, damages: list) -> list:
    """The damages as parameters of a test, all but the quick ones marked slow."""
    return [pytest.param(*x, marks=[] if x in quick else [pytest.mark.slow]) for x in damages]


@pytest.fixture(scope="module")
def interrupted(workspace: Path) -> Path:
    """The folder of a run that SIGTERM ended after step 3."""
    run_ranks(make_settings(workspace, "undamaged", **SHAPE))
    run_ranks(make_settings(workspace, "interrupted", **SHAPE), codes={143},
              during=send_signal_at(3, number=signal.SIGTERM))
    return workspace / "interrupted"


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how != "missing":
        file.write_bytes({"empty": b"", "cut": content[: len(content) // 2] + b'"',
                          "zeros": content + b"\0" * 64 + b"\n",
                          "bytes": b"\xff\xfe" + content}[how])


@pytest.mark.parametrize(("name", "how"), slow_but(QUICK, MADE_AGAIN))
def test_a_damaged_file_is_made_again_and_the_run_ends_as_it_would_have(interrupted, name, how):
    out = interrupted.with_name(f"{name}-{how}")
    shutil.copytree(interrupted, out)
    damage(out / name, how)
    text = run_ranks(make_settings(out.parent, out.name, resume=True, **SHAPE))
    assert "Traceback" not in text
    assert_same_run(out, interrupted.with_name("undamaged"), steps=4)
    assert len(read_losses(out)) == 4


@pytest.mark.parametrize(("name", "how"), slow_but(QUICK, ONE_LINE))
def test_what_cannot_be_made_again_is_one_line(interrupted, name, how):
    out = interrupted.with_name(f"{name}-{how}")
    shutil.copytree(interrupted, out)
    damage(out / name, how)
    text = run_ranks(make_settings(out.parent, out.name, resume=True, **SHAPE), codes={3, 5})
    assert "Traceback" not in text and text.count("error:") == 1
