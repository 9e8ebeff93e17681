"""Sentence pairs -> token bin of translations.

A translation is one document: a prompt and the answer directly behind it. Only the answer and EOS
are trained. Each pair is trained in both directions: a model that was trained on one direction
answers in the wrong language when it is asked for the other (Llammas, Kuulmets et al. 2024).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from data import Bin
from languages.language import Language, share_of_words
from languages.normalise import Normaliser, cleaning_of
from preparation.examples import (
    Example,
    LengthLimit,
    example_key,
    open_template,
    render_conversations,
    text_cell,
    with_location,
    write_examples,
)
from preparation.ledger import Ledger
from preparation.readers import ROW_FORMATS, Row, list_files, read_aligned_rows, read_rows
from preparation.specs import read_weighted_name
from preparation.workers import Workers
from runtime.console import FLAGS, UserError, info
from tokenization.chat_template import ChatTemplate, Loss, RenderedDocument, encode_rendered
from tokenization.tokenizer import Segment, Tokenizer

MAX_SHOT_CANDIDATES = 64  # earlier pairs from which the solved examples are drawn
SWAP_CHECK_ROWS = 1000  # of each file


@dataclass(frozen=True)
class Prompt:
    """The prompt of a translation: a text with {source}, {target} and {text}, and the names of
    the languages in it by code."""

    name: str
    text: str
    languages: Mapping[str, str]

    def fill(self, text: str, direction: str) -> str:
        """The prompt for a text; the translation follows it directly."""
        source, target = direction.split("-")
        return self.text.format(source=self.languages[source], target=self.languages[target],
                                text=text)

    def to_json(self) -> dict[str, Any]:
        """The prompt as meta.json and a model's prompt.json have it."""
        return {"name": self.name, "text": self.text, "languages": dict(self.languages)}


def prepare_translation(specs: Sequence[str], tokenizer_path: Path | str, out: Path | str, *,
                        languages: tuple[Language, Language],
                        prompts: Sequence[tuple[Prompt, float]],
                        columns: Mapping[str, str] | None = None, aligned: bool = False,
                        directions: Sequence[str] = ("both",), as_chat: bool = False,
                        as_text: bool = False, template: str = "model",
                        template_kwargs: Mapping[str, Any] | None = None, shots: int = 0,
                        join: int = 1, max_ratio: float = 3.0,
                        normalise: Normaliser | None = None, limit: LengthLimit | None = None,
                        keep_duplicates: bool = False, seed: int = 1,
                        workers: Workers | None = None) -> tuple[Bin, Ledger, Counter[str]]:
    """Prepare files of sentence pairs into a bin of kind "mt", or "text" with `as_text`. Returns
    the bin, the ledger, and the number of documents by direction.

    `columns`: the column of each language by code (default: the code itself); `prompts`: with
    their weights. `aligned`: the files are .txt, of the first and the second language in turn.
    """
    pair = (languages[0].code, languages[1].code)
    columns = {code: (columns or {}).get(code, code) for code in pair}
    weights = parse_directions(directions, pair)
    tokenizer = Tokenizer.open(tokenizer_path)
    chat_template = None
    if as_chat:
        chat_template = open_template(template, Path(tokenizer_path), tokenizer, template_kwargs)
    paths = list_files(specs, (".txt",) if aligned else ROW_FORMATS)
    if aligned and len(paths) % 2:
        raise UserError(
            f"--aligned: {len(paths)} files, an odd number of files; name a file in "
            f"{languages[0].english_name} and its translation into {languages[1].english_name} in "
            "turn", FLAGS)
    rows = _read_pairs(paths, columns, languages, aligned)
    encoder = TranslationEncoder(
        tokenizer, prompts, weights, pair, normalise, max_ratio, max(0, shots), as_text,
        chat_template, seed)
    meta_prompt: dict[str, Any] = {}
    if not as_text:
        meta_prompt["translate"] = [{**x.to_json(), "as_chat": as_chat} for x, _ in prompts]
        if chat_template:
            meta_prompt |= chat_template.to_prompt()
    return write_examples(
        join_pairs(rows, columns, max(1, join)), encoder, out, tokenizer,
        "text" if as_text else "mt", paths, meta_prompt, limit or LengthLimit(), keep_duplicates,
        workers, cleaning_of(normalise))


def parse_directions(words: Sequence[str], pair: tuple[str, str]) -> dict[str, float]:
    """The values of --directions -> the share of all pairs that each direction is trained on.

    `both`, or directions with weights: "eng-kin:3", "kin-eng:1" -> 1.0 and 0.33.
    """
    known = (f"{pair[0]}-{pair[1]}", f"{pair[1]}-{pair[0]}")
    if list(words) == ["both"]:
        return dict.fromkeys(known, 1.0)
    weights = {}
    for word in words:
        name, weight = read_weighted_name(
            word, known, f"--directions {word}: expected both, or {' and '.join(known)}, each with "
            f"a weight if you like, as in {known[0]}:3 {known[1]}:1; other languages are named "
            "with --languages")
        weights[name] = weight
    largest = max(weights.values(), default=1.0)
    return {name: weight / largest for name, weight in weights.items()}


def render_answer(tokenizer: Tokenizer, prompt: str, answer: str) -> RenderedDocument:
    """BOS, a prompt, the answer, EOS; only the answer and EOS are trained.

    The answer is encoded by itself, so that the prompt has the same ids as at inference.
    """
    if tokenizer.eos is None:
        raise UserError("the tokenizer names no eos_token, so no answer would end; name one in "
                        "tokenizer_config.json")
    begin, _ = tokenizer.begin_end_ids
    rendered = RenderedDocument(len(prompt.encode()) + len(answer.encode()), begin=begin,
                                end=[tokenizer.eos])
    rendered.add([Segment(prompt, False, True)], Loss.NONE)
    rendered.add([Segment(answer, False, False)], Loss.ALL)
    return rendered


@dataclass
class TranslationEncoder:
    """Rows of `join_pairs` to examples: one document per direction.

    All random choices of a pair depend on the seed and the pair's number. Solved examples (shots)
    are earlier pairs of the same chunk.
    """

    tokenizer: Tokenizer
    prompts: Sequence[tuple[Prompt, float]]  # with weights
    directions: Mapping[str, float]  # the share of all pairs that each is trained on
    pair: tuple[str, str]  # codes of the two languages
    normalise: Normaliser | None = None
    max_ratio: float = 3.0
    shots: int = 0
    as_text: bool = False
    template: ChatTemplate | None = None  # as a conversation
    seed: int = 1

    def __call__(self, rows: Sequence[Row]) -> list[Example]:
        earlier: list[dict[str, str]] = []
        examples, rendered = [], []
        conversations, origins = [], []  # with a template; the row of each
        for row in rows:
            sides, changes = self._clean_sides(row)
            fault = self._fault(sides)
            rng = random.Random(f"{self.seed} {row.number}")
            directions = () if fault else self._draw_directions(rng)
            for direction in directions:
                if self.template:
                    question = self._question(sides, direction, earlier, rng)
                    conversations.append([
                        {"role": "user", "content": question.rstrip()},
                        {"role": "assistant", "content": sides[direction.split("-")[1]]}])
                    origins.append(row)
                    continue
                with with_location(row):
                    rendered.append(self._render(sides, direction, earlier, rng))
            key = example_key([sides[code] for code in self.pair])
            examples.append(Example([], key, fault, directions, changes))
            if self.shots and not fault:
                earlier = [*earlier[-(MAX_SHOT_CANDIDATES - 1):], sides]
        if self.template:
            rendered = render_conversations(self.template, origins, conversations)
        encoded = iter(encode_rendered(self.tokenizer, rendered))
        for example in examples:
            example.documents = [next(encoded) for _ in example.directions]
        return examples

    def _clean_sides(self, row: Row) -> tuple[dict[str, str], Counter[str]]:
        """The two sides of a row, normalised, each on one line; and the places changed."""
        sides, changes = {}, Counter()
        for code in self.pair:
            sentences = []
            for text in row.cells[code]:
                if self.normalise:
                    text, counts = self.normalise(text)
                    changes.update(counts)
                sentences.append(" ".join(text.split()))  # a prompt has a line for each sentence
            sides[code] = " ".join(sentences)
        return sides, changes

    def _fault(self, sides: Mapping[str, str]) -> str:
        """Why a pair is left out; "" if it is not."""
        first, second = (sides[code] for code in self.pair)
        if not (first and second):
            return "empty"
        if first == second:
            return "identical"
        shorter, longer = sorted((len(first) + 10, len(second) + 10))
        if self.max_ratio and longer > self.max_ratio * shorter:
            return "length ratio"
        return ""

    def _draw_directions(self, rng: random.Random) -> tuple[str, ...]:
        return tuple(direction for direction, share in self.directions.items()
                     if share >= 1 or rng.random() < share)

    def _render(self, sides: Mapping[str, str], direction: str,
                earlier: Sequence[Mapping[str, str]], rng: random.Random) -> RenderedDocument:
        source, target = direction.split("-")
        if self.as_text:
            return self._render_text(sides, source, target)
        question = self._question(sides, direction, earlier, rng)
        return render_answer(self.tokenizer, question, sides[target])

    def _question(self, sides: Mapping[str, str], direction: str,
                  earlier: Sequence[Mapping[str, str]], rng: random.Random) -> str:
        """The prompt of a pair, behind its solved examples."""
        source, target = direction.split("-")
        prompts, weights = zip(*self.prompts, strict=True)
        prompt = rng.choices(prompts, weights)[0] if len(prompts) > 1 else prompts[0]
        shots = []
        if self.shots:
            shots = rng.sample(earlier, min(self.shots, len(earlier)))
        question = "".join(
            prompt.fill(x[source], direction) + x[target] + "\n\n" for x in shots)
        return question + prompt.fill(sides[source], direction)

    def _render_text(self, sides: Mapping[str, str], source: str, target: str) -> RenderedDocument:
        """Both sides as plain text, all of it trained."""
        names = self.prompts[0][0].languages
        text = f"{names[source]}: {sides[source]}\n{names[target]}: {sides[target]}"
        begin, end = self.tokenizer.begin_end_ids
        rendered = RenderedDocument(len(text.encode()), begin=begin, end=end, train_all=True)
        rendered.add([Segment(text, False, True)], Loss.ALL)
        return rendered


def join_pairs(rows: Iterable[Row], columns: Mapping[str, str], n: int = 1) -> Iterator[Row]:
    """Rows whose cells are, by language code, the texts of `n` consecutive pairs of one file
    (fewer at its end). `columns` names the column of each language."""
    group: list[Row] = []

    def joined() -> Row:
        cells = {code: [row.cells[column] for row in group] for code, column in columns.items()}
        return Row(group[0].location, cells, sum(row.n_bytes for row in group))

    try:
        for row in _split_lists(rows, list(columns.values())):
            # a null, as parquet has it, counts as an empty text
            row.cells = {k: "" if x is None else x for k, x in row.cells.items()}
            for column in columns.values():
                text_cell(row, column)
            if group and (len(group) == n or _file(row) != _file(group[0])):
                yield joined()
                group = []
            group.append(row)
    except UserError:
        if group:
            yield joined()
        raise
    if group:
        yield joined()


def _split_lists(rows: Iterable[Row], columns: Sequence[str]) -> Iterator[Row]:
    """Rows as they are; a row whose two cells are lists (the pages of a story) becomes several."""
    for row in rows:
        cells = [row.cells.get(column) for column in columns]
        if not all(isinstance(x, list) for x in cells):
            yield row
            continue
        if len(cells[0]) != len(cells[1]):
            raise UserError(f"{row.location}: {len(cells[0])} parts under {columns[0]!r}, "
                            f"{len(cells[1])} under {columns[1]!r}; part n of one must belong to "
                            "part n of the other")
        for number, texts in enumerate(zip(*cells, strict=True), 1):
            yield Row(f"{row.location}, {number}", dict(zip(columns, texts, strict=True)),
                      len(str(texts).encode()))


def _file(row: Row) -> str:
    """The file of a row, or of a part of a row that row."""
    return row.location.rpartition(", ")[0]


def _read_pairs(paths: Sequence[Path], columns: Mapping[str, str],
                languages: tuple[Language, Language], aligned: bool) -> Iterator[Row]:
    """The rows of all files; says so for each file whose two sides look swapped."""
    if aligned:
        for first, second in zip(paths[::2], paths[1::2], strict=True):
            rows = read_aligned_rows(dict(zip(columns.values(), (first, second), strict=True)))
            yield from _warn_if_swapped(rows, columns, languages)
    else:
        for path in paths:
            yield from _warn_if_swapped(read_rows(path), columns, languages)


def _warn_if_swapped(rows: Iterator[Row], columns: Mapping[str, str],
                     languages: tuple[Language, Language]) -> Iterator[Row]:
    """The rows themselves. Says so if the first side has more frequent words of the second
    language than of its own, and the second side more of the first language."""
    head: list[Row] = []
    fault = None
    try:
        head.extend(islice(rows, SWAP_CHECK_ROWS))
    except UserError as e:  # the rows before it may have other faults, which come first
        fault = e
    if head and all(language.frequent_words for language in languages):
        _check_sides(head, columns, languages)
    yield from head
    if fault:
        raise fault
    yield from rows


def _check_sides(head: Sequence[Row], columns: Mapping[str, str],
                 languages: tuple[Language, Language]) -> None:
    first, second = languages
    shares = {}  # (language of the side, language of the words) -> share of frequent words
    for side in languages:
        cells = [row.cells.get(columns[side.code]) for row in head]
        texts = [x for x in cells if isinstance(x, str)]
        for language in languages:
            shares[side.code, language.code] = share_of_words(texts, language.frequent_words)
    own_shares = [shares[x.code, x.code] for x in languages]
    other_shares = [shares[first.code, second.code], shares[second.code, first.code]]
    if other_shares[0] > own_shares[0] and other_shares[1] > own_shares[1]:
        info(f"{head[0].location}: from here on the languages look swapped: "
             f"{columns[first.code]!r} has {other_shares[0]:.0%} frequent {second.english_name} "
             f"words and {own_shares[0]:.0%} {first.english_name} ones, {columns[second.code]!r} "
             f"{own_shares[1]:.0%} and {other_shares[1]:.0%}; see --columns")
