"""Token bins, and the packed rows that training reads from them.

A *bin* is a folder: `tokens.bin` (little-endian u16 or u32), `starts.bin` (i64, one more than there
are documents), `mask.bin` (u8, absent where every token is trained), `groups.bin` (u64, documents
with one number are held out together) and `meta.json`. Three lines of numpy read it.

A document of n tokens gives n - 1 predictions. A *row* is T predictions of one or more documents.
`doc` and `pos` travel with the tokens; attention's mask and the rotary positions come from them.
Nothing is padded but the unused tail of a row.

    TokenStream      text; documents are cut where a row ends, and the next row goes on there
    PackedExamples   conversations, translations, preference pairs; none of them is ever cut

Row i of a source is a function of (seed, i). So a loader's state is one integer per source, seeking
is a division, and any number of ranks reads the same rows.
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
IGNORE = -100  # a target that is not trained: torch's own ignore_index
OPEN_ROWS = 64  # rows that are filled at a time


def sha256(file: Path) -> str:
    """A file's SHA-256, in hex."""
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Bin:
    """A bin opened for reading: `tokens` and `mask` are memory maps, `starts` is (N+1,)."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            wanted = {
                k: self.meta[k] for k in ("format", "dtype", "vocabulary", "tokenizer", "sha256")}
        except FileNotFoundError:
            raise UserError(f"{folder}: no meta.json here, so this is not a bin; make one with "
                            "prepare.py") from None
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{folder}/meta.json: damaged ({e}); prepare the bin again") from None
        if wanted["format"] != FORMAT or wanted["dtype"] not in ("u16", "u32"):
            raise UserError(f"{folder}: bin format {wanted['format']} {wanted['dtype']}, this "
                            f"program reads format {FORMAT} u16 or u32; prepare the bin again")
        dtype = np.dtype({"u16": "<u2", "u32": "<u4"}[wanted["dtype"]])
        self.starts = self._read("starts.bin", np.dtype("<i8"), self.meta["documents"] + 1)
        self.tokens = self._read("tokens.bin", dtype, self.meta["tokens"])
        self.mask, self.groups = (
            self._read(name, np.dtype(kind), self.meta[n]) if name in self.meta["sha256"] else None
            for name, kind, n in (("mask.bin", "u1", "tokens"), ("groups.bin", "<u8", "documents")))
        if (self.starts[0] != 0 or self.starts[-1] != len(self.tokens)
            or (np.diff(self.starts) < 0).any()):
            raise UserError(f"{folder}/starts.bin: offsets do not fit tokens.bin; prepare it again")

    def _read(self, name: str, dtype: np.dtype, n: int) -> np.ndarray:
        path = self.folder / name
        found = path.stat().st_size if path.exists() else 0
        if found != n * dtype.itemsize:
            raise UserError(f"{path}: {found} bytes, expected {n * dtype.itemsize}; the bin was "
                            "cut short, prepare it again")
        return np.memmap(path, dtype, "r") if n else np.zeros(0, dtype)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def document(self, i: int) -> np.ndarray:
        """Token ids of document i, (n,)."""
        return self.tokens[self.starts[i] : self.starts[i + 1]]

    def trained(self, i: int) -> np.ndarray:
        """Which tokens of document i are trained, (n,) bool."""
        at = slice(self.starts[i], self.starts[i + 1])
        return np.ones(at.stop - at.start, bool) if self.mask is None else self.mask[at] > 0

    def check(self, tokenizer_sha: str, vocab_size: int) -> None:
        """Refuse a bin of another tokenizer, damaged, or with ids the model has no row for."""
        if self.meta["tokenizer"] != tokenizer_sha:
            raise UserError(
                f"{self.folder}: made with tokenizer {self.meta['tokenizer'][:12]}, the model has "
                f"{tokenizer_sha[:12]}; prepare the text again with this model's tokenizer")
        for name, digest in self.meta["sha256"].items():
            if sha256(self.folder / name) != digest:
                raise UserError(f"{self.folder / name}: its sha256 is not the one in meta.json; "
                                "the file was changed, prepare the bin again")
        top = int(self.tokens.max()) if len(self.tokens) else -1
        if top >= vocab_size:
            raise UserError(f"{self.folder}: holds id {top}, the model's vocabulary ends at "
                            f"{vocab_size - 1}; prepare the text again with this model's tokenizer")
        if self.meta["trained"] == 0:
            raise UserError(f"{self.folder}: no token to train on in {len(self)} documents: the "
                            "mask trains none, or no document has two; prepare it again")


def validation_split(bin: Bin, share: float) -> np.ndarray:
    """Which documents are kept for evaluation, (N,) bool: those whose hash falls below `share`.

    A hash, not a draw: a document stays on its side when others come or go. Only the beginning is
    hashed, so that two versions of one article fall on the same side: 64 tokens, but all of an
    example before its first answer, as many may begin with one long system prompt. All there is is
    never held out. Both documents of a preference pair are one, as are a pair's two directions.
    """
    def beginning(i: int) -> np.ndarray:
        asked = 0 if kind == "text" else bin.trained(i).argmax() or bin.starts[-1]  # all is trained
        return bin.document(i)[: max(64, asked)]

    kind, h = bin.meta["kind"], bin.groups
    each = 2 if kind == "pairs" else 1
    if share > 0 and h is None:
        digests = (hashlib.blake2b(beginning(i).tobytes(), digest_size=8).digest()
                   for i in range(0, len(bin), each))
        h = np.frombuffer(b"".join(digests), "<u8")
    if share <= 0 or (h == h[:1]).all():
        return np.zeros(len(bin), bool)
    return np.repeat(h <= max(np.uint64(share * 2.0**64), h.min()), each)


@dataclass
class Source:
    """Documents of one bin that are mixed in at `weight` (shares are weights over their sum)."""

    name: str
    bin: Bin
    documents: np.ndarray  # (n,) indices into the bin
    weight: float

    @property
    def sha(self) -> str:
        """What the source holds, in one word; what is held out of it hangs on its groups."""
        files = self.bin.meta["sha256"]
        said = "".join(files[x] for x in ("tokens.bin", "groups.bin") if x in files)
        return said if len(said) == 64 else hashlib.sha256(said.encode()).hexdigest()


class RowDocuments(NamedTuple):
    """What the host knows of the documents in packed rows, so that no GPU is asked for it."""

    doc: Tensor  # (B,T), on the CPU
    lengths: list[int]  # of documents end to end over all rows; an unused tail counts as one
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
    """Rows of packed documents; fields (B,T) int64. `doc` is -1 and `targets` IGNORE in an unused
    tail. A batch is made on the CPU, where it finds `documents` and `trained` by itself.

    `reference` (B,T) float32: a reference's NLL of each target, where one is kept. `trained` (n,):
    the places, among B T, of the targets that are not IGNORE.
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
        """From rows of (4,T): tokens, targets, doc, pos."""
        import torch

        kept = torch.from_numpy(np.stack(reference)) if len(reference) else None
        return cls(*torch.from_numpy(np.stack(rows, axis=1)), kept)

    @property
    def n_trained(self) -> int:
        """How many targets are trained; known without asking the device."""
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
        """Lay out an epoch: O(documents), reads no token."""
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
    """A source whose documents are never cut, as an endless list of rows.

    What lies in one row stays together in every epoch; the rows come in another order each time.
    Both documents of a preference pair lie in one row, side by side, the chosen one first.
    """

    def __init__(self, source: Source, T: int, seed: Sequence[int]):
        self.source, self.bin, self.T, self.seed = source, source.bin, T, tuple(seed)
        each = 2 if source.bin.meta["kind"] == "pairs" else 1
        units = np.asarray(source.documents).reshape(-1, each)
        lengths = (self.bin.starts[units + 1] - self.bin.starts[units] - 1).clip(0)  # predictions
        units, sizes = units[lengths.sum(1) > 0], lengths.sum(1)[lengths.sum(1) > 0]
        what, a_unit = ("pair", "a pair") if each == 2 else ("example", "an example")
        if not len(units):
            raise UserError(f"{self.bin.folder}: no {what} to train on")
        if long := int((sizes > T).sum()):
            raise UserError(
                f"{self.bin.folder}: {long} of {len(sizes)} {what}s are longer than a row of {T}, "
                f"the longest {sizes.max()}; {a_unit} is never cut here: raise --seq-len, or "
                f"prepare the bin with --max-tokens {T} --too-long drop (or cut)")
        self.tokens = int(sizes.sum())  # predictions in an epoch
        rows = best_fit_pack(sizes, T, np.random.default_rng(self.seed))
        self.packed, self.sizes = [units[x] for x in rows], np.array([sizes[x].sum() for x in rows])
        self.rows, self.epoch = len(rows), -1

    def _enter(self, epoch: int) -> None:
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
    """Units of at most T into rows of T: in random order, each into the open row it fills best."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, row), the fullest first
    for unit in rng.permutation(len(sizes)).tolist():
        at = bisect_left(rooms, (int(sizes[unit]), -1))
        if at < len(rooms):
            room, row = rooms.pop(at)
        else:
            room, row = T, len(rows)
            rows.append([])
            if len(rooms) == OPEN_ROWS:
                rooms.pop(0)
        rows[row].append(unit)
        insort(rooms, (room - int(sizes[unit]), row))
    return rows


def open_stream(source: Source, T: int, seed: Sequence[int]) -> RowStream:
    """The rows of a source: only running text is cut where a row ends."""
    if source.bin.meta["kind"] == "text":
        return TokenStream(source, T, seed)
    return PackedExamples(source, T, seed)


class Loader:
    """Endless micro-batches from a mixture; each row comes from the source furthest behind its
    share.

    Shares are exact in predictions, to one row. All ranks walk the same list of rows and each reads
    only its own, so a step of G rows is the same G rows on any number of ranks. `rows_consumed`,
    one number per source, is the whole state.
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
