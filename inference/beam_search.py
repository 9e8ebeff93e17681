"""Beam search: the answer that is likeliest as a whole, as far as a few hypotheses can tell.

Each prompt has `beams` rows of the batch, one for each hypothesis that is still growing. A step
ranks every hypothesis with every next token by the sum of log p; the best that end are put by, the
best that do not go on. Which answer wins, and when no better one can come, is decided exactly as in
transformers (`generate(num_beams=...)`, 5.x), so that published recipes give what they gave there:

    score of an answer      sum of log p / (number of its ids, EOS too) ** length_penalty
    may be put by           only what ends among the `beams` best of a step
    a prompt is done        when `beams` answers are put by and the best that grows, scored at its
                            present length, is no better than the worst put by; with early_stopping
                            "true" as soon as so many are put by, with "never" (and a penalty above
                            0) scored at the greatest length it may reach

A prompt's search knows nothing of its neighbours; one that is done gives its rows to the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inference.decode import Steps, in_order, keep_rows, rearrange, refill
from inference.sampling import Sampling, Stops, finite, penalise
from model import KVCache, Llama

NEVER = -1e9  # the score of what is no hypothesis: transformers' own


@dataclass
class Search:
    """The search of one prompt: hypotheses that grow, and answers put by, both best first."""

    index: int
    prompt: list[int]
    scores: list[float]  # of what grows: sums of log p
    growing: list[list[int]]
    answers: list[tuple[float, list[int], str]] = field(default_factory=list)  # score, ids, end

    @classmethod
    def begin(cls, index: int, prompt: list[int], beams: int) -> Search:
        """One hypothesis, the empty one; copies of it would only be found twice."""
        return cls(index, prompt, [0.0] + [NEVER] * (beams - 1), [[] for _ in range(beams)])

    def advance(self, scores: Sequence[float], beams: Sequence[int], tokens: Sequence[int],
                sampling: Sampling, stops: Stops) -> tuple[list[int], bool]:
        """Take a step, from candidates best first: which hypothesis, which token, the sum of log p.

        Returns which old hypothesis each new one has grown from, and whether the search is done.
        """
        n, n_new = sampling.beams, len(self.growing[0]) + 1
        penalty = n_new**sampling.length_penalty
        grown: list[tuple[float, int, list[int]]] = []
        for rank, (score, beam, token) in enumerate(zip(scores, beams, tokens, strict=True)):
            ids = [*self.growing[beam], token]
            end = stops.end(ids, sampling.max_new_tokens)
            if not end and len(grown) < n:
                grown.append((score, beam, ids))
            elif end and rank < n:
                self.answers.append((score / penalty, ids, end))
        self.answers = sorted(self.answers, key=lambda x: -x[0])[:n]
        if not grown:  # nothing can go on: the length is reached, or every candidate has stopped
            return [], True
        grown += [(NEVER, *grown[0][1:])] * (n - len(grown))
        self.scores = [score for score, _, _ in grown]
        self.growing = [ids for _, _, ids in grown]
        full = len(self.answers) == n
        if sampling.early_stopping == "never" and sampling.length_penalty > 0:
            penalty = sampling.max_new_tokens**sampling.length_penalty
        hopeless = full and self.scores[0] / penalty <= self.answers[-1][0]
        done = hopeless or (full and sampling.early_stopping == "true")
        return [beam for _, beam, _ in grown], done


def candidates(logits: Tensor, searches: Sequence[Search], sampling: Sampling,
               kept: int) -> tuple[list, list, list]:
    """The `kept` best (sum of log p, hypothesis, token) of each search, best first: lists (P,kept).

    logits (P * beams, V).
    """
    V = logits.shape[-1]
    logp = penalise(finite(logits).log_softmax(-1), sampling.repetition_penalty,
                    [x.prompt + ids for x in searches for ids in x.growing])
    before = torch.tensor([x.scores for x in searches], device=logits.device)  # (P,beams)
    sums = (logp.view(*before.shape, V) + before[..., None]).flatten(1)  # (P,beams * V)
    best, at = sums.topk(min(kept, sums.shape[1]))
    return best.tolist(), (at // V).tolist(), (at % V).tolist()


def search(model: Llama, prompts: Sequence[list[int]], sampling: Sampling, stops: Stops,
           rows: int) -> Iterator[tuple[int, int, str]]:
    """Answer prompts that fit, so many side by side as `rows` allow, at least one.

    Yields (index of the prompt, id, end), an answer's ids all at once; `end` as in
    generate.stream.
    """
    n = sampling.beams
    kept = n * max(2, 1 + len(stops.ids))  # so that, whatever ends, n go on
    places = max(1, min(rows // n, len(prompts)))
    order = in_order([len(ids) for ids in prompts], places)
    waiting = deque(Search.begin(i, prompts[i], n) for i in order)
    longest = max(map(len, prompts), default=0)
    whole = KVCache(model.config, places * n, longest + sampling.max_new_tokens - 1, model.device,
                    model.compute_dtype)
    live: list[Search] = []  # each stands in n rows of the cache
    steps = Steps(model, whole)
    cache, logits = whole.part(slice(0, 0)), torch.empty(0, model.config.vocab_size,
                                                         device=model.device)
    while live or waiting:
        if fresh := [waiting.popleft() for _ in range(min(places - len(live), len(waiting)))]:
            old = len(live) * n
            cache, more = refill(model, [x.prompt for x in fresh], whole, cache)
            copies = [old + i for i in range(len(fresh)) for _ in range(n)]
            cache = rearrange(whole, cache, [*range(old), *copies])
            live, logits = live + fresh, torch.cat([logits, more.repeat_interleave(n, dim=0)])
        found = zip(live, *candidates(logits, live, sampling, kept), strict=True)
        order: list[int] = []
        keep: list[int] = []
        for place, (x, scores, beams, tokens) in enumerate(found):
            came_from, done = x.advance(scores, beams, tokens, sampling, stops)
            first = place * n
            order += range(first, first + n) if done else [first + beam for beam in came_from]
            if not done:
                keep += range(first, first + n)
                continue
            _, ids, end = x.answers[0]
            for at, token in enumerate(ids, 1):
                yield x.index, token, end if at == len(ids) else ""
        shared = min(len(x.prompt) for x in live)  # the prompts' keys are equal in all their rows
        cache = rearrange(whole, cache, order, shared)
        if len(keep) < len(order):
            cache, order = keep_rows(cache, keep)
            live = [live[row // n] for row in order[::n]]
        if live:
            ids = torch.tensor([ids[-1] for x in live for ids in x.growing], device=model.device)
            logits = steps(ids, cache)
        else:
            logits = logits[:0]
