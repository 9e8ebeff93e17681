"""Linear layers, RMSNorm, rotary embeddings and SwiGLU, with gradients that keep little memory.

Autograd keeps the inputs of each small operation, float32 copies included; for a norm in bf16 that
is several times its input. The autograd functions here keep only their inputs, which the graph
holds anyway, and one number per token. Tests compare each with autograd's result. Without a
gradient the plain computation runs, because calling an autograd function would slow down decoding.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.config import ModelConfig, Rope

ACTIVATIONS = {  # name: the function of x, and its gradient from (g, x)
    "silu": (F.silu, torch.ops.aten.silu_backward),
    # x times the normal distribution function, by tanh (Hendrycks & Gimpel 2016, section 2)
    "gelu_tanh": (partial(F.gelu, approximate="tanh"),
                  partial(torch.ops.aten.gelu_backward, approximate="tanh"))}


class Linear(nn.Linear):
    """y = W x + b in x's dtype, whatever the dtype of W. The constructor computes no initial
    weights: they come from a file."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype == x.dtype:
            return F.linear(x, self.weight, self.bias)
        return _CastLinear.apply(x, self.weight, self.bias)


class _CastLinear(torch.autograd.Function):
    """x W^T + b with W cast to x's dtype. The backward pass casts W again: that is cheaper than
    keeping the copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, W)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, W.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W = ctx.saved_tensors
        need_x, need_W, need_bias = ctx.needs_input_grad
        flat = g.flatten(0, -2)  # (N,out)
        dx = g @ W.to(g.dtype) if need_x else None
        dW = (flat.T @ x.flatten(0, -2)).to(W.dtype) if need_W else None
        return dx, dW, flat.sum(0).to(ctx.bias_dtype) if need_bias else None


class Embedding(nn.Embedding):
    """A row of the table for each id. The constructor computes no initial weights."""

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the width, in float32 (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, width: int, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.offset = config.rms_norm_eps, config.norm_offset

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float() + self.offset if self.offset else self.weight.float()
        if not torch.is_grad_enabled():
            return _rms_norm(x, weight, self.eps)[0]
        return _RMSNorm.apply(x, weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """x r weight with r = 1 / rms(x); of what the forward pass computes only r is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, r = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, r = ctx.saved_tensors
        unit, g32 = x.float() * r, g.float()  # (B,T,C)
        product = g32 * unit
        # the component of the gradient along x changes only the length of x, and so not the norm
        along_x = (product @ weight / x.shape[-1])[..., None]  # (B,T,1)
        dweight = product.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        dunit = torch.mul(g32, weight, out=product)
        return dunit.addcmul_(unit, along_x, value=-1).mul_(r).to(x.dtype), dweight, None


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x r weight and r = 1 / rms(x): x (B,T,C), weight (C,) -> (B,T,C), (B,T,1) float32."""
    x32 = x.float()
    length = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
    r = torch.rsqrt(length.square() / x.shape[-1] + eps)
    return (x32 * r).mul_(weight).to(x.dtype), r


def rope_frequencies(rope: Rope, D: int, device: Any, length: Tensor | None = None) -> Tensor:
    """Radians per position for each pair of a head's D numbers: (D/2,) float32 (RoFormer, 3.2.2).

    `dynamic` frequencies depend on the length of a token's document: `length` (B,T,1) ->
    (B,T,D/2).
    """
    even = torch.arange(0, D, 2, device=device).float()
    theta: float | Tensor = rope.theta
    if rope.kind == "dynamic" and length is not None:  # NTK-aware: the base grows with the text
        ratio = length.clamp(min=rope.original) / rope.original
        theta = theta * (rope.factor * ratio - (rope.factor - 1)) ** (D / (D - 2))  # (B,T,1)
    frequencies = 1.0 / theta ** (even / D)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":  # divide low frequencies, keep high ones, blend those between
        rotations = rope.original * frequencies / (2 * math.pi)  # within the original context
        keep = ((rotations - rope.low) / (rope.high - rope.low)).clamp(0, 1)
    elif rope.kind == "yarn":  # the same, blended by the pair's index (Peng et al. 2023, 3.2)
        low, high = (D * math.log(rope.original / (rotations * 2 * math.pi))
                     / (2 * math.log(theta)) for rotations in (rope.high, rope.low))
        if rope.whole:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, D - 1)
        keep = 1 - ((even / 2 - low) / ((high - low) or 0.001)).clamp(0, 1)
    else:
        return frequencies
    return frequencies * (keep + (1 - keep) / rope.factor)


def rope_cos_sin(rope: Rope, D: int, doc: Tensor, pos: Tensor,
                 longest: int | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles of tokens at pos (B,T): (B,T,1,D/2) float32 each.

    `longest`: the largest pos + 1, where the host knows it; `dynamic` frequencies need it.
    """
    length = None
    if rope.kind == "dynamic" and longest is None:
        longest = int(pos.max()) + 1 if pos.numel() else 0
    if rope.kind == "dynamic" and longest > rope.original:
        same = doc[:, :, None] == doc[:, None, :]  # (B,T,T)
        length = ((pos + 1)[:, None, :] * same).amax(-1, keepdim=True)  # (B,T,1)
    angles = pos[..., None].float() * rope_frequencies(rope, D, pos.device, length)  # (B,T,D/2)
    return angles.cos()[:, :, None] * rope.amplitude, angles.sin()[:, :, None] * rope.amplitude


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + D/2) of x (B,T,H,D) by its angle; cos, sin (B,T,1,D/2).

    This is Hugging Face's half-split layout, not the interleaved one of the paper.
    """
    if not torch.is_grad_enabled():
        return _rotate(x, cos, sin)
    return _ApplyRotary.apply(x, cos, sin)


class _ApplyRotary(torch.autograd.Function):
    """A rotation; its gradient is rotated back by the same angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(g, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)  # (B,T,H,D/2) each
    return torch.cat((torch.addcmul(a * cos, b, sin, value=-1),
                      torch.addcmul(b * cos, a, sin)), dim=-1).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, for (B,T,M) each; with another activation than silu it is GeGLU."""
    if not torch.is_grad_enabled():
        return ACTIVATIONS[activation][0](gate).mul_(up)
    return _SwiGLU.apply(gate, up, activation)


class _SwiGLU(torch.autograd.Function):
    """act(gate) up; act(gate) is not kept, the backward pass computes it again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return ACTIVATIONS[activation][0](gate) * up

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        act, act_gradient = ACTIVATIONS[ctx.activation]
        return act_gradient(g * up, gate), act(gate).mul_(g), None
