"""Confidence intervals and paired tests by the bootstrap (Efron & Tibshirani 1993, chapter 13).

Items are drawn with replacement, their counts are added, and the metric is computed from the sums.
Two systems are compared on the same draws, which makes the test of their difference a paired test
(Koehn 2004), as in sacrebleu.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evaluation.metrics import Measure

RESAMPLES, SEED = 1000, 12345  # sacrebleu's defaults


def bootstrap(measures: Sequence[Measure]) -> np.ndarray:
    """Return the metrics of RESAMPLES draws of the items, (RESAMPLES, measures); every measure is
    taken of the same draws."""
    n_items = len(measures[0].counts)
    assert all(len(m.counts) == n_items for m in measures)
    rng = np.random.default_rng(SEED)
    values = np.empty((RESAMPLES, len(measures)))
    for i in range(RESAMPLES):
        drawn = rng.integers(n_items, size=n_items)
        times = np.bincount(drawn, minlength=n_items).astype(np.float64)
        values[i] = [m.of_sums(times @ m.counts) for m in measures]
    return values


def confidence_interval(measures: Sequence[Measure]) -> tuple[float, float] | None:
    """Return the 95 % percentile interval of a metric, or of the mean of several; None for fewer
    than two items."""
    if len(measures[0].counts) < 2:
        return None
    low, high = np.nanpercentile(bootstrap(measures).mean(1), [2.5, 97.5])
    return float(low), float(high)


def paired_test(ours: Measure, baseline: Measure) -> dict[str, float]:
    """Compare two systems on the same items: `difference` (ours minus the baseline), `low` and
    `high` of its 95 % interval, and `p`.

    p is that of sacrebleu's paired bootstrap: how often the difference of a draw is further from
    the mean of all draws than the difference itself, with one draw added.
    """
    values = bootstrap([ours, baseline])
    differences = values[:, 0] - values[:, 1]
    difference = ours.value - baseline.value
    sizes = np.abs(differences)
    beyond = int(np.sum(sizes - sizes.mean() > abs(difference)))
    low, high = np.nanpercentile(differences, [2.5, 97.5])
    p = (beyond + 1) / (RESAMPLES + 1)
    if not differences.any():  # a system compared with itself
        p = 1.0
    return {"difference": difference, "low": float(low), "high": float(high), "p": p}
