"""Metrics, results and comparisons: sacrebleu's command, known differences, unfit baselines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import eval as evaluating
from evaluation import metrics
from evaluation.significance import bootstrap, paired_test
from evaluation.suites import load_suite
from evaluation.tasks import TASKS
from helpers import tiny
from helpers.browser import CHROMIUM, browser
from helpers.evaluations import KIN, run_eval, score_hypotheses
from reports.evaluation_report import write_evaluation_report
from reports.model_card import results_section
from runtime.console import UserError


def test_scores_and_signatures_are_those_of_sacrebleus_command(home):
    results = {r["metric"]: r for r in score_hypotheses(home, "good")["results"]}
    stem = home / "good" / "items" / "pairs.eng-kin.file"
    for name, flags in (("chrF2++", ["-m", "chrf", "--chrf-word-order", "2"]),
                        ("chrF2", ["-m", "chrf"]), ("BLEU", ["-m", "bleu"])):
        command = subprocess.run(
            [sys.executable, "-m", "sacrebleu", f"{stem}.ref", "-i", f"{stem}.hyp", *flags, "-w",
             "6"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
        assert command.returncode == 0, command.stderr
        theirs = json.loads(command.stdout)
        assert results[name]["value"] == pytest.approx(theirs["score"], abs=1e-5)
        assert results[name]["signature"].endswith(theirs["signature"])


def test_spbleu_is_that_of_sacrebleus_command_with_any_tokenizer_in_its_place(
        home, tmp_path):
    """FLORES-200's tokenizer has to be fetched; a SentencePiece model of ours stands in for it."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models/flores200sacrebleuspm").write_bytes(tiny.pieces())
    env = {**os.environ, "PYTHONPATH": "", "SACREBLEU": str(tmp_path)}
    command = subprocess.run(
        [sys.executable, Path(evaluating.__file__), "--suites", f"pairs={home}/pairs.tsv",
         "--hypotheses", f"pairs/eng-kin={home}/poor.txt", "--out", tmp_path / "out"],
        capture_output=True, text=True, env=env)
    assert command.returncode == 0, command.stderr
    results = {r["metric"]: r for r in json.loads((tmp_path / "out/results.json").read_text())[
        "results"]}
    stem = tmp_path / "out/items/pairs.eng-kin.file"
    command = subprocess.run(
        [sys.executable, "-m", "sacrebleu", f"{stem}.ref", "-i", f"{stem}.hyp", "-m", "bleu",
         "-tok", "flores200", "-w", "6"], capture_output=True, text=True, env=env)
    assert command.returncode == 0, command.stderr
    theirs = json.loads(command.stdout)
    assert 0 < results["spBLEU"]["value"] == pytest.approx(theirs["score"], abs=1e-5)
    assert results["spBLEU"]["signature"].endswith(theirs["signature"])
    assert "tok:flores200" in theirs["signature"]
    assert abs(results["spBLEU"]["value"] - results["BLEU"]["value"]) > 0.1


def test_the_draws_and_the_score_are_those_of_sacrebleus_paired_test(home):
    from sacrebleu.metrics import CHRF
    from sacrebleu.significance import PairedTest

    hypotheses = [(home / f"{x}.txt").read_text().splitlines() for x in ("poor", "good")]
    systems = [("poor", hypotheses[0]), ("good", hypotheses[1])]
    _, scores = PairedTest(systems, {"chrF": CHRF()}, [KIN * 4], test_type="bs", n_samples=1000)()
    theirs = scores["chrF2"][1]
    poor, good = (metrics.translation("chrF2", x, KIN * 4) for x in hypotheses)
    values = bootstrap([good, poor])
    distances = np.abs(values[:, 0] - values[:, 1])
    difference = good.value - poor.value
    beyond = np.sum(distances - distances.mean() > abs(difference))  # sacrebleu's p
    assert good.value == pytest.approx(theirs.score)
    assert (beyond + 1) / 1001 == pytest.approx(theirs.p_value, abs=0.003)
    score_hypotheses(home, "poor")
    evaluation = score_hypotheses(home, "good", baseline=str(home / "poor"))
    ours = {r["metric"]: r for r in evaluation["results"]}["chrF2"]["baseline"]
    assert ours["difference"] == pytest.approx(difference)
    assert 0 < ours["low"] < ours["difference"] < ours["high"] and ours["p"] < 0.05


@pytest.mark.parametrize("seed", range(40))
def test_an_interval_excludes_0_exactly_if_p_is_at_most_5_percent(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 200))
    ours = metrics.mean("acc", rng.random(n) < 0.55)
    baseline = metrics.mean("acc", rng.random(n) < 0.45)
    comparison = paired_test([ours], [baseline])
    excludes_0 = comparison["low"] > 0 or comparison["high"] < 0
    assert excludes_0 == (comparison["p"] <= 0.05)
    assert comparison["low"] <= comparison["difference"] <= comparison["high"]


def test_p_is_close_to_that_of_a_permutation_test():
    rng = np.random.default_rng(5)
    right = rng.random((500, 2)) < np.array([0.50, 0.53])
    ours, baseline = (metrics.mean("acc", right[:, i]) for i in (1, 0))
    difference = right[:, 1].mean() - right[:, 0].mean()
    signs = rng.choice([-1, 1], (20_000, 500))
    permuted = signs @ (right[:, 1].astype(float) - right[:, 0]) / 500
    p = (np.abs(permuted) >= abs(difference) - 1e-12).mean()
    assert 0.01 < p < 0.3
    assert paired_test([ours], [baseline])["p"] == pytest.approx(p, abs=0.03)


def test_a_mean_over_prompts_is_tested_as_the_mean_of_each_item():
    rng = np.random.default_rng(7)
    ours, baseline = rng.random((3, 200)) < 0.6, rng.random((3, 200)) < 0.5  # (prompts,items)
    comparison = paired_test(*([metrics.mean("acc", prompt) for prompt in system]
                               for system in (ours, baseline)))
    of_items = paired_test([metrics.mean("acc", ours.mean(0))],
                           [metrics.mean("acc", baseline.mean(0))])
    assert comparison == pytest.approx(of_items, abs=1e-12)
    assert 0 < comparison["p"] < 0.05


def test_the_mean_over_prompts_is_compared_with_a_baseline_that_has_all_prompts(home, capsys):
    (home / "sib.tsv").write_text("index_id\tcategory\ttext\n" + "".join(
        f"{i}\t{category}\t{text}\n" for i, (category, text) in
        enumerate(zip(["health", "sports", "travel"], KIN, strict=False))))
    settings = {"model": str(home / "model"), "suites": [f"sib200={home}/sib.tsv"],
                "overlap": False}
    for prompts, name in ((["1", "2"], "both"), (["1"], "one")):
        run_eval(home, **settings, prompts=prompts, out=str(home / name))
    capsys.readouterr()
    both, one = (run_eval(home, **settings, prompts=["1", "2"], baseline=str(home / name))
                 for name in ("both", "one"))
    means = [r for r in both["results"] if "prompts" in r]
    assert [r["metric"] for r in means] == ["f1", "acc"]
    assert all(r["baseline"]["value"] == r["value"] and r["baseline"]["p"] == 1 for r in means)
    assert means[1]["chance"] == pytest.approx(1 / 7)
    printed = capsys.readouterr()
    assert f"6 comparisons with {home}/model. Between equal models" in printed.out
    assert not any("baseline" in r for r in one["results"] if "prompts" in r)
    assert "sib200 acc: the baseline has 1 of 2 prompts, so the mean is not compared" in printed.err


def test_chance_is_what_guessing_gives():
    rng = np.random.default_rng(11)
    n_choices = rng.integers(2, 5, 600)
    gold = (rng.random(600) ** 2 * n_choices).astype(int)  # classes are not equally frequent
    accuracies, f1s = [], []
    for _ in range(200):
        guesses = (rng.random(600) * n_choices).astype(int)
        accuracy = metrics.accuracy("acc", guesses == gold, n_choices)
        f1 = metrics.weighted_f1(gold, guesses, n_choices)
        accuracies.append(accuracy.value)
        f1s.append(f1.value)
    assert accuracy.chance == pytest.approx((1 / n_choices).mean())
    assert accuracy.chance == pytest.approx(np.mean(accuracies), abs=0.005)
    assert f1.chance == pytest.approx(np.mean(f1s), abs=0.005)
    few = n_choices == 2
    assert accuracy.subset(few).chance == 0.5 and metrics.mean("eos_rate", [1.0]).chance is None


def test_one_item_proves_nothing():
    comparison = paired_test([metrics.mean("acc", [1.0])], [metrics.mean("acc", [0.0])])
    assert comparison == {"difference": 1.0, "low": 0.0, "high": 2.0, "p": 1.0}


def test_a_system_does_not_differ_from_itself(home):
    score_hypotheses(home, "good")
    again = score_hypotheses(home, "good", baseline=str(home / "good"))["results"]
    for r in again:
        assert (r["baseline"]["difference"], r["baseline"]["p"]) == (0.0, 1.0), r["metric"]


def test_known_differences_have_the_right_sign_and_interval():
    rng = np.random.default_rng(3)
    base = rng.random(400) < 0.5
    better = base | (rng.random(400) < 0.2)
    comparison = paired_test([metrics.mean("acc", better)], [metrics.mean("acc", base)])
    assert comparison["low"] > 0.05 and comparison["high"] < 0.2 and comparison["p"] < 0.01
    assert comparison["difference"] == pytest.approx(better.mean() - base.mean())
    reverse = paired_test([metrics.mean("acc", base)], [metrics.mean("acc", better)])
    assert reverse["difference"] == -comparison["difference"] and reverse["high"] < 0
    noise = paired_test([metrics.mean("acc", rng.random(400) < 0.5)],
                        [metrics.mean("acc", rng.random(400) < 0.5)])
    assert noise["low"] < 0 < noise["high"] and noise["p"] > 0.01


def test_weighted_f1_is_the_formula_of_scikit_learn():
    gold, predictions = [0, 1, 2, 2, 1, 0, 2, 3], [0, 2, 2, 2, 1, 1, 0, 2]
    # what f1_score(gold, predictions, average="weighted") of scikit-learn 1.9.1 returns
    value = metrics.weighted_f1(gold, predictions).value
    assert value == pytest.approx(0.4642857142857143, abs=1e-15)


def test_a_model_is_measured_on_a_suite_and_the_report_shows_it(home, capsys):
    evaluation = run_eval(home, model=str(home / "model"), max_new_tokens=8, limit=3,
                           overlap=False, prompts=["1"])
    assert {r["part"] for r in evaluation["results"]} == {"eng-kin", "kin-eng"}
    assert all(r["partial"] and "|limit:3|" in r["signature"] for r in evaluation["results"])
    assert {"eos_rate", "copy_rate", "language_rate", "length_ratio"} <= {
        r["metric"] for r in evaluation["results"]}
    assert "PARTIAL: 3 items only" in capsys.readouterr().out
    summary, all_results, signatures = results_section(home / "out/results.json").split("<details>")
    shown = [x.split(" | ")[:3] for x in all_results.splitlines() if " | " in x]
    rows = shown[2:]
    assert len({*map(tuple, rows)}) == len(rows) == len(evaluation["results"])  # all different
    assert len([x for x in summary.splitlines() if x.startswith("| pairs (PARTIAL)")]) == 2
    for r in evaluation["results"]:
        assert signatures.count(r["signature"] + "\n") == 1 and r["signature"] not in summary
    names = {p.name for p in (home / "out" / "items").iterdir()}
    assert "pairs.eng-kin.1.PARTIAL.hyp" in names
    page = (home / "out" / "report.html").read_text()
    assert "PARTIAL: only the first items" in page and "Best translations" in page
    assert "http" not in page.replace("http://www.w3.org", "")  # nothing is fetched
    assert write_evaluation_report(home / "out").exists()


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="no chromium here to open the page")
def test_a_comparison_fits_on_a_phone(home, tmp_path):
    """No table is wider than its place on a screen of 390 points: no difference is hidden."""
    score_hypotheses(home, "poor")
    score_hypotheses(home, "good", baseline=str(home / "poor"))
    with browser(tmp_path / "profile") as tab:
        tab.open((home / "good" / "report.html").as_uri(), 390)
        hidden = tab.run("[...document.querySelectorAll('.wide')]"
                         ".map(x => x.scrollWidth - x.clientWidth)")
    assert len(hidden) >= 2 and max(hidden) <= 1


def test_a_text_with_lm_eval_compat_is_not_compared_with_one_without(home):
    (home / "text.txt").write_text("Inka zacu.\n\nAbana baraje.\n")
    settings = {"model": str(home / "model"), "suites": [], "text": [f"mine={home}/text.txt"]}
    run_eval(home, **settings, out=str(home / "as-it-is"))
    with pytest.raises(UserError, match="mine has compat none there and lm-eval"):
        run_eval(home, **settings, lm_eval_compat=True, baseline=str(home / "as-it-is"))
    with pytest.raises(UserError, match="--chat-template: goes with --model and --suites"):
        run_eval(home, **settings, chat_template=True)


def test_a_baseline_of_another_version_or_of_other_items_is_refused(home):
    score_hypotheses(home, "good")
    file = home / "good" / "results.json"
    text = file.read_text()
    file.write_text(text.replace("suite:pairs.1|", "suite:pairs.2|"))
    with pytest.raises(UserError, match=r"has suite pairs\.2 there and pairs\.1 here"):
        score_hypotheses(home, "poor", baseline=str(home / "good"))
    file.write_text(text.replace("version:2", "version:1"))
    with pytest.raises(UserError, match="has version 1 there and 2 here"):
        score_hypotheses(home, "poor", baseline=str(home / "good"))
    file.write_text(text)
    with pytest.raises(UserError, match="other items"):
        score_hypotheses(home, "poor", baseline=str(home / "good"), limit=3)


def test_without_its_tokenizer_spbleu_is_refused_in_one_line(home, no_spbleu):
    with pytest.raises(UserError, match="its tokenizer is not on this machine"):
        metrics.translation("spBLEU", ["a"], ["a"])
    records = [{"source": "a b", "reference": "c d", "hypothesis": "c", "end": "eos"}] * 2
    suite = load_suite("pairs", str(home))
    assert "spBLEU" in suite.metrics
    assert not any("spBLEU" in m.name for m in suite.task(suite.prompts[0]).metrics(records))


def test_every_metric_that_a_suite_may_ask_for_is_computed(home, no_spbleu):
    pairs = load_suite(f"pairs={home}/pairs.tsv")
    for task_type in TASKS:
        pairs.metrics, pairs.answers = list(task_type.known_metrics), [{"name": "whole"}]
        names = task_type(pairs, pairs.prompts[0]).metric_names()
        assert set(task_type.known_metrics) - {"spBLEU"} <= set(names)


def test_line_breaks_of_unicode_do_not_split_records(home):
    lines = (home / "good.txt").read_text().split("\n")
    lines[:3] = [f"{x} a{sign}b" for x, sign in zip(lines, "\x85\u2028\u2029", strict=False)]
    (home / "ends.txt").write_text("\n".join(lines))
    score_hypotheses(home, "ends")
    assert write_evaluation_report(home / "ends").exists()
    results = score_hypotheses(home, "ends", baseline=str(home / "ends"))["results"]
    assert {r["baseline"]["difference"] for r in results} == {0.0}


def test_a_baseline_that_does_not_fit_is_refused_before_measuring(home, tmp_path):
    (home / "asked.txt").write_text("Inka zacu.\n\nAbana baraje.\n")
    (home / "broken.jsonl").write_text('{"body": "Inka"}\n')
    settings = {"model": str(home / "model"), "prompts": ["1"], "max_new_tokens": 2, "limit": 2,
                "text": [f"mine={home}/asked.txt"]}
    baseline_folder = str(home / "before")
    run_eval(home, **settings, out=baseline_folder)
    evaluation = run_eval(home, **settings, baseline=baseline_folder,
                           hypotheses=[f"pairs/eng-kin={home}/good.txt"])
    assert all("baseline" in r for r in evaluation["results"] if r["metric"] not in ("eos_rate",))
    assert evaluation["results"][-1]["prompt"] == "file"
    for values, message in (
            ({"limit": 3}, "pairs.eng-kin.1 was measured on other items .2 there, 3"),
            ({"beams": 2}, "has beams 1 there and 2 here"),
            ({"max_new_tokens": 3}, "has new 2 there and 3 here"),
            ({"documents": "file"}, "text.mine has unit block there and file here"),
            ({"trained_on": [f"{home}/broken.jsonl"]}, "no text under 'text'")):
        with pytest.raises(UserError, match=message):
            run_eval(home, **{**settings, **values}, baseline=baseline_folder,
                      out=str(tmp_path / "out"))
        assert not (tmp_path / "out/items").exists(), "records were written, so it was measured"


def test_a_message_says_that_spbleu_is_left_out_for_hypotheses(home, no_spbleu,
                                                                             capsys):
    score_hypotheses(home, "good")
    assert "spBLEU is left out" in capsys.readouterr().err
