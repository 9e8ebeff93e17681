"""What one language gives the rest of the code, and how a language is found by its code.

    language_of("kin")                      the folder languages/kinyarwanda
    language_of("lug")                      a name from languages/codes.py, nothing else
    language_of("xyz", {"xyz": "Xyz"})      a name that the user gave

Text in a language without an identifier is not identified, and only the common steps clean it.
A folder below languages/ is found if it holds a language.py with a constant LANGUAGE.
"""

from __future__ import annotations

import importlib
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from languages.codes import NAMES, TWO_LETTERS
from languages.normalise import COMMON_STEPS, Normaliser, Step, normaliser
from runtime.console import FLAGS, UserError

DEFAULT_LANGUAGE = "kin"  # of --language
DEFAULT_PAIR = ("eng", "kin")  # of translation data
UNKNOWN = "unknown"  # an identifier's answer if it cannot tell
CODE = re.compile(r"[a-z]{3}")
WORD = re.compile(r"[^\W\d_]+")
# The prompt of ALMA (Xu et al. 2023), byte for byte as its code builds it (fe1ixxu/ALMA,
# utils/utils.py, get_prompt; its README has "into" for "to"). The answer follows directly.
ALMA = "Translate this from {source} to {target}:\n{source}: {text}\n{target}:"


@dataclass(frozen=True)
class Demo:
    """The demo's text: small documents in a language, each with its translation."""

    other: str  # code of the language of the translations; the demo's base model learns it
    document: Callable[[random.Random, int], tuple[str, str]]
    """(random generator, sentences) -> (document, its translation)."""
    prompts: Sequence[str]  # continued before and after training
    about: str  # one sentence: where the text comes from


@dataclass(frozen=True)
class Language:
    """A language; everything but code and English name is optional."""

    code: str  # ISO 639-3
    english_name: str
    steps: Mapping[str, Step] = field(default_factory=dict)
    """Cleaning steps of this language by name, applied after the common ones."""
    same_spelling: tuple[str, Callable[[str], str]] | None = None
    """A note and a function that makes one spelling of those that readers do not distinguish.
    Translations are scored as they are and, with the note in the metric's name, after it."""
    identify: Callable[[str], str] | None = None
    """Text -> the code of its language, or UNKNOWN."""
    identified: frozenset[str] = frozenset()
    """The codes that `identify` tells apart."""
    frequent_words: frozenset[str] = frozenset()
    """Function words that languages often paired with this one do not have, in lower case."""
    names: Mapping[str, str] = field(default_factory=dict)
    """What this language calls other languages, by code."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """Translation prompts written in this language, with {source}, {target} and {text}."""
    suites: Path | None = None
    """A folder of evaluation suites for this language only."""
    demo: Demo | None = None

    @property
    def two_letter_code(self) -> str:
        """ISO 639-1, as model cards use it; the ISO 639-3 code if there is none."""
        return TWO_LETTERS.get(self.code, self.code)

    @property
    def all_steps(self) -> dict[str, Step]:
        """The common cleaning steps and those of this language, in the order of application."""
        return {**COMMON_STEPS, **self.steps}


@cache
def known_languages() -> dict[str, Language]:
    """The languages that have a folder, by code."""
    languages = {}
    for file in sorted(Path(__file__).parent.glob("*/language.py")):
        language = importlib.import_module(f"languages.{file.parent.name}.language").LANGUAGE
        languages[language.code] = language
    return languages


def language_of(code: str, names: Mapping[str, str] | None = None) -> Language:
    """Return the language of a code. `names` are English names that the user gave, by code.

    Raises UserError if the code has no folder, is not in the table and was given no name.
    """
    given_name = (names or {}).get(code)
    if code in known_languages():
        return known_languages()[code]
    if given_name or code in NAMES:
        return Language(code, given_name or NAMES[code])
    raise UserError(f"language {code!r}: not in languages/codes.py; expected an ISO 639-3 code "
                    f"such as kin; give its English name with --language-names {code}=NAME", FLAGS)


def read_normaliser(entry: Mapping[str, Any], place: str) -> Normaliser:
    """Return the normaliser that an entry of meta.json or prompt.json describes.

    A language without a folder has the common steps only. `place` is where the entry stands.
    Raises UserError for an entry of another form, and for an unknown step.
    """
    codes, names = (entry.get(key) if isinstance(entry, Mapping) else None
                    for key in ("languages", "steps"))
    for values in (codes, names):
        if not isinstance(values, list) or not all(isinstance(x, str) for x in values):
            raise UserError(f"{place}: expected two lists of names, languages and steps, found "
                            f"{str(entry)[:80]}; correct the file")
    available = dict(COMMON_STEPS)
    for code in codes:
        if code in known_languages():
            available |= known_languages()[code].steps
    unknown = [name for name in names if name not in available]
    if unknown:
        raise UserError(f"{place}: no cleaning step {unknown[0]}; there are "
                        f"{', '.join(available)}; correct the file")
    return normaliser(names, available, codes)


def read_names(words: Iterable[str]) -> dict[str, str]:
    """Read the values of --language-names, CODE=NAME each."""
    names = {}
    for word in words:
        code, _, name = word.partition("=")
        if not CODE.fullmatch(code) or not name.strip():
            raise UserError(f"--language-names {word}: expected CODE=NAME with an ISO 639-3 code "
                            "of three small letters, as in lug=Luganda", FLAGS)
        names[code] = name.strip()
    return names


def read_direction(word: str, flag: str) -> tuple[str, str]:
    """Split "eng-kin" into source and target; `flag` is named in the error."""
    source, _, target = word.partition("-")
    if not CODE.fullmatch(source) or not CODE.fullmatch(target) or source == target:
        raise UserError(f"{flag} {word}: expected two ISO 639-3 codes, as in eng-kin", FLAGS)
    return source, target


def identifier_for(codes: Iterable[str]) -> Callable[[str], str] | None:
    """Return an identifier that knows all the codes, or None if no language has one."""
    wanted = set(codes)
    for language in known_languages().values():
        if language.identify and wanted <= language.identified:
            return language.identify
    return None


def translation_prompts(codes: Sequence[str], names: Mapping[str, str] | None = None
                        ) -> dict[str, tuple[str, dict[str, str]]]:
    """Return the translation prompts for some languages: by name, the text and what the prompt
    calls each language. ALMA's comes first, then those written in English, then those written in
    one of the languages, if it has a name for each of them.
    """
    english_names = {code: language_of(code, names).english_name for code in codes}
    prompts = {"alma": (ALMA, english_names)}
    for code in dict.fromkeys(["eng", *codes]):
        language = language_of(code, names)
        own_names = english_names if code == "eng" else language.names
        if all(x in own_names for x in codes):
            for name, text in language.prompts.items():
                prompts[name] = text, {x: own_names[x] for x in codes}
    return prompts


def share_of_words(texts: Iterable[str], vocabulary: frozenset[str]) -> float:
    """Return the share of the words of texts that are in a vocabulary; 0 without words."""
    n_known = n_words = 0
    for text in texts:
        text_words = WORD.findall(text.lower())
        n_known += sum(word in vocabulary for word in text_words)
        n_words += len(text_words)
    return n_known / max(1, n_words)
