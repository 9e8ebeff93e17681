"""The pieces of a block: linear layers, norms, rotary, the gate; each keeps little for its backward
pass.

Autograd keeps what each small operation read, float32 copies among it; for a norm in bf16 that is
several times its input. The pieces here know their own gradient and keep inputs, which the graph
holds anyway, and numbers per token. Tests hold each beside autograd's. Where no gradient is asked
for, none of this is: a step of decoding is so short that telling autograd would be felt.

What norms and gates give is kept by the products that read it. `Light` makes it again instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.config import ModelConfig, Rope
from runtime.transfer import host

ACTIVATIONS = {  # by name: the function of x, and its gradient from (g, x)
    "silu": (F.silu, torch.ops.aten.silu_backward),
    # x times the normal distribution function, by tanh (Hendrycks & Gimpel 2016, section 2)
    "gelu_tanh": (partial(F.gelu, approximate="tanh"),
                  partial(torch.ops.aten.gelu_backward, approximate="tanh"))}


class _Again:
    """A tensor that is made again when it is wanted, once for all who kept it."""

    def __init__(self, make: Callable[[], Tensor]):
        self.make, self.made, self.kept, self.wanted = make, None, 0, 0

    def __call__(self) -> Tensor:
        made = self.make() if self.made is None else self.made
        self.wanted = (self.wanted + 1) % self.kept
        self.made = made if self.wanted else None  # the last one takes it
        return made


class Light(torch.autograd.graph.saved_tensors_hooks):
    """Selective activation checkpointing: within it, what a norm or a gate gives is not kept for
    the backward pass but made again there, from what is kept anyway; no product is.

    torch's own selective contexts choose among operations: run one by one, as here, they would keep
    results of products that nobody reads, and cast or unpack each matrix again. A compiler sees
    what is not read: it gets those (model.Decoder.compile_blocks).
    """

    now: ClassVar[Light | None] = None

    def __init__(self) -> None:
        super().__init__(self.pack, self.unpack)
        self.given: dict[int, tuple[Tensor, _Again]] = {}  # by storage, alive until the end

    def __enter__(self) -> None:
        Light.now = self
        super().__enter__()

    def __exit__(self, *fault: Any) -> None:
        super().__exit__(*fault)
        Light.now = None
        self.given.clear()

    def pack(self, x: Tensor) -> Any:
        _, again = self.given.get(x.untyped_storage()._cdata, (None, None))
        if again is None:
            return x
        again.kept += 1
        return again, x.size(), x.stride(), x.storage_offset()

    @staticmethod
    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[0]().as_strided(*kept[1:])


def again(y: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """y; within `Light` it is made again by `make`, to the bit, and not kept."""
    if Light.now is not None:
        Light.now.given[y.untyped_storage()._cdata] = y, _Again(make)
    return y


class Linear(nn.Linear):
    """y = W x + b in x's dtype, whatever W is kept in. Construction computes nothing: weights come
    from a file."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype == x.dtype:
            return F.linear(x, self.weight, self.bias)
        return _Product.apply(x, self.weight, self.bias)


class _Product(torch.autograd.Function):
    """x W^T + b with W cast for the product; the cast is made again for the backward pass, which is
    cheaper to make than to keep."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, W)
        ctx.bias = None if bias is None else bias.dtype
        return F.linear(x, W.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W = ctx.saved_tensors
        need_x, need_W, need_bias = ctx.needs_input_grad
        flat = g.flatten(0, -2)  # (N,out)
        dx = g @ W.to(g.dtype) if need_x else None
        dW = (flat.T @ x.flatten(0, -2)).to(W.dtype) if need_W else None
        return dx, dW, flat.sum(0).to(ctx.bias) if need_bias else None


class Embedding(nn.Embedding):
    """A row of the table for each id. Construction computes nothing: weights come from a file."""

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
            return _normed(x, weight, self.eps)[0]
        kept = x.detach(), weight.detach(), self.eps
        return again(_Norm.apply(x, weight, self.eps), lambda: _normed(*kept)[0])


class _Norm(torch.autograd.Function):
    """x r weight, where r = 1 / rms(x) is the one number a token that is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, r = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, r = ctx.saved_tensors
        unit, g32 = x.float() * r, g.float()  # (B,T,C)
        share = g32 * unit
        along = (share @ weight / x.shape[-1])[..., None]  # what would only change the length
        dweight = share.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        dunit = torch.mul(g32, weight, out=share)
        return dunit.addcmul_(unit, along, value=-1).mul_(r).to(x.dtype), dweight, None


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (B,T,C) times r, its reciprocal length (B,T,1), and weight (C,); and r."""
    exact = x.float()  # (B,T,C)
    size = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
    r = torch.rsqrt(size.square() / x.shape[-1] + eps)
    return (exact * r).mul_(weight).to(x.dtype), r


def rotary_frequencies(rope: Rope, D: int, device: Any, length: Tensor | None = None) -> Tensor:
    """Radians per position for each pair of a head's widths, (D/2,) float32 (RoFormer, 3.2.2).

    `dynamic` frequencies depend on how long a token's document is: `length` (B,T,1) -> (B,T,D/2).
    """
    even = torch.arange(0, D, 2, device=device).float()
    theta: float | Tensor = rope.theta
    if rope.kind == "dynamic" and length is not None:  # NTK-aware: the base grows with the text
        over = length.clamp(min=rope.original) / rope.original
        theta = theta * (rope.factor * over - (rope.factor - 1)) ** (D / (D - 2))  # (B,T,1)
    f = 1.0 / theta ** (even / D)
    if rope.kind == "linear":
        return f / rope.factor
    if rope.kind == "llama3":  # slow turns are stretched, fast ones kept, others blended
        turns = rope.original * f / (2 * math.pi)  # within the original context
        keep = ((turns - rope.low) / (rope.high - rope.low)).clamp(0, 1)
    elif rope.kind == "yarn":  # the same, blended by the index of the pair (Peng et al. 2023, 3.2)
        low, high = (D * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(theta))
                     for turns in (rope.high, rope.low))
        low, high = (math.floor(low), math.ceil(high)) if rope.whole else (low, high)
        low, high = max(low, 0), min(high, D - 1)
        keep = 1 - ((even / 2 - low) / ((high - low) or 0.001)).clamp(0, 1)
    else:
        return f
    return f * (keep + (1 - keep) / rope.factor)


def turns(rope: Rope, D: int, doc: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every token's angles, (B,T,1,D/2) float32."""
    length = None
    if rope.kind == "dynamic" and pos.numel() and host(pos).max() >= rope.original:
        same = doc[:, :, None] == doc[:, None, :]  # (B,T,T)
        length = ((pos + 1)[:, None, :] * same).amax(-1, keepdim=True)  # (B,T,1)
    angles = pos[..., None].float() * rotary_frequencies(rope, D, pos.device, length)  # (B,T,D/2)
    return angles.cos()[:, :, None] * rope.amplitude, angles.sin()[:, :, None] * rope.amplitude


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + D/2) of x (B,T,H,D) by its angle; cos, sin (B,T,1,D/2). The half-split
    kind."""
    return _Turn.apply(x, cos, sin) if torch.is_grad_enabled() else _turned(x, cos, sin)


class _Turn(torch.autograd.Function):
    """A turn; its gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(g, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((torch.addcmul(a * cos, b, sin, value=-1),
                      torch.addcmul(b * cos, a, sin)), dim=-1).to(x.dtype)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, for an MLP's two inner products (B,T,M)."""
    if not torch.is_grad_enabled():
        return ACTIVATIONS[activation][0](gate).mul_(up)
    act, read, factor = ACTIVATIONS[activation][0], gate.detach(), up.detach()
    return again(_Gate.apply(gate, up, activation), lambda: act(read) * factor)


class _Gate(torch.autograd.Function):
    """act(gate) up; what act gave is not kept but computed again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return ACTIVATIONS[activation][0](gate) * up

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        act, gradient = ACTIVATIONS[ctx.activation]
        return gradient(g * up, gate), act(gate).mul_(g), None
