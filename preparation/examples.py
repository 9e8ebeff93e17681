"""Rows of files -> examples -> token bin, for conversations, translations and preferences.

An encoder makes examples of rows, ids and loss mask together. Rows are encoded by several
processes. An example depends on its row and the row's number only (with --shots, also on earlier
pairs of its chunk), so a bin is the same bytes for any number of processes. A row that cannot be an
example is refused with its file and line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data import Bin
from preparation.bin_writer import BinWriter
from preparation.ledger import Ledger
from preparation.readers import Row
from preparation.text import describe_sources
from preparation.workers import Workers
from runtime.console import FLAGS, UserError
from tokenization.chat_template import (
    MAX_TEMPLATE_CHARS,
    ChatTemplate,
    Message,
    RenderedDocument,
)
from tokenization.document import Document
from tokenization.tokenizer import Tokenizer

MAX_TOO_LONG_SHARE = 0.01  # of the examples; more must be asked for with --too-long


@dataclass
class Example:
    """What one row became: documents that are kept or left out together, or a fault that says why
    there are none.

    `key` is equal for duplicates. `directions` names the direction of each document of a
    translation. `changes` counts the places changed, by normalising step.
    """

    documents: list[Document]
    key: bytes = b""
    fault: str = ""
    directions: tuple[str, ...] = ()
    changes: Mapping[str, int] = field(default_factory=dict)


@dataclass
class LengthLimit:
    """The tokens that an example may have (0: no limit; both documents of a preference pair
    together), and what is done with a longer one: "stop", "drop" or "cut"."""

    max_tokens: int = 0
    too_long: str = "stop"


Encoder = Callable[[list[Row]], list[Example]]


def example_key(content: Any) -> bytes:
    """A digest that is equal for duplicates of an example."""
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).digest()


@contextmanager
def with_location(row: Row) -> Iterator[None]:
    """Put the row's location in front of the message of a UserError."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{row.location}: {e}", e.code) from None


def text_cell(row: Row, key: str) -> str:
    """The text in a cell; UserError if there is none."""
    value = row.cells.get(key)
    if not isinstance(value, str):
        if key in row.cells:
            raise UserError(f"{row.location}: no text under {key!r}; found {str(value)[:40]!r}")
        columns = ", ".join(map(str, row.cells)) or "nothing"
        raise UserError(f"{row.location}: no text under {key!r}; it has {columns}")
    return require_utf8(row, value)


def require_utf8(row: Row, text: str) -> str:
    """The text itself; UserError if it holds half a surrogate pair, which JSON can write and no
    UTF-8 file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        context = text[max(0, e.start - 20):e.start]
        raise UserError(f"{row.location}: half a character at {context!r} ...; the program that "
                        "wrote the file cut a text there") from None
    return text


def open_template(name: str, folder: Path, tokenizer: Tokenizer,
                  kwargs: Mapping[str, Any] | None = None) -> ChatTemplate:
    """The chat template that --template names: "model" (the model's own, or ours if it has none),
    "plain" (ours), or a .jinja file; with the variables of --template-kwargs."""
    return _open_template(name, folder, tokenizer).with_kwargs(kwargs or {})


def _open_template(name: str, folder: Path, tokenizer: Tokenizer) -> ChatTemplate:
    template = None
    if name == "model" and folder.is_dir():
        template = ChatTemplate.from_folder(folder, tokenizer)
    if template is not None:
        return template
    if name in ("model", "plain"):
        return ChatTemplate.plain(tokenizer)
    try:
        with open(name, encoding="utf-8") as file:
            source = file.read(MAX_TEMPLATE_CHARS + 1)
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--template {name}: cannot be read ({e}); expected model, plain, or a "
                        ".jinja file", FLAGS) from None
    if len(source) > MAX_TEMPLATE_CHARS:
        raise UserError(f"--template {name}: a template of more than 1 MB; name another one", FLAGS)
    return dataclasses.replace(ChatTemplate.plain(tokenizer), origin=Path(name), source=source)


def render_conversations(template: ChatTemplate, rows: Sequence[Row],
                         conversations: Sequence[Sequence[Message]],
                         loss_on: str = "assistant") -> list[RenderedDocument]:
    """Render conversations with their loss. The conversations may be fewer than their rows; a
    refusal names the row."""
    documents = template.render_all_with_mask(conversations, loss_on)
    rendered = []
    for row, _ in zip(rows, conversations, strict=False):
        with with_location(row):
            rendered.append(next(documents))
    return rendered


def write_examples(rows: Iterable[Row], encoder: Encoder, out: Path | str, tokenizer: Tokenizer,
                   kind: str, sources: Sequence[Path], prompt: dict[str, Any], limit: LengthLimit,
                   keep_duplicates: bool = False, workers: Workers | None = None,
                   cleaning: dict[str, Any] | None = None) -> tuple[Bin, Ledger, Counter[str]]:
    """Write the examples of rows into a bin of this kind. Returns the bin, the ledger, and the
    number of documents by direction.

    Examples above the limit are left out, but more than MAX_TOO_LONG_SHARE of them are refused
    unless `limit.too_long` is "drop" or "cut". The same holds for examples of which a cut leaves
    no trained token, or two equal answers. The message names the first such row.
    """
    workers = workers or Workers()
    writer = BinWriter(Path(out), tokenizer.fingerprint, tokenizer.vocab_size, kind)
    state = _ExampleWriter(writer, kind, limit, keep_duplicates)
    try:
        with closing(workers.map(encoder, chunk_rows(rows, workers.chunk_bytes))) as results:
            for chunk, examples in results:
                for row, example in zip(chunk, examples, strict=True):
                    state.add(row, example)
        state.check_lengths()
        if len(writer.starts) == 1:
            raise UserError(f"{', '.join(map(str, sources))}: {state.describe_empty()}")
        ledger = state.ledger.to_json() | {"max_tokens": limit.max_tokens}
        bin = writer.close(ledger, describe_sources(sources), prompt, cleaning)
        return bin, state.ledger, state.directions
    except BaseException:
        writer.abandon()
        raise


class _ExampleWriter:
    """Decides which examples are kept, and enters each into the ledger."""

    def __init__(self, writer: BinWriter, kind: str, limit: LengthLimit, keep_duplicates: bool):
        self.writer, self.kind, self.limit = writer, kind, limit
        self.keep_duplicates = keep_duplicates
        self.ledger = Ledger()
        self.directions: Counter[str] = Counter()
        self.seen: set[bytes] = set()  # keys of the examples that are kept
        self.first: dict[str, str] = {}  # the location of the first row of each outcome
        self.longest = 0
        # both documents of a preference pair share the limit
        self.cut_at = limit.max_tokens // 2 if kind == "pairs" else limit.max_tokens

    def add(self, row: Row, example: Example) -> None:
        """Enter an example into the ledger and, if it is kept, into the bin."""
        outcome = self._outcome(example)
        self.ledger.add([outcome], [row.n_bytes])
        self.ledger.changes.update(example.changes)
        self.first.setdefault(outcome, row.location)
        if outcome not in ("kept", "cut"):
            return
        if not self.keep_duplicates:
            self.seen.add(example.key)
        self.directions.update(example.directions)
        for document in example.documents:
            self.ledger.n_unspelled += document.n_unspelled
            self.writer.add(document, example.key if example.directions else b"")

    def _outcome(self, example: Example) -> str:
        """The outcome of an example, whose documents may be cut here."""
        if example.fault:
            return example.fault
        if example.key in self.seen:
            return "duplicate"
        sizes = [len(document.ids) - 1 for document in example.documents]
        size = sum(sizes) if self.kind == "pairs" else max(sizes, default=0)
        if self.kind == "text" or not 0 < self.limit.max_tokens < size:
            return "kept"
        self.longest = max(self.longest, size)
        if self.limit.too_long != "cut":
            return "too long"
        example.documents = [cut(document, self.cut_at) for document in example.documents]
        if any(d.mask is not None and not any(d.mask) for d in example.documents):
            return "masked"
        if self.kind == "pairs" and have_equal_ids(example.documents):
            return "equal"  # the answers differ only behind the cut
        return "cut"

    def check_lengths(self) -> None:
        """UserError if more examples are too long than are left out without being asked for."""
        n_read = self.ledger.documents["read"]
        n_too_long = self.ledger.documents["too long"]
        if self.limit.too_long == "stop" and n_too_long > MAX_TOO_LONG_SHARE * n_read:
            raise UserError(
                f"{self.first['too long']}: the first of {n_too_long:,} of {n_read:,} examples "
                f"that are longer than {self.limit.max_tokens:,} tokens, the longest "
                f"{self.longest:,}; leave them out with --too-long drop, shorten them with "
                "--too-long cut, or raise --max-tokens")
        reasons = {"masked": f"have no trained token among their first {self.cut_at:,}: a cut "
                             "leaves only the question",
                   "equal": f"are two equal answers in their first {self.cut_at:,}: a cut leaves "
                            "nothing to prefer"}
        for outcome, reason in reasons.items():
            count = self.ledger.documents[outcome]
            if count > MAX_TOO_LONG_SHARE * n_read:
                raise UserError(
                    f"{self.first[outcome]}: the first of {count:,} of {n_read:,} examples that "
                    f"{reason}; raise --max-tokens, or leave them out with --too-long drop")

    def describe_empty(self) -> str:
        """Why no example is left."""
        outcomes = [f"{self.ledger.documents[x]:,} {x}, the first {self.first[x]}"
                    for x in self.first]
        text = f"no example left of {self.ledger.documents['read']} read"
        return f"{text} ({', '.join(outcomes)})" if outcomes else text


def chunk_rows(rows: Iterable[Row], chunk_bytes: int) -> Iterator[tuple[list[Row], list[Row]]]:
    """Rows, numbered, in chunks of about `chunk_bytes`; rows that stand before a fault are
    returned before it is raised."""
    chunk: list[Row] = []
    n_bytes = 0
    try:
        for number, row in enumerate(rows):
            row.number = number
            chunk.append(row)
            n_bytes += row.n_bytes
            if n_bytes >= chunk_bytes:
                yield chunk, chunk
                chunk, n_bytes = [], 0
    except UserError:
        if chunk:
            yield chunk, chunk
        raise
    if chunk:
        yield chunk, chunk


def have_equal_ids(pair: Sequence[Document]) -> bool:
    """Whether two documents have the same ids."""
    first, second = pair
    return np.array_equal(first.ids, second.ids)


def cut(document: Document, n_predictions: int) -> Document:
    """The first `n_predictions` predictions of a document."""
    mask = None if document.mask is None else document.mask[: n_predictions + 1]
    return dataclasses.replace(document, ids=document.ids[: n_predictions + 1], mask=mask)
