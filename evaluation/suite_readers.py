"""Rows of a suite: the layouts in which its data are published, and how a layout is read.

A suite's .toml lists several layouts (`[[data]]`); the first whose files exist is read.

    test, shots              a file, or a text file per column ({ kin = "a.kin", eng = "a.eng" });
                             shots = "test": few-shot examples are drawn from the test
    test_where, shots_where  keep only rows with these values
    columns                  our column name = the name in the file (translation.en: inside a
                             column; "": an empty column)
    values                   per column, what a cell means, e.g. { entailment = 0 }
    lists                    columns that hold a list written as text
    quoted                   whether a .tsv has quoted cells

A data file is looked for under --suite-data, then beside the suite's .toml.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preparation.readers import file_format, read_aligned_rows, read_rows
from runtime import hub
from runtime.console import BAD_INPUT, FLAGS, UserError

Row = dict[str, Any]  # cells by column
Layout = Mapping[str, Any]  # an entry of [[data]]
SPLITS = ("test", "shots")
FORMATS = (".jsonl", ".tsv", ".csv", ".parquet")


def layout_of_file(spec: str, layouts: Sequence[Layout]) -> Layout:
    """Return a layout for a file that the user named, with the suite's own column names.

    What a cell means is as in the suite's layouts; quotes are as in those of the file's format.
    """
    file = only_file(spec, hub.data(spec) if spec.startswith("hf:") else [Path(spec)])
    layout: dict[str, Any] = {"test": str(file.resolve())}
    for known in reversed(layouts):
        layout |= {key: known[key] for key in ("lists", "values") if key in known}
        if Path(str(known.get("test"))).suffix == file.suffix:
            layout["quoted"] = known.get("quoted", False)
    return layout


def only_file(spec: str, files: Sequence[Path]) -> Path:
    """Return the only file that a spec names; UserError if it names several."""
    if len(files) > 1:
        raise UserError(f"--suites ...={spec}: names {len(files)} files, {files[0].name} first; "
                        "name one", FLAGS)
    return files[0]


def find_layout(layouts: Sequence[Layout], folders: Sequence[Path], suite: str,
                data_folder: str) -> Layout:
    """Return the first layout whose files exist. `data_folder` is --suite-data, for messages."""
    for layout in layouts:
        if all(any((folder / x).is_file() for folder in folders) for x in _files(layout)):
            return layout
    tried = dict.fromkeys(x for layout in layouts for x in _files(layout))
    raise UserError(
        f"suite {suite}: its data are not under --suite-data {data_folder or '(not given)'}: "
        f"looked for {', '.join(tried)}; or name them: --suites {suite}=FILE",
        BAD_INPUT if data_folder else FLAGS)


def _files(layout: Layout) -> list[str]:
    """Return the names of all files of a layout."""
    files: list[str] = []
    for split in SPLITS:
        spec = layout.get(split, "test")
        if isinstance(spec, dict):
            files += spec.values()
        elif spec != "test":
            files.append(spec)
    return files


def _locate(name: str, folders: Sequence[Path]) -> Path:
    """Return the file of this name in the first folder that has it, else in the first folder."""
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    return folders[0] / name


def read_split(layout: Layout, split: str, folders: Sequence[Path]) -> tuple[list[Row], list[Path]]:
    """Return the rows of a layout's "test" or "shots", with the suite's own column names, and the
    files that they come from."""
    spec = layout[split]
    if isinstance(spec, dict):
        files = [_locate(name, folders) for name in spec.values()]
        aligned = read_aligned_rows(dict(zip(spec, files, strict=True)))
        return [dict(row.cells) for row in aligned], files
    file = _locate(spec, folders)
    if file_format(file) not in FORMATS:
        raise UserError(f"{file}: expected {', '.join(FORMATS)}")
    quoted = layout.get("quoted", False)
    rows = [dict(row.cells) for row in read_rows(file, quoted, skip_blank_lines=True)]
    rows = _filter(rows, layout.get(f"{split}_where", {}), file)
    _rename_columns(rows, layout.get("columns", {}), file)
    _map_values(rows, layout.get("values", {}), file)
    _parse_lists(rows, layout.get("lists", []), file)
    return rows, [file]


def _filter(rows: list[Row], where: Mapping[str, str], file: Path) -> list[Row]:
    for column in where:
        require_column(rows, column, file)
    return [r for r in rows if all(str(r[column]) == value for column, value in where.items())]


def _rename_columns(rows: list[Row], columns: Mapping[str, str], file: Path) -> None:
    for new, old in columns.items():
        for row in rows:
            row[new] = _cell(row, old, file) if old else None


def _cell(row: Row, path: str, file: Path) -> Any:
    """Return a cell, or what is inside one: translation.en."""
    for key in path.split("."):
        if not isinstance(row, dict) or key not in row:
            raise UserError(f"{file}: no column {path}; it has {', '.join(map(str, row))}")
        row = row[key]
    return row


def _map_values(rows: list[Row], values: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    for column, meanings in values.items():
        require_column(rows, column, file)
        # a cell may hold the meaning already; in a .tsv 0 is the text "0"
        all_meanings = meanings | {str(x): x for x in meanings.values()}
        for row in rows:
            row[column] = all_meanings.get(str(row[column]), row[column])


def _parse_lists(rows: list[Row], columns: Sequence[str], file: Path) -> None:
    for column in columns:
        require_column(rows, column, file)
        for i, row in enumerate(rows):
            try:
                if isinstance(row[column], str):
                    row[column] = ast.literal_eval(row[column])
                if not isinstance(row[column], list):
                    raise ValueError
            except (ValueError, SyntaxError):
                raise UserError(f"{file}: row {i + 1}: {column} should be a list, found "
                                f"{str(row[column])[:60]!r}") from None


def require_column(rows: Sequence[Row], column: str, file: Path) -> None:
    """Raise UserError if a row has no such column."""
    for i, row in enumerate(rows):
        if column not in row:
            raise UserError(f"{file}: row {i + 1} has no column {column}; it has "
                            f"{', '.join(map(str, row))}")
