"""What moves the weights: parameter groups, AdamW, the learning-rate curve, and the optimizer's
state by name."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

SCHEDULES = ("cosine", "linear", "inverse-sqrt", "wsd", "constant")


def learning_rate(step: int, steps: int, peak: float, schedule: str, warmup: int,
                  floor: float) -> float:
    """The rate of step 1 .. steps: up linearly over `warmup` steps, then down to `floor` x peak by
    the schedule.

    cosine (Loshchilov & Hutter 2017) and linear end at the floor; inverse-sqrt falls as sqrt(warmup
    / step) (Vaswani et al. 2017, eq. 3); wsd (Hu et al. 2024) stays at the peak and falls over the
    last tenth.
    """
    if step <= warmup:
        return peak * step / warmup
    t = (step - warmup) / max(1, steps - warmup)  # 0 .. 1 after the warm-up
    if schedule == "inverse-sqrt":
        return peak * max(floor, math.sqrt(max(warmup, 1) / step))
    down = {"cosine": 0.5 * (1 + math.cos(math.pi * t)), "linear": 1 - t, "constant": 1.0,
            "wsd": min(1.0, (1 - t) / 0.1)}[schedule]
    return peak * (floor + (1 - floor) * down)


def groups(model: nn.Module, weight_decay: float, embeddings: float = 1.0,
           lora_B: float = 1.0) -> list[dict]:
    """What trains, by its weight decay and its share of the learning rate (`scale`).

    Matrices decay; norms, biases and lengths (one number a channel) do not. `embeddings` is the
    share of embed_tokens and lm_head, `lora_B` that of LoRA's B (LoRA+, Hayou et al. 2024).
    """
    found: dict[tuple[float, float], dict] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        scale = lora_B if ".lora_B." in name else 1.0
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            scale = embeddings
        decay = weight_decay if p.dim() >= 2 else 0.0
        group = found.setdefault((scale, decay), {"params": [], "names": [], "scale": scale,
                                                  "weight_decay": decay})
        group["params"].append(p)
        group["names"].append(name)
    return list(found.values())


def adamw(model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float,
          embeddings: float = 1.0, lora_B: float = 1.0) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) over what trains; one fused kernel for all tensors."""
    parts = groups(model, weight_decay, embeddings, lora_B)
    for part in parts:
        part["lr"] = lr * part["scale"]
        del part["names"]
    return torch.optim.AdamW(parts, lr=lr, betas=betas, eps=1e-8, fused=True)


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors as `parameter name/what`, for a checkpoint."""
    return {f"{name}/{what}": x for name, p in model.named_parameters()
            for what, x in optimizer.state.get(p, {}).items()}


def load_state(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str,
               Tensor]) -> None:
    """Put a checkpoint's tensors back, on each parameter's device. AdamW's `step` counts stay where
    they were kept."""
    named = dict(model.named_parameters())
    for key, x in saved.items():
        name, what = key.rsplit("/", 1)
        optimizer.state[named[name]][what] = x.to(named[name].device)
