"""Choosing the next token (greedy or sampled), and deciding when an answer ends.

Every row draws from a random stream of its own. In float32 an answer therefore depends on its
prompt and its seed only: not on the other prompts, their order, or when they end. In bf16 a product
over another number of rows may round differently.
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

MAX_BEAMS = 1000  # each holds a cache


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 have no effect.

    With more than one beam, the most likely answers are searched (beam_search.py) and nothing is
    sampled.
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
    early_stopping: Literal["false", "true", "never"] = "false"  # see beam_search.py

    def __post_init__(self) -> None:
        bounds = {"max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
                  "temperature": (self.temperature == 0 or 1e-37 <= self.temperature <= 1e6,
                                  "0 (greedy), or 1e-37 to 1e+06"),
                  "top_k": (self.top_k >= 0, "0 (all) or more"),
                  "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
                  "min_p": (0 <= self.min_p <= 1, "0 (all) to 1"),
                  "repetition_penalty": (1e-3 <= self.repetition_penalty <= 1e3,
                                         "0.001 to 1000; 1 has no effect"),
                  "beams": (1 <= self.beams <= MAX_BEAMS, f"1 (no search) to {MAX_BEAMS}"),
                  "length_penalty": (-10 <= self.length_penalty <= 10, "-10 to 10")}
        for name, (is_valid, expected) in bounds.items():
            if not is_valid:
                flag, value = name.replace("_", "-"), getattr(self, name)
                raise UserError(f"--{flag} {value}: out of range, expected {expected}", FLAGS)
        if self.beams > 1 and self.temperature > 0:
            raise UserError(f"--beams {self.beams} cannot be used with --temperature "
                            f"{self.temperature}: a search samples nothing. Use --temperature 0, "
                            "or --beams 1", FLAGS)


@dataclass(frozen=True)
class StoppingCriteria:
    """What ends an answer besides its length: an id of `ids`, or a string in its text.

    `decode` gives the text of some consecutive ids; it is needed only with `strings`.
    """

    ids: Collection[int | None] = ()
    strings: Sequence[str] = ()
    decode: Callable[[Sequence[int]], str] | None = None

    def finish_reason(self, new: Sequence[int], max_new_tokens: int) -> str:
        """Why an answer of these ids is finished: eos, stop or length; "" if it is not.

        Strings are searched in the text of the last ids only. An id holds at least one byte of text
        (control tokens hold none, so some ids are added), hence no string is missed.
        """
        if new[-1] in self.ids:
            return "eos"
        if self.strings:
            window = max(len(string.encode()) for string in self.strings) + 4
            tail = self.decode(new[-window:])
            if any(string in tail for string in self.strings):
                return "stop"
        return "length" if len(new) == max_new_tokens else ""

    def truncate(self, text: str) -> str:
        """Cut a text at the first occurrence of each string, one string after the other, as
        lm-evaluation-harness does."""
        for string in self.strings:
            text = text.split(string, 1)[0]
        return text


NO_STOPPING_CRITERIA = StoppingCriteria()


def apply_repetition_penalty(logits: Tensor, penalty: float,
                             seen: Sequence[Sequence[int]]) -> Tensor:
    """Lower the logits (B,V) of the ids that each row has seen, prompt included: positive logits
    are divided by the penalty, negative logits multiplied.

    Keskar et al. 2019, equation 2; negative logits as in transformers.
    """
    if penalty == 1:
        return logits
    logits = logits.clone()
    for row, row_ids in zip(logits, seen, strict=True):
        ids = torch.tensor(sorted(set(row_ids)), device=row.device)
        row[ids] = torch.where(row[ids] < 0, row[ids] * penalty, row[ids] / penalty)
    return logits


def filter_logits(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0,
                  min_p: float = 0.0) -> Tensor:
    """Logits (B,V) divided by the temperature; -inf for tokens that top-k, top-p or min-p removes.

    Top-p (Holtzman et al. 2020, section 3.1) keeps the smallest set of the most likely tokens whose
    probability is at least p, after top-k. Min-p (Nguyen et al. 2024, section 3) keeps tokens at
    least min_p times as likely as the most likely one. Ties at the edge of top-k are all kept, as
    in transformers.
    """
    largest = logits.amax(-1, keepdim=True)
    logits = (logits - largest) / temperature  # the largest is 0: no temperature can overflow
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[:, -1:]  # (B,1)
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if top_p < 1:
        descending, ids = logits.sort(dim=-1, descending=True)
        preceding = F.pad(descending.softmax(-1).cumsum(-1)[:, :-1], (1, 0))  # of likelier tokens
        descending = descending.masked_fill(preceding >= top_p, -math.inf)
        logits = logits.scatter(-1, ids, descending)
    if min_p > 0:
        logits = logits.masked_fill(logits < math.log(min_p), -math.inf)
    return logits


def sample_from_logits(logits: Tensor, u: Tensor) -> Tensor:
    """Sample an id for each row with probability softmax(logits): (B,V), u (B,) uniform in [0, 1)
    -> (B,).

    Inverts the cumulative distribution. Its last value, a sum in float64, exceeds u times itself
    for every float64 u below 1, so a token of probability 0 is never sampled.
    """
    cdf = logits.softmax(-1).double().cumsum(-1)  # (B,V)
    return torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).squeeze(-1)


def require_finite(logits: Tensor) -> Tensor:
    """The logits unchanged; UserError if one of them is not finite."""
    if not logits.isfinite().all():
        raise UserError("the model's logits are not finite: its weights are damaged, or too large "
                        "for this dtype. Use --dtype fp32")
    return logits


def next_tokens(logits: Tensor, sampling: SamplingParams, generators: Sequence[random.Random],
                seen: Sequence[Sequence[int]]) -> Tensor:
    """The next id of each row, (B,V) -> (B,), with one random number from each row's generator."""
    logits = apply_repetition_penalty(require_finite(logits), sampling.repetition_penalty, seen)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    u = torch.tensor([generator.random() for generator in generators], dtype=torch.float64,
                     device=logits.device)
    logits = filter_logits(logits, sampling.temperature, sampling.top_k, sampling.top_p,
                           sampling.min_p)
    return sample_from_logits(logits, u)


def per_prompt_seeds(prompts: Sequence[Sequence[int]], seed: int) -> list[str]:
    """A seed for each prompt: a function of `seed`, the prompt, and how many equal prompts precede
    it."""
    copies: Counter[tuple[int, ...]] = Counter()
    seeds = []
    for prompt in prompts:
        ids = tuple(map(int, prompt))
        seeds.append(f"{seed}/{copies[ids]}/{ids}")  # random.Random hashes a str as a whole
        copies[ids] += 1
    return seeds
