"""Translation prompts in Kinyarwanda, the names of languages in them, and frequent words.

The answer follows a prompt directly. After `mu` a noun loses its first vowel: mu Kinyarwanda, mu
Cyongereza.
"""

from __future__ import annotations

NAMES = {"eng": "Cyongereza", "fra": "Gifaransa", "kin": "Kinyarwanda", "swa": "Giswahili",
         "swh": "Giswahili"}

PROMPTS = {
    # "Put this sentence into ...", "This is how it is said in ...; how would you say it in ...?",
    # "These words: take them out of ..., put them into ...", "This sentence is written in ...;
    # turn it into ..."
    "kin-put": "Shyira iyi nteruro mu {target}: {text}\n",
    "kin-how": "Ibi wabivuga ute mu {target}?\n{text}\n",
    "kin-take": "Aya magambo uyavane mu {source} uyashyire mu {target}:\n{text}\n",
    "kin-turn": "Iyi nteruro yanditse mu {source}. Yihindure mu {target}.\n\n{text}\n\n",
}
FREQUENT_WORDS = frozenset("""mu ku na ni no nta si kandi cyane ariko kuko muri kuri ko iyo iki uyu
aba ibi ibyo uko ubwo gusa nka nk hari bari ari yari mbere nyuma ngo cyangwa bya rya cya ya wa ba yo
byo kugira buri abantu umuntu n y w ry by cy k'uko""".split())
