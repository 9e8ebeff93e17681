"""Products in eight bits (--dtype fp8): of the blocks' linear layers, where all weights train, on a
GPU that multiplies them (Ada, Hopper and later).

Of eight bits e4m3 has more digits and e5m2 a wider range: inputs and weights are rounded to the
first, gradients to the second (Micikevicius et al. 2022, "FP8 formats for deep learning"), each
tensor divided by a scale that puts its largest number at the format's largest, found anew for each
product and never read by the host. Sums are float32. All else is as with bf16: what trains is kept
in float32, what flows between products in bf16; so checkpoints, the optimizer and the saved model
are the same. Where no gradient is asked for, at evaluations, products are in bf16, as they will be
for whoever takes the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from layers.functional import Linear
from runtime.console import FLAGS, UserError

FINE, WIDE = torch.float8_e4m3fn, torch.float8_e5m2
EVEN = 16  # the kernels want multiples of it, of all three sizes of a product
LEAST = 1e-30  # of a tensor's largest number, or nothing but zeros would be divided by 0


def narrow(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in eight bits, and the scale () float32 that gives it back; a number that is not finite
    makes all of them NaN."""
    scale = x.abs().amax().float().clamp(min=LEAST) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype), scale  # divided in bf16 it would be rounded twice


def product(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], dtype: torch.dtype,
            fast: bool = False) -> Tensor:
    """a b^T of numbers in eight bits and their scales: (n,k), (m,k) -> (n,m) in a dtype; `fast`
    adds up in fewer bits, which is enough forward."""
    return torch._scaled_mm(a[0], b[0].T, scale_a=a[1], scale_b=b[1], out_dtype=dtype,
                            use_fast_accum=fast)


def turned(x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The transposed matrix, row by row in memory, as the kernels want both factors."""
    return x[0].T.contiguous(), x[1]


class _Product(torch.autograd.Function):
    """x W^T + b and its two gradients; x and W are rounded again for them, not kept in eight bits,
    for x is kept for its other readers anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, W)
        ctx.bias = None if bias is None else bias.dtype
        # ranks that share W gather it in x's dtype: so does one alone
        y = product(narrow(x.flatten(0, -2), FINE), narrow(W.to(x.dtype), FINE), x.dtype, fast=True)
        return (y if bias is None else y + bias.to(x.dtype)).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W = ctx.saved_tensors
        flat = g.flatten(0, -2).contiguous()  # (N,out): the product takes no other order
        rounded, dx, dW = narrow(flat, WIDE), None, None
        if ctx.needs_input_grad[0]:
            dx = product(rounded, turned(narrow(W.to(x.dtype), FINE)), x.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            dW = product(turned(rounded), turned(narrow(x.flatten(0, -2), FINE)), W.dtype)
        return dx, dW, flat.sum(0).to(ctx.bias) if ctx.needs_input_grad[2] else None


class Linear8(Linear):
    """A linear layer whose products are in eight bits while it trains."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        return _Product.apply(x, self.weight, self.bias)


def use(model: nn.Module) -> None:
    """Let the blocks' linear layers multiply in eight bits; the head's logits stay as they are."""
    for m in model.model.layers.modules():
        if type(m) is Linear:
            m.__class__ = Linear8


def check(model: nn.Module, device: torch.device, T: int) -> None:
    """UserError (FLAGS) where this model's products, in rows of T, cannot be in eight bits."""
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    sizes = {n for m in model.model.layers.modules() if isinstance(m, nn.Linear)
             for n in m.weight.shape}
    why = "needs a GPU that multiplies eight bits (Ada, Hopper or later)" if not able \
        else "is for all weights (--tune full)" if not all(
            p.requires_grad for p in model.parameters()) \
        else f"needs matrices and --seq-len in multiples of {EVEN}" if any(
            n % EVEN for n in (T, *sizes)) else ""
    if why:
        raise UserError(f"--dtype fp8: {why}; take bf16", FLAGS)
