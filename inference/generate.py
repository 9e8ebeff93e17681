"""Generation and scoring: prompts in; ids, or the likelihood of given ones, out.

**stream** continues prompts. A step adds one token to every row that is being continued; a row that
ends gives its place to the next prompt, so N prompts of any lengths keep all places filled until
they run out. **score** asks how likely given continuations are; a prompt asked about several is
read once.

The one idea: what is computed for a prompt does not depend on its neighbours (sampling.py says how
far), so batches are ours to form as is fastest.

It knows token ids only. Text, and when half a character may be shown, is the business of who calls;
stop strings are looked for in what the caller's `text` makes of ids.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from inference import beam_search as beam
from inference.decode import Steps, in_order, keep_rows, portions, ragged, refill
from inference.sampling import NO_STOPS, Sampling, Stops, choose, own_seeds
from layers.cross_entropy import at_once
from model import KVCache, Llama
from runtime.console import FLAGS, UserError, say

ROWS = 32  # prompts continued side by side: their keys and values are in memory together
SCORED = 1024  # tokens read at once in scoring: more would pad rows of unlike lengths together
COPIED = 4  # times so many keys and values stand in copies at once, behind which few are read
HELD = 16  # times so many at most stand in copies behind which rows are read
SHARED = 16  # tokens that prompts begin with: from so many on they are read once


class Answer(NamedTuple):
    """A finished continuation: its ids, and why it ended (eos, stop or length)."""

    ids: list[int]
    end: str


@dataclass
class Row:
    """A prompt that is being continued."""

    index: int
    prompt: list[int]
    draws: random.Random
    new: list[int] = field(default_factory=list)


def fit(prompt: Sequence[int], room: int, bos: int | None) -> list[int]:
    """The end of a prompt that fits into `room` tokens, behind its BOS; of an empty one, BOS."""
    ids = list(prompt)
    if not ids and bos is None:
        raise UserError("an empty prompt, and the tokenizer has no BOS to begin from; give text")
    if not ids or len(ids) <= room:
        return ids or [bos]
    kept = [bos] if ids[0] == bos and room > 1 else []
    return kept + ids[len(ids) - room + len(kept) :]


def fit_all(model: Llama, prompts: Sequence[Sequence[int]], new: int,
            bos: int | None) -> list[list[int]]:
    """Every prompt so that `new` tokens fit behind it; what is left out is said."""
    context = model.config.max_position_embeddings
    if new >= context:
        raise UserError(f"--max-new-tokens {new}: the model's context of {context} tokens leaves "
                        f"no room for a prompt; at most {context - 1}", FLAGS)
    fitted = [fit(ids, context - new, bos) for ids in prompts]
    cut = [(len(whole) - len(ids), len(whole)) for ids, whole in zip(fitted, prompts, strict=True)
           if len(ids) < len(whole)]
    if cut:
        most, of = max(cut)
        say(f"{len(cut)} of {len(prompts)} prompts: up to {most} of {of} tokens are left out at "
            f"the start; the context of {context} holds {context - new} and {new} new ones")
    return fitted


@torch.inference_mode()
def stream(model: Llama, prompts: Sequence[Sequence[int]], sampling: Sampling,
           stops: Stops = NO_STOPS, bos: int | None = None,
           seeds: Sequence[int | str] | None = None,
           rows: int = ROWS) -> Iterator[tuple[int, int, str]]:
    """Continue every prompt, `rows` side by side; yields (index of the prompt, id, end) as ids
    come.

    `end` is "" until a prompt's last id: then eos (an id of stops, which is yielded too), stop (the
    id completed a stop string) or length (max_new_tokens). A prompt too long for the model's
    context beside them loses its beginning (never its BOS), and that is said. `seeds`: what each
    prompt's random numbers begin from, in place of sampling.own_seeds.
    """
    new = sampling.max_new_tokens
    fitted = fit_all(model, prompts, new, bos)
    if sampling.beams > 1:
        yield from beam.search(model, fitted, sampling, stops, rows)
        return
    draws = map(random.Random, seeds or own_seeds(prompts, sampling.seed))
    asked = list(map(Row, range(len(fitted)), fitted, draws))
    waiting = deque(asked[i] for i in in_order([len(ids) for ids in fitted], rows))
    places = min(rows, len(fitted))
    whole = KVCache(model.config, places, max(map(len, fitted), default=0) + new - 1, model.device,
                    model.compute_dtype)
    live: list[Row] = []  # which prompt stands in each row of the cache
    steps = Steps(model, whole)
    cache, logits = whole.part(slice(0, 0)), torch.empty(0, model.config.vocab_size,
                                                         device=model.device)
    while live or waiting:
        if fresh := [waiting.popleft() for _ in range(min(places - len(live), len(waiting)))]:
            cache, more = refill(model, [row.prompt for row in fresh], whole, cache)
            live, logits = live + fresh, torch.cat([logits, more])
        ids = choose(logits, sampling, [row.draws for row in live],
                     [row.prompt + row.new for row in live])  # (B,)
        keep = []
        for place, (row, token) in enumerate(zip(live, ids.tolist(), strict=True)):
            row.new.append(token)
            end = stops.end(row.new, new)
            if not end:
                keep.append(place)
            yield row.index, token, end
        if len(keep) < len(live):  # else a GPU would be waited for, to find that none has left
            cache, order = keep_rows(cache, keep)
            live, ids = [live[i] for i in order], ids[order]
        logits = steps(ids, cache) if live else logits[:0]


def generate(model: Llama, prompts: Sequence[Sequence[int]], sampling: Sampling,
             eos: Collection[int | None] = (), bos: int | None = None) -> Iterator[tuple[int, int]]:
    """`stream` for who needs only (index of the prompt, id)."""
    for row, token, _ in stream(model, prompts, sampling, Stops(eos), bos):
        yield row, token


def answers(model: Llama, prompts: Sequence[Sequence[int]], sampling: Sampling,
            stops: Stops = NO_STOPS, bos: int | None = None,
            seeds: Sequence[int | str] | None = None, rows: int = ROWS) -> Iterator[Answer]:
    """`stream`'s answers whole, in the prompts' order, each as soon as it and all before it are
    done."""
    new: list[list[int]] = [[] for _ in prompts]
    ends: dict[int, str] = {}
    first = 0  # not given yet
    for row, token, end in stream(model, prompts, sampling, stops, bos, seeds, rows):
        new[row].append(token)
        if end:
            ends[row] = end
        while first in ends:
            yield Answer(new[first], ends[first])
            first += 1


class Request(NamedTuple):
    """A continuation to score, behind the end of its prompt that the context holds."""

    index: int
    context: tuple[int, ...]
    ids: list[int]


Line = tuple[list[int], list[Request]]  # ids that are read, and what is asked of them


@torch.inference_mode()
def score(model: Llama, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]],
          length: int = 0, move: Callable[[int], object] = lambda done: None,
          kept: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """How likely each continuation is behind its prompt: log p in nats, (N,) float64, and whether
    it is what greedy decoding gives, (N,) bool.

    Equal prompts are read once, whatever stands behind them, and so is what all begin with (an
    instruction, examples), and what some begin with (a page that several questions are about).
    `length`: the most tokens read at once, 0: the model's context; a longer prompt loses its
    beginning, BOS too, as in lm-evaluation-harness. log-softmax in float32 over the model's whole
    vocabulary, sums in float64; `kept`: what each log p, and their sum, is rounded to. `move` is
    told how many requests are done, batch by batch. UserError on an empty prompt or continuation,
    and on a continuation longer than `length`.
    """
    length = length or model.config.max_position_embeddings
    groups: dict[tuple[int, ...], list[Request]] = {}
    for i, (prompt, ids) in enumerate(zip(prompts, continuations, strict=True)):
        request = Request(i, _context(i, prompt, ids, length), list(ids))
        groups.setdefault(request.context, []).append(request)
    asked = _Scores(model, len(prompts), kept)
    rows: list[Line] = []  # what is read in the first pass, and what it answers
    for context, group in groups.items():
        if _shares(model, group):
            rows.append((list(context), group))
        else:
            rows += [([*context, *x.ids[:-1]], [x]) for x in group]
    fixed = model.config.rope.kind != "dynamic"  # else a token hangs on how long its text is
    stem = _stem(model, rows) if fixed else None
    P = 0 if stem is None else stem.extent
    alone, trunks = _trunks(rows, P) if fixed else (rows, [])
    alone.sort(key=lambda row: len(row[0]), reverse=True)
    _read(model, alone, stem, [0] * len(alone), [P] * len(alone), asked, move)
    for some in portions([_held(len(ids), P) for ids, _ in trunks], SCORED):
        part = trunks[some]
        cache = _behind(model, stem, [0] * len(part), [P] * len(part),
                        [ids[P:] for ids, _ in part])[1]
        known = [(row, i) for i, (_, branches) in enumerate(part) for row in branches]
        known.sort(key=lambda x: len(x[0][0]) - len(part[x[1]][0]), reverse=True)
        _read(model, [row for row, _ in known], cache, [i for _, i in known],
              [len(part[i][0]) for _, i in known], asked, move)
    return asked.nats.to(kept).double().cpu(), asked.greedy.cpu()


def _read(model: Llama, rows: Sequence[Line], held: KVCache | None, owners: Sequence[int],
          starts: Sequence[int], asked: _Scores, move: Callable[[int], object]) -> None:
    """Read rows, the first `starts` ids of each in row `owners` of the cache, and what they
    answer."""
    sizes = [_held(len(ids), n) for (ids, _), n in zip(rows, starts, strict=True)]
    for some in portions(sizes, SCORED):
        part, begun = rows[some], starts[some]
        later = [(i, x) for i, (_, group) in enumerate(part) for x in group
                 if len(group) > 1 and len(x.ids) > 1]
        h, cache = _behind(model, held, owners[some], begun,
                           [ids[n:] for (ids, _), n in zip(part, begun, strict=True)], bool(later))
        for i, (ids, group) in enumerate(part):
            for x in group:
                at = len(x.context) - 1
                asked.add(h[i, at - begun[i] : len(ids) - begun[i]], x.ids[: len(ids) - at],
                          x.index)
        if later:
            _score_later(model, cache, later, asked)
        asked.answer()
        move(sum(len(group) for _, group in part))


def _held(n: int, start: int) -> int:
    """What n tokens count in a batch of SCORED where the first `start` are a copy."""
    return max(n - start, n // HELD)


def _behind(model: Llama, held: KVCache | None, owners: Sequence[int], starts: Sequence[int],
            rows: Sequence[Sequence[int]], keep: bool = True) -> tuple[Tensor, KVCache | None]:
    """Hidden states (B,T,C) of ids that stand behind the first `starts` of rows `owners` of a
    cache, and a cache of both; None where nothing stood before and it is not to be kept."""
    tokens, doc = ragged(rows, model.device)
    start = torch.tensor(starts, device=model.device)
    pos = start[:, None] + torch.arange(tokens.shape[1], device=model.device)
    if held is None and not keep:
        return model.states(tokens, doc, pos), None
    extent = max(starts)
    cache = KVCache(model.config, len(rows), extent + tokens.shape[1], model.device,
                    model.compute_dtype)
    if held is not None:
        owner = torch.tensor(owners, device=model.device)
        cache.k[:, :, :extent] = held.k[:, owner, :extent]
        cache.v[:, :, :extent] = held.v[:, owner, :extent]
        cache.extent = extent
    return model.states(tokens, doc, pos, cache), cache


def _context(i: int, prompt: Sequence[int], ids: Sequence[int], length: int) -> tuple[int, ...]:
    """The end of a prompt that is read before a continuation; UserError where there is none."""
    if not len(ids):
        raise UserError(f"request {i + 1}: its continuation has no token, so there is nothing to "
                        "score; was it empty, or swallowed by the prompt's last token?")
    if len(ids) > length:
        raise UserError(f"request {i + 1}: a continuation of {len(ids)} tokens; the context holds "
                        f"{length}")
    if not len(prompt):
        raise UserError(f"request {i + 1}: an empty prompt; begin it with BOS or EOS")
    return tuple(map(int, prompt[-(length + 1 - len(ids)) :]))


def _stem(model: Llama, rows: Sequence[Line]) -> KVCache | None:
    """Keys and values of what the prompts of all rows begin with, (L,1,P,K,D), read once; None
    where that is little."""
    if len(rows) < 2:
        return None
    ids = _common(min(ids for ids, _ in rows), max(ids for ids, _ in rows),
                  min(_before(group) for _, group in rows))
    return None if len(ids) < SHARED else _behind(model, None, [0], [0], [ids])[1]


def _trunks(rows: Sequence[Line], P: int) -> tuple[list[Line], list[tuple[list[int], list[Line]]]]:
    """Rows that are read alone, and trunks: what several begin with behind the first P ids, read
    once, and these rows.

    A row joins the one before it in the dictionary's order where they have at least half of a trunk
    in common: questions about one page, examples of one subject.
    """
    alone: list[Line] = []
    trunks: list[tuple[list[int], list[Line]]] = []
    held: list[Line] = []
    trunk: list[int] = []
    for row in [*sorted(rows, key=lambda row: row[0]), None]:
        common = row and held and _common(trunk, row[0], min(len(trunk), _before(row[1])))
        if common and len(common) - P >= max(SHARED, (len(trunk) - P) / 2):
            held.append(row)
            trunk = common
            continue
        if len(held) > 1:
            trunks.append((trunk, held))
        else:
            alone += held
        if row:
            trunk, held = row[0][: _before(row[1])], [row]
    trunks.sort(key=lambda x: len(x[0]), reverse=True)
    return alone, trunks


def _before(group: Sequence[Request]) -> int:
    """How many ids of a row stand before the first that must be read with it, to give logits."""
    return min(len(x.context) for x in group) - 1


def _common(one: list[int], other: list[int], most: int) -> list[int]:
    """What both begin with, at most so many ids."""
    most = min(most, len(one), len(other))
    return one[: next((i for i in range(most) if one[i] != other[i]), most)]


def _shares(model: Llama, group: Sequence[Request]) -> bool:
    """Whether a prompt is read once for several continuations.

    Dynamic rotary turns a token by how long the whole text is: beyond the original context nothing
    can be shared between texts of different lengths.
    """
    rope, longest = model.config.rope, max(len(x.context) + len(x.ids) - 1 for x in group)
    return len(group) > 1 and (rope.kind != "dynamic" or longest <= rope.original)


def _score_later(model: Llama, cache: KVCache, later: Sequence[tuple[int, Request]],
                 asked: _Scores) -> None:
    """Read what follows the first token of continuations, (row of its prompt in the cache, it).

    Each has a copy of its prompt's keys and values, so many at once as fit into a batch.
    """
    later = sorted(later, key=lambda x: (len(x[1].ids), len(x[1].context)))
    for some in portions([len(x.context) + len(x.ids) - 1 for _, x in later], COPIED * SCORED):
        part = later[some]
        h, _ = _behind(model, cache, [i for i, _ in part], [len(x.context) for _, x in part],
                       [x.ids[:-1] for _, x in part])
        for i, (_, x) in enumerate(part):
            asked.add(h[i, : len(x.ids) - 1], x.ids[1:], x.index)


class _Scores:
    """What was asked, (N,): hidden states and the ids behind them come in, a batch at a time."""

    def __init__(self, model: Llama, N: int, kept: torch.dtype):
        self.model, self.kept = model, kept
        self.nats = torch.zeros(N, dtype=torch.float64, device=model.device)
        self.greedy = torch.ones(N, dtype=torch.bool, device=model.device)
        self.asked: list[tuple[Tensor, list[int], int]] = []

    def add(self, h: Tensor, ids: list[int], index: int) -> None:
        """Hidden states (T,C), the T ids that follow them, and which request that is."""
        self.asked.append((h, ids, index))

    def answer(self) -> None:
        """Add up what was asked since the last time."""
        device = self.model.device
        h = torch.cat([h for h, _, _ in self.asked])
        ids = torch.tensor([x for _, ids, _ in self.asked for x in ids], device=device)
        index = torch.tensor([i for _, ids, i in self.asked for _ in ids], device=device)
        self.asked = []
        c = self.model.config  # the head itself may have to be made, in eight bits
        some, *_ = at_once(device.type, c.vocab_size, c.hidden_size)
        for states, follows, owner in zip(*(x.split(some) for x in (h, ids, index)), strict=True):
            logp = self.model.logits(states).log_softmax(-1)  # (T,V)
            asked = logp.gather(1, follows[:, None])[:, 0]  # (T,)
            self.nats.index_add_(0, owner, asked.to(self.kept).double())
            self.greedy[owner[logp.argmax(-1) != follows]] = False
