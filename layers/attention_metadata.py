"""Attention metadata of a batch of packed rows: its mask, and the backend that computes attention.

The metadata is built once per batch (and per window) and is used by all layers. Each class is one
backend; `attention_metadata` and `cache_metadata` choose among them:

    Causal      each row is one document
    DenseMask   a mask over all pairs of tokens, on any device
    VarlenFlash a GPU in bf16 or fp16: one flash kernel for all documents
    CpuBlocks   a CPU, short documents: blocks of queries and the keys that they attend to
    PerDocument a CPU, long documents: torch's kernel for each document
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
    """What all layers need to compute attention for one batch."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float,
               softcap: float = 0.0) -> Tensor:
        """q (B,T,H,D) over k, v (B,S,K,D) -> (B,T,H,D)."""

    @property
    def tensors(self) -> list[Tensor]:
        """Its tensors on the device; the memory estimate counts them."""


@dataclass
class Causal:
    """Each row is one document; a token attends to `window` tokens, itself included; 0: to all."""

    window: int = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float,
               softcap: float = 0.0) -> Tensor:
        return sdpa(q, k, v, scale, softcap, window=self.window)

    @property
    def tensors(self) -> list[Tensor]:
        return []


@dataclass
class DenseMask:
    """`mask` (B,1,T,S) is True where a query attends to a key."""

    mask: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float,
               softcap: float = 0.0) -> Tensor:
        return sdpa(q, k, v, scale, softcap, self.mask)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.mask]


@dataclass
class VarlenFlash:
    """`cu_seqlens` (N+1,) int32: where each document begins, rows one after the other."""

    cu_seqlens: Tensor
    window: int = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float,
               softcap: float = 0.0) -> Tensor:
        assert not softcap, "the flash kernel has no soft-capping"
        return varlen_flash(q, k, v, self.cu_seqlens, self.window, scale)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.cu_seqlens]


@dataclass
class PerDocument:
    """`lengths` of the documents, rows one after the other."""

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
    """The blocks of one of `side` equal parts of the documents; `lengths` of all documents.

    `has_amx`: whether the CPU has Intel's AMX. torch's kernel then has the faster forward pass in
    bf16, because it packs the keys once for all queries.
    """

    blocks: list[Block]
    lengths: list[int]
    window: int = 0
    side: int = 1
    has_amx: bool = HAS_AMX

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float,
               softcap: float = 0.0) -> Tensor:
        assert not softcap, "blocks have no soft-capping"
        return attend_blocks(q, k, v, self.blocks, self.lengths, self.window, self.side,
                             self.fused_forward(q.dtype), scale)

    def fused_forward(self, dtype: torch.dtype) -> bool:
        """Whether torch's kernel computes the forward pass: not if a window needs a mask, nor if
        the blocks hold many documents each."""
        needs_no_mask = not self.window or max(self.lengths) <= self.window
        has_few_documents = len(self.lengths) <= 4 * len(self.blocks) * self.side
        return (self.has_amx and dtype == torch.bfloat16 and needs_no_mask and has_few_documents)

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

    `softcap`: scores are capped, so no kernel for packed rows can be used. A CPU uses blocks if no
    document is longer than `max_block_length`.
    """
    B, T = doc.shape
    if backend in ("cpu", "cpu_documents"):
        if backend == "cpu" and max(lengths) <= max_block_length and not softcap:
            return _blocks(lengths, window)
        return PerDocument(lengths, window) if len(lengths) > B else Causal(window)
    varlen = backend == "varlen_flash" and not softcap
    # torch's causal kernel has no window, but the varlen kernel has, also for rows of one document
    if len(lengths) == B and not (varlen and 0 < window < T):
        return Causal(window)
    if varlen:
        return VarlenFlash(to_device_async(padded_cu_seqlens(lengths), doc.device), window)
    same_document = doc[:, :, None] == doc[:, None, :]  # (B,T,T)
    return DenseMask((same_document & causal_mask(T, window, doc.device))[:, None])


def padded_cu_seqlens(lengths: list[int]) -> Tensor:
    """The start of each document and the end of the last: (n,) int32, where n is a power of two.

    Empty documents fill it, so that one compiled graph is used for many batches.
    """
    ends = torch.tensor(lengths).cumsum(0)
    padded = ends.new_full((1 << len(lengths).bit_length(),), int(ends[-1]))
    padded[: len(lengths)] = ends - torch.tensor(lengths)
    return padded.int()


def cache_metadata(pos: Tensor, cache_len: int, exact: bool, window: int = 0) -> AttentionMetadata:
    """The metadata of tokens at pos (B,T) that read `cache_len` keys of a cache. `exact`: that is
    the length of the longest row."""
    B, T = pos.shape
    needs_window = 0 < window < cache_len
    if exact and (cache_len == T or (B == 1 and T == 1 and not needs_window)):
        return Causal(window)  # the first tokens; or one token that attends to all keys
    keys = torch.arange(cache_len, device=pos.device)  # (S,)
    mask = keys <= pos[..., None]  # (B,T,S)
    if needs_window:
        mask = mask & (keys > pos[..., None] - window)
    return DenseMask(mask[:, None])


def _blocks(lengths: list[int], window: int) -> CpuBlocks:
    """Blocks of the documents; if all have one length, of up to four equal parts at once."""
    side = 1
    if len(set(lengths)) == 1 and 2 * lengths[0] >= BLOCK:
        side = max(n for n in (1, 2, 3, 4) if len(lengths) % n == 0)
    first_part = lengths[: len(lengths) // side]
    return CpuBlocks(cpu_blocks(first_part, window, BLOCK), lengths, window, side)
