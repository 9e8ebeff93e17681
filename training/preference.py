"""DPO and CPO: their losses over packed rows, and the reference of DPO.

A preference pair is two consecutive documents of a row: 2i is the chosen answer, 2i + 1 the
rejected one. One forward pass over packed rows gives the log-probabilities of both, as sums over
each document. Each sum has a count of its own over the whole step (pairs, or chosen tokens), so
gradient accumulation does not change the result.

The reference of DPO is the model that the run starts from. With a new adapter this is the model
with its adapter disabled. In all other cases its NLLs are computed before step 1 and stored under
OUT/reference. An adapter that is trained further is such a case: without the adapter, the model
would not be the one that the run started from.
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
from runtime.temporary import Temporary, remove_leftovers, temporary_path
from runtime.transfer import to_device_async
from training.settings import Settings

# what is reported of a step, as means over pairs
REPORTED = ("margin", "accuracy", "chosen_logp", "rejected_logp")


def document_logp(nll: Tensor, doc: Tensor, N: int) -> Tensor:
    """The log-probability of each document of each row: NLLs (B,T), doc (B,T) -> (B,N) in nats."""
    index = torch.where(doc >= 0, doc, N)
    return -nll.new_zeros(len(nll), N + 1).scatter_add(1, index, nll)[:, :N]


def dpo(logp: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """DPO's losses and margins of P pairs, (P,) each (Rafailov et al. 2023, equation 7).

    `logp`, `reference` (P,2): log-probabilities of the chosen and the rejected answer under the
    model and under the reference. loss = -log sigmoid(beta (ratio of chosen - ratio of rejected)).
    """
    log_ratios = logp - reference  # (P,2)
    margin = beta * (log_ratios[:, 0] - log_ratios[:, 1])
    return -torch.nn.functional.logsigmoid(margin), margin


def cpo(logp: Tensor, tokens: Tensor, beta: float, arpo: bool = False) -> tuple[Tensor, Tensor]:
    """CPO's preference losses and margins of P pairs, (P,) each (Xu et al. 2024, equation 5). CPO
    has no reference. The caller adds the NLL of the chosen answer.

    `logp` (P,2): log-probabilities of the chosen and the rejected answer; `tokens` (P,2): how many
    trained tokens they have. `arpo`: as X-ALMA, weigh the rejected answer by
    min(1, 0.9 exp(0.4 |difference of log-probability per token|) - 1), without a gradient. The
    weight is small if both answers are nearly equally likely.
    """
    weight = torch.ones_like(logp[:, 1])
    if arpo:
        per_token = (logp / tokens.clamp(min=1)).detach()
        distance = (per_token[:, 0] - per_token[:, 1]).abs()
        weight = (0.9 * torch.exp(0.4 * distance) - 1).clamp(max=1)
    margin = beta * (logp[:, 0] - weight * logp[:, 1])
    return -torch.nn.functional.logsigmoid(margin), margin


def loss_sums(model: Llama, b: Batch, s: Settings) -> Tensor:
    """Sums over a batch of pairs: those of the loss, then REPORTED.

    DPO's loss is one sum, over pairs. CPO's loss is two: over pairs, and the NLL of the chosen
    answers over their tokens.
    """
    doc = b.documents.doc  # (B,T), on the CPU
    N = int(doc.max()) + 1
    sizes = -document_logp((doc >= 0).float(), doc, N).view(-1, 2)  # (B*N/2,2) tokens
    pairs = (sizes[:, 0] > 0).nonzero().squeeze(-1)  # (P,) of all places, those that hold a pair
    pairs = to_device_async(pairs, b.doc.device)

    def by_pair(nll: Tensor) -> Tensor:
        """The log-probabilities of the pairs, (B,T) -> (P,2)."""
        return document_logp(nll, b.doc, N).view(-1, 2)[pairs]

    reference = b.reference
    if s.mode == "dpo" and reference is None:
        with torch.no_grad(), lora.disabled(model):
            reference = model(**b.inputs())  # (B,T)
    logp = by_pair(model(**b.inputs()))  # (P,2)
    if s.mode == "dpo":
        losses, margin = dpo(logp, by_pair(reference), s.beta)
        sums = [losses.sum()]
    else:
        tokens = -by_pair((b.targets != IGNORE).float())  # (P,2)
        losses, margin = cpo(logp, tokens, s.beta, s.arpo)
        sums = [losses.sum(), -s.nll_weight * logp[:, 0].sum()]
    reported = [margin.sum(), (margin > 0).float().sum(), *logp.sum(0)]
    return torch.stack([*sums, *(x.detach() for x in reported)])


def loss_counts(b: Batch, s: Settings) -> list[int]:
    """The number of terms of each sum of `loss_sums`."""
    chosen = (b.doc >= 0) & (b.doc % 2 == 0)  # (B,T)
    n_pairs = int((chosen & (b.pos == 0)).sum())
    counts_of_reported = [n_pairs] * len(REPORTED)
    if s.mode == "dpo":
        return [n_pairs, *counts_of_reported]
    n_tokens = int((chosen & (b.targets != IGNORE)).sum())
    return [n_pairs, n_tokens, *counts_of_reported]


def keep_reference(model: Llama, streams: Sequence[RowStream], folder: Path, name: str,
                   rows: int, ranks: Distributed) -> list[np.ndarray]:
    """Compute the NLL of every row with the model as it is now, and store it in one file for each
    stream. Returns the files as arrays, (rows,T) float32 each, for `Loader.set_references`.

    `name` identifies the model. The ranks share the rows; each computes `rows` of them at a time.
    """
    model.eval()
    references: list[np.ndarray] = []
    for stream in streams:
        file = folder / f"{stream.source.name}-{_reference_key(stream, name)}.bin"
        if not file.exists():
            info(f"{stream.source.name}: log-probabilities of the reference, {stream.rows} rows")
            _write_reference(model, stream, file, rows, ranks)
        references.append(np.memmap(file, "<f4", "r", shape=(stream.rows, stream.T)))
    for module in ranks.fsdp_modules:
        module.reshard()  # the last forward pass left its weights unsharded
    return references


def _reference_key(stream: RowStream, name: str) -> str:
    """A hash of everything that the NLLs of a stream depend on."""
    content = (name, stream.source.sha, stream.T, stream.seed, stream.source.documents.tolist())
    return hashlib.sha256(repr(content).encode()).hexdigest()[:12]


def _write_reference(model: Llama, stream: RowStream, file: Path, rows: int,
                     ranks: Distributed) -> None:
    """Compute the NLLs of all rows of a stream into a file."""
    shape = (stream.rows, stream.T)
    temporary, claim = temporary_path(file), None
    if ranks.rank == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(file.parent)
        claim = Temporary(file, path=temporary)
    temporary = Path(ranks.all_gather_text(str(temporary))[0])
    if ranks.rank == 0:
        np.memmap(temporary, "<f4", "w+", shape=shape).flush()
    ranks.barrier()
    nlls = np.memmap(temporary, "<f4", "r+", shape=shape)
    for first in range(0, stream.rows, rows * ranks.world_size):
        # every rank runs the same number of passes; the last row may be computed more than once
        indices = [min(first + ranks.rank * rows + i, stream.rows - 1) for i in range(rows)]
        batch = Batch.of([stream.row(i) for i in indices]).to(ranks.device)
        with torch.no_grad():
            nll = model(**batch.inputs()).cpu().numpy()  # (rows,T)
        for i, row_nll in zip(indices, nll, strict=True):
            nlls[stream.number(i)] = row_nll
    nlls.flush()
    ranks.barrier()
    if claim is not None:
        claim.replace()
    ranks.barrier()
