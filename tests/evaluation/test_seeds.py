"""Several runs of one setting: one row for each figure, with its spread."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import eval as evaluating
from runtime.console import UserError


def write_run(folder: Path, values: dict[str, float], signature: str = "suite:a.1") -> str:
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"model": "m", "results": [
        {"suite": "a", "prompt": "1", "metric": name, "value": value, "signature": signature}
        for name, value in values.items()]}))
    return str(folder)


def test_runs_given_together_are_one_row_with_mean_and_spread(tmp_path, capsys):
    values = [0.5, 0.75, 0.625]
    seeds = [write_run(tmp_path / str(i), {"acc": x, "f1": x / 2} if i else {"acc": x})
             for i, x in enumerate(values)]
    evaluating.main(evaluating.Settings(seeds=seeds, out=str(tmp_path / "out")))
    out, err = capsys.readouterr()
    [row] = json.loads((tmp_path / "out/seeds.json").read_text())["results"]
    assert row["mean"] == np.mean(values)
    assert row["standard_deviation"] == pytest.approx(np.std(values, ddof=1))
    assert (row["lowest"], row["highest"], row["runs"]) == (0.5, 0.75, 3)
    assert "0.6250  0.1250              0.5000 to 0.7500   3" in out
    assert "1 figures are not in all runs" in err


def test_runs_that_are_not_one_setting_are_one_line(tmp_path):
    first = write_run(tmp_path / "1", {"acc": 0.5})
    other = write_run(tmp_path / "2", {"acc": 0.5}, "suite:a.2")
    damaged = write_run(tmp_path / "3", {"acc": 0.5})
    (tmp_path / "3/results.json").write_text("{}")
    for seeds, changes, message in (
            ([first, other], {}, "has the signature suite:a.2, in "),
            ([first], {}, "expected at least two"), ([first, damaged], {}, "is damaged"),
            ([first, str(tmp_path / "none")], {}, "no results.json there"),
            ([first, first], {"model": "m"}, "goes without --model"),
            ([first, write_run(tmp_path / "4", {"f1": 1.0})], {}, "no figure in common")):
        with pytest.raises(UserError, match=message) as e:
            evaluating.main(evaluating.Settings(seeds=seeds, out=str(tmp_path / "o"), **changes))
        assert "\n" not in str(e.value)
