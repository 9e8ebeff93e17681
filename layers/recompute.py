"""Activation checkpointing (`--recompute`): a block's activations are computed again in the
backward pass instead of being kept.

    none        everything that the backward pass reads is kept
    full        only a block's input is kept (Chen et al. 2016); the whole block is computed again
    selective   results of matrix products and of attention kernels are kept too; the cheap
                operations between them (norms, gates, rotary) are computed again
                (Korthikanti et al. 2022, section 5)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Recompute = Literal["none", "full", "selective"]
KEPT = ("aten.mm.", "aten.addmm", "aten._scaled_mm.", "attn", "attention")


def keep_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The policy of `selective`: results of products and of attention kernels are kept."""
    if any(name in str(op) for name in KEPT):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


# LoRA adds its product into the base's with `addmm_`, and so changes a tensor that is kept. That is
# allowed: the kept tensor holds the sum, and `addmm_` is kept itself, so it is not done twice.
selective_contexts = partial(create_selective_checkpoint_contexts, keep_products,
                             allow_cache_entry_mutation=True)


def with_recompute(function: Callable[..., Tensor], recompute: Recompute, *args: Any) -> Tensor:
    """function(*args), keeping for the backward pass what `recompute` says.

    On a CPU, `selective` blocks are not compiled: their attention runs outside of compiled code,
    and torch does not compile the operations that selective checkpointing observes.
    """
    if recompute == "none" or not torch.is_grad_enabled():
        return function(*args)
    if recompute == "full":
        return checkpoint(function, *args, use_reentrant=False)
    return checkpoint(function, *args, use_reentrant=False, context_fn=selective_contexts)
