"""Measure a model: bits per byte of any text.

    python eval.py --model out/kin/model --text kin=kin_val.jsonl eng=eng_val.txt --out out/eval

Prints a table and writes OUT/results.json. A figure is only worth what it says of how it was made, so each
has a signature that names every choice: what a document is, what stands before it, how long a context is,
which dtype. Two figures with the same signature and the same bytes can be compared, whatever the tokenizers.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import config
import log
from log import FLAGS, STORAGE, UserError

VERSION = 1  # of how bits per byte are computed; part of the signature


@dataclass
class Settings:
    """Measure a model on texts: bits per byte with an interval, in a table and in results.json."""

    model: str = ""
    """A run's folder, a Hugging Face folder, a PEFT adapter, or a hub id (org/name@revision)."""
    text: list[str] = field(default_factory=list)
    """Texts to measure, each NAME=FILE: .txt, .jsonl, also .gz."""
    text_key: str = "text"
    """The field of a .jsonl line that holds the text."""
    documents: Literal["auto", "file", "line", "block"] = "auto"
    """What a document of a .txt file is; it stands in the signature."""
    limit: int = 0
    """Only this many documents of each text, for a quick look: the result is PARTIAL. 0: all."""
    max_length: int = 0
    """Tokens of context; 0: the model's own."""
    out: str = "out/eval"
    """Folder for results.json."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "fp32"
    """Of products. bf16 moves a figure by some thousandths: publish with fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


if __name__ == "__main__":  # before torch is loaded, so that --help and a wrong flag answer at once
    SETTINGS, _ = log.run(lambda: config.read(Settings, sys.argv[1:], "eval.py"))
