"""Suites: how their files are read, items, answers, and errors of the user in one line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from evaluation import suite_readers
from evaluation.suites import Suite, load_suite
from evaluation.tasks import TASKS
from helpers.evaluations import ENG, KIN, run_eval, score_hypotheses
from preparation.text import prepare_text
from runtime.console import UserError
from runtime.paths import ROOT
from tokenization.tokenizer import Tokenizer


def suite_file(home: Path, **changes) -> str:
    keys = {"kind": "multiple_choice", "version": 1, "about": "test", "metrics": ["acc"],
             "choices": ["yego", "oya"], "gold": "{{label}}", **changes}
    file = home / "mine.toml"
    file.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in keys.items())
                    + '[[data]]\ntest = "mine.jsonl"\n[[prompts]]\nname = "1"\n'
                    + 'text = "{{text}}?"\n')
    return str(file)


def test_a_chat_template_changes_results_and_a_model_without_one_is_refused(home):
    (home / "mine.jsonl").write_text("".join(
        json.dumps({"text": f"Inka {x}", "label": 0}) + "\n" for x in "abc"))
    folder = shutil.copytree(home / "model", home / "taught")
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}")
    settings = {"suites": [suite_file(home)], "suite_data": str(home)}
    plain = run_eval(home, model=str(folder), **settings, out=str(home / "plain"))
    chat = run_eval(home, model=str(folder), **settings, chat_template=True)
    assert "|chat:" in chat["results"][0]["signature"] and chat["settings"]["chat_template"]
    assert "|chat:" not in plain["results"][0]["signature"]
    logp = [[json.loads(x)["logp"] for x in (home / out / "items/mine.1.jsonl").read_text()
             .splitlines()] for out in ("plain", "out")]
    assert logp[0] != logp[1]
    with pytest.raises(UserError, match=r"mine\.1 has chat none there and "):
        run_eval(home, model=str(folder), **settings, chat_template=True,
                  baseline=str(home / "plain"))
    with pytest.raises(UserError, match="model has no chat template; remove the flag") as e:
        run_eval(home, model=str(home / "model"), **settings, chat_template=True)
    assert e.value.code == 2


def test_an_answer_ends_at_the_models_stop_ids_and_chat_is_compared_with_a_file(home):
    folder = shutil.copytree(home / "model", home / "ends")
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}")
    settings = {"model": str(folder), "out": str(home / "conversed"), "chat_template": True,
            "max_new_tokens": 4}
    run_eval(home, **settings)
    rows = [json.loads(x) for x in (home / "conversed/items/pairs.eng-kin.1.jsonl").read_text()
            .splitlines()]
    assert any(r["hypothesis"] for r in rows)
    results = score_hypotheses(home, "good", baseline=str(home / "conversed"))["results"]
    assert any("baseline" in r for r in results)
    n = Tokenizer.open(folder).vocab_size
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(n))}))
    run_eval(home, **settings)
    rows = [json.loads(x) for x in (home / "conversed/items/pairs.eng-kin.1.jsonl").read_text()
            .splitlines()]
    assert {(r["hypothesis"], r["end"]) for r in rows} == {("", "eos")}


@pytest.mark.parametrize(("rows", "message"), [
    ([{"text": "Inka"}], "has no column label; it has text"),
    ([{"text": "Inka", "label": "sinzi"}], "the right answer is 'sinzi', which is none of"),
    ([], "no rows")])
def test_rows_that_do_not_fit_are_one_line(home, rows, message):
    (home / "mine.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(UserError, match=message) as e:
        suite = load_suite(suite_file(home), str(home))
        suite.items(suite.prompts[0])
    assert "\n" not in str(e.value)


def test_a_choice_without_a_token_is_one_line(home):
    (home / "mine.jsonl").write_text(json.dumps({"text": "Inka", "label": 0}) + "\n")
    spec = suite_file(home, choices=["", "oya"], delimiter="")
    with pytest.raises(UserError, match="the choice '' has no token of its own"):
        run_eval(home, model=str(home / "model"), suites=[spec], suite_data=str(home))


def test_a_long_context_loses_its_beginning_and_a_message_says_so(home, capsys):
    rows = [{"text": "Inka zacu " * n, "label": 0} for n in (1, 400, 500)]
    (home / "mine.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run_eval(home, model=str(home / "model"), suites=[suite_file(home)], suite_data=str(home))
    assert "4 of 6 requests do not fit into 512 tokens: their contexts lose" in \
        capsys.readouterr().err
    run_eval(home, model=str(home / "model"), max_new_tokens=490, limit=2, prompts=["1"])
    lines = [x for x in capsys.readouterr().err.splitlines() if "do not fit into 22 tokens" in x]
    assert len(lines) == 2, "in each direction"
    with pytest.raises(UserError, match="--max-new-tokens 512: a context of 512 tokens leaves no"):
        run_eval(home, model=str(home / "model"), max_new_tokens=512)


def test_without_eos_answers_end_by_length_and_a_message_says_so(home, capsys):
    folder = Path(shutil.copytree(home / "model", home / "endless"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}))
    evaluation = run_eval(home, model=str(folder), max_new_tokens=4, limit=2, prompts=["1"])
    assert "the tokenizer has no EOS: an answer ends at a stop string, or after 4 tokens" in \
        capsys.readouterr().err
    assert {r["value"] for r in evaluation["results"] if r["metric"] == "eos_rate"} == {0.0}


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


@pytest.mark.parametrize(("values", "message", "code"), [
    ({"suites": ["sib20"]}, "no such suite; there are afrimgsm", 2),
    ({"suites": ["sib200"]}, "looked for sib200/sib200_kin_eng.tsv", 2),
    ({"hypotheses": ["pairs/eng-kin=short.txt"]}, "19 lines, pairs/eng-kin has 20 sentences", 3),
    ({"hypotheses": ["pairs/eng-swa=good.txt"]}, "pairs has eng-kin, kin-eng", 2),
    ({"baseline": "nowhere"}, "no results.json there", 2),
    ({"hypotheses": ["pairs/eng-kin=good.txt", "pairs/eng-kin=poor.txt"]}, "is given twice", 2),
    ({"suites": ["pairs=pairs.tsv", "agreement=x"], "model": ""}, "name a model", 2),
    ({"shots": 2, "model": "model"}, "no examples beside its data", 2),
    ({"prompts": ["9"], "model": "model"}, "suite pairs has 1, 2, 3", 2)])
def test_an_error_of_the_user_is_one_line(home, monkeypatch, values, message, code):
    monkeypatch.chdir(home)
    values = {"hypotheses": [] if values.get("model") else ["pairs/eng-kin=good.txt"], **values}
    if any("=" not in x for x in values.get("suites", [])):
        values |= {"model": "model", "hypotheses": []}
    with pytest.raises(UserError, match=message) as e:
        run_eval(home, **values)
    assert "\n" not in str(e.value) and e.value.code == code


def suite_of_file(tmp_path: Path, name: str, ending: str, text: str) -> Suite:
    """A suite whose rows are a file's of one's own."""
    (tmp_path / f"own{ending}").write_text(text)
    return load_suite(f"{name}={tmp_path}/own{ending}")


def contexts_and_answers(suite: Suite) -> list[list[tuple[str, int | str]]]:
    return [[(x.context, x.gold) for x in suite.items(p)] for p in suite.prompts]


def test_a_file_that_the_user_names_is_read_like_the_suites_own_files(tmp_path):
    """The rows of a .jsonl, which need no reading of cells, say what is right."""
    row = {"subject": "s", "question": "Inka zirya iki?", "choices": ["a", "b", "c", "d"],
           "answer": "B"}
    suite = suite_of_file(tmp_path, "afrimmlu", ".jsonl", json.dumps(row) + "\n")
    expected = contexts_and_answers(suite)
    for ending, sign in ((".tsv", "\t"), (".csv", ",")):
        quoted = sign.join('"' + str(x).replace('"', '""') + '"' for x in row.values())
        suite = suite_of_file(tmp_path, "afrimmlu", ending, sign.join(row) + "\n" + quoted + "\n")
        assert contexts_and_answers(suite) == expected
    pair = {"premise": "Inka zirarisha.", "hypothesis": "Inka zirarya."}
    rows = "".join(json.dumps({**pair, "label": x}) + "\n" for x in (0, 1, 2))
    expected = contexts_and_answers(suite_of_file(tmp_path, "afrixnli", ".jsonl", rows))
    for labels in ((0, 1, 2), ("entailment", "neutral", "contradiction")):
        text = "".join("\t".join([*pair.values(), str(x)]) + "\n" for x in labels)
        suite = suite_of_file(tmp_path, "afrixnli", ".tsv", "premise\thypothesis\tlabel\n" + text)
        assert contexts_and_answers(suite) == expected
        assert [gold for _, gold in contexts_and_answers(suite)[1]] == [0, 1, 2]
    text = 'question\tanswer\tanswer_number\n"Inka 3.\nZose?"\t{}\t3\n'
    suite = suite_of_file(tmp_path, "afrimgsm", ".tsv", text.format("Igisubizo ntambwe ya 3"))
    assert suite.rows[0]["question"] == "Inka 3.\nZose?"
    with pytest.raises(UserError, match=r"no row of .* has a right answer"):
        contexts_and_answers(suite_of_file(tmp_path, "afrimgsm", ".tsv", text.format("")))


@pytest.mark.parametrize(("ending", "text", "message"), [
    (".csv", 'eng,kin\nOur\rcows,Inka\n', "own.csv, line 2: its quotes cannot be read"),
    (".csv", 'eng,kin\nOur cows,"Inka\nThe river,Amazi\n', "line 3: its quotes cannot be read"),
    (".csv", 'eng,kin\nOur cows,"' + "Inka zacu\n" * 14000, "its quotes cannot be read"),
    (".csv", 'eng,kin\nOur cows,"Inka" zacu\n', "line 2: its quotes cannot be read")])
def test_quotes_that_cannot_be_read_are_one_line(tmp_path, ending, text, message):
    with pytest.raises(UserError, match=message) as e:
        suite_of_file(tmp_path, "pairs", ending, text)
    assert "\n" not in str(e.value)


def test_a_message_says_where_quoted_cells_span_lines(tmp_path, capsys):
    text = "eng,kin\nOur cows,{}Inka\nThe river,Amazi\nThe women,Abagore{}\nA day,Umunsi\n"
    assert len(suite_of_file(tmp_path, "pairs", ".csv", text.format("", "")).rows) == 4
    assert "quotes" not in capsys.readouterr().err
    assert len(suite_of_file(tmp_path, "pairs", ".csv", text.format('"', '"')).rows) == 2
    assert "line breaks within quotes in 1 of 2 rows, the first is row 1" in capsys.readouterr().err


def test_a_question_of_afriqa_without_an_answer_does_not_stop_the_suite(tmp_path):
    rows = [{"question_lang": "Inka zirya iki?", "question_translated": "What do cows eat?",
             "context": "Cows.", "title": "", "answer_pivot": {"text": x}} for x in (["a"], [])]
    suite = suite_of_file(tmp_path, "afriqa", ".jsonl", "".join(json.dumps(x) + "\n" for x in rows))
    assert [gold for _, gold in contexts_and_answers(suite)[0]] == ["a", ""]


def test_a_row_that_a_prompt_cannot_render_is_one_line(tmp_path):
    row = {"flores_passage": "Inka.", "question": None, "correct_answer_num": 1,
           **{f"mc_answer{n}": "a" for n in (1, 2, 3, 4)}}
    with pytest.raises(UserError, match=r"suite belebele, prompt 1, row 1 of .*no attribute") as e:
        contexts_and_answers(suite_of_file(tmp_path, "belebele", ".jsonl", json.dumps(row) + "\n"))
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
        run_eval(home, hypotheses=[f"pairs/eng-kin={tmp_path}"])


@pytest.mark.parametrize(("changes", "message"), [
    ({"metrics": ["acc", "accuracy"]},
     "metrics: accuracy; expected for kind multiple_choice acc, "),
    ({"metrics": []}, "metrics: none; expected for kind multiple_choice"),
    ({"kind": "exact_match", "metrics": ["exact_match"]},
     r"kind exact_match needs \[\[answers\]\]"),
    ({"kind": "choice"}, "not a suite .kind 'choice': expected multiple_choice, exact"),
    ({"shuffle": True}, "not a suite .unknown key shuffle"),
    ({"groups": ["class"]}, "row 1 has no column class; it has text, label"),
    ({"kind": "translation", "metrics": ["BLEU"]}, "row 1 has no column")])
def test_a_suite_that_cannot_be_scored_is_refused_when_it_is_loaded(home, changes, message):
    (home / "mine.jsonl").write_text(json.dumps({"text": "Inka", "label": 0}) + "\n")
    with pytest.raises(UserError, match=message):
        load_suite(suite_file(home, **changes), str(home))


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
    evaluation = run_eval(home, model=str(home / "model"), prompts=["1"], limit=2,
                           max_new_tokens=4, overlap=False,
                           suites=[f"{home}/others.toml={home}/pairs-xyz.tsv"])
    metrics_of = {direction: {r["metric"] for r in evaluation["results"]
                              if r["part"] == direction} for direction in ("eng-xyz", "xyz-eng")}
    assert "language_rate" not in metrics_of["eng-xyz"]
    assert "language_rate" in metrics_of["xyz-eng"]
    assert not any("apostrophe" in r["metric"] for r in evaluation["results"])
    assert capsys.readouterr().err.count("language_rate is left out for xyz") == 1


def test_a_bin_that_cannot_be_read_is_not_reported_as_free_of_contamination(home, tmp_path):
    (tmp_path / "kin.txt").write_text("".join(x + "\n" for x in KIN))
    prepare_text([str(tmp_path / "kin.txt")], home / "model", tmp_path / "bin", unit="line")
    settings = {"model": str(home / "model"), "suites": [], "text": [f"mine={tmp_path}/kin.txt"],
                "trained_on": [str(tmp_path / "bin")], "limit": 2}
    result = run_eval(home, **settings)["contamination"]
    assert (result["read"], result["gone"]) == (settings["trained_on"], [])
    assert result["tests"]["text:mine"]["whole"] == result["tests"]["text:mine"]["items"] > 0
    file = tmp_path / "bin/meta.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer": "another"}))
    result = run_eval(home, **settings)["contamination"]
    assert result == {"read": [], "gone": [f"{tmp_path}/bin (another tokenizer)"], "tests": {}}
    page = (home / "out/report.html").read_text()
    assert "none of the training data could be read" in page and "0.0 %" not in page


@pytest.mark.parametrize(("values", "message"), [
    ({"trained_on": ["none.txt"]}, "none.txt: no such file"),
    ({"hypotheses": ["pairs/eng-kin=none.txt"]}, "none.txt cannot be read"),
    ({"hypotheses": ["pairs/eng-kin=short.txt"]}, "19 lines, pairs/eng-kin has 20"),
    ({"hypotheses": ["pairs/eng-swa=good.txt"]}, "pairs has eng-kin, kin-eng"),
    ({"prompts": ["1", "22"]}, "--prompts 22: no suite has such a prompt"),
    ({"text": ["a/b=good.txt"]}, "--text a/b=good.txt: expected NAME=FILE")])
def test_an_error_of_the_user_is_reported_before_the_model_is_loaded(home, monkeypatch, values,
                                                                     message):
    """There is no such model, which loading would say."""
    monkeypatch.chdir(home)
    with pytest.raises(UserError, match=message):
        run_eval(home, model="no-such-model", **values)


