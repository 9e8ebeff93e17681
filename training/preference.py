"""Preference pairs: what DPO and CPO sum over a packed batch, and the reference DPO compares with.

One idea: a pair is two documents side by side in one row (2i chosen, 2i + 1 rejected), so that both
log-probabilities come out of one forward pass over packed rows, as sums by document. Every sum
has its own count over the whole step, pairs or chosen tokens, and accumulation changes nothing.

The reference is the model that the run starts from. Where a fresh adapter trains, that is the model
with its adapter off. Otherwise its NLLs are computed once before step 1, and kept row by row under
OUT/reference. An adapter that is trained further is no exception: without it, it is another model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import lora
from data import IGNORE, Batch, RowStream
from model import Llama
from runtime.console import info
from runtime.distributed import Distributed
from runtime.transfer import to_device_async
from training.settings import Settings

REPORTED = ("margin", "accuracy", "chosen_logp", "rejected_logp")  # means over pairs


def document_logp(nll: Tensor, doc: Tensor, N: int) -> Tensor:
    """Log-probability of each document of each row: NLLs (B,T), doc (B,T) -> (B,N) nats."""
    index = torch.where(doc >= 0, doc, N)
    return -nll.new_zeros(len(nll), N + 1).scatter_add(1, index, nll)[:, :N]


def dpo(logp: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Losses and margins of pairs, (P,) each, from log-probabilities (P,2) of chosen and rejected.

    -log sigmoid(beta ((logp - reference) of the chosen - that of the rejected)) (Rafailov et al.
    2023, equation 7).
    """
    ratios = logp - reference  # (P,2)
    margin = beta * (ratios[:, 0] - ratios[:, 1])
    return -torch.nn.functional.logsigmoid(margin), margin


def cpo(logp: Tensor, tokens: Tensor, beta: float, arpo: bool = False) -> tuple[Tensor, Tensor]:
    """Losses and margins of pairs without a reference (Xu et al. 2024, equation 5), (P,) each.

    logp and tokens, the number of trained tokens of each document, are (P,2). The NLL of the chosen
    document is not part of it: the caller adds it. `arpo` (X-ALMA) weighs the rejected document by
    min(1, 0.9 exp(0.4 |difference of mean log-probabilities|) - 1), a constant to the gradient:
    less where it is nearly as likely, token for token, as the chosen one.
    """
    factor = torch.ones_like(logp[:, 1])
    if arpo:
        mean = (logp / tokens.clamp(min=1)).detach()
        factor = (0.9 * torch.exp(0.4 * (mean[:, 0] - mean[:, 1]).abs()) - 1).clamp(max=1)
    margin = beta * (logp[:, 0] - factor * logp[:, 1])
    return -torch.nn.functional.logsigmoid(margin), margin


def total(model: Llama, b: Batch, s: Settings) -> Tensor:
    """Sums over a batch of pairs: the loss's, then REPORTED; settings `s` as in train.py.

    DPO's loss is one sum, over pairs; CPO's are two, the second the NLL of the chosen, over its
    tokens.
    """
    doc = b.documents.doc  # (B,T), on the host
    N = int(doc.max()) + 1

    def by_pair(x: Tensor) -> Tensor:
        """Sums over each document, (B,T) -> (P,2)."""
        return -document_logp(x, b.doc, N).view(-1, 2)[there]  # (P,2)

    there = document_logp((doc >= 0).float(), doc, N).view(-1, 2)[:, 0] < 0  # (B*N/2,)
    there = to_device_async(there.nonzero().squeeze(-1), b.doc.device)  # (P,)
    before = b.reference
    if s.mode == "dpo" and before is None:
        with torch.no_grad(), lora.disabled(model):
            before = model(**b.inputs())  # (B,T)
    logp = -by_pair(model(**b.inputs()))  # (P,2)
    if s.mode == "dpo":
        losses, margin = dpo(logp, -by_pair(before), s.beta)
        sums = [losses.sum()]
    else:
        losses, margin = cpo(logp, by_pair((b.targets != IGNORE).float()), s.beta, s.arpo)
        sums = [losses.sum(), -s.nll_weight * logp[:, 0].sum()]
    seen = [margin.sum(), (margin > 0).float().sum(), *logp.sum(0)]
    return torch.stack([*sums, *(x.detach() for x in seen)])


def count(b: Batch, s: Settings) -> list[int]:
    """How many terms each sum of `total` has."""
    chosen = (b.doc >= 0) & (b.doc % 2 == 0)  # (B,T)
    pairs, tokens = int((chosen & (b.pos == 0)).sum()), int((chosen & (b.targets != IGNORE)).sum())
    return [pairs] * (1 + len(REPORTED)) if s.mode == "dpo" else \
        [pairs, tokens, *[pairs] * len(REPORTED)]


def keep_reference(model: Llama, streams: Sequence[RowStream], folder: Path, name: str,
                   rows: int, ranks: Distributed) -> list[np.ndarray]:
    """Compute the NLL of every row by the model as it is now, keep it in a file for each stream,
    and return the files' arrays, (rows,T) float32 each, for `Loader.set_references`.

    `name` says which model it is; each rank computes its share, `rows` at a time.
    """
    model.eval()
    references: list[np.ndarray] = []
    for stream in streams:
        shape, said = (stream.rows, stream.T), (name, stream.source.sha, stream.T, stream.seed)
        key = hashlib.sha256(repr((*said, stream.source.documents.tolist())).encode()).hexdigest()
        file = folder / f"{stream.source.name}-{key[:12]}.bin"
        if not file.exists():
            info(f"{stream.source.name}: log-probabilities of the reference, {stream.rows} rows")
            aside = file.with_suffix(".tmp")
            if ranks.rank == 0:
                folder.mkdir(parents=True, exist_ok=True)
                np.memmap(aside, "<f4", "w+", shape=shape).flush()
            ranks.barrier()
            kept = np.memmap(aside, "<f4", "r+", shape=shape)
            for first in range(0, stream.rows, rows * ranks.world_size):  # alike on all ranks
                mine = [min(first + ranks.rank * rows + i, stream.rows - 1) for i in range(rows)]
                b = Batch.of([stream.row(i) for i in mine]).to(ranks.device)
                with torch.no_grad():
                    nll = model(**b.inputs()).cpu().numpy()  # (rows,T)
                for i, x in zip(mine, nll, strict=True):
                    kept[stream.number(i)] = x
            kept.flush()
            ranks.barrier()
            if ranks.rank == 0:
                aside.rename(file)
            ranks.barrier()
        references.append(np.memmap(file, "<f4", "r", shape=shape))
    for m in ranks.fsdp_modules:
        m.reshard()  # what a pass leaves whole is freed by the next: nobody may hold it
    return references
