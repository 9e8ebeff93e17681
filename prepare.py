"""Text to token bins, and looking at them.

    python prepare.py text kin/*.txt --tokenizer MODEL --out bins/kin
    python prepare.py show bins/kin
    python prepare.py vocab kin/*.txt eng/*.txt --size 8000 --out tok
    python prepare.py fertility val.txt --tokenizers tok MODEL
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

import config
import corpus
import log
from data import Bin
from kinyarwanda import normalise
from log import FLAGS, UserError
from tokenizer import Tokenizer, learn


@dataclass
class Text:
    """Text files to a bin: clean, drop duplicates, encode; every byte read is accounted for."""

    files: Positional[list[str]]
    """Files, folders or globs: .txt .jsonl .tsv .parquet, and .gz."""
    tokenizer: str
    """A model's folder, or a tokenizer.json or .model file."""
    out: str
    """The bin's folder; an older bin there is replaced."""
    documents: Literal["auto", "file", "line", "block"] = "auto"
    """What a document of a .txt is."""
    text_key: str = "text"
    """Where the text is in .jsonl, .tsv and .parquet."""
    normalise: list[str] = field(default_factory=lambda: list(normalise.STEPS))
    """Steps of cleaning, or none."""
    keep_duplicates: bool = False
    """Keep documents whose text was seen before."""
    min_chars: int = 1
    """Shorter documents are left out."""
    max_doc_mb: int = 64
    on_bad: Literal["stop", "skip"] = "stop"
    """What more than 0.1 % undecodable documents do."""
    processes: int = os.cpu_count() or 1


@dataclass
class Show:
    """What is in a bin: its ledger, and its first documents with trained tokens in colour."""

    bin: Positional[str]
    tokenizer: str
    """The tokenizer it was made with."""
    n: int = 3
    """Documents shown."""


@dataclass
class Vocab:
    """Learn a SentencePiece tokenizer from text files."""

    files: Positional[list[str]]
    out: str
    size: int = 8000
    """Pieces, the 256 bytes among them."""
    documents: Literal["auto", "file", "line", "block"] = "auto"
    text_key: str = "text"
    normalise: list[str] = field(default_factory=lambda: list(normalise.STEPS))


@dataclass
class Fertility:
    """How many tokens tokenizers need for a text: tokens per word, bytes per token."""

    files: Positional[list[str]]
    tokenizers: list[str]
    documents: Literal["auto", "file", "line", "block"] = "auto"
    text_key: str = "text"


def text(s: Text) -> None:
    steps = [] if s.normalise == ["none"] else s.normalise
    bin, ledger = corpus.prepare(
        s.files, Path(s.tokenizer), Path(s.out), unit=s.documents, key=s.text_key,
        normalise=normalise.normaliser(steps) if steps else None, keep_duplicates=s.keep_duplicates,
        min_chars=s.min_chars, max_doc_mb=s.max_doc_mb, on_bad=s.on_bad,
        processes=max(1, s.processes))
    ledger_lines(ledger.to_json())
    print(f"{bin.folder}: {len(bin):,} documents, {bin.meta['tokens']:,} tokens, "
          f"{bin.meta['bytes'] / max(1, bin.meta['tokens']):.2f} bytes per token")


def ledger_lines(ledger: dict) -> None:
    """The ledger as a table: what was read, and where it went."""
    print(f"{'':14}{'documents':>12}{'bytes':>16}")
    for what, n in ledger["documents"].items():
        print(f"{what:14}{n:>12,}{ledger['bytes'][what]:>16,}")
    for step, n in ledger["changes"].items():
        print(f"normalised: {step}, {n:,} places")


def show(s: Show) -> None:
    bin, tokenizer = Bin(s.bin), Tokenizer.open(s.tokenizer)
    bin.check(tokenizer.fingerprint, tokenizer.vocab_size)
    print(f"{s.bin}: {len(bin):,} documents, {bin.meta['tokens']:,} tokens, "
          f"{bin.meta['bytes']:,} bytes")
    ledger_lines(bin.meta["ledger"])
    on, off = ("\x1b[32m", "\x1b[0m") if sys.stdout.isatty() else ("", "")
    for i in range(min(s.n, len(bin))):
        print(f"\n-- document {i}")
        a = int(bin.starts[i])
        for j, token in enumerate(bin.document(i).tolist()):
            piece = log.printable(tokenizer.piece(token))
            trained = j > 0 and (bin.mask is None or bin.mask[a + j])
            print(f"{on}{piece}{off}" if trained else piece, end="")
        print()


def vocab(s: Vocab) -> None:
    clean = normalise.normaliser([] if s.normalise == ["none"] else s.normalise)
    pieces = (piece
              for path in corpus.files(s.files)
              for piece in corpus.read(path, s.documents, s.text_key))
    lines = (line
             for piece in pieces
             if not piece.fault
             for line in clean(piece.text)[0].split("\n")
             if line)
    tokenizer = learn(lines, s.size, Path(s.out))
    print(f"{s.out}: {tokenizer.vocab_size:,} pieces, fingerprint {tokenizer.fingerprint[:12]}")


def fertility(s: Fertility) -> None:
    print(f"{'file':32}{'tokenizer':24}{'tokens/word':>12}{'bytes/token':>12}")
    for file in corpus.files(s.files):
        texts = corpus.texts(file, s.documents, s.text_key)
        words, n_bytes = sum(len(t.split()) for t in texts), sum(len(t.encode()) for t in texts)
        for name in s.tokenizers:
            tokens = sum(map(len, Tokenizer.open(name).encode_batch(texts)))
            print(f"{file.name:32}{Path(name).name:24}{tokens / words:>12.2f}"
                  f"{n_bytes / tokens:>12.2f}")


COMMANDS = {"text": (Text, text), "show": (Show, show), "vocab": (Vocab, vocab),
            "fertility": (Fertility, fertility)}


def main() -> None:
    name, settings = config.pick({k: v[0] for k, v in COMMANDS.items()}, sys.argv[1:], "prepare.py",
                                 (__doc__ or "").strip())
    if hasattr(settings, "files") and not settings.files:
        raise UserError(f"prepare.py {name}: name at least one file", FLAGS)
    COMMANDS[name][1](settings)


if __name__ == "__main__":
    log.run(main)
