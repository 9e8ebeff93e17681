"""A small, correct part of Kinyarwanda grammar: classes, concords, tenses, Dahl's law.

The class of a noun decides the form of the words that agree with it:

    class          verb  -iza (good)  -a (of)  this  one/two     example
    1   umu-        a-    mwiza        wa       uyu   umwe        umwana    child
    2   aba-        ba-   beza         ba       aba   babiri      abana     children
    7   iki-        ki-   cyiza        cya      iki   kimwe       igitabo   book
    8   ibi-        bi-   byiza        bya      ibi   bibiri      ibitabo   books

The rules are the textbook ones (Kimenyi 1980, "A Relational Grammar of Kinyarwanda"; Jouannet
1983). Forms that no rule here gives, such as perfective stems, are listed in lexicon.py. Tones and
vowel length are not written, as in everyday spelling.
"""

from __future__ import annotations

VOICELESS = ("k", "t", "s", "c", "h", "f", "p")
VOWELS = "aeiou"

ADJECTIVE = {1: "mu", 2: "ba", 3: "mu", 4: "mi", 5: "ri", 6: "ma", 7: "ki", 8: "bi", 9: "n",
             10: "n", 11: "ru", 12: "ka", 13: "tu", 14: "bu"}
OF = {1: "wa", 2: "ba", 3: "wa", 4: "ya", 5: "rya", 6: "ya", 7: "cya", 8: "bya", 9: "ya", 10: "za",
      11: "rwa", 12: "ka", 13: "twa", 14: "bwa"}
THIS = {1: "uyu", 2: "aba", 3: "uyu", 4: "iyi", 5: "iri", 6: "aya", 7: "iki", 8: "ibi", 9: "iyi",
        10: "izi", 11: "uru", 12: "aka", 13: "utu", 14: "ubu"}
ONE = {1: "umwe", 3: "umwe", 5: "rimwe", 7: "kimwe", 9: "imwe", 11: "rumwe", 12: "kamwe",
       14: "bumwe"}
COUNT = {2: ("babiri", "batatu", "bane", "batanu"), 4: ("ibiri", "itatu", "ine", "itanu"),
         6: ("abiri", "atatu", "ane", "atanu"), 8: ("bibiri", "bitatu", "bine", "bitanu"),
         10: ("ebyiri", "eshatu", "enye", "eshanu")}
NUMBERS = ("two", "three", "four", "five")
SUBJECT = {"I": "n", "you": "u", "we": "tu", "you all": "mu", 1: "a", 2: "ba", 9: "i", 10: "zi"}
PAST = {"I": "na", "you": "wa", "we": "twa", "you all": "mwa", 1: "ya", 2: "ba", 9: "ya",
        10: "za"}  # subject + -a-
OWNER = {"my": "njye", "your": "we", "our": "cu", "their": "bo"}  # after the connective: wa + njye


def dahl(prefix: str, stem: str) -> str:
    """Dahl's law: k and t of a prefix are voiced where the stem begins voiceless: ku-kora, gukora;
    tu-kora, dukora."""
    voiced = {"k": "g", "t": "d"}.get(prefix[0])
    return (voiced + prefix[1:] if voiced and stem.startswith(VOICELESS) else prefix) + stem


def infinitive(stem: str) -> str:
    """ku- with Dahl's law: kugura, gusoma."""
    return dahl("ku", stem)


def bare(noun: str) -> str:
    """A noun without its initial vowel, as after a demonstrative or a locative: umwana, uyu
    mwana."""
    return noun[1:] if noun[0] in VOWELS else noun


def nasal(stem: str) -> str:
    """n- before a stem: mbona, mfasha, mpinga (h gives mp), ndya (r gives nd), ngura."""
    initials = {"b": "mb", "f": "mf", "v": "mv", "h": "mp", "r": "nd", "p": "mp"}
    assert stem[0] not in "mn" + VOWELS, f"n- before {stem} is not covered here"
    return initials[stem[0]] + stem[1:] if stem[0] in initials else "n" + stem


def adjective(root: str, cls: int) -> str:
    """An adjective in the form of a noun class: iza, 7 -> cyiza."""
    prefix = ADJECTIVE[cls]
    if root == "re":  # long, tall: the prefix is written twice
        return {"mu": "muremure", "n": "ndende", "ki": "kirekire", "ru": "rurerure"}.get(
            prefix, f"{prefix}re{prefix}re")
    if root == "iza":
        glide = {"mu": "mwiza", "ba": "beza", "mi": "myiza", "ri": "ryiza", "ma": "meza",
                 "ki": "cyiza", "bi": "byiza", "n": "nziza", "ru": "rwiza", "ka": "keza",
                 "tu": "twiza", "bu": "bwiza"}
        return glide[prefix]
    if prefix == "n":
        return {"bi": "mbi", "nini": "nini"}.get(root, "n" + root)
    return dahl(prefix, root)


def number(n: int, cls: int) -> str:
    """A count of 1 to 5 in the form of a noun class."""
    return ONE[cls] if n == 1 else COUNT[cls][n - 2]


def possessive(owner: str, cls: int) -> str:
    """My, your, his/her, our, their thing of a class: wanjye, wawe, we, wacu, wabo."""
    of = OF[cls]
    return of[:-1] + "e" if owner in ("his", "her") else of + OWNER[owner]


def joined(word: str, noun: str) -> str:
    """A word in -a before a noun. Its vowel is elided before a vowel: cya + umwana gives
    cy'umwana, na + Kamana gives na Kamana."""
    return f"{word[:-1]}'{noun}" if noun[0] in VOWELS else f"{word} {noun}"


def verb(stem: str, perfective: str, subject: str | int, tense: str, negative: bool = False,
         final: bool = False) -> str:
    """A verb with its subject. `tense` is present, past or future; `final` means that no word
    follows the verb (-ra-).

    subject: a noun class or one of I, you, we, you all. Negation: nti-, for I si-.
    """
    s = SUBJECT[subject]
    if tense == "past":
        word = PAST[subject] + perfective
    elif tense == "future":
        word = s + "za" + stem
    elif final and not negative:
        word = ("nda" if subject == "I" else s + "ra") + stem
    else:
        word = nasal(stem) if subject == "I" else dahl(s, stem)
    if not negative:
        return word
    if subject == "I":
        return "si" + word
    return "nt" + word if word[0] in VOWELS else "nti" + word


def have(subject: str | int, negative: bool = False) -> str:
    """-fite, to have, which has one form of the verb only."""
    return verb("fite", "", subject, "present", negative)
