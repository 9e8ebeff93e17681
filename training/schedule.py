"""The learning rate of each step: warm-up, then a schedule down to a share of the peak."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "linear", "inverse-sqrt", "wsd", "constant")


def warmup_steps(warmup: float, steps: int) -> int:
    """--warmup in steps: below 1 it is a share of all steps."""
    return int(warmup * steps if warmup < 1 else warmup)


def learning_rate(step: int, steps: int, peak: float, schedule: str, warmup: int,
                  min_ratio: float) -> float:
    """The learning rate of step 1 .. `steps`.

    It rises linearly over `warmup` steps to `peak` and falls to `min_ratio` x peak. cosine
    (Loshchilov & Hutter 2017) and linear end there; inverse-sqrt falls as sqrt(warmup / step)
    (Vaswani et al. 2017, eq. 3); wsd (Hu et al. 2024) stays at the peak and falls linearly over the
    last tenth.
    """
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)  # 0 .. 1 after the warm-up
    if schedule == "inverse-sqrt":
        return peak * max(min_ratio, math.sqrt(max(warmup, 1) / step))
    if schedule == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * progress))
    elif schedule == "linear":
        share = 1 - progress
    elif schedule == "wsd":
        share = min(1.0, (1 - progress) / 0.1)
    else:
        assert schedule == "constant", schedule
        share = 1.0
    return peak * (min_ratio + (1 - min_ratio) * share)
