"""Rows of files in, examples out: conversations, and what a bin of examples is made by.

One idea: an example is made or refused where its file and line are still known. Ids and loss mask
come out of one function together, so that what is trained can be looked at (`prepare.py show`) and
is never computed a second time. Rows are made into examples by several processes; what an example
is depends on its row and its place among all rows (with --shots, also on the pairs before it in the
same megabyte) and no more, so that a bin is the same bytes however many there were.

A row is a JSON object of .jsonl or .json (a list), a line of .tsv under its header, or a line of
.parquet; two aligned .txt files give rows too.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data import Bin, sha256
from preparation import text as corpus
from preparation.bin_writer import BinWriter
from runtime.console import UserError, say
from tokenization.chat_template import Template, documents
from tokenization.document import Document
from tokenization.tokenizer import Tokenizer

KINDS = (".jsonl", ".json", ".tsv", ".parquet")
LONG_SHARE = 0.01  # of examples longer than a row that are left out without being asked for
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
            "system": "system", "tool": "tool"}  # ShareGPT's `from`
FORMS = {"messages": "messages (role, content)", "conversations": "ShareGPT (from, value)",
         "instruction": "Alpaca (instruction, input, output)"}


@dataclass
class Row:
    """A row of a file: where it stands, for messages to people, and its cells by name."""

    where: str
    cells: Mapping[str, Any]
    size: int  # bytes as read
    number: int = 0  # among all rows of all files


@dataclass
class Example:
    """What one row became: documents that are kept or left out together, or a fault that says
    why there is none. `key` tells duplicates; `kinds` are the documents', where they have some."""

    documents: list[Document]
    key: bytes = b""
    fault: str = ""
    kinds: tuple[str, ...] = ()
    changes: Mapping[str, int] = field(default_factory=dict)  # places cleaned, by step


def rows(path: Path) -> Iterator[Row]:
    """The rows of one file, in order; UserError, with the line, on what is none."""
    kind = corpus.kind_of(path)
    if kind == ".parquet":
        yield from _parquet(path)
        return
    with corpus.opened(path) as f:
        if kind == ".json":
            found = _json(f.read(), f"{path}")
            if not isinstance(found, list):
                raise UserError(f"{path}: expected a list of objects; write one object a line into "
                                "a .jsonl")
            for n, cells in enumerate(found, 1):
                yield _row(cells, f"{path}, object {n}", len(json.dumps(cells).encode()))
        else:
            yield from (_jsonl if kind == ".jsonl" else _tsv)(f, path)


def _json(raw: bytes, where: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: byte {e.start} is not UTF-8; save it as UTF-8") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not JSON ({' '.join(str(e).split())[:60]})") from None


def _row(cells: Any, where: str, size: int) -> Row:
    if not isinstance(cells, dict):
        raise UserError(f"{where}: expected a JSON object, found {str(cells)[:40]!r}")
    return Row(where, cells, size)


def _jsonl(f: Iterable[bytes], path: Path) -> Iterator[Row]:
    for n, line in enumerate(f, 1):
        if line.strip():
            yield _row(_json(line, f"{path}, line {n}"), f"{path}, line {n}", len(line))


def _tsv(f: Iterable[bytes], path: Path) -> Iterator[Row]:
    header: list[str] = []
    for n, raw in enumerate(f, 1):
        where = f"{path}, line {n}"
        try:
            cells = raw.decode("utf-8-sig" if n == 1 else "utf-8").rstrip("\r\n").split("\t")
        except UnicodeDecodeError as e:
            raise UserError(f"{where}: byte {e.start} is not UTF-8; save it as UTF-8") from None
        if not header:
            header = cells
            if len(header) < 2:
                raise UserError(f"{where}: one column, {header[0][:40]!r}; expected a header line "
                                "with a name for each column, parted by tabs")
            corpus.named_once(header, where)
        elif len(cells) != len(header):
            raise UserError(f"{where}: {len(cells)} columns, expected {len(header)} as in line 1")
        else:
            yield Row(where, dict(zip(header, cells, strict=True)), len(raw))


def _parquet(path: Path) -> Iterator[Row]:
    found = (cells for batch in corpus.parquet(path) for cells in batch.to_pylist())
    try:
        for n, cells in enumerate(found, 1):
            yield Row(f"{path}, row {n}", cells, len(str(cells).encode()))
    except UnicodeDecodeError:
        raise UserError(f"{path}: a text in it is not UTF-8; mend it, or leave its row out") \
            from None


def aligned(one: Path, other: Path, names: tuple[str, str]) -> Iterator[Row]:
    """Rows of two text files whose lines belong together; UserError where one has more lines."""
    texts = []
    for path in (one, other):
        try:
            with corpus.opened(path) as f:
                text = f.read().decode("utf-8-sig")
        except UnicodeDecodeError as e:
            raise UserError(f"{path}: byte {e.start} is not UTF-8; save it as UTF-8") from None
        texts.append(text.removesuffix("\n").split("\n"))
    if len(texts[0]) != len(texts[1]):
        raise UserError(f"{other}: {len(texts[1]):,} lines, {one} has {len(texts[0]):,}; aligned "
                        "files have a line for each line of the other")
    for n, pair in enumerate(zip(*texts, strict=True), 1):
        pair = [x.removesuffix("\r") for x in pair]
        size = sum(len(x.encode()) for x in pair)
        yield Row(f"{one}, line {n}", dict(zip(names, pair, strict=True)), size)


def text_at(row: Row, key: str) -> str:
    """A row's text under a name; UserError if there is none."""
    if not isinstance(found := row.cells.get(key), str):
        known = ", ".join(map(str, row.cells)) or "nothing"
        there = f"found {str(found)[:40]!r}" if key in row.cells else f"it has {known}"
        raise UserError(f"{row.where}: no text under {key!r}; {there}")
    return _whole(row, found)


def _whole(row: Row, text: str) -> str:
    """A text, if it is one: JSON can write half of a character, which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"{row.where}: half a character at {text[max(0, e.start - 20):e.start]!r} "
                        "...; whatever wrote the file cut a text there") from None
    return text


def form_of(row: Row) -> str | None:
    """Which of FORMS a row is written in, if any."""
    return next((x for x in FORMS if x in row.cells), None)


def conversation(row: Row) -> list[dict[str, str]]:
    """A row's messages {"role", "content"}; UserError on a form or a role that is not known."""
    cells = row.cells
    form = form_of(row)
    if form is None:
        raise UserError(f"{row.where}: no conversation; expected one of {', '.join(FORMS)}, found "
                        f"{', '.join(map(str, cells)) or 'nothing'}")
    if form != "instruction":
        return with_system(row, messages_of(row, form))
    if cells.get("history"):
        raise UserError(f"{row.where}: history holds turns before the instruction; write the row "
                        "as messages, or take it out")
    asked = text_at(row, "instruction")
    more = text_at(row, "input") if isinstance(cells.get("input"), str) else ""
    asked = f"{asked}\n\n{more}" if more.strip() else asked
    return with_system(row, [{"role": "user", "content": asked},
                             {"role": "assistant", "content": text_at(row, "output")}])


def with_system(row: Row, said: list[dict[str, str]]) -> list[dict[str, str]]:
    """Messages behind the one that a row holds under `system`, if it does; UserError where they
    begin with another."""
    system = {"role": "system",
              "content": text_at(row, "system") if row.cells.get("system") is not None else ""}
    if not system["content"].strip() or said[0] == system:
        return said
    if said[0]["role"] == "system":
        raise UserError(f"{row.where}: system says another thing than the first message; take one "
                        "of them out")
    return [system, *said]


def messages_of(row: Row, key: str) -> list[dict[str, str]]:
    """The messages under a name: role and content, or ShareGPT's from and value."""
    found = row.cells.get(key)
    if not isinstance(found, list | tuple | np.ndarray) or not len(found):
        raise UserError(f"{row.where}: {key} is {str(found)[:40]!r}, expected a list of messages")
    said = []
    for i, x in enumerate(found, 1):
        x = x if isinstance(x, Mapping) else {}
        role = x.get("role") if "role" in x else SPEAKERS.get(str(x.get("from")), x.get("from"))
        content = x.get("content", x.get("value"))
        if role not in SPEAKERS.values() or not isinstance(content, str):
            wrong = f"role {role!r}" if role not in SPEAKERS.values() else "no text"
            raise UserError(
                f"{row.where}, message {i}: {wrong}; expected system, user, assistant or tool "
                "(ShareGPT: human, gpt), and a text")
        said.append({"role": role, "content": _whole(row, content)})
    return said


def conversations(paths: Iterable[Path]) -> Iterator[Row]:
    """The rows of files; says in which form each file's conversations are."""
    for path in paths:
        told = None
        for row in rows(path):
            form = form_of(row)
            if form and form != told:
                say(f"{path}: conversations in the form of {FORMS[form]}")
                told = form
            yield row


@dataclass
class Conversations:
    """Rows to examples, a conversation each."""

    template: Template
    loss_on: str = "assistant"
    clean: corpus.Normaliser | None = None

    def __call__(self, rows: Sequence[Row]) -> list[Example]:
        laid, found = [], []
        for row in rows:
            messages = conversation(row)
            changes: Counter[str] = Counter()
            for message in messages if self.clean else ():
                message["content"], places = self.clean(message["content"])
                changes.update(places)
            with placed(row):
                laid.append(self.template.lay_out(messages, self.loss_on))
            found.append(Example([], key(messages), changes=changes))
        for x, document in zip(found, documents(self.template.tokenizer, laid), strict=True):
            x.documents = [document]
        return found


def key(of: Any) -> bytes:
    """What tells an example's duplicates."""
    return hashlib.blake2b(json.dumps(of).encode(), digest_size=16).digest()


class placed:
    """Within it a person's mistake is named with its file and line."""

    def __init__(self, row: Row):
        self.row = row

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, e: BaseException | None, trace: Any) -> None:
        if isinstance(e, UserError):
            raise UserError(f"{self.row.where}: {e}", e.code) from None


def chunks(found: Iterable[Row]) -> Iterator[tuple[list[Row], list[Row]]]:
    """Rows, numbered, about a megabyte at a time; those before a fault come before it."""
    held: list[Row] = []
    size = 0
    try:
        for n, row in enumerate(found):
            row.number = n
            held.append(row)
            if (size := size + row.size) >= corpus.CHUNK:
                yield held, held
                held, size = [], 0
    except UserError:
        if held:
            yield held, held
        raise
    if held:
        yield held, held


def write(found: Iterable[Row], job: Callable[[list[Row]], list[Example]], out: Path,
          tokenizer: Tokenizer, kind: str, sources: Sequence[Path], prompt: dict[str, Any],
          max_tokens: int = 0, too_long: str = "stop", keep_duplicates: bool = False,
          processes: int = 1) -> tuple[Bin, corpus.Ledger, Counter[str]]:
    """Rows into a bin, by a `job` that makes them into examples; each row ends in the ledger. Third
    are the kinds of the documents, counted.

    `max_tokens` is the row they must fit (0: any), both documents of a preference pair together.
    Longer ones are left out, but above LONG_SHARE refused, unless `too_long` says drop, or cut; so
    are those of which a cut would leave nothing that is trained, or two equal answers. A refusal
    names the first place.
    """
    writer = BinWriter(out, tokenizer.fingerprint, tokenizer.vocab_size, kind)
    ledger, seen, kinds, longest = corpus.Ledger(), set(), Counter(), 0
    first: dict[str, str] = {}  # where the first row stands that ended so

    most = max_tokens // 2 if kind == "pairs" else max_tokens  # of a document that is cut

    def settle(row: Row, x: Example) -> None:
        """Enter an example into the ledger and, if it is kept, the bin."""
        nonlocal longest
        sizes = [len(d.ids) - 1 for d in x.documents]
        size = sum(sizes) if kind == "pairs" else max(sizes, default=0)
        what = x.fault or "kept"
        if what == "kept" and x.key in seen:
            what = "duplicate"
        if what == "kept" and 0 < max_tokens < size and kind != "text":
            longest = max(longest, size)
            what = "too long"
            if too_long == "cut":
                x.documents = [_cut(d, most) for d in x.documents]
                bare = any(d.mask is not None and not any(d.mask) for d in x.documents)
                same = kind == "pairs" and equal(x.documents)  # where they differ was cut away
                what = "masked" if bare else "equal" if same else "cut"
        ledger.add([what], [row.size])
        ledger.changes.update(x.changes)
        first.setdefault(what, row.where)
        if what in ("kept", "cut"):
            seen.update(() if keep_duplicates else (x.key,))
            kinds.update(x.kinds)
            for document in x.documents:
                writer.add(document, x.key if x.kinds else b"")

    try:
        with closing(corpus.in_order(job, chunks(found), processes)) as made:
            for some, examples in made:
                for row, x in zip(some, examples, strict=True):
                    settle(row, x)
        n, long = ledger.documents["read"], ledger.documents["too long"]
        if too_long == "stop" and long > LONG_SHARE * n:
            raise UserError(
                f"{first['too long']}: the first of {long:,} of {n:,} examples that are longer "
                f"than {max_tokens:,} tokens, the longest {longest:,}; leave them out with "
                "--too-long drop, shorten them with --too-long cut, or raise --max-tokens")
        for what, why in (("masked", "have no trained token among their first {}: a cut leaves the "
                                     "question alone"),
                          ("equal", "are two equal answers in their first {}: a cut leaves nothing "
                                    "to prefer")):
            if ledger.documents[what] > LONG_SHARE * n:
                raise UserError(
                    f"{first[what]}: the first of {ledger.documents[what]:,} of {n:,} examples "
                    f"that {why.format(f'{most:,}')}; raise --max-tokens, or leave them out with "
                    "--too-long drop")
        if len(writer.starts) == 1:
            why = ", ".join(f"{ledger.documents[x]:,} {x}, the first {first[x]}" for x in first)
            raise UserError(f"{', '.join(map(str, sources))}: no example left of {n} read"
                            + (f" ({why})" if why else ""))
        described = [{"path": str(p), "bytes": p.stat().st_size, "sha256": sha256(p)}
                     for p in sources]
        said = ledger.to_json() | {"max_tokens": max_tokens}
        return writer.close(said, described, prompt), ledger, kinds
    except BaseException:
        writer.abandon()
        raise


def equal(pair: Sequence[Document]) -> bool:
    """Whether two documents are the same ids."""
    return np.array_equal(*(x.ids for x in pair))


def _cut(document: Document, most: int) -> Document:
    """Its first `most` predictions."""
    mask = None if document.mask is None else document.mask[: most + 1]
    return Document(document.ids[: most + 1], mask, document.n_bytes)
