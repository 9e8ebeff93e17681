"""Weights in eight bits (`--quant int8`), for inference: each row of a matrix is divided by its
largest magnitude over 127 and rounded. The blocks' matrices and the output embedding are
quantized; the table of embeddings keeps its dtype.

A decoding step of few rows is bound by reading the weights, and int8 is half of bf16. On a CPU, in
bf16, such products are computed by `torch._weight_int8pack_mm` from the codes. Products of many
rows, other dtypes and other devices convert the codes to x's dtype for each product. docs/
benchmarks.md has the measurement (`python -m bench.int8`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST = 1e-30  # lower bound of a row's largest magnitude, so that zeros are not divided by 0
MULTIPLE = 16  # the CPU kernel reads so many inputs at once, and beyond the row's end otherwise


def quantize(W: Tensor) -> tuple[Tensor, Tensor]:
    """W (out,in) -> codes (out,in) int8 from -127 to 127, and the rows' scales (out,) float32."""
    scales = W.abs().amax(1).float().clamp(min=SMALLEST) / 127
    return (W.float() / scales[:, None]).round().to(torch.int8), scales


class Int8Linear(nn.Module):
    """y = W x + b with W in eight bits; made from a linear layer's W (out,in) and b.

    The CPU kernel computes products of at most `kernel_rows` rows; more are faster with W converted
    once for all of them.
    """

    def __init__(self, W: Tensor, bias: Tensor | None, kernel_rows: int = 32):
        super().__init__()
        self.out_features, self.in_features = W.shape
        self.codes, self.scales = quantize(W.detach())
        self.scales_bf16 = self.scales.bfloat16()
        self.bias = bias
        self.kernel_rows = kernel_rows if self.in_features % MULTIPLE == 0 else 0

    def forward(self, x: Tensor) -> Tensor:
        """x (...,in) -> (...,out)."""
        if x.dtype == torch.float16:  # sums of codes up to 127 would overflow
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.dense(x.dtype), bias)
        rows = x.reshape(-1, self.in_features)  # (N,in)
        if x.is_cpu and x.dtype == torch.bfloat16 and len(rows) <= self.kernel_rows:
            y = torch._weight_int8pack_mm(rows, self.codes, self.scales_bf16)  # (N,out)
        else:  # codes are exact in x's dtype, so that only the result is rounded
            y = F.linear(rows, self.codes.to(x.dtype)) * self.scales  # float32
        if self.bias is not None:
            y = y + self.bias.float()
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W made from its codes: (out,in)."""
        return (self.codes * self.scales[:, None]).to(dtype)

    @property
    def weight(self) -> Tensor:
        """W in float32, for a caller that multiplies by it."""
        return self.dense(torch.float32)


def fits(module: nn.Module) -> bool:
    """Whether a module is quantized: every linear layer, the output embedding included."""
    return isinstance(module, nn.Linear)


@torch.no_grad()
def convert_to_int8(model: nn.Module) -> None:
    """Replace every linear layer that is left by an Int8Linear; a tied output embedding becomes one
    too. An adapter must be merged by the caller before."""
    for name, m in list(model.named_modules()):
        if fits(m):
            model.set_submodule(name, Int8Linear(m.weight, m.bias))
    if model.lm_head is None:
        model.set_lm_head(Int8Linear(model.head, None))
