"""Writes token bins, which data.py describes and reads.

A bin is written into a temporary folder and renamed when it is complete. A folder that exists and
is not a bin, or that holds other files too, is refused before anything is read.
"""

from __future__ import annotations

import json
import os
from array import array
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from data import FORMAT, Bin, sha256
from runtime.console import STORAGE, UserError
from runtime.output_paths import real_path, refused_as_output
from runtime.temporary import Temporary, set_aside
from tokenization.document import Document

BIN_FILES = frozenset(("tokens.bin", "starts.bin", "mask.bin", "groups.bin", "meta.json"))


class BinWriter:
    """Writes a bin, document by document. In memory are 8 bytes for each document, 16 with groups.
    """

    def __init__(self, folder: Path, tokenizer_sha: str, vocab_size: int, kind: str = "text"):
        self.folder, self.kind = Path(folder), kind
        self.tokenizer_sha, self.vocab_size = tokenizer_sha, vocab_size
        self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self.target = _check_target(self.folder)
        with refused_as_output(folder):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.claim = Temporary(self.target, folder=True)
            self.temporary = self.claim.path
            self.tokens = open(self.temporary / "tokens.bin", "wb")
        self.starts, self.groups, self.n_bytes, self.trained = array("q", [0]), bytearray(), 0, 0
        self.mask: IO[bytes] | None = None  # opened for the first document that has one

    def add(self, document: Document, group: bytes = b"") -> None:
        """Append one document. Documents of one `group` (eight bytes) are held out together."""
        self.groups += group[:8]
        mask = None if document.mask is None else np.asarray(document.mask, np.uint8)
        assert mask is None or len(mask) == len(document.ids)
        self.extend(np.asarray(document.ids), np.array([len(document.ids)]), document.n_bytes, mask)

    def extend(self, ids: np.ndarray, sizes: np.ndarray, n_bytes: int,
               mask: np.ndarray | None = None) -> None:
        """Append D documents: ids of all, end to end, (N,); the number of ids of each, (D,); the
        bytes of all; and the mask of all ids, (N,), or None if all are trained."""
        # numpy would turn 128256 into 62720 without an error
        assert not ids.size or 0 <= ids.min() <= ids.max() < self.vocab_size, "id out of vocabulary"
        self.tokens.write(ids.astype(self.dtype).tobytes())
        if self.mask is None and mask is not None:
            self.mask = open(self.temporary / "mask.bin", "wb")
            self.mask.write(b"\1" * self.starts[-1])
        mask = np.ones(len(ids), np.uint8) if mask is None else mask
        if self.mask:
            self.mask.write(mask.tobytes())
        ends = np.cumsum(sizes)
        self.starts.extend((self.starts[-1] + ends).tolist())
        self.n_bytes += n_bytes
        first = (ends - sizes)[sizes > 0]  # nothing predicts a document's first token
        self.trained += int(mask.sum() - mask[first].sum())

    def close(self, ledger: dict[str, Any], sources: list[dict[str, Any]],
              prompt: dict[str, Any] | None = None,
              cleaning: dict[str, Any] | None = None) -> Bin:
        """Complete the bin and open it. `prompt`: the prompts and chat template of its examples;
        `cleaning`: the steps by which its text was cleaned."""
        np.array(self.starts, "<i8").tofile(self.temporary / "starts.bin")
        if self.groups:
            (self.temporary / "groups.bin").write_bytes(self.groups)
        for file in filter(None, (self.tokens, self.mask)):
            file.close()
        if self.trained == np.maximum(np.diff(self.starts) - 1, 0).sum():
            (self.temporary / "mask.bin").unlink(missing_ok=True)  # all ids are trained
        files = sorted(self.temporary.glob("*.bin"))
        meta = {
            "format": FORMAT, "kind": self.kind, "dtype": {2: "u16", 4: "u32"}[self.dtype.itemsize],
            "vocabulary": self.vocab_size, "tokenizer": self.tokenizer_sha,
            "documents": len(self.starts) - 1, "tokens": self.starts[-1], "trained": self.trained,
            "bytes": self.n_bytes, "ledger": ledger, "sources": sources,
            "sha256": {f.name: sha256(f) for f in files}} | ({"prompt": prompt} if prompt else {})
        if cleaning is not None:
            meta["cleaning"] = cleaning
        text = json.dumps(meta, indent=1, ensure_ascii=False)
        (self.temporary / "meta.json").write_text(text + "\n", encoding="utf-8")
        with ExitStack() as old:
            if self.target.exists():
                old.enter_context(set_aside(self.target))
            self.claim.replace()
        return Bin(self.folder)

    def abandon(self) -> None:
        """Remove what has been written."""
        for file in filter(None, (self.tokens, self.mask)):
            with suppress(OSError):  # the buffer cannot be written to a full disk
                file.close()
        self.claim.remove()


def _check_target(folder: Path) -> Path:
    """The folder that a bin will be renamed to, behind all links. UserError (STORAGE) if it holds
    anything but an older bin, or cannot be replaced."""
    target = real_path(folder)
    if not target.exists():
        return target
    if not (target / "meta.json").exists():
        raise UserError(f"{folder}: exists and is not a bin; name another --out", STORAGE)
    others = sorted(x.name for x in target.iterdir() if x.name not in BIN_FILES)
    if others:
        raise UserError(f"{folder}: holds {others[0]!r}, which is not a file of a bin and "
                        "would be lost; move it, or name another --out", STORAGE)
    if os.path.ismount(target) or not os.access(target, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: cannot be replaced (it is a mount point, or you may not "
                        "write to it); name another --out", STORAGE)
    return target
