"""Weights of a mixture of sources with a limit of epochs for each (`--max-epochs-per-source`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data import Source
from runtime.console import FLAGS, UserError


def limit_epochs(sources: Sequence[Source], tokens: int, max_epochs: float) -> None:
    """Set the sources' weights so that a run of so many tokens reads none too often."""
    sizes = [int(np.diff(x.bin.starts)[x.documents].sum()) - len(x.documents) for x in sources]
    weights = limited_weights([x.weight for x in sources], sizes, tokens, max_epochs)
    for source, weight in zip(sources, weights, strict=True):
        source.weight = weight


def limited_weights(weights: Sequence[float], sizes: Sequence[int], tokens: float,
                    max_epochs: float) -> list[float]:
    """Tokens to take from each source, at most `max_epochs` times its size.

    What a small source cannot give is taken from the others in proportion to their weights. With
    equal weights this is UniMax (Chung et al. 2023, algorithm 1). UserError (FLAGS) if all sources
    together are too small.
    """
    available = max_epochs * sum(sizes)
    if tokens > available:
        raise UserError(
            f"--max-epochs-per-source {max_epochs:g}: the sources hold {sum(sizes):,} tokens, "
            f"{available:,.0f} in so many epochs, and the run needs {tokens:,.0f}; lower --steps, "
            "or raise --max-epochs-per-source", FLAGS)
    taken = [0.0] * len(sizes)
    open_sources = set(range(len(sizes)))  # those whose share is not fixed yet
    while open_sources:
        rest = tokens - sum(taken)
        total = sum(weights[i] for i in open_sources)
        exhausted = {i for i in open_sources
                     if rest * weights[i] / total > max_epochs * sizes[i]}
        if not exhausted:
            for i in open_sources:
                taken[i] = rest * weights[i] / total
            break
        for i in exhausted:
            taken[i] = max_epochs * sizes[i]
        open_sources -= exhausted
    return taken
