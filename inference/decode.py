"""Reading with a cache: prompts of any lengths in one pass, then a token at a time.

Nothing is padded: prompts are read packed, as training reads documents, and a row's first token
stands at position 0, whoever its neighbours are. Rows that are done leave the cache and others take
their place, so it only ever holds rows that are being continued.

On a CPU a step of few rows is bound by reading the weights: `pack` chooses products for that. On a
GPU it is bound by the host, which starts a step's kernels one by one: `Steps` can record them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from layers import nf4
from lora import LoRALinear, adapters
from model import KVCache, Linear, Llama
from runtime.console import FLAGS, UserError
from runtime.distributed import is_cut

Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
AHEAD = 4  # times as many prompts as there are places are put in order of length
BUDGET = 4096  # tokens read at once: their activations are in memory together
REACH = 256  # keys that a recorded step reads, or a multiple
FEW = 8  # rows that a packed matrix is laid out for; any number may come
COLUMNS = 64  # at the most; more rows are multiplied sooner as rows
AMX = torch.cpu._is_amx_tile_supported()


def ragged(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids as tokens, doc (B,T): padded on the right, where doc is -1."""
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    doc = torch.full_like(tokens, -1)
    for i, ids in enumerate(rows):
        tokens[i, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        doc[i, : len(ids)] = 0
    return tokens.to(device), doc.to(device)


def portions(sizes: Sequence[int], budget: int, packed: bool = False) -> Iterator[slice]:
    """Consecutive rows of these lengths, so many at once that padded, or packed end to end, they
    fit; at least one."""
    first, longest, tokens = 0, 0, 0
    for i, size in enumerate(sizes):
        longest, tokens = max(longest, size), tokens + size
        if i > first and (tokens if packed else longest * (i + 1 - first)) > budget:
            yield slice(first, i)
            first, longest, tokens = i, size, size
    if first < len(sizes):
        yield slice(first, len(sizes))


def in_order(lengths: Sequence[int], rows: int) -> list[int]:
    """In which order to begin prompts that are answered `rows` side by side: by length among AHEAD
    times as many, up and down in turn.

    Every row's keys are read as far as the longest row's: neighbours of like lengths waste least.
    No answer waits for more than those begun with it.
    """
    order = []
    for n, first in enumerate(range(0, len(lengths), AHEAD * rows)):
        some = range(first, min(first + AHEAD * rows, len(lengths)))
        order += sorted(some, key=lambda i: lengths[i], reverse=n % 2 == 1)
    return order


def prefill(model: Llama, prompts: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
    """Read a prompt into each row of an empty cache; logits of what follows each, (B,V).

    They are read packed, end to end in one row: nothing is padded.
    """
    logits, device = [], model.device
    sizes = torch.tensor([len(ids) for ids in prompts])
    for some in portions(sizes.tolist(), BUDGET, packed=True):
        part, n = cache.part(some), sizes[some]
        rows = torch.arange(len(n)).repeat_interleave(n)  # (T,)
        pos = torch.cat([torch.arange(x) for x in n.tolist()])
        tokens = torch.tensor([x for ids in prompts[some] for x in ids])
        part.rows = rows.to(device)
        h = model.states(tokens[None].to(device), part.rows[None], pos[None].to(device), part)
        logits.append(model.logits(h[0, (n.cumsum(0) - 1).to(device)]))  # (n,V)
    cache.length = sizes.to(device)
    cache.extent = int(sizes.max())
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


class Steps:
    """`step`; of a model that was hastened on a GPU, recorded for each number of rows, a power of
    two, and each reach of the cache, a multiple of REACH, and played back: the hundreds of kernels
    of a step take the host many times as long to start as the GPU to run.

    Rows beyond those that are asked for compute what nobody reads, in places of the cache that are
    free; keys beyond a row's own are masked.
    """

    def __init__(self, model: Llama, whole: KVCache, record: Record | None = None):
        self.model, self.whole, self.record = model, whole, record
        if record is None and model.recorded:
            self.record = partial(recorded, pool=torch.cuda.graph_pool_handle())
        self.ids, self.pos = torch.zeros(2, whole.k.shape[1], dtype=torch.long, device=model.device)
        self.plays: dict[tuple[int, int], Callable[[], Tensor]] = {}

    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Read one more id (B,) in each row of a cache, the first of `whole`; logits of what
        follows it, (B,V), which stand until the next step."""
        if self.record is None:
            return step(self.model, ids, cache)
        B, (places, size) = len(ids), self.whole.k.shape[1:3]
        rows = min(1 << (B - 1).bit_length(), places)
        reach = min(-(-(cache.extent + 1) // REACH) * REACH, size)
        self.ids[:B], self.pos[:B] = ids, cache.length
        if (rows, reach) not in self.plays:
            part = self.whole.part(slice(0, rows))
            part.reach = reach
            tokens, pos = self.ids[:rows, None], self.pos[:rows, None]  # (rows,1)
            self.plays[rows, reach] = self.record(
                lambda: self.model(tokens, torch.zeros_like(tokens), pos, cache=part))
        cache.length, cache.extent = cache.length + 1, cache.extent + 1
        return self.plays[rows, reach]()[:B]


def recordable(model: Llama) -> bool:
    """Whether a model's steps can be played back: by a GPU that has it whole, and neither asks for
    anything on the way (dynamic frequencies depend on positions) nor is sent it (NF4's tables)."""
    ropes = (model.config.rope, model.config.local_rope)
    return model.device.type == "cuda" and not any(x and x.kind == "dynamic" for x in ropes) \
        and not nf4.found(model) and not any(map(is_cut, model.parameters()))


def recorded(run: Callable[[], Tensor], pool: Any) -> Callable[[], Tensor]:
    """What plays a CUDA graph of run() and gives its result, always in the same memory; of `pool`,
    as that of all graphs which are played one after the other. What run() reads must outlive it."""
    graph = torch.cuda.CUDAGraph()
    capture = torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")
    now, aside = torch.cuda.current_stream(), capture.capture_stream
    aside.wait_stream(now)
    with torch.cuda.stream(aside):  # once as it is: libraries start, and choose
        run()  # in the one queue of all captures: cuBLAS keeps memory for each
    now.wait_stream(aside)
    with capture:
        found = run()

    def play() -> Tensor:
        graph.replay()
        return found

    return play


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


class Packed(nn.Module):
    """y = W x + b where W is only read: in memory as oneDNN's product takes it.

    A matrix as its file holds it is brought into that order anew for every product, which of few
    rows costs more than the product itself.
    """

    def __init__(self, layer: Linear):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), FEW)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (...,in) -> (...,out)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class Few(Linear):
    """y = W x + b for few rows: W x^T in place of x W^T, with W as its file holds it.

    In bf16 with AMX, oneDNN reads a matrix on the left of a product where it lies, and sooner than
    a `Packed` one on the right (bench.generate).
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (...,in) -> (...,out)."""
        rows = x.flatten(0, -2)  # (n,in)
        if len(rows) > COLUMNS:
            return super().forward(x)
        W, b = self.weight, self.bias
        if len(rows) == 1:
            y = torch.mv(W, rows[0]) if b is None else torch.addmv(b, W, rows[0])  # (out,)
        else:
            y = (W @ rows.T if b is None else torch.addmm(b[:, None], W, rows.T)).T  # (n,out)
        return y.reshape(*x.shape[:-1], -1)


def packs(model: Llama) -> bool:
    """Whether there are such products for the model's device and dtype."""
    ops, dtype = torch.ops.mkldnn, model.compute_dtype
    if model.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (ops._is_mkldnn_bf16_supported() if dtype == torch.bfloat16
                                      else ops._is_mkldnn_fp16_supported())


def matrices(model: Llama) -> list[str]:
    """Names of the linear layers that a step reads in the dtype of products; a tied head becomes
    one of them."""
    if model.lm_head is None:
        model.lm_head = Linear(*model.head.shape[::-1], bias=False, device="meta")
        model.lm_head.weight = model.model.embed_tokens.weight
    dora = {m.base_layer for m in model.modules()  # whose matrix is asked for otherwise too
            if isinstance(m, LoRALinear) and m.lora_magnitude_vector is not None}
    return [name for name, m in model.named_modules() if type(m) is Linear
            and m.weight.dtype == model.compute_dtype and m not in dora]


def settle(model: Llama) -> None:
    """Keep an adapter's factors in the dtype of products, or each product of each id would cast
    them; DoRA's stay in float32, for its lengths are made of them."""
    for m in adapters(model).values():
        if m.lora_magnitude_vector is None:
            m.lora_A.to(model.compute_dtype)
            m.lora_B.to(model.compute_dtype)


@torch.no_grad()
def pack(model: Llama, losses: bool = False) -> None:
    """Let a model's matrices be multiplied with few rows as is fastest, where there is a way to. It
    can answer then, and no longer train or be saved; `losses`: the head stays there for them as
    well."""
    settle(model)
    if not packs(model):
        return
    for name in matrices(model):
        layer = model.get_submodule(name)
        if AMX and model.compute_dtype == torch.bfloat16:
            layer.__class__ = Few
            continue
        model.set_submodule(name, Packed(layer))
        if losses and name == "lm_head":
            model.lm_head.weight = layer.weight
    for p in model.parameters():  # the files' pages can go; and a mapped matrix is read slower
        p.data = p.data.clone()


def hasten(model: Llama) -> None:
    """On a GPU, let steps be recorded and played back (`Steps`); UserError where they cannot be."""
    if not recordable(model):
        raise UserError("--compile: on a GPU alone, and not with a base in NF4 nor with `dynamic` "
                        "rotary frequencies; leave it out here", FLAGS)
    settle(model)
    model.recorded = True
