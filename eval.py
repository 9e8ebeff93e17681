"""Measure a model: bits per byte of any text.

    python eval.py --model out/kin/model --text kin=kin_val.jsonl eng=eng_val.txt --out out/eval

Prints a table and writes OUT/results.json. A figure is worth what it says of how it was made, so
each has a signature that names every choice: what a document is, what stands before it, how long a
context is, which dtype. Figures of one signature on one text compare, whatever the tokenizer.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import config
import log
from log import FLAGS, STORAGE, UserError

VERSION = 1  # of how a figure is computed: one more whenever it would come out otherwise
NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass
class Settings:
    """Measure a model on texts: bits per byte with an interval, as a table and as results.json."""

    model: str = ""
    """A run's folder, a Hugging Face folder, a PEFT adapter, or a hub id (org/name@revision)."""
    text: list[str] = field(default_factory=list)
    """Texts to measure, each NAME=FILE: .txt, .jsonl, .tsv, .parquet, also .gz."""
    documents: Literal["auto", "file", "line", "block"] = "auto"
    """What a document of a .txt is; auto looks at the file. Figures of other documents differ."""
    text_key: str = "text"
    """Where a .jsonl, .tsv or .parquet keeps its text."""
    limit: int = 0
    """Only so many documents of each text: a quick look, marked PARTIAL. 0: all."""
    max_length: int = 0
    """Tokens of context at most; 0: the model's own."""
    out: str = "out/eval"
    """Folder for results.json."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "fp32"
    """Of products; bf16 is faster and moves figures by some thousandths: publish fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


if __name__ == "__main__":  # before torch is loaded, so that --help and a wrong flag answer at once
    SETTINGS, _ = log.run(lambda: config.read(Settings, sys.argv[1:], "eval.py"))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import corpus  # noqa: E402
import tasks  # noqa: E402
import weights  # noqa: E402
from data import sha256  # noqa: E402
from loss import bits_per_byte  # noqa: E402
from model import Llama  # noqa: E402
from ranks import Ranks  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402


@dataclass
class Text:
    """A text to measure: its documents as they stand in the files, cut off at --limit."""

    name: str
    unit: str  # what a document is
    files: list[Path]
    documents: list[str]
    partial: bool


def read_texts(s: Settings) -> list[Text]:
    """The texts of --text, read and checked before any weight is."""
    if not s.text:
        raise UserError("nothing to measure: --text NAME=FILE ...", FLAGS)
    if s.limit < 0:
        raise UserError(f"--limit {s.limit}: expected a number of documents, or 0 for all", FLAGS)
    texts: list[Text] = []
    for item in s.text:
        name, _, spec = item.partition("=")
        if not name or not spec:
            raise UserError(f"--text {item}: expected NAME=FILE, as in kin=kin_val.jsonl", FLAGS)
        if name in (t.name for t in texts):
            raise UserError(f"--text {item}: the name {name} is taken; give each its own", FLAGS)
        files = corpus.files([spec])
        documents = corpus.texts(spec, s.documents, s.text_key)
        partial = 0 < s.limit < len(documents)
        texts.append(Text(name, unit(files, s), files, documents[: s.limit or None], partial))
        log.say(f"{name}: {len(documents)} documents (a document is a {texts[-1].unit})")
    return texts


def unit(files: list[Path], s: Settings) -> str:
    """What a document of these files is, in a word or two."""
    chosen = set()
    for file in files:
        if not file.name.removesuffix(".gz").endswith(".txt"):
            chosen.add(f"record.{s.text_key}")
        else:
            chosen.add(corpus.choose_unit(file) if s.documents == "auto" else s.documents)
    return "+".join(sorted(chosen))


def measure(text: Text, model: Llama, tokenizer: Tokenizer, length: int) -> dict[str, Any]:
    """Bits per byte of one text: a result as results.json keeps it."""
    began = time.perf_counter()
    ids = tokenizer.encode_batch(text.documents)
    n_bytes = np.array([len(document.encode()) for document in text.documents])
    n_tokens = sum(map(len, ids))
    with log.progress(text.name, n_tokens) as move:
        nats = tasks.document_nats(model, ids, tasks.start_token(tokenizer), length, move)
    if not np.isfinite(nats).all():
        raise UserError(f"{text.name}: the model's numbers overflow in {name_of(model)}; "
                        "take --dtype fp32")
    low, high = tasks.interval(nats, n_bytes) or (None, None)
    choices = {
        "unit": text.unit, "start": "eos" if tokenizer.bos is None else "bos", "window": length,
        "dtype": name_of(model), "sum": "fp64", "ci": f"documents,{tasks.RESAMPLES},{tasks.SEED}",
        **({"limit": len(ids)} if text.partial else {}), "version": VERSION}
    return {"suite": f"text:{text.name}", "metric": "bits_per_byte",
            "value": bits_per_byte(float(nats.sum()), int(n_bytes.sum())), "low": low, "high": high,
            "n": len(ids), "signature": "|".join(f"{k}:{v}" for k, v in choices.items()),
            "partial": text.partial, "bytes": int(n_bytes.sum()), "tokens": n_tokens,
            "seconds": round(time.perf_counter() - began, 2),
            "files": [{"path": str(file), "sha256": sha256(file)} for file in text.files]}


def name_of(model: Llama) -> str:
    """The model's compute dtype as --dtype calls it."""
    return NAMES[str(model.compute_dtype).removeprefix("torch.")]


def table(results: list[dict[str, Any]]) -> str:
    """Results for people, a line each."""
    lines = [("text", "bits/byte", "95 % interval", "documents", "bytes", "tokens", "tokens/byte",
              "seconds")]
    for r in results:
        interval = "-" if r["low"] is None else f"{r['low']:.4f} - {r['high']:.4f}"
        name = r["suite"].removeprefix("text:") + " (PARTIAL)" * r["partial"]
        lines.append((name, f"{r['value']:.4f}", interval, f"{r['n']:,}", f"{r['bytes']:,}",
                      f"{r['tokens']:,}", f"{r['tokens'] / r['bytes']:.4f}", f"{r['seconds']:.1f}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) if i else cell.ljust(w)
                               for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
                     for line in lines)


def main(s: Settings) -> None:
    """Read the texts, load the model, measure, print, write."""
    if not s.model:
        raise UserError("name a model: --model FOLDER or a hub id", FLAGS)
    texts = read_texts(s)
    file = Path(s.out) / "results.json"
    aside = file.with_suffix(f".tmp{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside.touch()  # now, not after an hour of measuring
    except OSError as e:
        raise UserError(f"--out {s.out}: cannot be written ({e.strerror})", STORAGE) from None
    try:
        ranks = Ranks.start(s.device)
        dtype = ranks.compute_dtype(s.dtype)
        model, tokenizer = weights.load(s.model, ranks.device, dtype)
        model.eval().model.compute_dtype = dtype
        context = model.config.max_position_embeddings
        if not 0 <= s.max_length <= context:
            raise UserError(f"--max-length {s.max_length}: expected 1 to {context}, the model's "
                            "context, or 0 for all of it", FLAGS)
        length = s.max_length or context
        settings = {**dataclasses.asdict(s), "dtype": name_of(model), "max_length": length,
                    "device": str(ranks), "torch": torch.__version__,
                    "tokenizer": tokenizer.fingerprint}
        results = [measure(text, model, tokenizer, length) for text in texts]
        found = {"model": s.model, "settings": settings, "results": results}
        aside.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)
    print(log.printable(table(results)))
    if any(t.partial for t in texts):
        print(f"PARTIAL: the first {s.limit} documents only; these figures are not for publishing")
    log.say(f"wrote {file}")


if __name__ == "__main__":
    log.run(lambda: main(SETTINGS))
