"""Log-likelihood of given continuations of prompts, as multiple-choice evaluation needs it.

Text that several requests share is read once, at three levels: what all prompts begin with (an
instruction, few-shot examples), what a group of prompts begins with (a passage with several
questions), and equal prompts (one for each choice). The results equal those of reading each request
alone, because attention is causal and keys and values are cached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from inference.decode import batches_within, pad_right
from layers.cross_entropy import chunk_sizes
from model import KVCache, Llama
from runtime.console import UserError


@dataclass(frozen=True)
class ScoringLimits:
    """Sizes of batches; they change speed and memory only."""

    tokens: int = 1024  # read in one pass: with more, rows of different lengths would be padded
    choice_copies: int = 4  # copies of prompts before choices: at most this many times `tokens`
    prefix_copies: int = 16  # copies of prefixes before prompts: at most this many times `tokens`
    min_shared: int = 16  # tokens: shorter prefixes are not worth sharing

    def cost(self, length: int, start: int) -> int:
        """What a row of `length` tokens counts in a batch if its first `start` are copied."""
        return max(length - start, length // self.prefix_copies)


DEFAULT_LIMITS = ScoringLimits()


class Request(NamedTuple):
    """One continuation to score, and the end of its prompt that fits into the context."""

    index: int
    context: tuple[int, ...]
    ids: list[int]


class Row(NamedTuple):
    """Ids to read, and the requests that they answer."""

    ids: list[int]
    requests: list[Request]

    @property
    def n_shareable(self) -> int:
        """How many ids precede the first one whose logits are needed."""
        return min(len(request.context) for request in self.requests) - 1


class PrefixGroup(NamedTuple):
    """Rows that begin with the same ids."""

    prefix: list[int]
    rows: list[Row]


@torch.inference_mode()
def score(model: Llama, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]],
          max_length: int = 0, progress: Callable[[int], object] = lambda done: None,
          logprob_dtype: torch.dtype = torch.float64,
          limits: ScoringLimits = DEFAULT_LIMITS) -> tuple[Tensor, Tensor]:
    """Score each continuation of its prompt: log p in nats, (N,) float64, and whether greedy
    decoding gives it, (N,) bool.

    `max_length`: the most tokens read at once, 0: the model's context. A longer prompt loses its
    beginning, BOS included, as in lm-evaluation-harness. log-softmax is computed in float32 over
    the whole vocabulary, sums in float64; each log p, and each sum, is rounded to `logprob_dtype`.
    `progress` is called with the number of requests that each batch has answered. UserError on an
    empty prompt or continuation, and on a continuation longer than `max_length`.
    """
    max_length = max_length or model.config.max_position_embeddings
    requests = [make_request(i, prompt, ids, max_length)
                for i, (prompt, ids) in enumerate(zip(prompts, continuations, strict=True))]
    rows = group_equal_prompts(model, requests)
    scorer = _Scorer(model, len(prompts), logprob_dtype, limits, progress)
    prefix, single, groups = None, rows, []
    if model.config.rope.kind != "dynamic":  # there, keys depend on the length of the whole text
        prefix = scorer.read_shared_prefix(rows)
        single, groups = prefix_groups(rows, _length(prefix), limits.min_shared)
    scorer.read_rows(single, prefix)
    scorer.read_groups(groups, prefix)
    return scorer.logp.to(logprob_dtype).double().cpu(), scorer.greedy.cpu()


def make_request(index: int, prompt: Sequence[int], ids: Sequence[int],
                 max_length: int) -> Request:
    """A request whose prompt is cut to what fits before its continuation; UserError on empty or
    too long ones."""
    if not len(ids):
        raise UserError(f"request {index + 1}: its continuation has no token, so there is nothing "
                        "to score. Was it empty, or merged into the prompt's last token?")
    if len(ids) > max_length:
        raise UserError(f"request {index + 1}: a continuation of {len(ids)} tokens; the context "
                        f"holds {max_length}")
    if not len(prompt):
        raise UserError(f"request {index + 1}: an empty prompt. Begin it with BOS or EOS")
    context = tuple(map(int, prompt[-(max_length + 1 - len(ids)) :]))
    return Request(index, context, list(ids))


def group_equal_prompts(model: Llama, requests: Sequence[Request]) -> list[Row]:
    """Rows to read: a prompt that has several continuations is read once, without them; a prompt
    that has one continuation is read with it."""
    by_context: dict[tuple[int, ...], list[Request]] = {}
    for request in requests:
        by_context.setdefault(request.context, []).append(request)
    rows = []
    for context, group in by_context.items():
        if _can_share_prompt(model, group):
            rows.append(Row(list(context), group))
        else:
            rows += [Row([*context, *request.ids[:-1]], [request]) for request in group]
    return rows


def _can_share_prompt(model: Llama, group: Sequence[Request]) -> bool:
    """Whether a prompt is read once for several continuations.

    Dynamic rotary frequencies depend on the length of the whole text beyond the original context:
    there, texts of different lengths share no keys.
    """
    rope = model.config.rope
    longest = max(len(request.context) + len(request.ids) - 1 for request in group)
    return len(group) > 1 and (rope.kind != "dynamic" or longest <= rope.original)


def common_prefix(a: list[int], b: list[int], max_length: int) -> list[int]:
    """The ids that both lists begin with, at most `max_length`."""
    max_length = min(max_length, len(a), len(b))
    for i in range(max_length):
        if a[i] != b[i]:
            return a[:i]
    return a[:max_length]


def prefix_groups(rows: Sequence[Row], start: int,
                  min_shared: int) -> tuple[list[Row], list[PrefixGroup]]:
    """Rows to read alone, and groups of rows that share a prefix beyond the first `start` ids.

    In sorted order, a row joins the group of the row before it if they share at least half of the
    group's prefix: questions about one passage, examples of one subject.
    """
    single: list[Row] = []
    groups: list[PrefixGroup] = []

    def close(group: PrefixGroup) -> None:
        if len(group.rows) > 1:
            groups.append(group)
        else:
            single.extend(group.rows)

    group = PrefixGroup([], [])
    for row in sorted(rows, key=lambda row: row.ids):
        limit = min(len(group.prefix), row.n_shareable)
        shared = common_prefix(group.prefix, row.ids, limit)
        needed = max(min_shared, (len(group.prefix) - start) / 2)
        if group.rows and len(shared) - start >= needed:
            group.rows.append(row)
            group = PrefixGroup(shared, group.rows)
        else:
            close(group)
            group = PrefixGroup(row.ids[: row.n_shareable], [row])
    close(group)
    groups.sort(key=lambda group: len(group.prefix), reverse=True)
    return single, groups


def forward_with_prefix(model: Llama, prefix: KVCache | None, owners: Sequence[int],
                        starts: Sequence[int], rows: Sequence[Sequence[int]],
                        keep_cache: bool = True) -> tuple[Tensor, KVCache | None]:
    """Hidden states (B,T,C) of rows of ids that follow the first `starts` tokens in rows `owners`
    of `prefix`, and a cache of both.

    Without a prefix and `keep_cache` no cache is made, and None is returned.
    """
    tokens, doc = pad_right(rows, model.device)
    start = torch.tensor(starts, device=model.device)
    pos = start[:, None] + torch.arange(tokens.shape[1], device=model.device)
    if prefix is None and not keep_cache:
        return model.states(tokens, doc, pos), None
    n = max(starts)
    cache = KVCache(model.config, len(rows), n + tokens.shape[1], model.device,
                    model.compute_dtype)
    if prefix is not None:
        owner = torch.tensor(owners, device=model.device)
        cache.k[:, :, :n] = prefix.k[:, owner, :n]
        cache.v[:, :, :n] = prefix.v[:, owner, :n]
        cache.set_lengths(start, n)
    return model.states(tokens, doc, pos, cache), cache


def _length(prefix: KVCache | None) -> int:
    return 0 if prefix is None else prefix.cache_len


class _Scorer:
    """Reads rows in batches and adds up the log-probabilities of N requests."""

    def __init__(self, model: Llama, N: int, logprob_dtype: torch.dtype, limits: ScoringLimits,
                 progress: Callable[[int], object]):
        self.model, self.logprob_dtype = model, logprob_dtype
        self.limits, self.progress = limits, progress
        self.logp = torch.zeros(N, dtype=torch.float64, device=model.device)
        self.greedy = torch.ones(N, dtype=torch.bool, device=model.device)
        self.pending: list[tuple[Tensor, list[int], int]] = []  # hidden states, next ids, request

    def read_shared_prefix(self, rows: Sequence[Row]) -> KVCache | None:
        """Read what all rows begin with, one cache row; None if that is too short."""
        if len(rows) < 2:
            return None
        ids = common_prefix(min(row.ids for row in rows), max(row.ids for row in rows),
                            min(row.n_shareable for row in rows))
        if len(ids) < self.limits.min_shared:
            return None
        return forward_with_prefix(self.model, None, [0], [0], [ids])[1]

    def read_rows(self, rows: list[Row], prefix: KVCache | None) -> None:
        """Read rows that share at most the prefix of all."""
        rows = sorted(rows, key=lambda row: len(row.ids), reverse=True)
        self._read(rows, prefix, [0] * len(rows), [_length(prefix)] * len(rows))

    def read_groups(self, groups: list[PrefixGroup], prefix: KVCache | None) -> None:
        """Read the prefixes of some groups, then their rows; then the next groups."""
        P = _length(prefix)
        costs = [self.limits.cost(len(group.prefix), P) for group in groups]
        for batch in batches_within(costs, self.limits.tokens):
            members = groups[batch]
            n = len(members)
            _, cache = forward_with_prefix(self.model, prefix, [0] * n, [P] * n,
                                           [group.prefix[P:] for group in members])
            rows = [(row, i) for i, group in enumerate(members) for row in group.rows]
            rows.sort(key=lambda x: len(x[0].ids) - len(members[x[1]].prefix), reverse=True)
            self._read([row for row, _ in rows], cache, [i for _, i in rows],
                       [len(members[i].prefix) for _, i in rows])

    def _read(self, rows: Sequence[Row], prefix: KVCache | None, owners: Sequence[int],
              starts: Sequence[int]) -> None:
        """Read rows whose first `starts` ids are in rows `owners` of `prefix`; score their
        requests."""
        costs = [self.limits.cost(len(row.ids), n) for row, n in zip(rows, starts, strict=True)]
        for batch in batches_within(costs, self.limits.tokens):
            members, begins = rows[batch], starts[batch]
            # equal prompts: the first id of a continuation is scored now, later ids afterwards
            later = [(i, request) for i, row in enumerate(members) for request in row.requests
                     if len(row.requests) > 1 and len(request.ids) > 1]
            h, cache = forward_with_prefix(
                self.model, prefix, owners[batch], begins,
                [row.ids[n:] for row, n in zip(members, begins, strict=True)], bool(later))
            for i, (row, start) in enumerate(zip(members, begins, strict=True)):
                for request in row.requests:
                    last = len(request.context) - 1
                    self._add(h[i, last - start : len(row.ids) - start],
                              request.ids[: len(row.ids) - last], request.index)
            if later:
                self._read_choices(cache, later)
            self._score_pending()
            self.progress(sum(len(row.requests) for row in members))

    def _read_choices(self, cache: KVCache, choices: Sequence[tuple[int, Request]]) -> None:
        """Read what follows the first id of continuations; each has (the row of its prompt in the
        cache, the request).

        Each gets a copy of its prompt's keys and values, as many at once as the limits allow.
        """
        choices = sorted(choices, key=lambda x: (len(x[1].ids), len(x[1].context)))
        lengths = [len(request.context) + len(request.ids) - 1 for _, request in choices]
        for batch in batches_within(lengths, self.limits.choice_copies * self.limits.tokens):
            members = choices[batch]
            h, _ = forward_with_prefix(self.model, cache, [row for row, _ in members],
                                       [len(request.context) for _, request in members],
                                       [request.ids[:-1] for _, request in members])
            for i, (_, request) in enumerate(members):
                self._add(h[i, : len(request.ids) - 1], request.ids[1:], request.index)

    def _add(self, h: Tensor, ids: list[int], index: int) -> None:
        """Remember hidden states (T,C), the T ids that follow them, and their request."""
        self.pending.append((h, ids, index))

    def _score_pending(self) -> None:
        """Add the log-probabilities of all remembered ids to their requests."""
        device = self.model.device
        h = torch.cat([h for h, _, _ in self.pending])
        ids = torch.tensor([token for _, ids, _ in self.pending for token in ids], device=device)
        index = torch.tensor([i for _, ids, i in self.pending for _ in ids], device=device)
        self.pending = []
        config = self.model.config
        n_logits = chunk_sizes(device.type, config.vocab_size, config.hidden_size).logits
        for states, targets, owner in zip(*(x.split(n_logits) for x in (h, ids, index)),
                                          strict=True):
            logp = self.model.logits(states).log_softmax(-1)  # (T,V)
            target_logp = logp.gather(1, targets[:, None])[:, 0]  # (T,)
            self.logp.index_add_(0, owner, target_logp.to(self.logprob_dtype).double())
            self.greedy[owner[logp.argmax(-1) != targets]] = False
