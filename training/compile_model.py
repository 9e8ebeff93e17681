"""torch.compile for training (`--compile`): each block, and the loss's pass over a chunk."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from model import Llama


def compile_model(model: Llama, **options: Any) -> None:
    """Compile what a training step computes, in place; `options` as torch.compile takes them.

    A block is one graph, as in torchtitan: parameters keep their names, and layers of one shape
    share the compiled code.
    """
    # one graph for each combination of: with or without a gradient, first or later layer, each
    # window, no, one or any number of documents; above torch's limit of 8 blocks would run eagerly
    torch._dynamo.config.recompile_limit = 32
    for block in model.model.layers:
        block.compile(**options)
    model.loss.compile()


def uncompiled() -> AbstractContextManager[None]:
    """Within it compiled modules run eagerly: an evaluation's shapes vary, and each would be
    compiled."""
    return torch.compiler.set_stance("force_eager")
