"""An old Python is refused in one line before anything that it cannot import or parse."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.paths import ROOT

COMMANDS = ["train.py", "sample.py", "eval.py", "prepare.py", "export.py"]
FAKE = """if True:
    import runpy, sys
    sys.version_info = (3, 10, 4, "final", 0)
    sys.modules.update(dict.fromkeys(("tomllib", "torch", "numpy", "tyro")))  # imports fail
    sys.path.insert(0, sys.argv[1])
    sys.argv = [sys.argv[2]]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def old_pythons() -> list[str]:
    """Pythons on this machine that are older than 3.11, one of each version."""
    candidates = sorted((Path.home() / ".pyenv/versions").glob("3.[89].*/bin/python"))
    candidates += sorted((Path.home() / ".pyenv/versions").glob("3.10.*/bin/python"))
    candidates += [shutil.which(x) for x in ("python3.8", "python3.9", "python3.10")]
    return [str(x) for x in candidates if x and subprocess.run(
        [x, "--version"], capture_output=True).returncode == 0]


def assert_refused(process: subprocess.CompletedProcess) -> None:
    assert process.returncode == 2 and process.stdout == ""
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: Python 3.11 or newer is needed, this is Python 3.")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_version_that_is_too_old_is_one_line_before_any_other_import(command):
    assert_refused(subprocess.run([sys.executable, "-c", FAKE, ROOT, ROOT / command],
                                  capture_output=True, text=True))


@pytest.mark.parametrize("python", old_pythons())
@pytest.mark.parametrize("command", COMMANDS)
def test_a_real_old_python_says_it_in_one_line(python, command):
    assert_refused(subprocess.run([python, ROOT / command, "--help"], capture_output=True,
                                  text=True))
