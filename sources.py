"""What a run is trained on and measured on: specs become bins, bins become sources.

A spec names a prepared bin, or text; text is prepared once under OUT/bins by prepare.py, in a
process of its own, so that training never sees any. Documents held out for evaluation are chosen
here, by a hash of what they are.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import corpus
import log
from data import Bin, Source, hold_out
from log import FLAGS, UserError
from ranks import Ranks
from tokenizer import Tokenizer


def open_data(s: Any, kind: str, folder: Path, tokenizer: Tokenizer, vocab: int, out: Path,
              ranks: Ranks) -> tuple[list[Source], dict[str, list[np.ndarray]]]:
    """The sources to train on, and held-out documents by name."""
    if not s.data:
        raise UserError("--data: name at least one bin or file of text", FLAGS)
    specs = [split_weight(x) for x in s.data]
    if len({weight is None for _, weight in specs}) > 1:
        raise UserError(
            "--data: give a weight to every source or to none, as in kin.txt:3 eng.txt:1", FLAGS)

    def opened(spec: str, as_is: bool) -> Bin:
        bin = open_bin(spec, folder, tokenizer, out, ranks, as_is)
        bin.check(tokenizer.fingerprint, vocab)
        if bin.meta["kind"] != kind:
            raise UserError(
                f"{bin.folder}: a bin of {bin.meta['kind']}, --mode {s.mode} trains on {kind}")
        return bin

    sources, held = [], {}
    for spec, weight in specs:
        bin = opened(spec, as_is=False)
        kept = hold_out(bin, 0.0 if s.val else s.hold_out)
        name = bin.folder.name
        if name in {x.name for x in sources}:
            raise UserError(
                f"--data: two sources are called {name}; give their files different names", FLAGS)
        if kept.any():
            held[name] = texts_of(bin, np.flatnonzero(kept), tokenizer, s.eval_tokens)
        elif not s.val and s.hold_out:
            log.say(
                f"{name}: one document, so none is held out; cut it into documents, or give --val")
        sources.append(
            Source(name, bin, np.flatnonzero(~kept), weight or float(bin.meta["trained"])))
    for item in s.val:
        name, _, spec = item.partition("=")
        if not spec:
            raise UserError(f"--val {item}: expected NAME=SPEC, as in kin=val.jsonl", FLAGS)
        bin = opened(spec, as_is=True)
        held[name] = texts_of(bin, range(len(bin)), tokenizer, s.eval_tokens)
    return sources, held


def open_bin(spec: str, folder: Path, tokenizer: Tokenizer, out: Path, ranks: Ranks,
             as_is: bool) -> Bin:
    """A prepared bin, or text prepared once under OUT/bins by prepare.py; held-out text is left as
    it is."""
    if (Path(spec) / "meta.json").exists():
        return Bin(spec)
    stem = ("".join(c if c.isalnum() or c in "-_" else "_" for c in Path(spec).name.split(".")[0])
            or "text")
    bin = out / "bins" / (f"{stem}-val" if as_is else stem)
    if ranks.rank == 0 and not is_fresh(bin, spec, tokenizer):
        words = ["text", spec, "--tokenizer", str(folder), "--out", str(bin)]
        words += ["--normalise", "none", "--keep-duplicates"] if as_is else []
        log.say("preparing: " + shlex.join(["python", "prepare.py", *words]))
        program = Path(__file__).with_name("prepare.py")
        code = subprocess.run([sys.executable, str(program), *words], stdout=sys.stderr).returncode
        if code:
            sys.exit(code)  # prepare.py has said what is wrong
    ranks.barrier()
    return Bin(bin)


def is_fresh(bin: Path, spec: str, tokenizer: Tokenizer) -> bool:
    """Whether a bin prepared earlier is what preparing `spec` again would give, by its sources'
    sizes."""
    if not (bin / "meta.json").exists():
        return False
    meta = Bin(bin).meta
    now = [(str(p), p.stat().st_size) for p in corpus.files([spec])]
    return meta["tokenizer"] == tokenizer.fingerprint and now == [
        (x["path"], x["bytes"]) for x in meta["sources"]]


def split_weight(spec: str) -> tuple[str, float | None]:
    """`SPEC[:WEIGHT]` -> (SPEC, WEIGHT or None)."""
    head, _, tail = spec.rpartition(":")
    try:
        weight = float(tail)
    except ValueError:
        return spec, None
    if not head:
        return spec, None
    if not 0 < weight < float("inf"):
        raise UserError(f"--data {spec}: the weight is {tail}, expected a number above 0", FLAGS)
    return head, weight


def texts_of(bin: Bin, documents: Sequence[int], tokenizer: Tokenizer,
             limit: int) -> list[np.ndarray]:
    """Documents without BOS and EOS, up to `limit` tokens in all; the last is cut there."""
    texts = []
    for i in documents:
        ids = bin.document(i)
        ids = ids[int(len(ids) and ids[0] == tokenizer.bos):]
        ids = ids[: len(ids) - int(len(ids) and ids[-1] == tokenizer.eos)][:limit]
        limit -= len(ids)
        texts += [np.array(ids)] if len(ids) else []
        if limit <= 0:
            break
    return texts
