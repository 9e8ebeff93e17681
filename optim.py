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


def groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """What trains, in two groups: matrices decay, norms and biases (one number a channel) do
    not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]


def adamw(model: nn.Module, lr: float, betas: tuple[float, float],
          weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) over what trains; one fused kernel for all tensors."""
    return torch.optim.AdamW(groups(model, weight_decay), lr=lr, betas=betas, eps=1e-8, fused=True)


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
