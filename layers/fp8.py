"""Training with products in eight bits (`--dtype fp8`): the blocks' linear layers, with
`--tune full`, on a GPU that multiplies fp8 (Ada, Hopper and later).

e4m3 has more digits, e5m2 a wider range: inputs and weights are rounded to the first, gradients to
the second (Micikevicius et al. 2022, "FP8 formats for deep learning"). Each tensor has one scale,
which puts its largest number at the format's largest; it is computed for each product and never
read by the host. Sums are float32. Everything else is as in bf16: trained weights are float32,
activations bf16, so checkpoints, the optimizer and the saved model are the same. Without a gradient
(evaluation) products are in bf16, as they will be for the users of the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from layers.functional import Linear
from runtime.console import FLAGS, UserError

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # the kernels take only multiples of it, in all three sizes of a product
SMALLEST = 1e-30  # lower bound of a tensor's largest number, so that zeros are not divided by 0

Fp8 = tuple[Tensor, Tensor]  # numbers in eight bits, and their scale () float32


def to_fp8(x: Tensor, dtype: torch.dtype) -> Fp8:
    """x in eight bits and its scale; one number that is not finite makes all of them NaN."""
    scale = x.abs().amax().float().clamp(min=SMALLEST) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype), scale  # a division in bf16 would round twice


def scaled_mm(a: Fp8, b: Fp8, dtype: torch.dtype, fast_accumulation: bool = False) -> Tensor:
    """a b^T: (n,k), (m,k) -> (n,m) in `dtype`. Fast accumulation is exact enough for the forward
    pass."""
    return torch._scaled_mm(a[0], b[0].T, scale_a=a[1], scale_b=b[1], out_dtype=dtype,
                            use_fast_accum=fast_accumulation)


def transposed(x: Fp8) -> Fp8:
    """The transposed matrix in row-major order, which the kernels expect of both factors."""
    return x[0].T.contiguous(), x[1]


class _Fp8Product(torch.autograd.Function):
    """x W^T + b and its gradients. x and W are rounded again for the backward pass, because x is
    kept in bf16 for other readers anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, W)
        ctx.bias_dtype = None if bias is None else bias.dtype
        # FSDP gathers W in x's dtype; the cast makes one rank compute the same
        y = scaled_mm(to_fp8(x.flatten(0, -2), E4M3), to_fp8(W.to(x.dtype), E4M3), x.dtype,
                      fast_accumulation=True)  # (N,out)
        if bias is not None:
            y = y + bias.to(x.dtype)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W = ctx.saved_tensors
        need_x, need_W, need_bias = ctx.needs_input_grad
        flat = g.flatten(0, -2).contiguous()  # (N,out): the kernel takes no other order
        rounded, dx, dW = to_fp8(flat, E5M2), None, None
        if need_x:
            W8 = to_fp8(W.to(x.dtype), E4M3)
            dx = scaled_mm(rounded, transposed(W8), x.dtype).view(x.shape)
        if need_W:
            x8 = to_fp8(x.flatten(0, -2), E4M3)
            dW = scaled_mm(transposed(rounded), transposed(x8), W.dtype)
        return dx, dW, flat.sum(0).to(ctx.bias_dtype) if need_bias else None


class Fp8Linear(Linear):
    """A linear layer whose products are in eight bits where there is a gradient."""

    @classmethod
    def from_linear(cls, linear: Linear) -> Fp8Linear:
        """The same parameters in a layer of this class."""
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None,
                    device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        return _Fp8Product.apply(x, self.weight, self.bias)


def convert_to_fp8(model: nn.Module) -> None:
    """Replace the blocks' linear layers by Fp8Linear; the output embedding keeps its dtype."""
    for name, m in list(model.model.layers.named_modules()):
        if type(m) is Linear:
            model.model.layers.set_submodule(name, Fp8Linear.from_linear(m))


def check(model: nn.Module, device: torch.device, T: int) -> None:
    """UserError (FLAGS) where this model, in rows of T tokens, cannot be trained in fp8."""
    supported = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    sizes = {n for m in model.model.layers.modules() if isinstance(m, nn.Linear)
             for n in m.weight.shape}
    if not supported:
        reason = "needs a GPU that multiplies eight bits (Ada, Hopper or later)"
    elif not all(p.requires_grad for p in model.parameters()):
        reason = "is for all weights (--tune full)"
    elif any(n % MULTIPLE for n in (T, *sizes)):
        reason = f"needs matrices and --seq-len in multiples of {MULTIPLE}"
    else:
        return
    raise UserError(f"--dtype fp8: {reason}; take bf16", FLAGS)
