"""What a run minimises and what it reports: the NLL of each token, and bits per byte.

The one idea: logits for all B x T tokens at once are the largest tensor of a training step (2048 x
128256 in float32 is 1 GB) and nobody needs them. Both passes go chunk by chunk, and a chunk's
logits live only until its log-sum-exp, or its gradient, is taken: what stands at once is bounded,
however many tokens there are.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from data import IGNORE
from runtime.transfer import host, sent

CHUNK, GROUP = 256, 1024  # of `at_once`: the first on a CPU, the least of the second
LOGITS = {"cpu": 1 << 26, "cuda": 1 << 27}  # whose gradients stand at once; on a GPU they too
CACHED = 1 << 18  # numbers in float32 that a CPU's thread goes over again and again in its cache
ROWS = 4096  # of the head's gradient that are added to at once
Sizes = tuple[int, int, int]


def at_once(device: str, V: int, C: int) -> Sizes:
    """How many tokens' logits stand at once on a `cpu` or a `cuda`; how many tokens' gradients of
    logits before they are added to the head's gradient (V,C), which costs as much as a product;
    and of how many tokens logits stand in float32.

    On a CPU what was fastest at V = 32,000 on two threads: 131 MB of gradients in bf16, where the
    head trains; the last grows with the threads, for each has rows of its own, up to a chunk. A GPU
    that is to be busy needs more: so many logits, and gradients no larger than what they are added
    to.
    """
    some = 1 << (LOGITS[device] // V).bit_length() - 1
    if device == "cpu":
        near = torch.get_num_threads() * max(1, CACHED // V)
        return CHUNK, max(GROUP, some), min(CHUNK, near)
    return some, max(GROUP, some, 2 * C), some


class _TokenNLL(torch.autograd.Function):
    """NLL of each token from hidden states and head weights, (N,C), (V,C), (N,) -> (N,) float32.

    d nll_t / d logits_t is softmax_t - onehot_t, whatever is later done with nll_t, so the forward
    pass computes it while the chunk's logits are at hand: h's gradient is then a scaling by
    whatever comes from above. W's gradient mixes the tokens; it too is only a scaling when all
    tokens have the same factor, which is the case for a sum. Otherwise (preference losses: `each`
    its own) the backward pass goes over the chunks again.
    """

    @staticmethod
    def forward(ctx, h: Tensor, W: Tensor, targets: Tensor, cap: float, smoothing: float,
                sizes: Sizes, compiled: bool, each: bool) -> Tensor:
        need_h, need_W = ctx.needs_input_grad[:2]
        cast = W.to(h.dtype)  # (V,C)
        nll = torch.empty(len(h), dtype=torch.float32, device=h.device)
        dh = torch.empty_like(h) if need_h else None
        ctx.dW, ctx.how = None, (cap, smoothing, sizes, compiled and (need_h or need_W))
        if need_W and not each:
            ctx.dW = _head_gradient(h, cast, targets, *ctx.how, nll, dh)
        else:
            held = h.new_empty(min(sizes[0], len(h)), len(W))  # for the logits of each chunk
            for at in range(0, len(h), sizes[0]):
                part = slice(at, at + sizes[0])
                d = held[: len(h[part])]  # (n,V)
                nll[part] = _logit_gradient(d, h[part], cast, targets[part], *ctx.how, need_h)
                if need_h:
                    torch.mm(d, cast, out=dh[part])
        ctx.save_for_backward(h, W, targets, dh)
        return nll

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        h, W, targets, dh = ctx.saved_tensors
        if dh is not None:
            dh = (dh * g[:, None]).to(dh.dtype)  # g is not rounded: 1/1431 would lose 0.1 %
        dW, ctx.dW = ctx.dW, None
        if ctx.needs_input_grad[1]:
            if dW is not None and g.stride(0) == 0:  # the gradient of a sum: one number, expanded
                dW = dW.mul_(g[:1].sum())  # no token at all: 0
            else:
                dW = _head_gradient(h, W.to(h.dtype), targets, *ctx.how, factor=g)
            dW = dW.to(W.dtype)
        return dh, dW, *[None] * 6


def capped(logits: Tensor, cap: float) -> Tensor:
    """Logits bounded by cap * tanh(x / cap), in float32; as they are where cap is 0."""
    return cap * torch.tanh(logits.float() / cap) if cap else logits


def _logit_gradient(d: Tensor, h: Tensor, W: Tensor, targets: Tensor, cap: float, smoothing: float,
                    sizes: Sizes, compiled: bool, wanted: bool = True) -> Tensor:
    """(n,C), (V,C), (n,) -> NLL (n,) float32; into d (n,V) go the logits or, if `wanted`, their
    gradient, in h's dtype."""
    torch.mm(h, W.T, out=d)
    if compiled:
        return fast()(d, targets, cap, smoothing, wanted)
    parts = zip(d.split(sizes[2]), targets.split(sizes[2]), strict=True)
    return torch.cat([_in_place(*part, cap, smoothing, wanted) for part in parts])


def _in_place(logits: Tensor, targets: Tensor, cap: float, smoothing: float,
              wanted: bool) -> Tensor:
    """NLL of each target, (n,) float32; if `wanted` logits (n,V) become their gradient.

    With `smoothing` e a target is 1 - e of itself and e of all tokens alike (Szegedy et al. 2016,
    section 7), so the NLL is (1 - e) nll + e times the mean NLL of all V tokens.
    """
    x = capped(logits, cap)  # (n,V)
    logp = torch.log_softmax(x, -1, dtype=torch.float32)  # (n,V)
    nll = -logp.gather(-1, targets[:, None]).squeeze(-1)
    if smoothing:
        nll = (1 - smoothing) * nll - smoothing * logp.mean(-1)
    if not wanted:
        return nll
    d = logp.exp_()
    if smoothing:
        d -= smoothing / d.shape[-1]
    if torch.compiler.is_compiling():  # in the one pass over them that there is
        d = d - (torch.arange(d.shape[-1], device=d.device) == targets[:, None]) * (1 - smoothing)
    else:
        d[torch.arange(len(d), device=d.device), targets] -= 1 - smoothing
    if cap:
        d *= 1 - (x / cap).square_()  # tanh' = 1 - tanh^2
    logits.copy_(d)
    return nll


@cache
def fast() -> Any:
    """`_in_place`, compiled: logits are read twice and their gradient is written once."""
    return torch.compile(_in_place)


def _head_gradient(h: Tensor, W: Tensor, targets: Tensor, cap: float, smoothing: float,
                   sizes: Sizes, compiled: bool, nll: Tensor | None = None,
                   dh: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
    """Sum over tokens of factor x (their logits' gradient) h^T, (V,C) float32; fills nll (N,) and
    dh (N,C) if given."""
    dW, (some, many, _) = None, sizes
    held = h.new_empty(min(many, len(h)), len(W))  # new memory of this size costs as much as a pass
    for begin in range(0, len(h), many):
        group = slice(begin, min(begin + many, len(h)))
        d = held[: group.stop - begin]  # (n,V)
        for at in range(begin, group.stop, some):
            part = slice(at, min(at + some, group.stop))
            found = _logit_gradient(d[at - begin : part.stop - begin], h[part], W, targets[part],
                                    cap, smoothing, sizes, compiled)
            if nll is not None:
                nll[part] = found
        if dh is not None:
            torch.mm(d, W, out=dh[group])
        if factor is not None:
            d *= factor[group, None]
        part_W = d.T @ h[group]
        if dW is None:
            dW = part_W.float()
            continue
        for into, more in zip(dW.split(ROWS), part_W.split(ROWS), strict=True):
            into += more  # cast first, so not all at once
    return torch.zeros_like(W, dtype=torch.float32) if dW is None else dW


def token_nll(h: Tensor, head: Tensor, targets: Tensor, cap: float = 0.0, smoothing: float = 0.0,
              compiled: bool = False, each: bool = False) -> Tensor:
    """Negative log-likelihood of each target in nats: (B,T,C), (V,C), (B,T) -> (B,T) float32.

    0 where the target is IGNORE; such tokens cost nothing. Holds so much of (B,T,V) as `at_once`
    says. `cap` bounds the logits (see `capped`), `smoothing` spreads the targets (see `_in_place`),
    `compiled`: see `fast`; `each`: what is made of them is no plain sum (see `_TokenNLL`).
    """
    how = cap, smoothing, at_once(h.device.type, *head.shape), compiled, each
    if not torch.is_grad_enabled():  # a Function is told of a leaf that it needs a gradient
        h, head = h.detach(), head.detach()
    kept = host(targets).flatten() != IGNORE
    h, flat = h.flatten(0, 1), targets.flatten()
    if kept.all():
        return _TokenNLL.apply(h, head, flat, *how).view(targets.shape)
    at = sent(kept.nonzero().squeeze(-1), h.device)  # (n,)
    nll = _TokenNLL.apply(h[at], head, flat[at], *how)
    return _Scatter.apply(nll, at, len(flat)).view(targets.shape)


class _Scatter(torch.autograd.Function):
    """y (N,) with y[at] = x (n,), 0 elsewhere; a gradient that is one number expanded stays one."""

    @staticmethod
    def forward(ctx, x: Tensor, at: Tensor, N: int) -> Tensor:
        ctx.save_for_backward(at)
        return x.new_zeros(N).index_put_((at,), x)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None, None]:
        (at,) = ctx.saved_tensors
        return g[:1].expand(len(at)) if g.stride(0) == 0 else g[at], None, None


def document_logp(nll: Tensor, doc: Tensor, N: int) -> Tensor:
    """Log-probability of each document of each row: NLLs (B,T), doc (B,T) -> (B,N) nats."""
    at = torch.where(doc >= 0, doc, N)
    return -nll.new_zeros(len(nll), N + 1).scatter_add(1, at, nll)[:, :N]


def dpo(logp: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Losses and margins of pairs, (P,) each, from log-probabilities (P,2) of chosen and rejected.

    -log sigmoid of beta times how much more than the reference the model prefers the chosen one
    (Rafailov et al. 2023, equation 7).
    """
    more = logp - reference  # (P,2)
    margin = beta * (more[:, 0] - more[:, 1])
    return -torch.nn.functional.logsigmoid(margin), margin


def cpo(logp: Tensor, tokens: Tensor, beta: float, arpo: bool = False) -> tuple[Tensor, Tensor]:
    """The same without a reference (Xu et al. 2024, equation 5; its NLL of the chosen is added by
    whoever sums up). logp and tokens, the trained tokens of each, (P,2).

    `arpo`: the rejected one counts less where it is nearly as likely as the chosen, token for token
    (X-ALMA); its factor min(1, 0.9 exp(0.4 |difference of means|) - 1) is taken as a constant.
    """
    factor = torch.ones_like(logp[:, 1])
    if arpo:
        mean = (logp / tokens.clamp(min=1)).detach()
        factor = (0.9 * torch.exp(0.4 * (mean[:, 0] - mean[:, 1]).abs()) - 1).clamp(max=1)
    margin = beta * (logp[:, 0] - factor * logp[:, 1])
    return -torch.nn.functional.logsigmoid(margin), margin
