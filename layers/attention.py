"""Softmax attention on packed rows: torch's fused kernels, or the plain formula where they cannot.

A token sees itself and the tokens before it in its own document, at most `window` tokens back (its
own included; 0: all). Scores and softmax are float32. layers/attention_metadata.py describes who
sees whom and chooses the backend; layers/attention_cpu.py is the CPU's own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn


def causal_mask(T: int, window: int, device: Any) -> Tensor:
    """True where a token sees another: not ahead, and within the window if there is one, (T,T)."""
    seen = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    return seen.triu(1 - window) if window else seen


def supports_flash(device: torch.device, dtype: torch.dtype, D: int) -> bool:
    """Whether a GPU has torch's flash kernels: Ampere or later, in 16 bits, heads to width 256."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and D <= 256 \
        and torch.cuda.get_device_capability(device) >= (8, 0)


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float = 0.0,
         mask: Tensor | None = None, window: int = 0) -> Tensor:
    """Scaled dot-product attention: q (B,T,H,D) over k, v (B,S,K,D) -> (B,T,H,D).

    Each query head reads its group's keys. `mask` (B,1,T,S) is True where a key is seen; without
    one, rows are causal within the window.
    """
    B, T, H, D = q.shape
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B,H,T,D), (B,K,S,D)
    causal = mask is None and T > 1
    if causal and (softcap or 0 < window < T):
        mask, causal = causal_mask(T, window, q.device), False
    # the CPU's kernel and flash take grouped keys without a copy; a GPU's others are not fused then
    grouped = mask is None and not softcap and (q.is_cpu or supports_flash(q.device, q.dtype, D))
    if T == 1:  # a group's heads are as many queries of the same keys
        q = q.reshape(B, k.shape[1], -1, D)  # (B,K,H/K,D)
    elif k.shape[1] != H and not grouped:
        k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))  # (B,H,S,D)
    if not softcap:
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale,
                                           enable_gqa=k.shape[1] != q.shape[1])
        return y.reshape(B, H, T, D).transpose(1, 2)
    # no fused kernel caps scores (Gemma 2)
    scores = softcap * torch.tanh((q @ k.mT).float() * (scale / softcap))  # (B,H,T,S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return (scores.softmax(-1).to(v.dtype) @ v).reshape(B, H, T, D).transpose(1, 2)


def varlen_flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int,
                 scale: float) -> Tensor:
    """One flash kernel over all documents, end to end (Dao 2023): shapes as `sdpa`.

    cu_seqlens (N+1,) int32: where each document begins. Nothing depends on their number, and the
    host waits for nothing.
    """
    (T, H, D), K = q.shape[1:], k.shape[2]
    options = {"enable_gqa": True} if K != H else {}
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (B T,H,D), (B T,K,D)
    if D % 8:  # the kernel takes multiples of 8 only
        q, k, v = (F.pad(x, (0, -D % 8)) for x in (q, k, v))
    y = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, T, T, scale=scale,
                    window_size=(window - 1, 0), **options)  # (-1, 0): causal without a window
    return y[..., :D].reshape(-1, T, H, D)
