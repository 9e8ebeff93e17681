"""Metrics: what is counted for each item, and the metric that a sum of counts gives.

    bits per byte    nats, bytes                                  sum of nats / sum of bytes / ln 2
    accuracy         correct, 1                                   sum / sum
    weighted F1      per class: hits, predicted, true             F1 of the sums
    chrF++, BLEU     sacrebleu's n-gram counts                    sacrebleu's score of the sums

Every metric is a function of a sum over items (documents, questions, sentences). One bootstrap
(significance.py) therefore serves all of them.
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

from runtime.console import UserError

TRANSLATION = {"chrF2++": {"word_order": 2}, "chrF2": {}, "BLEU": {}, "spBLEU": {}}
PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Measure:
    """One metric of a set of items: counts (N,k) float64, and the metric of their sum (k,).

    `guess_counts` (N,k) are the counts to expect if each answer is guessed, all choices alike; None
    if there is nothing to guess.
    """

    name: str
    counts: np.ndarray
    of_sums: Callable[[np.ndarray], float]
    signature: str = ""
    higher_is_better: bool = True
    guess_counts: np.ndarray | None = None

    @property
    def value(self) -> float:
        """The metric of all items."""
        return self.of_sums(self.counts.sum(0))

    @property
    def chance(self) -> float | None:
        """The metric of guessed answers; None if there is nothing to guess."""
        if self.guess_counts is None:
            return None
        return self.of_sums(self.guess_counts.sum(0))

    def subset(self, mask: np.ndarray) -> Measure:
        """Return the same metric of some of the items; `mask` (N,) bool."""
        guess_counts = None if self.guess_counts is None else self.guess_counts[mask]
        return Measure(self.name, self.counts[mask], self.of_sums, self.signature,
                       self.higher_is_better, guess_counts)


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Return nats per UTF-8 byte in bits, NaN for no bytes. Unlike a loss per token, this is
    comparable between tokenizers."""
    return nats / math.log(2) / n_bytes if n_bytes else math.nan


def bits_per_byte_of(nats: np.ndarray, n_bytes: np.ndarray) -> Measure:
    """Bits per byte of documents: nats (N,), UTF-8 bytes (N,)."""
    counts = np.stack([nats, n_bytes], 1).astype(np.float64)
    return Measure("bits_per_byte", counts, lambda s: bits_per_byte(float(s[0]), int(s[1])),
                   higher_is_better=False)


def mean(name: str, values: Sequence[float], higher_is_better: bool = True) -> Measure:
    """The mean of one number per item."""
    counts = np.stack([np.asarray(values, np.float64), np.ones(len(values))], 1)
    return Measure(name, counts, _ratio, higher_is_better=higher_is_better)


def accuracy(name: str, correct: Sequence[float], n_choices: Sequence[int]) -> Measure:
    """The share of correct answers to multiple-choice items; `n_choices`: of each item."""
    ones = np.ones(len(correct))
    counts = np.stack([np.asarray(correct, np.float64), ones], 1)
    guess_counts = np.stack([ones / np.asarray(n_choices), ones], 1)
    return Measure(name, counts, _ratio, guess_counts=guess_counts)


def ratio(name: str, numerators: Sequence[float], denominators: Sequence[float]) -> Measure:
    """A ratio of sums, as a length ratio is."""
    counts = np.stack([numerators, denominators], 1).astype(np.float64)
    return Measure(name, counts, _ratio)


def _ratio(sums: np.ndarray) -> float:
    return float(sums[0] / sums[1]) if sums[1] else math.nan


def weighted_f1(gold: Sequence[int], predictions: Sequence[int],
                n_choices: Sequence[int] | None = None) -> Measure:
    """F1 of each class, weighted by how often it is true: scikit-learn's f1_score(average=
    "weighted"). A class that is never predicted or never true has F1 0. With `n_choices` (of each
    item) the chance level is that of the expected counts of guesses."""
    gold, predictions = np.asarray(gold), np.asarray(predictions)
    n_classes = int(max(gold.max(initial=0), predictions.max(initial=0))) + 1
    true, predicted = np.eye(n_classes)[gold], np.eye(n_classes)[predictions]  # (N, n_classes)

    def f1_of_sums(sums: np.ndarray) -> float:
        hits, predicted, true = sums.reshape(3, n_classes)
        both = predicted + true
        f1 = np.divide(2 * hits, both, out=np.zeros(n_classes), where=both > 0)
        return float((f1 * true).sum() / true.sum())

    guess_counts = None
    if n_choices is not None:
        n = np.asarray(n_choices)[:, None]  # classes that are never true have no weight in F1
        guessed = np.where(np.arange(n_classes) < n, 1 / n, 0.0)
        guess_counts = np.concatenate([true * guessed, guessed, true], 1)
    return Measure("f1", np.concatenate([true * predicted, predicted, true], 1), f1_of_sums,
                   guess_counts=guess_counts)


def exact_match(gold: str, answer: str) -> float:
    """Return 1 if two answers are the same except for case and ASCII punctuation, else 0."""
    return float(gold.lower().translate(PUNCTUATION) == answer.lower().translate(PUNCTUATION))


def word_f1(gold: str, answer: str) -> float:
    """Return F1 over the words of two answers, as SQuAD's evaluation (Rajpurkar et al. 2016): in
    lower case, without punctuation and English articles."""
    gold_words, answer_words = (
        re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split()
        for text in (gold, answer))
    shared = sum((Counter(gold_words) & Counter(answer_words)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(answer_words), shared / len(gold_words)
    return 2 * precision * recall / (precision + recall)


@cache
def _sacrebleu(name: str) -> Any:
    """Return sacrebleu's metric of a name in TRANSLATION."""
    from sacrebleu.metrics import BLEU, CHRF

    if name.startswith("chrF"):
        return CHRF(**TRANSLATION[name])
    return BLEU(tokenize="flores200" if name == "spBLEU" else "13a")


def has_spbleu() -> bool:
    """Return True if spBLEU's tokenizer is on this machine; sacrebleu would download it."""
    from sacrebleu.utils import SACREBLEU_DIR

    return (Path(SACREBLEU_DIR) / "models" / "flores200sacrebleuspm").exists()


def translation(name: str, hypotheses: Sequence[str], references: Sequence[str],
                note: str = "") -> Measure:
    """A score of sacrebleu with its signature: chrF2++, chrF2, BLEU or spBLEU. `note` is added to
    the name."""
    if name == "spBLEU" and not has_spbleu():
        raise UserError("spBLEU: its tokenizer is not on this machine; with a network, run once: "
                        "sacrebleu -tok flores200 REFERENCES -i HYPOTHESES")
    metric = _sacrebleu(name)
    counts = metric._extract_corpus_statistics(list(hypotheses), [list(references)])
    signature = str(metric.get_signature())
    return Measure(name + note, np.array(counts, np.float64),
                   lambda s: float(metric._compute_score_from_stats(s.tolist()).score), signature)


def sentence_scores(hypotheses: Sequence[str], references: Sequence[str]) -> list[float]:
    """Return chrF++ of each sentence alone, to find the best and the worst."""
    metric = _sacrebleu("chrF2++")
    return [metric.sentence_score(h, [r]).score
            for h, r in zip(hypotheses, references, strict=True)]
