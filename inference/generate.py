"""Generation with continuous batching: prompts in, ids out as they are generated.

A step adds one token to every active row. A row that ends gives its slot to the next prompt of the
queue, so all slots stay in use until the queue is empty. What is computed for a prompt does not
depend on its neighbours (sampling.py says how far), so batches can be formed as is fastest.

This module knows token ids only. detokenizer.py makes text of them.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from inference.beam_search import beam_search
from inference.decode import DecodeStep, evict_finished, order_by_length, prefill_into
from inference.sampling import (
    NO_STOPPING_CRITERIA,
    SamplingParams,
    StoppingCriteria,
    next_tokens,
    per_prompt_seeds,
)
from model import Llama
from runtime.console import FLAGS, UserError, info

ROWS = 32  # prompts continued at once: their keys and values are in memory together


class Completion(NamedTuple):
    """A finished continuation: its ids, and why it ended (eos, stop or length)."""

    ids: list[int]
    finish_reason: str


@dataclass
class ActivePrompt:
    """A prompt that is being continued."""

    index: int
    prompt: list[int]
    generator: random.Random
    new: list[int] = field(default_factory=list)


def truncate_prompt(prompt: Sequence[int], max_tokens: int, bos: int | None) -> list[int]:
    """The last `max_tokens` ids of a prompt, BOS kept; of an empty prompt, BOS."""
    ids = list(prompt)
    if not ids and bos is None:
        raise UserError("the prompt is empty, and the tokenizer has no BOS to start from. Give "
                        "some text")
    if not ids:
        return [bos]
    if len(ids) <= max_tokens:
        return ids
    start = [bos] if ids[0] == bos and max_tokens > 1 else []
    return start + ids[len(ids) - max_tokens + len(start) :]


def truncate_prompts(model: Llama, prompts: Sequence[Sequence[int]], new: int,
                     bos: int | None) -> list[list[int]]:
    """Every prompt cut so that `new` tokens fit behind it; a message says what is left out."""
    context = model.config.max_position_embeddings
    if new >= context:
        raise UserError(f"--max-new-tokens {new}: the model's context of {context} tokens leaves "
                        f"no room for a prompt; at most {context - 1}", FLAGS)
    truncated = [truncate_prompt(ids, context - new, bos) for ids in prompts]
    losses = [(len(prompt) - len(ids), len(prompt))
              for ids, prompt in zip(truncated, prompts, strict=True) if len(ids) < len(prompt)]
    if losses:
        lost, length = max(losses)
        info(f"{len(losses)} of {len(prompts)} prompts: up to {lost} of {length} tokens are left "
            f"out at the start; the context of {context} holds {context - new} and {new} new ones")
    return truncated


@torch.inference_mode()
def generate(model: Llama, prompts: Sequence[Sequence[int]], sampling: SamplingParams,
             stopping: StoppingCriteria = NO_STOPPING_CRITERIA, bos: int | None = None,
             seeds: Sequence[int | str] | None = None, rows: int = ROWS,
             decode_step: DecodeStep | None = None) -> Iterator[tuple[int, int, str]]:
    """Continue every prompt, `rows` at once; yields (index of the prompt, id, finish reason) as
    ids are generated.

    The reason is "" before a prompt's last id, then eos (an id of `stopping`, which is yielded
    too), stop (the id completed a stop string) or length (max_new_tokens). A prompt too long for
    the model's context loses its beginning, except BOS, and a message says so. `seeds` replaces the
    prompts' seeds of sampling.per_prompt_seeds, `decode_step` the plain step.
    """
    decode_step = decode_step or DecodeStep(model)
    max_new = sampling.max_new_tokens
    truncated = truncate_prompts(model, prompts, max_new, bos)
    if sampling.beams > 1:
        yield from beam_search(decode_step, truncated, sampling, stopping, rows)
        return
    generators = map(random.Random, seeds or per_prompt_seeds(prompts, sampling.seed))
    requests = list(map(ActivePrompt, range(len(truncated)), truncated, generators))
    queue = deque(requests[i] for i in order_by_length([len(ids) for ids in truncated], rows))
    slots = min(rows, len(truncated))
    storage = decode_step.new_cache(slots, max(map(len, truncated), default=0) + max_new - 1)
    active: list[ActivePrompt] = []  # the prompt in each row of the cache
    cache = storage.select(slice(0, 0))
    logits = torch.empty(0, model.config.vocab_size, device=model.device)
    while active or queue:
        new = [queue.popleft() for _ in range(min(slots - len(active), len(queue)))]
        if new:
            cache, new_logits = prefill_into(model, [x.prompt for x in new], storage, cache)
            active, logits = active + new, torch.cat([logits, new_logits])
        ids = next_tokens(logits, sampling, [x.generator for x in active],
                          [x.prompt + x.new for x in active])  # (B,)
        keep = []
        for slot, (request, token) in enumerate(zip(active, ids.tolist(), strict=True)):
            request.new.append(token)
            reason = stopping.finish_reason(request.new, max_new)
            if not reason:
                keep.append(slot)
            yield request.index, token, reason
        if len(keep) < len(active):  # evicting asks the device, which makes a GPU's host wait
            cache, order = evict_finished(cache, keep)
            active, ids = [active[i] for i in order], ids[order]
        logits = decode_step(ids, cache, storage) if active else logits[:0]


def completions(model: Llama, prompts: Sequence[Sequence[int]], sampling: SamplingParams,
                stopping: StoppingCriteria = NO_STOPPING_CRITERIA, bos: int | None = None,
                seeds: Sequence[int | str] | None = None, rows: int = ROWS,
                decode_step: DecodeStep | None = None) -> Iterator[Completion]:
    """The finished continuations of `generate` in the order of the prompts, each as soon as it and
    all before it are done."""
    new: list[list[int]] = [[] for _ in prompts]
    reasons: dict[int, str] = {}
    n_yielded = 0
    for index, token, reason in generate(model, prompts, sampling, stopping, bos, seeds, rows,
                                         decode_step):
        new[index].append(token)
        if reason:
            reasons[index] = reason
        while n_yielded in reasons:
            yield Completion(new[n_yielded], reasons[n_yielded])
            n_yielded += 1
