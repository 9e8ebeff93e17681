"""LoRA (Hu et al. 2021) and its kin by hand: y = W x + s B A x, with W frozen.

s is alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023), with which a high rank learns
no slower than a low one. DoRA (Liu et al. 2024) gives the sum's rows a trained length m.

A wrapped linear keeps the base under `base_layer`, as PEFT does, so a parameter's name here is,
behind the prefix `base_model.model.`, its name in a PEFT adapter file. There is nothing to convert.
In addition to the adapter, embeddings or norms may be trained (PEFT's `modules_to_save`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.nf4 import NF4Linear, made
from runtime.console import FLAGS, UserError

EMBEDDINGS = ("embed_tokens", "lm_head")
Base = nn.Linear | NF4Linear  # what an adapter goes on


def matrix(base: Base, dtype: torch.dtype) -> Tensor:
    """The frozen W (out,in) in a dtype; of an NF4 base, made for the moment."""
    return base.dense(dtype) if isinstance(base, NF4Linear) else base.weight.to(dtype)


@torch.library.custom_op("lora::add", mutates_args={"y"})  # a compiler would copy y, then add to it
def _add(y: Tensor, a: Tensor, b: Tensor) -> None:
    """y (N,out) += a (N,R) b (R,out), inside the product."""
    y.addmm_(a, b)


@_add.register_fake
def _(y: Tensor, a: Tensor, b: Tensor) -> None:
    pass


def add(y: Tensor, a: Tensor, b: Tensor) -> None:
    """The same, compiled or not."""
    _add(y, a, b) if torch.compiler.is_compiling() else y.addmm_(a, b)


class _Adapted(torch.autograd.Function):
    """W x + b + s B A x in one piece: sums are taken inside products, and no copy of W is kept.

    x (...,in), A (R,in), B (out,R); W as itself or as what NF4 keeps of it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, scale: float,
                shape: Any, *kept: Tensor) -> Tensor:
        bias = None if bias is None else bias.to(x.dtype)
        y = F.linear(x, _made(shape, kept, x.dtype), bias)
        down = F.linear(x, A.to(x.dtype)).mul(scale).flatten(0, -2)  # (N,R)
        add(y.view(-1, y.shape[-1]), down, B.to(x.dtype).T)
        ctx.save_for_backward(x, A, B, down, *kept)
        ctx.scale, ctx.shape = scale, shape
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, down, *kept = ctx.saved_tensors
        flat = g.flatten(0, -2)  # (N,out)
        dx, up = None, (flat @ B.to(g.dtype)).mul_(ctx.scale)  # (N,R)
        dA, dB = up.T @ x.flatten(0, -2), flat.T @ down
        if ctx.needs_input_grad[0]:
            dx = flat @ _made(ctx.shape, kept, g.dtype)
            add(dx, up, A.to(g.dtype))
            dx = dx.view(x.shape)
        return dx, dA.to(A.dtype), dB.to(B.dtype), *[None] * (3 + len(kept))


def _made(shape: Any, kept: Any, dtype: torch.dtype) -> Tensor:
    """W (out,in) in a dtype, from itself or its NF4 buffers."""
    return kept[0].to(dtype) if shape is None else made(shape, kept[0], kept[1:], dtype)


class LoRALinear(nn.Module):
    """y = W x + s B A x; A (R,in) starts random, B (out,R) at zero, so that step 0 is the base
    model. With DoRA every row of W + s B A has the trained length m (out,)."""

    def __init__(self, base: Base, rank: int, alpha: float, dropout: float, rslora: bool,
                 dora: bool):
        super().__init__()
        self.base_layer = base
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        at = next(chain(base.parameters(), base.buffers())).device
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=at, dtype=torch.float32)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=at, dtype=torch.float32)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.squares = None  # of the rows' lengths (out,), with DoRA
        if dora:
            self.squares = matrix(base, torch.float32).detach().square().sum(1)
        self.lora_magnitude_vector = nn.Parameter(self.squares.sqrt()) if dora else None
        self.enabled = True

    def set_enabled(self, enabled: bool) -> None:
        """Switch the adapter on or off; without it this layer is its base layer."""
        self.enabled = enabled

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.base_layer(x)
        if self.lora_magnitude_vector is None and torch.is_grad_enabled() \
                and not (self.dropout and self.training):
            base = self.base_layer
            kept = base.parts if isinstance(base, NF4Linear) else (None, base.weight)
            return _Adapted.apply(x, self.lora_A.weight, self.lora_B.weight, base.bias, self.scale,
                                  *kept)
        A, B = self.lora_A.weight.to(x.dtype), self.lora_B.weight.to(x.dtype)
        dropped = F.dropout(x, self.dropout, self.training)
        down = F.linear(dropped, A) * self.scale  # (B,T,R): scaled where it is small
        y = self.base_layer(x)
        if self.lora_magnitude_vector is None:
            if torch.is_grad_enabled():
                return y + F.linear(down, B)
            y.view(-1, y.shape[-1]).addmm_(down.flatten(0, -2), B.T)  # as _Adapted, to the bit
            return y
        # what m / |row| - 1 multiplies has no bias, and sees the dropout, as in PEFT
        share = (self.lora_magnitude_vector / self.lengths(x.dtype)).to(x.dtype)  # (out,)
        plain = self.base_layer(dropped) if self.dropout and self.training else y
        if self.base_layer.bias is not None:
            plain = plain - self.base_layer.bias.to(x.dtype)
        return y + (share - 1) * plain + share * F.linear(down, B)

    def delta(self) -> Tensor:
        """s B A, what LoRA adds to W: (out,in) float32."""
        return self.scale * (self.lora_B.weight @ self.lora_A.weight)

    @torch.no_grad()
    def lengths(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Lengths of the rows of W + s B A, (out,) float32; a constant to the gradient (DoRA, 4.3).

        |w + d|^2 = |w|^2 + 2 w.d + |d|^2, row by row, so the sum (out,in) is never made; `dtype` is
        that of w.d.
        """
        A, B = self.lora_A.weight, self.lora_B.weight * self.scale
        cross = F.linear(matrix(self.base_layer, dtype), A.to(dtype))  # (out,R)
        square = self.squares + ((2 * cross.float() + B @ (A @ A.T)) * B).sum(1)
        return square.clamp(min=0).sqrt()

    def merged(self) -> Tensor:
        """The one matrix that does what base and adapter do: (out,in) float32."""
        W = matrix(self.base_layer, torch.float32) + self.delta()
        if self.lora_magnitude_vector is None:
            return W
        return W * (self.lora_magnitude_vector / W.norm(dim=1))[:, None]


def add_lora(model: nn.Module, rank: int, alpha: float, dropout: float, targets: Sequence[str],
           rslora: bool = False, dora: bool = False, layers: Sequence[int] = (),
           modules_to_save: Sequence[str] = ()) -> None:
    """Freeze the model and wrap every linear layer that a target names, whole or by its end, as in
    PEFT; of `layers` only, if any are named. The modules of
    `modules_to_save` are trained without an adapter.

    `all-linear` is all but lm_head. UserError on a name that fits none, or a rank above the width.
    """
    linears = [name for name, m in model.named_modules()
               if isinstance(m, Base) and name != "lm_head"]
    known = sorted({name.rsplit(".", 1)[-1] for name in linears})
    targets = known if list(targets) == ["all-linear"] else list(targets)
    for target in targets:
        if target in EMBEDDINGS:
            raise UserError(f"--lora-targets {target}: gets no adapter, DoRA's or another; it may "
                            "train as it is, by --train-embeddings", FLAGS)
        if not any(_ends(name, target) for name in linears):
            raise UserError(f"--lora-targets: no layer is named {target!r}; there are "
                            f"{', '.join(known)}, and all-linear", FLAGS)
    deep = max((layer_of(name) for name in linears), default=-1)
    if odd := [i for i in layers if not 0 <= i <= deep]:
        raise UserError(f"--lora-layers: there is no layer {odd[0]}; they are 0 to {deep}", FLAGS)
    wrapped = [name for name in linears if any(_ends(name, t) for t in targets)
               and (not layers or layer_of(name) in layers)]
    for name in wrapped:
        base = model.get_submodule(name)
        if not 0 < rank <= min(base.in_features, base.out_features):
            raise UserError(
                f"--lora-rank {rank}: {name} is {base.out_features} x {base.in_features}, so the "
                f"rank must be from 1 to {min(base.in_features, base.out_features)}", FLAGS)
    model.requires_grad_(False)
    for name in wrapped:
        parent, _, child = name.rpartition(".")
        base = model.get_submodule(name)
        setattr(model.get_submodule(parent), child,
                LoRALinear(base, rank, alpha, dropout, rslora, dora))
    train_modules(model, modules_to_save)


def _ends(name: str, target: str) -> bool:
    """Whether a target names a module: whole, or by the end of its name."""
    return f".{name}".endswith(f".{target}")


def layer_of(name: str) -> int:
    """The layer a module is in; -1 outside of all."""
    found = re.search(r"\blayers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def train_modules(model: nn.Module, names: Sequence[str]) -> None:
    """Train modules (embeddings, norms) as they are, in float32, beside an adapter.

    The frozen values are kept, so that the base is still there when the adapter is disabled.
    """
    kept: dict[str, Tensor] = {}
    for name, m in model.named_modules():
        if isinstance(m, LoRALinear) or not name.endswith(tuple(names)):  # PEFT's rule
            continue
        for key, p in m.named_parameters(name, recurse=False):
            kept[key] = p.detach()
            p.data = p.detach().float().clone()
            p.requires_grad_(True)
    for name in names:
        if not any(key.rpartition(".")[0].endswith(name) for key in kept):
            raise UserError(f"no module of the model is named {name!r}", FLAGS)
    model.set_base_values(kept)


def extra_modules(model: nn.Module, embeddings: bool, norms: bool) -> list[str]:
    """Names of modules to train in full: embeddings, a head that is not tied to them, and norms."""
    own = EMBEDDINGS if model.lm_head is not None else EMBEDDINGS[:1]
    return [*(own if embeddings else ()), *(["norm"] if norms else ())]


def indices(ranges: Sequence[str], flag: str) -> list[int]:
    """Layers as a person names them, `0-7 30`, by index; UserError on what is no range."""
    found: set[int] = set()
    for x in ranges:
        if not (m := re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", x)) or int(m[2] or m[1]) < int(m[1]):
            raise UserError(f"--{flag} {x}: expected layers such as 0-7 or 30", FLAGS)
        found |= set(range(int(m[1]), int(m[2] or m[1]) + 1))
    return sorted(found)


def train_layers(model: nn.Module, layers: Sequence[int],
                 modules_to_save: Sequence[str] = ()) -> None:
    """Freeze all but these layers and the modules of `modules_to_save`, which are trained in
    float32 (UCCIX-MT: the embeddings, the first eight layers and the last three)."""
    deep = max(layer_of(name) for name, _ in model.named_parameters())
    if odd := [i for i in layers if i > deep]:
        raise UserError(f"--train-layers: there is no layer {odd[0]}; they are 0 to {deep}", FLAGS)
    for name, p in model.named_parameters():
        module = name.rpartition(".")[0]
        chosen = layer_of(name) in layers or module.endswith(tuple(modules_to_save))
        p.requires_grad_(chosen)
        if p.requires_grad:
            p.data = p.data.float()


def base_values(model: nn.Module) -> dict[str, Tensor]:
    """What trains as it is beside the adapter: {parameter's name: the base's values}."""
    return model.base_values


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """Every wrapped layer by its name in the model."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model, for as long as the context lasts."""
    saved = {name: model.get_parameter(name) for name in base_values(model)}
    trained = {name: p.data for name, p in saved.items()}
    for m in adapters(model).values():
        m.set_enabled(False)
    for name, p in saved.items():
        p.data = base_values(model)[name].to(p)
    try:
        yield
    finally:
        for m in adapters(model).values():
            m.set_enabled(True)
        for name, p in saved.items():
            p.data = trained[name]


@torch.no_grad()
def merge_layer(layer: LoRALinear) -> nn.Module:
    """Add the adapter to the base layer's weight, with the sum in float32 -> the base layer."""
    W = layer.base_layer.weight
    W.copy_(layer.merged().to(W.dtype))
    return layer.base_layer


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Merge every adapter into its base layer and put that layer in its place.

    UserError if the base is quantised: the sum would be rounded to 4 bits and lose most of what was
    learned.
    """
    if any(isinstance(m.base_layer, NF4Linear) for m in adapters(model).values()):
        raise UserError("the adapter's base is in NF4, and a merge into four bits would ruin the "
                        "model; merge into the base's own files with: python export.py merge")
    for name, m in adapters(model).items():
        model.set_submodule(name, merge_layer(m))
    for name, before in base_values(model).items():
        p = model.get_parameter(name)
        p.data = p.data.to(before.dtype)
    model.set_base_values({})
