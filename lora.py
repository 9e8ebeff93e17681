"""LoRA (Hu et al. 2021) by hand: y = W x + (alpha / r) B A x, with W frozen.

A wrapped linear keeps the base under `base_layer`, as PEFT does, so a parameter's name here is,
behind the prefix `base_model.model.`, its name in a PEFT adapter file. There is nothing to convert.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from log import FLAGS, UserError

PREFIX = "base_model.model."  # what PEFT puts before the names of the model it wraps
PLAIN = {  # what adapter_config.json may say besides nothing: all else changes what is computed
    "bias": ["none"],
    "task_type": ["CAUSAL_LM"],
    "init_lora_weights": [True, "gaussian", "orthogonal", "eva"],
    "use_dora": [],
    "use_rslora": [],
    "modules_to_save": [],
    "rank_pattern": [],
    "alpha_pattern": [],
    "layers_to_transform": [],
    "fan_in_fan_out": [],
    "layer_replication": [],
    "lora_bias": [],
    "trainable_token_indices": [],
    "target_parameters": [],
    "exclude_modules": [],
    "alora_invocation_tokens": [],
    "use_qalora": [],
    "megatron_config": [],
}


class LoRALinear(nn.Module):
    """y = W x + scale * B A x; A (R,in) starts random, B (out,R) at zero, so that step 0 is the
    base model."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base_layer = base
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.scale = alpha / rank
        at = base.weight.device
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=at, dtype=torch.float32)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=at, dtype=torch.float32)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.enabled = True  # off: the base model

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if not self.enabled:
            return y
        A, B = (self.lora_A.weight.to(x.dtype),
                self.lora_B.weight.to(x.dtype))  # products in the compute dtype
        down = F.linear(F.dropout(x, self.dropout, self.training), A)  # (B,T,R)
        return y + F.linear(down * self.scale, B)  # scaled where it is small

    def delta(self) -> Tensor:
        """What the adapter adds to W: (out,in) float32."""
        return self.scale * (self.lora_B.weight @ self.lora_A.weight)


def attach(model: nn.Module, rank: int, alpha: float, dropout: float,
           targets: Sequence[str]) -> None:
    """Freeze the model and wrap every linear layer that a target names, whole or by its end, as in
    PEFT.

    `all-linear` is all but lm_head. UserError on a target that names none, or a rank above the
    width.
    """
    linears = [
        name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    known = sorted({name.rsplit(".", 1)[-1] for name in linears})
    targets = known if list(targets) == ["all-linear"] else list(targets)
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in linears):
            raise UserError(
                f"--lora-targets: no layer is named {target!r}; there are {', '.join(known)}, and "
                "all-linear", FLAGS)
    wrapped = [name for name in linears if any(f".{name}".endswith(f".{t}") for t in targets)]
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
        setattr(model.get_submodule(parent), child, LoRALinear(base, rank, alpha, dropout))


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """Every wrapped layer by its name in the model."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors under PEFT's names: what adapter_model.safetensors holds."""
    return {f"{PREFIX}{name}.lora_{x}.weight": getattr(m, f"lora_{x}").weight.detach()
            for name, m in adapters(model).items() for x in "AB"}


def adapter_config(model: nn.Module, base: str) -> dict[str, Any]:
    """adapter_config.json for the attached adapter, on the base of that name or path."""
    found = adapters(model)
    one = next(iter(found.values()))
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
            "r": one.rank, "lora_alpha": one.alpha, "lora_dropout": one.dropout, "bias": "none",
            "inference_mode": True,
            "target_modules": sorted({name.rsplit(".", 1)[-1] for name in found})}


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Attach the PEFT adapter in a folder, with its weights; UserError on what would be computed
    otherwise."""
    from safetensors.torch import load_file

    where = folder / "adapter_config.json"
    words = json.loads(where.read_text(encoding="utf-8"))
    odd = [
        f"{k} {words[k]!r}" for k, plain in PLAIN.items() if words.get(k) and words[k] not in plain]
    if words.get("peft_type") != "LORA" or odd:
        raise UserError(
            f"{where}: {', '.join(odd) or words.get('peft_type')} is not supported; plain LoRA is")
    r, alpha, dropout = words.get("r"), words.get("lora_alpha"), words.get("lora_dropout", 0.0)
    targets = words.get("target_modules")
    targets = [targets] if isinstance(targets, str) else targets
    if (type(r) is not int or r < 1 or type(alpha) not in (int, float)
        or not isinstance(targets, list) or not all(isinstance(t, str) for t in targets)
        or type(dropout) not in (int, float) or not 0 <= dropout < 1):
        raise UserError(
            f"{where}: r {r!r}, lora_alpha {alpha!r}, lora_dropout {dropout!r}, target_modules "
            f"{targets!r} do not describe an adapter; fetch it again")
    try:
        attach(model, r, alpha, dropout, targets)
    except UserError as e:
        raise UserError(
            f"{where}: {str(e).replace('--lora-', '')}; the adapter belongs to another base"
        ) from None
    try:
        found = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, RuntimeError) as e:
        raise UserError(f"{folder}/adapter_model.safetensors: cannot be read ({e})") from None
    fill(model, found, str(folder))


@torch.no_grad()
def fill(model: nn.Module, found: dict[str, Tensor], where: str) -> None:
    """Copy tensors under PEFT's names into the attached adapter; each exactly once, of the right
    shape."""
    wanted = adapter_state(model)
    for name in sorted(wanted.keys() ^ found.keys()):
        raise UserError(f"{where}: tensor {name} is "
                        f"{'missing' if name in wanted else 'not one of this model'}; the "
                        "adapter belongs to another base")
    for name, tensor in wanted.items():
        if tensor.shape != found[name].shape:
            raise UserError(
                f"{where}: {name} is {tuple(found[name].shape)}, expected {tuple(tensor.shape)}; "
                f"the "
                "adapter belongs to another base")
        tensor.copy_(found[name])


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model, for as long as the context lasts."""
    for m in adapters(model).values():
        m.enabled = False
    try:
        yield
    finally:
        for m in adapters(model).values():
            m.enabled = True


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add every adapter to its base and unwrap it; the sum is taken in float32."""
    for name, m in adapters(model).items():
        W = m.base_layer.weight
        W.copy_((W.float() + m.delta()).to(W.dtype))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, m.base_layer)
