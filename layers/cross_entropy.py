"""Linear cross-entropy: the negative log-likelihood (NLL) of targets from hidden states.

The logits of all B x T tokens would be the largest tensor of a training step (2048 x 128256 in
float32 is 1 GB). They are therefore computed chunk by chunk, in the forward and in the backward
pass: a chunk's logits are freed as soon as its NLL and its gradient are known. `ChunkSizes` bounds
the memory, however many tokens there are.

`summed_nll` gives one sum, `token_nll` the NLL of each token. The gradient of a sum needs no second
pass over the logits, so a loss that is a plain sum should take the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from runtime.transfer import to_device_async

IGNORE_INDEX = -100  # torch's own default for targets that are not trained


@dataclass(frozen=True)
class ChunkSizes:
    """How many tokens (or rows) are in memory at once.

    logits: tokens whose logits exist in the compute dtype. gradients: tokens whose logit gradients
    are collected before one product adds them to the gradient of the output embedding. float32:
    tokens whose logits exist in float32. head_rows: rows of the output embedding's gradient that
    one addition covers.
    """

    logits: int
    gradients: int
    float32: int
    head_rows: int = 4096


def chunk_sizes(device: str, V: int, C: int, numel: int | None = None,
                cached_numel: int = 1 << 18) -> ChunkSizes:
    """The fastest measured chunk sizes for a `cpu` or `cuda` device and an output embedding (V,C).

    On a CPU (measured at V = 32,000 with two threads): chunks of 256 tokens, and 131 MB of bf16
    logit gradients where the output embedding is trained. Each thread works on so few float32
    numbers (`cached_numel`) that they stay in its cache. A GPU needs larger chunks to be busy;
    its logit gradients are no larger than the gradient that they are added to.
    `numel` is the number of logits in a chunk (GPU) or in a group of gradients (CPU).
    """
    if device == "cpu":
        tokens = _power_of_two_below((numel or 1 << 26) // V)
        float32 = torch.get_num_threads() * max(1, cached_numel // V)
        return ChunkSizes(256, max(1024, tokens), min(256, float32))
    tokens = _power_of_two_below((numel or 1 << 27) // V)
    return ChunkSizes(tokens, max(1024, tokens, 2 * C), tokens)


def _power_of_two_below(n: int) -> int:
    """The largest power of two that is not above n; 1 for n = 0."""
    return 1 << max(n.bit_length() - 1, 0)


def softcap(logits: Tensor, cap: float) -> Tensor:
    """Logits bounded by cap * tanh(x / cap), in float32; unchanged where cap is 0 (Gemma 2)."""
    if not cap:
        return logits
    return cap * torch.tanh(logits.float() / cap)


def chunk_nll_(logits: Tensor, targets: Tensor, cap: float, needs_gradient: bool) -> Tensor:
    """NLL of each target (n,) float32; logits (n,V) are overwritten by their gradient if needed.

    d nll / d logits is softmax - onehot, so the gradient costs no second pass over the logits.
    """
    x = softcap(logits, cap)  # (n,V)
    logp = torch.log_softmax(x, -1, dtype=torch.float32)  # (n,V)
    nll = -logp.gather(-1, targets[:, None]).squeeze(-1)  # (n,)
    if not needs_gradient:
        return nll
    d = logp.exp_()
    if torch.compiler.is_compiling():  # one fused pass; an indexed write would be a second
        d = d - (torch.arange(d.shape[-1], device=d.device) == targets[:, None]) * 1.0
    else:
        d[torch.arange(len(d), device=d.device), targets] -= 1.0
    if cap:
        d *= 1 - (x / cap).square_()  # tanh' = 1 - tanh^2
    logits.copy_(d)
    return nll


@dataclass(frozen=True)
class _Options:
    """What both autograd functions need in addition to their tensors."""

    cap: float
    sizes: ChunkSizes
    compiled: Callable[..., Tensor] | None  # chunk_nll_, compiled


def _chunk(logits: Tensor, h: Tensor, W: Tensor, targets: Tensor, options: _Options,
           needs_gradient: bool = True) -> Tensor:
    """NLL (n,) of h (n,C) with W (V,C); `logits` (n,V) is the memory for logits and gradient."""
    torch.mm(h, W.T, out=logits)
    if options.compiled is not None and needs_gradient:
        return options.compiled(logits, targets, options.cap, True)
    n = options.sizes.float32
    return torch.cat([chunk_nll_(x, y, options.cap, needs_gradient)
                      for x, y in zip(logits.split(n), targets.split(n), strict=True)])


def _nll_and_dh(h: Tensor, W: Tensor, targets: Tensor, options: _Options,
                needs_dh: bool) -> tuple[Tensor, Tensor | None]:
    """NLL (n,) float32 of h (n,C), and dh (n,C) if needed; W (V,C) has h's dtype."""
    nll = torch.empty(len(h), dtype=torch.float32, device=h.device)
    dh = torch.empty_like(h) if needs_dh else None
    n = options.sizes.logits
    memory = h.new_empty(min(n, len(h)), len(W))
    for start in range(0, len(h), n):
        chunk = slice(start, start + n)
        logits = memory[: len(h[chunk])]
        nll[chunk] = _chunk(logits, h[chunk], W, targets[chunk], options, needs_dh)
        if dh is not None:
            torch.mm(logits, W, out=dh[chunk])
    return nll, dh


def _dW(h: Tensor, W: Tensor, targets: Tensor, options: _Options, nll: Tensor | None = None,
        dh: Tensor | None = None, factors: Tensor | None = None) -> Tensor:
    """Sum over tokens of factor x (gradient of its logits) h^T: (V,C) float32.

    Fills nll (n,) and dh (n,C) where they are given: the logits are at hand.
    """
    dW, sizes = None, options.sizes
    memory = h.new_empty(min(sizes.gradients, len(h)), len(W))  # allocated once: it costs a pass
    for start in range(0, len(h), sizes.gradients):
        group = slice(start, min(start + sizes.gradients, len(h)))
        d = memory[: group.stop - start]  # (n,V)
        for begin in range(start, group.stop, sizes.logits):
            chunk = slice(begin, min(begin + sizes.logits, group.stop))
            chunk_nll = _chunk(d[begin - start : chunk.stop - start], h[chunk], W, targets[chunk],
                               options)
            if nll is not None:
                nll[chunk] = chunk_nll
        if dh is not None:
            torch.mm(d, W, out=dh[group])
        if factors is not None:
            d *= factors[group, None]
        group_dW = d.T @ h[group]  # (V,C)
        if dW is None:
            dW = group_dW.float()
            continue
        for rows, addend in zip(dW.split(sizes.head_rows), group_dW.split(sizes.head_rows),
                                strict=True):
            rows += addend  # the addend is cast to float32 first, so not all rows at once
    return torch.zeros_like(W, dtype=torch.float32) if dW is None else dW


class SummedNLL(torch.autograd.Function):
    """Sum of the NLL of n targets: h (n,C), W (V,C), targets (n,) -> () float32.

    Both gradients are computed in the forward pass, while a chunk's logits exist. The backward
    pass only multiplies them by the gradient of the sum, which is one number.

    The NLLs are added in their places among `size` tokens, so that the sum has the same rounding
    as a sum over all tokens; `trained` (n,) are those places, None: all of them.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, W: Tensor, targets: Tensor, trained: Tensor | None,
                size: int, options: _Options) -> Tensor:
        needs_h, needs_W = ctx.needs_input_grad[:2]
        cast = W.to(h.dtype)  # (V,C)
        ctx.dW, ctx.options = None, options
        if needs_W:
            nll = torch.empty(len(h), dtype=torch.float32, device=h.device)
            dh = torch.empty_like(h) if needs_h else None
            ctx.dW = _dW(h, cast, targets, options, nll, dh)
        else:
            nll, dh = _nll_and_dh(h, cast, targets, options, needs_h)
        ctx.save_for_backward(h, W, targets, dh)
        return scatter(nll, trained, size).sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        h, W, targets, dh = ctx.saved_tensors
        if dh is not None:
            # a tensor of two dimensions is not rounded to bf16 first: 1/1431 would lose 0.1 %
            dh = (dh * g.view(1, 1)).to(dh.dtype)
        dW, ctx.dW = ctx.dW, None  # overwritten here, so it serves one backward pass
        if ctx.needs_input_grad[1]:
            if dW is None:
                dW = _dW(h, W.to(h.dtype), targets, ctx.options, factors=g.expand(len(h)))
            else:
                dW.mul_(g)
            dW = dW.to(W.dtype)
        return dh, dW, None, None, None, None


class TokenNLL(torch.autograd.Function):
    """NLL of each target: h (n,C), W (V,C), targets (n,) -> (n,) float32.

    dh of each token is computed in the forward pass and multiplied by that token's gradient in the
    backward pass. dW mixes tokens, so the backward pass computes the logits again for it.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, W: Tensor, targets: Tensor, options: _Options) -> Tensor:
        nll, dh = _nll_and_dh(h, W.to(h.dtype), targets, options, ctx.needs_input_grad[0])
        ctx.options = options
        ctx.save_for_backward(h, W, targets, dh)
        return nll

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        h, W, targets, dh = ctx.saved_tensors
        dW = None
        if dh is not None:
            dh = (dh * g[:, None]).to(dh.dtype)
        if ctx.needs_input_grad[1]:
            dW = _dW(h, W.to(h.dtype), targets, ctx.options, factors=g).to(W.dtype)
        return dh, dW, None, None


def scatter(nll: Tensor, trained: Tensor | None, size: int) -> Tensor:
    """NLLs (n,) in their places `trained` (n,) among `size` tokens, 0 elsewhere: (size,)."""
    if trained is None:
        return nll
    return nll.new_zeros(size).index_put((trained,), nll)


def _select(h: Tensor, W: Tensor, targets: Tensor, trained: Tensor | None,
            ignore_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Hidden states and targets of the trained tokens, and their places; None where all are."""
    if not torch.is_grad_enabled():  # an autograd function is told of a leaf that needs a gradient
        h, W = h.detach(), W.detach()
    h, flat = h.flatten(0, 1), targets.flatten()  # (B T,C), (B T,)
    if trained is None:
        trained = (flat.cpu() != ignore_index).nonzero().squeeze(-1)  # (n,)
    if len(trained) == len(flat):
        return h, W, flat, None
    trained = to_device_async(trained, h.device)
    return h[trained], W, flat[trained], trained


class LinearCrossEntropy(nn.Module):
    """NLL of targets (B,T) from hidden states (B,T,C) and an output embedding (V,C), in chunks.

    Targets equal to `ignore_index` are not computed; their NLL is 0. `softcap` bounds the logits.
    """

    def __init__(self, softcap: float = 0.0, ignore_index: int = IGNORE_INDEX,
                 sizes: ChunkSizes | None = None):
        super().__init__()
        self.softcap, self.ignore_index, self.sizes = softcap, ignore_index, sizes
        self.compiled_chunk: Callable[..., Tensor] | None = None

    def compile(self, **options: Any) -> None:
        """Compile the pass over a chunk's logits: it reads them twice and writes the gradient once.

        The loops stay as they are, because the number of trained tokens changes with every batch.
        """
        self.compiled_chunk = torch.compile(chunk_nll_, **options)

    def forward(self, h: Tensor, W: Tensor, targets: Tensor,
                reduction: Literal["none", "sum"] = "none",
                trained: Tensor | None = None) -> Tensor:
        """`sum`: () float32; `none`: (B,T) float32. `trained` (n,): the places of the targets that
        are not `ignore_index`, where the caller knows them; otherwise a GPU is waited for."""
        sizes = self.sizes or chunk_sizes(h.device.type, *W.shape)
        options = _Options(self.softcap, sizes, self.compiled_chunk)
        h, W, flat, trained = _select(h, W, targets, trained, self.ignore_index)
        if reduction == "sum":
            return SummedNLL.apply(h, W, flat, trained, targets.numel(), options)
        nll = TokenNLL.apply(h, W, flat, options)  # (n,)
        return scatter(nll, trained, targets.numel()).view(targets.shape)


def token_nll(h: Tensor, W: Tensor, targets: Tensor, softcap: float = 0.0,
              sizes: ChunkSizes | None = None) -> Tensor:
    """NLL of each target in nats, 0 where it is ignored: (B,T,C), (V,C), (B,T) -> (B,T) float32."""
    return LinearCrossEntropy(softcap, sizes=sizes)(h, W, targets)


def summed_nll(h: Tensor, W: Tensor, targets: Tensor, softcap: float = 0.0,
               sizes: ChunkSizes | None = None) -> Tensor:
    """Sum of the targets' NLL in nats: (B,T,C), (V,C), (B,T) -> () float32."""
    return LinearCrossEntropy(softcap, sizes=sizes)(h, W, targets, "sum")
