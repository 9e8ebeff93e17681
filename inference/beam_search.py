"""Beam search: find the answer with the highest total log-probability, among few hypotheses.

Each prompt has `beams` rows of the batch, one for each growing hypothesis. A step ranks every
hypothesis with every next token by the sum of log p. The best candidates that end become answers;
the best that do not end grow on. All rules are those of transformers (`generate(num_beams=...)`,
5.x), so published recipes give the same text here:

    score of an answer      sum of log p / (number of its ids, EOS included) ** length_penalty
    may become an answer    a candidate that ends among the `beams` best of a step
    a prompt is done        when it has `beams` answers and the best growing hypothesis, scored at
                            its present length, is no better than the worst answer. early_stopping
                            "true": as soon as it has `beams` answers. "never" (and a penalty above
                            0): scored at the greatest length that the hypothesis may reach

The searches of different prompts do not influence each other. A prompt that is done gives its rows
to the next one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inference.decode import (
    DecodeStep,
    evict_finished,
    order_by_length,
    prefill_into,
    reorder_cache,
)
from inference.sampling import (
    SamplingParams,
    StoppingCriteria,
    apply_repetition_penalty,
    require_finite,
)

NO_HYPOTHESIS = -1e9  # the score of an empty beam, as in transformers


@dataclass
class BeamSearch:
    """The search of one prompt: growing hypotheses and answers, both sorted, best first."""

    index: int
    prompt: list[int]
    scores: list[float]  # of the growing hypotheses: sums of log p
    growing: list[list[int]]
    answers: list[tuple[float, list[int], str]] = field(default_factory=list)
    """(score, ids, finish reason)."""

    @classmethod
    def start(cls, index: int, prompt: list[int], beams: int) -> BeamSearch:
        """One empty hypothesis; copies of it would only find the same candidates again."""
        scores = [0.0] + [NO_HYPOTHESIS] * (beams - 1)
        return cls(index, prompt, scores, [[] for _ in range(beams)])

    def advance(self, scores: Sequence[float], beams: Sequence[int], tokens: Sequence[int],
                sampling: SamplingParams,
                stopping: StoppingCriteria) -> tuple[list[int], bool]:
        """Take one step. The candidates come best first: sum of log p, hypothesis, token.

        Returns the old hypothesis of each new one, and whether the search is done.
        """
        length = len(self.growing[0]) + 1
        normaliser = length**sampling.length_penalty
        grown: list[tuple[float, int, list[int]]] = []
        for rank, (score, beam, token) in enumerate(zip(scores, beams, tokens, strict=True)):
            ids = [*self.growing[beam], token]
            reason = stopping.finish_reason(ids, sampling.max_new_tokens)
            if not reason and len(grown) < sampling.beams:
                grown.append((score, beam, ids))
            elif reason and rank < sampling.beams:
                self.answers.append((score / normaliser, ids, reason))
        self.answers = sorted(self.answers, key=lambda answer: -answer[0])[: sampling.beams]
        if not grown:  # the maximum length is reached, or every candidate has ended
            return [], True
        grown += [(NO_HYPOTHESIS, *grown[0][1:])] * (sampling.beams - len(grown))
        self.scores = [score for score, _, _ in grown]
        self.growing = [ids for _, _, ids in grown]
        return [beam for _, beam, _ in grown], self._is_done(length, sampling)

    def _is_done(self, length: int, sampling: SamplingParams) -> bool:
        """Whether no better answer is expected; see the table above."""
        if len(self.answers) < sampling.beams:
            return False
        if sampling.early_stopping == "true":
            return True
        if sampling.early_stopping == "never" and sampling.length_penalty > 0:
            length = sampling.max_new_tokens
        return self.scores[0] / length**sampling.length_penalty <= self.answers[-1][0]


def top_candidates(logits: Tensor, searches: Sequence[BeamSearch], sampling: SamplingParams,
                   n: int) -> tuple[list, list, list]:
    """The `n` best candidates of each of P searches, best first: sums of log p, hypotheses and
    tokens, lists (P,n).

    logits (P * beams, V).
    """
    V = logits.shape[-1]
    logp = apply_repetition_penalty(
        require_finite(logits).log_softmax(-1), sampling.repetition_penalty,
        [search.prompt + ids for search in searches for ids in search.growing])
    scores = torch.tensor([search.scores for search in searches], device=logits.device)  # (P,beams)
    sums = (logp.view(*scores.shape, V) + scores[..., None]).flatten(1)  # (P,beams * V)
    best, indices = sums.topk(min(n, sums.shape[1]))
    return best.tolist(), (indices // V).tolist(), (indices % V).tolist()


def beam_search(decode_step: DecodeStep, prompts: Sequence[list[int]], sampling: SamplingParams,
                stopping: StoppingCriteria, rows: int) -> Iterator[tuple[int, int, str]]:
    """Search an answer to each prompt, as many prompts at once as `rows` allow, at least one.

    Every prompt must fit into the context. Yields (index of the prompt, id, finish reason), all ids
    of an answer at once; the reason is "" before the last id, see `generate`.
    """
    model, beams = decode_step.model, sampling.beams
    n_candidates = beams * max(2, 1 + len(stopping.ids))  # enough that `beams` of them grow on
    slots = max(1, min(rows // beams, len(prompts)))
    order = order_by_length([len(ids) for ids in prompts], slots)
    queue = deque(BeamSearch.start(i, prompts[i], beams) for i in order)
    longest = max(map(len, prompts), default=0)
    storage = decode_step.new_cache(slots * beams, longest + sampling.max_new_tokens - 1)
    active: list[BeamSearch] = []  # each has `beams` rows of the cache
    cache = storage.select(slice(0, 0))
    logits = torch.empty(0, model.config.vocab_size, device=model.device)
    while active or queue:
        new = [queue.popleft() for _ in range(min(slots - len(active), len(queue)))]
        if new:
            n_rows = len(active) * beams
            cache, new_logits = prefill_into(model, [x.prompt for x in new], storage, cache)
            copies = [n_rows + i for i in range(len(new)) for _ in range(beams)]
            cache = reorder_cache(storage, cache, [*range(n_rows), *copies])
            logits = torch.cat([logits, new_logits.repeat_interleave(beams, dim=0)])
            active = active + new
        candidates = top_candidates(logits, active, sampling, n_candidates)
        source_rows: list[int] = []
        keep: list[int] = []
        for slot, (search, scores, hypotheses, tokens) in enumerate(
                zip(active, *candidates, strict=True)):
            sources, is_done = search.advance(scores, hypotheses, tokens, sampling, stopping)
            start = slot * beams
            if not is_done:
                source_rows += [start + beam for beam in sources]
                keep += range(start, start + beams)
                continue
            source_rows += range(start, start + beams)
            _, ids, reason = search.answers[0]
            yield from ((search.index, token, "") for token in ids[:-1])
            yield search.index, ids[-1], reason
        shared = min(len(search.prompt) for search in active)  # equal in all rows of a prompt
        cache = reorder_cache(storage, cache, source_rows, shared)
        if len(keep) < len(source_rows):
            cache, order = evict_finished(cache, keep)
            active = [active[row // beams] for row in order[::beams]]
        logits = logits[:0]
        if active:
            ids = [ids[-1] for search in active for ids in search.growing]
            logits = decode_step(torch.tensor(ids, device=model.device), cache, storage)
