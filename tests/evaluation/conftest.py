"""What the tests of evaluation share: a tiny model, pairs, and the translations of two systems."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import tiny
from helpers.evaluations import ENG, KIN


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A tiny model, pairs, and translations of two systems."""
    home = tmp_path_factory.mktemp("suites")
    tiny.folder(home / "model", max_position_embeddings=512)
    rows = [f"{e}\t{k}" for e, k in zip(ENG, KIN, strict=True)] * 4
    (home / "pairs.tsv").write_text("eng\tkin\n" + "".join(x + "\n" for x in rows))
    (home / "good.txt").write_text("".join(k.replace("mu", "ku") + "\n" for k in KIN * 4))
    (home / "poor.txt").write_text("".join(" ".join(k.split()[::2]) + "\n" for k in KIN * 4))
    (home / "short.txt").write_text("".join(k + "\n" for k in KIN * 4)[:-40].rsplit("\n", 1)[0])
    return home


@pytest.fixture
def no_spbleu(tmp_path, monkeypatch) -> None:
    """sacrebleu's folder without spBLEU's tokenizer."""
    import sacrebleu.utils

    monkeypatch.setattr(sacrebleu.utils, "SACREBLEU_DIR", str(tmp_path))
