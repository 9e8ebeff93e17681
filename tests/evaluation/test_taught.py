"""What a model is asked: by the prompt of its training, cleaned as its training text, and which
items of a suite --limit chooses. The public prompts of translation are those of the harness."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from evaluation.eval_model import EvalModel, encode_context
from evaluation.suites import Suite, load_suite
from evaluation.taught import Taught
from helpers import tiny
from helpers.evaluations import run_eval
from inference.prompt_format import PromptFormat
from runtime.console import UserError
from tokenization.tokenizer import Tokenizer

CLEAN = {"languages": ["eng", "kin"], "steps": ["spaces", "nfc", "apostrophe"]}
CURLY, STRAIGHT = "n’umwana", "n'umwana"


def translation_entry(**changes) -> dict:
    return {"name": "x", "languages": {"eng": "English", "kin": "Kinyarwanda"},
            "text": "{% x %}{{ y }} '\\ {source} to {target}:\n{text}\n=", **changes}


def taught_folder(home: Path, path: Path, **prompt) -> Path:
    """The tiny model with a chat template and a prompt.json."""
    shutil.copytree(home / "model", path)
    (path / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}")
    (path / "prompt.json").write_text(json.dumps(prompt))
    return path


def pairs_suite(home: Path) -> Suite:
    (home / "pairs.tsv").write_text("eng\tkin\n" + "".join(
        f"A  b\t{CURLY} {i}\n" for i in range(4)))
    return load_suite(f"pairs={home}/pairs.tsv")


@pytest.mark.parametrize("as_chat", [False, True])
def test_a_translator_is_asked_as_sample_py_asks_it(home, tmp_path, as_chat):
    folder = taught_folder(home, tmp_path / "model", translate=[translation_entry(as_chat=as_chat)],
                           clean_translate=CLEAN)
    tokenizer = Tokenizer.open(folder)
    suite = Taught.read([folder]).suite_for(pairs_suite(tmp_path))
    taught = {prompt.part: prompt for prompt in suite.prompts if prompt.name == "taught"}
    assert list(taught) == ["eng-kin", "kin-eng"]
    for part, prompt in taught.items():
        prompt_format = PromptFormat.load([folder], tokenizer, part)
        model = EvalModel(tiny.ours(tiny.peer()), tokenizer,
                          taught_template=prompt_format.template)
        items = suite.items(prompt)
        contexts = model.contexts(items, prompt.taught_as)
        for item, context in zip(items, contexts, strict=True):
            source = item.row[part.partition("-")[0]]
            assert encode_context(tokenizer, context) == prompt_format.encode(source)
        assert suite.task(prompt).stop == ("\n",)
    assert CURLY in suite.items(taught["eng-kin"])[0].gold, "a reference is not cleaned"


def test_what_is_asked_is_cleaned_and_what_is_compared_is_not(home, tmp_path):
    folder = taught_folder(home, tmp_path / "model", clean_translate=CLEAN, clean_text=CLEAN,
                           clean_chat={"languages": ["kin"], "steps": ["apostrophe"]})
    suite = Taught.read([folder]).suite_for(pairs_suite(tmp_path))
    assert [prompt.name for prompt in suite.prompts] == [p.name for p in suite.public_prompts]
    question = suite.items(suite.prompts[-1])[0]
    assert STRAIGHT in question.context and question.row["kin"] == f"{CURLY} 0"
    tokenizer = Tokenizer.open(folder)
    prompt_format = PromptFormat.load([folder], tokenizer)
    assert prompt_format.render(f" {CURLY}") == STRAIGHT
    messages = [{"role": "user", "content": f"  {CURLY}"}]
    assert prompt_format.render(messages).count(f"<user>  {STRAIGHT}") == 1
    assert prompt_format.encode(messages) == prompt_format.encode(
        [{"role": "user", "content": f"  {STRAIGHT}"}])
    assert PromptFormat.load([folder], tokenizer, "kin-eng").encode(CURLY) == PromptFormat.load(
        [folder], tokenizer, "kin-eng").encode(STRAIGHT)
    (folder / "prompt.json").unlink()
    assert PromptFormat.load([folder], tokenizer).render(f" {CURLY}") == f" {CURLY}"
    assert CURLY in Taught.read([folder]).suite_for(suite).items(suite.prompts[-1])[0].context


@pytest.mark.parametrize(("entry", "message"), [
    ("x", "expected two lists"), ({"steps": ["nfc"]}, "expected two lists"),
    ({"languages": ["kin"], "steps": [1]}, "expected two lists"),
    ({"languages": ["lug"], "steps": ["apostrophe"]}, "no cleaning step apostrophe")])
def test_a_damaged_entry_of_cleaning_is_one_line(home, tmp_path, entry, message):
    folder = taught_folder(home, tmp_path / "model", clean_text=entry)
    with pytest.raises(UserError, match=f"prompt.json: clean_text: {message}") as e:
        Taught.read([folder])
    assert "\n" not in str(e.value)


def test_eval_measures_taught_and_public_prompts_and_signs_them(home, tmp_path):
    folder = taught_folder(home, tmp_path / "model", translate=[translation_entry()],
                           clean_translate=CLEAN)
    pairs_suite(tmp_path)
    settings = {"model": str(folder), "suites": [f"pairs={tmp_path}/pairs.tsv"],
                "max_new_tokens": 2, "overlap": False}
    results = run_eval(home, **settings)["results"]
    by_prompt = {(r["part"], r["prompt"]): r for r in results}
    for part in ("eng-kin", "kin-eng"):
        signature = by_prompt[part, "taught"]["signature"]
        assert "|asked:taught,text|" in signature and "|cleaned:spaces+nfc+apostrophe|" in signature
        assert "asked:" not in by_prompt[part, "1"]["signature"]
        assert by_prompt[part, "taught"]["aside"]
    assert {r["prompt"] for r in run_eval(home, **settings, prompts=["taught"])["results"]} == {
        "taught"}
    assert "taught" not in {
        r["prompt"] for r in run_eval(home, **settings, prompts=["1"])["results"]}
    (folder / "prompt.json").unlink()
    with pytest.raises(UserError, match=r"--prompts taught: the model's prompt.json has no prompt"):
        run_eval(home, **settings, prompts=["taught"])


def test_a_text_is_cleaned_as_training_text_or_as_in_the_baseline(home, tmp_path, capsys):
    folder = taught_folder(home, tmp_path / "model", clean_text=CLEAN)
    (tmp_path / "kin.txt").write_text(f"{CURLY}  umwe\n")
    settings = {"suites": [], "text": [f"kin={tmp_path / 'kin.txt'}"], "overlap": False}
    cleaned = run_eval(home, model=str(folder), **settings)["results"][0]
    assert cleaned["bytes"] == len(f"{STRAIGHT} umwe") and "|cleaned:" in cleaned["signature"]
    plain = run_eval(home, model=str(home / "model"), **settings,
                     out=str(home / "plain"))["results"][0]
    assert plain["bytes"] == len(f"{CURLY}  umwe".encode()) and "cleaned" not in plain["signature"]
    capsys.readouterr()
    compared = run_eval(home, model=str(folder), **settings, baseline=str(home / "plain"))
    assert compared["results"][0]["baseline"]["difference"] == 0
    assert "kin: cleaned by none, as in the baseline" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"has cleaned none there and spaces\+nfc\+apostrophe here"):
        run_eval(home, model=str(folder), **settings, baseline=str(home / "plain"),
                 normalise=["all"])


def test_limit_gives_each_class_its_share_and_is_the_same_each_time(tmp_path):
    counts = {"science/technology": 51, "travel": 40, "politics": 30, "sports": 25, "health": 22,
              "entertainment": 17, "geography": 19}  # the test of SIB-200 is sorted by class
    (tmp_path / "test.jsonl").write_text("".join(
        json.dumps({"category": name, "text": f"{name} {i}"}) + "\n"
        for name, n in counts.items() for i in range(n)))
    suite = load_suite(f"sib200={tmp_path / 'test.jsonl'}")
    for limit in (7, 20, 100):
        indices = suite.subset(limit)
        assert len(indices) == limit and indices == sorted(set(indices)) == suite.subset(limit)
        drawn = Counter(suite.rows[i]["category"] for i in indices)
        for name, n in counts.items():
            assert abs(drawn[name] - limit * n / 204) < 1, (limit, name)
    items = suite.items(suite.prompts[0], limit=20)
    assert [item.row for item in items] == [suite.rows[i] for i in suite.subset(20)]
    assert suite.subset(0) == suite.subset(204) == suite.subset(999) == list(range(204))


# doc_to_text of lm-evaluation-harness at 4e7e0d47, lm_eval/tasks/afrobench/{flores,mafand}
HARNESS = {
    ("flores", "eng-kin", "1"): "English: {E} \nKinyarwanda: ",
    ("flores", "eng-kin", "2"): "You are a translation expert. Translate the following English "
                                "sentences to Kinyarwanda \nEnglish: {E} \nKinyarwanda: ",
    ("flores", "eng-kin", "3"): "As a Kinyarwanda and English linguist, translate the following "
                                "English sentences to Kinyarwanda \nEnglish: {E} \nKinyarwanda: ",
    ("flores", "kin-eng", "1"): "Kinyarwanda: {K} \nEnglish: ",
    ("flores", "kin-eng", "2"): "You are a translation expert. Translate the following Kinyarwanda "
                                "sentences to English \nKinyarwanda: {K}\nEnglish: ",
    ("flores", "kin-eng", "3"): "As a Kinyarwanda and English linguist, translate the following "
                                "Kinyarwanda sentences to English \nKinyarwanda: {K}\nEnglish: ",
    ("mafand", "eng-kin", "1"): "You are an advanced Translator, a specialized assistant designed "
                                "to translate documents from English into Kinyarwanda. \nYour main "
                                "goal is to ensure translations are grammatically correct and "
                                "human-oriented. \nEnglish: {E} \nKinyarwanda: ",
    ("mafand", "eng-kin", "2"): "English sentence: {E} \nKinyarwanda sentence: \n",
    ("mafand", "eng-kin", "3"): "You are a translation expert. Translate the following English "
                                "sentence into Kinyarwanda\nEnglish sentence: {E}\nKinyarwanda "
                                "sentence: ",
    ("mafand", "kin-eng", "1"): "You are an advanced Translator, a specialized assistant designed "
                                "to translate documents from Kinyarwanda into English. \nYour main "
                                "goal is to ensure translations are grammatically correct and "
                                "human-oriented. \nKinyarwanda: {K} \nEnglish: ",
    ("mafand", "kin-eng", "2"): "Kinyarwanda sentence: {K} \nEnglish sentence: ",
}
STOPS = {"flores": ["**", "</s>"], "mafand": ["\n"]}  # generation_kwargs: until


@pytest.mark.parametrize("name", ["flores", "mafand"])
def test_public_prompts_of_translation_are_those_of_the_harness(name, tmp_path):
    (tmp_path / "test.tsv").write_text(f"eng\tkin\nOne  {CURLY}\tRimwe {CURLY}\n")
    suite = load_suite(f"{name}={tmp_path / 'test.tsv'}")
    assert suite.delimiter == " " and suite.stop == STOPS[name] and suite.new_tokens == 256
    contexts = {(name, p.part, p.name): suite.items(p)[0].context for p in suite.prompts}
    assert contexts == {
        key: text.replace("{E}", f"One  {CURLY}").replace("{K}", f"Rimwe {CURLY}")
        for key, text in HARNESS.items() if key[0] == name}
