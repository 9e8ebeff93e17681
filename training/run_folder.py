"""What a run's folder says about the run: run.json, whether it is finished, how to train further.

This module does not import torch, because flags are checked before torch is loaded.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_run_json(out: Path) -> dict[str, Any]:
    """The content of a run's run.json; empty if there is none, or if it is damaged. `--resume`
    writes it again."""
    file = out / "run.json"
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def is_finished(out: Path) -> bool:
    """Whether a run has written its result completely."""
    return "finished" in read_run_json(out) and (out / "model").exists()


def checkpointed_settings(out: Path) -> Iterator[dict[str, Any]]:
    """The settings in the run's checkpoints, newest first; damaged checkpoints have none."""
    for file in sorted(out.glob("checkpoints/step-*/state.json"), reverse=True):
        try:
            manifest = json.loads((file.parent / "manifest.json").read_text(encoding="utf-8"))
            content = file.read_bytes()
            settings = json.loads(content).get("settings")
            is_whole = hashlib.sha256(content).hexdigest() == manifest["state.json"][1]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            continue
        if is_whole and isinstance(settings, dict):
            yield settings


def continuation_command(out: Path) -> str:
    """The command of a new run with the same settings that starts from this run's model."""
    return shlex.join(["python", "train.py", str(out / "settings.toml"), "--model",
                       str(out / "model"), "--out", f"{out}-2"])
