"""LoRA (Hu et al. 2021) and its kin by hand: y = W x + s B A x, with W frozen.

s is alpha / r. rsLoRA (Kalajdzievski 2023) divides by sqrt(r), so that a high rank does not learn
more slowly than a low one. DoRA (Liu et al. 2024) trains the norm m of each row of W + s B A.

An adapted layer keeps its linear layer under `base_layer`, as PEFT does. So the name of a parameter
in a PEFT adapter file is `base_model.model.` and its name here; no file is converted. Embeddings
and norms may be trained in addition to the adapter (PEFT's `modules_to_save`).
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

from layers.nf4 import NF4Linear, dequantise_buffers
from runtime.console import FLAGS, UserError

EMBEDDINGS = ("embed_tokens", "lm_head")
Base = nn.Linear | NF4Linear  # layers that an adapter can be added to


def base_weight(base: Base, dtype: torch.dtype) -> Tensor:
    """The frozen W (out,in) of a base layer in a dtype; NF4 is dequantised."""
    return base.dense(dtype) if isinstance(base, NF4Linear) else base.weight.to(dtype)


# An operation of its own, because torch.compile would replace addmm_ by a copy and a sum.
@torch.library.custom_op("lora::add", mutates_args={"y"})
def _compiled_addmm_(y: Tensor, a: Tensor, b: Tensor) -> None:
    y.addmm_(a, b)


@_compiled_addmm_.register_fake
def _(y: Tensor, a: Tensor, b: Tensor) -> None:
    pass


def addmm_(y: Tensor, a: Tensor, b: Tensor) -> None:
    """y (N,out) += a (N,R) b (R,out) in place, in one product."""
    if torch.compiler.is_compiling():
        _compiled_addmm_(y, a, b)
    else:
        y.addmm_(a, b)


class _LoRAFunction(torch.autograd.Function):
    """y = W x + b + s B A x, added up inside the matrix products, without a copy of W in x's dtype.

    x (...,in), A (R,in), B (out,R). `stored` is what is stored of W: W itself if `nf4_shape` is
    None, or else the codes and scales of an NF4Linear of that shape.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, scale: float,
                nf4_shape: tuple[int, int] | None, *stored: Tensor) -> Tensor:
        bias = None if bias is None else bias.to(x.dtype)
        y = F.linear(x, _weight(nf4_shape, stored, x.dtype), bias)  # (...,out)
        sAx = F.linear(x, A.to(x.dtype)).mul(scale).flatten(0, -2)  # (N,R)
        addmm_(y.view(-1, y.shape[-1]), sAx, B.to(x.dtype).T)
        ctx.save_for_backward(x, A, B, sAx, *stored)
        ctx.scale, ctx.nf4_shape = scale, nf4_shape
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, sAx, *stored = ctx.saved_tensors
        dy = dy.flatten(0, -2)  # (N,out)
        sBdy = (dy @ B.to(dy.dtype)).mul_(ctx.scale)  # (N,R)
        dA = sBdy.T @ x.flatten(0, -2)  # (R,in)
        dB = dy.T @ sAx  # (out,R)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ _weight(ctx.nf4_shape, stored, dy.dtype)  # (N,in)
            addmm_(dx, sBdy, A.to(dy.dtype))
            dx = dx.view(x.shape)
        return dx, dA.to(A.dtype), dB.to(B.dtype), None, None, None, *[None for _ in stored]


def _weight(nf4_shape: tuple[int, int] | None, stored: Sequence[Tensor],
            dtype: torch.dtype) -> Tensor:
    """W (out,in) in a dtype, from the tensors that are stored of it."""
    if nf4_shape is None:
        return stored[0].to(dtype)
    return dequantise_buffers(nf4_shape, stored[0], stored[1:], dtype)


class LoRALinear(nn.Module):
    """A linear layer with an adapter: y = W x + b + s B A x.

    A (R,in) starts random and B (out,R) at zero, so that training starts from the base model. With
    DoRA every row of W + s B A is rescaled to a trained norm m (out,).
    """

    def __init__(self, base: Base, rank: int, alpha: float, dropout: float, rslora: bool,
                 dora: bool):
        super().__init__()
        self.base_layer = base
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        options = {"bias": False, "dtype": torch.float32,
                   "device": next(chain(base.parameters(), base.buffers())).device}
        self.lora_A = nn.Linear(base.in_features, rank, **options)
        self.lora_B = nn.Linear(rank, base.out_features, **options)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.squared_row_norms: Tensor | None = None  # of W (out,), with DoRA
        self.lora_magnitude_vector: nn.Parameter | None = None  # m (out,), with DoRA
        if dora:
            self.squared_row_norms = base_weight(base, torch.float32).detach().square().sum(1)
            self.lora_magnitude_vector = nn.Parameter(self.squared_row_norms.sqrt())
        self.enabled = True

    def set_enabled(self, enabled: bool) -> None:
        """Switch the adapter on or off; without it this layer is its base layer."""
        self.enabled = enabled

    def forward(self, x: Tensor) -> Tensor:
        """x (...,in) -> (...,out)."""
        if not self.enabled:
            return self.base_layer(x)
        drops = self.dropout > 0 and self.training
        if self.lora_magnitude_vector is None and torch.is_grad_enabled() and not drops:
            base = self.base_layer
            stored = base.buffers_of_weight if isinstance(base, NF4Linear) else (None, base.weight)
            return _LoRAFunction.apply(x, self.lora_A.weight, self.lora_B.weight, base.bias,
                                       self.scale, *stored)
        A, B = self.lora_A.weight.to(x.dtype), self.lora_B.weight.to(x.dtype)
        dropped = F.dropout(x, self.dropout, self.training)  # (...,in)
        sAx = F.linear(dropped, A) * self.scale  # (...,R): scaled before B, where it is small
        y = self.base_layer(x)  # (...,out)
        if self.lora_magnitude_vector is not None:
            return self._dora(y, dropped, sAx, B)
        if torch.is_grad_enabled():
            return y + F.linear(sAx, B)
        y.view(-1, y.shape[-1]).addmm_(sAx.flatten(0, -2), B.T)  # rounded as in _LoRAFunction
        return y

    def _dora(self, y: Tensor, dropped: Tensor, sAx: Tensor, B: Tensor) -> Tensor:
        """m / |W + s B A| (W + s B A) x + b, from the base layer's y = W x + b: (...,out).

        What is added to y reads x after dropout, as in PEFT; b is not rescaled.
        """
        factor = (self.lora_magnitude_vector / self.row_norms(y.dtype)).to(y.dtype)  # (out,)
        Wx = self.base_layer(dropped) if self.dropout and self.training else y  # (...,out)
        if self.base_layer.bias is not None:
            Wx = Wx - self.base_layer.bias.to(y.dtype)
        return y + (factor - 1) * Wx + factor * F.linear(sAx, B)

    def delta(self) -> Tensor:
        """s B A, which LoRA adds to W: (out,in) float32."""
        return self.scale * (self.lora_B.weight @ self.lora_A.weight)

    @torch.no_grad()
    def row_norms(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Norms of the rows of W + s B A, (out,) float32; a constant to the gradient (DoRA, 4.3).

        |w + d|^2 = |w|^2 + 2 w.d + |d|^2 for each row, so that W + s B A (out,in) is not computed.
        `dtype` is the dtype of the product w.d.
        """
        A, sB = self.lora_A.weight, self.lora_B.weight * self.scale
        WAt = F.linear(base_weight(self.base_layer, dtype), A.to(dtype)).float()  # (out,R)
        squared = self.squared_row_norms + ((2 * WAt + sB @ (A @ A.T)) * sB).sum(1)  # (out,)
        return squared.clamp(min=0).sqrt()

    def merged(self) -> Tensor:
        """The weight that includes the adapter, W + s B A with DoRA's norms: (out,in) float32."""
        W = base_weight(self.base_layer, torch.float32) + self.delta()
        if self.lora_magnitude_vector is None:
            return W
        return W * (self.lora_magnitude_vector / W.norm(dim=1))[:, None]


def add_lora(model: nn.Module, rank: int, alpha: float, dropout: float, targets: Sequence[str],
             rslora: bool = False, dora: bool = False, layers: Sequence[int] = (),
             modules_to_save: Sequence[str] = ()) -> None:
    """Freeze the model and add an adapter to each linear layer that `targets` selects.

    As in PEFT, a target is a module's name or the end of it; `all-linear` selects all linear layers
    but lm_head. `layers` restricts the choice to layers of these indices; empty: all layers. The
    modules of `modules_to_save` are trained without an adapter. UserError if a target selects no
    layer, or if the rank exceeds a layer's width.
    """
    names = _select_layers(model, targets, layers)
    for name in names:
        base = model.get_submodule(name)
        if not 0 < rank <= min(base.in_features, base.out_features):
            raise UserError(
                f"--lora-rank {rank}: {name} is {base.out_features} x {base.in_features}, so the "
                f"rank must be from 1 to {min(base.in_features, base.out_features)}", FLAGS)
    model.requires_grad_(False)
    for name in names:
        base = model.get_submodule(name)
        model.set_submodule(name, LoRALinear(base, rank, alpha, dropout, rslora, dora))
    train_modules(model, modules_to_save)


def _select_layers(model: nn.Module, targets: Sequence[str], layers: Sequence[int]) -> list[str]:
    """Names of the linear layers that `targets` and `layers` select (see `add_lora`)."""
    linears = [name for name, m in model.named_modules()
               if isinstance(m, Base) and name != "lm_head"]
    known = sorted({name.rsplit(".", 1)[-1] for name in linears})
    targets = known if list(targets) == ["all-linear"] else list(targets)
    for target in targets:
        if target in EMBEDDINGS:
            raise UserError(f"--lora-targets {target}: an adapter cannot be added to it; train it "
                            "in full with --train-embeddings", FLAGS)
        if not any(_matches(name, target) for name in linears):
            raise UserError(f"--lora-targets: no layer is named {target!r}; expected "
                            f"{', '.join(known)}, or all-linear", FLAGS)
    last_layer = max((layer_of(name) for name in linears), default=-1)
    for i in layers:
        if not 0 <= i <= last_layer:
            raise UserError(f"--lora-layers: there is no layer {i}; expected 0 to {last_layer}",
                            FLAGS)
    return [name for name in linears if any(_matches(name, target) for target in targets)
            and (not layers or layer_of(name) in layers)]


def _matches(name: str, target: str) -> bool:
    """Whether a target is a module's name or the end of it."""
    return f".{name}".endswith(f".{target}")


def layer_of(name: str) -> int:
    """The index of the layer that a module belongs to; -1 if it belongs to none."""
    match = re.search(r"\blayers\.(\d+)\.", name)
    return int(match[1]) if match else -1


def train_modules(model: nn.Module, names: Sequence[str]) -> None:
    """Train modules (embeddings, norms) in float32 in addition to the adapter.

    Their frozen values are kept, so that `disabled` can restore the base model.
    """
    frozen: dict[str, Tensor] = {}
    for name, m in model.named_modules():
        if isinstance(m, LoRALinear) or not name.endswith(tuple(names)):  # PEFT's rule
            continue
        for parameter_name, p in m.named_parameters(name, recurse=False):
            frozen[parameter_name] = p.detach()
            p.data = p.detach().float().clone()
            p.requires_grad_(True)
    for name in names:
        if not any(key.rpartition(".")[0].endswith(name) for key in frozen):
            raise UserError(f"no module of the model is named {name!r}", FLAGS)
    model.set_base_values(frozen)


def extra_modules(model: nn.Module, embeddings: bool, norms: bool) -> list[str]:
    """Names of modules to train in full: embeddings, an untied output embedding, and norms."""
    names: list[str] = []
    if embeddings:
        names += EMBEDDINGS if model.lm_head is not None else EMBEDDINGS[:1]
    if norms:
        names.append("norm")
    return names


def layer_indices(ranges: Sequence[str], flag: str) -> list[int]:
    """The layers of ranges such as `0-7 30`, in rising order. UserError names a wrong range."""
    layers: set[int] = set()
    for text in ranges:
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"--{flag} {text}: expected layers such as 0-7 or 30", FLAGS)
        layers |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(layers)


def train_layers(model: nn.Module, layers: Sequence[int],
                 modules_to_save: Sequence[str] = ()) -> None:
    """Freeze all but these layers and the modules of `modules_to_save`, which are trained in
    float32 (UCCIX-MT: the embeddings, the first eight layers and the last three)."""
    last_layer = max(layer_of(name) for name, _ in model.named_parameters())
    for i in layers:
        if i > last_layer:
            raise UserError(f"--train-layers: there is no layer {i}; expected 0 to {last_layer}",
                            FLAGS)
    for name, p in model.named_parameters():
        module = name.rpartition(".")[0]
        p.requires_grad_(layer_of(name) in layers or module.endswith(tuple(modules_to_save)))
        if p.requires_grad:
            p.data = p.data.float()


def base_values(model: nn.Module) -> dict[str, Tensor]:
    """The frozen values of parameters that are trained in addition to the adapter, by name."""
    return model.base_values


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """Every layer with an adapter, by its name in the model."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Turn the model into its base model while the context is open."""
    parameters = {name: model.get_parameter(name) for name in base_values(model)}
    trained = {name: p.data for name, p in parameters.items()}
    for m in adapters(model).values():
        m.set_enabled(False)
    for name, p in parameters.items():
        p.data = base_values(model)[name].to(p)
    try:
        yield
    finally:
        for m in adapters(model).values():
            m.set_enabled(True)
        for name, p in parameters.items():
            p.data = trained[name]


@torch.no_grad()
def merge_layer(layer: LoRALinear) -> nn.Module:
    """Add the adapter to the base layer's weight in float32, and return the base layer."""
    W = layer.base_layer.weight
    W.copy_(layer.merged().to(W.dtype))
    return layer.base_layer


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Merge every adapter into its base layer, and replace the adapted layer by that base layer.

    UserError if the base is in NF4: rounding the sum to 4 bits would lose most of what was learned.
    """
    if any(isinstance(m.base_layer, NF4Linear) for m in adapters(model).values()):
        raise UserError("the adapter's base is in NF4, and rounding the merged weights to 4 bits "
                        "would lose most of what was learned; merge into the base's own files "
                        "with: python export.py merge")
    for name, m in adapters(model).items():
        model.set_submodule(name, merge_layer(m))
    for name, frozen in base_values(model).items():
        p = model.get_parameter(name)
        p.data = p.data.to(frozen.dtype)
    model.set_base_values({})
