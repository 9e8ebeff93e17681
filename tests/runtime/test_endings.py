"""How commands end: by signals, with closed or full streams, with odd numbers and paths."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime import console, flags, signals
from runtime.console import FLAGS, UserError
from runtime.paths import ROOT
from runtime.setting_metadata import settings_of

EXTREMES = [1e-300, -1e-300, 1e300, -1e300, 1e-50, 1e39, math.nan, math.inf, -math.inf,
            2**63, 2**64, -2**64, 10**19, 99999999999999999999]


def settings_classes() -> dict[str, type]:
    """The settings of every command and subcommand."""
    prepare, export = (importlib.import_module(x) for x in ("prepare", "export"))
    classes = {x: importlib.import_module(x).Settings for x in ("sample", "eval")}
    classes["train"] = importlib.import_module("training.settings").Settings
    return (classes | {f"prepare {name}": x[0] for name, x in prepare.COMMANDS.items()}
            | {f"export {name}": x for name, x in export.COMMANDS.items()})


def numeric_settings() -> list[tuple[str, type, str, type]]:
    numbers = []
    for command, cls in settings_classes().items():
        for setting in settings_of(cls):
            kinds = str(setting.type)
            if setting.type in (int, float) or "float" in kinds or "int" in kinds.split("| ")[0]:
                numbers.append((command, cls, setting.name, setting.type))
    return numbers


def required(cls: type) -> dict[str, object]:
    """A value for each setting that has no default."""
    import dataclasses

    values = {}
    for setting in settings_of(cls):
        if setting.default is dataclasses.MISSING:
            values[setting.name] = ["x"] if "list" in str(setting.type) else "x"
    return values


def test_every_number_of_every_command_is_finite_and_fits_its_type():
    """An extreme value is refused in one line that names the flag, or may be used as it is."""
    checked = 0
    for command, cls, name, kind in numeric_settings():
        for value in EXTREMES:
            if kind is int and not isinstance(value, int):
                continue
            settings = cls(**{**required(cls), name: value})
            try:
                flags.check_bounds(settings)
            except UserError as e:
                assert e.code == FLAGS and "--" + name.replace("_", "-") in str(e)
                checked += 1
                continue
            allowed = {math.inf} if name == "clip" else set()
            assert value in allowed, (command, name, value)
    assert checked > 150


@pytest.mark.parametrize("line", ['resume = true', 'plan = true', 'help = true', 'model = "--help"',
                                  'data = ["--plan"]', 'model = "-h"', 'help = "x"'])
def test_a_recipe_cannot_ask_for_what_belongs_to_one_command(tmp_path, line):
    from training.settings import Settings

    recipe = tmp_path / "recipe.toml"
    recipe.write_text(line + "\n")
    with pytest.raises(UserError) as e:
        flags.read(Settings, [str(recipe)], "train.py")
    assert e.value.code == FLAGS and str(recipe) in str(e.value)


def test_an_argument_that_is_not_utf_8_is_refused_before_the_work():
    for command in ("train.py", "sample.py", "eval.py", "prepare.py", "export.py"):
        sub = {"prepare.py": ["text"], "export.py": ["check"]}.get(command, [])
        words = [sys.executable, str(ROOT / command), *sub, b"--model", b"out/\xff"]
        process = subprocess.run(words, capture_output=True)
        assert process.returncode == FLAGS and process.stderr.count(b"\n") == 1, process.stderr
        assert b"not UTF-8" in process.stderr


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "2>/dev/full", "1>&- 2>&-"])
def test_a_closed_or_full_stream_ends_with_code_5_and_no_traceback(closed, tmp_path):
    flag = "--nonsense" if "full" in closed else "--version"
    line = f"{sys.executable} {ROOT}/train.py {flag} {closed}"
    process = subprocess.run(line, shell=True, capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 5 and "Traceback" not in process.stdout + process.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train.py", "sample.py", "eval.py", "prepare.py",
                                     "export.py"])
def test_commands_start_where_python_does_not_search_the_scripts_folder(command, tmp_path):
    process = subprocess.run([sys.executable, "-P", str(ROOT / command), "--version"],
                             capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 0, process.stderr


def test_sigterm_ends_prepare_with_143_and_leaves_nothing(tmp_path):
    """It comes while a bin is written, also by worker processes."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Umwana ajya ku ishuri {i}.\n" for i in range(400_000)))
    tokenizer = tmp_path / "tok"
    from helpers import tiny

    tiny.folder(tokenizer, "llama32")
    words = [sys.executable, str(ROOT / "prepare.py"), "text", str(text), "--tokenizer",
             str(tokenizer), "--out", str(tmp_path / "bins/kin"), "--processes", "2",
             "--documents", "line"]
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        restore = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
        with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                              start_new_session=True, preexec_fn=restore) as process:
            try:
                deadline = time.monotonic() + 60
                while not list(tmp_path.glob("bins/.tmp-*")):
                    assert process.poll() is None and time.monotonic() < deadline
                    time.sleep(0.01)
                process.send_signal(number)
                stderr = process.communicate(timeout=60)[1]
                assert process.returncode == code, stderr
                assert "Traceback" not in stderr
                assert not list((tmp_path / "bins").iterdir())
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def test_sigterm_runs_what_finally_and_with_clean_up():
    def command() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            cleaned.append(True)

    cleaned: list[bool] = []
    previous = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as e:
            console.run(command)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert e.value.code == 143 and cleaned and issubclass(signals.Terminated, BaseException)


def test_a_rank_ends_with_the_process_that_started_it(tmp_path):
    program = ("import subprocess, sys, time\n"
               "child = 'import time; from runtime.signals import end_with_parent; "
               "end_with_parent(); print(1, flush=True); time.sleep(60)'\n"
               "p = subprocess.Popen([sys.executable, '-c', child], stdout=subprocess.PIPE)\n"
               "p.stdout.readline(); print(p.pid, flush=True); time.sleep(60)\n")
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE) as parent:
        child = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 2
        while _is_running(child):
            assert time.monotonic() < deadline, "an orphan after two seconds"
            time.sleep(0.01)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
