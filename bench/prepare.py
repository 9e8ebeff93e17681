"""Preparing text as token bins, compared with datasets.map and the same tokenizer; and the loader.

    python -m bench.prepare [--quick] [--write]
        [--cases documents lines llama3 gigabyte loader]

Our side writes a bin with one process and with two. The peer runs datasets.map twice (tokenise,
group into rows) into its cache. Both must give the same number of tokens. Our time is that of the
whole command, with Python's start and imports; the peer's time is without Python's start. With one
process the tokenizer uses all cores, with two processes one thread each, on both sides. Ratios are
to the peer's best row. The peer does not clean the text, so neither do we, except in the rows that
say so (cleaning is our default). Each text is in the file once.

    documents   news and laws of some kilobytes each
    lines       all texts, mostly single sentences
    llama3      the documents with LLaMA 3's tokenizer.json instead of a SentencePiece BPE
    gigabyte    the texts repeated to 1 GB, and the largest memory of a process
    loader      packed rows per second, read from the bin

--quick: documents, loader and 20 MB, unless --cases names others.

The text is ../shared/data/cpt if it exists, else sentences of the demo's grammar.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import ROOT, Settings, Spread, child, in_turn, installed, limits, main, ratio, table
from runtime.tokenizer_threads import set_library_threads

HERE = "bench.prepare"
BESIDE = ["documents", "lines", "llama3"]  # what both sides prepare
CASES = [*BESIDE, "gigabyte", "loader"]
QUICK = ["documents", "gigabyte", "loader"]  # half a minute
GIGABYTE = {"full": 1000, "quick": 20, "tiny": 2}  # MB
DATA = ROOT.parent / "shared/data"
LLAMA3 = DATA / "tokenizers/llama3/tokenizer.json"
LONG = ["kin_news.jsonl", "kin_gov.jsonl"]


def texts(kind: str, folder: str) -> list[str]:
    """Distinct texts: `documents`, `lines`, or a few for `tiny`."""
    from preparation.readers import read_documents, read_texts

    if not (DATA / "cpt").is_dir():
        from training import demo

        return list(dict.fromkeys(read_texts(demo.texts(Path(folder), 1)["kin"], "line")))
    files = [DATA / "cpt" / x for x in LONG] if kind != "lines" else \
        [x for x in sorted((DATA / "cpt").iterdir()) if x.suffix in (".txt", ".jsonl")]
    pieces = [x.text for file in files for x in read_documents(
        file, key="content" if "folklore" in file.name else "text")]
    return list(dict.fromkeys(x for x in pieces if x.strip()))[: 200 if kind == "tiny" else None]


def write_text(file: str, kind: str, mb: int, folder: str) -> str:
    """Write texts to a .jsonl file, each once, or repeated with a number in front to `mb` MB; learn
    a tokenizer from them in `folder` unless it exists. Returns a description of the text."""
    from tokenization.tokenizer import learn

    documents = texts(kind, folder)
    real = (DATA / "cpt").is_dir()
    if not Path(folder, "tokenizer.model").exists():
        learn(documents[:20000], 8000 if real else 600, Path(folder))
    size = n = 0
    with open(file, "wb") as f:
        while size < mb * 10**6 if mb else n < len(documents):
            text = f"{n}. {documents[n % len(documents)]}" if mb else documents[n]
            size += f.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
            n += 1
    what = "../shared/data/cpt" if real else "sentences of the demo's grammar"
    return f"{size / 1e6:.1f} MB, {n:,} texts of {what}"


def ours(file: str, tokenizer: str, processes: int, clean: bool = False) -> dict[str, Any]:
    """Run prepare.py in a process of its own: seconds, tokens, bytes on disk."""
    with tempfile.TemporaryDirectory() as out:
        begun = time.perf_counter()
        subprocess.run([sys.executable, "prepare.py", "text", file, "--tokenizer", tokenizer,
                        *([] if clean else ["--normalise", "none"]), "--processes", str(processes),
                        "--out", f"{out}/bin"], cwd=ROOT, check=True, capture_output=True)
        took = time.perf_counter() - begun
        meta = json.loads(Path(out, "bin/meta.json").read_text(encoding="utf-8"))
        return {"seconds": took, "tokens": meta["tokens"], "disk": weight(Path(out, "bin"))}


def theirs(file: str, tokenizer: str, processes: int) -> dict[str, Any]:
    """The two usual maps of datasets: tokenise with BOS and EOS, group into rows of 1,024."""
    alone = processes == 1
    set_library_threads(alone)
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
        encoded = functools.partial(
            sentencepiece.SentencePieceProcessor(f"{tokenizer}/tokenizer.model").encode,
            num_threads=-1 if alone else 1)

    def encode(batch: dict) -> dict:
        return {"input_ids": [[begin, *ids, end] for ids in encoded(batch["text"])]}

    def group(batch: dict) -> dict:
        flat = [i for ids in batch["input_ids"] for i in ids]
        return {"input_ids": [flat[i : i + 1024] for i in range(0, len(flat), 1024)]}

    with tempfile.TemporaryDirectory() as cache:
        read = datasets.load_dataset("json", data_files=file, cache_dir=cache, split="train")
        n = None if alone else processes
        ids = read.map(encode, batched=True, num_proc=n, remove_columns=["text"])
        packed = ids.map(group, batched=True, num_proc=n)
        took = time.perf_counter() - begun
        return {"seconds": took, "tokens": sum(map(len, packed["input_ids"])),
                "disk": sum(Path(x["filename"]).stat().st_size for x in packed.cache_files),
                "whole": weight(Path(cache))}


def load(bin: str, file: str, tokenizer: str) -> dict[str, Any]:
    """Rows of 1,024 tokens per second that the loader reads from a bin of the file."""
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


def beside(s: Settings, case: str, file: str, what: str) -> str:
    """Measure both sides on one text, with one process and with two."""
    folder = str(Path(file).parent)
    tokenizer, mb = str(LLAMA3) if case == "llama3" else folder, Path(file).stat().st_size / 1e6
    peer = installed("datasets")
    sides: dict[str, tuple[str, list]] = {}
    for n in (1, 2):
        by = f"{n} process{'es' if n > 1 else ''}"
        sides[f"ours, {by}"] = ("ours", [file, tokenizer, n])
        sides[f"ours, {by}, cleaning too"] = ("ours", [file, tokenizer, n, True])
        sides |= {f"datasets.map, {by}": ("theirs", [file, tokenizer, n])} if peer else {}
    runs, rows = in_turn(HERE, s.rounds, sides), []
    took = {side: Spread.of([x["seconds"] for x in results]) for side, results in runs.items()}
    best = min((side for side in sides if sides[side][0] == "theirs"),
               key=lambda side: took[side].median, default=None)
    seconds = {side: [x["seconds"] for x in results] for side, results in runs.items()}
    for side, results in runs.items():
        x = took[side]
        rows.append([side, f"{mb / x.median:.1f}", f"{x.low:.1f} to {x.high:.1f}",
                     ratio(seconds[best], seconds[side]) if best else "-",
                     f"{max(r['gb'] for r in results):.2f}",
                     f"{results[0]['disk'] / 1e6:.0f}", f"{results[0]['tokens']:,}"])
    if len({x["tokens"] for side, results in runs.items() if "cleaning" not in side
            for x in results}) > 1:
        s.faults.append(f"{case}: the sides give different numbers of tokens")
    cached = max((x["whole"] for results in runs.values() for x in results if "whole" in x),
                 default=0)
    left = (" MB on disk: the bin, or the files of the peer's last map; with its copy of the text "
            f"and its first map its cache is {cached / 1e6:.0f} MB.") if peer else ""
    return f"{case}: {what}.{left}\n\n" + table(
        ["", "MB/s", "seconds", "times datasets.map's best", "peak GB of a process", "MB on disk",
         "tokens"], rows)


def job(s: Settings) -> str:
    cases, parts = s.cases or (QUICK if s.size == "quick" else CASES), []
    if "llama3" in cases and (s.size == "tiny" or not LLAMA3.exists()):
        cases = [x for x in cases if x != "llama3"]
        parts.append("llama3: left out, for the size is tiny or its tokenizer is not at hand.")
    with tempfile.TemporaryDirectory() as home:
        @functools.cache
        def text(kind: str, mb: int = 0) -> tuple[str, str]:
            """A file of texts with a tokenizer in its folder, and a description of the text."""
            folder = Path(home, kind)
            folder.mkdir(exist_ok=True)
            file = str(folder / f"{mb}.jsonl")
            return file, child(HERE, "write_text", file, kind, mb, str(folder))

        kind = "tiny" if s.size == "tiny" else "documents"
        parts += [beside(s, case, *text("lines" if case == "lines" and kind != "tiny" else kind))
                  for case in cases if case in BESIDE]
        if "loader" in cases:
            file, _ = text(kind)
            results = in_turn(HERE, s.rounds, {"loader": ("load", [
                f"{home}/bin", file, f"{home}/{kind}"])})["loader"]
            rows = Spread.of([x["rows"] for x in results])
            parts.append(f"The loader gives {rows.median:,.0f} ({rows.low:,.0f} to "
                         f"{rows.high:,.0f}) packed rows of 1,024 tokens a second; a training step "
                         "asks for a few.")
        if "gigabyte" in cases:
            mb = GIGABYTE[s.size]
            file, _ = text(kind, mb)
            results = in_turn(HERE, s.rounds, {"gigabyte": ("ours", [
                file, f"{home}/{kind}", 2])})["gigabyte"]
            rate = Spread.of([mb / x["seconds"] for x in results])
            parts.append(f"{mb:,} MB by two processes: {rate.median:.1f} ({rate.low:.1f} to "
                         f"{rate.high:.1f}) MB/s, no process above "
                         f"{max(x['gb'] for x in results):.2f} GB.")
    return "\n\n".join([*parts, limits.description(
        limits.measured(s.size), "datasets", "sentencepiece", "tokenizers")])


if __name__ == "__main__":
    sys.exit(main(HERE, "Preparing text", {"write_text": write_text, "ours": ours, "theirs": theirs,
                                           "load": load}, job, CASES, 2))
