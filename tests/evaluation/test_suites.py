"""Suites, figures and comparisons: against sacrebleu's own command line, made pairs, bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import eval as evaluating
from evaluation import metrics, suite_readers
from evaluation.significance import paired_test
from evaluation.suites import Suite, load_suite
from evaluation.tasks import TASKS
from helpers import tiny
from helpers.browser import CHROMIUM, browser
from preparation import contamination
from preparation.text import prepare_text
from reports import evaluation_report as sheet
from reports import model_card as card
from runtime.console import UserError
from runtime.paths import ROOT
from tokenization.tokenizer import Tokenizer

KIN = [x for x in tiny.SENTENCES if x.split()[0] in ("Umugore", "Abana", "Ejo", "Inka", "Amazi")]
ENG = tiny.SENTENCES[5:]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A tiny model, pairs, and translations of two systems."""
    home = tmp_path_factory.mktemp("suites")
    tiny.folder(home / "model", max_position_embeddings=512)
    rows = [f"{e}\t{k}" for e, k in zip(ENG, KIN, strict=True)] * 4
    (home / "pairs.tsv").write_text("eng\tkin\n" + "".join(x + "\n" for x in rows))
    (home / "good.txt").write_text("".join(k.replace("mu", "ku") + "\n" for k in KIN * 4))
    (home / "poor.txt").write_text("".join(" ".join(k.split()[::2]) + "\n" for k in KIN * 4))
    (home / "short.txt").write_text("".join(k + "\n" for k in KIN * 4)[:-40].rsplit("\n", 1)[0])
    return home


def evaluated(home: Path, **values) -> dict:
    values = {"device": "cpu", "out": str(home / "out"), "suites": [f"pairs={home}/pairs.tsv"],
              **values}
    evaluating.main(evaluating.Settings(**values))
    return json.loads((Path(values["out"]) / "results.json").read_text())


def judged(home: Path, name: str, **values) -> dict:
    return evaluated(home, out=str(home / name), hypotheses=[f"pairs/eng-kin={home}/{name}.txt"],
                     **values)


def test_sacrebleus_own_command_gives_the_same_scores_and_signatures(home):
    found = {r["metric"]: r for r in judged(home, "good")["results"]}
    stem = home / "good" / "items" / "pairs.eng-kin.file"
    for name, flags in (("chrF2++", ["-m", "chrf", "--chrf-word-order", "2"]),
                        ("chrF2", ["-m", "chrf"]), ("BLEU", ["-m", "bleu"])):
        done = subprocess.run(
            [sys.executable, "-m", "sacrebleu", f"{stem}.ref", "-i", f"{stem}.hyp", *flags, "-w",
             "6"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
        assert done.returncode == 0, done.stderr
        theirs = json.loads(done.stdout)
        assert found[name]["value"] == pytest.approx(theirs["score"], abs=1e-5)
        assert found[name]["signature"].endswith(theirs["signature"])


def test_spbleu_is_that_of_sacrebleus_own_command_with_whatever_tokenizer_lies_in_its_place(
        home, tmp_path):
    """FLORES-200's tokenizer has to be fetched; a SentencePiece model of ours stands in for it."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models/flores200sacrebleuspm").write_bytes(tiny.pieces())
    env = {**os.environ, "PYTHONPATH": "", "SACREBLEU": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, Path(evaluating.__file__), "--suites", f"pairs={home}/pairs.tsv",
         "--hypotheses", f"pairs/eng-kin={home}/poor.txt", "--out", tmp_path / "out"],
        capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    found = {r["metric"]: r for r in json.loads((tmp_path / "out/results.json").read_text())[
        "results"]}
    stem = tmp_path / "out/items/pairs.eng-kin.file"
    done = subprocess.run(
        [sys.executable, "-m", "sacrebleu", f"{stem}.ref", "-i", f"{stem}.hyp", "-m", "bleu",
         "-tok", "flores200", "-w", "6"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout)
    assert 0 < found["spBLEU"]["value"] == pytest.approx(theirs["score"], abs=1e-5)
    assert found["spBLEU"]["signature"].endswith(theirs["signature"])
    assert "tok:flores200" in theirs["signature"]
    assert abs(found["spBLEU"]["value"] - found["BLEU"]["value"]) > 0.1


def test_the_paired_test_is_sacrebleus(home):
    from sacrebleu.metrics import CHRF
    from sacrebleu.significance import PairedTest

    judged(home, "poor")
    found = {r["metric"]: r for r in judged(home, "good", baseline=str(home / "poor"))["results"]}
    said = [(home / f"{x}.txt").read_text().splitlines() for x in ("poor", "good")]
    _, scores = PairedTest([("poor", said[0]), ("good", said[1])], {"chrF": CHRF()}, [KIN * 4],
                           test_type="bs", n_samples=1000)()
    theirs = scores["chrF2"][1]
    assert found["chrF2"]["value"] == pytest.approx(theirs.score)
    assert found["chrF2"]["baseline"]["p"] == pytest.approx(theirs.p_value, abs=0.003)
    ours = found["chrF2"]["baseline"]
    assert ours["low"] > 0 and ours["low"] < ours["difference"] < ours["high"] and ours["p"] < 0.05


def test_a_system_does_not_differ_from_itself(home):
    judged(home, "good")
    again = judged(home, "good", baseline=str(home / "good"))["results"]
    for r in again:
        assert (r["baseline"]["difference"], r["baseline"]["p"]) == (0.0, 1.0), r["metric"]


def test_made_differences_have_the_right_sign_and_interval():
    rng = np.random.default_rng(3)
    base = rng.random(400) < 0.5
    better = base | (rng.random(400) < 0.2)
    found = paired_test(metrics.mean("acc", better), metrics.mean("acc", base))
    assert found["low"] > 0.05 and found["high"] < 0.2 and found["p"] < 0.01
    assert found["difference"] == pytest.approx(better.mean() - base.mean())
    back = paired_test(metrics.mean("acc", base), metrics.mean("acc", better))
    assert back["difference"] == -found["difference"] and back["high"] < 0
    noise = paired_test(metrics.mean("acc", rng.random(400) < 0.5),
                           metrics.mean("acc", rng.random(400) < 0.5))
    assert noise["low"] < 0 < noise["high"] and noise["p"] > 0.01


def test_weighted_f1_is_the_formula_of_scikit_learn():
    gold, said = [0, 1, 2, 2, 1, 0, 2, 3], [0, 2, 2, 2, 1, 1, 0, 2]
    # what sklearn.metrics.f1_score(gold, said, average="weighted") of scikit-learn 1.9.1 prints
    assert metrics.weighted_f1(gold, said).value == pytest.approx(0.4642857142857143, abs=1e-15)


def test_a_model_is_measured_on_a_suite_and_its_page_says_so(home, capsys):
    found = evaluated(home, model=str(home / "model"), max_new_tokens=8, limit=3, overlap=False,
                      prompts=["1"])
    assert {r["part"] for r in found["results"]} == {"eng-kin", "kin-eng"}
    assert all(r["partial"] and "|limit:3|" in r["signature"] for r in found["results"])
    assert {"eos_rate", "copy_rate", "language_rate", "length_ratio"} <= {
        r["metric"] for r in found["results"]}
    assert "PARTIAL: the first 3 items only" in capsys.readouterr().out
    shown = [x.split(" | ")[:3] for x in card.result_lines(home / "out/results.json") if " | " in x]
    assert len({*map(tuple, shown[2:])}) == len(shown[2:]) == len(found["results"])  # told apart
    names = {p.name for p in (home / "out" / "items").iterdir()}
    assert "pairs.eng-kin.1.PARTIAL.hyp" in names
    page = (home / "out" / "report.html").read_text()
    assert "PARTIAL: only the first items" in page and "Best translations" in page
    assert "http" not in page.replace("http://www.w3.org", "")  # nothing is fetched
    assert sheet.write(home / "out").exists()


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="no chromium here to open the page")
def test_a_comparison_fits_on_a_phone(home, tmp_path):
    """No table is wider than its place on a screen of 390 points: no difference is hidden."""
    judged(home, "poor")
    judged(home, "good", baseline=str(home / "poor"))
    with browser(tmp_path / "profile") as tab:
        tab.open((home / "good" / "report.html").as_uri(), 390)
        hidden = tab.run("[...document.querySelectorAll('.wide')]"
                         ".map(x => x.scrollWidth - x.clientWidth)")
    assert len(hidden) >= 2 and max(hidden) <= 1


def test_sentences_of_the_training_text_are_found_whole_and_by_runs():
    run = " ".join(f"w{i}" for i in range(13))
    tests = {"a": [["Inka zacu zirya ubwatsi ku musozi."], [f"x {run} y"], ["Inka zacu"],
                   ["nothing of this stands there at all"]]}
    training = ["Ejo. INKA zacu, zirya ubwatsi ku musozi! Yego.", f"before {run} after"]
    found = contamination.count_contaminated(tests, training)
    assert found == {"a": {"items": 4, "whole": 1, "run": 1, "any": 2}}
    assert contamination.bins_of_run("nowhere") == ([], [])


def test_the_runs_a_model_came_from_are_each_looked_at_once(tmp_path, monkeypatch):
    """As in the demo: OUT began with OUT/base/model, which began with OUT/seed, and that lies in
    OUT."""
    monkeypatch.chdir(tmp_path)
    for out, begun, data in (("run", "run/base/model", "kin.txt"), ("run/base", "run/seed", "eng")):
        (tmp_path / out / "model").mkdir(parents=True)
        (tmp_path / out / "settings.toml").write_text(f'model = "{begun}"\ndata = ["{data}:3"]\n')
    (tmp_path / "run/bins/kin").mkdir(parents=True)
    (tmp_path / "run/bins/kin/meta.json").write_text("{}")
    assert contamination.bins_of_run("run/model") == (["run/bins/kin"], ["eng"])
    assert contamination.bins_of_run("run/model") == contamination.bins_of_run("run")


def suite_file(home: Path, **changes) -> str:
    words = {"kind": "multiple_choice", "version": 1, "about": "test", "metrics": ["acc"],
             "choices": ["yego", "oya"], "gold": "{{label}}", **changes}
    file = home / "mine.toml"
    file.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in words.items())
                    + '[[data]]\ntest = "mine.jsonl"\n[[prompts]]\nname = "1"\n'
                    + 'text = "{{text}}?"\n')
    return str(file)


def test_in_conversation_figures_are_others_and_a_base_without_a_template_is_refused(home):
    (home / "mine.jsonl").write_text("".join(
        json.dumps({"text": f"Inka {x}", "label": 0}) + "\n" for x in "abc"))
    folder = shutil.copytree(home / "model", home / "taught")
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}")
    asked = {"suites": [suite_file(home)], "suite_data": str(home)}
    plain = evaluated(home, model=str(folder), **asked, out=str(home / "plain"))
    chat = evaluated(home, model=str(folder), **asked, chat_template=True)
    assert "|chat:" in chat["results"][0]["signature"] and chat["settings"]["chat_template"]
    assert "|chat:" not in plain["results"][0]["signature"]
    logp = [[json.loads(x)["logp"] for x in (home / out / "items/mine.1.jsonl").read_text()
             .splitlines()] for out in ("plain", "out")]
    assert logp[0] != logp[1]
    with pytest.raises(UserError, match=r"mine\.1 has chat none there and "):
        evaluated(home, model=str(folder), **asked, chat_template=True,
                  baseline=str(home / "plain"))
    with pytest.raises(UserError, match="model has no chat template; remove the flag") as e:
        evaluated(home, model=str(home / "model"), **asked, chat_template=True)
    assert e.value.code == 2


def test_a_text_scored_as_the_harness_does_is_not_compared_with_one_that_was_not(home):
    (home / "text.txt").write_text("Inka zacu.\n\nAbana baraje.\n")
    said = {"model": str(home / "model"), "suites": [], "text": [f"mine={home}/text.txt"]}
    evaluated(home, **said, out=str(home / "as-it-is"))
    with pytest.raises(UserError, match="mine has compat none there and lm-eval"):
        evaluated(home, **said, lm_eval_compat=True, baseline=str(home / "as-it-is"))
    with pytest.raises(UserError, match="--chat-template: goes with --model and --suites"):
        evaluated(home, **said, chat_template=True)


def test_an_answer_ends_where_the_models_files_say_so_and_conversation_compares_with_a_file(home):
    folder = shutil.copytree(home / "model", home / "ends")
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}")
    said = {"model": str(folder), "out": str(home / "conversed"), "chat_template": True,
            "max_new_tokens": 4}
    evaluated(home, **said)
    rows = [json.loads(x) for x in (home / "conversed/items/pairs.eng-kin.1.jsonl").read_text()
            .splitlines()]
    assert any(r["hypothesis"] for r in rows)
    found = judged(home, "good", baseline=str(home / "conversed"))["results"]
    assert any("baseline" in r for r in found)
    n = Tokenizer.open(folder).vocab_size
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(n))}))
    evaluated(home, **said)
    rows = [json.loads(x) for x in (home / "conversed/items/pairs.eng-kin.1.jsonl").read_text()
            .splitlines()]
    assert {(r["hypothesis"], r["end"]) for r in rows} == {("", "eos")}


@pytest.mark.parametrize(("rows", "words"), [
    ([{"text": "Inka"}], "has no column label; it has text"),
    ([{"text": "Inka", "label": "sinzi"}], "the right answer is 'sinzi', which is none of"),
    ([], "no rows")])
def test_rows_that_do_not_fit_are_one_line(home, rows, words):
    (home / "mine.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(UserError, match=words) as e:
        suite = load_suite(suite_file(home), str(home))
        suite.items(suite.prompts[0])
    assert "\n" not in str(e.value)


def test_a_choice_that_becomes_no_token_is_one_line(home):
    (home / "mine.jsonl").write_text(json.dumps({"text": "Inka", "label": 0}) + "\n")
    spec = suite_file(home, choices=["", "oya"], delimiter="")
    with pytest.raises(UserError, match="the choice '' has no token of its own"):
        evaluated(home, model=str(home / "model"), suites=[spec], suite_data=str(home))


def test_a_context_that_is_too_long_loses_its_beginning_and_that_is_said(home, capsys):
    rows = [{"text": "Inka zacu " * n, "label": 0} for n in (1, 400, 500)]
    (home / "mine.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    evaluated(home, model=str(home / "model"), suites=[suite_file(home)], suite_data=str(home))
    assert "4 of 6 requests do not fit into 512 tokens: their contexts lose" in \
        capsys.readouterr().err
    evaluated(home, model=str(home / "model"), max_new_tokens=490, limit=2, prompts=["1"])
    said = [x for x in capsys.readouterr().err.splitlines() if "do not fit into 22 tokens" in x]
    assert len(said) == 2, "in each direction"
    with pytest.raises(UserError, match="--max-new-tokens 512: a context of 512 tokens leaves no"):
        evaluated(home, model=str(home / "model"), max_new_tokens=512)


def test_a_tokenizer_without_eos_is_said_and_answers_end_by_length(home, capsys):
    folder = Path(shutil.copytree(home / "model", home / "endless"))
    words = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**words, "eos_token": None}))
    found = evaluated(home, model=str(folder), max_new_tokens=4, limit=2, prompts=["1"])
    assert "the tokenizer has no EOS: an answer ends at a stop string, or after 4 tokens" in \
        capsys.readouterr().err
    assert {r["value"] for r in found["results"] if r["metric"] == "eos_rate"} == {0.0}


def test_rows_of_another_language_and_sides_that_do_not_match_are_one_line(home):
    (home / "swapped.tsv").write_text("kin\teng\n" + "".join(
        f"{e}\t{k}\n" for e, k in zip(ENG, KIN, strict=True)))
    with pytest.raises(UserError, match="column kin should be kin, but 5 of 5 rows"):
        load_suite(f"pairs={home}/swapped.tsv")
    (home / "flores200").mkdir(exist_ok=True)
    (home / "flores200" / "devtest.kin.txt").write_text("".join(x + "\n" for x in KIN))
    (home / "flores200" / "devtest.eng.txt").write_text("".join(x + "\n" for x in ENG[:4]))
    (home / "flores200" / "dev_subset_from_sib200.tsv").write_text("eng\tkin\na\tb\n")
    with pytest.raises(UserError, match=r"eng\.txt: 4 lines, .*kin\.txt has 5"):
        load_suite("flores", str(home))


@pytest.mark.parametrize(("values", "words", "code"), [
    ({"suites": ["sib20"]}, "no such suite; there are afrimgsm", 2),
    ({"suites": ["sib200"]}, "looked for sib200/sib200_kin_eng.tsv", 2),
    ({"hypotheses": ["pairs/eng-kin=short.txt"]}, "19 lines, pairs/eng-kin has 20 sentences", 3),
    ({"hypotheses": ["pairs/eng-swa=good.txt"]}, "pairs has eng-kin, kin-eng", 2),
    ({"baseline": "nowhere"}, "no results.json there", 2),
    ({"hypotheses": ["pairs/eng-kin=good.txt", "pairs/eng-kin=poor.txt"]}, "is given twice", 2),
    ({"suites": ["pairs=pairs.tsv", "agreement=x"], "model": ""}, "name a model", 2),
    ({"shots": 2, "model": "model"}, "no examples beside its data", 2),
    ({"prompts": ["9"], "model": "model"}, "suite pairs has 1, 2, 3", 2)])
def test_what_cannot_be_done_is_one_line(home, monkeypatch, values, words, code):
    monkeypatch.chdir(home)
    values = {"hypotheses": [] if values.get("model") else ["pairs/eng-kin=good.txt"], **values}
    if any("=" not in x for x in values.get("suites", [])):
        values |= {"model": "model", "hypotheses": []}
    with pytest.raises(UserError, match=words) as e:
        evaluated(home, **values)
    assert "\n" not in str(e.value) and e.value.code == code


def test_a_baseline_of_another_version_or_of_other_items_is_refused(home):
    judged(home, "good")
    file = home / "good" / "results.json"
    text = file.read_text()
    file.write_text(text.replace("suite:pairs.1|", "suite:pairs.2|"))
    with pytest.raises(UserError, match=r"has suite pairs\.2 there and pairs\.1 here"):
        judged(home, "poor", baseline=str(home / "good"))
    file.write_text(text.replace("version:2", "version:1"))
    with pytest.raises(UserError, match="has version 1 there and 2 here"):
        judged(home, "poor", baseline=str(home / "good"))
    file.write_text(text)
    with pytest.raises(UserError, match="other items"):
        judged(home, "poor", baseline=str(home / "good"), limit=3)


@pytest.fixture
def no_spbleu(tmp_path, monkeypatch) -> None:
    """sacrebleu's folder without spBLEU's tokenizer."""
    import sacrebleu.utils

    monkeypatch.setattr(sacrebleu.utils, "SACREBLEU_DIR", str(tmp_path))


def test_without_its_tokenizer_spbleu_is_refused_in_one_line(home, no_spbleu):
    with pytest.raises(UserError, match="its tokenizer is not on this machine"):
        metrics.translation("spBLEU", ["a"], ["a"])
    records = [{"source": "a b", "reference": "c d", "hypothesis": "c", "end": "eos"}] * 2
    suite = load_suite("pairs", str(home))
    assert "spBLEU" in suite.metrics
    assert not any("spBLEU" in m.name for m in suite.task(suite.prompts[0]).metrics(records))


def given(tmp_path: Path, name: str, ending: str, text: str) -> Suite:
    """A suite whose rows are a file's of one's own."""
    (tmp_path / f"own{ending}").write_text(text)
    return load_suite(f"{name}={tmp_path}/own{ending}")


def asked(suite: Suite) -> list[list[tuple[str, int | str]]]:
    return [[(x.context, x.gold) for x in suite.items(p)] for p in suite.prompts]


def test_a_file_that_is_named_is_read_as_the_suites_own_files_are(tmp_path):
    """The rows of a .jsonl, which need no reading of cells, say what is right."""
    row = {"subject": "s", "question": "Inka zirya iki?", "choices": ["a", "b", "c", "d"],
           "answer": "B"}
    wanted = asked(given(tmp_path, "afrimmlu", ".jsonl", json.dumps(row) + "\n"))
    for ending, sign in ((".tsv", "\t"), (".csv", ",")):
        quoted = sign.join('"' + str(x).replace('"', '""') + '"' for x in row.values())
        found = given(tmp_path, "afrimmlu", ending, sign.join(row) + "\n" + quoted + "\n")
        assert asked(found) == wanted
    pair = {"premise": "Inka zirarisha.", "hypothesis": "Inka zirarya."}
    rows = "".join(json.dumps({**pair, "label": x}) + "\n" for x in (0, 1, 2))
    wanted = asked(given(tmp_path, "afrixnli", ".jsonl", rows))
    for labels in ((0, 1, 2), ("entailment", "neutral", "contradiction")):
        text = "".join("\t".join([*pair.values(), str(x)]) + "\n" for x in labels)
        found = given(tmp_path, "afrixnli", ".tsv", "premise\thypothesis\tlabel\n" + text)
        assert asked(found) == wanted
        assert [gold for _, gold in asked(found)[1]] == [0, 1, 2]
    text = 'question\tanswer\tanswer_number\n"Inka 3.\nZose?"\t{}\t3\n'
    found = given(tmp_path, "afrimgsm", ".tsv", text.format("Igisubizo ntambwe ya 3"))
    assert found.rows[0]["question"] == "Inka 3.\nZose?"
    with pytest.raises(UserError, match=r"no row of .* has a right answer"):
        asked(given(tmp_path, "afrimgsm", ".tsv", text.format("")))


@pytest.mark.parametrize(("ending", "text", "words"), [
    (".csv", 'eng,kin\nOur\rcows,Inka\n', "own.csv, line 2: its quotes cannot be read"),
    (".csv", 'eng,kin\nOur cows,"Inka\nThe river,Amazi\n', "line 3: its quotes cannot be read"),
    (".csv", 'eng,kin\nOur cows,"' + "Inka zacu\n" * 14000, "its quotes cannot be read"),
    (".csv", 'eng,kin\nOur cows,"Inka" zacu\n', "line 2: its quotes cannot be read")])
def test_quotes_that_cannot_be_read_are_one_line(tmp_path, ending, text, words):
    with pytest.raises(UserError, match=words) as e:
        given(tmp_path, "pairs", ending, text)
    assert "\n" not in str(e.value)


def test_quotes_that_make_one_row_of_three_are_told(tmp_path, capsys):
    text = "eng,kin\nOur cows,{}Inka\nThe river,Amazi\nThe women,Abagore{}\nA day,Umunsi\n"
    assert len(given(tmp_path, "pairs", ".csv", text.format("", "")).rows) == 4
    assert "quotes" not in capsys.readouterr().err
    assert len(given(tmp_path, "pairs", ".csv", text.format('"', '"')).rows) == 2
    assert "line breaks within quotes in 1 of 2 rows, the first is row 1" in capsys.readouterr().err


def test_a_question_of_afriqa_without_an_answer_does_not_stop_the_suite(tmp_path):
    rows = [{"question_lang": "Inka zirya iki?", "question_translated": "What do cows eat?",
             "context": "Cows.", "title": "", "answer_pivot": {"text": x}} for x in (["a"], [])]
    suite = given(tmp_path, "afriqa", ".jsonl", "".join(json.dumps(x) + "\n" for x in rows))
    assert [gold for _, gold in asked(suite)[0]] == ["a", ""]


def test_what_a_template_cannot_say_of_a_row_is_one_line(tmp_path):
    row = {"flores_passage": "Inka.", "question": None, "correct_answer_num": 1,
           **{f"mc_answer{n}": "a" for n in (1, 2, 3, 4)}}
    with pytest.raises(UserError, match=r"suite belebele, prompt 1, row 1 of .*no attribute") as e:
        asked(given(tmp_path, "belebele", ".jsonl", json.dumps(row) + "\n"))
    assert "\n" not in str(e.value)


def test_several_files_for_one_suite_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"names 2 files, a\.tsv first; name one") as e:
        suite_readers.only_file("hf:org/name/*.tsv", [tmp_path / "a.tsv", tmp_path / "b.tsv"])
    assert e.value.code == 2


@pytest.mark.parametrize("ending", [".parquet", ".jsonl", ".tsv"])
def test_a_file_that_is_missing_damaged_or_a_folder_is_one_line(home, tmp_path, ending):
    (tmp_path / f"damaged{ending}").write_bytes(b"PAR1\xff\xfe\x00 nothing")
    (tmp_path / f"folder{ending}").mkdir()
    for name in ("missing", "damaged", "folder"):
        with pytest.raises(UserError, match=name) as e:
            load_suite(f"pairs={tmp_path}/{name}{ending}")
        assert "\n" not in str(e.value) and e.value.code == 3
    with pytest.raises(UserError, match=r"cannot be read .Is a directory"):
        evaluated(home, hypotheses=[f"pairs/eng-kin={tmp_path}"])


@pytest.mark.parametrize(("changes", "words"), [
    ({"metrics": ["acc", "accuracy"]},
     "metrics: accuracy; expected for kind multiple_choice acc, "),
    ({"metrics": []}, "metrics: none; expected for kind multiple_choice"),
    ({"kind": "exact_match", "metrics": ["exact_match"]},
     r"kind exact_match needs \[\[answers\]\]"),
    ({"kind": "choice"}, "not a suite .kind 'choice': expected multiple_choice, exact"),
    ({"shuffle": True}, "not a suite .unknown key shuffle"),
    ({"groups": ["class"]}, "row 1 has no column class; it has text, label"),
    ({"kind": "translation", "metrics": ["BLEU"]}, "row 1 has no column")])
def test_what_would_stop_the_count_stops_a_suite_before_it_is_asked(home, changes, words):
    (home / "mine.jsonl").write_text(json.dumps({"text": "Inka", "label": 0}) + "\n")
    with pytest.raises(UserError, match=words):
        load_suite(suite_file(home, **changes), str(home))


def test_every_metric_that_a_suite_may_ask_for_is_computed(home, no_spbleu):
    pairs = load_suite(f"pairs={home}/pairs.tsv")
    for task_type in TASKS:
        pairs.metrics, pairs.answers = list(task_type.known_metrics), [{"name": "whole"}]
        names = task_type(pairs, pairs.prompts[0]).metric_names()
        assert set(task_type.known_metrics) - {"spBLEU"} <= set(names)


@pytest.mark.parametrize("task_type", TASKS)
def test_a_suite_file_with_the_earlier_name_of_its_kind_is_read(home, task_type):
    rows = {"text": "Inka", "label": 0, "eng": "a", "kin": "b"}
    (home / "mine.jsonl").write_text(json.dumps(rows) + "\n")
    changes = {"metrics": list(task_type.known_metrics[:1])}
    new = Path(suite_file(home, kind=task_type.kind, **changes)).read_text()
    text = new.replace(f'"{task_type.kind}"', f'"{task_type.old_kind}"', 1)
    text = text.replace('name = "1"', """name = "1"
part = "eng-kin"
aside = "why not"
""").replace("[[data]]", '[[answers]]\nname = "whole"\n[[data]]')
    (home / "earlier.toml").write_text(text)
    suite = load_suite(str(home / "earlier.toml"), str(home))
    assert suite.task_type is task_type
    assert suite.prompts[0].excluded_from_mean == "why not"


def test_a_language_without_an_identifier_is_not_identified_and_not_respelled(home, capsys):
    """Another language than those of the folders of languages/: no language_rate, and no scores
    with one apostrophe; the rows are not checked."""
    text = (ROOT / "evaluation/suites/pairs.toml").read_text()
    text = re.sub(r"\bkin\b", "xyz", text)
    (home / "others.toml").write_text(text)
    (home / "pairs-xyz.tsv").write_text((home / "pairs.tsv").read_text().replace("kin", "xyz"))
    found = evaluated(home, model=str(home / "model"), prompts=["1"], limit=2, max_new_tokens=4,
                      suites=[f"{home}/others.toml={home}/pairs-xyz.tsv"], overlap=False)
    names = {part: {r["metric"] for r in found["results"] if r["part"] == part}
             for part in ("eng-xyz", "xyz-eng")}
    assert "language_rate" not in names["eng-xyz"] and "language_rate" in names["xyz-eng"]
    assert not any("apostrophe" in x for part in names.values() for x in part)
    assert capsys.readouterr().err.count("language_rate is left out for xyz") == 1


def test_what_unicode_calls_a_lines_end_splits_no_record(home):
    lines = (home / "good.txt").read_text().split("\n")
    lines[:3] = [f"{x} a{sign}b" for x, sign in zip(lines, "\x85\u2028\u2029", strict=False)]
    (home / "ends.txt").write_text("\n".join(lines))
    judged(home, "ends")
    assert sheet.write(home / "ends").exists()
    found = judged(home, "ends", baseline=str(home / "ends"))["results"]
    assert {r["baseline"]["difference"] for r in found} == {0.0}


def test_a_sentence_behind_a_languages_name_is_found_whole():
    tests = {"a": [["Inka zacu zirya ubwatsi ubu."], ["Abana bo mu rugo baraje. Bose."],
                   ["Amazi y'umugezi ni meza cyane."], ["Ejo nzajya ku isoko kare."]]}
    training = ["English: Our cows eat.\nKinyarwanda: Inka zacu zirya ubwatsi ubu."
                " Ee.\nKinyarwanda: Abana bo mu rugo baraje. Bose.",
                "Kinyarwanda: Ngo: Ejo nzajya ku isoko kare."]
    found = contamination.count_contaminated(tests, training)
    assert found["a"] == {"items": 4, "whole": 2, "run": 0, "any": 2}


def test_what_was_trained_on_is_streamed_by_its_key_and_faults_are_counted(tmp_path):
    """Text under a name of its own with a line that is no UTF-8, conversations, pairs, a list."""
    said = {"messages": [{"role": "user", "content": "Bite?"}, {"role": "assistant",
                                                              "content": KIN[1]}]}
    files = {"text.jsonl": json.dumps({"body": KIN[0]}).encode() + b'\n{"body": "\xff"}\n',
             "chat.jsonl": json.dumps(said).encode() + b"\n",
             "pairs.tsv": f"en\trw\n{ENG[2]}\t{KIN[2]}\n".encode(),
             "chats.json": json.dumps([said, {"messages": [{"content": KIN[3]}]}]).encode()}
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
    specs = [str(tmp_path / x) for x in files]
    contamination.require_text(specs, "auto", "body")
    tests = {"kin": [[x] for x in KIN], "eng": [[x] for x in ENG]}
    training = contamination.TrainingText(specs, None, "auto", "body")
    found = contamination.count_contaminated(tests, training)
    assert (found["kin"]["whole"], found["eng"]["whole"]) == (4, 1)
    assert training.read == specs and training.unread == [f"{specs[0]} (1 undecodable)"]
    (tmp_path / "long.jsonl").write_text(json.dumps({"body": KIN[0]}) + "\nnot JSON\n")
    stream = iter(contamination.TrainingText([str(tmp_path / "long.jsonl")], None, key="body"))
    assert next(stream) == KIN[0]  # the rest is not read yet
    with pytest.raises(UserError, match=r"long\.jsonl, line 2: not JSON"):
        next(stream)


def test_nothing_is_said_to_be_found_of_a_bin_that_could_not_be_read(home, tmp_path):
    (tmp_path / "kin.txt").write_text("".join(x + "\n" for x in KIN))
    prepare_text([str(tmp_path / "kin.txt")], home / "model", tmp_path / "bin", unit="line")
    said = {"model": str(home / "model"), "suites": [], "text": [f"mine={tmp_path}/kin.txt"],
            "trained_on": [str(tmp_path / "bin")], "limit": 2}
    found = evaluated(home, **said)["contamination"]
    assert (found["read"], found["gone"]) == (said["trained_on"], [])
    assert found["tests"]["text:mine"]["whole"] == found["tests"]["text:mine"]["items"] > 0
    file = tmp_path / "bin/meta.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer": "another"}))
    found = evaluated(home, **said)["contamination"]
    assert found == {"read": [], "gone": [f"{tmp_path}/bin (another tokenizer)"], "tests": {}}
    page = (home / "out/report.html").read_text()
    assert "nothing that the model was trained on could be read" in page and "0.0 %" not in page


@pytest.mark.parametrize(("values", "words"), [
    ({"trained_on": ["none.txt"]}, "none.txt: no such file"),
    ({"hypotheses": ["pairs/eng-kin=none.txt"]}, "none.txt cannot be read"),
    ({"hypotheses": ["pairs/eng-kin=short.txt"]}, "19 lines, pairs/eng-kin has 20"),
    ({"hypotheses": ["pairs/eng-swa=good.txt"]}, "pairs has eng-kin, kin-eng"),
    ({"prompts": ["1", "22"]}, "--prompts 22: no suite has such a prompt"),
    ({"text": ["a/b=good.txt"]}, "--text a/b=good.txt: expected NAME=FILE")])
def test_a_slip_is_told_before_the_model_is_loaded(home, monkeypatch, values, words):
    """There is no such model, which loading would say."""
    monkeypatch.chdir(home)
    with pytest.raises(UserError, match=words):
        evaluated(home, model="no-such-model", **values)


def test_what_cannot_be_compared_or_read_is_told_before_anything_is_measured(home, tmp_path):
    (home / "asked.txt").write_text("Inka zacu.\n\nAbana baraje.\n")
    (home / "broken.jsonl").write_text('{"body": "Inka"}\n')
    said = {"model": str(home / "model"), "prompts": ["1"], "max_new_tokens": 2, "limit": 2,
            "text": [f"mine={home}/asked.txt"]}
    before = str(home / "before")
    evaluated(home, **said, out=before)
    here = evaluated(home, **said, baseline=before, hypotheses=[f"pairs/eng-kin={home}/good.txt"])
    assert all("baseline" in r for r in here["results"] if r["metric"] not in ("eos_rate",))
    assert here["results"][-1]["prompt"] == "file"
    for values, words in (({"limit": 3}, "pairs.eng-kin.1 was measured on other items .2 there, 3"),
                          ({"beams": 2}, "has beams 1 there and 2 here"),
                          ({"max_new_tokens": 3}, "has new 2 there and 3 here"),
                          ({"documents": "file"}, "text.mine has unit block there and file here"),
                          ({"trained_on": [f"{home}/broken.jsonl"]}, "no text under 'text'")):
        with pytest.raises(UserError, match=words):
            evaluated(home, **{**said, **values}, baseline=before, out=str(tmp_path / "out"))
        assert not (tmp_path / "out/items").exists(), "records were written, so it was measured"


def test_that_spbleu_is_left_out_is_said_of_another_systems_translations_too(home, no_spbleu,
                                                                             capsys):
    judged(home, "good")
    assert "spBLEU is left out" in capsys.readouterr().err
