"""Translation pairs and preference pairs as examples.

One idea: a translation is one text, a prompt and the answer right behind it, and only the answer
and EOS are trained. Both directions come from every pair: a model that was shown only one answers
in the wrong language when it is asked for the other (as Llammas found), and a split that trains
each direction on half the pairs looks just the same from outside.

A preference pair is the same prompt twice, with the answer that was chosen and with the one that
was not: documents 2i and 2i + 1 of a bin.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preparation import text as corpus
from preparation.conversations import (
    Example,
    Row,
    equal,
    key,
    messages_of,
    placed,
    rows,
    text_at,
    with_system,
)
from runtime.console import FLAGS, UserError, say
from tokenization.chat_template import NOT, TRAINED, Layout, Template, documents
from tokenization.tokenizer import Part, Tokenizer

LANGUAGES = ("eng", "kin")
DIRECTIONS = ("eng-kin", "kin-eng")


@dataclass(frozen=True)
class Prompt:
    """How a translation is asked for: a text with {source}, {target} and {text}, and what the
    languages are called in it."""

    name: str
    text: str
    languages: Mapping[str, str]

    def fill(self, text: str, direction: str) -> str:
        """The prompt of a text; the translation follows it directly."""
        source, target = direction.split("-")
        return self.text.format(source=self.languages[source], target=self.languages[target],
                                text=text)

    def to_json(self) -> dict[str, Any]:
        """As meta.json and a model's prompt.json keep it."""
        return {"name": self.name, "text": self.text, "languages": dict(self.languages)}


def answer(tokenizer: Tokenizer, prompt: str, words: str) -> Layout:
    """BOS, a prompt, the words that follow it, EOS; only the words and EOS are trained.

    The words are encoded by themselves, so that the prompt's ids are those it has when it is asked.
    """
    if tokenizer.eos is None:
        raise UserError("the tokenizer names no eos_token, so no answer would end; name one in "
                        "tokenizer_config.json")
    laid = Layout(len(prompt.encode()) + len(words.encode()), begin=tokenizer.ends[0],
                  end=[tokenizer.eos])
    laid.add([Part(prompt, False, True)], NOT)
    laid.add([Part(words, False, False)], TRAINED)
    return laid


def read_directions(words: Sequence[str]) -> dict[str, float]:
    """`both`, or directions with weights -> the share of all pairs that each is trained on."""
    weights = dict.fromkeys(DIRECTIONS, 1.0) if list(words) == ["both"] else {}
    for word in [] if weights else words:
        name, _, weight = word.partition(":")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            weights[name] = 0.0
        if name not in DIRECTIONS or not 0 < weights[name] < float("inf"):
            raise UserError(f"--directions {word}: expected both, or {' and '.join(DIRECTIONS)}, "
                            "each with a weight if you like, as in eng-kin:3 kin-eng:1", FLAGS)
    most = max(weights.values(), default=1.0)
    return {name: x / most for name, x in weights.items()}


@dataclass
class Translations:
    """Pairs of sentences to examples; how they are filtered, asked for, and in which directions.

    What is drawn for a pair is drawn by the seed and its number; solved examples are of the pairs
    before it in its chunk.
    """

    tokenizer: Tokenizer
    prompts: Sequence[tuple[Prompt, float]]  # and weights
    directions: Mapping[str, float]  # the share of all pairs that each is trained on
    clean: corpus.Normaliser | None = None
    max_ratio: float = 3.0
    shots: int = 0  # solved examples before the one that is asked
    as_text: bool = False
    template: Template | None = None  # as a conversation
    seed: int = 1

    def __call__(self, rows: Sequence[Row]) -> list[Example]:
        """Every row of `joined` as one document for each direction."""
        before: list[dict[str, str]] = []  # solved ones to show
        found, laid = [], []
        for row in rows:
            pair, changes = self._pair(row)
            eng, kin = pair["eng"], pair["kin"]
            fault = "empty" if not (eng and kin) else "identical" if eng == kin else ""
            long, short = max(len(eng), len(kin)) + 10, min(len(eng), len(kin)) + 10
            if not fault and self.max_ratio and long > self.max_ratio * short:
                fault = "length ratio"
            draw = random.Random(f"{self.seed} {row.number}")
            kinds = () if fault else tuple(
                direction for direction, share in self.directions.items()
                if share >= 1 or draw.random() < share)
            for direction in kinds:
                with placed(row):
                    laid.append(self._layout(pair, direction, before, draw))
            found.append(Example([], key([eng, kin]), fault, kinds, changes))
            if not fault and self.shots:
                before = [*before[-63:], pair]
        made = iter(documents(self.tokenizer, laid))
        for x in found:
            x.documents = [next(made) for _ in x.kinds]
        return found

    def _pair(self, row: Row) -> tuple[dict[str, str], Counter[str]]:
        """A row's two sides, clean, each on one line; and the places that were cleaned."""
        sides, changes = {}, Counter()
        for name in LANGUAGES:
            lines = []
            for text in row.cells[name]:
                if self.clean:
                    text, places = self.clean(text)
                    changes.update(places)
                lines.append(" ".join(text.split()))  # a prompt has a line for a sentence
            sides[name] = " ".join(lines)
        return sides, changes

    def _layout(self, pair: Mapping[str, str], direction: str, before: Sequence[Mapping[str, str]],
                draw: random.Random) -> Layout:
        source, target = direction.split("-")
        if self.as_text:
            names = self.prompts[0][0].languages
            text = f"{names[source]}: {pair[source]}\n{names[target]}: {pair[target]}"
            begin, end = self.tokenizer.ends
            laid = Layout(len(text.encode()), begin=begin, end=end, whole=True)
            laid.add([Part(text, False, True)], TRAINED)
            return laid
        prompts, weights = zip(*self.prompts, strict=True)
        prompt = draw.choices(prompts, weights)[0] if len(prompts) > 1 else prompts[0]
        shown = draw.sample(before, min(self.shots, len(before))) if self.shots else []
        asked = "".join(prompt.fill(x[source], direction) + x[target] + "\n\n" for x in shown)
        asked += prompt.fill(pair[source], direction)
        if self.template:
            return self.template.lay_out([{"role": "user", "content": asked.rstrip()},
                                          {"role": "assistant", "content": pair[target]}])
        return answer(self.tokenizer, asked, pair[target])


def joined(found: Iterable[Row], keys: tuple[str, str], n: int = 1) -> Iterator[Row]:
    """Rows whose cells "eng" and "kin" are the texts of `n` consecutive pairs of one file, fewer
    where it ends."""
    held: list[Row] = []

    def one() -> Row:
        cells = {name: [row.cells[key] for row in held]
                 for name, key in zip(LANGUAGES, keys, strict=True)}
        return Row(held[0].where, cells, sum(row.size for row in held))

    try:
        for row in _flat(found, keys):
            # a null, as parquet has for it, is a side without words, and counted as one
            row.cells = {k: "" if x is None else x for k, x in row.cells.items()}
            for name in keys:
                text_at(row, name)
            if held and (len(held) == n or _file(row) != _file(held[0])):
                yield one()
                held = []
            held.append(row)
    except UserError:
        if held:
            yield one()
        raise
    if held:
        yield one()


def _flat(found: Iterable[Row], keys: Sequence[str]) -> Iterator[Row]:
    """Rows as they are; one whose two cells are lists (the pages of a story) becomes several."""
    for row in found:
        cells = [row.cells.get(k) for k in keys]
        if not all(isinstance(x, list) for x in cells):
            yield row
            continue
        if len(cells[0]) != len(cells[1]):
            raise UserError(f"{row.where}: {len(cells[0])} parts under {keys[0]!r}, "
                            f"{len(cells[1])} under {keys[1]!r}; they must belong together")
        for n, pair in enumerate(zip(*cells, strict=True), 1):
            yield Row(f"{row.where}, {n}", dict(zip(keys, pair, strict=True)),
                      len(str(pair).encode()))


def _file(row: Row) -> str:
    """The file a row is of, or the row itself whose parts these are."""
    return row.where.rpartition(", ")[0]


@dataclass
class Preferences:
    """Rows {"prompt", "chosen", "rejected"} to examples of two documents, the chosen one first.

    A prompt is a text, which the answer follows directly (`as_chat`: which is a user's message), or
    messages; an answer is a text or messages, alone or behind those of the prompt.
    """

    tokenizer: Tokenizer
    template: Template
    as_chat: bool = False

    def __call__(self, rows: Sequence[Row]) -> list[Example]:
        found, laid, fault = [], [], None
        for row in rows:
            try:
                asked, *answers = self._read(row)
                with placed(row):
                    laid += [
                        answer(self.tokenizer, asked, x) if isinstance(asked, str)
                        else self.template.lay_out([*asked, {"role": "assistant", "content": x}])
                        for x in answers]
            except UserError as e:  # said if none before it is equal, which its ids tell
                fault = e
                break
            found.append(Example([], key([str(asked), *answers])))
        made = iter(documents(self.tokenizer, laid))
        for row, x in zip(rows, found, strict=False):
            x.documents = [next(made), next(made)]
            if equal(x.documents):
                raise UserError(f"{row.where}: chosen and rejected are equal; a pair teaches "
                                "nothing then, take it out")
        if fault:
            raise fault
        return found

    def _read(self, row: Row) -> tuple[str | list[dict[str, str]], str, str]:
        """What a row asks, and the two answers."""
        answers = [_answer(row, x) for x in ("chosen", "rejected")]
        asked, other = (_question(row, x, self.as_chat) for x in ("chosen", "rejected"))
        if asked != other:
            raise UserError(f"{row.where}: chosen and rejected answer different questions; "
                            "a pair has one, give it as prompt")
        return asked, *answers


def _question(row: Row, key: str, as_chat: bool) -> str | list[dict[str, str]]:
    """What an answer follows: a text, or messages: the prompt's, or those before its own."""
    asked, alone = row.cells.get("prompt"), isinstance(row.cells[key], str)
    before = [] if alone else messages_of(row, key)[:-1]
    if isinstance(asked, str):
        asked = text_at(row, "prompt")
        said = before or [{"role": "user", "content": asked}]
        other = asked.strip() not in [x["content"].strip() for x in said]
    else:
        said = messages_of(row, "prompt") if asked is not None or not before else before
        other = bool(before) and said != before
    if other:
        raise UserError(f"{row.where}: {key} begins with other messages than prompt; leave one of "
                        "the two out")
    said = with_system(row, said)
    if not (isinstance(asked, str) and alone and not as_chat):
        return said
    if len(said) > 1:
        raise UserError(f"{row.where}: a system message, and a prompt that is a text; give "
                        "--as-chat, or take it out")
    return asked


def _answer(row: Row, key: str) -> str:
    """What is said at the end of an answer, whether it is a text or messages."""
    if isinstance(row.cells.get(key), str | None):
        words = text_at(row, key)
    else:
        last = messages_of(row, key)[-1]
        if last["role"] != "assistant":
            raise UserError(f"{row.where}: {key} does not end with the assistant")
        words = last["content"]
    if not words.strip():
        raise UserError(f"{row.where}: {key} is empty; take the pair out")
    return words


@dataclass
class Candidates:
    """A prompt, a text or the messages of a conversation, and what a model answered to it."""

    prompt: str | list[dict[str, str]]
    texts: list[str]


def candidates(path: Path) -> list[Candidates]:
    """What `sample.py --json --samples N` printed, by prompt, in order.

    The same prompt twice is two, by the number beside each answer; without numbers by what stands
    between. Says how many answers were cut: training would end them there.
    """
    found: dict[tuple[str, str], Candidates] = {}
    cut, run, before = 0, 0, None
    for row in rows(path):
        asked, text = text_at(row, "prompt"), text_at(row, "text")
        cut += row.cells.get("end") == "length"
        run, before = run + (asked != before), asked
        prompt = messages_of(row, "messages") if "messages" in row.cells else asked
        which = (str(row.cells.get("prompt_number", -run)), asked)
        found.setdefault(which, Candidates(prompt, [])).texts.append(text)
    if not found:
        raise UserError(f"{path}: no samples in it")
    if cut:
        n = sum(len(x.texts) for x in found.values())
        say(f"{path}: {cut:,} of {n:,} answers were cut at --max-new-tokens, and a preference ends "
            "them there; sample again with more")
    return list(found.values())


def best_and_worst(found: Sequence[Candidates], references: Sequence[str],
                   score: Callable[[str, str], float], gap: float) -> Iterator[dict[str, Any]]:
    """A preference pair for each prompt: its samples of the highest and the lowest score.

    Prompts whose two ends are nearer than `gap` give none. UserError if the references are not as
    many as the prompts.
    """
    if len(references) != len(found):
        few, many = (end(found, key=lambda x: len(x.texts)) for end in (min, max))
        twice = f"; {str(many.prompt)[:60]!r} has {len(many.texts)} answers, others " \
                f"{len(few.texts)}: if it stands twice, sample again, which numbers prompts"
        raise UserError(f"--references: {len(references):,} lines for {len(found):,} prompts; "
                        "expected a line for each prompt, in order"
                        + (twice if len(many.texts) > len(few.texts) else ""))
    for one, reference in zip(found, references, strict=True):
        scored = sorted(((score(x.strip(), reference), x) for x in dict.fromkeys(one.texts)),
                        key=lambda x: x[0])
        low, high = scored[0], scored[-1]
        if high[0] - low[0] > gap and high[1].strip() and low[1].strip():
            yield {"prompt": one.prompt, "chosen": high[1], "rejected": low[1],
                   "scores": [round(high[0], 2), round(low[0], 2)]}


def by_votes(found: Sequence[Candidates], votes: Path) -> Iterator[dict[str, Any]]:
    """A preference pair for each vote, a row {"prompt", "best", "worst"} of numbers from 1."""
    for row in rows(votes):
        try:
            p, best, worst = (int(row.cells[k]) for k in ("prompt", "best", "worst"))
            prompt, texts = found[p - 1].prompt, found[p - 1].texts
            if min(p, best, worst) < 1 or texts[best - 1] == texts[worst - 1]:
                raise IndexError
            yield {"prompt": prompt, "chosen": texts[best - 1], "rejected": texts[worst - 1]}
        except (KeyError, ValueError, TypeError, IndexError):
            raise UserError(
                f"{row.where}: {dict(row.cells)}; expected the numbers of a prompt and of two of "
                "its samples that differ, as prompt, best, worst, counted from 1") from None
