"""Softmax attention on packed rows: who sees whom, and the fastest way to compute it.

A token sees itself and what stands before it in its own document, at most `window` tokens back.
There is one plain way to say so, a mask of all pairs, and it computes mostly what nobody sees; the
others skip that, each tested equal to it:

    blocks      CPU, short documents: products over BLOCK queries and just the keys they can see
    documents   CPU, long documents: torch's own kernel on one after the other; of short ones the
                forward pass, where the CPU multiplies tiles of matrices
    offsets     GPU, bf16 or fp16: one flash kernel over documents end to end (Dao 2023)
    tiles       the same where this torch has no such kernel: its flex_attention, compiled, which
                leaves out the tiles of scores that nobody sees (Dong et al. 2024)

Scores and softmax are float32 on every path.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.transfer import host, to_device_async

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch
    varlen_attn = None

GROUPED = varlen_attn is not None and "enable_gqa" in signature(varlen_attn).parameters
BLOCK = 128  # queries whose scores stand at once on a CPU; 64 and 256 are slower in bf16
TILE = 128  # queries, and keys, that flex_attention takes or leaves together: its own default
SIDE = 4  # documents of one length that go through one product, side by side
SHORT = 1024  # tokens: with a longer document among them, torch's kernel is the faster one
ONE_BY_ONE = ("cpu",)  # where packed documents are not attended by a mask
TILED = torch.cpu._is_amx_tile_supported()  # by Intel's AMX; torch's kernel then lays keys out


@dataclass
class Block:
    """Queries [begin, end) of documents end to end, which see no key before `first`.

    `bias` (end - begin, 1, n) float32 is -inf where a query does not see one of the last n keys.
    """

    first: int
    begin: int
    end: int
    bias: Tensor


@dataclass
class Layout:
    """Who sees whom in this batch, found once and used by all layers that see as far.

    One of these is there, and `lengths` beside blocks; without any, each row is one document, plain
    causal.
    `blocks`, `lengths`, `offsets` (N+1,) int32: documents end to end over all rows, see above;
    blocks are those of one of `side` equal parts of them.
    `tiles`: flex_attention's BlockMask, which tiles of scores are seen, and who in them.
    `mask` (B,1,T,S): True where a key is seen. `window`: tokens seen back, the token itself
    included; 0: all.
    """

    blocks: list[Block] | None = None
    lengths: list[int] | None = None
    offsets: Tensor | None = None
    tiles: Any = None
    mask: Tensor | None = None
    window: int = 0
    side: int = 1

    @property
    def tensors(self) -> list[Tensor]:
        """All that it holds on the device while the layers run."""
        held = [self.offsets, self.mask, *(x.bias for x in self.blocks or ())]
        return [x for x in held if x is not None]

    @classmethod
    def of(cls, doc: Tensor, pos: Tensor, extent: int | None = None, window: int = 0,
           plain: bool = False, fused: str = "", exact: bool = True) -> Layout:
        """From doc, pos (B,T); `extent`: of the cache that is read, if any, and whether it is
        `exact` or reaches beyond the longest row.

        `plain`: for scores that no fused kernel computes; `fused`: the kernel there is (`kernel`).
        """
        B, T = doc.shape
        if extent is not None:
            near = not window or extent <= window
            if exact and (extent == T or (B == 1 and T == 1 and near)):
                return cls(window=window)  # first tokens: causal; the next one sees all keys
            keys = torch.arange(extent, device=pos.device)
            mask = keys <= pos[..., None]  # (B,T,S)
            return cls(mask=(mask if near else mask & (keys > pos[..., None] - window))[:, None])
        known = host(doc)
        first = torch.ones_like(known, dtype=torch.bool)
        first[:, 1:] = known[:, 1:] != known[:, :-1]
        starts = first.flatten().nonzero().squeeze(-1)
        if doc.device.type in ONE_BY_ONE:
            lengths = torch.diff(starts, append=starts.new_tensor([B * T])).tolist()
            if max(lengths) <= SHORT and not plain:
                alike = len(set(lengths)) == 1 and 2 * lengths[0] >= BLOCK
                side = next(n for n in range(SIDE if alike else 1, 0, -1) if len(lengths) % n == 0)
                part = lengths[: len(lengths) // side]
                return cls(blocks=blocks_of(part, window), lengths=lengths, window=window,
                           side=side)
            return cls(lengths=lengths if len(lengths) > B else None, window=window)
        if fused == "tiles" and not plain and torch.is_grad_enabled():  # one shape: it is compiled
            return cls(tiles=tiles_of(doc, window), window=window)
        flat = fused == "offsets" and not plain
        if len(starts) == B and not (flat and 0 < window < T):  # else a mask would say the window
            return cls(window=window)
        if flat:
            # a power of two, filled up with empty documents: the same graph for many batches
            ends = starts.new_full((1 << len(starts).bit_length(),), B * T)
            ends[: len(starts)] = starts
            return cls(offsets=to_device_async(ends.int(), doc.device), window=window)
        seen = causal_mask(T, window, doc.device)
        return cls(mask=((doc[:, :, None] == doc[:, None, :]) & seen)[:, None])


def compiled(device: torch.device) -> bool:
    """Whether attention is part of a compiled block: not where documents are gone through here."""
    return device.type not in ONE_BY_ONE


def causal_mask(T: int, window: int, device: Any) -> Tensor:
    """True where a token sees another: not ahead, and within the window if there is one, (T,T)."""
    seen = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    return seen.triu(1 - window) if window else seen


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float,
           cap: float = 0.0) -> Tensor:
    """Softmax attention: q (B,T,H,D) over k, v (B,S,K,D) -> (B,T,H,D), each query head with its
    group's keys."""
    B, T, H, D = q.shape
    if layout.blocks is not None:
        return attend_blocks(q, k, v, layout, scale)
    if layout.lengths is not None:
        return attend_documents(q, k, v, layout, scale, cap)
    if layout.offsets is not None:
        return attend_offsets(q, k, v, layout, scale)
    if layout.tiles is not None:
        return attend_tiles(q, k, v, layout, scale)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B,H,T,D), (B,K,S,D)
    mask, causal = layout.mask, layout.mask is None and T > 1
    if causal and (cap or 0 < layout.window < T):
        mask, causal = causal_mask(T, layout.window, q.device), False
    # by the kernel itself: no copies of k and v; of a GPU's others none is fused that can
    grouped = mask is None and not cap and (q.is_cpu or flash(q.device, q.dtype, D))
    if T == 1:  # nor here: a group's heads are as many queries of the same keys
        q = q.reshape(B, k.shape[1], -1, D)  # (B,K,H/K,D)
    elif k.shape[1] != H and not grouped:
        k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))  # (B,H,S,D)
    if not cap:
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale,
                                           enable_gqa=k.shape[1] != q.shape[1])
        return y.reshape(B, H, T, D).transpose(1, 2)
    scores = cap * torch.tanh((q @ k.mT).float() * (scale / cap))  # (B,H,T,S): no fused kernel caps
    scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
    return (scores.softmax(-1).to(v.dtype) @ v).reshape(B, H, T, D).transpose(1, 2)


@torch.compiler.disable  # lengths differ in every batch: compiled, each would be a new graph
def attend_documents(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float,
                     cap: float) -> Tensor:
    """`attend`, document by document; split and cat, because their backward passes copy nothing
    twice."""
    lengths, alone = layout.lengths, Layout(window=layout.window)
    if len(set(lengths)) == 1 and not cap:  # side by side; not where all scores would stand
        together = (x.reshape(len(lengths), -1, *x.shape[2:]) for x in (q, k, v))
        return attend(*together, alone, scale, cap).reshape(q.shape)
    parts = (x.flatten(0, 1)[None].split(lengths, dim=1) for x in (q, k, v))
    done = [attend(*part, alone, scale, cap) for part in zip(*parts, strict=True)]
    return torch.cat(done, dim=1).view(q.shape)


def varlen() -> tuple[Any, bool]:
    """torch's flash attention over documents end to end, and whether it takes K < H heads of keys;
    (None, False) where this torch has none."""
    return varlen_attn, GROUPED


def kernel(device: torch.device, dtype: torch.dtype, D: int) -> str:
    """What computes packed rows here: `offsets`, that kernel, or `tiles` where this torch has none;
    neither (a mask) where there is no flash kernel."""
    return fused() if flash(device, dtype, D) else ""


def flash(device: torch.device, dtype: torch.dtype, D: int) -> bool:
    """Whether a GPU has torch's flash kernels: Ampere or later, in 16 bits, heads to width 256."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and D <= 256 \
        and torch.cuda.get_device_capability(device) >= (8, 0)


def fused() -> str:
    """Which of the two a GPU that is new enough takes."""
    return "tiles" if varlen()[0] is None else "offsets"


def attend_offsets(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
    """`attend` by one kernel over documents end to end; no host waits, nothing depends on their
    number."""
    (T, H, D), K = q.shape[1:], k.shape[2]
    kernel, grouped = varlen()
    if K != H and not grouped:
        k, v = (x.repeat_interleave(H // K, dim=2) for x in (k, v))
    more = {"enable_gqa": True} if K != H and grouped else {}
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    if D % 8:  # which it does not take; a pad of nothing would be a copy
        q, k, v = (F.pad(x, (0, -D % 8)) for x in (q, k, v))
    y = kernel(q, k, v, layout.offsets, layout.offsets, T, T, scale=scale,
               window_size=(layout.window - 1, 0), **more)  # (-1, 0): causal
    return y[..., :D].reshape(-1, T, H, D)


def tiles_of(doc: Tensor, window: int) -> Any:
    """Which tiles of scores are seen in part or whole, as flex_attention's BlockMask: doc (B,T).

    Documents lie in order, so a tile is known by the first and last of its queries and keys. All
    shapes depend on (B,T) alone, and no host waits.
    """
    from torch.nn.attention.flex_attention import BlockMask

    (_, T), own = doc.shape, torch.zeros_like(doc)
    own[:, 1:] = (doc[:, 1:] != doc[:, :-1]).cumsum(1)  # (B,T): each document's number in its row
    edge = F.pad(own, (0, -T % TILE), value=T).unflatten(1, (-1, TILE))  # past the end: of none
    begin, end = edge[..., 0], edge[..., -1]  # (B,n)
    at = torch.arange(begin.shape[1], device=doc.device)
    gap = at[:, None] - at  # (n,n): tiles from keys to queries
    seen = (gap >= 0) & (end[:, None] >= begin[..., None])  # (B,n,n)
    whole = seen & (gap > 0) & (begin[:, None] == end[..., None])
    if window:
        seen, whole = seen & ((gap - 1) * TILE + 1 < window), whole & ((gap + 1) * TILE <= window)

    def listed(x: Tensor) -> tuple[Tensor, Tensor]:
        """How many tiles of each row of them, and which, those first: (B,1,n), (B,1,n,n)."""
        order = x.int().argsort(dim=-1, descending=True, stable=True)
        return x.sum(-1).int()[:, None], order.int()[:, None]

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        near = (q >= k) & (own[b, q] == own[b, k])
        return near & (q - k < window) if window else near

    return BlockMask.from_kv_blocks(*listed(seen & ~whole), *listed(whole), BLOCK_SIZE=TILE,
                                    mask_mod=sees, seq_lengths=(T, T))


def flex() -> Any:
    """torch's flex_attention, compiled, as part of a compiled block or alone: it is slow and large
    otherwise."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if torch.compiler.is_compiling() else alone(flex_attention)


@cache
def alone(kernel: Any) -> Any:
    """A kernel compiled by itself, a graph for each shape."""
    return torch.compile(kernel, dynamic=False)


def attend_tiles(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
    """`attend` by flex_attention."""
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return flex()(*heads, block_mask=layout.tiles, scale=scale,
                  enable_gqa=k.shape[2] != q.shape[2]).transpose(1, 2)


def blocks_of(lengths: list[int], window: int) -> list[Block]:
    """Documents end to end as blocks: a long one is cut, short neighbours share one."""
    parts: list[list[int]] = []
    for n in lengths:
        if parts and sum(parts[-1]) + n <= BLOCK:
            parts[-1].append(n)
        else:
            parts.append([n])
    found, start = [], 0
    for part in parts:
        size = sum(part)
        doc = torch.repeat_interleave(torch.arange(len(part)), torch.tensor(part))  # (size,)
        for begin in range(0, size, BLOCK):
            end = min(begin + BLOCK, size)
            first = max(0, begin + 1 - window) if window else 0
            # all see the keys before this block, if they reach back that far
            last = end - (first if window and end - first > window else begin)
            pair = torch.arange(begin, end)[:, None] - torch.arange(end - last, end)  # (n,last)
            seen = (pair >= 0) & (doc[begin:end, None] == doc[end - last : end])
            seen = seen & (pair < window) if window else seen
            bias = torch.zeros(seen.shape).masked_fill_(~seen, -math.inf)[:, None]
            found.append(Block(start + first, start + begin, start + end, bias))
        start += size
    return found


@torch.compiler.disable  # blocks differ in every batch
def attend_blocks(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
    """`attend`, block by block of queries; on a CPU its gradient is up to three times as fast as
    the fused kernel's."""
    parts = (x.reshape(layout.side, -1, *x.shape[2:]) for x in (q, k, v))
    return _Blocks.apply(*parts, layout, scale).view(q.shape)


def tiled(dtype: torch.dtype, layout: Layout) -> bool:
    """Whether the fused kernel's forward pass is the faster one: twice as fast in bf16 where the
    CPU has AMX, for it lays keys out once for all its queries; else no faster than blocks, and
    slower where a block holds many documents."""
    whole = not layout.window or max(layout.lengths) <= layout.window
    long = len(layout.lengths) <= 4 * len(layout.blocks) * layout.side
    return TILED and dtype == torch.bfloat16 and whole and long


class _Blocks(torch.autograd.Function):
    """q (P,N,H,D), k, v (P,N,K,D) -> (P,N,H,D), P parts side by side, P N = B T. Only q, k, v, y
    are kept: each pass makes the scores again.

    Queries that share keys are rows of one product: a block is (P K, n H/K, D). Factors and sums
    are float32, and so are scores and their gradient; `for_bf16` says how that is fast.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout,
                scale: float) -> Tensor:
        y = attend_documents(q, k, v, layout, scale, 0.0) if tiled(q.dtype, layout) \
            else by_blocks(q, k, v, layout.blocks, scale)
        ctx.save_for_backward(q, k, v, y)
        ctx.blocks, ctx.scale = layout.blocks, scale
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y = ctx.saved_tensors
        K, dq = k.shape[2], torch.empty_like(q)
        keys, values = by_head(k), by_head(v)  # (PK,N,D)
        dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
        mean = (g.float() * y).sum(-1, keepdim=True)  # (P,N,H,1): sum of p dp
        with for_bf16(q.dtype) as narrow:
            for b in ctx.blocks:
                seen = slice(b.first, b.end)
                q_b, g_b = rows(q, b, K), rows(g, b, K)  # (PK,nG,D)
                p = probabilities(q_b, keys, b, ctx.scale, narrow)  # (PK,nG,S)
                dv[:, seen].baddbmm_(p.mT, g_b)
                dp = torch.bmm(g_b, values[:, seen].mT)
                ds = p.mul_(dp.sub_(rows(mean, b, K)))
                put(dq, b, K, torch.bmm(ds, keys[:, seen]).mul_(ctx.scale))
                dk[:, seen].baddbmm_(ds.mT, q_b)
        dk, dv = (x.view(len(k), K, *x.shape[1:]).transpose(1, 2).to(k.dtype)
                  for x in (dk.mul_(ctx.scale), dv))
        return dq, dk, dv, None, None


def by_blocks(q: Tensor, k: Tensor, v: Tensor, blocks: list[Block], scale: float) -> Tensor:
    """What `_Blocks` gives, by its own products: q (P,N,H,D), k, v (P,N,K,D) -> (P,N,H,D)."""
    K, y = k.shape[2], torch.empty_like(q)
    keys, values = by_head(k), by_head(v)  # (PK,N,D)
    with for_bf16(q.dtype) as narrow:
        for b in blocks:
            p = probabilities(rows(q, b, K), keys, b, scale, narrow)  # (PK,nG,S)
            put(y, b, K, torch.bmm(p, values[:, b.first : b.end]))
    return y


def by_head(x: Tensor) -> Tensor:
    """(P,N,K,D) -> (PK,N,D) float32, end to end in memory."""
    return widened(x.transpose(1, 2)).flatten(0, 1)


def widened(x: Tensor) -> Tensor:
    """x in float32, end to end in memory, in one pass whatever its strides and dtype."""
    return torch.empty(x.shape, dtype=torch.float32, device=x.device).copy_(x)


def rows(x: Tensor, b: Block, K: int) -> Tensor:
    """A block's queries (P,N,H,D) by the key head they share: (P K, n H/K, D) float32."""
    part = x[:, b.begin : b.end].unflatten(2, (K, -1)).transpose(1, 2)  # (P,K,n,G,D)
    return widened(part).flatten(2, 3).flatten(0, 1)


def put(x: Tensor, b: Block, K: int, part: Tensor) -> None:
    """The inverse of `rows`: write (P K, nG, D) into x (P,N,H,D)."""
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
def for_bf16(dtype: torch.dtype) -> Iterator[bool]:
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
