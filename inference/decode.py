"""Decoding with a KV cache: prompts of any lengths in one pass, then one token a step.

Nothing is padded. Prompts are read packed, as training reads documents, and the first token of a
row stands at position 0. Finished rows leave the cache and new prompts take their place, so the
cache holds only rows that are being continued.

`CompiledDecodeStep` runs the step under torch.compile with CUDA graphs over a static cache, as
gpt-fast does. It is refused on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from inference.cpu_linear import cast_adapters
from layers import nf4
from model import KVCache, Llama
from runtime.console import FLAGS, UserError
from runtime.distributed import is_dtensor

LOOKAHEAD = 4  # groups of this many times `rows` prompts are sorted by length
PREFILL_TOKENS = 4096  # tokens read in one pass: their activations are in memory together
STATIC_MULTIPLE = 256  # the size of a static cache is a multiple, so that few shapes are compiled
SHAPES = 64  # of static caches that are compiled; a step of another shape runs uncompiled


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids as tokens, doc (B,T): padded on the right, where doc is -1."""
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    doc = torch.full_like(tokens, -1)
    for i, ids in enumerate(rows):
        tokens[i, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        doc[i, : len(ids)] = 0
    return tokens.to(device), doc.to(device)


def batches_within(lengths: Sequence[int], budget: int, packed: bool = False) -> Iterator[slice]:
    """Slices of consecutive rows of which each batch has at most `budget` tokens, or one row.

    The tokens of a batch are counted with padding, or without it if the rows are `packed`.
    """
    start, longest, total = 0, 0, 0
    for i, length in enumerate(lengths):
        longest, total = max(longest, length), total + length
        tokens = total if packed else longest * (i + 1 - start)
        if i > start and tokens > budget:
            yield slice(start, i)
            start, longest, total = i, length, length
    if start < len(lengths):
        yield slice(start, len(lengths))


def order_by_length(lengths: Sequence[int], rows: int, lookahead: int = LOOKAHEAD) -> list[int]:
    """The order in which prompts enter a batch of `rows` rows: sorted by length within groups of
    `lookahead * rows` prompts, ascending and descending in turn.

    Every row reads as many keys as the longest row, so rows of similar length waste least. No
    prompt waits for a prompt of a later group.
    """
    order = []
    for group, start in enumerate(range(0, len(lengths), lookahead * rows)):
        members = range(start, min(start + lookahead * rows, len(lengths)))
        order += sorted(members, key=lambda i: lengths[i], reverse=group % 2 == 1)
    return order


class PackedPrompts(KVCache):
    """The rows of a cache while prompts are read into them, packed end to end in one row (1,T).

    Each prompt attends to itself only. `rows` (T,): the cache row of each token.
    """

    def __init__(self, cache: KVCache, rows: Tensor):
        self.k, self.v, self.rows = cache.k, cache.v, rows

    def begin_pass(self, T: int) -> None:
        """A pass over packed prompts reads no keys of the cache."""

    def update(self, layer: int, k: Tensor, v: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (1,T,K,D) at pos (1,T) of their rows; return them as they are."""
        self.k[layer][self.rows, pos[0]], self.v[layer][self.rows, pos[0]] = k[0], v[0]
        return k, v

    def end_pass(self, doc: Tensor, pos: Tensor) -> None:
        """`prefill` sets the lengths."""


def prefill(model: Llama, prompts: Sequence[Sequence[int]], cache: KVCache,
            max_tokens: int = PREFILL_TOKENS) -> Tensor:
    """Read a prompt into each row of an empty cache; logits of the next token of each, (B,V).

    At most `max_tokens` tokens are read in one pass.
    """
    logits, device = [], model.device
    lengths = torch.tensor([len(ids) for ids in prompts])
    for batch in batches_within(lengths.tolist(), max_tokens, packed=True):
        n = lengths[batch]
        rows = torch.arange(len(n)).repeat_interleave(n).to(device)  # (T,)
        pos = torch.cat([torch.arange(x) for x in n.tolist()])
        tokens = torch.tensor([token for ids in prompts[batch] for token in ids])
        packed = PackedPrompts(cache.select(batch), rows)
        h = model.states(tokens[None].to(device), rows[None], pos[None].to(device), packed)
        logits.append(model.logits(h[0, (n.cumsum(0) - 1).to(device)]))  # (n,V)
    cache.set_lengths(lengths.to(device), int(lengths.max()))
    return torch.cat(logits)


def prefill_into(model: Llama, prompts: Sequence[Sequence[int]], storage: KVCache,
                 active: KVCache) -> tuple[KVCache, Tensor]:
    """Read prompts into the rows of `storage` that follow those of `active`, its first rows.

    Returns a cache of all these rows, in the same memory, and the logits of the new rows, (B,V).
    """
    n = len(active.lengths)
    new = storage.select(slice(n, n + len(prompts)))
    logits = prefill(model, prompts, new)
    cache = storage.select(slice(0, n + len(prompts)))
    cache.set_lengths(torch.cat([active.lengths, new.lengths]),
                      max(active.cache_len, new.cache_len))
    return cache, logits


def reorder_cache(storage: KVCache, active: KVCache, order: Sequence[int],
                  start: int = 0) -> KVCache:
    """A cache of rows `order` of `active`, the first rows of `storage`, in the same memory.

    Only rows that move are copied, from token `start` on: the caller knows that the tokens before
    it are equal in all these rows.
    """
    moved = [row for row, old in enumerate(order) if row != old]
    if moved:
        old = [order[row] for row in moved]
        storage.k[:, moved, start : active.cache_len] = active.k[:, old, start : active.cache_len]
        storage.v[:, moved, start : active.cache_len] = active.v[:, old, start : active.cache_len]
    cache = storage.select(slice(0, len(order)))
    lengths = active.lengths[list(order)]
    cache.set_lengths(lengths, int(lengths.max()) if order else 0)  # the longest row may be gone
    return cache


def evict_finished(cache: KVCache, keep: Sequence[int]) -> tuple[KVCache, list[int]]:
    """Shrink a cache to the rows `keep`; also returns the old row that is now in each row.

    Only rows from the end move, into the gaps: at most one copy for each finished row.
    """
    n = len(keep)
    order = list(range(n))
    gaps = sorted(set(order) - set(keep))
    for gap, row in zip(gaps, (row for row in keep if row >= n), strict=True):
        order[gap] = row
    return reorder_cache(cache, cache, order), order


class DecodeStep:
    """Read one more token in each row of a cache."""

    def __init__(self, model: Llama):
        self.model = model

    def new_cache(self, rows: int, size: int) -> KVCache:
        """A cache for `rows` rows of at most `size` tokens."""
        model = self.model
        return KVCache(model.config, rows, size, model.device, model.compute_dtype)

    def __call__(self, ids: Tensor, cache: KVCache, storage: KVCache) -> Tensor:
        """Logits (B,V) of the tokens that follow ids (B,) in the rows of `cache`, which are the
        first rows of `storage`."""
        doc, pos = torch.zeros_like(ids)[:, None], cache.lengths[:, None]
        return self.model(ids[:, None], doc, pos, cache=cache)


class StaticCache(KVCache):
    """All rows and all S keys of a cache, so that every step has the same shapes.

    Keys beyond a row's own tokens are masked, because their position is greater than `pos`.
    """

    exact = False

    def __init__(self, k: Tensor, v: Tensor):
        self.k, self.v = k, v

    def begin_pass(self, T: int) -> int:
        """Every step reads all keys."""
        return self.k.shape[2]

    def update(self, layer: int, k: Tensor, v: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B,1,K,D) at pos (B,1); return all keys and values, (B,S,K,D)."""
        write_to_cache(self.k, self.v, layer, k, v, pos)
        return self.k[layer], self.v[layer]

    def end_pass(self, doc: Tensor, pos: Tensor) -> None:
        """The lengths are kept outside of the compiled step."""


@torch.library.custom_op("inference::write_to_cache", mutates_args=("cached_k", "cached_v"))
def write_to_cache(cached_k: Tensor, cached_v: Tensor, layer: int, k: Tensor, v: Tensor,
                   pos: Tensor) -> None:
    """Store k, v (B,T,K,D) of a layer at pos (B,T) of a cache (L,B,S,K,D), in place.

    One operation for the compiler. It turns an indexed assignment to one layer of a tensor into a
    copy of the whole cache.
    """
    rows = torch.arange(len(pos), device=pos.device)[:, None]
    cached_k[layer][rows, pos], cached_v[layer][rows, pos] = k, v


class CompiledDecodeStep(DecodeStep):
    """`DecodeStep` compiled over a static cache: one CUDA graph replays the kernels of a step.

    The step computes all rows of the storage; results of rows without a prompt are not used.
    `compile_options` go to torch.compile.
    """

    def __init__(self, model: Llama, multiple: int = STATIC_MULTIPLE, **compile_options: Any):
        super().__init__(model)
        self.multiple = multiple
        options = {"mode": "reduce-overhead", "dynamic": False, "recompile_limit": SHAPES,
                   "isolate_recompiles": True, **compile_options}
        self.compiled: Callable[..., Tensor] = torch.compile(self._static_step, **options)

    def new_cache(self, rows: int, size: int) -> KVCache:
        """A cache whose size is rounded up, at an address that CUDA graphs may rely on."""
        cache = super().new_cache(rows, -(-size // self.multiple) * self.multiple)
        torch._dynamo.mark_static_address(cache.k)
        torch._dynamo.mark_static_address(cache.v)
        return cache

    def _static_step(self, ids: Tensor, pos: Tensor, k: Tensor, v: Tensor) -> Tensor:
        doc = torch.zeros_like(ids)[:, None]
        return self.model(ids[:, None], doc, pos[:, None], cache=StaticCache(k, v))

    def __call__(self, ids: Tensor, cache: KVCache, storage: KVCache) -> Tensor:
        """See `DecodeStep`. The logits are valid until the next step."""
        B = len(ids)
        all_ids = ids.new_zeros(storage.k.shape[1])
        all_ids[:B] = ids
        all_pos = torch.zeros_like(all_ids)  # a row without a prompt writes at position 0
        all_pos[:B] = cache.lengths
        torch.compiler.cudagraph_mark_step_begin()
        logits = self.compiled(all_ids, all_pos, storage.k, storage.v)
        cache.set_lengths(cache.lengths + 1, cache.cache_len + 1)
        return logits[:B]


def supports_cuda_graphs(model: Llama, device: torch.device) -> bool:
    """Whether a CUDA graph can replay a decoding step of the model on a device.

    Dynamic rotary frequencies depend on the positions, NF4 copies its tables to the device, and a
    sharded weight is gathered first: none of them can be part of a graph.
    """
    ropes = (model.config.rope, model.config.local_rope)
    dynamic = any(rope and rope.kind == "dynamic" for rope in ropes)
    sharded = any(map(is_dtensor, model.parameters()))
    return device.type == "cuda" and not (dynamic or nf4.nf4_layers(model) or sharded)


def compiled_decode_step(model: Llama) -> CompiledDecodeStep:
    """The compiled step of a model (--compile); UserError where CUDA graphs cannot replay it."""
    if not supports_cuda_graphs(model, model.device):
        raise UserError("--compile needs a GPU, and neither an NF4 base nor `dynamic` rotary "
                        "frequencies. Remove --compile.", FLAGS)
    cast_adapters(model)
    return CompiledDecodeStep(model)
