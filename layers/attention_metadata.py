"""Who sees whom in a batch of packed rows, and which backend computes attention for it.

The metadata is built once per batch (and per window) and is used by all layers. Each class is one
way to compute attention; `attention_metadata` and `cache_metadata` choose among them:

    Causal      each row is one document
    DenseMask   a mask of all pairs, which every device can take
    VarlenFlash a GPU, bf16 or fp16: one flash kernel over documents end to end
    CpuBlocks   a CPU, short documents: blocks of queries and only the keys that they see
    PerDocument a CPU, long documents: torch's kernel on one after the other
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from layers.attention import causal_mask, sdpa, supports_flash, varlen_flash
from layers.attention_cpu import Block, attend_blocks, attend_documents, cpu_blocks
from runtime.transfer import to_device_async

Backend = Literal["auto", "cpu", "cpu_documents", "varlen_flash", "sdpa_mask"]
BLOCK = 128  # queries of a block; 64 and 256 are slower in bf16
HAS_AMX = torch.cpu._is_amx_tile_supported()


class AttentionMetadata(Protocol):
    """q (B,T,H,D) over k, v (B,S,K,D) -> (B,T,H,D); `tensors`: what it holds on the device."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float,
               softcap: float = 0.0) -> Tensor: ...

    @property
    def tensors(self) -> list[Tensor]: ...


@dataclass
class Causal:
    """Each row is one document; a token sees `window` tokens back, its own included; 0: all."""

    window: int = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float,
               softcap: float = 0.0) -> Tensor:
        return sdpa(q, k, v, scale, softcap, window=self.window)

    @property
    def tensors(self) -> list[Tensor]:
        return []


@dataclass
class DenseMask:
    """`mask` (B,1,T,S) is True where a key is seen."""

    mask: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float,
               softcap: float = 0.0) -> Tensor:
        return sdpa(q, k, v, scale, softcap, self.mask)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.mask]


@dataclass
class VarlenFlash:
    """`cu_seqlens` (N+1,) int32: where each document begins, over all rows end to end."""

    cu_seqlens: Tensor
    window: int = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float,
               softcap: float = 0.0) -> Tensor:
        assert not softcap, "the flash kernel caps no scores"
        return varlen_flash(q, k, v, self.cu_seqlens, self.window, scale)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.cu_seqlens]


@dataclass
class PerDocument:
    """`lengths` of the documents, over all rows end to end."""

    lengths: list[int]
    window: int = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float,
               softcap: float = 0.0) -> Tensor:
        return attend_documents(q, k, v, self.lengths, self.window, scale, softcap)

    @property
    def tensors(self) -> list[Tensor]:
        return []


@dataclass
class CpuBlocks:
    """Blocks of one of `side` equal parts of the documents, whose `lengths` are over all rows.

    `has_amx`: whether the CPU multiplies tiles (Intel's AMX). torch's kernel then has the faster
    forward pass in bf16, because it lays keys out once for all its queries.
    """

    blocks: list[Block]
    lengths: list[int]
    window: int = 0
    side: int = 1
    has_amx: bool = HAS_AMX

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float,
               softcap: float = 0.0) -> Tensor:
        assert not softcap, "blocks cap no scores"
        return attend_blocks(q, k, v, self.blocks, self.lengths, self.window, self.side,
                             self.fused_forward(q.dtype), scale)

    def fused_forward(self, dtype: torch.dtype) -> bool:
        """Whether torch's kernel computes the forward pass: not where a window would need a mask,
        nor where a block holds many documents."""
        sees_all = not self.window or max(self.lengths) <= self.window
        few = len(self.lengths) <= 4 * len(self.blocks) * self.side
        return self.has_amx and dtype == torch.bfloat16 and sees_all and few

    @property
    def tensors(self) -> list[Tensor]:
        return [block.bias for block in self.blocks]


def attention_backend(device: torch.device, dtype: torch.dtype, D: int) -> Backend:
    """The backend for packed rows on a device, with products in `dtype` and heads of width D."""
    if device.type == "cpu":
        return "cpu"
    return "varlen_flash" if supports_flash(device, dtype, D) else "sdpa_mask"


def attention_metadata(doc: Tensor, lengths: list[int], backend: Backend, window: int = 0,
                       softcap: bool = False, max_block_length: int = 1024) -> AttentionMetadata:
    """The metadata of packed rows doc (B,T), whose documents have these lengths.

    `softcap`: scores are capped, which no kernel of packed rows does. A CPU takes blocks where no
    document is longer than `max_block_length`.
    """
    B, T = doc.shape
    if backend in ("cpu", "cpu_documents"):
        if backend == "cpu" and max(lengths) <= max_block_length and not softcap:
            return _blocks(lengths, window)
        return PerDocument(lengths, window) if len(lengths) > B else Causal(window)
    varlen = backend == "varlen_flash" and not softcap
    # torch's causal kernel knows no window; the varlen kernel does, also where rows are documents
    if len(lengths) == B and not (varlen and 0 < window < T):
        return Causal(window)
    if varlen:
        return VarlenFlash(to_device_async(padded_cu_seqlens(lengths), doc.device), window)
    seen = causal_mask(T, window, doc.device)
    return DenseMask(((doc[:, :, None] == doc[:, None, :]) & seen)[:, None])


def padded_cu_seqlens(lengths: list[int]) -> Tensor:
    """Where each document begins and the last one ends: (n,) int32 with n a power of two.

    It is filled up with empty documents, so that a compiled graph serves many batches.
    """
    ends = torch.tensor(lengths).cumsum(0)
    padded = ends.new_full((1 << len(lengths).bit_length(),), int(ends[-1]))
    padded[: len(lengths)] = ends - torch.tensor(lengths)
    return padded.int()


def cache_metadata(pos: Tensor, cache_len: int, exact: bool, window: int = 0) -> AttentionMetadata:
    """The metadata of tokens at pos (B,T) that read `cache_len` keys of a cache; `exact`: no more
    than the longest row holds."""
    B, T = pos.shape
    sees_all = not window or cache_len <= window
    if exact and (cache_len == T or (B == 1 and T == 1 and sees_all)):
        return Causal(window)  # the first tokens; or one token that sees all keys
    keys = torch.arange(cache_len, device=pos.device)
    mask = keys <= pos[..., None]  # (B,T,S)
    if not sees_all:
        mask = mask & (keys > pos[..., None] - window)
    return DenseMask(mask[:, None])


def _blocks(lengths: list[int], window: int) -> CpuBlocks:
    """Blocks; up to four parts of documents of one length go through one product."""
    alike = len(set(lengths)) == 1 and 2 * lengths[0] >= BLOCK
    side = next(n for n in range(4 if alike else 1, 0, -1) if len(lengths) % n == 0)
    part = lengths[: len(lengths) // side]
    return CpuBlocks(cpu_blocks(part, window, BLOCK), lengths, window, side)
