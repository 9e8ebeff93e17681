"""Minimal pairs that test agreement: the form of a noun's class against that of another class.

    python -m languages.kinyarwanda.agreement > languages/kinyarwanda/suites/agreement.jsonl
    python -m languages.kinyarwanda.agreement --attest FILE[:FIELD] ...

    Ibitabo ubu biri mu nzu.     the books are now in the house: class 8, bi-
    Ibitabo ubu ziri mu nzu.     the same with the form of class 10, which is wrong

Two pairs mirror each other: they share a sentence and have nouns of two classes, a and b. Each
sets the form of a against the form of b. The form that is right for one noun is wrong for the
other, so a model that prefers frequent or short forms and does not use the noun is right in exactly
half of the pairs. docs/agreement.md says how the wrong form is chosen, and what was left out.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from languages.kinyarwanda import grammar as g
from languages.kinyarwanda.attest import WORD, words
from languages.kinyarwanda.lexicon import FITS, NOUNS, PEOPLE, Noun
from runtime import console
from runtime.console import FLAGS, UserError

PAIRS = 160  # for each part of speech at each distance
SEED = 1
SUBJECT = {1: "a", 2: "ba", 4: "i", 5: "ri", 6: "a", 7: "ki", 8: "bi", 9: "i", 10: "zi", 11: "ru",
           14: "bu"}  # not 3: its u- is also that of "you"
PAST = {1: "yari", 2: "bari", 4: "yari", 5: "ryari", 6: "yari", 7: "cyari", 8: "byari", 9: "yari",
        10: "zari", 11: "rwari", 14: "bwari"}
AUGMENT = {1: "u", 2: "a", 3: "u", 4: "i", 5: "i", 6: "a", 7: "i", 8: "i", 9: "i", 10: "i", 11: "u",
           14: "u"}  # of a possessive that stands for a noun: icyanjye, mine
OWNERS = ("my", "your", "our", "their")
PLACES = {"person": ("ku isoko", "ku ishuri", "mu rugo", "i Kigali"), "animal": ("mu rugo",
          "ku isoko"), "text": ("mu nzu", "ku ishuri"), "food": ("mu nzu", "ku isoko"),
          "drink": ("mu nzu", "ku isoko"), "thing": ("mu nzu", "mu cyumba", "ku isoko"),
          "opening": ("mu nzu",), "tree": ("mu rugo", "i Huye"), "built": ("i Kigali", "mu mujyi"),
          "land": ("i Huye", "i Musanze")}
BETWEEN = {  # words between noun and verb, by tense; they do not agree with the noun
    "now": ("", "ubu", "uyu munsi", "buri munsi mu gitondo"),
    "then": ("", "ejo hashize", "ejo hashize nimugoroba"),
    "later": ("", "ejo", "ejo nimugoroba", "ejo mu gitondo")}
COPULAS = ("ni", "ntabwo ari", "uyu munsi ni", "uyu munsi ntabwo ari")  # invariable
FRAMES = ("Dufite", "Nabonye", "Hano hari")


class Form(NamedTuple):
    """A noun as it stands in a sentence."""

    word: str
    cls: int
    noun: Noun
    plural: bool


class Target(NamedTuple):
    """A sentence with a word that agrees: what precedes it, its form for each class, the rest."""

    part: str  # part of speech of the word that agrees
    between: str  # between the noun and the word that agrees
    forms: dict[int, str]
    rest: str
    frame: str = ""  # before the noun


def nouns() -> list[Form]:
    """Every noun of the demo's lexicon, singular and plural."""
    forms = []
    for noun in NOUNS:
        if noun.sg:
            forms.append(Form(noun.sg, noun.sg_class, noun, False))
        if noun.pl:
            forms.append(Form(noun.pl, noun.pl_class, noun, True))
    return forms


def classes_of(word: str) -> set[int]:
    """All classes that a noun's form may have. A form of class 9 may also be of class 10, and the
    other way round: inka is one cow or many."""
    classes = {f.cls for f in nouns() if f.word == word}
    return classes | {9, 10} if classes & {9, 10} else classes


def _verbs(kinds: Iterable[str]) -> Iterator[Target]:
    common = set.intersection(*(set(PLACES.get(k, ())) for k in kinds))
    tenses = {"now": {c: p + "ri" for c, p in SUBJECT.items()}, "then": PAST,
              "later": {c: p + "zaba" for c, p in SUBJECT.items()}}
    for place in sorted(common):
        for tense, forms in tenses.items():
            for between in BETWEEN[tense]:
                if "buri munsi" not in between:
                    yield Target("verb", between, forms, f" {place}.")
        forms = {c: p + "raboneka" for c, p in SUBJECT.items()}
        for between in BETWEEN["now"]:
            yield Target("verb", between, forms, f" {place}.")


def _adjectives(kinds: Iterable[str]) -> Iterator[Target]:
    for root in sorted(set.intersection(*(set(FITS.get(k, ())) for k in kinds))):
        forms = {c: g.adjective(root, c) for c in g.ADJECTIVE if c < 12 or c == 14}
        yield from (Target("adjective", "", forms, ".", frame) for frame in FRAMES)
        yield from (Target("adjective", be, forms, ".") for be in COPULAS)


def _numerals() -> Iterator[Target]:
    for n in range(2, 6):
        forms = {c: g.number(n, c) for c in g.COUNT}
        yield from (Target("numeral", "", forms, ".", frame) for frame in FRAMES)
        yield from (Target("numeral", be, forms, ".") for be in COPULAS)


def _possessives() -> Iterator[Target]:
    for owner in OWNERS:
        forms = {c: g.possessive(owner, c) for c in AUGMENT}
        yield Target("possessive", "", forms, ".", "Nabonye")
        mine = {c: AUGMENT[c] + form for c, form in forms.items() if c != 14}  # ubwanjye: myself
        yield from (Target("possessive", be, mine, ".") for be in COPULAS)
    for person in PEOPLE[:12]:
        forms = {c: g.joined(g.OF[c], person.sg) for c in AUGMENT}
        yield Target("possessive", "", forms, ".", "Nabonye")


def targets(a: Form, b: Form) -> list[Target]:
    """Every sentence that fits both nouns and has a word that agrees with them."""
    kinds = {a.noun.kind, b.noun.kind}
    fitting = [*_verbs(kinds), *_adjectives(kinds)]
    if all(f.plural and f.noun.sg for f in (a, b)):
        fitting += _numerals()
    if not kinds & {"person", "land", "song", "built"}:  # not owned as one owns a pen
        fitting += _possessives()
    return fitting


def fits(target: Target, a: Form, b: Form) -> bool:
    """Whether both nouns have a form here, and the form of each is wrong for the other."""
    if a.cls not in target.forms or b.cls not in target.forms:
        return False
    form_a, form_b = target.forms[a.cls], target.forms[b.cls]
    return not any(wrong in {target.forms.get(c) for c in classes_of(noun.word)}
                   for noun, wrong in ((a, form_b), (b, form_a)))


def distance(target: Target) -> int:
    """Number of words between the noun and the word that agrees with it."""
    return len(target.between.split())


def pair(target: Target, noun: Form, other: Form, choices: list[str], label: int) -> dict[str, Any]:
    """One minimal pair as a row of the suite's agreement.jsonl."""
    left_words = [target.frame, noun.word, target.between]
    left_context = " ".join(filter(None, left_words))
    return {"before": left_context[0].upper() + left_context[1:], "choices": choices,
            "label": label, "part": target.part, "class": noun.cls, "against": other.cls,
            "distance": distance(target)}


def pairs() -> list[dict[str, Any]]:
    """All pairs, two mirrored ones after each other, PAIRS for each part and distance.

    They are the same every time. The two classes are drawn first, with equal probability, so that
    rare classes occur as often as frequent ones.
    """
    draw = random.Random(SEED)
    by_class = defaultdict(list)
    for form in nouns():
        by_class[form.cls].append(form)
    everything = {(t.part, distance(t)) for kind in PLACES for t in (
        *_verbs([kind]), *_adjectives([kind]), *_numerals(), *_possessives())}
    rows, used = [], set()
    for cell in sorted(everything):
        cell_rows: list[dict[str, Any]] = []
        for _ in range(100_000):
            if len(cell_rows) == PAIRS:
                break
            one, two = draw.sample(sorted(by_class), 2)
            a, b = draw.choice(by_class[one]), draw.choice(by_class[two])
            if a.noun is b.noun and draw.random() < 0.9:  # mostly other words, not only number
                continue
            fitting = [t for t in targets(a, b) if (t.part, distance(t)) == cell and fits(t, a, b)]
            if not fitting:
                continue
            t = draw.choice(fitting)
            choices = [t.forms[a.cls] + t.rest, t.forms[b.cls] + t.rest]
            both = [pair(t, a, b, choices, 0), pair(t, b, a, choices, 1)]
            keys = {(r["before"], *sorted(choices)) for r in both}
            if not keys & used:
                used |= keys
                cell_rows += both
        rows += cell_rows
    return rows


def forms(rows: Iterable[dict[str, Any]]) -> set[str]:
    """Every word of the pairs, in lower case."""
    return {w for r in rows for text in (r["before"], *r["choices"])
            for w in WORD.findall(text.lower())}


def attest(sources: Iterable[str], rows: list[dict[str, Any]]) -> tuple[Counter[str], int]:
    """Return how often each word of the pairs occurs in the files, and how many of the pairs (noun,
    right form) occur there as neighbours."""
    count_of = Counter(dict.fromkeys(forms(rows), 0))
    wanted = {(r["before"].split()[-1].lower(), r["choices"][r["label"]].split()[0].strip("."))
              for r in rows if r["distance"] == 0}
    attested = set()
    for source in sources:
        text = list(words(source))
        count_of.update(w for w in text if w in count_of)
        attested |= wanted & set(pairwise(text))
    return count_of, len(attested)


def main() -> None:
    rows = pairs()
    if sys.argv[1:2] == ["--attest"] and sys.argv[2:]:
        count_of, neighbours = attest(sys.argv[2:], rows)
        print(f"in no file: {' '.join(sorted(w for w, n in count_of.items() if not n))}")
        adjacent = len({(r["before"].split()[-1], r["choices"][r["label"]].split()[0])
                        for r in rows if r["distance"] == 0})
        print(f"{len(rows)} pairs, {len(count_of)} forms, {sum(n > 0 for n in count_of.values())} "
              f"attested, median count {sorted(count_of.values())[len(count_of) // 2]}; "
              f"{neighbours} of {adjacent} neighbours attested side by side")
    elif sys.argv[1:]:
        raise UserError("expected python -m languages.kinyarwanda.agreement "
                        "[--attest FILE[:FIELD] ...]", FLAGS)
    else:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    console.run(main)
