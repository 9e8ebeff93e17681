"""Kinyarwanda as a `Language`."""

from __future__ import annotations

import random
from pathlib import Path

from languages.kinyarwanda.identify import FUNCTION_WORDS, identify
from languages.kinyarwanda.normalise import apostrophe
from languages.kinyarwanda.translation import FREQUENT_WORDS, NAMES, PROMPTS
from languages.language import Demo, Language


def one_apostrophe(text: str) -> str:
    """Write every elision with U+0027."""
    return apostrophe(text)[0]


def document(rng: random.Random, sentences: int) -> tuple[str, str]:
    """Draw a small story in Kinyarwanda and its English translation."""
    from languages.kinyarwanda.world import World

    return World(rng).document(sentences)


LANGUAGE = Language(
    code="kin",
    english_name="Kinyarwanda",
    steps={"apostrophe": apostrophe},
    same_spelling=("one apostrophe", one_apostrophe),
    identify=identify,
    identified=frozenset(FUNCTION_WORDS),
    frequent_words=FREQUENT_WORDS,
    names=NAMES,
    prompts=PROMPTS,
    suites=Path(__file__).with_name("suites"),
    demo=Demo(
        other="eng",
        document=document,
        prompts=("Umwana", "Mu rugo hari", "Abahinzi bashaka", "The teacher will"),
        about="its text comes from a grammar of some 150 stems",
    ),
)
