"""Generation: prompts in, tokens out as they come.

Prompts of any lengths are read in one pass (prefill), then every step adds one token to every
row that is not finished (decode); keys and values stay in a KVCache. Nothing is padded on the left:
a row's first token stands at position 0, whoever its neighbours are. Finished rows leave the batch.

The one idea: an answer is a function of its prompt and the seed. Every row draws from random
numbers of its own, so neither the other prompts, nor their order, nor a neighbour that stops early
changes it, in float32. (In bf16 products over more rows round otherwise, enough to be seen.)

It knows token ids only. Text, and when half a character may be shown, is the business of who calls.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from log import FLAGS, UserError, say
from model import KVCache, Llama

ROWS = 32  # prompts continued side by side: their keys and values are in memory together


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: temperature 0 is greedy; top_k 0 and top_p 1 leave no token out."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1

    def __post_init__(self) -> None:
        good = {"max-new-tokens": (self.max_new_tokens >= 1, "at least 1"),
                "temperature": (0 <= self.temperature < math.inf, "0 (greedy) or more"),
                "top-k": (self.top_k >= 0, "0 (all) or more"),
                "top-p": (0 < self.top_p <= 1, "above 0, at most 1")}
        for name, (is_good, expected) in good.items():
            if not is_good:
                found = getattr(self, name.replace("-", "_"))
                raise UserError(f"--{name} {found}: out of range, expected {expected}", FLAGS)


def filter_logits(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Logits (B,V) over the temperature, -inf where top-k or top-p leaves a token out.

    Top-p (Holtzman et al. 2020, section 3.1) keeps the smallest set of likeliest tokens that holds
    at least p, of what top-k has left. Equals at the edge of top-k all stay, as in transformers.
    """
    top = logits.amax(-1, keepdim=True)
    logits = (logits - top) / temperature  # the likeliest is 0: a tiny temperature cannot overflow
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]  # (B,1)
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:
        falling, ids = logits.sort(dim=-1, descending=True)
        before = F.pad(falling.softmax(-1).cumsum(-1)[:, :-1], (1, 0))  # held by likelier tokens
        logits = logits.scatter(-1, ids, falling.masked_fill(before >= top_p, -math.inf))
    return logits


def draw(logits: Tensor, u: Tensor) -> Tensor:
    """An id for each row with probability softmax(logits): (B,V), u (B,) uniform in [0, 1) -> (B,).

    The inverse of the distribution function. Summed in float64 its last value exceeds u times
    itself for every float64 u below 1, so a token of probability 0 is never drawn.
    """
    cdf = logits.softmax(-1).double().cumsum(-1)  # (B,V)
    return torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).squeeze(-1)


def choose(logits: Tensor, sampling: Sampling, streams: Sequence[random.Random]) -> Tensor:
    """The next id of each row, (B,V) -> (B,), with one random number from each row's own stream."""
    if not logits.isfinite().all():
        raise UserError("the model's logits are not finite: its weights are damaged, or too large "
                        "for this dtype (try --dtype fp32)")
    if sampling.temperature == 0:
        return logits.argmax(-1)
    u = torch.tensor([s.random() for s in streams], dtype=torch.float64, device=logits.device)
    return draw(filter_logits(logits, sampling.temperature, sampling.top_k, sampling.top_p), u)


def random_streams(prompts: Sequence[Sequence[int]], seed: int) -> list[random.Random]:
    """Random numbers for each prompt: a function of the seed, the prompt, and which copy it is."""
    seen: Counter[tuple[int, ...]] = Counter()
    streams = []
    for ids in (tuple(map(int, ids)) for ids in prompts):
        streams.append(random.Random(f"{seed}/{seen[ids]}/{ids}"))  # a str is hashed whole
        seen[ids] += 1
    return streams


def fit(prompt: Sequence[int], room: int, bos: int | None) -> list[int]:
    """The end of a prompt that fits into `room` tokens, behind its BOS; of an empty one, BOS."""
    ids = list(prompt)
    if not ids and bos is None:
        raise UserError("an empty prompt, and the tokenizer has no BOS to begin from; give text")
    if not ids or len(ids) <= room:
        return ids or [bos]
    kept = [bos] if ids[0] == bos and room > 1 else []
    return kept + ids[len(ids) - room + len(kept) :]


def prefill(model: Llama, prompts: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
    """Read all prompts in one pass; logits of what follows each, (B,V)."""
    B, T = len(prompts), max(map(len, prompts))
    tokens = torch.zeros(B, T, dtype=torch.long)
    doc = torch.full((B, T), -1)
    for i, ids in enumerate(prompts):
        tokens[i, : len(ids)] = torch.tensor(ids)
        doc[i, : len(ids)] = 0
    pos = torch.arange(T).repeat(B, 1)
    return model(*(x.to(model.device) for x in (tokens, doc, pos)), cache=cache)


def decode(model: Llama, ids: Tensor, cache: KVCache) -> Tensor:
    """Read one more id (B,) in each row; logits of what follows it, (B,V)."""
    return model(ids[:, None], torch.zeros_like(ids)[:, None], cache.length[:, None], cache=cache)


def keep_rows(cache: KVCache, keep: Sequence[int]) -> list[int]:
    """Shrink a cache to the rows of `keep`, in place; returns which old row now stands in each row.

    Only rows from the end move, into the gaps: a row is copied at most once for each that finishes.
    """
    n = len(keep)
    order = list(range(n))
    gaps = sorted(set(order) - set(keep))
    moved = [row for row in keep if row >= n]
    for gap, row in zip(gaps, moved, strict=True):
        order[gap] = row
        cache.k[:, gap], cache.v[:, gap] = cache.k[:, row], cache.v[:, row]
    cache.k, cache.v, cache.length = cache.k[:, :n], cache.v[:, :n], cache.length[order]
    cache.extent = int(cache.length.max())  # the longest row may have left
    return order


@torch.inference_mode()
def generate(model: Llama, prompts: Sequence[Sequence[int]], sampling: Sampling,
             eos: Collection[int | None] = (), bos: int | None = None) -> Iterator[tuple[int, int]]:
    """Continue every prompt, ROWS side by side; yields (index of the prompt, id) as ids come.

    A row ends with an id of `eos`, which is yielded too, or after max_new_tokens. A prompt too long
    for the model's context beside them loses its beginning (never its BOS), and that is said.
    """
    context, new = model.config.max_position_embeddings, sampling.max_new_tokens
    if new >= context:
        raise UserError(f"--max-new-tokens {new}: the model's context of {context} tokens leaves "
                        f"no room for a prompt; at most {context - 1}", FLAGS)
    fitted = [fit(ids, context - new, bos) for ids in prompts]
    for i, (ids, whole) in enumerate(zip(fitted, prompts, strict=True)):
        if len(ids) < len(whole):
            say(f"prompt {i + 1}: {len(whole) - len(ids)} of its {len(whole)} tokens are left out "
                f"at the start; the context of {context} holds {context - new} and {new} new ones")
    streams = random_streams(prompts, sampling.seed)
    for at in range(0, len(fitted), ROWS):
        group = slice(at, at + ROWS)
        for row, token in side_by_side(model, fitted[group], sampling, streams[group], eos):
            yield at + row, token


def side_by_side(model: Llama, prompts: Sequence[Sequence[int]], sampling: Sampling,
                 streams: Sequence[random.Random], eos: Collection[int | None],
                 ) -> Iterator[tuple[int, int]]:
    """`generate` for prompts that fit, all in one batch."""
    new = sampling.max_new_tokens
    cache = KVCache(model.config, len(prompts), max(map(len, prompts)) + new - 1, model.device,
                    model.compute_dtype)
    rows = list(range(len(prompts)))  # which prompt stands in each row of the cache
    logits = prefill(model, prompts, cache)
    for step in range(1, new + 1):
        ids = choose(logits, sampling, [streams[i] for i in rows])  # (B,)
        found = ids.tolist()
        yield from zip(rows, found, strict=True)
        keep = [row for row, token in enumerate(found) if token not in eos]
        if not keep or step == new:
            return
        if len(keep) < len(rows):
            order = keep_rows(cache, keep)
            rows, ids = [rows[i] for i in order], ids[order]
        logits = decode(model, ids, cache)
