"""Text files -> token bin: documents are read as a stream, normalised, deduplicated and encoded by
several processes.

Every byte that is read ends in the ledger. A bin is the same bytes for any number of processes:
documents keep the order of the files, and only the parent process decides which of two equal
documents is the duplicate.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data import Bin, sha256
from languages.language import Language
from languages.normalise import COMMON_STEPS, Normaliser, cleaning_of, normaliser
from preparation.bin_writer import BinWriter
from preparation.ledger import Ledger
from preparation.readers import (
    RawDocument,
    detect_document_unit,
    file_format,
    list_files,
    read_documents,
)
from preparation.workers import Workers
from runtime.console import UserError, info
from tokenization.tokenizer import Tokenizer

IsContaminated = Callable[[str], bool]  # whether a text holds an item of a test


def prepare_text(specs: Sequence[str], tokenizer_path: Path | str, out: Path | str, *,
                 unit: str = "auto", key: str = "text", normalise: Normaliser | None = None,
                 keep_duplicates: bool = False, is_contaminated: IsContaminated | None = None,
                 min_chars: int = 1, max_doc_mb: int = 64, on_bad: str = "stop",
                 workers: Workers | None = None) -> tuple[Bin, Ledger]:
    """Prepare text files into a bin.

    `unit`: what a document of a .txt is ("auto", "file", "line", "block"); `key`: the text column
    of other formats; `on_bad`: "stop" or "skip" if more than 0.1 % of the documents are
    undecodable. Memory: the largest document, 8 bytes for each document that is kept, and 16 for
    its digest unless duplicates are kept.
    """
    tokenizer = Tokenizer.open(tokenizer_path, parallel=True)  # a worker gets one with one thread
    workers = workers or Workers()
    sources = list_files(specs)
    ledger = Ledger()
    digests: set[bytes] = set()  # digests of the documents that are kept
    encoder = _TextEncoder(tokenizer, normalise, is_contaminated)
    writer = BinWriter(Path(out), tokenizer.fingerprint, tokenizer.vocab_size)
    try:
        chunks = _chunks(sources, unit, key, max_doc_mb << 20, workers.chunk_bytes)
        with closing(workers.map(encoder, chunks)) as results:
            for documents, encoded in results:
                outcomes = []
                is_kept = np.zeros(len(encoded.digests), bool)
                position = 0  # among the documents without a fault
                for document in documents:
                    if document.fault:
                        outcomes.append(document.fault)
                        continue
                    outcome = _outcome(encoded, position, min_chars, digests)
                    if outcome == "kept":
                        is_kept[position] = True
                        if not keep_duplicates:
                            digests.add(encoded.digests[position])
                    outcomes.append(outcome)
                    position += 1
                ledger.add(outcomes, [document.n_bytes for document in documents])
                ledger.changes.update(encoded.changes)
                ledger.n_unspelled += int(encoded.n_unspelled[is_kept].sum())
                writer.extend(encoded.ids[np.repeat(is_kept, encoded.sizes)],
                              encoded.sizes[is_kept], int(encoded.n_bytes[is_kept].sum()))
        if on_bad == "stop":
            ledger.check_undecodable(
                specs, "correct the files, or leave these documents out with --on-bad skip")
        if not ledger.documents["kept"]:
            raise UserError(f"{', '.join(specs)}: no document left of {ledger.documents['read']} "
                            "read; the corpus is empty")
        bin = writer.close(ledger.to_json(), describe_sources(sources),
                           cleaning=cleaning_of(normalise))
        return bin, ledger
    except BaseException:
        writer.abandon()
        raise


def build_normaliser(names: Sequence[str], languages: Sequence[Language],
                     omitted: Sequence[str] = ()) -> Normaliser | None:
    """The normaliser of the steps that --normalise names: `all` steps of the languages but the
    `omitted` ones, `none`, or steps by name."""
    if list(names) == ["none"]:
        return None
    available = dict(COMMON_STEPS)
    for language in languages:
        available |= language.steps
    if list(names) == ["all"]:
        names = [name for name in available if name not in omitted]
    return normaliser(names, available, [language.code for language in languages])


def describe_sources(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The sources of a bin as meta.json has them: path, size and sha256 of each file."""
    return [{"path": str(p), "bytes": p.stat().st_size, "sha256": sha256(p)} for p in paths]


class _EncodedTexts(NamedTuple):
    """What a worker returns for D texts, as columns: an object per document is slow to send."""

    digests: list[bytes]  # of the normalised texts
    chars: list[int]
    contaminated: list[bool]
    n_bytes: np.ndarray  # (D,)
    ids: np.ndarray  # (N,) of all documents, end to end
    sizes: np.ndarray  # (D,) ids of each
    n_unspelled: np.ndarray  # (D,) characters that the tokenizer cannot spell
    changes: Counter[str]  # places changed, by normalising step


@dataclass
class _TextEncoder:
    """The job of a worker: normalise and encode texts."""

    tokenizer: Tokenizer
    normalise: Normaliser | None
    is_contaminated: IsContaminated | None

    def __call__(self, texts: list[str]) -> _EncodedTexts:
        changes: Counter[str] = Counter()
        if self.normalise:
            normalised = [self.normalise(text) for text in texts]
            texts = [text for text, _ in normalised]
            for _, counts in normalised:
                changes.update(counts)
        encoded_bytes = [text.encode() for text in texts]
        contaminated = [False] * len(texts)
        if self.is_contaminated:
            contaminated = [self.is_contaminated(text) for text in texts]
        ids, sizes = self.encode(texts)
        return _EncodedTexts(
            digests=[hashlib.blake2b(x, digest_size=16).digest() for x in encoded_bytes],
            chars=[len(text.strip()) for text in texts], contaminated=contaminated,
            n_bytes=np.array([len(x) for x in encoded_bytes], np.int64), ids=ids, sizes=sizes,
            n_unspelled=np.array([self.tokenizer.count_unspelled(text) for text in texts],
                                 np.int64),
            changes=changes)

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """`Tokenizer.document` of D texts: ids of all, end to end, and the number of each, (D,)."""
        begin, end = self.tokenizer.begin_end_ids
        documents = [[*begin, *ids, *end] for ids in self.tokenizer.encode_batch(texts)]
        sizes = np.array([len(ids) for ids in documents], np.int64)
        return np.fromiter(chain.from_iterable(documents), np.uint32, int(sizes.sum())), sizes


def _outcome(encoded: _EncodedTexts, i: int, min_chars: int, seen: Set[bytes]) -> str:
    """What becomes of document i; `seen` are the digests of the documents that are kept."""
    if not encoded.chars[i]:
        return "empty"
    if encoded.chars[i] < min_chars:
        return "too short"
    if encoded.contaminated[i]:
        return "contaminated"
    if encoded.digests[i] in seen:
        return "duplicate"
    return "kept"


def _chunks(sources: Sequence[Path], unit: str, key: str, max_bytes: int,
            chunk_bytes: int) -> Iterator[tuple[list[RawDocument], list[str]]]:
    """Chunks of about `chunk_bytes` of all documents in order: the documents, and the texts of
    those without a fault."""
    chunk: list[RawDocument] = []
    n_bytes = 0
    for path in sources:
        if file_format(path) == ".txt":
            if unit == "auto":
                info(f"{path}: a document is a {detect_document_unit(path)} (detected; set another "
                    "with --documents)")
            else:
                info(f"{path}: a document is a {unit}")
        for document in read_documents(path, unit, key, max_bytes):
            chunk.append(document)
            n_bytes += document.n_bytes
            if n_bytes >= chunk_bytes:
                yield chunk, [x.text for x in chunk if not x.fault]
                chunk, n_bytes = [], 0
    if chunk:
        yield chunk, [x.text for x in chunk if not x.fault]
