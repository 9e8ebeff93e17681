"""Tests reject true null hypotheses as often as they say, and intervals cover: simulated."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation import metrics
from experiments import significance
from helpers import tiny

REFERENCES = [" ".join(tiny.SENTENCES[i : i + 3]) for i in range(len(tiny.SENTENCES) - 3)]
NULLS = 1000
TOLERANCE = 3 * np.sqrt(0.05 * 0.95 / NULLS)  # three standard errors of a share of 5 %


@pytest.fixture(scope="module")
def kinds() -> dict[str, significance.Kind]:
    return significance.kinds(REFERENCES * 12, seed=1)


@pytest.mark.parametrize("name", ["accuracy", "bits per byte"])
def test_5_percent_of_true_null_hypotheses_are_rejected(kinds, name):
    shares = significance.simulate_tests(kinds[name], 400, NULLS, seed=2)
    assert abs(shares["rejected"] - 0.05) < TOLERANCE
    assert shares["interval excludes 0"] == shares["rejected"]
    assert shares["rejected by sacrebleu's p"] > 0.05 + TOLERANCE


def test_single_intervals_cover(kinds):
    share = significance.simulate_intervals(kinds["bits per byte"], 400, NULLS, seed=2)["covered"]
    assert abs(share - 0.95) < TOLERANCE + 0.01


@pytest.mark.parametrize(("name", "metric", "values"), [
    ("chrF++", "chrF2++", significance.chrf), ("BLEU", "BLEU", significance.bleu)])
def test_the_simulated_metrics_are_those_of_sacrebleu(kinds, name, metric, values):
    rng = np.random.default_rng(3)
    of_sums = metrics.translation(metric, REFERENCES, REFERENCES).of_sums
    for n in (200, 500):
        first, second = kinds[name].draw(rng, n)
        assert (first != second).any()
        for counts in (first, second):
            sums = counts.sum(0)
            assert values(sums) == pytest.approx(of_sums(sums), abs=1e-9)
