"""NF4 (QLoRA: Dettmers et al. 2023): a frozen matrix in 4.5 bits a weight.

The weights of a trained layer are close to a normal distribution. Therefore the 16 values of a
4-bit code are quantiles of it (section 3 and appendix E). Each 64 weights, in row order, are
divided by the largest absolute value among them, which is kept as a float32 scale: 0.5 bits a
weight. Double quantisation keeps the scales in 8 bits, with a float32 scale for each 256 of them:
4.13 bits.

The matrix is computed from its codes for one product and then freed; the backward pass computes it
again. Codes and scales are buffers: no optimizer, gradient or sharding sees them, and `.to(dtype)`
does not round integers. The codes are made by torch's operations on every device. The 4-bit codes
and their float32 scales equal those of bitsandbytes. With double quantisation the 8-bit codes of up
to 0.8 % of the scales differ from those of bitsandbytes; ours are nearer to the float32 scales.
On a GPU the matrix is computed by bitsandbytes' kernel, elsewhere by a table.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.console import UserError

BLOCK = 64  # weights that share a scale
SCALES = 256  # scales that share a scale, in double quantisation
CHUNK = 1 << 20  # weights in the making at once; a multiple of BLOCK
NORMAL = (  # appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0)


def pairs() -> Tensor:
    """The two weights a byte of codes names, the first in its high half: (256,2) float32."""
    byte, values = torch.arange(256), torch.tensor(NORMAL)
    return torch.stack((values[byte >> 4], values[byte & 15]), 1)


def dynamic() -> Tensor:
    """The values of eight bits for scales (Dettmers 2015): decades of [0.1, 1], each cut twice as
    fine as the one below, with both signs, and 0 and 1: (256,), rising."""
    found = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        middles = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        found += [middles, -middles]
    return torch.cat(found).sort().values


# Made here, once, whatever kind of tensor is born at the first use: meta, or one without numbers.
VALUES, PAIRS, DYNAMIC = torch.tensor(NORMAL), pairs(), dynamic()


def on(device: torch.device, table: Tensor) -> Tensor:
    """A table on a device; so small a copy from the host waits for nothing."""
    return table.to(device, non_blocking=True)


def nearest(x: Tensor, table: Tensor) -> Tensor:
    """The index of the value in a rising table that is nearest to each x in [-1, 1]; uint8."""
    return torch.bucketize(x, (table[:-1] + table[1:]) / 2, out_int32=True).byte()


def scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows divided by their largest magnitude, and that magnitude: (N,n), (N,) float32."""
    x = x.float()
    largest = x.abs().amax(1)
    return (x * (1 / largest.clamp(min=1e-38))[:, None]).clamp(-1, 1), largest


def quantise(W: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (out,in) -> codes (out in / 2,) uint8, and the scale of each block (out in / 64,)
    float32."""
    codes, scales = [], []
    for part in W.reshape(-1).split(W.numel() if W.is_meta else CHUNK):
        x, largest = scaled(part.view(-1, BLOCK))
        q = nearest(x, on(W.device, VALUES)).flatten()
        codes.append(q[::2] << 4 | q[1::2])
        scales.append(largest)
    return torch.cat(codes), torch.cat(scales)


def quantise_scales(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales (N,) -> their codes (N,) uint8, the scale of every 256 (N/256,), their mean (1,)."""
    mean = scales.mean()[None]
    rows = F.pad(scales - mean, (0, -len(scales) % SCALES)).view(-1, SCALES)
    x, largest = scaled(rows)
    return nearest(x, on(scales.device, DYNAMIC)).flatten()[: len(scales)], largest, mean


def restored_scales(codes: Tensor, largest: Tensor, mean: Tensor) -> Tensor:
    """What `quantise_scales` made of scales, (N,) float32 again."""
    parts = on(codes.device, DYNAMIC)[codes.int()]
    return parts * largest.repeat_interleave(SCALES)[: len(codes)] + mean


@torch.library.custom_op("nf4::dequantise", mutates_args=())  # one node of a graph, not a loop
def dequantise(codes: Tensor, scales: Tensor, rows: int, columns: int,
               dtype: torch.dtype) -> Tensor:
    """The matrix of these codes and scales, (out,in): each product in float32, rounded once."""
    if codes.is_cuda and kernels():
        return torch.ops.bitsandbytes.dequantize_4bit(codes, scales, BLOCK, "nf4",
                                                      (rows, columns), dtype)
    W, table = codes.new_empty(rows, columns, dtype=dtype), on(codes.device, PAIRS)
    for part, c, s in zip(W.view(-1).split(CHUNK), codes.split(CHUNK // 2),
                          scales.split(CHUNK // BLOCK), strict=True):
        part.view(-1, BLOCK).copy_(F.embedding(c.int(), table).view(-1, BLOCK)
                                   * s[:, None])
    return W


@dequantise.register_fake
def _(codes: Tensor, scales: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(rows, columns, dtype=dtype)


@functools.cache
def kernels() -> bool:
    """Whether bitsandbytes is here, with kernels for this torch's CUDA; where it has none its
    operations are there all the same, and fail."""
    try:
        from bitsandbytes.cextension import lib  # which registers torch.ops.bitsandbytes
    except (ImportError, OSError, RuntimeError):
        return False
    return getattr(lib, "compiled_with_cuda", False) \
        and hasattr(torch.ops.bitsandbytes, "dequantize_4bit")


class _Product(torch.autograd.Function):
    """x W^T + b, and its gradient g W: W is made for each and kept by neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, shape: tuple[int, int], codes: Tensor,
                *scales: Tensor) -> Tensor:
        ctx.save_for_backward(codes, *scales)
        ctx.shape = shape
        return F.linear(x, made(shape, codes, scales, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        codes, *scales = ctx.saved_tensors
        return g @ made(ctx.shape, codes, scales, g.dtype), *[None] * (3 + len(scales))


def made(shape: tuple[int, int], codes: Tensor, scales: Any, dtype: torch.dtype) -> Tensor:
    """The matrix of a layer's buffers; the scales are one tensor, or three in double quantisation.
    """
    first, *more = scales
    numbers = [x.view(torch.float32) for x in (more or [first])]
    numbers = [restored_scales(first, *numbers)] if more else numbers
    return dequantise(codes, numbers[0], *shape, dtype)


class NF4Linear(nn.Module):
    """y = W x + b with W in NF4, frozen, and b as it was; made from a linear layer's matrix."""

    def __init__(self, W: Tensor, bias: nn.Parameter | None, double: bool):
        super().__init__()
        self.out_features, self.in_features = W.shape
        if W.numel() % BLOCK:
            raise UserError(f"a matrix of {self.out_features} x {self.in_features} is no multiple "
                            f"of {BLOCK} numbers and cannot be kept in NF4; take --tune lora")
        codes, scales = quantise(W)
        self.register_buffer("codes", codes, persistent=False)
        for i, x in enumerate(quantise_scales(scales) if double else [scales]):
            whole = x if x.dtype == torch.uint8 else x.view(torch.int32)  # no .to() rounds these
            self.register_buffer(f"scales_{i}", whole, persistent=False)
        self.bias = bias

    @property
    def numel(self) -> int:
        """Numbers in W."""
        return self.out_features * self.in_features

    @property
    def parts(self) -> tuple[Any, ...]:
        """Shape, codes and scales."""
        return (self.out_features, self.in_features), *self.buffers(recurse=False)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _Product.apply(x, bias, *self.parts)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W, made from its codes: (out,in)."""
        shape, codes, *scales = self.parts
        return made(shape, codes, scales, dtype)


def fits(name: str, module: nn.Module) -> bool:
    """Whether a module is kept in NF4: a linear layer of a block. Embeddings, norms and the head
    stay as they are (QLoRA, section 4)."""
    return isinstance(module, nn.Linear) and ".layers." in name


def found(model: nn.Module) -> list[NF4Linear]:
    """Every layer that is in NF4."""
    return [m for m in model.modules() if isinstance(m, NF4Linear)]
