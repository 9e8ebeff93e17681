"""Check that the intervals and tests of evaluation/significance.py have the error rates they claim.

    python -m experiments.significance [--nulls 10000] [--seed 1] [--texts FOLDER]

A null is a pair of systems that do not differ: each item gives both of them a result from the same
distribution. A test at level 0.05 should reject 5 % of such pairs. For single intervals the share
is counted that contains the metric of the whole population from which the items were drawn.

    accuracy        answers that are right with probability 0.4 to 0.6, correlated between systems
    bits per byte   documents with log-normal lengths as spread as those of Kinyarwanda news (sigma
                    0.6), and rates that differ between documents more than between systems
    bits per byte of uneven documents    the same with lengths of sigma 1: news beside laws
    chrF++, BLEU    FLORES-200 devtest: references with words that are dropped, doubled, exchanged
                    or misspelled at random, each system with its own errors

The seed, 1, and the bounds in docs/evaluation.md were written down before the first run. Figures
are written to experiments/significance.json after each kind and number of items; those that are
there are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from evaluation import metrics
from evaluation.significance import LEVEL, percentile_interval, resample_weights, two_sided
from runtime.paths import ROOT

FLORES = ROOT.parent / "shared/data/eval/flores200"
RESULTS = ROOT / "experiments/significance.json"
SIZES = (100, 400, 1000)  # items of a paired test
INTERVAL_SIZES = (67, 400)  # items of a single interval
VARIANTS = 8  # translations of each reference, of which each system gets one
POPULATION = 200_000  # items from which those of one simulated evaluation are drawn
BATCH = 25  # nulls that are computed together
SIGMAS = (0.6, 1.0)  # of the logarithm of the lengths of documents
ORDERS = 8  # of chrF++: characters 1 to 6, words 1 and 2


@dataclass(frozen=True)
class Kind:
    """A metric that is simulated. `draw(rng, n)` gives the counts of two systems on n items,
    (n,k) each; `values` the metrics of sums (...,k); `population` the counts (N,k) of all items
    of one system."""

    draw: Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]
    values: Callable[[np.ndarray], np.ndarray]
    population: np.ndarray


def ratio(sums: np.ndarray) -> np.ndarray:
    """The first of two sums over the second, (...,2) -> (...)."""
    return sums[..., 0] / sums[..., 1]


def bits_per_byte(sums: np.ndarray) -> np.ndarray:
    """Bits per byte of sums of nats and bytes, (...,2) -> (...)."""
    return ratio(sums) / math.log(2)


def chrf(sums: np.ndarray, beta: float = 2.0) -> np.ndarray:
    """chrF++ of sums of n-gram counts, (...,24) -> (...), as sacrebleu for a corpus in which every
    order has n-grams (Popovic 2017)."""
    n_hypothesis, n_reference, n_match = np.moveaxis(
        sums.reshape(*sums.shape[:-1], ORDERS, 3), -1, 0)
    precision = (n_match / n_hypothesis).mean(-1)
    recall = (n_match / n_reference).mean(-1)
    return 100 * (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU of sums of lengths and n-gram counts, (...,10) -> (...), as sacrebleu where every order
    has a match (Papineni et al. 2002)."""
    length, reference_length = sums[..., 0], sums[..., 1]
    correct, total = sums[..., 2:6], sums[..., 6:10]
    brevity = np.minimum(0.0, 1 - reference_length / length)
    return 100 * np.exp(brevity + np.log(correct / total).mean(-1))


def draw_accuracy(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Right answers of two systems: items have difficulties, so the systems are correlated."""
    probability = rng.uniform(0.4, 0.6) + 0.35 * rng.choice([-1, 1], (n, 1))
    right = rng.random((n, 2)) < probability
    return tuple(np.stack([right[:, i], np.ones(n)], 1).astype(np.float64) for i in (0, 1))


def draw_documents(rng: np.random.Generator, n: int,
                   sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Nats and bytes of documents under two systems; `sigma`: of the logarithm of their lengths."""
    n_bytes = np.maximum(20, rng.lognormal(7.7, sigma, n)).round()
    rate = rng.lognormal(0, 0.25, n)[:, None] * rng.lognormal(0, 0.05, (n, 2))  # nats a byte
    return tuple(np.stack([n_bytes * rate[:, i], n_bytes], 1) for i in (0, 1))


def corrupt(rng: random.Random, sentence: str) -> str:
    """A sentence with errors like those of a weak translator."""
    words = []
    error_rate = rng.betavariate(2, 4)  # differs between sentences
    for word in sentence.split():
        draw = rng.random() / error_rate
        if draw < 0.3:
            continue
        if draw < 0.5:
            word = word[: max(1, len(word) // 2)]
        elif draw < 0.7 and words:
            words.insert(-1, word)
            continue
        elif draw < 0.9:
            i = rng.randrange(len(word))
            word = word[:i] + rng.choice("aeiou") + word[i + 1 :]
        elif draw < 1.0:
            words.append(word)
        words.append(word)
    return " ".join(words) or "a"


def translation_counts(name: str, references: Sequence[str], seed: int) -> np.ndarray:
    """sacrebleu's counts of VARIANTS corrupted copies of each reference, (N,VARIANTS,k)."""
    rng = random.Random(seed)
    variants = [[corrupt(rng, x) for x in references] for _ in range(VARIANTS)]
    return np.stack([metrics.translation(name, x, references).counts for x in variants], 1)


def translation_kind(name: str, values: Callable[[np.ndarray], np.ndarray],
                     references: Sequence[str], seed: int) -> Kind:
    """The simulation of a translation metric."""
    counts = translation_counts(name, references, seed)

    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        sentences = rng.integers(len(counts), size=n)
        variants = rng.permuted(np.tile(np.arange(VARIANTS), (n, 1)), axis=1)
        return counts[sentences, variants[:, 0]], counts[sentences, variants[:, 1]]

    return Kind(draw, values, counts.reshape(-1, counts.shape[-1]))


def kinds(references: Sequence[str], seed: int) -> dict[str, Kind]:
    """All metrics that are simulated."""
    rng = np.random.default_rng(seed)
    right = np.stack([rng.random(POPULATION) < 0.45, np.ones(POPULATION)], 1).astype(np.float64)
    news, uneven = [Kind(draw, bits_per_byte, draw(rng, POPULATION)[0])
                    for draw in (partial(draw_documents, sigma=sigma) for sigma in SIGMAS)]
    return {"accuracy": Kind(draw_accuracy, ratio, right), "bits per byte": news,
            "bits per byte of uneven documents": uneven,
            "chrF++": translation_kind("chrF2++", chrf, references, seed),
            "BLEU": translation_kind("BLEU", bleu, references, seed)}


def all_weights(n: int) -> np.ndarray:
    """The weights of all draws, (resamples, n)."""
    return np.concatenate(list(resample_weights(n)))


def simulate_tests(kind: Kind, n: int, nulls: int, seed: int) -> dict[str, float]:
    """The shares of true null hypotheses that are rejected: by our p, and by sacrebleu's."""
    rng = np.random.default_rng([seed, n])
    weights = all_weights(n)
    rejected, rejected_by_sacrebleu, excluded = 0, 0, 0
    for start in range(0, nulls, BATCH):
        pairs = [kind.draw(rng, n) for _ in range(min(BATCH, nulls - start))]
        counts = np.stack([np.stack(pair, 1) for pair in pairs], 1)  # (n,nulls,2,k)
        k = counts.shape[-1]
        sums = (weights @ counts.reshape(n, -1)).reshape(len(weights), -1, 2, k)
        values = kind.values(sums)  # (resamples,nulls,2)
        differences = values[..., 0] - values[..., 1]
        observed = kind.values(counts.sum(0))
        difference = observed[:, 0] - observed[:, 1]
        p, half_width = two_sided(differences, difference)
        rejected += int((p <= LEVEL).sum())
        excluded += int((np.abs(difference) > half_width).sum())
        sizes = np.abs(differences)
        beyond = (sizes - sizes.mean(0) > np.abs(difference)).sum(0)
        rejected_by_sacrebleu += int(((beyond + 1) / (len(weights) + 1) <= LEVEL).sum())
    return {"rejected": rejected / nulls, "interval excludes 0": excluded / nulls,
            "rejected by sacrebleu's p": rejected_by_sacrebleu / nulls}


def simulate_intervals(kind: Kind, n: int, nulls: int, seed: int) -> dict[str, float]:
    """The share of single intervals that contain the metric of the population."""
    rng = np.random.default_rng([seed, n, 1])
    weights = all_weights(n)
    target = kind.values(kind.population.sum(0))
    covered = 0
    for start in range(0, nulls, BATCH):
        batch = min(BATCH, nulls - start)
        counts = kind.population[rng.integers(len(kind.population), size=(n, batch))]
        sums = (weights @ counts.reshape(n, -1)).reshape(len(weights), batch, -1)
        low, high = percentile_interval(kind.values(sums))
        covered += int(((low <= target) & (target <= high)).sum())
    return {"covered": covered / nulls}


def read_references(folder: Path) -> list[str]:
    """FLORES-200 devtest in Kinyarwanda."""
    file = folder / "devtest.kin.txt"
    if not file.exists():
        sys.exit(f"{file}: not there; name the folder of devtest.kin.txt with --texts")
    return file.read_text(encoding="utf-8").splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nulls", type=int, default=10_000, help="pairs of equal systems a row")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--texts", type=Path, default=FLORES, help="folder of devtest.kin.txt")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, kind in kinds(read_references(options.texts), options.seed).items():
        jobs = [("test", n, simulate_tests) for n in SIZES]
        jobs += [("interval", n, simulate_intervals) for n in INTERVAL_SIZES]
        for what, n, simulate in jobs:
            key = f"{what}, {name}, {n} items"
            if key not in results:
                results[key] = {"nulls": options.nulls, "seed": options.seed,
                                **simulate(kind, n, options.nulls, options.seed)}
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(key, results[key], flush=True)


if __name__ == "__main__":
    main()
