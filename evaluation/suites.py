"""Suites: public tests, each a .toml file that says where its data are and what a model is asked.

    kind = "multiple_choice"    or exact_match, translation (evaluation/tasks.py)
    [[data]]                    where the rows are (evaluation/suite_readers.py)
    [[prompts]]                 a name, and a Jinja template over the columns of a row

The prompts are those of lm-evaluation-harness 0.4.13, to the letter, because a figure can only be
compared with figures of the same prompt; each file says which of the harness's tasks it follows.
This module turns a suite into items: contexts with their few-shot examples, choices, right
answers. A suite that does not fit its rows is refused before any model is loaded.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from evaluation.suite_readers import (
    Layout,
    Row,
    find_layout,
    layout_of_file,
    read_split,
    require_column,
)
from evaluation.tasks import SuiteTask, task_type
from languages.language import (
    UNKNOWN,
    Language,
    identifier_for,
    known_languages,
    language_of,
)
from languages.normalise import Normaliser
from runtime.console import FLAGS, UserError

SUITES = Path(__file__).with_name("suites")
SHOTS_SEED = 1234  # of lm-evaluation-harness's few-shot sampler
# what may stand in a .toml in addition to prompts, data, and gold and choices of all prompts
TOML_KEYS = ("kind", "version", "about", "metrics", "delimiter", "stop", "new_tokens", "first",
             "answers", "groups", "languages")


@dataclass(frozen=True)
class Prompt:
    """One wording of the question: templates over the columns of a row."""

    name: str
    text: str
    gold: str
    choices: Sequence[str] | str = ()
    part: str = ""  # the direction, such as "kin-eng", if the suite has several
    excluded_from_mean: str = ""  # the reason; "": it counts
    taught_as: str = ""  # "text", "chat": how the model was taught this prompt; "": a public one


@dataclass(frozen=True)
class Item:
    """One question: its context, the choices (if any), and the right answer (an index into the
    choices, or a text); `row` is where it comes from.

    `turns`: the same as turns of a conversation, user and assistant by turns, the user first.
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
    task_type: type[SuiteTask]
    version: int
    about: str
    metrics: list[str]
    prompts: list[Prompt]  # that are asked
    public_prompts: list[Prompt]  # of the .toml
    rows: list[Row] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    delimiter: str = " "  # between a context and an answer
    stop: list[str] = field(default_factory=list)
    new_tokens: int = 256
    pool: list[Row] = field(default_factory=list)  # few-shot examples are drawn from these rows
    pool_is_test: bool = False  # they are the test itself; an item is never its own example
    first_of_pool: bool = False  # examples are the first of the pool, the item included
    answers: list[dict[str, str]] = field(default_factory=list)  # how to extract an answer
    groups: list[str] = field(default_factory=list)  # columns by whose values results are given
    languages: dict[str, Language] = field(default_factory=dict)  # of columns
    normaliser: Normaliser | None = None  # of what is asked, but not of references

    def task(self, prompt: Prompt, max_new_tokens: int = 0, beams: int = 1) -> SuiteTask:
        """Return the task of a prompt; `max_new_tokens` 0: as the suite says."""
        return self.task_type(self, prompt, max_new_tokens, beams)

    def language(self, column: str) -> Language:
        """Return the language of a column: as declared, else the one that the column's name is the
        code of."""
        if column in self.languages:
            return self.languages[column]
        return language_of(column, {column: column})

    def items(self, prompt: Prompt, shots: int = 0, limit: int = 0) -> list[Item]:
        """Return the items of a prompt in the rows' order, each after `shots` examples.

        Examples are drawn as lm-evaluation-harness draws them: one random stream for the whole
        suite, so that an item's examples depend on its place. `limit`: only the items of `subset`.
        """
        from jinja2 import TemplateError

        if shots and not self.pool:
            raise UserError(f"--shots {shots}: suite {self.name} has no examples beside its data; "
                            "use --shots 0", FLAGS)
        rng = Random(SHOTS_SEED)
        indices = set(self.subset(limit))
        items = []
        for i, row in enumerate(self.rows):
            examples = self._examples(row, shots, rng) if shots else []
            if i not in indices:
                continue
            try:
                items.append(self._item(prompt, row, examples))
            except (ValueError, SyntaxError, TypeError, TemplateError) as e:
                place = f"suite {self.name}, prompt {prompt.name}, row {i + 1} of {self.files[0]}"
                if examples:
                    place += ", or an example before it"
                raise UserError(f"{place}: {e}") from None
        if self.task_type.needs_text_gold and all(item.gold == "" for item in items):
            raise UserError(f"suite {self.name}: no row of {self.files[0]} has a right answer")
        return items

    def subset(self, limit: int) -> list[int]:
        """Return the indices of `limit` rows, which depend on nothing but the rows; 0: of all.

        Each right choice has its share of them. The rows of one choice are at equal distances,
        because files are often sorted.
        """
        if limit == 0 or limit >= len(self.rows):
            return list(range(len(self.rows)))
        rows_by_class: dict[object, list[int]] = {}
        for i, row in enumerate(self.rows):
            rows_by_class.setdefault(self._right_choice(row), []).append(i)
        classes = list(rows_by_class.values())
        shares = [limit * len(rows) / len(self.rows) for rows in classes]
        sizes = [int(share) for share in shares]
        by_remainder = sorted(range(len(classes)), key=lambda c: sizes[c] - shares[c])
        for c in by_remainder[: limit - sum(sizes)]:
            sizes[c] += 1
        return sorted(i for rows, n in zip(classes, sizes, strict=True)
                      if n for i in evenly_spaced(rows, n))

    def _right_choice(self, row: Row) -> int | None:
        """Return the index of a row's right choice; None without choices, or if it is faulty."""
        from jinja2 import TemplateError

        prompt = self.public_prompts[0]
        if not prompt.choices:
            return None
        try:
            gold = self.task_type.gold(_render(prompt.gold, row), _choices(prompt, row))
        except (ValueError, SyntaxError, TypeError, TemplateError):
            return None  # refused when the items are made
        return gold if isinstance(gold, int) else None

    def _asked(self, row: Row) -> Row:
        """Return a row as the model is asked it."""
        return row if self.normaliser is None else clean_cells(row, self.normaliser)

    def _item(self, prompt: Prompt, row: Row, examples: Sequence[Row]) -> Item:
        asked = self._asked(row)
        context = ""
        turns = []
        for example in map(self._asked, examples):
            question, answer = _render(prompt.text, example), self._answer(prompt, example)
            context += f"{question}{self.delimiter}{answer}\n\n"
            turns += [question, answer]
        choices = _choices(prompt, asked)
        # a choice is asked, a reference is not
        gold = self.task_type.gold(_render(prompt.gold, asked if choices else row), choices)
        question = _render(prompt.text, asked)
        return Item(context + question, gold, row, choices, (*turns, question))

    def _answer(self, prompt: Prompt, row: Row) -> str:
        choices = _choices(prompt, row)
        gold = self.task_type.gold(_render(prompt.gold, row), choices)
        return choices[gold] if isinstance(gold, int) else gold

    def _examples(self, row: Row, n: int, rng: Random) -> list[Row]:
        may_draw_item = self.pool_is_test and not self.first_of_pool
        n_drawn = n + 1 if may_draw_item else n
        if len(self.pool) < n_drawn:
            raise UserError(f"--shots {n}: suite {self.name} has {len(self.pool)} examples; use "
                            "fewer", FLAGS)
        if self.first_of_pool:
            return self.pool[:n]
        drawn = rng.sample(self.pool, n_drawn)
        if may_draw_item:
            drawn = [example for example in drawn if example != row][:n]
        if len(drawn) < n:  # the test has equal rows
            drawn = rng.sample([example for example in self.pool if example != row], n)
        return drawn

    def signature(self, prompt: Prompt) -> dict[str, object]:
        """Return what figures of this prompt depend on, as far as the suite determines it."""
        text = json.dumps([prompt.text, list(prompt.choices), prompt.gold, self.stop])
        prompt_hash = hashlib.sha256(text.encode()).hexdigest()[:8]
        return {"suite": f"{self.name}.{self.version}", "prompt": prompt_hash}


def clean_cells(row: Row, normaliser: Normaliser) -> Row:
    """Return a row whose texts, also those in lists, are normalised."""

    def clean(cell: Any) -> Any:
        if isinstance(cell, str):
            return normaliser(cell)[0]
        return [clean(x) for x in cell] if isinstance(cell, list) else cell

    return {column: clean(cell) for column, cell in row.items()}


def evenly_spaced(rows: list[Any], n: int) -> list[Any]:
    """Return `n` rows at equal distances, because files are often sorted; all if `n` is 0."""
    if n == 0 or n >= len(rows):
        return rows
    return [rows[i * len(rows) // n] for i in range(n)]


def suite_folders() -> list[Path]:
    """Return the folders of suites: evaluation/suites, then those of languages."""
    folders = [language.suites for language in known_languages().values() if language.suites]
    return [SUITES, *folders]


def suite_names() -> list[str]:
    """Return the names of all suites that are shipped."""
    return sorted(file.stem for folder in suite_folders() for file in folder.glob("*.toml"))


def load_suite(spec: str, data_folder: str = "") -> Suite:
    """Load the suite NAME (or a .toml of the user's) with its rows: those under `data_folder`, or
    with NAME=FILE those of a file or of hf:org/name/file. Raises UserError for what does not fit.
    """
    name, _, data_file = spec.partition("=")
    file = _suite_file(name)
    suite, layouts = _read_toml(file, name)
    folders = [Path(data_folder), file.parent, SUITES]
    if data_file:
        layout = layout_of_file(data_file, layouts)
    else:
        layout = find_layout(layouts, folders, suite.name, data_folder)
    suite.rows, suite.files = read_split(layout, "test", folders)
    if layout.get("shots") == "test":
        suite.pool, suite.pool_is_test = suite.rows, True
    elif layout.get("shots"):
        suite.pool, _ = read_split(layout, "shots", folders)
    if not suite.rows:
        raise UserError(f"{suite.files[0]}: no rows for suite {suite.name}; check the file")
    _check_columns(suite)
    _check_languages(suite)
    return suite


def _suite_file(name: str) -> Path:
    if name.endswith(".toml"):
        return Path(name)
    for folder in suite_folders():
        if (folder / f"{name}.toml").is_file():
            return folder / f"{name}.toml"
    return SUITES / f"{name}.toml"


def _read_toml(file: Path, name: str) -> tuple[Suite, list[Layout]]:
    """Read a suite without its rows, and the layouts of its data; `name` is the one on the command
    line."""
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--suites {name}: no such suite; there are "
                        f"{', '.join(suite_names())}, or name a .toml of your own", FLAGS) from None
    except ValueError as e:
        raise UserError(f"{file}: cannot be read as TOML ({e}); correct it") from None
    try:
        prompts = [_prompt(x, raw) for x in raw.pop("prompts")]
        layouts = raw.pop("data")
        for key in ("gold", "choices"):
            raw.pop(key, None)
        suite = _suite(file.stem, prompts, raw)
    except (KeyError, TypeError, ValueError, re.error) as e:
        raise UserError(f"{file}: not a suite ({e}); evaluation/suites/sib200.toml is an example") \
            from None
    unknown = [x for x in suite.metrics if x not in suite.task_type.known_metrics]
    if unknown or not suite.metrics:
        raise UserError(f"{file}: metrics: {', '.join(map(str, unknown)) or 'none'}; expected for "
                        f"kind {suite.task_type.kind} {', '.join(suite.task_type.known_metrics)}")
    return suite, layouts


def _suite(name: str, prompts: list[Prompt], raw: dict[str, Any]) -> Suite:
    """Return a suite of what its .toml says; ValueError, KeyError, TypeError, re.error if it is
    not one."""
    unknown = [key for key in raw if key not in TOML_KEYS]
    if unknown:
        raise ValueError(f"unknown key {unknown[0]}")
    if not prompts:
        raise ValueError("no prompts")
    for text in [x for p in prompts for x in (p.name, p.part)]:
        if "/" in text:
            raise ValueError(f"prompt {text}: a name with a /")
    task = task_type(raw.pop("kind"))
    for key in task.required_keys:
        if not raw.get(key):
            raise ValueError(f"kind {task.kind} needs [[{key}]]")
    languages = raw.pop("languages", {})
    suite = Suite(name=name, task_type=task, prompts=prompts, public_prompts=prompts,
                  first_of_pool=raw.pop("first", False),
                  languages={column: language_of(code, {code: code})
                             for column, code in languages.items()}, **raw)
    for extraction in suite.answers:
        if not extraction["name"]:
            raise ValueError("[[answers]] without a name")
        re.compile(extraction.get("last", ""))
    return suite


def _prompt(prompt: Mapping[str, Any], suite: Mapping[str, Any]) -> Prompt:
    """Return a prompt of [[prompts]]; `gold` and `choices` may stand in the suite for all."""
    gold = prompt.get("gold", suite.get("gold"))
    if gold is None:  # of a translation: the target column
        gold = "{{" + prompt["part"].partition("-")[2] + "}}"
    choices = prompt.get("choices", suite.get("choices", ()))
    # `aside` is the earlier name of `excluded_from_mean`
    excluded_from_mean = prompt.get("excluded_from_mean", prompt.get("aside", ""))
    return Prompt(prompt["name"], prompt["text"], gold, choices, prompt.get("part", ""),
                  excluded_from_mean)


def _check_columns(suite: Suite) -> None:
    """Raise UserError if a row lacks a column that prompts, groups or the task need."""
    from jinja2 import TemplateError, meta

    for prompt in suite.prompts:
        templates = [prompt.text, prompt.gold]
        if isinstance(prompt.choices, str):
            templates.append(prompt.choices)
        columns = {*suite.groups, *suite.task_type.columns(prompt)}
        try:
            for template in templates:
                columns |= meta.find_undeclared_variables(_jinja().parse(template))
        except TemplateError as e:
            raise UserError(f"suite {suite.name}, prompt {prompt.name}: {e}; correct the prompt") \
                from None
        for rows in (suite.rows, suite.pool):
            for column in sorted(columns):
                require_column(rows, column, suite.files[0])


def _check_languages(suite: Suite) -> None:
    """Raise UserError if most rows of a column are in another language than the suite says. A
    language without an identifier is not checked."""
    for column, language in suite.languages.items():
        identify = identifier_for([language.code])
        if identify is None or not all(column in row for row in suite.rows):
            continue
        wrong = []
        for i, row in enumerate(suite.rows):
            if identify(str(row[column])) not in (language.code, UNKNOWN):
                wrong.append(i)
        if len(wrong) > max(1, len(suite.rows) // 2):
            raise UserError(
                f"{suite.files[0]}: column {column} should be {language.code}, but {len(wrong)} of "
                f"{len(suite.rows)} rows are in another language, the first is row {wrong[0] + 1}: "
                f"{str(suite.rows[wrong[0]][column])[:60]!r}; check the file")


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
    """Return the continuations to choose from; a template gives them as a list."""
    if isinstance(prompt.choices, str):
        return tuple(map(str, ast.literal_eval(_render(prompt.choices, row))))
    return tuple(prompt.choices)
