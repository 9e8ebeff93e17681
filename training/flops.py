"""FLOP counts of a training step: for the estimate of --plan-for, and for MFU in metrics.jsonl."""

from __future__ import annotations

from data import Batch
from model import Llama
from training.settings import Settings


def flops_per_token(model: Llama, s: Settings) -> float:
    """FLOP of the matrix products for one token, including those that --recompute full and a
    reference model (DPO) add."""
    forward = model.flops_per_token(s.seq_len, gradient=False)
    flops = model.flops_per_token(s.seq_len)
    if s.recompute == "full":
        flops += forward - 2 * model.head.numel()  # the layers again, without the head
    if s.mode == "dpo":
        flops += forward
    return flops


def flops_coefficients(model: Llama, with_reference: bool) -> tuple[float, float, float]:
    """FLOP of a step per trained token (only these have logits), per token of a document, and per
    unit of the sum of squared document lengths (attention).

    `with_reference`: the step also computes a reference model (DPO). Padding at the end of a row
    and what --recompute full repeats are not counted. Attention windows are ignored.
    """
    def flops(context: int) -> float:
        total = model.flops_per_token(context)
        if with_reference:
            total += model.flops_per_token(context, gradient=False)
        return total

    head = 6 if model.head.requires_grad else 4
    if with_reference:
        head += 2
    head *= model.head.numel()
    return head, flops(0) - head, flops(1) - flops(0)


def token_counts(batch: Batch) -> tuple[int, int]:
    """The number of a batch's tokens (B,T) that lie in documents, and the sum of the squares of the
    documents' lengths."""
    in_document = batch.doc >= 0  # (B,T)
    squares = in_document * (2 * batch.pos + 1)  # 1 + 3 + 5 + ... = n^2
    return int(in_document.sum()), int(squares.sum())
