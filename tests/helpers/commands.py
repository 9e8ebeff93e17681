"""The commands as a person runs them: in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from runtime.paths import ROOT


def command(program: str, *args: object, cwd: Path = ROOT,
            **more: object) -> subprocess.CompletedProcess[str]:
    """Run `python PROGRAM ARGS ...` on one thread; `more` is for subprocess.run."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(ROOT / program), *map(str, args)], cwd=cwd, env=env,
                          capture_output=True, text=True, **more)
