"""How a translation is asked for, in English and in Kinyarwanda, and which of the two a text is.

The answer follows a prompt directly, with nothing between. After `mu` a noun loses its first vowel:
mu Kinyarwanda, mu Cyongereza.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

LANGUAGES = {"eng": "English", "kin": "Kinyarwanda"}
INDIMI = {"eng": "Cyongereza", "kin": "Kinyarwanda"}

# ALMA's, byte for byte as its code builds it (fe1ixxu/ALMA, utils/utils.py, get_prompt; its README
# has "into" for "to")
ALMA = "Translate this from {source} to {target}:\n{source}: {text}\n{target}:"

PROMPTS: dict[str, tuple[str, dict[str, str]]] = {
    "alma": (ALMA, LANGUAGES),
    "eng-put": ("Put this sentence into {target}: {text}\n", LANGUAGES),
    "eng-how": ("How do you say this in {target}?\n{text}\n", LANGUAGES),
    "eng-below": ("Below is a text in {source}. Write it in {target}.\n\n{text}\n\n", LANGUAGES),
    "eng-bare": ("{source}:\n{text}\n{target}:\n", LANGUAGES),
    # "Put this sentence into ...", "This is how it is said in ...; how would you say it in ...?",
    # "These words: take them out of ..., put them into ...", "This sentence is written in ...;
    # turn it into ..."
    "kin-put": ("Shyira iyi nteruro mu {target}: {text}\n", INDIMI),
    "kin-how": ("Ibi wabivuga ute mu {target}?\n{text}\n", INDIMI),
    "kin-take": ("Aya magambo uyavane mu {source} uyashyire mu {target}:\n{text}\n", INDIMI),
    "kin-turn": ("Iyi nteruro yanditse mu {source}. Yihindure mu {target}.\n\n{text}\n\n", INDIMI),
}

# frequent little words that the other language does not have
KIN = set("""mu ku na ni no nta si kandi cyane ariko kuko muri kuri ko iyo iki uyu aba ibi ibyo uko
ubwo gusa nka nk hari bari ari yari mbere nyuma ngo cyangwa bya rya cya ya wa ba yo byo kugira buri
abantu umuntu n y w ry by cy k'uko""".split())
ENG = set("""the and of to in is that for was on with as it are be this by have has not you he she
they we his her their from at or an which will can been were but if there when what who""".split())
WORD = re.compile(r"[^\W\d_]+")


def share(texts: Iterable[str]) -> tuple[float, float]:
    """Of the words of texts, how many are frequent Kinyarwanda words, and how many English ones."""
    kin = eng = n = 0
    for text in texts:
        words = WORD.findall(text.lower())
        kin, eng = kin + sum(w in KIN for w in words), eng + sum(w in ENG for w in words)
        n += len(words)
    return kin / max(1, n), eng / max(1, n)
