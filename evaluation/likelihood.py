"""The likelihood of documents: nats (-log p) of each, for bits per byte.

Long documents are cut into windows as lm-evaluation-harness cuts them for rolling log-likelihood
(its `get_rolling_token_windows` with a context of one token), except that BOS is never scored:

    document   t1 t2 t3 t4 t5 t6 t7 t8 t9 t10      window length 4
    1st        BOS t1 t2 t3              -> t1 t2 t3 t4
    2nd                 t4 t5 t6 t7      -> t5 t6 t7 t8
    last                   t6 t7 t8 t9   -> t9 t10    (full left context; t7, t8 not scored again)

Every token is predicted exactly once, from its own document only. Windows are packed into rows;
packing changes the speed and not the result.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from data import IGNORE, Batch, empty_row

if TYPE_CHECKING:
    from model import Llama
    from tokenization.document import Document

ROW_TOKENS = 2048  # attention in a packed row costs its square; a longer window has its own row
BATCH_TOKENS = 4096  # tokens of one forward pass


def no_progress(n: int) -> None:
    """A progress callback that shows nothing."""


@dataclass(frozen=True)
class Window:
    """Inputs, and the target of each (IGNORE: not scored), of one document."""

    document: int
    inputs: Sequence[int]
    targets: Sequence[int]


def windows(ids: Sequence[int], start: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Cut a document (without BOS) into (inputs, targets); the last inputs predict the targets.

    At most `length` inputs; every token is a target exactly once, in order. A document without
    tokens gives no window.
    """
    ids = [start, *map(int, ids)]  # the token at i predicts the one at i + 1
    for begin in range(0, len(ids) - 1, length):
        end = min(begin + length, len(ids) - 1)
        yield ids[max(0, end - length) : end], ids[begin + 1 : end + 1]


def pack_rows(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Put pieces into rows of `width`; return the indices of the pieces of each row.

    The longest piece that fits into a row is added first. A piece longer than `width` has a row of
    its own. Rows are ordered by their first piece, the longest first.
    """
    indices = sorted(range(len(lengths)), key=lengths.__getitem__)
    sizes = [lengths[i] for i in indices]
    rows = []
    while indices:
        row = [indices.pop()]
        room = width - sizes.pop()
        fits = bisect_right(sizes, room)
        while fits:
            row.append(indices.pop(fits - 1))
            room -= sizes.pop(fits - 1)
            fits = bisect_right(sizes, room)
        rows.append(row)
    return rows


def document_nats(model: Llama, documents: Sequence[Sequence[int]], start: int, length: int = 0,
                  progress: Callable[[int], object] = no_progress,
                  logprob_dtype: torch.dtype = torch.float64, row_tokens: int = ROW_TOKENS,
                  batch_tokens: int = BATCH_TOKENS) -> np.ndarray:
    """Return -log p of each document in nats, (N,) float64; documents are ids without BOS and EOS.

    `start` stands before each document and is not scored. `length` is the maximum number of inputs
    of a window, 0 for the model's context. `progress` gets the number of scored tokens of each
    batch. Each log p, and the sum of a window, is rounded to `logprob_dtype`.
    """
    length = length or model.config.max_position_embeddings
    pieces = []
    for i, ids in enumerate(documents):
        for inputs, targets in windows(ids, start, length):
            ignored = [IGNORE] * (len(inputs) - len(targets))
            pieces.append(Window(i, inputs, ignored + targets))
    return _sum_windows(model, pieces, len(documents), progress, logprob_dtype, row_tokens,
                        batch_tokens)


def answer_nats(model: Llama, documents: Sequence[Document],
                batch_tokens: int = BATCH_TOKENS) -> np.ndarray:
    """Return -log p of the trained tokens of each document in nats, (N,) float64, given all tokens
    before each. A document has a row of its own and is not cut into windows."""
    pieces = []
    for i, document in enumerate(documents):
        targets = np.where(document.mask[1:], document.ids[1:], IGNORE)
        pieces.append(Window(i, document.ids[:-1], targets))
    return _sum_windows(model, pieces, len(documents), row_tokens=0, batch_tokens=batch_tokens)


@torch.inference_mode()
def _sum_windows(model: Llama, pieces: Sequence[Window], n_documents: int,
                 progress: Callable[[int], object] = no_progress,
                 logprob_dtype: torch.dtype = torch.float64, row_tokens: int = ROW_TOKENS,
                 batch_tokens: int = BATCH_TOKENS) -> np.ndarray:
    """Return the nats of each document, (N,) float64: the sum over its windows."""
    nats = torch.zeros(len(pieces), dtype=torch.float64)  # of each window
    sizes = [len(piece.inputs) for piece in pieces]
    usual_width = max(1, min(max(sizes, default=0), row_tokens))
    rows = pack_rows(sizes, usual_width)
    while rows:
        width = max(usual_width, sizes[rows[0][0]])
        n_rows = max(1, batch_tokens // width)
        batch = Batch.of([_row(row, pieces, width) for row in rows[:n_rows]])
        rows = rows[n_rows:]
        scored = batch.targets != IGNORE  # (B,T)
        on_device = batch.to(model.device)
        nll = model(on_device.tokens, on_device.doc, on_device.pos, on_device.targets)  # (B,T)
        nll = nll.cpu().to(logprob_dtype).double()
        nats.index_add_(0, batch.doc[scored], nll[scored])
        progress(int(scored.sum()))
    owners = torch.tensor([piece.document for piece in pieces], dtype=torch.long)
    totals = torch.zeros(n_documents, dtype=torch.float64)
    return totals.index_add_(0, owners, nats.to(logprob_dtype).double()).numpy()


def _row(indices: Sequence[int], pieces: Sequence[Window], width: int) -> np.ndarray:
    """Windows side by side, (4,width): tokens, targets, index of the window as doc, pos."""
    row = empty_row(width)
    begin = 0
    for i in indices:
        n = len(pieces[i].inputs)
        columns = slice(begin, begin + n)
        row[0, columns] = pieces[i].inputs
        row[1, columns] = pieces[i].targets
        row[2, columns] = i
        row[3, columns] = np.arange(n)
        begin += n
    return row
