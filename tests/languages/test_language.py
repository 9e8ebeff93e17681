"""Languages by code: what a folder gives, what the table gives, what the user must give."""

from __future__ import annotations

import pickle
import random

import pytest

from languages.codes import NAMES, TWO_LETTERS
from languages.language import (
    CODE,
    DEFAULT_LANGUAGE,
    DEFAULT_PAIR,
    identifier_for,
    known_languages,
    language_of,
    read_direction,
    read_names,
    share_of_words,
    translation_prompts,
)
from languages.normalise import normaliser
from runtime.console import UserError
from runtime.paths import ROOT


def test_every_folder_of_languages_is_found_by_its_code():
    folders = {p.name for p in (ROOT / "languages").iterdir() if (p / "__init__.py").exists()}
    assert {x.english_name.lower() for x in known_languages().values()} == folders
    assert all(code == x.code for code, x in known_languages().items())


def test_codes_and_names_are_well_formed():
    assert 55 <= len(NAMES) <= 90 and all(CODE.fullmatch(code) for code in NAMES)
    assert all(len(x) == 2 for x in TWO_LETTERS.values())
    assert {"eng", "kin", "swa", "swh", "lug", "run", "fra"} <= set(NAMES)
    assert language_of("kin").two_letter_code == "rw"
    assert language_of("bem").two_letter_code == "bem"


def test_an_unknown_language_needs_a_name_and_is_neither_identified_nor_corrected():
    with pytest.raises(UserError, match=r"language 'xyz': .*--language-names xyz=NAME"):
        language_of("xyz")
    language = language_of("xyz", read_names(["xyz=Xyzish"]))
    assert language.english_name == "Xyzish" and language.identify is None
    assert list(language.all_steps) == ["spaces", "nfc"]
    assert language.same_spelling is None and language.demo is None


def test_a_name_that_the_user_gives_wins_over_the_table():
    assert language_of("run", {"run": "Rundi"}).english_name == "Rundi"


@pytest.mark.parametrize("word", ["", "lug", "lug=", "lug= ", "lg=Luganda", "LUG=Luganda"])
def test_a_name_must_follow_a_code(word):
    with pytest.raises(UserError, match="--language-names"):
        read_names([word])


def test_a_direction_is_two_codes():
    assert read_direction("eng-lug", "--translate") == ("eng", "lug")
    for word in ("", "eng", "eng-eng", "en-kin", "eng-kin-fra", "eng_kin"):
        with pytest.raises(UserError, match=r"--translate .*: expected two ISO 639-3 codes"):
            read_direction(word, "--translate")


def test_an_identifier_is_found_only_if_it_knows_all_languages():
    identify = identifier_for(["eng", "kin"])
    assert identify("Ndashaka kujya ku isoko kugura ibirayi.") == "kin"
    assert identify("I want to go to the market.") == "eng"
    assert identifier_for(["kin"]) is identifier_for(["eng"]) is identify
    assert identifier_for(["eng", "lug"]) is None


def test_the_prompts_of_english_and_kinyarwanda_are_alma_then_english_then_kinyarwanda():
    prompts = translation_prompts(DEFAULT_PAIR)
    assert list(prompts) == ["alma", "eng-put", "eng-how", "eng-below", "eng-bare", "kin-put",
                             "kin-how", "kin-take", "kin-turn"]
    assert prompts["eng-put"] == ("Put this sentence into {target}: {text}\n",
                                  {"eng": "English", "kin": "Kinyarwanda"})
    assert prompts["kin-how"] == ("Ibi wabivuga ute mu {target}?\n{text}\n",
                                  {"eng": "Cyongereza", "kin": "Kinyarwanda"})


def test_a_prompt_is_offered_only_if_its_language_names_the_pair():
    assert list(translation_prompts(["eng", "lug"])) == ["alma", "eng-put", "eng-how", "eng-below",
                                                         "eng-bare"]
    assert translation_prompts(["eng", "lug"])["alma"][1] == {"eng": "English", "lug": "Luganda"}
    assert translation_prompts(["kin", "fra"])["kin-put"][1] == {"kin": "Kinyarwanda",
                                                                 "fra": "Gifaransa"}
    assert "kin-put" not in translation_prompts(["kin", "lug"])


def test_frequent_words_tell_the_sides_of_a_pair_apart():
    eng, kin = (language_of(code).frequent_words for code in DEFAULT_PAIR)
    sentence = ["Umwana ari mu nzu kandi arasoma."]
    assert share_of_words(sentence, kin) > 0.3 and share_of_words(sentence, eng) == 0
    assert share_of_words([], kin) == 0


def test_a_normaliser_takes_the_steps_of_a_language_and_travels_to_a_process():
    steps = language_of(DEFAULT_LANGUAGE).all_steps
    clean = pickle.loads(pickle.dumps(normaliser(list(steps), steps)))
    assert clean(" n’umwana ") == ("n'umwana", {"spaces": 2, "nfc": 0, "apostrophe": 1})
    with pytest.raises(UserError, match="--normalise apostrophe: no such step"):
        normaliser(["apostrophe"], language_of("lug").all_steps)


def test_the_demo_of_kinyarwanda_is_drawn_by_seed_with_its_translation():
    demo = language_of("kin").demo
    assert demo.other == "eng" and demo.document(random.Random(1), 4) \
        == demo.document(random.Random(1), 4)
