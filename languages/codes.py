"""Codes and English names of languages: ISO 639-3, and the two letters of ISO 639-1 where a
language has them.

A language outside this table is given by a flag, --language-names CODE=NAME.
"""

from __future__ import annotations

_TABLE = """
afr af Afrikaans
aka ak Akan
amh am Amharic
bam bm Bambara
bem -  Bemba
ewe ee Ewe
fon -  Fon
fuv ff Fulfulde
gaz om Oromo
hau ha Hausa
ibo ig Igbo
kab -  Kabyle
kam -  Kamba
kik ki Kikuyu
kin rw Kinyarwanda
kmb -  Kimbundu
kon kg Kikongo
lin ln Lingala
lua -  Tshiluba
lug lg Luganda
luo -  Luo
mlg mg Malagasy
mos -  Mossi
nde nd Northern Ndebele
nso -  Northern Sotho
nya ny Chichewa
nyn -  Runyankole
orm om Oromo
pcm -  Nigerian Pidgin
plt mg Malagasy
run rn Kirundi
sag sg Sango
sna sn Shona
som so Somali
sot st Southern Sotho
ssw ss Swati
swa sw Swahili
swh sw Swahili
tir ti Tigrinya
tsn tn Tswana
tso ts Tsonga
tum -  Tumbuka
twi tw Twi
umb -  Umbundu
ven ve Venda
wol wo Wolof
xho xh Xhosa
yor yo Yoruba
zul zu Zulu
ara ar Arabic
arb ar Arabic
ben bn Bengali
deu de German
ell el Greek
eng en English
fas fa Persian
fra fr French
heb he Hebrew
hin hi Hindi
ind id Indonesian
ita it Italian
jpn ja Japanese
kor ko Korean
nld nl Dutch
pol pl Polish
por pt Portuguese
ron ro Romanian
rus ru Russian
spa es Spanish
swe sv Swedish
tha th Thai
tur tr Turkish
ukr uk Ukrainian
urd ur Urdu
vie vi Vietnamese
zho zh Chinese
"""

NAMES: dict[str, str] = {}  # ISO 639-3 code -> English name
TWO_LETTERS: dict[str, str] = {}  # ISO 639-3 code -> ISO 639-1 code
for _line in _TABLE.strip().splitlines():
    _code, _two_letters, _name = _line.split(maxsplit=2)
    NAMES[_code] = _name
    if _two_letters != "-":
        TWO_LETTERS[_code] = _two_letters
