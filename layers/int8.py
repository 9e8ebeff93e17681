"""Matrices in eight bits (--quant int8), for answering: a row is divided by its largest number over
127 and rounded. Those of the blocks, and the head's; a table of embeddings stays as it is, also
where the head is made of it.

A step of few rows is bound by reading the weights, and eight bits are half of what bf16 takes, a
quarter of float32. Only weights are rounded. A CPU multiplies whole numbers fastest, and adds them
up exactly, so what flows between products is written in whole numbers too: a row of x, divided by
its largest over 127, as two digits to base 254, three in float32, of eight bits each. What the last
digit leaves is less than rounding to x's own dtype takes from a product. No row knows of another.

Elsewhere, on a GPU or a CPU without such products, a matrix is made for a product and let go.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora

LEAST = 1e-30  # of a row's largest number, or nothing but zeros would be divided by 0
BASE = 254  # half a step of a digit is 127 steps of the next
SMALL = 128  # rows of a matrix: for two digits of one x oneDNN has no more than a plain loop there
ROWS = 256  # multiplied at once: their digits' products, in float32, are in memory together


def quantise(W: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (out,in) -> its codes (out,in) int8 from -127 to 127, and each row's scale (out,)
    float32."""
    scales = W.abs().amax(1).float().clamp(min=LEAST) / 127
    return (W.float() / scales[:, None]).round().to(torch.int8), scales


def digits(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Rows (N,in) -> the first digits of all, the second ..., (n N,in) int8, and the rows' scales
    (N,1) float32; a number that is not finite makes its row's scale so."""
    scale = x.abs().amax(1, keepdim=True).float().clamp(min=LEAST) / 127
    rest = x / scale
    found = [rest.round()]
    for _ in range(1, n):
        rest = (rest - found[-1]).mul_(BASE)
        found.append(rest.round())
    return torch.cat(found).to(torch.int8), scale


def multiplies(device: torch.device) -> bool:
    """Whether a device has products of eight bits here: a CPU with VNNI or AMX."""
    return device.type == "cpu" and torch.backends.mkldnn.is_available() \
        and torch.cpu._is_vnni_supported()


class Int8Linear(nn.Module):
    """y = W x + b with W in eight bits and b as it was; made from a linear layer's matrix."""

    def __init__(self, W: Tensor, bias: Tensor | None):
        super().__init__()
        self.out_features, self.in_features = W.shape
        self.codes, self.scales = quantise(W.detach())
        self.bias = bias
        self.packed = multiplies(W.device) and len(W) > SMALL
        if self.packed:  # in memory as oneDNN's product takes it
            self.codes = torch.ops.onednn.qlinear_prepack(self.codes, None)
            self.zeros = torch.zeros_like(self.scales, dtype=torch.long)

    def forward(self, x: Tensor) -> Tensor:
        """x (...,in) -> (...,out)."""
        if not self.packed:
            return F.linear(x, self.dense(x.dtype), None if self.bias is None else
                            self.bias.to(x.dtype))
        rows = x.reshape(-1, self.in_features).split(ROWS)
        return torch.cat([self.product(some).to(x.dtype) for some in rows]).view(*x.shape[:-1], -1)

    def product(self, x: Tensor) -> Tensor:
        """W x + b of rows (N,in), in whole numbers: (N,out) float32."""
        n = 3 if x.dtype == torch.float32 else 2
        found, scale = digits(x, n)
        y, *lower = torch.ops.onednn.qlinear_pointwise(
            found, 1.0, 0, self.codes, self.scales, self.zeros, None, 1.0, 0, torch.float32,
            "none", [], "").chunk(n)  # (N,out) each
        for i, part in enumerate(lower, 1):
            y.add_(part, alpha=BASE**-i)
        y *= scale
        return y if self.bias is None else y.add_(self.bias)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W, made from its codes: (out,in)."""
        codes = self.codes.to_dense().T if self.packed else self.codes
        return (codes * self.scales[:, None]).to(dtype)

    @property
    def weight(self) -> Tensor:
        """W in float32, for who multiplies it himself."""
        return self.dense(torch.float32)


def fits(module: nn.Module) -> bool:
    """Whether a module is kept in eight bits: a linear layer, the head included."""
    return isinstance(module, nn.Linear)


@torch.no_grad()
def use(model: nn.Module) -> None:
    """Put what is not yet in eight bits there. An adapter is merged into its base first, in
    float32: rounding takes no more from the sum, and one product is faster than three."""
    for name, m in lora.adapters(model).items():
        model.set_submodule(name, Int8Linear(m.merged(), m.base_layer.bias))
    model.whole = {}
    for name, m in list(model.named_modules()):
        if fits(m):
            model.set_submodule(name, Int8Linear(m.weight, m.bias))
    if model.lm_head is None:
        model.lm_head = Int8Linear(model.head, None)
