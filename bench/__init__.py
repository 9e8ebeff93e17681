"""Speed and memory beside the peers: each measurement is a process of its own, in turn.

A slow minute is then slow for all sides. The parent stays small, for a child's peak of memory
begins with its parent's; so nothing heavy is imported at the top of a benchmark.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any


def child(module: str, name: str, *args: object) -> Any:
    """What a function of a benchmark gives in a new process; its complaints are shown if it fails.
    """
    command = [sys.executable, "-m", module, "--child", name, *map(str, args)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} {' '.join(map(str, args))}: exit code {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def answer(functions: dict[str, Callable[..., Any]]) -> bool:
    """Whether this process is such a child; if so the function is run and its result printed."""
    if sys.argv[1:2] != ["--child"]:
        return False
    print(json.dumps(functions[sys.argv[2]](*sys.argv[3:])))
    return True


def peak_gb() -> float:
    """The most memory this process has held, in GB of 2^30 bytes, pages of mapped files included.
    """
    return getrusage(RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
