"""Text to token bins here against datasets.map with the same tokenizer; and the loader behind it.

    python -m bench.prepare [--quick] [--cases documents lines llama3 gigabyte loader] [--write]

By one process and two, into a bin, and by datasets.map twice (tokenise, group into rows) into its
cache; both must give the same number of tokens. Ours is timed as the command it is, Python's start
and its imports included; the peer without Python's start. Every text stands in a file once, for a
tokenizer with a memory for words is the faster the more is said again. documents: news and laws,
some kilobytes each; lines: all there is, mostly single sentences; llama3: the documents with LLaMA
3's tokenizer.json in place of a SentencePiece BPE learned from them. gigabyte: the texts over and
over to 1 GB, and the most memory any one process held. loader: packed rows a second out of the bin.

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
BESIDE = ["documents", "lines", "llama3"]  # what both sides prepare
CASES = [*BESIDE, "gigabyte", "loader"]
GIGABYTE = {"full": 1000, "quick": 100, "tiny": 2}  # MB
DATA = ROOT.parent / "shared/data"
LLAMA3 = DATA / "tokenizers/llama3/tokenizer.json"
LONG = ["kin_news.jsonl", "kin_gov.jsonl"]


def texts(kind: str, folder: str) -> list[str]:
    """Texts, each once: `documents`, `lines`, or, `tiny`, a few."""
    import corpus

    if not (DATA / "cpt").is_dir():
        from kinyarwanda import demo

        return list(dict.fromkeys(corpus.texts(demo.texts(Path(folder), 1)["kin"], "line")))
    files = [DATA / "cpt" / x for x in LONG] if kind != "lines" else \
        [x for x in sorted((DATA / "cpt").iterdir()) if x.suffix in (".txt", ".jsonl")]
    pieces = [x.text for file in files for x in corpus.read(
        file, key="content" if "folklore" in file.name else "text")]
    return list(dict.fromkeys(x for x in pieces if x.strip()))[: 200 if kind == "tiny" else None]


def write_text(file: str, kind: str, mb: int, folder: str) -> str:
    """A .jsonl of texts, each once, or over and over with a number before each to `mb` MB, and a
    tokenizer learned from them beside it; what the text is."""
    from tokenizer import learn

    found = texts(kind, folder)
    real = (DATA / "cpt").is_dir()
    learn(found[:20000], 8000 if real else 600, Path(folder))
    size = n = 0
    with open(file, "wb") as f:
        while size < mb * 10**6 if mb else n < len(found):
            text = f"{n}. {found[n % len(found)]}" if mb else found[n]
            size += f.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
            n += 1
    what = "../shared/data/cpt" if real else "sentences of the demo's grammar"
    return f"{size / 1e6:.1f} MB, {n:,} texts of {what}"


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
    begun = time.perf_counter()
    import datasets

    if tokenizer.endswith(".json"):
        import tokenizers

        tok = tokenizers.Tokenizer.from_file(tokenizer)
        begin, end = (tok.token_to_id(f"<|{x}_of_text|>") for x in ("begin", "end"))

        def encoded(texts: list[str]) -> list[list[int]]:
            return [x.ids for x in tok.encode_batch_fast(texts, add_special_tokens=False)]
    else:
        import sentencepiece

        begin, end = 1, 2
        encoded = sentencepiece.SentencePieceProcessor(f"{tokenizer}/tokenizer.model").encode

    def encode(batch: dict) -> dict:
        return {"input_ids": [[begin, *ids, end] for ids in encoded(batch["text"])]}

    def group(batch: dict) -> dict:
        flat = [i for ids in batch["input_ids"] for i in ids]
        return {"input_ids": [flat[i : i + 1024] for i in range(0, len(flat), 1024)]}

    with tempfile.TemporaryDirectory() as cache:
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


def beside(s: Settings, case: str, folder: str) -> str:
    """Both sides on one text, by one process and two."""
    file = f"{folder}/{case}.jsonl"
    kind = "tiny" if s.size == "tiny" else "lines" if case == "lines" else "documents"
    what = child(HERE, "write_text", file, kind, 0, folder)
    tokenizer = str(LLAMA3) if case == "llama3" else folder
    mb = Path(file).stat().st_size / 1e6
    sides = {f"{side}, {n} process{'es' if n > 1 else ''}": (name, [file, tokenizer, n])
             for n in (1, 2) for side, name in (("ours", "ours"), ("datasets.map", "theirs"))
             if side == "ours" or installed("datasets")}
    runs, rows = in_turn(HERE, s.rounds, sides), []
    for side, done in runs.items():
        took = Spread.of([x["seconds"] for x in done])
        other = runs.get(side.replace("ours", "datasets.map"))
        times = f"{Spread.of([x['seconds'] for x in other]).median / took.median:.2f}" if other \
            else "-"
        rows.append([side, f"{mb / took.median:.1f}", f"{took.least:.1f} to {took.most:.1f}",
                     times, f"{max(x['gb'] for x in done):.2f}",
                     f"{done[0]['disk'] / 1e6:.0f}", f"{done[0]['tokens']:,}"])
    if len({x["tokens"] for done in runs.values() for x in done}) > 1:
        s.faults.append(f"{case}: the sides give different numbers of tokens")
    return f"{case}: {what}.\n\n" + table(
        ["", "MB/s", "seconds", "times datasets.map", "peak GB of a process", "MB on disk",
         "tokens"], rows)


def job(s: Settings) -> str:
    cases, parts = s.cases or CASES, []
    if "llama3" in cases and (s.size == "tiny" or not LLAMA3.exists()):
        cases = [x for x in cases if x != "llama3"]
        parts.append("llama3: left out, for the size is tiny or its tokenizer is not at hand.")
    with tempfile.TemporaryDirectory() as folder:
        parts += [beside(s, case, folder) for case in cases if case in BESIDE]
        file, kind = f"{folder}/text.jsonl", "tiny" if s.size == "tiny" else "documents"
        if "loader" in cases:
            child(HERE, "write_text", file, kind, 0, folder)
            found = child(HERE, "load", f"{folder}/bin", file, folder)
            parts.append(f"The loader gives {found['rows']:,.0f} packed rows of 1,024 tokens a "
                         "second; a training step asks for a few.")
        if "gigabyte" in cases:
            mb = GIGABYTE[s.size]
            child(HERE, "write_text", file, kind, mb, folder)
            done = child(HERE, "ours", file, folder, 2)
            parts.append(f"{mb:,} MB by two processes: {mb / done['seconds']:.1f} MB/s, no process "
                         f"above {done['gb']:.2f} GB.")
    return "\n\n".join([*parts, limits.words(limits.measured(s.size), "datasets", "sentencepiece",
                                             "tokenizers")])


if __name__ == "__main__":
    sys.exit(main(HERE, "Preparing text", {"write_text": write_text, "ours": ours, "theirs": theirs,
                                           "load": load}, job, CASES, 2))
