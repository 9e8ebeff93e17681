"""What a run is trained on and measured on: specs become bins, bins become sources.

A spec names a prepared bin, or files; files are prepared once under OUT/bins by prepare.py, in a
process of its own, so that training never sees any. Documents held out for evaluation are chosen
here, by a hash of what they are.

Text, conversations and translations may be mixed: each is documents with a loss mask. Preference
pairs are another matter, and stay among themselves.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data import Bin, Source, hold_out, sha256
from preparation.readers import TEXT_FORMATS, file_format, list_files
from preparation.specs import bin_name, folder_name, split_weight
from runtime import console
from runtime.console import FLAGS, UserError
from runtime.paths import ROOT
from tokenization.document import Document
from tokenization.tokenizer import Tokenizer
from training.settings import Settings

if TYPE_CHECKING:  # torch would come with it, into each process that prepares text
    from runtime.distributed import Distributed

MIXED = ("text", "chat", "mt")  # kinds that are trained by their NLL

Held = dict[str, list[np.ndarray] | list[Document]]  # texts, or documents with their loss mask


def open_data(s: Settings, kind: str, folder: Path, tokenizer: Tokenizer, vocab: int, out: Path,
              ranks: Distributed) -> tuple[list[Source], Held]:
    """The sources to train on, and held-out documents by name; `kind` is what files become."""
    if not s.data:
        raise UserError("--data: name at least one bin or file of text", FLAGS)
    specs = [split_weight(x) for x in s.data]
    if len({weight is None for _, weight in specs}) > 1:
        raise UserError(
            "--data: give a weight to every source or to none, as in kin.txt:3 eng.txt:1", FLAGS)

    def opened(spec: str, held_as: str = "") -> Bin:
        # held-out text is text in every mode
        bin = open_bin(spec, "text" if held_as and file_format(Path(spec)) == ".txt" else kind,
                       s.seq_len, folder, tokenizer, out, ranks, held_as)
        bin.check(tokenizer.fingerprint, vocab)
        fits = MIXED if kind in MIXED else (kind,)
        if bin.meta["kind"] not in ((*MIXED, kind) if held_as else fits):
            raise UserError(f"{bin.folder}: a bin of {bin.meta['kind']}, --mode {s.mode} trains on "
                            f"{', '.join(fits)}")
        return bin

    def held_of(bin: Bin, documents: Sequence[int]) -> list[np.ndarray] | list[Document]:
        if bin.meta["kind"] == "text":
            return texts_of(bin, documents, tokenizer, s.eval_tokens)
        if bin.meta["kind"] == "pairs":
            documents = documents[::2]  # the chosen ones
        return answers_of(bin, documents, s.eval_tokens)

    sources, held = [], {}
    for spec, weight in specs:
        bin = opened(spec)
        kept = hold_out(bin, 0.0 if s.val else s.hold_out)
        name = bin.folder.name
        if name in {x.name for x in sources}:
            raise UserError(
                f"--data: two sources are called {name}; give their files or folders different "
                "names, or prepare them as bins", FLAGS)
        if kept.any():
            held[name] = held_of(bin, np.flatnonzero(kept))
        elif not s.val and s.hold_out:
            why = ("one document" if len(bin) == 1 else
                   f"all {len(bin):,} documents begin alike, or are one pair")
            console.info(
                f"{name}: {why}, so none is held out; cut it into documents, or give --val"
            )
        sources.append(
            Source(name, bin, np.flatnonzero(~kept),
                   weight or float(bin.meta["tokens"] - len(bin))))
    for item in s.val:
        name, _, spec = item.partition("=")
        if not (name and spec):
            raise UserError(f"--val {item}: expected NAME=SPEC, as in kin=val.jsonl", FLAGS)
        if folder_name(name) in map(folder_name, held):
            raise UserError(f"--val {item}: another is called {name}; give it a name of its own, "
                            "or a glob or folder for both", FLAGS)
        bin = opened(spec, name)
        held[name] = held_of(bin, range(len(bin)))
    return sources, held


def open_bin(spec: str, kind: str, seq_len: int, folder: Path, tokenizer: Tokenizer, out: Path,
             ranks: Distributed, held_as: str) -> Bin:
    """A prepared bin, or files prepared once under OUT/bins by prepare.py; held-out text, which has
    a name, is left as it is."""
    if (Path(spec) / "meta.json").exists():
        return Bin(spec)
    bin = out / "bins" / (f"{folder_name(held_as)}-val" if held_as else bin_name(spec))
    if ranks.rank == 0 and not is_fresh(bin, spec, tokenizer, kind, seq_len):
        words = [kind, spec, "--tokenizer", str(folder), "--out", str(bin)]
        words += ["--max-tokens", str(seq_len)] if kind != "text" else []
        words += ["--normalise", "none", "--keep-duplicates"] if held_as and kind == "text" else []
        console.info("preparing: " + shlex.join(["python", "prepare.py", *words]))
        program = ROOT / "prepare.py"
        code = subprocess.run([sys.executable, str(program), *words], stdout=sys.stderr).returncode
        if code:
            sys.exit(code)  # prepare.py has said what is wrong
    ranks.barrier()
    return Bin(bin)


def is_fresh(bin: Path, spec: str, tokenizer: Tokenizer, kind: str, seq_len: int) -> bool:
    """Whether a bin prepared earlier is what preparing `spec` again would give, by its sources'
    sizes and, of files that have changed since in any way, sums; and by the row that its examples
    must fit if any does not fit both."""
    if not (bin / "meta.json").exists():
        return False
    found = Bin(bin)
    meta, ledger = found.meta, found.meta["ledger"]
    known = TEXT_FORMATS if kind == "text" else (*TEXT_FORMATS, ".json")
    now = [(str(p), p.stat().st_size) for p in list_files([spec], known)]
    same = (meta["tokenizer"], meta["kind"]) == (tokenizer.fingerprint, kind) and now == [
        (x["path"], x["bytes"]) for x in meta["sources"]]
    made = (bin / "meta.json").stat().st_mtime
    same = same and all(sha256(p) == x["sha256"] for x in meta["sources"]
                        if (p := Path(x["path"])).stat().st_ctime >= made)
    if not same or kind == "text" or ledger.get("max_tokens") == seq_len:
        return same
    sizes = (np.diff(found.starts) - 1).reshape(-1, 2 if kind == "pairs" else 1).sum(1)
    return "too long" not in ledger["documents"] and sizes.max() <= seq_len


def answers_of(bin: Bin, documents: Sequence[int], limit: int) -> list[Document]:
    """Documents with their loss mask, up to `limit` tokens in all, but one at least."""
    found: list[Document] = []
    for i in documents:
        ids = bin.document(i)
        if found and (limit := limit - len(ids)) < 0:
            break
        found.append(Document(np.array(ids, np.int64), bin.trained(i), 0))
    return found


def prompts_of(sources: Sequence[Source]) -> dict[str, Any]:
    """How the sources' questions were written: {"translate": [...], "chat": template}; the first
    source that says so counts."""
    found: dict[str, Any] = {}
    for source in sources:
        found = {**source.bin.meta.get("prompt", {}), **found}
    return found


def cap(sources: Sequence[Source], budget: int, epochs: float) -> None:
    """Weigh sources so that none is served more than `epochs` times in `budget` tokens."""
    sizes = [int(np.diff(x.bin.starts)[x.documents].sum()) - len(x.documents) for x in sources]
    found = capped_weights([x.weight for x in sources], sizes, budget, epochs)
    for source, weight in zip(sources, found, strict=True):
        source.weight = weight


def capped_weights(weights: Sequence[float], sizes: Sequence[int], budget: float,
                   epochs: float) -> list[float]:
    """Weights with which no source gives above `epochs` times its size in `budget` tokens.

    What a small source cannot give, the others give by their weights; with equal weights this is
    UniMax (Chung et al. 2023, algorithm 1). UserError where all of them together are too small.
    """
    if budget > epochs * sum(sizes):
        raise UserError(
            f"--max-epochs-per-source {epochs:g}: the sources hold {sum(sizes):,} tokens, "
            f"{epochs * sum(sizes):,.0f} in so many epochs, and the run takes {budget:,.0f}; lower "
            "--steps, or raise it", FLAGS)
    given, left = [0.0] * len(sizes), set(range(len(sizes)))
    while left:
        rest = budget - sum(given)
        total = sum(weights[i] for i in left)
        full = [i for i in left if rest * weights[i] / total > epochs * sizes[i]]
        for i in full or left:
            given[i] = epochs * sizes[i] if full else rest * weights[i] / total
        left -= set(full or left)
    return given


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
