"""The words of the demo. Every form that no rule of grammar.py gives is listed here and attested.

Nouns are listed in singular and plural with their classes. Perfective stems are listed, not
derived. docs/grammar.md says how the words were checked.
"""

from __future__ import annotations

from typing import NamedTuple


class Noun(NamedTuple):
    """A noun: its forms and classes ("" and 0: it has no such form), English, the kind of thing."""

    sg: str
    sg_class: int
    pl: str
    pl_class: int
    eng: str
    eng_pl: str
    kind: str


class Verb(NamedTuple):
    """A verb: infinitive, stem with its final vowel, perfective stem, English forms, kinds of
    object ("": none)."""

    infinitive: str
    stem: str
    perfective: str
    eng: str
    eng_s: str
    eng_past: str
    eng_ing: str
    objects: str


def _nouns(kind: str, table: str) -> list[Noun]:
    rows = [line.split("|") for line in table.strip().splitlines()]
    return [Noun(a.strip(), int(b), c.strip(), int(d), e.strip(), f.strip(), kind)
            for a, b, c, d, e, f in rows]


PEOPLE = _nouns("person", """
umwarimu|1|abarimu|2|teacher|teachers
umunyeshuri|1|abanyeshuri|2|student|students
umuganga|1|abaganga|2|doctor|doctors
umuhinzi|1|abahinzi|2|farmer|farmers
umworozi|1|aborozi|2|herder|herders
umugabo|1|abagabo|2|man|men
umugore|1|abagore|2|woman|women
umwana|1|abana|2|child|children
umuhungu|1|abahungu|2|boy|boys
umukobwa|1|abakobwa|2|girl|girls
umubyeyi|1|ababyeyi|2|parent|parents
umusaza|1|abasaza|2|old man|old men
umukecuru|1|abakecuru|2|old woman|old women
umushyitsi|1|abashyitsi|2|guest|guests
umucuruzi|1|abacuruzi|2|trader|traders
umushoferi|1|abashoferi|2|driver|drivers
umuturanyi|1|abaturanyi|2|neighbour|neighbours
umukozi|1|abakozi|2|worker|workers
umusore|1|abasore|2|young man|young men
umuririmbyi|1|abaririmbyi|2|singer|singers
""")
ANIMALS = _nouns("animal", """
inka|9|inka|10|cow|cows
ihene|9|ihene|10|goat|goats
intama|9|intama|10|sheep|sheep
imbwa|9|imbwa|10|dog|dogs
injangwe|9|injangwe|10|cat|cats
inkoko|9|inkoko|10|chicken|chickens
ingurube|9|ingurube|10|pig|pigs
inyoni|9|inyoni|10|bird|birds
inyana|9|inyana|10|calf|calves
urukwavu|11|inkwavu|10|rabbit|rabbits
""")
READABLE = _nouns("text", """
igitabo|7|ibitabo|8|book|books
ibaruwa|9|amabaruwa|6|letter|letters
ikinyamakuru|7|ibinyamakuru|8|newspaper|newspapers
inkuru|9|inkuru|10|story|stories
""")
FOOD = _nouns("food", """
|0|ibishyimbo|8||beans
|0|ibirayi|8||potatoes
|0|ibijumba|8||sweet potatoes
|0|imineke|4||bananas
|0|imbuto|10||fruits
|0|imboga|10||vegetables
|0|inyanya|10||tomatoes
|0|amagi|6||eggs
|0|inyama|10||meat
umuceri|3||0|rice|
umugati|3||0|bread|
ifi|9||0|fish|
""")
DRINK = _nouns("drink", """
|0|amazi|6||water
|0|amata|6||milk
icyayi|7||0|tea|
inzoga|9||0|beer|
umutobe|3||0|juice|
ikawa|9||0|coffee|
""")
THINGS = _nouns("thing", """
ikaramu|9|amakaramu|6|pen|pens
intebe|9|intebe|10|chair|chairs
imodoka|9|imodoka|10|car|cars
igare|5|amagare|6|bicycle|bicycles
telefone|9|telefone|10|telephone|telephones
isahani|9|amasahani|6|plate|plates
igikombe|7|ibikombe|8|cup|cups
inkono|9|inkono|10|pot|pots
isuka|9|amasuka|6|hoe|hoes
umufuka|3|imifuka|4|bag|bags
umupira|3|imipira|4|ball|balls
umwenda|3|imyenda|4|garment|clothes
ibuye|5|amabuye|6|stone|stones
ururabo|11|indabo|10|flower|flowers
ubwato|14|amato|6|boat|boats
""")
OPENINGS = _nouns("opening", """
urugi|11|inzugi|10|door|doors
idirishya|5|amadirishya|6|window|windows
""")
TREES = _nouns("tree", """
igiti|7|ibiti|8|tree|trees
""")
BUILT = _nouns("built", """
inzu|9|inzu|10|house|houses
icyumba|7|ibyumba|8|room|rooms
ikiraro|7|ibiraro|8|bridge|bridges
umuhanda|3|imihanda|4|road|roads
""")
LAND = _nouns("land", """
umurima|3|imirima|4|field|fields
ishyamba|5|amashyamba|6|forest|forests
umusozi|3|imisozi|4|hill|hills
umugezi|3|imigezi|4|river|rivers
""")
SONGS = _nouns("song", """
indirimbo|9|indirimbo|10|song|songs
""")

NOUNS = [*PEOPLE, *ANIMALS, *READABLE, *FOOD, *DRINK, *THINGS, *OPENINGS, *TREES, *BUILT, *LAND,
         *SONGS]

VERBS = [Verb(*(x.strip() for x in line.split("|"))) for line in """
kugura|gura|guze|buy|buys|bought|buying|animal text food drink thing
kugurisha|gurisha|gurishije|sell|sells|sold|selling|animal text food drink thing
gusoma|soma|somye|read|reads|read|reading|text
guteka|teka|tetse|cook|cooks|cooked|cooking|food
kurya|rya|riye|eat|eats|ate|eating|food
kunywa|nywa|nyoye|drink|drinks|drank|drinking|drink
guhinga|hinga|hinze|cultivate|cultivates|cultivated|cultivating|land-field
kubona|bona|bonye|see|sees|saw|seeing|person animal thing land built tree
gushaka|shaka|shatse|look for|looks for|looked for|looking for|person animal text thing
gukunda|kunda|kunze|love|loves|loved|loving|person song
gufasha|fasha|fashije|help|helps|helped|helping|person
gutera|tera|teye|plant|plants|planted|planting|tree
gutwara|twara|twaye|carry|carries|carried|carrying|food drink thing-light
guhamagara|hamagara|hamagaye|call|calls|called|calling|person
gutegereza|tegereza|tegereje|wait for|waits for|waited for|waiting for|person
gusura|sura|suye|visit|visits|visited|visiting|person
kuragira|ragira|ragiye|herd|herds|herded|herding|animal-herd
kugaburira|gaburira|gaburiye|feed|feeds|fed|feeding|animal
gufungura|fungura|funguye|open|opens|opened|opening|opening
gufunga|funga|funze|close|closes|closed|closing|opening
gusana|sana|sannye|repair|repairs|repaired|repairing|built
gusukura|sukura|sukuye|clean|cleans|cleaned|cleaning|built-house
kuvoma|voma|vomye|fetch|fetches|fetched|fetching|drink-water
gutema|tema|temye|cut down|cuts down|cut down|cutting down|tree
kuririmba|ririmba|ririmbye|sing|sings|sang|singing|song
gufata|fata|fashe|take|takes|took|taking|text thing-light
kubara|bara|baze|count|counts|counted|counting|animal text thing
""".strip().splitlines()]

ALONE = [Verb(*(x.strip() for x in line.split("|")), "") for line in """
gukora|kora|koze|work|works|worked|working
gukina|kina|kinnye|play|plays|played|playing
guseka|seka|setse|laugh|laughs|laughed|laughing
kubyina|byina|byinnye|dance|dances|danced|dancing
kuruhuka|ruhuka|ruhutse|rest|rests|rested|resting
gusenga|senga|senze|pray|prays|prayed|praying
kuryama|ryama|ryamye|sleep|sleeps|slept|sleeping
""".strip().splitlines()]

GO = Verb("kujya", "jya", "giye", "go", "goes", "went", "going", "")  # with a place: "went to"

NARROW = {  # kinds of object that only these nouns of a kind belong to
    "land-field": {"umurima"},
    "animal-herd": {"inka", "ihene", "intama"},
    "built-house": {"inzu", "icyumba"},
    "drink-water": {"amazi"},
    "thing-light": {"ikaramu", "isahani", "igikombe", "isuka", "umufuka", "umupira"},
}

ADJECTIVES = {"iza": "good", "nini": "big", "to": "small", "bi": "bad", "shya": "new", "re": "long",
              "gufi": "short"}
FITS = {  # the adjectives that fit a kind of thing, with their English
    "person": {"iza": "good", "to": "young", "re": "tall", "gufi": "short"},
    "animal": {"iza": "good", "nini": "big", "to": "small"},
    "text": {"iza": "good", "shya": "new", "bi": "bad", "gufi": "short"},
    "thing": {"iza": "beautiful", "nini": "big", "to": "small", "shya": "new", "bi": "bad"},
    "opening": {"nini": "big", "to": "small", "shya": "new"},
    "tree": {"nini": "big", "to": "small", "re": "tall"},
    "built": {"iza": "good", "nini": "big", "to": "small", "shya": "new"},
    "land": {"nini": "big", "to": "small"},
    "song": {"iza": "beautiful", "shya": "new", "bi": "bad"},
}

NAMES = {"Kamana": "he", "Gasana": "he", "Habimana": "he", "Bizimana": "he", "Kagabo": "he",
         "Mugisha": "he", "Uwase": "she", "Uwera": "she", "Mutesi": "she", "Umutoni": "she",
         "Ingabire": "she", "Mukamana": "she"}

PLACES = [("ku isoko", "at the market", "to the market"), ("ku ishuri", "at school", "to school"),
          ("mu rugo", "at home", "home"), ("mu murima", "in the field", "to the field"),
          ("mu mujyi", "in town", "to town"), ("mu ishyamba", "in the forest", "to the forest"),
          ("ku musozi", "on the hill", "to the hill"),
          ("ku mugezi", "at the river", "to the river"),
          ("mu nzu", "in the house", "into the house"),
          ("mu cyumba", "in the room", "into the room"), ("i Kigali", "in Kigali", "to Kigali"),
          ("i Huye", "in Huye", "to Huye"), ("i Musanze", "in Musanze", "to Musanze")]

TIMES = {  # by tense, for the end of a sentence
    "present": [("buri munsi", "every day"), ("mu gitondo", "in the morning"),
                ("nimugoroba", "in the evening")],
    "past": [("ejo hashize", "yesterday"), ("mu gitondo", "in the morning"),
             ("nimugoroba", "in the evening")],
    "future": [("ejo", "tomorrow"), ("mu gitondo", "in the morning"),
               ("nimugoroba", "in the evening")],
}

# The rules give these forms, but they occur in none of the texts: they are never generated.
NOT_FOUND = frozenset("""
azabyina azaryama azasana azaseka azasenga azateka azatema azavoma basannye bazabara bazafunga
bazagaburira bazasenga bazasukura bazavoma iraryama nabyinnye nafunze nasannye nasetse nasukuye
natemye ntabyina ntafasha ntafunga ntafungura ntagaburira ntagurisha ntahamagara ntaryama ntasana
ntaseka ntasenga ntasoma ntasukura ntasura ntategereza ntateka ntatema ntavoma ntibabara
ntibabyina ntibafunga ntibagaburira ntibagurisha ntibakina ntibaririmba ntibasana ntibaseka
ntibasenga ntibasoma ntibasukura ntibasura ntibateka ntibatema ntibatwara ntibavoma nzabara
nzabyina nzafungura nzagaburira nzagurisha nzaragira nzaseka nzasukura nzateka nzavoma turabyina
turaruhuka tuzabara tuzabyina tuzafunga tuzagaburira tuzahinga tuzaragira tuzaruhuka tuzaryama
tuzasana tuzaseka tuzasukura tuzategereza tuzateka tuzavoma twabaze twabyinnye twagaburiye
twaruhutse twasannye twasetse twasukuye twatemye yasukuye zirarya ziraryama
""".split())
