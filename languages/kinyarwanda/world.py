"""The text of the demo: sentences and small stories in Kinyarwanda, each with its English.

Both sides are built together from lexicon.py by the rules of grammar.py, so each pair is a
translation by construction. Forms that occur in none of our texts are never used
(lexicon.NOT_FOUND). The language is small: a few hundred words, present, past and future, no
relative clauses.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from languages.kinyarwanda import grammar as g
from languages.kinyarwanda.lexicon import (
    ALONE,
    ANIMALS,
    FITS,
    GO,
    NAMES,
    NARROW,
    NOT_FOUND,
    NOUNS,
    PEOPLE,
    PLACES,
    TIMES,
    VERBS,
    Noun,
    Verb,
)

Pair = tuple[str, str]  # Kinyarwanda, English
PERSONS = {"I": "I", "we": "we"}  # subjects that are not nouns
GRAZE = [v for v in VERBS if v.infinitive == "kurya"] + [
    v for v in ALONE if v.infinitive in ("kuruhuka", "kuryama")]
FUNCTION_WORDS = {"ni", "si", "na", "n'", "hari", "ndi", "turi", "kandi", "ariko", "mu", "ku", "i"}


class World:
    """Draws sentences from a random generator; the same seed gives the same sentences."""

    def __init__(self, rng: random.Random):
        self.rng = rng

    def sentence(self) -> Pair:
        """Draw one sentence."""
        kin, eng = self.rng.choice(
            (self.action, self.action, self.action, self.description, self.wish, self.possession,
             self.presence, self.journey, self.herd)
        )()
        return _written(kin, eng)

    def document(self, sentences: int) -> Pair:
        """Draw a small story about one person: who it is, what they have, do, did and will do."""
        name = self.rng.choice(sorted(NAMES))
        he = NAMES[name]
        who = self.rng.choice(PEOPLE[:5])
        clauses = [(f"{name} ni {who.sg}", f"{name} is {_a(who.eng)}")]
        while len(clauses) < sentences:
            kind = self.rng.randrange(5)
            if kind == 0:
                thing, n = self.counted()
                clauses.append((f"{g.have(1)} {thing}", f"{he} has {n}"))
            elif kind == 1:
                clauses.append(self.deed(1, he, True))
            elif kind == 2:
                clauses.append(self.trip(1, he, True))
            elif kind == 3:
                clauses.append(self.hope(1, he, True))
            else:
                clauses.append(self.action())
        pairs = [_written(*pair) for pair in clauses]
        return " ".join(k for k, _ in pairs), " ".join(e for _, e in pairs)

    def subject(self) -> tuple[str, str | int, str, bool]:
        """(Kinyarwanda, concord, English, whether English takes -s)."""
        draw = self.rng.random()
        if draw < 0.15:
            person = self.rng.choice(sorted(PERSONS))
            return "", person, PERSONS[person], False
        if draw < 0.3:
            name = self.rng.choice(sorted(NAMES))
            return name, 1, name, True
        noun = self.rng.choice(PEOPLE)
        plural = self.rng.random() < 0.4
        if draw < 0.4:
            other = self.rng.choice([x for x in PEOPLE if x is not noun])
            return (f"{noun.sg} {g.joined('na', other.sg)}", 2,
                    f"the {noun.eng} and the {other.eng}", False)
        kin, cls, eng = _form(noun, plural)
        if draw < 0.55:
            return (f"{g.THIS[cls]} {g.bare(kin)}", cls, f"{'these' if plural else 'this'} {eng}",
                    not plural)
        if draw < 0.7:
            mine, my = self.rng.choice((("my", "my"), ("our", "our"), ("their", "their")))
            return f"{kin} {g.possessive(mine, cls)}", cls, f"{my} {eng}", not plural
        if draw < 0.8:
            root = self.rng.choice(sorted(FITS["person"]))
            return (f"{kin} {g.adjective(root, cls)}", cls, f"the {FITS['person'][root]} {eng}",
                    not plural)
        return kin, cls, f"the {eng}", not plural

    def thing(self, kinds: str) -> Pair:
        """A noun of one of the kinds: alone, with a number, an adjective or a possessor."""
        noun = self.rng.choice(_of_kinds(kinds))
        plural = bool(noun.pl) and (not noun.sg or self.rng.random() < 0.4)
        kin, cls, eng = _form(noun, plural)
        draw = self.rng.random()
        counted = noun.sg and noun.pl and noun.eng
        if draw < 0.2 and counted and plural and cls in g.COUNT:
            n = self.rng.randrange(2, 6)
            return f"{kin} {g.number(n, cls)}", f"{g.NUMBERS[n - 2]} {eng}"
        if draw < 0.35 and noun.kind in FITS:
            root = self.rng.choice(sorted(FITS[noun.kind]))
            described = f"{FITS[noun.kind][root]} {eng}"
            return f"{kin} {g.adjective(root, cls)}", described if plural or not counted else _a(
                described)
        if draw < 0.5 and counted:
            owner = self.rng.choice(PEOPLE)
            return f"{kin} {g.joined(g.OF[cls], owner.sg)}", f"the {owner.eng}'s {eng}"
        if draw < 0.6 and noun.kind not in ("land", "person"):
            owner, word = self.rng.choice((("my", "my"), ("our", "our"), ("their", "their")))
            return f"{kin} {g.possessive(owner, cls)}", f"{word} {eng}"
        return kin, eng if plural or not counted else _a(eng)

    def counted(self) -> Pair:
        """A number of things that a person may have."""
        while True:
            noun = self.rng.choice(_of_kinds("animal text thing"))
            if noun.pl_class in g.COUNT and noun.sg:
                n = self.rng.randrange(1, 6)
                if n == 1 and noun.sg_class in g.ONE:
                    return f"{noun.sg} {g.number(1, noun.sg_class)}", f"one {noun.eng}"
                if n > 1:
                    return (f"{noun.pl} {g.number(n, noun.pl_class)}",
                            f"{g.NUMBERS[n - 2]} {noun.eng_pl}")

    def deed(self, cls: str | int, eng: str, adds_s: bool) -> Pair:
        """Somebody does, did, will do or does not do something."""
        while True:
            verb = self.rng.choice(VERBS)
            tense = self.rng.choice(("present", "past", "future"))
            negative = tense == "present" and cls in (1, 2) and self.rng.random() < 0.25
            if not _can(verb, cls, tense, negative):
                continue
            kin, thing = self.thing(verb.objects)
            kin_words = f"{g.verb(verb.stem, verb.perfective, cls, tense, negative)} {kin}"
            eng_words = f"{_english(verb, tense, negative, adds_s)} {thing}"
            if not negative and self.rng.random() < 0.4:
                when, then = self.rng.choice(TIMES[tense])
                kin_words, eng_words = f"{kin_words} {when}", f"{eng_words} {then}"
            return kin_words, f"{eng} {eng_words}"

    def action(self) -> Pair:
        """Subject, verb, object; or a subject that does something of itself, somewhere."""
        kin, cls, eng, adds_s = self.subject()
        if self.rng.random() < 0.75:
            kin_words, eng_words = self.deed(cls, eng, adds_s)
            return f"{kin} {kin_words}", eng_words
        while True:
            verb = self.rng.choice(ALONE)
            place, where, _ = self.rng.choice(PLACES)
            if self.rng.random() < 0.3 and _can(verb, cls, "present", False, True):
                word = g.verb(verb.stem, verb.perfective, cls, "present", final=True)
                be = "is" if adds_s else "are"
                if eng == "I":
                    be = "am"
                return f"{kin} {word}", f"{eng} {be} {verb.eng_ing}"
            tense = self.rng.choice(("present", "past", "future"))
            if _can(verb, cls, tense, False):
                word = g.verb(verb.stem, verb.perfective, cls, tense)
                return (f"{kin} {word} {place}",
                        f"{eng} {_english(verb, tense, False, adds_s)} {where}")

    def description(self) -> Pair:
        """X is good; X is not good; I am a teacher."""
        if self.rng.random() < 0.2:
            noun = self.rng.choice(PEOPLE)
            be, plural, eng = self.rng.choice((("ndi", False, f"I am {_a(noun.eng)}"),
                                               ("turi", True, f"we are {noun.eng_pl}")))
            return f"{be} {noun.pl if plural else noun.sg}", eng
        noun = self.rng.choice([x for x in NOUNS if x.kind in FITS])
        plural = bool(noun.pl) and (not noun.sg or self.rng.random() < 0.4)
        kin, cls, eng = _form(noun, plural)
        root = self.rng.choice(sorted(FITS[noun.kind]))
        this = self.rng.random() < 0.5
        negative = self.rng.random() < 0.25
        kin = f"{g.THIS[cls]} {g.bare(kin)}" if this else kin
        the = "the"
        if this:
            the = "these" if plural else "this"
        be = "are" if plural else "is"
        return (f"{kin} {'si' if negative else 'ni'} {g.adjective(root, cls)}",
                f"{the} {eng} {be}{' not' if negative else ''} {FITS[noun.kind][root]}")

    def hope(self, cls: str | int, eng: str, adds_s: bool) -> Pair:
        """Somebody wants, or likes, to do something."""
        verb = self.rng.choice([v for v in VERBS if v.stem not in ("shaka", "kunda")])
        want, stem, to = self.rng.choice((("wants" if adds_s else "want", "shaka", "to"),
                                            ("likes" if adds_s else "like", "kunda", "to")))
        kin, thing = self.thing(verb.objects)
        return (f"{g.verb(stem, '', cls, 'present')} {verb.infinitive} {kin}",
                f"{eng} {want} {to} {verb.eng} {thing}")

    def wish(self) -> Pair:
        kin, cls, eng, adds_s = self.subject()
        kin_words, eng_words = self.hope(cls, eng, adds_s)
        return f"{kin} {kin_words}", eng_words

    def possession(self) -> Pair:
        """Somebody has, or has not, some things."""
        kin, cls, eng, adds_s = self.subject()
        negative = cls in (1, 2) and self.rng.random() < 0.25
        if negative:
            thing, eng_thing = self.thing("animal text thing")
            return (f"{kin} {g.have(cls, True)} {thing}",
                    f"{eng} {'does' if adds_s else 'do'} not have {eng_thing}")
        thing, eng_thing = self.counted()
        return f"{kin} {g.have(cls)} {thing}", f"{eng} {'has' if adds_s else 'have'} {eng_thing}"

    def presence(self) -> Pair:
        """There is something somewhere."""
        place, where, _ = self.rng.choice(PLACES)
        thing, eng_thing = self.counted()
        return (f"{place} hari {thing}",
                f"there {'is' if eng_thing.startswith('one ') else 'are'} {eng_thing} {where}")

    def trip(self, cls: str | int, eng: str, adds_s: bool) -> Pair:
        """Somebody went, or will go, somewhere."""
        place, _, to = self.rng.choice(PLACES)
        tense = self.rng.choice([t for t in ("past", "future") if _can(GO, cls, t, False)])
        when, then = self.rng.choice(TIMES[tense])
        return (f"{g.verb(GO.stem, GO.perfective, cls, tense)} {place} {when}",
                f"{eng} {_english(GO, tense, False, adds_s)} {to} {then}")

    def journey(self) -> Pair:
        kin, cls, eng, adds_s = self.subject()
        kin_words, eng_words = self.trip(cls, eng, adds_s)
        return f"{kin} {kin_words}", eng_words

    def herd(self) -> Pair:
        """Animals eat, rest and sleep."""
        animal = self.rng.choice([x for x in ANIMALS if x.sg_class == 9])
        plural = self.rng.random() < 0.5
        kin, cls, eng = _form(animal, plural)
        while True:
            verb = self.rng.choice(GRAZE)
            if _can(verb, cls, "present", False, True):
                word = g.verb(verb.stem, verb.perfective, cls, "present", final=True)
                return f"{kin} {word}", f"the {eng} {'are' if plural else 'is'} {verb.eng_ing}"


def _of_kinds(kinds: str) -> list[Noun]:
    """Nouns of the named kinds; a kind such as thing-light holds only some of the things."""
    nouns = []
    for kind in kinds.split():
        only = NARROW.get(kind)
        nouns += [n for n in NOUNS if n.kind == kind.split("-")[0] and
                  (only is None or n.sg in only or n.pl in only)]
    return nouns


def _form(noun: Noun, plural: bool) -> tuple[str, int, str]:
    """(Kinyarwanda, class, English) of a noun's singular or plural."""
    return (noun.pl, noun.pl_class, noun.eng_pl) if plural else (noun.sg, noun.sg_class, noun.eng)


def _can(verb: Verb, cls: str | int, tense: str, negative: bool, final: bool = False) -> bool:
    """Whether a form may be used: the grammar covers it, and it is attested."""
    if cls == "I" and tense == "present" and not final and verb.stem[0] in "mn":
        return False
    return g.verb(verb.stem, verb.perfective, cls, tense, negative, final) not in NOT_FOUND


def _english(verb: Verb, tense: str, negative: bool, adds_s: bool) -> str:
    if tense == "past":
        return verb.eng_past
    if tense == "future":
        return f"will {verb.eng}"
    if negative:
        return f"{'does' if adds_s else 'do'} not {verb.eng}"
    return verb.eng_s if adds_s else verb.eng


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _written(kin: str, eng: str) -> Pair:
    """Both sides with a capital letter and a full stop."""
    kin, eng = kin.strip(), eng.strip()
    return f"{kin[0].upper()}{kin[1:]}.", f"{eng[0].upper()}{eng[1:]}."


def word_forms() -> set[str]:
    """Every Kinyarwanda word that can be generated, in lower case. cy'umwana is two words, cy' and
    umwana."""
    return set(_forms()) - {""}


def _forms() -> Iterator[str]:
    yield from FUNCTION_WORDS
    yield from (name.lower() for name in NAMES)
    for phrase in [p for p, _, _ in PLACES] + [t for times in TIMES.values() for t, _ in times]:
        yield from phrase.lower().split()
    for noun in NOUNS:
        for form, cls in ((noun.sg, noun.sg_class), (noun.pl, noun.pl_class)):
            if not form:
                continue
            yield form
            if noun.kind in FITS:
                yield g.bare(form)
                yield g.THIS[cls]
                yield from (g.adjective(root, cls) for root in FITS[noun.kind])
            yield from (g.possessive(owner, cls) for owner in ("my", "our", "their"))
            yield f"{g.OF[cls][:-1]}'"
            if noun.kind in ("animal", "text", "thing", "person", "opening", "tree", "built",
                             "land", "song"):
                yield from (
                    [g.ONE[cls]] if form == noun.sg and cls in g.ONE else g.COUNT.get(cls, ()))
    for verb in [*VERBS, *ALONE, GO]:
        yield verb.infinitive
        for cls in ("I", "we", 1, 2):
            for tense in ("present", "past", "future"):
                yield from (g.verb(verb.stem, verb.perfective, cls, tense, negative)
                            for negative in (False, cls in (1, 2) and tense == "present")
                            if _can(verb, cls, tense, negative))
        if verb in ALONE:
            yield from (g.verb(verb.stem, verb.perfective, cls, "present", final=True)
                        for cls in ("I", "we", 1, 2) if _can(verb, cls, "present", False, True))
    for verb in GRAZE:
        yield from (g.verb(verb.stem, verb.perfective, cls, "present", final=True)
                    for cls in (9, 10) if _can(verb, cls, "present", False, True))
    for cls in ("I", "we", 1, 2):
        yield g.have(cls)
        yield from [g.have(cls, True)] if cls in (1, 2) else []
