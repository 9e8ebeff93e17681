"""Token bins, and the packed rows that training reads from them.

A *bin* is a folder of `tokens.bin` (little-endian u16 or u32), `starts.bin` (i64, the start of each
document and the end of the last), `mask.bin` (u8; absent if every token is trained), `groups.bin`
(u64; documents with the same number are held out together) and `meta.json`. A damaged bin, or one
of another tokenizer, is refused.

A document of n tokens gives n - 1 predictions. A *row* holds T predictions of one or more documents
with their `doc` and `pos`, from which attention's mask and the rotary angles are computed. Only the
unused tail of a row is padding.

    TokenStream      text: documents are cut where a row ends and continue in a later row
    PackedExamples   conversations, translations, preference pairs: documents are never cut

Row i of a source is a function of (seed, i). So the state of a loader is one integer per source,
seeking takes constant time, and any number of ranks reads the same rows.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from runtime.console import UserError

if TYPE_CHECKING:  # preparing text must not wait for torch
    from torch import Tensor

FORMAT = 1
IGNORE = -100  # a target that is not trained; torch's default ignore_index
OPEN_ROWS = 64  # rows that `best_fit_pack` fills at the same time


def sha256(file: Path) -> str:
    """A file's SHA-256, in hex."""
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Bin:
    """A bin that is open for reading: `tokens` and `mask` (n,), `starts` (N+1,), memory-mapped."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            format_version, dtype = self.meta["format"], self.meta["dtype"]
            n_documents, n_tokens = self.meta["documents"], self.meta["tokens"]
            for key in ("vocabulary", "tokenizer", "sha256"):
                self.meta[key]
            for key, count in (("documents", n_documents), ("tokens", n_tokens)):
                if type(count) is not int or count < 0:
                    raise ValueError(f"{key} is {count!r}, expected a number of 0 or more")
        except FileNotFoundError:
            raise UserError(f"{folder}: not a bin, because it has no meta.json; make a bin with "
                            "prepare.py") from None
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{folder}/meta.json: damaged ({e}); prepare the bin again") from None
        if format_version != FORMAT or dtype not in ("u16", "u32"):
            raise UserError(f"{folder}: bin format {format_version} {dtype}, expected format "
                            f"{FORMAT} u16 or u32; prepare the bin again")
        self.starts = self._read("starts.bin", "<i8", n_documents + 1)
        self.tokens = self._read("tokens.bin", {"u16": "<u2", "u32": "<u4"}[dtype], n_tokens)
        self.mask = self.groups = None
        if "mask.bin" in self.meta["sha256"]:
            self.mask = self._read("mask.bin", "u1", n_tokens)
        if "groups.bin" in self.meta["sha256"]:
            self.groups = self._read("groups.bin", "<u8", n_documents)
        if (self.starts[0] != 0 or self.starts[-1] != n_tokens
                or (np.diff(self.starts) < 0).any()):
            raise UserError(f"{folder}/starts.bin: offsets do not fit tokens.bin; prepare the bin "
                            "again")

    def _read(self, name: str, dtype: str, n: int) -> np.ndarray:
        """A file of n numbers, memory-mapped: (n,)."""
        path = self.folder / name
        size = path.stat().st_size if path.exists() else 0
        expected = n * np.dtype(dtype).itemsize
        if size != expected:
            raise UserError(f"{path}: {size} bytes, expected {expected}; the file is incomplete, "
                            "prepare the bin again")
        return np.memmap(path, dtype, "r") if n else np.zeros(0, dtype)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def document(self, i: int) -> np.ndarray:
        """Token ids of document i, (n,)."""
        return self.tokens[self.starts[i] : self.starts[i + 1]]

    def trained(self, i: int) -> np.ndarray:
        """Which tokens of document i are trained, (n,) bool."""
        start, end = self.starts[i], self.starts[i + 1]
        if self.mask is None:
            return np.ones(end - start, bool)
        return self.mask[start:end] > 0

    def check(self, tokenizer_sha: str, vocab_size: int) -> None:
        """UserError if the bin was changed, has no token to train on, or does not belong to a model
        with this tokenizer and vocabulary."""
        if self.meta["tokenizer"] != tokenizer_sha:
            raise UserError(
                f"{self.folder}: made with tokenizer {self.meta['tokenizer'][:12]}, the model has "
                f"{tokenizer_sha[:12]}; prepare the text again with this model's tokenizer")
        for name, digest in self.meta["sha256"].items():
            if sha256(self.folder / name) != digest:
                raise UserError(f"{self.folder / name}: its sha256 is not the one in meta.json; "
                                "the file was changed, prepare the bin again")
        largest = int(self.tokens.max()) if len(self.tokens) else -1
        if largest >= vocab_size:
            raise UserError(f"{self.folder}: holds id {largest}, but the model's last id is "
                            f"{vocab_size - 1}; prepare the text again with this model's tokenizer")
        if self.meta["trained"] == 0:
            raise UserError(f"{self.folder}: no token to train on in {len(self)} documents: the "
                            "mask excludes all tokens, or no document has two; prepare it again")


def validation_split(bin: Bin, share: float) -> np.ndarray:
    """Which documents are held out for validation, (N,) bool: those whose hash is in the lowest
    `share` of all hashes, and at least one.

    A document's side does not depend on the other documents. Documents with the same number in
    `groups.bin` are on the same side, as are the two documents of a preference pair. If all
    documents have the same hash, none is held out.
    """
    unit = 2 if bin.meta["kind"] == "pairs" else 1  # documents that belong together
    hashes = bin.groups
    if share > 0 and hashes is None:
        digests = (hashlib.blake2b(_hashed_tokens(bin, i).tobytes(), digest_size=8).digest()
                   for i in range(0, len(bin), unit))
        hashes = np.frombuffer(b"".join(digests), "<u8")
    if share <= 0 or (hashes == hashes[:1]).all():
        return np.zeros(len(bin), bool)
    return np.repeat(hashes <= max(np.uint64(share * 2.0**64), hashes.min()), unit)


def _hashed_tokens(bin: Bin, i: int) -> np.ndarray:
    """The beginning of document i, so that two versions of an article get the same hash: 64 tokens;
    of an example at least all before its first trained token, because many examples may begin with
    the same long system prompt."""
    n = 64
    if bin.meta["kind"] != "text":
        first_trained = int(bin.trained(i).argmax())
        n = max(n, first_trained or len(bin.tokens))  # 0: every token is trained, so hash them all
    return bin.document(i)[:n]


@dataclass
class Source:
    """Documents of one bin, and their weight in the mixture (shares are weights over their sum)."""

    name: str
    bin: Bin
    documents: np.ndarray  # (n,) indices into the bin
    weight: float

    @property
    def sha(self) -> str:
        """A fingerprint of the tokens, and of the groups where there are any, because they decide
        which documents are held out."""
        digests = self.bin.meta["sha256"]
        if "groups.bin" not in digests:
            return digests["tokens.bin"]
        both = digests["tokens.bin"] + digests["groups.bin"]
        return hashlib.sha256(both.encode()).hexdigest()


class RowDocuments(NamedTuple):
    """The documents of packed rows, described on the host, so that no GPU sync is needed."""

    doc: Tensor  # (B,T), on the CPU
    lengths: list[int]  # of all documents, row after row; an unused tail counts as a document
    longest: int  # the largest position + 1

    @classmethod
    def of(cls, doc: Tensor, pos: Tensor) -> RowDocuments:
        """From doc, pos (B,T) on the CPU."""
        import torch

        first = torch.ones_like(doc, dtype=torch.bool)
        first[:, 1:] = doc[:, 1:] != doc[:, :-1]
        starts = first.flatten().nonzero().squeeze(-1)
        lengths = torch.diff(starts, append=starts.new_tensor([doc.numel()])).tolist()
        return cls(doc, lengths, int(pos.max()) + 1 if pos.numel() else 0)


@dataclass
class Batch:
    """Rows of packed documents: tokens, targets, doc, pos (B,T) int64.

    In an unused tail `doc` is -1 and `targets` is IGNORE. `reference` (B,T) float32: the NLL of
    each target by a reference model, if there is one. `trained` (n,): the indices, among B T, of
    the targets that are not IGNORE. `documents` and `trained` are computed if they are not given.
    """

    tokens: Tensor
    targets: Tensor
    doc: Tensor
    pos: Tensor
    reference: Tensor | None = None
    documents: RowDocuments | None = None
    trained: Tensor | None = None

    def __post_init__(self) -> None:
        if self.documents is None:
            self.documents = RowDocuments.of(self.doc.cpu(), self.pos.cpu())
        if self.trained is None:
            self.trained = (self.targets.flatten() != IGNORE).nonzero().squeeze(-1)

    @classmethod
    def of(cls, rows: Sequence[np.ndarray], reference: Sequence[np.ndarray] = ()) -> Batch:
        """A batch of rows (4,T): tokens, targets, doc, pos; and of reference NLLs (T,), if any."""
        import torch

        nll = torch.from_numpy(np.stack(reference)) if len(reference) else None
        return cls(*torch.from_numpy(np.stack(rows, axis=1)), nll)

    @property
    def n_trained(self) -> int:
        """How many targets are trained; read from a shape, so without a GPU sync."""
        return len(self.trained)

    def inputs(self) -> dict[str, Any]:
        """The model's arguments for the NLL of this batch."""
        return {"tokens": self.tokens, "doc": self.doc, "pos": self.pos, "targets": self.targets,
                "documents": self.documents, "trained": self.trained}

    def to(self, device: Any) -> Batch:
        """The same batch on a device; `documents` stays on the host."""
        from runtime.transfer import to_device_async

        tensors = {name: to_device_async(x, device) for name, x in vars(self).items()
                   if name != "documents" and x is not None}
        return Batch(**tensors, documents=self.documents)


class RowStream(Protocol):
    """One source as an endless list of rows of T predictions; row i is a function of (seed, i)."""

    source: Source
    T: int
    seed: tuple[int, ...]
    rows: int  # in an epoch
    tokens: int  # predictions in an epoch

    def row(self, i: int) -> np.ndarray:
        """Row i as (4,T) int64: tokens, targets, doc, pos."""

    def number(self, i: int) -> int:
        """The number of row i before shuffling, 0 to rows - 1."""

    def tokens_in(self, rows: int) -> int:
        """How many predictions the first `rows` rows hold, exactly."""

    def documents_in(self, i: int) -> list[int]:
        """The documents in row i, by their index in the bin."""


class TokenStream:
    """A source of running text, as a RowStream: a document is cut where its row ends."""

    def __init__(self, source: Source, T: int, seed: Sequence[int]):
        self.source, self.bin, self.T, self.seed = source, source.bin, T, tuple(seed)
        lengths = np.diff(self.bin.starts)[source.documents] - 1  # predictions, not tokens
        self.documents = source.documents[lengths > 0]
        self.starts, self.lengths = self.bin.starts[self.documents], lengths[lengths > 0]
        self.tokens = int(self.lengths.sum())  # predictions in an epoch
        if self.tokens == 0:
            raise UserError(f"{self.bin.folder}: no token to train on; no document has two")
        self.rows = -(-self.tokens // T)  # in an epoch; the last may have an unused tail
        self.epoch = -1

    def _enter(self, epoch: int) -> None:
        """Set the order of an epoch, in O(documents); no token is read."""
        if epoch == self.epoch:
            return
        rng = np.random.default_rng([*self.seed, epoch])
        self.order = rng.permutation(len(self.lengths))
        self.ends = np.cumsum(self.lengths[self.order])  # where each document ends in the epoch
        self.shuffled = rng.permutation(self.rows)
        self.short_position = int(np.argmax(self.shuffled == self.rows - 1))  # has the tail
        self.epoch = epoch

    def tokens_in(self, rows: int) -> int:
        epoch, position = divmod(rows, self.rows)
        self._enter(epoch)
        tokens = epoch * self.tokens + position * self.T
        if position > self.short_position:
            tokens -= self.rows * self.T - self.tokens  # the unused tail
        return tokens

    def number(self, i: int) -> int:
        epoch, position = divmod(i, self.rows)
        self._enter(epoch)
        return int(self.shuffled[position])

    def row(self, i: int) -> np.ndarray:
        T, row = self.T, empty_row(self.T)
        row_start = self.number(i) * T  # in the epoch's list of predictions
        d = int(np.searchsorted(self.ends, row_start, side="right"))
        filled, doc = 0, 0
        while filled < T and d < len(self.order):
            k = self.order[d]
            skipped = row_start + filled - int(self.ends[d] - self.lengths[k])  # in earlier rows
            n = min(T - filled, int(self.lengths[k]) - skipped)
            _copy(self.bin, row[:, filled : filled + n], int(self.starts[k]) + skipped, doc)
            filled, d, doc = filled + n, d + 1, doc + 1
        return row

    def documents_in(self, i: int) -> list[int]:
        start = self.number(i) * self.T
        first, last = np.searchsorted(self.ends, (start, start + self.T - 1), side="right")
        return self.documents[self.order[first : last + 1]].tolist()


def empty_row(T: int) -> np.ndarray:
    """A row without documents, (4,T): tokens, targets, doc, pos of an unused tail."""
    return np.array([[0], [IGNORE], [-1], [0]], np.int64).repeat(T, axis=1)


def _copy(bin: Bin, columns: np.ndarray, start: int, doc: int) -> None:
    """Write the n predictions from token `start` of a bin on into columns (4,n) of a row."""
    n = columns.shape[1]
    columns[0], columns[1] = bin.tokens[start : start + n], bin.tokens[start + 1 : start + n + 1]
    if bin.mask is not None:
        columns[1][bin.mask[start + 1 : start + n + 1] == 0] = IGNORE
    columns[2], columns[3] = doc, np.arange(n)


class PackedExamples:
    """A source of examples, as a RowStream: a document is never cut.

    The documents of a row are the same in every epoch; the order of the rows changes. The two
    documents of a preference pair are next to each other in one row, the chosen one first.
    """

    def __init__(self, source: Source, T: int, seed: Sequence[int]):
        self.source, self.bin, self.T, self.seed = source, source.bin, T, tuple(seed)
        is_pairs = source.bin.meta["kind"] == "pairs"
        units = np.asarray(source.documents).reshape(-1, 2 if is_pairs else 1)  # examples or pairs
        lengths = (self.bin.starts[units + 1] - self.bin.starts[units] - 1).clip(0)  # predictions
        sizes = lengths.sum(1)
        units, sizes = units[sizes > 0], sizes[sizes > 0]
        noun = "pairs" if is_pairs else "examples"
        if not len(units):
            raise UserError(f"{self.bin.folder}: no {noun} to train on")
        if n_long := int((sizes > T).sum()):
            raise UserError(
                f"{self.bin.folder}: {n_long} of {len(sizes)} {noun} are longer than a row of {T}, "
                f"the longest {sizes.max()}; {noun} are never cut here: raise --seq-len, or "
                f"prepare the bin with --max-tokens {T} --too-long drop (or cut)")
        self.tokens = int(sizes.sum())  # predictions in an epoch
        rows = best_fit_pack(sizes, T, np.random.default_rng(self.seed))
        self.packed = [units[row] for row in rows]
        self.sizes = np.array([sizes[row].sum() for row in rows])  # predictions of each row
        self.rows, self.epoch = len(rows), -1

    def _enter(self, epoch: int) -> None:
        """Set the order of an epoch's rows, and the predictions before each of them."""
        if epoch != self.epoch:
            self.shuffled = np.random.default_rng([*self.seed, epoch]).permutation(self.rows)
            self.sums = np.concatenate([[0], np.cumsum(self.sizes[self.shuffled])])
            self.epoch = epoch

    def tokens_in(self, rows: int) -> int:
        epoch, position = divmod(rows, self.rows)
        self._enter(epoch)
        return epoch * self.tokens + int(self.sums[position])

    def number(self, i: int) -> int:
        epoch, position = divmod(i, self.rows)
        self._enter(epoch)
        return int(self.shuffled[position])

    def row(self, i: int) -> np.ndarray:
        row, filled = empty_row(self.T), 0
        for doc, d in enumerate(self.documents_in(i)):
            start, end = int(self.bin.starts[d]), int(self.bin.starts[d + 1])
            n = end - start - 1  # predictions
            _copy(self.bin, row[:, filled : filled + n], start, doc)
            filled += n
        return row

    def documents_in(self, i: int) -> list[int]:
        return self.packed[self.number(i)].ravel().tolist()


def best_fit_pack(sizes: np.ndarray, T: int, rng: np.random.Generator) -> list[list[int]]:
    """Pack units of at most T tokens into rows of T -> the units of each row.

    Best fit: each unit, in random order, goes into the open row whose free space it leaves the
    smallest.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (free space, index of the row), the fullest first
    for unit in rng.permutation(len(sizes)).tolist():
        size = int(sizes[unit])
        best = bisect_left(open_rows, (size, -1))
        if best < len(open_rows):
            space, row = open_rows.pop(best)
        else:
            space, row = T, len(rows)
            rows.append([])
            if len(open_rows) == OPEN_ROWS:
                open_rows.pop(0)
        rows[row].append(unit)
        insort(open_rows, (space - size, row))
    return rows


def open_stream(source: Source, T: int, seed: Sequence[int]) -> RowStream:
    """The rows of a source: only running text is cut where a row ends."""
    if source.bin.meta["kind"] == "text":
        return TokenStream(source, T, seed)
    return PackedExamples(source, T, seed)


class Loader:
    """Endless micro-batches from a mixture of sources.

    Each row comes from the source that is furthest behind its share, so shares of predictions are
    exact to one row. All ranks go through the same list of rows, and each rank reads only its own.
    So a step of G rows has the same rows on any number of ranks. The state is `rows_consumed`, one
    number per source.
    """

    def __init__(self, sources: Sequence[Source], T: int, rows: int, seed: int, rank: int = 0,
                 world: int = 1):
        self.T, self.rows, self.rank, self.world = T, rows, rank, world
        self.sources = list(sources)
        self.streams = [open_stream(s, T, (seed, i)) for i, s in enumerate(sources)]
        weights = np.array([s.weight for s in sources], float)
        self.shares = weights / weights.sum()  # (sources,)
        self.references: list[np.ndarray] = []
        self.seek([0] * len(sources))

    def set_references(self, references: Sequence[np.ndarray]) -> None:
        """Add a reference model's NLLs to every batch: (rows,T) float32 for each source, by
        `RowStream.number`."""
        self.references = list(references)

    def seek(self, rows_consumed: Sequence[int]) -> None:
        """Continue after so many rows of each source; constant time in rows."""
        self.rows_consumed = list(rows_consumed)
        self.tokens = [stream.tokens_in(n)
                       for stream, n in zip(self.streams, rows_consumed, strict=True)]

    def next_row(self) -> tuple[int, int]:
        """The next row in the list of all ranks: (index of its source, index of the row there)."""
        total = sum(self.tokens) + self.T
        behind = [share * total - n for share, n in zip(self.shares, self.tokens, strict=True)]
        s = int(np.argmax(behind))
        self.rows_consumed[s] += 1
        self.tokens[s] = self.streams[s].tokens_in(self.rows_consumed[s])
        return s, self.rows_consumed[s] - 1

    def next(self) -> Batch:
        """The next micro-batch of this rank."""
        rows = [self.next_row() for _ in range(self.rows * self.world)]
        own_rows = rows[self.rank * self.rows : (self.rank + 1) * self.rows]
        reference = []
        if self.references:
            reference = [self.references[s][self.streams[s].number(i)] for s, i in own_rows]
        return Batch.of([self.streams[s].row(i) for s, i in own_rows], reference)
