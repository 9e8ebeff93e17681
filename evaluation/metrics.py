"""Figures with intervals: what is counted of each item, and the figure that a sum of counts gives.

The one idea: every figure here is a function of a sum over items (documents, questions, sentences).

    bits per byte    nats, bytes                      sum of nats / sum of bytes / ln 2
    accuracy         right, 1                         sum / sum
    weighted F1      for each class: hits, said, true of the class     F1 of the sums
    chrF++, BLEU     sacrebleu's own n-gram counts    sacrebleu's own figure of the sums

So one bootstrap serves all (Efron & Tibshirani 1993, chapter 13): items are drawn with replacement,
their counts are added, and the figure is taken again. Two systems on the same items are drawn
alike, which makes the difference between them a paired test (Koehn 2004), as sacrebleu's.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from layers.cross_entropy import bits_per_byte
from runtime.console import UserError

RESAMPLES, SEED = 1000, 12345  # of the bootstrap: sacrebleu's own
TRANSLATION = {"chrF2++": {"word_order": 2}, "chrF2": {}, "BLEU": {}, "spBLEU": {}}


@dataclass(frozen=True)
class Measure:
    """One figure of one set of items: counts (N, k) float64, and what their sum (k,) means."""

    name: str
    counts: np.ndarray
    figure: Callable[[np.ndarray], float]
    signature: str = ""
    rises: bool = True  # whether more is better

    @property
    def value(self) -> float:
        return self.figure(self.counts.sum(0))

    def only(self, which: np.ndarray) -> Measure:
        """The same figure of some of the items."""
        return Measure(self.name, self.counts[which], self.figure, self.signature, self.rises)


def resampled(measures: Sequence[Measure]) -> np.ndarray:
    """Figures of RESAMPLES draws of the items, (RESAMPLES, measures); all are drawn alike."""
    N = len(measures[0].counts)
    assert all(len(m.counts) == N for m in measures)
    rng = np.random.default_rng(SEED)
    found = np.empty((RESAMPLES, len(measures)))
    for i in range(RESAMPLES):
        times = np.bincount(rng.integers(N, size=N), minlength=N).astype(np.float64)
        found[i] = [m.figure(times @ m.counts) for m in measures]
    return found


def interval(measures: Sequence[Measure]) -> tuple[float, float] | None:
    """The 95 % percentile interval of the figure, of several their mean; None below two items."""
    if len(measures[0].counts) < 2:
        return None
    low, high = np.nanpercentile(resampled(measures).mean(1), [2.5, 97.5])
    return float(low), float(high)


def paired(ours: Measure, baseline: Measure) -> dict[str, float]:
    """Ours less the baseline on the same items: difference, its 95 % interval, and p.

    p as sacrebleu's paired bootstrap: how often a draw's difference is further from their mean than
    the difference itself, with one draw added.
    """
    drawn = resampled([ours, baseline])
    draws = drawn[:, 0] - drawn[:, 1]
    difference = ours.value - baseline.value
    size = np.abs(draws)
    beyond = int(np.sum(size - size.mean() > abs(difference)))
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    p = 1.0 if not draws.any() else (beyond + 1) / (RESAMPLES + 1)  # a system against itself
    return {"difference": difference, "low": float(low), "high": float(high), "p": p}


def of_text(nats: np.ndarray, n_bytes: np.ndarray) -> Measure:
    """Bits per byte of documents: nats (N,), UTF-8 bytes (N,)."""
    counts = np.stack([nats, n_bytes], 1).astype(np.float64)
    return Measure("bits_per_byte", counts, lambda s: bits_per_byte(float(s[0]), int(s[1])),
                   rises=False)


def mean(name: str, values: Sequence[float], rises: bool = True) -> Measure:
    """The mean of a number of each item, as accuracy is."""
    counts = np.stack([np.asarray(values, np.float64), np.ones(len(values))], 1)
    return Measure(name, counts, _ratio, rises=rises)


def ratio(name: str, above: Sequence[float], below: Sequence[float]) -> Measure:
    """A ratio of sums, as a length ratio is."""
    return Measure(name, np.stack([above, below], 1).astype(np.float64), _ratio)


def _ratio(sums: np.ndarray) -> float:
    return float(sums[0] / sums[1]) if sums[1] else math.nan


def weighted_f1(gold: Sequence[int], said: Sequence[int]) -> Measure:
    """F1 of each class, weighted by how often it is true: scikit-learn's f1_score(average=
    "weighted"). A class that is never said or true has F1 0."""
    gold, said = np.asarray(gold), np.asarray(said)
    K = int(max(gold.max(initial=0), said.max(initial=0))) + 1
    true, told = np.eye(K)[gold], np.eye(K)[said]  # (N,K)

    def figure(sums: np.ndarray) -> float:
        hits, told, true = sums.reshape(3, K)
        f1 = np.divide(2 * hits, told + true, out=np.zeros(K), where=told + true > 0)
        return float((f1 * true).sum() / true.sum())

    return Measure("f1", np.concatenate([true * told, told, true], 1), figure)


def exact(gold: str, said: str) -> float:
    """Whether two answers are the same but for case and ASCII punctuation."""
    bare = str.maketrans("", "", string.punctuation)
    return float(gold.lower().translate(bare) == said.lower().translate(bare))


def overlap_f1(gold: str, said: str) -> float:
    """F1 over the words of two answers, as SQuAD's evaluation (Rajpurkar et al. 2016): small
    letters, no punctuation, no English articles."""
    words = [re.sub(r"\b(a|an|the)\b", " ", x.lower().translate(
        str.maketrans("", "", string.punctuation))).split() for x in (gold, said)]
    same = sum((Counter(words[0]) & Counter(words[1])).values())
    if not same:
        return 0.0
    precision, recall = same / len(words[1]), same / len(words[0])
    return 2 * precision * recall / (precision + recall)


@cache
def _sacrebleu(name: str) -> Any:
    """sacrebleu's metric of a name of TRANSLATION."""
    from sacrebleu.metrics import BLEU, CHRF

    if name.startswith("chrF"):
        return CHRF(**TRANSLATION[name])
    return BLEU(tokenize="flores200" if name == "spBLEU" else "13a")


def has_spbleu() -> bool:
    """Whether spBLEU's tokenizer is on this machine: sacrebleu would fetch it from the network."""
    from sacrebleu.utils import SACREBLEU_DIR

    return (Path(SACREBLEU_DIR) / "models" / "flores200sacrebleuspm").exists()


def translation(name: str, hypotheses: Sequence[str], references: Sequence[str]) -> Measure:
    """A figure of sacrebleu's, with its signature: chrF2++, chrF2, BLEU or spBLEU."""
    if name == "spBLEU" and not has_spbleu():
        raise UserError("spBLEU: its tokenizer is not on this machine; with a network, run once: "
                        "sacrebleu -tok flores200 REFERENCES -i HYPOTHESES")
    metric = _sacrebleu(name)
    counts = metric._extract_corpus_statistics(list(hypotheses), [list(references)])
    signature = str(metric.get_signature())
    return Measure(name, np.array(counts, np.float64),
                   lambda s: float(metric._compute_score_from_stats(s.tolist()).score), signature)


def sentence_scores(hypotheses: Sequence[str], references: Sequence[str]) -> list[float]:
    """chrF++ of each sentence by itself, to find the best and the worst."""
    metric = _sacrebleu("chrF2++")
    return [metric.sentence_score(h, [r]).score
            for h, r in zip(hypotheses, references, strict=True)]
