"""Attention on a CPU: packed documents in blocks of queries, or one document after the other.

Products over `block` queries and only the keys that they see are faster than a mask of all pairs,
which computes mostly scores that nobody sees. Their gradient is up to three times as fast as that
of torch's fused kernel. Each way is tested equal to the plain mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layers.attention import sdpa


@dataclass
class Block:
    """Queries [begin, end) of documents end to end, which see no key before `first`.

    `bias` (end - begin, 1, n) float32 is -inf where a query does not see one of the last n keys.
    """

    first: int
    begin: int
    end: int
    bias: Tensor


def cpu_blocks(lengths: list[int], window: int, block: int = 128) -> list[Block]:
    """Documents end to end as blocks: a long one is cut, short neighbours share one."""
    parts: list[list[int]] = []
    for n in lengths:
        if parts and sum(parts[-1]) + n <= block:
            parts[-1].append(n)
        else:
            parts.append([n])
    blocks, start = [], 0
    for part in parts:
        size = sum(part)
        doc = torch.repeat_interleave(torch.arange(len(part)), torch.tensor(part))  # (size,)
        for begin in range(0, size, block):
            end = min(begin + block, size)
            first = max(0, begin + 1 - window) if window else 0
            # all see the keys before this block, if they reach back that far
            last = end - (first if window and end - first > window else begin)
            pair = torch.arange(begin, end)[:, None] - torch.arange(end - last, end)  # (n,last)
            seen = (pair >= 0) & (doc[begin:end, None] == doc[end - last : end])
            seen = seen & (pair < window) if window else seen
            bias = torch.zeros(seen.shape).masked_fill_(~seen, -math.inf)[:, None]
            blocks.append(Block(start + first, start + begin, start + end, bias))
        start += size
    return blocks


@torch.compiler.disable  # lengths differ in every batch: compiled, each would be a new graph
def attend_documents(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int,
                     scale: float, softcap: float = 0.0) -> Tensor:
    """`sdpa`, document by document. split and cat, because their backward passes copy nothing
    twice."""
    if len(set(lengths)) == 1 and not softcap:  # as rows of one batch; capped scores are too large
        together = (x.reshape(len(lengths), -1, *x.shape[2:]) for x in (q, k, v))
        return sdpa(*together, scale, window=window).reshape(q.shape)
    parts = (x.flatten(0, 1)[None].split(lengths, dim=1) for x in (q, k, v))
    outputs = [sdpa(*part, scale, softcap, window=window) for part in zip(*parts, strict=True)]
    return torch.cat(outputs, dim=1).view(q.shape)


@torch.compiler.disable  # blocks differ in every batch
def attend_blocks(q: Tensor, k: Tensor, v: Tensor, blocks: list[Block], lengths: list[int],
                  window: int, side: int, fused: bool, scale: float) -> Tensor:
    """Attention by blocks of queries, `side` equal parts of the documents side by side.

    `fused`: the forward pass is torch's kernel, document by document.
    """
    parts = (x.reshape(side, -1, *x.shape[2:]) for x in (q, k, v))
    return _BlockAttention.apply(*parts, blocks, lengths, window, fused, scale).view(q.shape)


class _BlockAttention(torch.autograd.Function):
    """q (P,N,H,D), k, v (P,N,K,D) -> (P,N,H,D) with P parts side by side, P N = B T.

    Only q, k, v and y are kept: the backward pass computes the scores again. Queries that share
    keys are rows of one product: a block is (P K, n H/K, D). Factors, sums, scores and their
    gradient are float32; `bf16_factors` says how that is fast.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: list[Block],
                lengths: list[int], window: int, fused: bool, scale: float) -> Tensor:
        if fused:
            y = attend_documents(q, k, v, lengths, window, scale)
        else:
            y = blocks_forward(q, k, v, blocks, scale)
        ctx.save_for_backward(q, k, v, y)
        ctx.blocks, ctx.scale = blocks, scale
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y = ctx.saved_tensors
        K, dq = k.shape[2], torch.empty_like(q)
        keys, values = to_heads(k), to_heads(v)  # (PK,N,D)
        dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
        mean = (g.float() * y).sum(-1, keepdim=True)  # (P,N,H,1): sum of p dp
        with bf16_factors(q.dtype) as narrow:
            for b in ctx.blocks:
                seen = slice(b.first, b.end)
                q_b, g_b = block_rows(q, b, K), block_rows(g, b, K)  # (PK,nG,D)
                p = probabilities(q_b, keys, b, ctx.scale, narrow)  # (PK,nG,S)
                dv[:, seen].baddbmm_(p.mT, g_b)
                dp = torch.bmm(g_b, values[:, seen].mT)
                ds = p.mul_(dp.sub_(block_rows(mean, b, K)))
                write_block_rows(dq, b, K, torch.bmm(ds, keys[:, seen]).mul_(ctx.scale))
                dk[:, seen].baddbmm_(ds.mT, q_b)
        dk, dv = (x.view(len(k), K, *x.shape[1:]).transpose(1, 2).to(k.dtype)
                  for x in (dk.mul_(ctx.scale), dv))
        return dq, dk, dv, *[None] * 5


def blocks_forward(q: Tensor, k: Tensor, v: Tensor, blocks: list[Block], scale: float) -> Tensor:
    """The forward pass by blocks: q (P,N,H,D), k, v (P,N,K,D) -> (P,N,H,D)."""
    K, y = k.shape[2], torch.empty_like(q)
    keys, values = to_heads(k), to_heads(v)  # (PK,N,D)
    with bf16_factors(q.dtype) as narrow:
        for b in blocks:
            p = probabilities(block_rows(q, b, K), keys, b, scale, narrow)  # (PK,nG,S)
            write_block_rows(y, b, K, torch.bmm(p, values[:, b.first : b.end]))
    return y


def to_heads(x: Tensor) -> Tensor:
    """(P,N,K,D) -> (PK,N,D) float32, end to end in memory."""
    return to_float32(x.transpose(1, 2)).flatten(0, 1)


def to_float32(x: Tensor) -> Tensor:
    """x in float32, end to end in memory, in one pass whatever its strides and dtype."""
    return torch.empty(x.shape, dtype=torch.float32, device=x.device).copy_(x)


def block_rows(x: Tensor, b: Block, K: int) -> Tensor:
    """A block's queries (P,N,H,D) by the key head they share: (P K, n H/K, D) float32."""
    part = x[:, b.begin : b.end].unflatten(2, (K, -1)).transpose(1, 2)  # (P,K,n,G,D)
    return to_float32(part).flatten(2, 3).flatten(0, 1)


def write_block_rows(x: Tensor, b: Block, K: int, part: Tensor) -> None:
    """The inverse of `block_rows`: write (P K, nG, D) into x (P,N,H,D)."""
    into = x[:, b.begin : b.end].unflatten(2, (K, -1))  # (P,n,K,G,D)
    into.copy_(part.view(len(x), K, b.end - b.begin, -1, part.shape[-1]).transpose(1, 2))


def probabilities(q: Tensor, keys: Tensor, b: Block, scale: float, narrow: bool) -> Tensor:
    """Softmax over the keys a block sees: q (PK,nG,D), keys (PK,N,D) -> (PK,nG,S), all float32;
    `narrow`: their numbers are those of bf16, which q times scale need not be."""
    keys = keys[:, b.first : b.end].mT
    scores = torch.baddbmm(q.new_empty(()), q, keys, beta=0, alpha=scale) if narrow else \
        torch.bmm(q * scale, keys)
    n, last = len(b.bias), b.bias.shape[-1]
    scores.unflatten(1, (n, -1))[..., -last:].add_(b.bias)
    return torch.softmax(scores, -1)


@contextmanager
def bf16_factors(dtype: torch.dtype) -> Iterator[bool]:
    """Whether factors came in bf16; while it lasts, products of float32 take theirs for such.

    A product's result has the dtype of its factors, and scores in bf16 would be too coarse. The
    CPU's kernels for bf16 leave their float32 sums as they are where float32 factors may be rounded
    to bf16: nothing happens to numbers that came from there, to probabilities and their gradient
    what happens in the fused kernel, and it is two to three times as fast. The setting is the whole
    process's: not for two threads at once.
    """
    if dtype != torch.bfloat16:
        yield False
        return
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield True
    finally:
        matmul.fp32_precision = before
