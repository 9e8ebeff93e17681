"""Suites: the public tests as files, each a .toml in suites/ that says what is asked and of what.

    kind = "choose"    choose: the likeliest of some continuations; match: an answer against the
                       right one; translate: a sentence against its translation
    [[data]]           where the rows are, in several layouts; the first that is there is taken
    [[prompts]]        a name, and a Jinja template over a row's columns

The prompts are those of lm-evaluation-harness 0.4.13, to the letter, because a figure compares only
with figures of the same prompt; every suite says which of its tasks they are. This module turns a
suite into texts (`Item`): contexts with their examples, choices, right answers. It knows no model.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from languages.kinyarwanda import identify
from runtime import hub
from runtime.console import BAD_INPUT, FLAGS, UserError, say

HERE = Path(__file__).with_name("suites")
KINDS = {"choose": ("acc", "acc_norm", "acc_bytes", "f1"), "match": ("exact_match", "f1"),
         "translate": ("chrF2++", "chrF2", "BLEU", "spBLEU")}  # the figures of each
SHOTS_SEED = 1234  # of lm-evaluation-harness's few-shot sampler
Row = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """One wording of what is asked: templates over a row's columns."""

    name: str
    text: str
    gold: str
    choices: Sequence[str] | str = ()
    part: str = ""  # "kin-eng": the direction, where a suite has several
    aside: str = ""  # why it is no part of the mean


@dataclass(frozen=True)
class Item:
    """One thing asked: its context, for a choice the continuations, and the right answer (an index
    into the choices, or a text); `row` is where it came from.

    `turns`: the same as a conversation says it, the user first and in turn with the assistant.
    """

    context: str
    gold: int | str
    row: Row
    choices: tuple[str, ...] = ()
    turns: tuple[str, ...] = ()


@dataclass
class Suite:
    """A suite with its rows read and checked."""

    name: str
    kind: str
    version: int
    about: str
    metrics: list[str]
    prompts: list[Prompt]
    rows: list[Row]
    files: list[Path]
    delimiter: str = " "  # between a context and an answer
    stop: list[str] = field(default_factory=list)
    new_tokens: int = 256
    pool: list[Row] | None = None  # what examples are drawn from; None: there is nothing
    first: bool = False  # examples are the pool's first ones, an item's own too
    from_test: bool = False  # the pool is the test itself; what is drawn is never the item
    answers: list[dict[str, Any]] = field(default_factory=list)  # how an answer is cut out
    groups: list[str] = field(default_factory=list)  # columns that figures are also given by
    languages: dict[str, str] = field(default_factory=dict)  # column: language

    def items(self, prompt: Prompt, shots: int = 0, limit: int = 0) -> list[Item]:
        """What is asked with this prompt, in the rows' order, behind `shots` examples each.

        Examples are drawn as lm-evaluation-harness draws them: one random stream for the whole
        suite, so that an item's examples depend on its place.
        """
        from jinja2 import TemplateError

        if shots and not self.pool:
            raise UserError(f"--shots {shots}: suite {self.name} has no examples beside its data; "
                            "leave it out", FLAGS)
        draw, found = Random(SHOTS_SEED), []
        for i, row in enumerate(self.rows[: limit or None]):
            examples = self._examples(row, shots, draw) if shots else []
            try:
                pairs = [(_render(prompt.text, x), self._answer(prompt, x)) for x in examples]
                choices = _choices(prompt, row)
                gold = self._gold(prompt, row, choices)
                text = _render(prompt.text, row)
            except (ValueError, SyntaxError, TypeError, TemplateError) as e:
                raise UserError(f"suite {self.name}, prompt {prompt.name}, row {i + 1} of "
                                f"{self.files[0]}{', or an example before it' * bool(examples)}: "
                                f"{e}") from None
            context = "".join(f"{text}{self.delimiter}{said}\n\n" for text, said in pairs)
            found.append(Item(context + text, gold, row, choices, (*sum(pairs, ()), text)))
        if self.kind == "match" and all(x.gold == "" for x in found):
            raise UserError(f"suite {self.name}: no row of {self.files[0]} has a right answer")
        return found

    def _examples(self, row: Row, n: int, draw: Random) -> list[Row]:
        pool, spare = self.pool or [], self.from_test and not self.first
        if len(pool) < n + spare:
            raise UserError(f"--shots {n}: suite {self.name} has {len(pool)} examples", FLAGS)
        if self.first:
            return pool[:n]
        drawn = [x for x in draw.sample(pool, n + spare) if not (spare and x == row)][:n]
        return drawn if len(drawn) == n else draw.sample([x for x in pool if x != row], n)

    def _answer(self, prompt: Prompt, row: Row) -> str:
        choices = _choices(prompt, row)
        gold = self._gold(prompt, row, choices)
        return choices[gold] if isinstance(gold, int) else gold

    def _gold(self, prompt: Prompt, row: Row, choices: tuple[str, ...]) -> int | str:
        gold = _render(prompt.gold, row)
        if self.kind != "choose":
            return gold
        if gold in choices:
            return choices.index(gold)
        if gold.isdigit() and int(gold) < len(choices):
            return int(gold)
        raise ValueError(f"the right answer is {gold!r}, which is none of {list(choices)[:8]}")

    def signature(self, prompt: Prompt) -> str:
        """What a figure of this prompt depends on, of the suite's side."""
        text = json.dumps([prompt.text, list(prompt.choices), prompt.gold, self.stop])
        short = hashlib.sha256(text.encode()).hexdigest()[:8]
        return f"suite:{self.name}.{self.version}|prompt:{short}"


def known() -> list[str]:
    return sorted(p.stem for p in HERE.glob("*.toml"))


def load(spec: str, folder: str = "") -> Suite:
    """The suite NAME (or a .toml of one's own) with its rows: those under `folder`, or with
    NAME=FILE those of a file or of hf:org/name/file. UserError for what does not fit."""
    name, _, given = spec.partition("=")
    file = Path(name) if name.endswith(".toml") else HERE / f"{name}.toml"
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--suites {name}: no such suite; there are {', '.join(known())}, or name "
                        "a .toml of your own", FLAGS) from None
    except ValueError as e:
        raise UserError(f"{file}: cannot be read as TOML ({e})") from None
    try:
        prompts = [_prompt(x, raw) for x in raw.pop("prompts")]
        layouts = raw.pop("data")
        for key in ("gold", "choices"):
            raw.pop(key, None)
        suite = Suite(name=file.stem, prompts=prompts, rows=[], files=[], **raw)
        assert suite.kind in KINDS and prompts
        for how in suite.answers:
            assert how["name"] and re.compile(how.get("last", ""))
        assert suite.answers or suite.kind != "match", "a match needs [[answers]]"
        for name in [x for p in prompts for x in (p.name, p.part)]:
            assert "/" not in name, f"prompt {name}: a name with a /"
    except (KeyError, TypeError, AssertionError, re.error) as e:
        raise UserError(f"{file}: not a suite ({e}); suites/sib200.toml is one to look at") \
            from None
    strange = [x for x in suite.metrics if x not in KINDS[suite.kind]]
    if strange or not suite.metrics:
        raise UserError(f"{file}: metrics: {', '.join(map(str, strange)) or 'none'}; of the kind "
                        f"{suite.kind} there are {', '.join(KINDS[suite.kind])}")
    layout = _given(given, layouts) if given else _there(layouts, folder, suite.name)
    suite.rows, suite.files = _rows(layout, "test", folder)
    if layout.get("shots") == "test":
        suite.pool, suite.from_test = suite.rows, True
    elif layout.get("shots"):
        suite.pool, _ = _rows(layout, "shots", folder)
    if not suite.rows:
        raise UserError(f"{suite.files[0]}: no rows for suite {suite.name}")
    _check(suite)
    return suite


def _prompt(x: Row, raw: Row) -> Prompt:
    gold = x.get("gold", raw.get("gold"))
    if gold is None:  # a translation's is its other side
        gold = "{{" + x["part"].partition("-")[2] + "}}"
    return Prompt(x["name"], x["text"], gold, x.get("choices", raw.get("choices", ())),
                  x.get("part", ""), x.get("aside", ""))


def _given(spec: str, layouts: list[Row]) -> Row:
    """A layout for a file that was named, its columns called as the suite calls them; what a cell
    means is as in the suite's own layouts, and quotes are as in those of its kind of file."""
    files = hub.data(spec) if spec.startswith("hf:") else [Path(spec)]
    if len(files) > 1:
        raise UserError(f"--suites ...={spec}: names {len(files)} files, {files[0].name} first; "
                        "name one", FLAGS)
    [file] = files
    found: Row = {"test": str(file.resolve())}
    for layout in reversed(layouts):
        found |= {k: layout[k] for k in ("lists", "values") if k in layout}
        if Path(str(layout.get("test"))).suffix == file.suffix:
            found["quoted"] = layout.get("quoted", False)
    return found


def _there(layouts: list[Row], folder: str, name: str) -> Row:
    """The first layout whose files are there."""
    def files(layout: Row) -> Iterable[str]:
        for key in ("test", "shots"):
            spec = layout.get(key, "test")
            yield from spec.values() if isinstance(spec, dict) else [spec] if spec != "test" else []

    for layout in layouts:
        if all((Path(folder) / x).is_file() or (HERE / x).is_file() for x in files(layout)):
            return layout
    tried = [x for layout in layouts for x in files(layout)]
    raise UserError(f"suite {name}: its data are not under --suite-data {folder or '(not given)'}: "
                    f"looked for {', '.join(dict.fromkeys(tried))}; or name them: --suites "
                    f"{name}=FILE", FLAGS if not folder else BAD_INPUT)


def _rows(layout: Row, split: str, folder: str) -> tuple[list[Row], list[Path]]:
    """Rows of a layout's test or shots, with the suite's own column names."""
    spec = layout[split]
    if isinstance(spec, dict):  # a text for each column, line by line
        files = [_at(x, folder) for x in spec.values()]
        sides = [_lines(x) for x in files]
        if len({len(x) for x in sides}) > 1:
            told = ", ".join(f"{f} {len(x):,}" for f, x in zip(files, sides, strict=True))
            raise UserError(f"the sides have different numbers of lines: {told}; line n of one is "
                            "the translation of line n of the other")
        return [dict(zip(spec, x, strict=True)) for x in zip(*sides, strict=True)], files
    file = _at(spec, folder)
    rows = read(file, layout.get("quoted", False))
    where = layout.get(f"{split}_where", {})
    for column in where:
        _require(rows, column, file)
    rows = [r for r in rows if all(str(r[k]) == v for k, v in where.items())]
    for new, old in layout.get("columns", {}).items():
        for row in rows:
            row[new] = _inside(row, old, file) if old else None
    for column, values in layout.get("values", {}).items():
        _require(rows, column, file)
        meant = values | {str(x): x for x in values.values()}  # a .tsv's 0 is the text "0"
        for row in rows:
            row[column] = meant.get(str(row[column]), row[column])
    for column in layout.get("lists", []):
        _require(rows, column, file)
        for i, row in enumerate(rows):
            try:
                if isinstance(row[column], str):
                    row[column] = ast.literal_eval(row[column])
                if not isinstance(row[column], list):
                    raise ValueError
            except (ValueError, SyntaxError):
                raise UserError(f"{file}: row {i + 1}: {column} is no list: "
                                f"{str(row[column])[:60]!r}") from None
    return rows, [file]


def _at(name: str, folder: str) -> Path:
    return Path(folder) / name if (Path(folder) / name).is_file() else HERE / name


def _inside(row: Row, path: str, file: Path) -> Any:
    """A column, or what lies in one: translation.en."""
    for key in path.split("."):
        if not isinstance(row, dict) or key not in row:
            raise UserError(f"{file}: no column {path}; it has {', '.join(map(str, row))}")
        row = row[key]
    return row


def _require(rows: list[Row], column: str, file: Path) -> None:
    for i, row in enumerate(rows):
        if column not in row:
            raise UserError(f"{file}: row {i + 1} has no column {column}; it has "
                            f"{', '.join(map(str, row))}")


def _lines(file: Path) -> list[str]:
    """A text's lines; only \\n ends one, and a \\r before it goes."""
    try:
        lines = file.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{file}: not UTF-8 (byte {e.start})") from None
    return [x.removesuffix("\r") for x in (lines[:-1] if lines[-1] == "" else lines)]


def read(file: Path, quoted: bool = False) -> list[Row]:
    """Rows of a .jsonl, .tsv, .csv or .parquet; a .tsv's quotes are plain signs unless `quoted`."""
    if file.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            with file.open("rb") as f:
                return pyarrow.parquet.read_table(f).to_pylist()
        except (pyarrow.ArrowException, OSError) as e:
            raise UserError(f"{file}: not a parquet file that can be read "
                            f"({' '.join(str(e).split())})") from None
    lines = _lines(file)
    if file.suffix == ".jsonl":
        try:
            rows = [json.loads(x) for x in lines if x.strip()]
            if all(isinstance(x, dict) for x in rows):
                return rows
        except ValueError:
            pass
        raise UserError(f"{file}: not JSON, an object on each line")
    if file.suffix not in (".tsv", ".csv"):
        raise UserError(f"{file}: expected .jsonl, .tsv, .csv or .parquet")
    plain = file.suffix == ".tsv" and not quoted
    cells = [x.split("\t") for x in lines] if plain else _quoted(lines, file)
    rows = []
    for i, row in enumerate(cells[1:]):
        if row and row != [""]:
            if len(row) != len(cells[0]):
                raise UserError(f"{file}: row {i + 1} has {len(row)} columns, the first line names "
                                f"{len(cells[0])}")
            rows.append(dict(zip(cells[0], row, strict=True)))
    return rows


def _quoted(lines: list[str], file: Path) -> list[list[str]]:
    """The cells of lines with quotes; says where lines go on within some, for a quote that nobody
    meant makes one row of several."""
    found = csv.reader((x + "\n" for x in lines), delimiter="\t" if file.suffix == ".tsv" else ",",
                       strict=True)
    try:
        cells = list(found)
    except csv.Error as e:
        raise UserError(f"{file}, line {found.line_num}: its quotes cannot be read ({e}); a quote "
                        "within a cell is written twice, in a cell within quotes") from None
    if long := [i for i, row in enumerate(cells) if any("\n" in x for x in row)]:
        say(f"{file}: quotes hold a line's end in {len(long):,} of {len(cells) - 1:,} rows, in row "
            f"{long[0]} first")
    return cells


def _check(suite: Suite) -> None:
    """Every row has the columns that the prompts ask for, and is in the language it should be."""
    from jinja2 import TemplateError, meta

    for prompt in suite.prompts:
        texts = [prompt.text, prompt.gold]
        texts += [prompt.choices] if isinstance(prompt.choices, str) else []
        try:
            asked = {x for t in texts for x in meta.find_undeclared_variables(_jinja().parse(t))}
        except TemplateError as e:
            raise UserError(f"suite {suite.name}, prompt {prompt.name}: {e}") from None
        asked |= {*suite.groups}
        asked |= {*prompt.part.split("-")} if suite.kind == "translate" else set()
        for rows in (suite.rows, suite.pool or []):
            for column in sorted(asked):
                _require(rows, column, suite.files[0])
    for column, language in suite.languages.items():
        if all(column in row for row in suite.rows):
            said = [identify.language(str(row[column])) for row in suite.rows]
            other = [i for i, x in enumerate(said) if x not in (language, "unknown")]
            if len(other) > max(1, len(said) // 2):
                i = other[0]
                raise UserError(
                    f"{suite.files[0]}: column {column} should be {language}, but {len(other)} of "
                    f"{len(said)} rows are in another language, row {i + 1} first: "
                    f"{str(suite.rows[i][column])[:60]!r}; check the file")


@cache
def _jinja() -> Any:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    return SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)


@cache
def _template(text: str) -> Any:
    return _jinja().from_string(text)


def _render(text: str, row: Row) -> str:
    return _template(text).render(row)


def _choices(prompt: Prompt, row: Row) -> tuple[str, ...]:
    """The continuations to choose from; a template gives them as a list."""
    if isinstance(prompt.choices, str):
        return tuple(map(str, ast.literal_eval(_render(prompt.choices, row))))
    return tuple(prompt.choices)
