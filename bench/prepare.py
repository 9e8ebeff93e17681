"""Text to token bins here against datasets.map with the same tokenizer; and the loader behind it.

    python -m bench.prepare [--quick] [--cases encode gigabyte loader] [--write]

encode: the same file, by one process and two, into a bin, and by datasets.map twice (tokenise,
group into rows) into its cache; both must give the same number of tokens. gigabyte: a corpus of
1 GB, and the most memory any one process held. loader: packed rows a second out of the bin.

The text is ../shared/data/cpt where it is there, else sentences of the demo's grammar.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import ROOT, Settings, Spread, child, in_turn, installed, limits, main, table

HERE = "bench.prepare"
SIZES = {"full": 50, "quick": 10, "tiny": 1}  # MB of text
GIGABYTE = {"full": 1000, "quick": 100, "tiny": 2}  # MB
REAL = ROOT.parent / "shared/data/cpt"


def write_text(file: str, mb: int, folder: str) -> str:
    """A .jsonl of `mb` MB, every document different, and a tokenizer of 8,000 pieces beside it;
    what the text is."""
    import corpus
    from tokenizer import learn

    if REAL.is_dir():
        real = [t for x in ("news", "gov") for t in corpus.texts(REAL / f"kin_{x}.jsonl")]
        what = "news and laws of ../shared/data/cpt"
    else:
        from kinyarwanda import demo

        made = demo.texts(Path(folder), 1)["kin"]
        real, what = corpus.texts(made, "line"), "sentences of the demo's grammar"
    learn(real[:20000], 8000 if REAL.is_dir() else 600, Path(folder))
    size = n = 0
    with open(file, "w", encoding="utf-8") as f:
        while size < mb * 10**6:
            line = json.dumps({"text": f"{n}. {real[n % len(real)]}"}, ensure_ascii=False) + "\n"
            size, n = size + f.write(line), n + 1  # characters: nearly bytes
    return f"{what}, over and over with a number before each: {n:,} documents"


def ours(file: str, tokenizer: str, processes: int) -> dict[str, Any]:
    """prepare.py itself, in a process of its own: MB/s, tokens, bytes on disk."""
    with tempfile.TemporaryDirectory() as out:
        begun = time.perf_counter()
        subprocess.run([sys.executable, "prepare.py", "text", file, "--tokenizer", tokenizer,
                        "--normalise", "none", "--processes", str(processes), "--out",
                        f"{out}/bin"], cwd=ROOT, check=True, capture_output=True)
        took = time.perf_counter() - begun
        meta = json.loads(Path(out, "bin/meta.json").read_text(encoding="utf-8"))
        return {"seconds": took, "tokens": meta["tokens"], "disk": weight(Path(out, "bin"))}


def theirs(file: str, tokenizer: str, processes: int) -> dict[str, Any]:
    """The usual two maps: tokenise with BOS and EOS, group into rows of 1,024."""
    import datasets
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=f"{tokenizer}/tokenizer.model")

    def encode(batch: dict) -> dict:
        return {"input_ids": [[1, *ids, 2] for ids in sp.encode(batch["text"])]}

    def group(batch: dict) -> dict:
        flat = [i for ids in batch["input_ids"] for i in ids]
        return {"input_ids": [flat[i : i + 1024] for i in range(0, len(flat), 1024)]}

    with tempfile.TemporaryDirectory() as cache:
        begun = time.perf_counter()
        read = datasets.load_dataset("json", data_files=file, cache_dir=cache, split="train")
        n = processes if processes > 1 else None
        ids = read.map(encode, batched=True, num_proc=n, remove_columns=["text"])
        packed = ids.map(group, batched=True, num_proc=n)
        took = time.perf_counter() - begun
        return {"seconds": took, "tokens": sum(map(len, packed["input_ids"])),
                "disk": weight(Path(cache))}


def load(bin: str, file: str, tokenizer: str) -> dict[str, Any]:
    """Rows of 1,024 a second that the loader gives, out of a bin made of the file."""
    import numpy as np

    from data import Bin, Loader, Source

    subprocess.run([sys.executable, "prepare.py", "text", file, "--tokenizer", tokenizer,
                    "--normalise", "none", "--out", bin], cwd=ROOT, check=True, capture_output=True)
    opened = Bin(bin)
    loader = Loader([Source("text", opened, np.arange(len(opened)), 1.0)], 1024, 8, 1)
    loader.next()
    begun, n = time.perf_counter(), 0
    while time.perf_counter() - begun < 1:
        loader.next()
        n += 8
    return {"rows": n / (time.perf_counter() - begun)}


def weight(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def job(s: Settings) -> str:
    cases, parts = s.cases or ["encode", "gigabyte", "loader"], []
    with tempfile.TemporaryDirectory() as folder:
        file, tokenizer = f"{folder}/text.jsonl", f"{folder}/tokenizer"
        mb = SIZES[s.size]
        what = child(HERE, "write_text", file, mb, tokenizer)
        parts.append(f"{mb} MB: {what}; a SentencePiece BPE learned from it.")
        if "encode" in cases:
            sides = {f"{side}, {n} process{'es' if n > 1 else ''}": (name, [file, tokenizer, n])
                     for n in (1, 2)
                     for side, name in (("ours", "ours"), ("datasets.map", "theirs"))
                     if side == "ours" or installed("datasets")}
            runs = in_turn(HERE, s.rounds, sides)
            rows = []
            for side, done in runs.items():
                took = Spread.of([x["seconds"] for x in done])
                rows.append([side, f"{mb / took.median:.1f}", f"{took.least:.1f} to "
                             f"{took.most:.1f}", f"{max(x['gb'] for x in done):.2f}",
                             f"{done[0]['disk'] / 1e6:.0f}", f"{done[0]['tokens']:,}"])
            if len({x["tokens"] for done in runs.values() for x in done}) > 1:
                s.faults.append("the sides give different numbers of tokens")
            parts.append(table(["", "MB/s", "seconds", "peak GB of a process", "MB on disk",
                                "tokens"], rows))
        if "loader" in cases:
            found = child(HERE, "load", f"{folder}/bin", file, tokenizer)
            parts.append(f"The loader gives {found['rows']:,.0f} packed rows of 1,024 tokens a "
                         "second; a training step asks for a few.")
        if "gigabyte" in cases:
            mb = GIGABYTE[s.size]
            child(HERE, "write_text", file, mb, tokenizer)
            done = child(HERE, "ours", file, tokenizer, 2)
            parts.append(f"{mb:,} MB by two processes: {mb / done['seconds']:.1f} MB/s, no process "
                         f"above {done['gb']:.2f} GB.")
    return "\n\n".join([*parts, limits.words(limits.measured(s.size), "datasets", "sentencepiece")])


if __name__ == "__main__":
    sys.exit(main(HERE, "Preparing text", {"write_text": write_text, "ours": ours, "theirs": theirs,
                                           "load": load}, job, ["encode", "gigabyte", "loader"], 2))
