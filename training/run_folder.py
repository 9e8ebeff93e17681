"""What a run's folder says about the run: run.json, whether it is finished, how to train further.

This module does not import torch, because flags are checked before torch is loaded.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any


def read_run_json(out: Path) -> dict[str, Any]:
    """The content of a run's run.json; empty if there is none."""
    file = out / "run.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def is_finished(out: Path) -> bool:
    """Whether a run has written its result completely."""
    return "finished" in read_run_json(out) and (out / "model").exists()


def continuation_command(out: Path) -> str:
    """The command of a new run with the same settings that starts from this run's model."""
    return shlex.join(["python", "train.py", str(out / "settings.toml"), "--model",
                       str(out / "model"), "--out", f"{out}-2"])
