"""Contamination: sentences of tests in training text, in bins and files."""

from __future__ import annotations

import json

import pytest

from helpers.evaluations import ENG, KIN
from preparation import contamination
from runtime.console import UserError


def test_sentences_of_the_training_text_are_found_whole_and_by_runs():
    run = " ".join(f"w{i}" for i in range(13))
    tests = {"a": [["Inka zacu zirya ubwatsi ku musozi."], [f"x {run} y"], ["Inka zacu"],
                   ["nothing of this stands there at all"]]}
    training = ["Ejo. INKA zacu, zirya ubwatsi ku musozi! Yego.", f"before {run} after"]
    counts = contamination.count_contaminated(tests, training)
    assert counts == {"a": {"items": 4, "whole": 1, "run": 1, "any": 2}}
    assert contamination.bins_of_run("nowhere") == ([], [])


def test_each_run_that_a_model_came_from_is_searched_once(tmp_path, monkeypatch):
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


def test_a_sentence_after_the_name_of_a_language_is_found_whole():
    tests = {"a": [["Inka zacu zirya ubwatsi ubu."], ["Abana bo mu rugo baraje. Bose."],
                   ["Amazi y'umugezi ni meza cyane."], ["Ejo nzajya ku isoko kare."]]}
    training = ["English: Our cows eat.\nKinyarwanda: Inka zacu zirya ubwatsi ubu."
                " Ee.\nKinyarwanda: Abana bo mu rugo baraje. Bose.",
                "Kinyarwanda: Ngo: Ejo nzajya ku isoko kare."]
    counts = contamination.count_contaminated(tests, training)
    assert counts["a"] == {"items": 4, "whole": 2, "run": 0, "any": 2}


def test_training_text_is_streamed_by_its_key_and_faults_are_counted(tmp_path):
    """Text under a name of its own with a line that is no UTF-8, conversations, pairs, a list."""
    conversation = {"messages": [{"role": "user", "content": "Bite?"}, {"role": "assistant",
                                                              "content": KIN[1]}]}
    files = {"text.jsonl": json.dumps({"body": KIN[0]}).encode() + b'\n{"body": "\xff"}\n',
             "chat.jsonl": json.dumps(conversation).encode() + b"\n",
             "pairs.tsv": f"en\trw\n{ENG[2]}\t{KIN[2]}\n".encode(),
             "chats.json": json.dumps([conversation, {"messages": [{"content": KIN[3]}]}]).encode()}
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
    specs = [str(tmp_path / x) for x in files]
    contamination.require_text(specs, "auto", "body")
    tests = {"kin": [[x] for x in KIN], "eng": [[x] for x in ENG]}
    training = contamination.TrainingText(specs, None, "auto", "body")
    counts = contamination.count_contaminated(tests, training)
    assert (counts["kin"]["whole"], counts["eng"]["whole"]) == (4, 1)
    assert training.read == specs and training.unread == [f"{specs[0]} (1 undecodable)"]
    (tmp_path / "long.jsonl").write_text(json.dumps({"body": KIN[0]}) + "\nnot JSON\n")
    stream = iter(contamination.TrainingText([str(tmp_path / "long.jsonl")], None, key="body"))
    assert next(stream) == KIN[0]  # the rest is not read yet
    with pytest.raises(UserError, match=r"long\.jsonl, line 2: not JSON"):
        next(stream)
