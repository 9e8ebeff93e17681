"""Reading with a cache: prompts of any lengths in one pass, then a token at a time.

Nothing is padded on the left: a row's first token stands at position 0, whoever its neighbours are,
and what pads a short row on its right is never seen. Rows that are done leave the cache and others
take their place, so it only ever holds rows that are being continued.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from model import KVCache, Llama

BUDGET = 4096  # tokens read at once, padding included: their activations are in memory together


def ragged(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids as tokens, doc (B,T): padded on the right, where doc is -1."""
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    doc = torch.full_like(tokens, -1)
    for i, ids in enumerate(rows):
        tokens[i, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        doc[i, : len(ids)] = 0
    return tokens.to(device), doc.to(device)


def portions(sizes: Sequence[int], budget: int = BUDGET) -> Iterator[slice]:
    """Consecutive rows of these lengths, so many at once that padded they fit; at least one."""
    first, longest = 0, 0
    for i, size in enumerate(sizes):
        longest = max(longest, size)
        if i > first and longest * (i + 1 - first) > budget:
            yield slice(first, i)
            first, longest = i, size
    if first < len(sizes):
        yield slice(first, len(sizes))


def prefill(model: Llama, prompts: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
    """Read a prompt into each row of an empty cache; logits of what follows each, (B,V)."""
    logits, parts = [], []
    for some in portions([len(ids) for ids in prompts]):
        tokens, doc = ragged(prompts[some], model.device)
        parts.append(cache.part(some))
        pos = torch.arange(tokens.shape[1], device=model.device).expand_as(tokens)
        logits.append(model(tokens, doc, pos, cache=parts[-1]))
    cache.length = torch.cat([part.length for part in parts])
    cache.extent = max(part.extent for part in parts)
    return torch.cat(logits)


def refill(model: Llama, prompts: Sequence[Sequence[int]], whole: KVCache,
           held: KVCache) -> tuple[KVCache, Tensor]:
    """Read prompts into the rows of `whole` behind those of `held`, which are its first.

    Returns a cache of all these rows, in the same memory, and the logits of the new ones, (B,V).
    """
    n = len(held.length)
    fresh = whole.part(slice(n, n + len(prompts)))
    logits = prefill(model, prompts, fresh)
    both = whole.part(slice(0, n + len(prompts)))
    both.length = torch.cat([held.length, fresh.length])
    both.extent = max(held.extent, fresh.extent)
    return both, logits


def step(model: Llama, ids: Tensor, cache: KVCache) -> Tensor:
    """Read one more id (B,) in each row; logits of what follows it, (B,V)."""
    return model(ids[:, None], torch.zeros_like(ids)[:, None], cache.length[:, None], cache=cache)


def rearrange(whole: KVCache, held: KVCache, order: Sequence[int], start: int = 0) -> KVCache:
    """A cache whose rows are rows `order` of `held`, which are the first of `whole`, in its memory.

    Only rows that move are copied, and of them what stands at `start` and behind: it is for the
    caller to know that before it they are equal.
    """
    moved = [row for row, old in enumerate(order) if row != old]
    if moved:
        old = [order[row] for row in moved]
        whole.k[:, moved, start : held.extent] = held.k[:, old, start : held.extent]
        whole.v[:, moved, start : held.extent] = held.v[:, old, start : held.extent]
    cache = whole.part(slice(0, len(order)))
    cache.length = held.length[list(order)]
    cache.extent = int(cache.length.max()) if order else 0  # the longest row may have left
    return cache


def keep_rows(cache: KVCache, keep: Sequence[int]) -> tuple[KVCache, list[int]]:
    """Shrink a cache to the rows of `keep`; returns which old row now stands in each row too.

    Only rows from the end move, into the gaps: a row is copied at most once for each that finishes.
    """
    n = len(keep)
    order = list(range(n))
    gaps = sorted(set(order) - set(keep))
    for gap, row in zip(gaps, (row for row in keep if row >= n), strict=True):
        order[gap] = row
    return rearrange(cache, cache, order), order
