"""Confidence intervals and paired tests by the bootstrap (Efron & Tibshirani 1993, chapter 13).

Items are drawn with replacement, their counts are added, and the metric is computed from the sums.
Two systems are compared on the same draws, which makes the test of their difference a paired test
(Koehn 2004).

The p-value is not that of sacrebleu, which compares |d*| - mean |d*| with |d|: that is one-sided in
effect and rejects a true null hypothesis about twice as often as it says. `python -m
experiments.significance` simulates both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from evaluation.metrics import Measure

RESAMPLES, SEED = 1000, 12345  # sacrebleu's defaults
LEVEL = 0.05  # of a test; an interval has 1 - LEVEL
WEIGHTS_IN_MEMORY = 1 << 22  # numbers of the draws that are in memory together


def resample_weights(n_items: int, resamples: int = RESAMPLES) -> Iterator[np.ndarray]:
    """How often each item is in each draw: blocks (draws, n_items), together `resamples` draws.

    The draws depend on the number of items only, so two systems have the same.
    """
    rng = np.random.default_rng(SEED)
    rows = max(1, WEIGHTS_IN_MEMORY // n_items)
    for start in range(0, resamples, rows):
        draws = [rng.integers(n_items, size=n_items) for _ in range(start, resamples)[:rows]]
        yield np.array([np.bincount(x, minlength=n_items) for x in draws], np.float64)


def bootstrap(measures: Sequence[Measure], resamples: int = RESAMPLES) -> np.ndarray:
    """The metrics of each draw of the items, (resamples, measures); every measure is taken of the
    same draws."""
    n_items = len(measures[0].counts)
    assert all(len(m.counts) == n_items for m in measures)
    blocks = []
    for weights in resample_weights(n_items, resamples):
        blocks.append(np.array([[m.of_sums(sums) for sums in weights @ m.counts]
                                for m in measures]).T)
    return np.concatenate(blocks)


def confidence_interval(measures: Sequence[Measure]) -> tuple[float, float] | None:
    """The 95 % percentile interval of a metric, or of the mean of several; None for fewer than two
    items."""
    if len(measures[0].counts) < 2:
        return None
    low, high = percentile_interval(bootstrap(measures).mean(1))
    return float(low), float(high)


def percentile_interval(values: np.ndarray) -> np.ndarray:
    """The 95 % interval of the metrics of draws, (resamples,...) -> (2,...)."""
    return np.nanpercentile(values, [100 * LEVEL / 2, 100 - 100 * LEVEL / 2], axis=0)


def two_sided(differences: np.ndarray, difference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The p-value of a difference (...), and half the width of its 95 % interval, from the
    differences of draws (resamples,...).

    p is the share of draws whose difference is at least as far from the mean of all draws as the
    observed difference is from 0. The observed sample counts as one draw, so p is never 0. The half
    width is the distance at which p reaches 0.05. The interval therefore excludes 0 exactly if p is
    at most 0.05.
    """
    n = len(differences)
    distances = np.abs(differences - differences.mean(0))
    p = ((distances >= np.abs(difference)).sum(0) + 1) / (n + 1)
    rank = int(LEVEL * (n + 1))  # with this many draws at least as far, p is just above LEVEL
    assert rank >= 1, "too few draws for this level"
    half_width = np.sort(distances, axis=0)[-rank]
    return p, half_width


def paired_test(ours: Sequence[Measure], baseline: Sequence[Measure]) -> dict[str, float]:
    """Compare two systems on the same items: `difference` (ours minus the baseline), `low` and
    `high` of its 95 % interval, and the two-sided `p`.

    With several measures (one for each prompt) their means are compared. One item says nothing
    about other items: p is then 1, and the interval ends at 0.
    """
    n = len(ours)
    assert len(baseline) == n
    difference = float(np.mean([m.value for m in ours]) - np.mean([m.value for m in baseline]))
    p, half_width = 1.0, abs(difference)
    if len(ours[0].counts) > 1:
        values = bootstrap([*ours, *baseline])
        differences = values[:, :n].mean(1) - values[:, n:].mean(1)
        # a draw of documents without text has no bits per byte
        differences = differences[np.isfinite(differences)]
        if len(differences) > RESAMPLES / 2:
            p, half_width = map(float, two_sided(differences, np.array(difference)))
    return {"difference": difference, "low": difference - half_width,
            "high": difference + half_width, "p": p}
