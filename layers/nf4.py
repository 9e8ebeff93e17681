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
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.console import UserError

BLOCK = 64  # weights that share a scale
SCALES = 256  # scales that share a scale, in double quantisation
CHUNK = 1 << 20  # weights that are converted at once; a multiple of BLOCK
NF4_VALUES = (  # appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0)


def byte_to_pair() -> Tensor:
    """The two weights of each byte of codes, that of the high four bits first: (256,2) float32."""
    byte, values = torch.arange(256), torch.tensor(NF4_VALUES)
    return torch.stack((values[byte >> 4], values[byte & 15]), 1)


def dynamic_map() -> Tensor:
    """The 256 values of an 8-bit scale in rising order (Dettmers 2015): 0, 1, and seven decades of
    both signs, in which each decade has twice as many values as the next smaller one."""
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        middles = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [middles, -middles]
    return torch.cat(values).sort().values


# Constants, because a function called under torch's meta or fake mode would return such tensors.
VALUES, PAIRS, DYNAMIC = torch.tensor(NF4_VALUES), byte_to_pair(), dynamic_map()


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """A table on a device, copied without waiting for it."""
    return table.to(device, non_blocking=True)


def nearest(x: Tensor, table: Tensor) -> Tensor:
    """Indices of the nearest values in a rising table, for x in [-1, 1]: uint8, in x's shape."""
    return torch.bucketize(x, (table[:-1] + table[1:]) / 2, out_int32=True).byte()


def scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows x (N,n) divided by their largest absolute value, and that value: (N,n), (N,) float32."""
    x = x.float()
    largest = x.abs().amax(1)  # (N,)
    return (x * (1 / largest.clamp(min=1e-38))[:, None]).clamp(-1, 1), largest


def quantise(W: Tensor) -> tuple[Tensor, Tensor]:
    """W (out,in) -> codes (out in / 2,) uint8, and the blocks' scales (out in / 64,) float32."""
    codes, scales = [], []
    for chunk in W.reshape(-1).split(W.numel() if W.is_meta else CHUNK):
        x, largest = scaled(chunk.view(-1, BLOCK))  # (n,64), (n,)
        q = nearest(x, to_device(VALUES, W.device)).flatten()  # (64 n,)
        codes.append(q[::2] << 4 | q[1::2])
        scales.append(largest)
    return torch.cat(codes), torch.cat(scales)


def quantise_scales(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales (N,) -> their codes (N,) uint8, a scale for every 256 (N/256,), their mean (1,)."""
    mean = scales.mean()[None]  # (1,)
    rows = F.pad(scales - mean, (0, -len(scales) % SCALES)).view(-1, SCALES)  # (N/256,256)
    x, largest = scaled(rows)
    codes = nearest(x, to_device(DYNAMIC, scales.device)).flatten()[: len(scales)]  # (N,)
    return codes, largest, mean


def dequantise_scales(codes: Tensor, largest: Tensor, mean: Tensor) -> Tensor:
    """The inverse of `quantise_scales`: (N,) float32."""
    values = to_device(DYNAMIC, codes.device)[codes.int()]  # (N,)
    return values * largest.repeat_interleave(SCALES)[: len(codes)] + mean


@torch.library.custom_op("nf4::dequantise", mutates_args=())  # one node of a graph, not a loop
def dequantise(codes: Tensor, scales: Tensor, rows: int, columns: int,
               dtype: torch.dtype) -> Tensor:
    """W (rows,columns) of codes and scales: value times scale in float32, then rounded once."""
    if codes.is_cuda and has_cuda_kernels():
        return torch.ops.bitsandbytes.dequantize_4bit(codes, scales, BLOCK, "nf4",
                                                      (rows, columns), dtype)
    W, table = codes.new_empty(rows, columns, dtype=dtype), to_device(PAIRS, codes.device)
    for chunk, chunk_codes, chunk_scales in zip(W.view(-1).split(CHUNK), codes.split(CHUNK // 2),
                                                scales.split(CHUNK // BLOCK), strict=True):
        values = F.embedding(chunk_codes.int(), table).view(-1, BLOCK)  # (n,64)
        chunk.view(-1, BLOCK).copy_(values * chunk_scales[:, None])
    return W


@dequantise.register_fake
def _(codes: Tensor, scales: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(rows, columns, dtype=dtype)


@functools.cache
def has_cuda_kernels() -> bool:
    """Whether bitsandbytes is installed and has kernels for this torch's CUDA. Without them its
    operations are registered too, but fail when they are called."""
    try:
        from bitsandbytes.cextension import lib  # this import registers torch.ops.bitsandbytes
    except (ImportError, OSError, RuntimeError):
        return False
    return getattr(lib, "compiled_with_cuda", False) \
        and hasattr(torch.ops.bitsandbytes, "dequantize_4bit")


class _Product(torch.autograd.Function):
    """y = x W^T + b, and dx = dy W. W is dequantised in each pass and not kept between them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, shape: tuple[int, int], codes: Tensor,
                *scales: Tensor) -> Tensor:
        ctx.save_for_backward(codes, *scales)
        ctx.shape = shape
        return F.linear(x, dequantise_buffers(shape, codes, scales, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        codes, *scales = ctx.saved_tensors
        dx = dy @ dequantise_buffers(ctx.shape, codes, scales, dy.dtype)
        return dx, None, None, None, *[None for _ in scales]


def dequantise_buffers(shape: tuple[int, int], codes: Tensor, scales: Sequence[Tensor],
                       dtype: torch.dtype) -> Tensor:
    """W (out,in) of an NF4Linear's buffers. `scales` is one tensor, float32 seen as int32; with
    double quantisation the three of `quantise_scales`."""
    if len(scales) == 1:
        block_scales = scales[0].view(torch.float32)
    else:
        scale_codes, largest, mean = scales
        block_scales = dequantise_scales(scale_codes, largest.view(torch.float32),
                                         mean.view(torch.float32))
    return dequantise(codes, block_scales, *shape, dtype)


class NF4Linear(nn.Module):
    """y = W x + b with a frozen W (out,in) in NF4 and b (out,) in its own dtype.

    `double`: double quantisation. UserError if the size of W is not a multiple of 64.
    """

    def __init__(self, W: Tensor, bias: nn.Parameter | None, double: bool):
        super().__init__()
        self.out_features, self.in_features = W.shape
        if W.numel() % BLOCK:
            raise UserError(f"a matrix of {self.out_features} x {self.in_features} numbers cannot "
                            f"be kept in NF4: expected a multiple of {BLOCK} numbers; use "
                            "--tune lora")
        codes, scales = quantise(W)
        self.register_buffer("codes", codes, persistent=False)
        for i, x in enumerate(quantise_scales(scales) if double else [scales]):
            if x.dtype == torch.float32:
                x = x.view(torch.int32)  # `.to(bfloat16)` rounds float32 buffers, but not int32
            self.register_buffer(f"scales_{i}", x, persistent=False)
        self.bias = bias

    @property
    def numel(self) -> int:
        """How many numbers W has."""
        return self.out_features * self.in_features

    @property
    def buffers_of_weight(self) -> tuple[Any, ...]:
        """The shape of W, its codes and its scales, as `dequantise_buffers` reads them."""
        return (self.out_features, self.in_features), *self.buffers(recurse=False)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _Product.apply(x, bias, *self.buffers_of_weight)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W (out,in), dequantised."""
        shape, codes, *scales = self.buffers_of_weight
        return dequantise_buffers(shape, codes, scales, dtype)


def fits(name: str, module: nn.Module) -> bool:
    """Whether a module is converted to NF4: the linear layers of the blocks are. Embeddings, norms
    and the output embedding keep their dtype (QLoRA, section 4)."""
    return isinstance(module, nn.Linear) and ".layers." in name


def nf4_layers(model: nn.Module) -> list[NF4Linear]:
    """All layers in NF4."""
    return [m for m in model.modules() if isinstance(m, NF4Linear)]
