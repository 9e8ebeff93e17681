"""Text in, bins out: sources are read as a stream, cleaned, encoded by several processes, and
accounted for.

    files -> documents -> normalised -> ids -> bin     every byte read ends in the ledger

Formats: .txt, .jsonl, .tsv, .parquet, each but parquet also as .gz. Only "\\n" ends a line (a "\\r"
before it goes, and a BOM at the start). A bin is the same bytes however many processes made it:
documents keep the order of the files, and only the parent decides which of two equal documents is
the second.
"""

from __future__ import annotations

import functools
import glob
import gzip
import hashlib
import json
import multiprocessing
import os
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np

from data import Bin, sha256
from preparation.bin_writer import BinWriter
from runtime import hub
from runtime.console import UserError, say
from tokenization.tokenizer import Tokenizer
from tokenization.word_cache import Words

UNITS = ("auto", "file", "line", "block")
KINDS = (".txt", ".jsonl", ".tsv", ".parquet")
CHUNK = 1 << 20  # bytes of text given to a worker at once
ALONE = 3.0  # seconds that one process works before others are worth their start
DECODE, BLANKS = json.JSONDecoder().raw_decode, " \t\r\n"  # blanks that JSON allows around a value
BAD_SHARE = 0.001  # of documents that may be undecodable before the run stops

T, K, S, R = (TypeVar(x) for x in "TKSR")
Normaliser = Callable[[str], tuple[str, dict[str, int]]]
Contaminated = Callable[[str], bool]  # whether a document holds what is kept for a test


@dataclass
class Piece:
    """What was read for one document: its text, or why there is none; `size` in bytes as read."""

    text: str
    size: int
    fault: str = ""  # "undecodable", "too long"


@dataclass
class Ledger:
    """Documents and bytes by what became of them; `read` is always the sum of the rest."""

    documents: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)  # places changed, by normalising step

    def add(self, fates: Sequence[str], sizes: Sequence[int]) -> None:
        """Account for D documents: what became of each, and its bytes as read."""
        self.documents["read"] += len(fates)
        self.documents.update(fates)
        self.bytes["read"] += sum(sizes)
        for what, size in zip(fates, sizes, strict=True):
            self.bytes[what] += size

    def check(self, specs: Sequence[str], mend: str) -> None:
        """UserError where more than BAD_SHARE of the documents are undecodable."""
        bad, n = self.documents["undecodable"], self.documents["read"]
        if bad > BAD_SHARE * n:
            raise UserError(f"{', '.join(specs)}: {bad} of {n} documents are not UTF-8, more than "
                            f"{BAD_SHARE:.1%}; {mend}")

    def to_json(self) -> dict[str, Any]:
        """As meta.json keeps it."""
        return {"documents": dict(self.documents), "bytes": dict(self.bytes),
                "changes": dict(self.changes)}


def files(specs: Iterable[str], kinds: Sequence[str] = KINDS) -> list[Path]:
    """The files that paths, folders and globs name, in order; UserError for a spec that names
    none, and for a file of no known kind."""
    found: list[Path] = []
    for spec in specs:
        if spec.startswith("hf:"):
            named = hub.data(spec)
        elif (path := Path(spec)).is_dir():
            named = sorted(p for p in path.rglob("*") if kind_of(p) in kinds)
        else:
            named = [path] if path.is_file() else sorted(map(Path, glob.glob(spec, recursive=True)))
        if not named:
            raise UserError(f"{spec}: no such file, and no file matches it")
        for p in named:
            if kind_of(p) not in kinds:
                raise UserError(f"{p}: unknown kind of file; known are {', '.join(kinds)}, and .gz "
                                "of all but .parquet")
        found += named
    return found


def kind_of(path: Path) -> str:
    """A file's suffix, before .gz; a .parquet is packed inside, and in a .gz of no known kind."""
    packed = path.suffix == ".gz" and not path.stem.endswith(".parquet")
    return Path(path.stem).suffix if packed else path.suffix


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A file's bytes, of a .gz unpacked; UserError on one that cannot be read."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as f:
            yield f
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise UserError(f"{path}: not a whole gzip file ({e})") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None


def read(path: Path, unit: str = "auto", key: str = "text",
         max_bytes: int = 64 << 20) -> Iterator[Piece]:
    """The documents of one file, streamed. `unit` says what a document of a .txt is, and of a file
    of no known kind; `key` names the text elsewhere, "" takes lines of a .tsv as they are."""
    kind = kind_of(path)
    if kind == ".parquet":
        yield from (_decoded(raw or b"") for batch in parquet(path, key)
                    for raw in batch.column(0).cast("large_binary").to_pylist())
        return
    with opened(path) as f:
        if kind == ".jsonl" or (kind == ".tsv" and key):
            yield from (_jsonl if kind == ".jsonl" else _tsv)(_lines(f, max_bytes), path, key)
        else:
            yield from _txt(f, path, choose_unit(path) if unit == "auto" else unit, max_bytes)


def texts(path: str | Path, unit: str = "auto", key: str = "text") -> list[str]:
    """Every document of a file as it stands, for evaluation; UserError on one that is not UTF-8."""
    pieces = [piece for file in files([str(path)]) for piece in read(file, unit, key)]
    bad = next((i for i, piece in enumerate(pieces) if piece.fault), None)
    if bad is not None:
        raise UserError(f"{path}: document {bad + 1} is {pieces[bad].fault}; an evaluation leaves "
                        "nothing out, mend it")
    found = [piece.text for piece in pieces if piece.text.strip()]
    if not found:
        raise UserError(f"{path}: no text in it")
    if len(found) < len(pieces):
        say(f"{path}: {len(pieces) - len(found)} of {len(pieces)} documents are empty")
    return found


def choose_unit(path: Path) -> str:
    """What a document of this .txt is: a block where blank lines part its beginning, else a line,
    else the file."""
    with opened(path) as f:
        lines = f.read(1 << 20).strip().split(b"\n")
    if any(not line.strip() for line in lines):
        return "block"
    return "line" if len(lines) > 1 else "file"


def _lines(f: IO[bytes], max_bytes: int) -> Iterator[tuple[bytes, str]]:
    """(line without its end, fault); a line above max_bytes is passed over without being held."""
    first = True
    while line := f.readline(max_bytes):
        if b"\0" in line[:4096] and line.count(b"\0", 0, 4096) > 40:
            raise UserError(f"{getattr(f, 'name', 'file')}: binary, not text")
        size, more = len(line), line
        while size >= max_bytes and more and not more.endswith(b"\n"):  # on to where the line ends
            more = f.readline(max_bytes)
            size += len(more)
        if size > max_bytes:
            yield bytes(min(size, 1)), f"too long/{size}"
            continue
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        yield line.removeprefix(b"\xef\xbb\xbf") if first else line, ""
        first = False


def _decoded(raw: bytes) -> Piece:
    try:
        return Piece(raw.decode(), len(raw))
    except UnicodeDecodeError:
        return Piece("", len(raw), "undecodable")


def _txt(f: IO[bytes], path: Path, unit: str, max_bytes: int) -> Iterator[Piece]:
    held: list[bytes] = []
    size = 0
    for line, fault in _lines(f, max_bytes):
        if fault:
            yield Piece("", int(fault.split("/")[1]), "too long")
        elif unit == "line":
            yield _decoded(line)
        elif unit == "block" and not line.strip():
            if held:
                yield _decoded(b"\n".join(held))
            held, size = [], 0
        else:
            held.append(line)
            size += len(line) + 1
            if size > max_bytes:
                raise UserError(f"{path}: a document above {max_bytes >> 20} MB; cut it with "
                                "--documents line or block")
    if held:
        yield _decoded(b"\n".join(held))


def _jsonl(lines: Iterator[tuple[bytes, str]], path: Path, key: str) -> Iterator[Piece]:
    for n, (line, fault) in enumerate(lines, 1):
        if fault:
            yield Piece("", int(fault.split("/")[1]), "too long")
            continue
        if not line.strip():
            continue
        try:
            row, end = DECODE(whole := line.decode().strip(BLANKS))  # json.loads, but sooner
            if end < len(whole):
                raise ValueError
            text = row[key]
            if not isinstance(text, str):
                raise TypeError
            yield Piece(text, len(text) if text.isascii() else len(text.encode()))
        except UnicodeError:  # the line, or half a surrogate pair that it writes as an escape
            yield Piece("", len(line), "undecodable")
        except (ValueError, RecursionError):
            raise UserError(f"{path}, line {n}: not JSON; expected an object with "
                            f"{key!r}") from None
        except (KeyError, TypeError):
            raise UserError(f"{path}, line {n}: no text under {key!r}; name the key with "
                            "--text-key") from None


def named_once(names: Sequence[str], where: object) -> None:
    """UserError where two columns have one name, for which of them would be meant?"""
    if twice := [x for x in names if x and names.count(x) > 1]:
        raise UserError(f"{where}: two columns are called {twice[0]!r}; rename one")


def _tsv(lines: Iterator[tuple[bytes, str]], path: Path, key: str) -> Iterator[Piece]:
    header = next(lines, (b"", ""))[0].decode(errors="replace").split("\t")
    named_once(header, path)
    if key not in header:
        raise UserError(f"{path}: no column {key!r} in its first line, which has "
                        f"{', '.join(header)}; name one with --text-key")
    for n, (line, fault) in enumerate(lines, 2):
        cells = line.split(b"\t")
        if fault:
            yield Piece("", int(fault.split("/")[1]), "too long")
        elif len(cells) != len(header):
            raise UserError(f"{path}, line {n}: {len(cells)} columns, expected {len(header)}")
        else:
            yield _decoded(cells[header.index(key)])


def parquet(path: Path, key: str | None = None) -> Iterator[Any]:
    """Batches of a parquet file's rows: all columns, or the text that is called `key`."""
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = table.schema_arrow.names
        named_once(names, path)
        if key is not None and key not in names:
            raise UserError(f"{path}: no column {key!r}; it has {', '.join(names)}; name one with "
                            "--text-key")
        kind = "string" if key is None else str(table.schema_arrow.field(key).type)
        if kind not in ("string", "large_string", "null"):
            raise UserError(f"{path}: column {key!r} is {kind}, expected text; name another with "
                            "--text-key")
        yield from table.iter_batches(1024, columns=None if key is None else [key])
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(f"{path}: not a parquet file that can be read ({e})") from None


_job: Callable[[Any], Any]  # a worker's own


def _start(job: Callable[[Any], Any]) -> None:
    global _job
    _job = job
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker that waits for work does not see that nobody is left to give it any."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(given: Any) -> Any:
    return _job(given)


def in_order(job: Callable[[S], R], chunks: Iterable[tuple[K, S]],
             processes: int) -> Iterator[tuple[K, R]]:
    """Chunks, each of what is kept here and what a worker is given: the first with what `job` makes
    of the second, in order; by this process alone for the first ALONE seconds, as most files need
    no more, and then by several.

    Workers get the job once, with what it has learned so far, and are no further ahead than two
    chunks each, so that memory stays bounded. A fault of the reading is raised behind all that was
    read before it.
    """
    found, begun = iter(chunks), time.monotonic()
    for kept, given in found:
        yield kept, job(given)
        if processes > 1 and time.monotonic() - begun >= ALONE:
            break
    else:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start, (job,)) as pool:
        waiting: deque[tuple[K, Future]] = deque()
        for chunk in _with_fault(found):
            ahead = 0 if isinstance(chunk, UserError) else 2 * processes
            while len(waiting) > ahead:
                kept, work = waiting.popleft()
                yield kept, work.result()
            if isinstance(chunk, UserError):
                raise chunk
            kept, given = chunk
            waiting.append((kept, pool.submit(_work, given)))
        while waiting:
            kept, work = waiting.popleft()
            yield kept, work.result()


def _with_fault(chunks: Iterable[T]) -> Iterator[T | UserError]:
    """Chunks, and last the fault that ended their reading."""
    try:
        yield from chunks
    except UserError as e:
        yield e


class _Clean(NamedTuple):
    """What a worker made of D texts: columns, for an object a document is slow to send."""

    digests: list[bytes]  # of the clean texts
    chars: list[int]
    contaminated: list[bool]
    n_bytes: np.ndarray  # (D,)
    ids: np.ndarray  # of all, end to end
    sizes: np.ndarray  # (D,) how many of them each has
    changes: Counter[str]  # places, by step


@dataclass
class _Cleaning:
    """A worker's job: texts, cleaned and encoded."""

    tokenizer: Tokenizer
    normalise: Normaliser | None
    contaminated: Contaminated | None

    def __call__(self, texts: list[str]) -> _Clean:
        changes: Counter[str] = Counter()
        if self.normalise:
            cleaned = list(map(self.normalise, texts))
            texts = [text for text, _ in cleaned]
            for _, counts in cleaned:
                changes.update(counts)
        raw = [text.encode() for text in texts]
        found = map(self.contaminated, texts) if self.contaminated else repeat(False, len(texts))
        return _Clean([hashlib.blake2b(x, digest_size=16).digest() for x in raw],
                      [len(text.strip()) for text in texts], list(found),
                      np.array(list(map(len, raw)), np.int64), *self.words.documents(texts),
                      changes)

    @functools.cached_property
    def words(self) -> Words:
        """The worker's own memory for words."""
        return Words(self.tokenizer)


def prepare(specs: list[str], tokenizer_at: Path, out: Path, *, unit: str = "auto",
            key: str = "text", normalise: Normaliser | None = None, keep_duplicates: bool = False,
            contaminated: Contaminated | None = None, min_chars: int = 1, max_doc_mb: int = 64,
            on_bad: str = "stop", processes: int = 1) -> tuple[Bin, Ledger]:
    """Prepare text into a bin; the same bytes for any number of processes. Memory is that of the
    largest document, and of each that is kept 8 bytes, and a digest unless duplicates are kept."""
    tokenizer = Tokenizer.open(tokenizer_at)
    tokenizer.all_cores = True  # here, not in the workers
    sources = files(specs)
    writer = BinWriter(out, tokenizer.fingerprint, tokenizer.vocab_size)
    ledger, seen = Ledger(), set()
    job = _Cleaning(tokenizer, normalise, contaminated)
    try:
        with closing(in_order(job, _chunks(sources, unit, key, max_doc_mb << 20),
                              processes)) as found:
            for pieces, x in found:
                clean, fates, kept = zip(x.digests, x.chars, x.contaminated, strict=True), [], []
                for piece in pieces:
                    what = piece.fault
                    if not what:
                        digest, chars, contaminated = next(clean)
                        what = "empty" if not chars else "too short" if chars < min_chars else \
                            "contaminated" if contaminated else \
                            "duplicate" if digest in seen else "kept"
                        kept.append(what == "kept")
                        if what == "kept" and not keep_duplicates:
                            seen.add(digest)
                    fates.append(what)
                ledger.add(fates, [piece.size for piece in pieces])
                ledger.changes.update(x.changes)
                held = np.array(kept, bool)
                writer.extend(x.ids[np.repeat(held, x.sizes)], x.sizes[held],
                              int(x.n_bytes[held].sum()))
        if on_bad == "stop":
            ledger.check(specs, "mend them, or leave them out with --on-bad skip")
        if not ledger.documents["kept"]:
            raise UserError(f"{', '.join(specs)}: no document left of {ledger.documents['read']} "
                            "read; the corpus is empty")
        described = [{"path": str(p), "bytes": p.stat().st_size, "sha256": sha256(p)}
                     for p in sources]
        return writer.close(ledger.to_json(), described), ledger
    except BaseException:
        writer.abandon()
        raise


def _chunks(sources: list[Path], unit: str, key: str,
            max_bytes: int) -> Iterator[tuple[list[Piece], list[str]]]:
    """Documents of all files in order, about a megabyte at a time, and the texts of those without
    a fault; says what a document is."""
    chunk: list[Piece] = []
    size = 0
    for path in sources:
        if kind_of(path) == ".txt":
            chosen = choose_unit(path) if unit == "auto" else unit
            say(f"{path}: a document is a {chosen}"
                + (" (chosen: --documents says otherwise)" if unit == "auto" else ""))
        for piece in read(path, unit, key, max_bytes):
            chunk.append(piece)
            size += piece.size
            if size >= CHUNK:
                yield chunk, [p.text for p in chunk if not p.fault]
                chunk, size = [], 0
    if chunk:
        yield chunk, [p.text for p in chunk if not p.fault]
