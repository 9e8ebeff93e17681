"""Choosing the next token: greedy, or drawn from what the filters leave; and when it is the last.

The one idea: an answer is a function of its prompt and its seed. Every row draws from random
numbers of its own, so neither the other prompts, nor their order, nor a neighbour that stops early
changes it, in float32. (In bf16 products over more rows round otherwise, enough to be seen.)
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.console import FLAGS, UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: temperature 0 is greedy; top_k 0, top_p 1, min_p 0 leave none out.

    Above one beam the likeliest whole answers are sought (beam.py), and nothing is drawn.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: Literal["false", "true", "never"] = "false"  # see beam.py

    def __post_init__(self) -> None:
        good = {"max-new-tokens": (self.max_new_tokens >= 1, "at least 1"),
                "temperature": (0 <= self.temperature < math.inf, "0 (greedy) or more"),
                "top-k": (self.top_k >= 0, "0 (all) or more"),
                "top-p": (0 < self.top_p <= 1, "above 0, at most 1"),
                "min-p": (0 <= self.min_p <= 1, "0 (all) to 1"),
                "repetition-penalty": (0 < self.repetition_penalty < math.inf,
                                       "above 0; 1 changes nothing"),
                "beams": (self.beams >= 1, "1 (no search) or more"),
                "length-penalty": (math.isfinite(self.length_penalty), "a number")}
        for name, (is_good, expected) in good.items():
            if not is_good:
                found = getattr(self, name.replace("-", "_"))
                raise UserError(f"--{name} {found}: out of range, expected {expected}", FLAGS)
        if self.beams > 1 and self.temperature > 0:
            raise UserError(f"--beams {self.beams} searches, --temperature {self.temperature} "
                            "draws; give one of them (temperature 0 with beams)", FLAGS)


@dataclass(frozen=True)
class Stops:
    """What ends an answer besides its length: an id of `ids`, or a string in its text."""

    ids: Collection[int | None] = ()
    strings: Sequence[str] = ()
    text: Callable[[Sequence[int]], str] | None = None

    def end(self, new: Sequence[int], most: int) -> str:
        """Why an answer of these ids is over: eos, stop or length; "" while it is not.

        A string is looked for in the text of the last ids alone, which may be many for one
        character but never hold less than a byte each (control tokens apart, hence some more).
        """
        if new[-1] in self.ids:
            return "eos"
        if self.strings:
            reach = max(len(x.encode()) for x in self.strings) + 4
            tail = self.text(new[-reach:])
            if any(x in tail for x in self.strings):
                return "stop"
        return "length" if len(new) == most else ""

    def cut(self, text: str) -> str:
        """A text up to the first of each string, one after the other, as lm-evaluation-harness
        cuts."""
        for x in self.strings:
            text = text.split(x, 1)[0]
        return text


NO_STOPS = Stops()


def penalise(logits: Tensor, penalty: float, seen: Sequence[Sequence[int]]) -> Tensor:
    """Logits (B,V) lower for the ids that each row has seen: over the penalty where positive, times
    it where negative.

    Keskar et al. 2019, equation 2; negative logits as in transformers. `seen` counts the prompt.
    """
    if penalty == 1:
        return logits
    logits = logits.clone()
    for row, ids in zip(logits, seen, strict=True):
        ids = torch.tensor(sorted(set(ids)), device=row.device)
        row[ids] = torch.where(row[ids] < 0, row[ids] * penalty, row[ids] / penalty)
    return logits


def filter_logits(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0,
                  min_p: float = 0.0) -> Tensor:
    """Logits (B,V) over the temperature, -inf where top-k, top-p or min-p leaves a token out.

    Top-p (Holtzman et al. 2020, section 3.1) keeps the smallest set of likeliest tokens that holds
    at least p, of what top-k has left. Min-p (Nguyen et al. 2024, section 3) keeps those at least
    min_p times as likely as the likeliest. Equals at the edge of top-k all stay, as in
    transformers.
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
    if min_p > 0:
        logits = logits.masked_fill(logits < math.log(min_p), -math.inf)
    return logits


def draw(logits: Tensor, u: Tensor) -> Tensor:
    """An id for each row with probability softmax(logits): (B,V), u (B,) uniform in [0, 1) -> (B,).

    The inverse of the distribution function. Summed in float64 its last value exceeds u times
    itself for every float64 u below 1, so a token of probability 0 is never drawn.
    """
    cdf = logits.softmax(-1).double().cumsum(-1)  # (B,V)
    return torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).squeeze(-1)


def finite(logits: Tensor) -> Tensor:
    """Logits as they are; UserError if one is no number."""
    if not logits.isfinite().all():
        raise UserError("the model's logits are not finite: its weights are damaged, or too large "
                        "for this dtype (try --dtype fp32)")
    return logits


def choose(logits: Tensor, sampling: Sampling, streams: Sequence[random.Random],
           seen: Sequence[Sequence[int]]) -> Tensor:
    """The next id of each row, (B,V) -> (B,), with one random number from each row's own stream."""
    logits = penalise(finite(logits), sampling.repetition_penalty, seen)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    u = torch.tensor([s.random() for s in streams], dtype=torch.float64, device=logits.device)
    return draw(filter_logits(logits, sampling.temperature, sampling.top_k, sampling.top_p,
                              sampling.min_p), u)


def own_seeds(prompts: Sequence[Sequence[int]], seed: int) -> list[str]:
    """A seed for each prompt: a function of the seed, the prompt, and which copy of it it is."""
    seen: Counter[tuple[int, ...]] = Counter()
    seeds = []
    for ids in (tuple(map(int, ids)) for ids in prompts):
        seeds.append(f"{seed}/{seen[ids]}/{ids}")  # random.Random hashes a str whole
        seen[ids] += 1
    return seeds
