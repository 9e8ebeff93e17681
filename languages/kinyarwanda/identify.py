"""Identify the language of a sentence: Kinyarwanda, English, Swahili or French.

A translation model may answer in the wrong language, and n-gram scores do not show it. Function
words decide. Kinyarwanda is also recognised by spellings that its neighbours do not have (cy, by,
rw, shy ...), and by words that end in a vowel, as all of its own words do. Single words are not
identified reliably, and Kirundi is taken for Kinyarwanda. docs/formats.md gives the accuracy.
"""

from __future__ import annotations

import re

from languages.kinyarwanda.normalise import apostrophe

FUNCTION_WORDS = {lang: frozenset(words.split()) for lang, words in {
    "kin": """mu ko ni muri ku na ari ibyo ngo cyane kuri kandi uko iki ntabwo wa uyu iyo ya ibi
        ariko iyi no icyo neza yari nta yo abantu hari kuba ubu aho kuko mbere umuntu gihe igihe
        uwo gusa bari nyuma ubwo kugira aba byose buryo ndetse cyangwa cya afite byo umwe buri iri
        bose niba abo bo ba wo se kubera ye bya za rya cy'u rwa bwa twa iyo si mwa ntago""",
    "eng": """the a to you of and he it was is in she that his for not said her have be with are
        what my this at we on but had me they him do there all can an will were your so as one up
        out from would like how did by then which been has more their its or who when if i""",
    "swa": """wa na ya kwa ni katika za la kuwa hii cha hiyo kama pia au lakini yake huo huu
        vya sana watu moja wao hao wake bila baada kabla hivyo ambao ambayo ili kutoka mwa zaidi
        yao mtu hizi hakuna""",
    "fra": """le la les de des du et est un une dans que qui pour pas sur avec au aux il elle ce
        cette son sa ses nous vous je ne se plus par""",
}.items()}
WORD = re.compile(r"[^\W\d_]+(?:'(?=[^\W\d_]))?")
KINYARWANDA_SPELLINGS = re.compile(
    r"cy|by|rw|ry|bw|shy|jy|nsh|mw[aeiou]|gw|pfu|\b(?:n|y|w|z|by|cy|nk|bw|rw|ry|k)'")


def identify(text: str) -> str:
    """Return "kin", "eng", "swa" or "fra", or "unknown" if the evidence is weak."""
    text = apostrophe(text.lower())[0]
    text_words = WORD.findall(text)
    if not text_words:
        return "unknown"
    votes = {lang: float(sum(word in known for word in text_words))
             for lang, known in FUNCTION_WORDS.items()}
    votes["kin"] += 0.7 * len(KINYARWANDA_SPELLINGS.findall(text))
    long = [w for w in text_words if len(w) > 3 and not w.endswith("'")]
    if sum(w[-1] in "aeiou" for w in long) < 0.6 * len(long):
        votes["kin"] = votes["swa"] = 0.0
    best = max(votes, key=votes.__getitem__)
    others = max(v for lang, v in votes.items() if lang != best)
    return best if votes[best] > others and votes[best] >= 0.08 * len(text_words) else "unknown"
