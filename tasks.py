"""The kinds of evaluation: what is asked of a model, and how it is counted.

**Bits per byte** of documents, as lm-evaluation-harness counts rolling log-likelihood (its
`get_rolling_token_windows` with a context of one token), except that BOS is never itself scored:

    document   t1 t2 t3 t4 t5 t6 t7 t8 t9 t10      window length 4
    1st        BOS t1 t2 t3              -> t1 t2 t3 t4
    2nd                 t4 t5 t6 t7      -> t5 t6 t7 t8
    last                   t6 t7 t8 t9   -> t9 t10    (full left context; t7, t8 not scored again)

Each document stands alone, each of its tokens is predicted exactly once, and the result is a ratio
of sums: nats of all documents over bytes of all documents, in bits. Unlike a loss per token it can
be compared between tokenizers. Windows are packed into rows, which changes nothing but the speed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from data import IGNORE, Batch
from log import UserError
from loss import bits_per_byte

if TYPE_CHECKING:
    from model import Llama
    from tokenizer import Tokenizer

ROW = 2048  # tokens: a packed row's attention costs its square; a longer window has its own row
BUDGET = 4096  # tokens read at once
RESAMPLES, SEED = 1000, 12345  # of the bootstrap: sacrebleu's own


def start_token(tokenizer: Tokenizer) -> int:
    """What stands before a document's first token: BOS, else EOS, as in lm-evaluation-harness."""
    start = tokenizer.eos if tokenizer.bos is None else tokenizer.bos
    if start is None:
        raise UserError("the tokenizer has neither BOS nor EOS, so a document's first token has "
                        "nothing to be predicted from; name a bos_token in tokenizer_config.json")
    return start


def windows(ids: Sequence[int], start: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Cut a document (without BOS) into (inputs, targets); the last inputs predict the targets.

    At most `length` inputs; every token is a target exactly once, in order. No token, no window.
    """
    ids = [start, *map(int, ids)]  # the token at i predicts the one at i + 1
    for begin in range(0, len(ids) - 1, length):
        end = min(begin + length, len(ids) - 1)
        yield ids[max(0, end - length) : end], ids[begin + 1 : end + 1]


def pack(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Put pieces into rows of `width`, the longest that still fits first; rows of indices.

    A piece longer than that has a row of its own. Rows come longest first piece first.
    """
    left = sorted(range(len(lengths)), key=lengths.__getitem__)
    sizes = [lengths[i] for i in left]
    rows = []
    while left:
        row, room = [left.pop()], width - sizes.pop()
        while at := bisect_right(sizes, room):
            row.append(left.pop(at - 1))
            room -= sizes.pop(at - 1)
        rows.append(row)
    return rows


@torch.inference_mode()
def document_nats(model: Llama, documents: Sequence[Sequence[int]], start: int, length: int = 0,
                  move: Callable[[int], object] = lambda tokens: None) -> np.ndarray:
    """-log p of each document in nats, (N,) float64; documents are ids without BOS and EOS.

    `start` stands before each document and is never scored; `length` is the most inputs of a
    window, 0 for the model's context. `move` is told how many tokens were scored, batch by batch.
    """
    length = length or model.config.max_position_embeddings
    nats = np.zeros(len(documents))
    pieces, owner = [], []
    for i, ids in enumerate(documents):
        for piece in windows(ids, start, length):
            pieces.append(piece)
            owner.append(i)
    owner = np.array(owner, dtype=np.int64)  # which document a window is of
    sizes = [len(inputs) for inputs, _ in pieces]
    usual = min(max(sizes, default=0), ROW)
    rows = pack(sizes, usual)
    while rows:
        width = max(usual, sizes[rows[0][0]])
        n = max(1, BUDGET // width)
        batch = Batch.of([_row([(i, *pieces[i]) for i in row], width) for row in rows[:n]])
        rows = rows[n:]
        scored = (batch.targets != IGNORE).numpy()  # (B,T)
        at = batch.to(model.device)
        nll = model(at.tokens, at.doc, at.pos, at.targets).cpu().double().numpy()  # (B,T)
        np.add.at(nats, owner[batch.doc.numpy()[scored]], nll[scored])
        move(int(scored.sum()))
    return nats


def _row(pieces: Sequence[tuple[int, list[int], list[int]]], width: int) -> np.ndarray:
    """Windows (index, inputs, targets) side by side: (4, width) of tokens, targets, doc, pos."""
    row = np.empty((4, width), np.int64)
    row[:] = [[0], [IGNORE], [-1], [0]]
    at = 0
    for i, inputs, targets in pieces:
        end = at + len(inputs)
        row[0, at:end], row[1, end - len(targets) : end] = inputs, targets
        row[2, at:end], row[3, at:end] = i, np.arange(len(inputs))
        at = end
    return row


def interval(nats: np.ndarray, n_bytes: np.ndarray) -> tuple[float, float] | None:
    """The 95 % interval of bits per byte, over documents drawn with replacement; None below two.

    nats, n_bytes (N,). A percentile bootstrap (Efron & Tibshirani 1993, chapter 13), seeded: two
    models on the same documents are drawn alike.
    """
    N = len(nats)
    if N < 2:
        return None
    rng = np.random.default_rng(SEED)
    draws = (rng.integers(N, size=N) for _ in range(RESAMPLES))
    values = [bits_per_byte(nats[i].sum(), n_bytes[i].sum()) for i in draws]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
