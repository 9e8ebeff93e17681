"""English as a `Language`: the prompts that ask for a translation, and frequent words."""

from __future__ import annotations

from languages.codes import NAMES
from languages.language import Language

PROMPTS = {
    "eng-put": "Put this sentence into {target}: {text}\n",
    "eng-how": "How do you say this in {target}?\n{text}\n",
    "eng-below": "Below is a text in {source}. Write it in {target}.\n\n{text}\n\n",
    "eng-bare": "{source}:\n{text}\n{target}:\n",
}
FREQUENT_WORDS = frozenset("""the and of to in is that for was on with as it are be this by have has
not you he she they we his her their from at or an which will can been were but if there when what
who""".split())

LANGUAGE = Language("eng", "English", names=NAMES, prompts=PROMPTS, frequent_words=FREQUENT_WORDS)
