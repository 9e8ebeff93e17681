"""Scores of other programs: the files that these programs write, and their place in the table."""

from __future__ import annotations

import json

import pytest

from evaluation.segment_scores import read_scores
from helpers.evaluations import KIN, score_hypotheses
from runtime.console import UserError

N = 4 * len(KIN)
VALUES = [round(0.5 + 0.01 * i, 4) for i in range(N)]


def test_the_files_that_programs_write_are_read_alike(tmp_path):
    lines = "".join(f"sys.txt\tSegment {i}\tscore: {x:.4f}\n" for i, x in enumerate(VALUES))
    rows = [{"src": "a", "mt": "b", "ref": "c", "COMET": x} for x in VALUES]
    metricx = [{"source": "a", "hypothesis": "b", "reference": "c", "prediction": x}
               for x in VALUES]
    files = {
        "numbers.txt": "".join(f"{x}\r\n" for x in VALUES),
        "comet.txt": f"{lines}sys.txt\tscore: 0.6000\n",
        "comet.json": json.dumps({"sys.txt": rows}, indent=4),
        "metricx.jsonl": "".join(json.dumps(x) + "\n" for x in metricx),
        "raters.tsv": "rater\tscore\n" + "".join(f"R\t{x}\n" for x in VALUES),
        "named.tsv": "QE\tscore\n" + "".join(f"{x}\t0\n" for x in VALUES)}
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode())
        assert read_scores(tmp_path / name, "QE", N) == VALUES, name


@pytest.mark.parametrize(("name", "text", "message"), [
    ("a.txt", "1\n2\n", r"2 scores, expected 3, one for each segment"),
    ("a.txt", "1\n2\n3\n4\n", r"4 scores, expected 3"),
    ("a.txt", "", "0 scores"), ("a.txt", "1\nnan\n2\n", "score 2 is nan, expected a finite"),
    ("a.txt", "1\n2\n-inf\n", "score 3 is -inf"), ("a.txt", "1\n\n2\n", "score 2 is '', expected"),
    ("a.txt", "1\n1e999\n2\n", "score 2 is 1e999, expected a finite"),
    ("a.txt", "x\n1\n2\n", "score 1 is 'x', expected a number"),
    ("a.txt", "s\tSegment 0\tscore: 1\ns\tSegment 2\tscore: 1\n", "line 2: expected segment 1"),
    ("a.json", "{", "expected the output of comet-score --to_json"),
    ("a.json", '{"a": [], "b": []}', "score one file at a time"),
    ("a.jsonl", '{"x": 1}\n', "no column QE, score, COMET, prediction; it has x"),
    ("a.jsonl", '{"score": true}\n' * 3, "score 1 is 'True', expected a number"),
    ("a.txt", None, "cannot be read")])
def test_a_file_of_scores_that_does_not_fit_is_one_line(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as e:
        read_scores(tmp_path / name, "QE", 3)
    assert "\n" not in str(e.value)


def test_scores_join_the_table_with_interval_and_paired_test(home):
    (home / "a.txt").write_text("".join(f"{x}\n" for x in VALUES))
    (home / "b.txt").write_text("".join(f"{x + 0.1 + 0.001 * (i % 3)}\n"
                                        for i, x in enumerate(VALUES)))
    first = score_hypotheses(home, "poor", scores=[f"COMET={home}/a.txt",
                                                   f"MetricX-24={home}/a.txt"])["results"]
    comet = next(r for r in first if r["metric"] == "COMET")
    assert comet["value"] == pytest.approx(sum(VALUES) / N) and comet["n"] == N
    assert comet["low"] < comet["value"] < comet["high"]
    second = score_hypotheses(home, "good", scores=[f"pairs/eng-kin/COMET={home}/b.txt"],
                              baseline=str(home / "poor"))["results"]
    comparison = next(r for r in second if r["metric"] == "COMET")["baseline"]
    assert comparison["difference"] == pytest.approx(0.101, abs=2e-3) and comparison["p"] < 0.01
    assert {r["metric"] for r in first} - {r["metric"] for r in second} == {"MetricX-24"}


@pytest.mark.parametrize(("specs", "message"), [
    (["COMET"], "expected NAME=FILE"), (["bleu=a.txt"], "the name bleu is taken"),
    (["COMET=a.txt", "comet=a.txt"], "the name comet is taken"),
    (["flores/eng-kin/COMET=a.txt"], r"expected SUITE/PART/NAME=FILE, .*\(pairs/eng-kin\)")])
def test_a_name_of_scores_that_does_not_fit_is_one_line(home, specs, message):
    with pytest.raises(UserError, match=message) as e:
        score_hypotheses(home, "good", scores=specs)
    assert e.value.code == 2
