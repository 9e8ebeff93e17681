"""Readers of .txt, .jsonl, .json, .tsv, .csv and .parquet files, and of .gz files of all of these
but .parquet.

There are two ways to read a file, both as a stream:

    read_documents   one text per document; a text that cannot be decoded is returned as a fault,
                     so that it can be counted
    read_rows        one mapping per row; a row that cannot be read is refused

Every row knows its location (file and line), so that a later error message can name it. Only "\\n"
ends a line. A "\\r" before it and a byte order mark at the start of a file are removed.
"""

from __future__ import annotations

import csv
import glob
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from runtime import hub
from runtime.console import UserError, info
from runtime.paths import is_utf8

TEXT_FORMATS = (".txt", ".jsonl", ".tsv", ".parquet")
ROW_FORMATS = (".jsonl", ".json", ".tsv", ".parquet")
DOCUMENT_UNITS = ("auto", "file", "line", "block")
MAX_DOCUMENT_BYTES = 64 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAX_NUL_BYTES = 40  # in the first 4096 bytes of a line; more of them: the file is not text


class Line(NamedTuple):
    """A line of a file: its number from 1, its bytes without the end of line, the bytes read for
    it, and a fault ("too long") instead of its bytes."""

    number: int
    content: bytes
    n_bytes: int
    fault: str = ""


@dataclass
class RawDocument:
    """What was read for one document: its text and its size in bytes, or a fault ("undecodable",
    "too long") instead of the text."""

    text: str
    n_bytes: int
    fault: str = ""


@dataclass
class Row:
    """A row of a file: its location for messages, its cells by column, the bytes read for it, and
    its number among all rows of all files."""

    location: str
    cells: Mapping[str, Any]
    n_bytes: int
    number: int = 0


# Files.


def list_files(specs: Iterable[str], formats: Sequence[str] = TEXT_FORMATS) -> list[Path]:
    """The files that paths, folders, globs and hf:ORG/NAME/GLOB specs name, in order.

    UserError for a spec that names no file, and for a file of another format.
    """
    paths: list[Path] = []
    for spec in specs:
        if spec.startswith("hf:"):
            matches = hub.data(spec)
        elif Path(spec).is_dir():
            matches = sorted(p for p in Path(spec).rglob("*") if file_format(p) in formats)
        elif Path(spec).is_file():
            matches = [Path(spec)]
        else:
            matches = sorted(map(Path, glob.glob(spec, recursive=True)))
        if not matches:
            raise UserError(f"{spec}: no such file, and no file matches it")
        for path in matches:
            if not is_utf8(str(path)):
                raise UserError(f"{str(path)!a}: the name is not UTF-8, so the bin cannot record "
                                "it; rename the file")
            if file_format(path) not in formats:
                raise UserError(f"{path}: unknown kind of file; expected {', '.join(formats)}, or "
                                "a .gz of one of them (but not of .parquet)")
        paths += matches
    return paths


def file_format(path: Path) -> str:
    """The suffix of a file, without .gz. A .parquet.gz is of no known format (".gz"): parquet
    files are compressed inside."""
    if path.suffix == ".gz" and not path.stem.endswith(".parquet"):
        return Path(path.stem).suffix
    return path.suffix


@contextmanager
def open_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading bytes, a .gz unpacked; UserError if it cannot be read."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise UserError(f"{path}: not a whole gzip file ({e})") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None


def read_lines(file: IO[bytes], max_bytes: int = -1) -> Iterator[Line]:
    """The lines of an open file. A line above `max_bytes` (-1: no limit) is returned as a fault;
    it is never in memory as a whole."""
    number = 0
    while content := file.readline(max_bytes):
        number += 1
        if content.count(b"\0", 0, 4096) > MAX_NUL_BYTES:
            raise UserError(f"{getattr(file, 'name', 'file')}: binary, not text")
        n_bytes = len(content)
        if max_bytes >= 0:
            chunk = content
            while n_bytes >= max_bytes and chunk and not chunk.endswith(b"\n"):
                chunk = file.readline(max_bytes)
                n_bytes += len(chunk)
            if n_bytes > max_bytes:
                yield Line(number, b"", n_bytes, "too long")
                continue
        if number == 1:
            content = content.removeprefix(BYTE_ORDER_MARK)
        yield Line(number, content.removesuffix(b"\n").removesuffix(b"\r"), n_bytes)


# Documents.


def read_documents(path: Path, unit: str = "auto", key: str = "text",
                   max_bytes: int = MAX_DOCUMENT_BYTES) -> Iterator[RawDocument]:
    """The documents of one file. `unit` says what a document of a .txt is (and of a file of no
    known format); `key` is the name of the text column in the other formats."""
    form = file_format(path)
    if form == ".parquet":
        for batch in read_parquet(path, key):
            for raw in batch.column(0).cast("large_binary").to_pylist():
                yield _decode_document(raw or b"")
        return
    with open_file(path) as file:
        lines = read_lines(file, max_bytes)
        if form == ".jsonl":
            yield from _jsonl_documents(lines, path, key)
        elif form == ".tsv":
            yield from _tsv_documents(lines, path, key)
        else:
            unit = detect_document_unit(path) if unit == "auto" else unit
            yield from _txt_documents(lines, path, unit, max_bytes)


def read_texts(path: str | Path, unit: str = "auto", key: str = "text") -> list[str]:
    """The text of every document of a file (or folder or glob), for an evaluation. UserError for a
    document that is not UTF-8: an evaluation must not leave documents out."""
    documents = [x for file in list_files([str(path)]) for x in read_documents(file, unit, key)]
    for number, document in enumerate(documents, 1):
        if document.fault:
            raise UserError(f"{path}: document {number} is {document.fault}; an evaluation leaves "
                            "no document out, so correct the file")
    texts = [x.text for x in documents if x.text.strip()]
    if not texts:
        raise UserError(f"{path}: no text in it")
    if len(texts) < len(documents):
        info(f"{path}: {len(documents) - len(texts)} of {len(documents)} documents are empty")
    return texts


def detect_document_unit(path: Path) -> str:
    """What a document of a .txt file is: a block if there are blank lines in its first megabyte,
    else a line, or the file if it has one line only."""
    with open_file(path) as file:
        lines = file.read(1 << 20).strip().split(b"\n")
    if any(not line.strip() for line in lines):
        return "block"
    return "line" if len(lines) > 1 else "file"


def _decode_document(raw: bytes) -> RawDocument:
    try:
        return RawDocument(raw.decode(), len(raw))
    except UnicodeDecodeError:
        return RawDocument("", len(raw), "undecodable")


def _txt_documents(lines: Iterator[Line], path: Path, unit: str,
                   max_bytes: int) -> Iterator[RawDocument]:
    block: list[bytes] = []
    n_bytes = 0
    for line in lines:
        if line.fault:
            yield RawDocument("", line.n_bytes, line.fault)
        elif unit == "line":
            yield _decode_document(line.content)
        elif unit == "block" and not line.content.strip():
            if block:
                yield _decode_document(b"\n".join(block))
            block, n_bytes = [], 0
        else:
            block.append(line.content)
            n_bytes += len(line.content) + 1
            if n_bytes > max_bytes:
                raise UserError(f"{path}: a document above {max_bytes >> 20} MB; split the file "
                                "into documents with --documents line or block")
    if block:
        yield _decode_document(b"\n".join(block))


def _jsonl_documents(lines: Iterator[Line], path: Path, key: str) -> Iterator[RawDocument]:
    for line in lines:
        if line.fault:
            yield RawDocument("", line.n_bytes, line.fault)
            continue
        if not line.content.strip():
            continue
        try:
            cells = json.loads(line.content.decode())
        except UnicodeDecodeError:
            yield RawDocument("", len(line.content), "undecodable")
            continue
        except (ValueError, RecursionError):
            raise UserError(f"{path}, line {line.number}: not JSON; expected an object with "
                            f"{key!r}") from None
        text = cells.get(key) if isinstance(cells, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{path}, line {line.number}: no text under {key!r}; name the key of "
                            "the text with --text-key")
        try:
            yield RawDocument(text, len(text) if text.isascii() else len(text.encode()))
        except UnicodeEncodeError:  # half a surrogate pair, written as an escape
            yield RawDocument("", len(line.content), "undecodable")


def _tsv_documents(lines: Iterator[Line], path: Path, key: str) -> Iterator[RawDocument]:
    table = _split_tsv(lines, path)
    _, first_cells = next(table, (None, [b""]))
    header = [x.decode(errors="replace") for x in first_cells]
    require_unique_columns(header, path)
    if key not in header:
        raise UserError(f"{path}: no column {key!r} in its first line, which has "
                        f"{', '.join(header)}; name the column of the text with --text-key")
    column = header.index(key)
    for line, cells in table:
        if line.fault:
            yield RawDocument("", line.n_bytes, line.fault)
        else:
            yield _decode_document(cells[column])


# Rows.


def read_rows(path: Path, quoted: bool = False, skip_blank_lines: bool = False) -> Iterator[Row]:
    """The rows of a .jsonl, .json (a list of objects), .tsv, .csv or .parquet file, in order.

    The first line of a .tsv or .csv names the columns. Quotes are read in a .csv, and in a .tsv if
    `quoted`; else they are plain characters. UserError, with the location, for what is not a row.
    Blank lines are skipped in .jsonl and where quotes are read, in a plain .tsv with
    `skip_blank_lines`.
    """
    form = file_format(path)
    if form == ".parquet":
        yield from _parquet_rows(path)
        return
    with open_file(path) as file:
        if form == ".json":
            yield from _json_rows(file.read(), path)
        elif form == ".jsonl":
            yield from _jsonl_rows(read_lines(file), path)
        elif form == ".csv":
            yield from _quoted_rows(read_lines(file), path, ",")
        elif form == ".tsv" and quoted:
            yield from _quoted_rows(read_lines(file), path, "\t")
        elif form == ".tsv":
            yield from _tsv_rows(read_lines(file), path, skip_blank_lines)
        else:
            raise UserError(f"{path}: unknown kind of file; expected .jsonl, .json, .tsv, .csv or "
                            ".parquet")


def read_aligned_rows(paths: Mapping[str, Path]) -> Iterator[Row]:
    """Rows of text files whose lines belong together, one file per column; UserError if one has
    more lines than another."""
    columns: dict[str, list[str]] = {}
    for name, path in paths.items():
        with open_file(path) as file:
            text = decode(file.read().removeprefix(BYTE_ORDER_MARK), str(path))
        lines = text.removesuffix("\n").split("\n") if text else []
        columns[name] = [line.removesuffix("\r") for line in lines]
    first, *others = paths
    for name in others:
        if len(columns[name]) != len(columns[first]):
            raise UserError(
                f"{paths[name]}: {len(columns[name]):,} lines, {paths[first]} has "
                f"{len(columns[first]):,}; line n of one must belong to line n of the other")
    for number, texts in enumerate(zip(*columns.values(), strict=True), 1):
        n_bytes = sum(len(x.encode()) for x in texts)
        yield Row(f"{paths[first]}, line {number}", dict(zip(columns, texts, strict=True)), n_bytes)


def read_cells(path: Path) -> Iterator[list[str]]:
    """The cells of each line of a file without a header: a .csv is read with its quotes, a .tsv
    is split at tabs, a line of any other file is one cell."""
    form = file_format(path)
    with open_file(path) as file:
        if form == ".csv":
            for _, cells in _split_quoted(read_lines(file), path, ",", strict=False):
                yield cells
            return
        for line in read_lines(file):
            text = decode(line.content, f"{path}, line {line.number}")
            yield text.split("\t") if form == ".tsv" else [text]


def decode(content: bytes, location: str) -> str:
    """UTF-8 bytes as text; UserError, with the location, for anything else."""
    try:
        return content.decode()
    except UnicodeDecodeError as e:
        raise UserError(f"{location}: byte {e.start} is not UTF-8; save the file as UTF-8") \
            from None


def parse_json(content: bytes, location: str) -> Any:
    """A JSON value; UserError, with the location, for anything else."""
    text = decode(content.removeprefix(BYTE_ORDER_MARK), location)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{location}: not JSON ({' '.join(str(e).split())[:60]})") from None


def _row(value: Any, location: str, n_bytes: int) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{location}: expected a JSON object, found {str(value)[:40]!r}")
    return Row(location, value, n_bytes)


def _json_rows(content: bytes, path: Path) -> Iterator[Row]:
    values = parse_json(content, str(path))
    if not isinstance(values, list):
        raise UserError(f"{path}: expected a list of objects; or write one object per line into a "
                        ".jsonl")
    for number, value in enumerate(values, 1):
        yield _row(value, f"{path}, object {number}", len(json.dumps(value).encode()))


def _jsonl_rows(lines: Iterator[Line], path: Path) -> Iterator[Row]:
    for line in lines:
        if line.content.strip():
            location = f"{path}, line {line.number}"
            yield _row(parse_json(line.content, location), location, line.n_bytes)


def _split_tsv(lines: Iterator[Line], path: Path,
               skip_blank_lines: bool = False) -> Iterator[tuple[Line, list[bytes]]]:
    """Lines of a .tsv with their cells, the header first; UserError for a line with another number
    of cells than the header."""
    n_columns = 0
    for line in lines:
        if skip_blank_lines and not line.content:
            continue
        cells = line.content.split(b"\t")
        n_columns = n_columns or len(cells)
        if len(cells) != n_columns and not line.fault:
            raise UserError(f"{path}, line {line.number}: {len(cells)} columns, expected "
                            f"{n_columns} as in line 1")
        yield line, cells


def _tsv_rows(lines: Iterator[Line], path: Path, skip_blank_lines: bool) -> Iterator[Row]:
    header: list[str] = []
    for line, raw_cells in _split_tsv(lines, path, skip_blank_lines):
        location = f"{path}, line {line.number}"
        cells = decode(b"\t".join(raw_cells), location).split("\t")
        if header:
            yield Row(location, dict(zip(header, cells, strict=True)), line.n_bytes)
            continue
        header = cells
        if len(header) < 2:
            raise UserError(f"{location}: one column, {header[0][:40]!r}; expected a header line "
                            "that names the columns, separated by tabs")
        require_unique_columns(header, location)


def _split_quoted(lines: Iterator[Line], path: Path, delimiter: str,
                  strict: bool) -> Iterator[tuple[int, list[str]]]:
    """(number of the last line, cells) of each row, by Python's csv module."""
    texts = (decode(line.content, f"{path}, line {line.number}") + "\n" for line in lines)
    reader = csv.reader(texts, delimiter=delimiter, strict=strict)
    try:
        for cells in reader:
            yield reader.line_num, cells
    except csv.Error as e:
        raise UserError(
            f"{path}, line {reader.line_num}: its quotes cannot be read ({e}); in a quoted cell "
            "write each quote twice") from None


def _quoted_rows(lines: Iterator[Line], path: Path, delimiter: str) -> Iterator[Row]:
    """Rows with quoted cells. Says how many have a line break within quotes, because a stray quote
    joins several rows into one."""
    header: list[str] = []
    n_rows = 0
    multiline: list[int] = []  # numbers of rows with a line break in a cell
    for line_number, cells in _split_quoted(lines, path, delimiter, strict=True):
        location = f"{path}, line {line_number}"
        if not header:
            header = cells
            require_unique_columns(header, location)
            continue
        if not cells or cells == [""]:
            continue
        if len(cells) != len(header):
            raise UserError(f"{location}: {len(cells)} columns, expected {len(header)} as in "
                            "line 1")
        n_rows += 1
        if any("\n" in cell for cell in cells):
            multiline.append(n_rows)
        n_bytes = sum(len(cell.encode()) + 1 for cell in cells)
        yield Row(location, dict(zip(header, cells, strict=True)), n_bytes)
    if multiline:
        info(f"{path}: line breaks within quotes in {len(multiline):,} of {n_rows:,} rows, the "
            f"first is row {multiline[0]}")


def read_parquet(path: Path, column: str | None = None) -> Iterator[Any]:
    """Record batches of a parquet file: all columns, or the one text column of that name."""
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        require_unique_columns(names, path)
        if column is not None and column not in names:
            raise UserError(f"{path}: no column {column!r}; it has {', '.join(names)}; name the "
                            "column of the text with --text-key")
        dtype = "string" if column is None else str(file.schema_arrow.field(column).type)
        if dtype not in ("string", "large_string", "null"):
            raise UserError(f"{path}: column {column!r} is {dtype}, expected text; name the column "
                            "of the text with --text-key")
        yield from file.iter_batches(1024, columns=None if column is None else [column])
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(f"{path}: not a parquet file that can be read "
                        f"({' '.join(str(e).split())})") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    rows = (cells for batch in read_parquet(path) for cells in batch.to_pylist())
    try:
        for number, cells in enumerate(rows, 1):
            yield Row(f"{path}, row {number}", cells, len(str(cells).encode()))
    except UnicodeDecodeError:
        raise UserError(f"{path}: a text in it is not UTF-8; correct its row, or leave it out") \
            from None


def require_unique_columns(names: Sequence[str], location: object) -> None:
    """UserError if two columns have one name."""
    for name in names:
        if name and names.count(name) > 1:
            raise UserError(f"{location}: two columns are called {name!r}; rename one")
