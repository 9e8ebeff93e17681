"""Files of --data that train.py prepares itself."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from data import Bin
from helpers import tiny
from runtime.paths import ROOT
from training.datasets import prepare_files


def files_of(kind: str, folder: Path) -> Path:
    """Thirty examples of a kind in a file."""
    pairs = [(f"{tiny.SENTENCES[i % 5]} {i}", f"{tiny.SENTENCES[5 + i % 4]} {i}")
             for i in range(30)]
    if kind == "mt":
        file = folder / "mt.tsv"
        file.write_text("eng\tkin\n" + "".join(f"{a}\t{b}\n" for a, b in pairs))
        return file
    if kind == "text":
        file = folder / "text.txt"
        file.write_text("".join(f"{a}\n" for a, _ in pairs))
        return file
    rows = [{"prompt": a, "chosen": b, "rejected": b[:-3]} for a, b in pairs]
    if kind == "chat":
        rows = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
                for a, b in pairs]
    file = folder / f"{kind}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("kind, is_val", [
    ("text", False), ("text", True), ("chat", False), ("mt", False), ("pairs", False)])
def test_a_bin_made_by_train_py_equals_that_of_the_command_it_prints(
        kind, is_val, tmp_path, capsys):
    model = tiny.folder(tmp_path / "model", "llama32", max_position_embeddings=256)
    file = files_of(kind, tmp_path)
    prepare_files(kind, str(file), model, tmp_path / "bin", 256, is_val)
    lines = capsys.readouterr().err.splitlines()
    (command,) = (line for line in lines if line.startswith("preparing: "))
    argv = shlex.split(command.removeprefix("preparing: "))
    assert argv[:2] == ["python", "prepare.py"]
    argv[argv.index("--out") + 1] = str(tmp_path / "again")
    subprocess.run([sys.executable, *argv[1:]], cwd=ROOT, check=True, capture_output=True)
    assert Bin(tmp_path / "bin").meta == Bin(tmp_path / "again").meta
