"""Suites during a run, and the guards that end one: real runs, and wrong guards in one line."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

import eval as evaluating
from evaluation.eval_model import EvalModel
from evaluation.suites import evenly_spaced
from helpers import tiny
from helpers.train_runs import call, make_settings, read_losses, run_ranks, train_command
from runtime import console
from runtime.console import UserError
from runtime.paths import ROOT
from training.early_stopping import EarlyStopping, StopCondition, read_evaluations
from training.setup import load_suites_and_conditions
from training.validation import metric_names

NAMES = {"kin": 1.5, "eng": 2.0, "sib200.acc": 0.4, "sib200.f1": 0.3}


@pytest.mark.parametrize(("text", "now", "broken"), [
    ("eng>+5%", {"eng": 2.11}, "eng>+5%: eng is 2.1100, +5.5% against 2.0000 at step 0"),
    ("eng > +5%", {"eng": 2.09}, ""), ("eng>2.1", {"eng": 2.1}, ""),
    ("eng>2.05", {"eng": 2.1}, "eng>2.05: eng is 2.1000, +5.0% against 2.0000 at step 0"),
    ("kin<-10%", {"kin": 1.34}, "-10.7% against 1.5000"), ("kin<-10%", {"kin": 1.36}, ""),
    ("sib200.acc<0.25", {"sib200.acc": 0.2}, "sib200.acc is 0.2000"),
    ("sib200.acc<.25", {"sib200.acc": 0.25}, ""), ("eng>+5%", {"eng": None}, "eng is not finite"),
    ("eng>+5%", {"kin": 9.0}, "")])  # not measured this time
def test_a_guard_is_broken_beyond_its_value_and_says_by_how_much(text, now, broken):
    said = StopCondition.parse(text).violation(NAMES, now)
    assert broken in said and bool(said) == bool(broken)


@pytest.mark.parametrize("text", ["eng", "eng>", ">5", "eng=5", "eng>5%", "eng>-5%", "eng<+5%",
                                  "eng>+5", "eng>five", "eng>5>6", "eng>1e3", ""])
def test_what_is_no_guard_is_refused_in_one_line(text):
    with pytest.raises(UserError, match=r"--stop-if .*expected NAME>VALUE") as e:
        StopCondition.parse(text)
    assert e.value.code == 2 and "\n" not in str(e.value)


@pytest.mark.parametrize(("stop_if", "words"), [
    ("enk>+5%", "no metric enk; measured are kin, eng"),
    ("pairs<0.1", "no metric pairs; measured are kin, eng, pairs.eng-kin.chrF2[+][+], pairs.kin"),
    ("agreement.f1<0.1", "no metric agreement.f1; measured are kin, eng, agreement.acc, pairs")])
def test_a_guard_on_what_is_not_measured_is_refused_by_name(tmp_path, stop_if, words):
    (tmp_path / "pairs.tsv").write_text(f"eng\tkin\n{tiny.SENTENCES[5]}\t{tiny.SENTENCES[0]}\n")
    with pytest.raises(UserError, match=words) as e:
        load_suites_and_conditions(settings(
            suites=["agreement", f"pairs={tmp_path}/pairs.tsv"], stop_if=[stop_if]))
    assert e.value.code == 2


def settings(**changes):
    from training.settings import Settings

    return Settings(**{"val": ["kin=a.txt", "eng=b.txt"], **changes})


def test_a_suites_bare_name_is_its_main_figure():
    suites, early_stopping = load_suites_and_conditions(
        settings(suites=["agreement"], stop_if=["agreement<0.4"]))
    assert early_stopping.conditions[0].metric == "agreement.acc"
    assert metric_names(suites) == ["agreement.acc"]


@pytest.mark.parametrize(("text", "figures", "words"), [
    ("eng>1.9", {"eng": 2.0}, "eng is 2.0000 before the first step"),
    ("a.acc<-5%", {"a.acc": 0.0}, "is 0 at step 0, so there is no change in percent")])
def test_a_guard_that_step_0_is_beyond_or_that_it_gives_no_measure_for_is_refused(text, figures,
                                                                                  words):
    with pytest.raises(UserError, match=words):
        EarlyStopping.parse([text]).update(0, figures)


def test_a_part_is_spread_over_a_suite():
    assert evenly_spaced(list(range(10)), 4) == [0, 2, 5, 7]
    assert evenly_spaced([1, 2], 5) == evenly_spaced([1, 2], 0) == [1, 2]


def looks(out: Path) -> list[dict]:
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    return [x for x in lines if "bits_per_byte" in x]


def test_a_guard_ends_the_run_which_is_saved_and_says_so_again_until_the_guard_is_another(
    workspace,
):
    """At its step as the run without guards; then on, bit for bit, as if it had never stopped."""
    flags = ["--steps", "12", "--eval-every", "3", "--suites", "agreement", "--suite-items", "10"]
    call(train_command(workspace, "free", *flags))
    free, out = looks(workspace / "free"), workspace / "guarded"
    past = free[1]["bits_per_byte"]["eng"] / free[0]["bits_per_byte"]["eng"] - 1
    assert past < 0, "a tiny model learns, so the guard is on that"
    guard = f"eng<{100 * past / 2:.4f}%"
    said = call(train_command(workspace, "guarded", *flags, "--stop-if", "kin>+50%", guard))
    assert f"stopped at step 3 of 12 by --stop-if {guard}: eng is" in said
    assert f"{past:+.1%} against" in said and "--resume" in said
    found = looks(out)
    assert [x["step"] for x in found] == [0, 3] and guard in found[-1]["stopped"]
    assert {k: v for k, v in found[-1].items() if k != "stopped"} == free[1]
    assert (out / "checkpoints/step-000003").is_dir()
    assert (out / "model/model.safetensors").exists()
    page = (out / "report.html").read_text()
    assert "Stopped at step 3 by --stop-if" in page and "<h2>Suites</h2>" in page
    again = [sys.executable, str(ROOT / "train.py"), "--resume", "--out", str(out)]
    before = (out / "metrics.jsonl").read_text()
    shutil.rmtree(out / "model")  # as if killed between its guard and its model
    assert "nothing to do" not in call(again) and (out / "model/model.safetensors").exists()
    said = call(again)
    assert f"was stopped at step 3 of 12 by --stop-if {guard}" in said and "nothing to do" in said
    assert (out / "metrics.jsonl").read_text() == before
    call([*again, "--stop-if"])  # no guard any more
    assert read_losses(out) == read_losses(workspace / "free")
    assert [x["bits_per_byte"] for x in looks(out)] == [x["bits_per_byte"] for x in free]
    assert "Stopped" not in (out / "report.html").read_text()


def made(folder: Path) -> dict:
    """Settings with two suites of a few items, of a choice and of a translation, and a model for
    them."""
    kin, eng = tiny.SENTENCES[:5], tiny.SENTENCES[5:]
    (folder / "pairs.tsv").write_text(
        "eng\tkin\n" + "".join(f"{e}\t{k}\n" for e, k in zip(eng, kin, strict=True)))
    (folder / "mine.jsonl").write_text("".join(
        json.dumps({"text": x, "label": i % 2}) + "\n" for i, x in enumerate(tiny.SENTENCES)))
    (folder / "mine.toml").write_text(
        'kind = "choose"\nversion = 1\nabout = "test"\nmetrics = ["f1", "acc"]\n'
        'choices = ["kin", "eng"]\ngold = "{{label}}"\n[[data]]\ntest = "mine.jsonl"\n'
        '[[prompts]]\nname = "1"\ntext = "{{text}}"\n[[prompts]]\nname = "2"\ntext = "{{text}}"\n')
    named = {"suites": [f"pairs={folder}/pairs.tsv", str(folder / "mine.toml")],
             "suite_data": str(folder)}
    tiny.folder(folder / "model", "llama32", max_position_embeddings=256)
    return named


def test_suites_in_training_are_what_eval_prints(workspace, tmp_path):
    """Of the same items and prompt, a choice and a translation, with the model that was saved."""
    named = made(tmp_path)
    said = run_ranks(make_settings(
        workspace, "suites", model=str(tmp_path / "model"), steps=2, suite_items=0, **named))
    assert "pairs.eng-kin.chrF2++" in said and "mine.f1" in said
    figures = looks(workspace / "suites")[-1]["suites"]
    evaluating.main(evaluating.Settings(
        model=str(workspace / "suites"), prompts=["1"], max_new_tokens=128, device="cpu",
        out=str(tmp_path / "eval"), overlap=False, **named))
    results = json.loads((tmp_path / "eval/results.json").read_text())["results"]
    theirs = {".".join(filter(None, (r["suite"], r["part"], r["metric"]))): r["value"]
              for r in results}
    assert figures.keys() == theirs.keys()
    for name, value in theirs.items():
        assert figures[name] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_ranks_share_a_suites_items_and_find_the_same_figures(workspace, tmp_path, how):
    """To the last digit, with a part that is no multiple of the ranks; by ddp each asks its own.
    What does not fit the model's short context is said of all."""
    changes = {"model": str(tmp_path / "model"), "steps": 2, "suite_items": 7, **made(tmp_path)}
    tiny.folder(tmp_path / "model", "llama32", max_position_embeddings=64)
    asked = tmp_path / "asked"

    def counts(run):
        def contexts(model, items, *taught_as, real=EvalModel.contexts):
            with open(asked, "a") as file:
                print(run.ranks.world_size, run.ranks.rank, len(items), file=file)
            return real(model, items, *taught_as)

        if run.step == 0:
            EvalModel.contexts = contexts  # between the evaluations at step 0 and at step 2

    said = [run_ranks(make_settings(workspace, f"share-{how}-{n}", shard=word, **changes), n,
                           during=counts) for n, word in ((1, "auto"), (2, how))]
    one, two = ([x["suites"] for x in looks(workspace / f"share-{how}-{n}")] for n in (1, 2))
    assert len(one) == 2 and one == two and len(one[0]) > 10
    cut = [sorted(re.findall("[0-9]+ of [0-9]+ requests do not fit", x)) for x in said]
    assert cut[0] == cut[1] and "5 of 5 requests do not fit" in cut[0]
    found = [tuple(map(int, x.split())) for x in asked.read_text().splitlines()]
    wanted = [(1, 0, 5), (1, 0, 5), (1, 0, 7)]
    sizes_of_ranks = ((3, 3, 4), (2, 2, 3)) if how == "ddp" else ((5, 5, 7), (5, 5, 7))
    wanted += [(2, rank, n) for rank, sizes in enumerate(sizes_of_ranks) for n in sizes]
    assert sorted(found) == sorted(wanted)


def test_a_fault_in_one_ranks_share_is_all_ranks_fault_and_named_as_alone(workspace, tmp_path):
    changes = {"model": str(tmp_path / "model"), "steps": 2, "suite_items": 7, **made(tmp_path)}
    rows = [{"text": x, "label": i % 2, "choices": ["kin", "eng"]}
            for i, x in enumerate(tiny.SENTENCES)]
    rows[1]["choices"] = ["", "eng"]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    suite = tmp_path / "mine.toml"
    suite.write_text('delimiter = ""\n' + suite.read_text().replace('["kin", "eng"]',
                                                                    '"{{choices}}"'))
    for n in (1, 2):
        said = run_ranks(make_settings(workspace, f"fault-{n}", **changes), n, {3})
        assert "error: item 2: the choice '' has no token of its own" in said
        assert "does not answer" not in said


@pytest.mark.parametrize(("changes", "words"), [
    ({"stop_if": ["eng"]}, "expected NAME>VALUE"), ({"suites": ["sib20"]}, "no such suite"),
    ({"suites": ["sib200"]}, "its data are not under --suite-data"),
    ({"suites": ["agreement", "agreement"]}, "agreement is named twice")])
def test_a_wrong_suite_or_guard_is_one_line(changes, words):
    with pytest.raises(UserError, match=words) as e:
        load_suites_and_conditions(settings(**changes))
    assert "\n" not in str(e.value) and e.value.code == 2


def test_a_run_with_a_wrong_guard_does_not_begin(workspace):
    """Without --val the names are known with the sources, still before a step."""
    said = call(train_command(workspace, "wrong", "--steps", "2", "--stop-if", "enk>+5%"), code=2)
    lines = [x for x in said.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1 and "no metric enk; measured are kin, eng" in lines[0]
    assert "Traceback" not in said and not (workspace / "wrong/metrics.jsonl").exists()


def test_a_line_that_was_cut_inside_a_letter_is_left_out(tmp_path):
    """As after a power cut: half of a letter of two bytes is no UTF-8."""
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1, "bits_per_byte": {"kin": 2.0}}\n{"step": 2, "share": {"\xc3')
    assert read_evaluations(file) == {1: {"kin": 2.0}}
    console.Metrics(file, 1).write(2, loss=1.0)
    assert [json.loads(x)["step"] for x in file.read_text().splitlines()] == [1, 2]
