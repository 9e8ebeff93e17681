"""Evaluations in this process, for tests: eval.py's results.json as a dict."""

from __future__ import annotations

import json
from pathlib import Path

import eval as evaluating
from helpers import tiny

KIN = [x for x in tiny.SENTENCES if x.split()[0] in ("Umugore", "Abana", "Ejo", "Inka", "Amazi")]
ENG = tiny.SENTENCES[5:]


def run_eval(home: Path, **values) -> dict:
    """Run eval.py, by default on the suite `pairs` of the fixture `home`; return results.json."""
    values = {"device": "cpu", "out": str(home / "out"), "suites": [f"pairs={home}/pairs.tsv"],
              **values}
    evaluating.main(evaluating.Settings(**values))
    return json.loads((Path(values["out"]) / "results.json").read_text())


def score_hypotheses(home: Path, name: str, **values) -> dict:
    """Score the translations in NAME.txt; the results go to the folder NAME."""
    return run_eval(home, out=str(home / name), hypotheses=[f"pairs/eng-kin={home}/{name}.txt"],
                    **values)
