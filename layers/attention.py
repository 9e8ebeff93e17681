"""Softmax attention on packed rows, by torch's fused kernels, or by the plain formula where scores
are capped.

A token attends to itself and to earlier tokens of its own document: to all of them, or to the last
`window` tokens, itself included. Scores and softmax are float32. layers/attention_metadata.py
describes the mask and chooses the backend; layers/attention_cpu.py has the kernels for a CPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn


def causal_mask(T: int, window: int, device: Any) -> Tensor:
    """Which tokens each token attends to, (T,T) bool: itself and earlier ones, in the window."""
    mask = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    return mask.triu(1 - window) if window else mask


def supports_flash(device: torch.device, dtype: torch.dtype, D: int) -> bool:
    """Whether torch has a flash kernel: on a GPU from Ampere on, in 16 bits, heads of width <= 256.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or D > 256:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float = 0.0,
         mask: Tensor | None = None, window: int = 0) -> Tensor:
    """Scaled dot-product attention: q (B,T,H,D) over k, v (B,S,K,D) -> (B,T,H,D).

    Each query head reads the keys of its group. `mask` (B,1,T,S) is True where a query attends to a
    key; without a mask attention is causal, within the window.
    """
    B, T, H, D = q.shape
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B,H,T,D), (B,K,S,D)
    causal = mask is None and T > 1
    if causal and (softcap or 0 < window < T):
        mask, causal = causal_mask(T, window, q.device), False
    # The CPU's kernel and flash read grouped keys without a copy; other GPU kernels would not be
    # fused with them.
    grouped = mask is None and not softcap and (q.is_cpu or supports_flash(q.device, q.dtype, D))
    if T == 1:  # the heads of a group are treated as several queries of the same keys
        q = q.reshape(B, k.shape[1], -1, D)  # (B,K,H/K,D)
    elif k.shape[1] != H and not grouped:
        k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))  # (B,H,S,D)
    if not softcap:
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale,
                                           enable_gqa=k.shape[1] != q.shape[1])
        return y.reshape(B, H, T, D).transpose(1, 2)
    # no fused kernel has soft-capping (Gemma 2)
    scores = softcap * torch.tanh((q @ k.mT).float() * (scale / softcap))  # (B,H,T,S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return (scores.softmax(-1).to(v.dtype) @ v).reshape(B, H, T, D).transpose(1, 2)


def varlen_flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int,
                 scale: float) -> Tensor:
    """One flash kernel for all documents of all rows (FlashAttention-2, Dao 2023); shapes: `sdpa`.

    cu_seqlens (N+1,) int32: where each document begins, rows one after the other. No GPU sync.
    """
    (T, H, D), K = q.shape[1:], k.shape[2]
    options = {"enable_gqa": True} if K != H else {}
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (B T,H,D), (B T,K,D)
    if D % 8:  # the kernel accepts only multiples of 8
        q, k, v = (F.pad(x, (0, -D % 8)) for x in (q, k, v))
    y = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, T, T, scale=scale,
                    window_size=(window - 1, 0), **options)  # (-1, 0): causal without a window
    return y[..., :D].reshape(-1, T, H, D)
