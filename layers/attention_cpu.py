"""Attention on a CPU: packed documents in blocks of queries, or one document after the other.

A mask over all pairs of tokens computes mostly scores that are masked out. Here a block of queries
is multiplied only by the keys that it attends to, which is faster; its gradient is up to three
times as fast as that of torch's fused kernel. Both functions are tested equal to the plain mask.
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
    """Queries [begin, end), over documents one after the other; they attend to no key before
    `first`.

    `bias` (end - begin, 1, n) float32 is -inf where a query does not attend to one of the last n
    keys; all of them attend to the keys before those.
    """

    first: int
    begin: int
    end: int
    bias: Tensor


def cpu_blocks(lengths: list[int], window: int, block: int = 128) -> list[Block]:
    """Blocks of documents one after the other: a long document is cut into blocks of `block`
    queries, and short neighbours share one."""
    groups: list[list[int]] = []  # lengths of documents that share blocks
    for n in lengths:
        if groups and sum(groups[-1]) + n <= block:
            groups[-1].append(n)
        else:
            groups.append([n])
    blocks, start = [], 0
    for group in groups:
        size = sum(group)
        doc = torch.repeat_interleave(torch.arange(len(group)), torch.tensor(group))  # (size,)
        for begin in range(0, size, block):
            end = min(begin + block, size)
            first = max(0, begin + 1 - window) if window else 0
            # keys before `masked` are attended to by every query of the block
            masked = first if window and end - first > window else begin
            distance = torch.arange(begin, end)[:, None] - torch.arange(masked, end)  # (n,keys)
            mask = (distance >= 0) & (doc[begin:end, None] == doc[masked:end])
            if window:
                mask &= distance < window
            bias = torch.zeros(mask.shape).masked_fill_(~mask, -math.inf)[:, None]
            blocks.append(Block(start + first, start + begin, start + end, bias))
        start += size
    return blocks


@torch.compiler.disable  # lengths differ in every batch: compiled, each would be a new graph
def attend_documents(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int,
                     scale: float, softcap: float = 0.0) -> Tensor:
    """`sdpa` for each document. The backward passes of split and cat copy every number once."""
    if len(set(lengths)) == 1 and not softcap:  # one batch; not with a cap, whose scores are kept
        batched = (x.reshape(len(lengths), -1, *x.shape[2:]) for x in (q, k, v))  # (N,T,H,D)
        return sdpa(*batched, scale, window=window).reshape(q.shape)
    documents = zip(*(x.flatten(0, 1)[None].split(lengths, dim=1) for x in (q, k, v)), strict=True)
    outputs = [sdpa(*qkv, scale, softcap, window=window) for qkv in documents]
    return torch.cat(outputs, dim=1).view(q.shape)


@torch.compiler.disable  # blocks differ in every batch
def attend_blocks(q: Tensor, k: Tensor, v: Tensor, blocks: list[Block], lengths: list[int],
                  window: int, side: int, fused: bool, scale: float) -> Tensor:
    """Attention by blocks of queries: q (B,T,H,D), k, v (B,T,K,D) -> (B,T,H,D).

    The documents are `side` parts of equal lengths, and a product is computed for all parts at
    once. `fused`: the forward pass is torch's kernel for each document.
    """
    parts = (x.reshape(side, -1, *x.shape[2:]) for x in (q, k, v))
    return _BlockAttention.apply(*parts, blocks, lengths, window, fused, scale).view(q.shape)


class _BlockAttention(torch.autograd.Function):
    """q (P,N,H,D), k, v (P,N,K,D) -> (P,N,H,D) for P parts of N tokens, P N = B T.

    Only q, k, v and y are kept: the backward pass computes the scores again. Queries of heads that
    share keys are rows of one product: a block is (P K, n G, D) with G = H/K. Factors, sums, scores
    and their gradient are float32; see `bf16_factors` for how such products are fast.
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
        sum_p_dp = (g.float() * y).sum(-1, keepdim=True)  # (P,N,H,1)
        with bf16_factors(q.dtype) as is_bf16:
            for b in ctx.blocks:
                S = slice(b.first, b.end)  # keys that the block attends to
                q_b, g_b = block_rows(q, b, K), block_rows(g, b, K)  # (PK,nG,D)
                p = probabilities(q_b, keys, b, ctx.scale, is_bf16)  # (PK,nG,S)
                dv[:, S].baddbmm_(p.mT, g_b)
                dp = torch.bmm(g_b, values[:, S].mT)  # (PK,nG,S)
                ds = p.mul_(dp.sub_(block_rows(sum_p_dp, b, K)))
                write_block_rows(dq, b, K, torch.bmm(ds, keys[:, S]).mul_(ctx.scale))
                dk[:, S].baddbmm_(ds.mT, q_b)
        dk, dv = (x.view(len(k), K, *x.shape[1:]).transpose(1, 2).to(k.dtype)
                  for x in (dk.mul_(ctx.scale), dv))
        return dq, dk, dv, *[None] * 5


def blocks_forward(q: Tensor, k: Tensor, v: Tensor, blocks: list[Block], scale: float) -> Tensor:
    """The forward pass by blocks: q (P,N,H,D), k, v (P,N,K,D) -> (P,N,H,D)."""
    K, y = k.shape[2], torch.empty_like(q)
    keys, values = to_heads(k), to_heads(v)  # (PK,N,D)
    with bf16_factors(q.dtype) as is_bf16:
        for b in blocks:
            p = probabilities(block_rows(q, b, K), keys, b, scale, is_bf16)  # (PK,nG,S)
            write_block_rows(y, b, K, torch.bmm(p, values[:, b.first : b.end]))
    return y


def to_heads(x: Tensor) -> Tensor:
    """(P,N,K,D) -> (PK,N,D) float32, contiguous."""
    return to_float32(x.transpose(1, 2)).flatten(0, 1)


def to_float32(x: Tensor) -> Tensor:
    """x as a contiguous float32 tensor, in one pass for any strides and dtype."""
    return torch.empty(x.shape, dtype=torch.float32, device=x.device).copy_(x)


def block_rows(x: Tensor, b: Block, K: int) -> Tensor:
    """The queries of a block, x (P,N,H,D), grouped by key head: (P K, n G, D) float32."""
    queries = x[:, b.begin : b.end].unflatten(2, (K, -1)).transpose(1, 2)  # (P,K,n,G,D)
    return to_float32(queries).flatten(2, 3).flatten(0, 1)


def write_block_rows(x: Tensor, b: Block, K: int, rows: Tensor) -> None:
    """The inverse of `block_rows`: write rows (P K, n G, D) into x (P,N,H,D)."""
    queries = x[:, b.begin : b.end].unflatten(2, (K, -1))  # (P,n,K,G,D)
    queries.copy_(rows.view(len(x), K, b.end - b.begin, -1, rows.shape[-1]).transpose(1, 2))


def probabilities(q: Tensor, keys: Tensor, b: Block, scale: float, is_bf16: bool) -> Tensor:
    """Softmax over the keys of a block: q (PK,nG,D), keys (PK,N,D) -> (PK,nG,S), all float32.

    `is_bf16`: q and keys hold bf16 numbers. q times scale would not, so the product is scaled.
    """
    keys = keys[:, b.first : b.end].mT  # (PK,D,S)
    if is_bf16:
        scores = torch.baddbmm(q.new_empty(()), q, keys, beta=0, alpha=scale)
    else:
        scores = torch.bmm(q * scale, keys)
    n, n_masked = len(b.bias), b.bias.shape[-1]
    scores.unflatten(1, (n, -1))[..., -n_masked:].add_(b.bias)
    return torch.softmax(scores, -1)


@contextmanager
def bf16_factors(dtype: torch.dtype) -> Iterator[bool]:
    """While the context is open, float32 products may round their factors to bf16, if `dtype` is
    bf16. Yields whether it is.

    The CPU's bf16 kernels are two to three times as fast, but the result of a bf16 product is
    rounded to bf16, which is too coarse for scores. float32 products with rounded factors use these
    kernels and keep the float32 sums. Factors that were bf16 before are not changed; probabilities
    and their gradient are rounded as in torch's fused kernel. The setting belongs to the process,
    so two threads must not use it at once.
    """
    if dtype != torch.bfloat16:
        yield False
        return
    matmul = torch.backends.mkldnn.matmul
    precision = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield True
    finally:
        matmul.fp32_precision = precision
