"""What each mode minimises: the NLL of the trained tokens, or a preference loss over pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from data import Batch
from model import Llama
from training import preference
from training.settings import BIN_KINDS, Settings


@dataclass(frozen=True)
class Objective:
    """Sums over a batch, each with the number of terms in it.

    The loss is the total of every sum divided by its count. The last sums are not minimised; they
    are only `reported`, by name.
    """

    sums: Callable[[Llama, Batch], Tensor]  # -> (), or (k,) for k sums
    count: Callable[[Batch], int | list[int]]
    reported: tuple[str, ...] = ()


def trained_tokens(batch: Batch) -> int:
    """The number of tokens in a batch that have a target."""
    return batch.n_trained


NLL = Objective(
    lambda model, batch: model(**batch.inputs(), reduction="sum"), trained_tokens)


def objective_of(settings: Settings) -> Objective:
    """The objective of a run's mode."""
    if BIN_KINDS[settings.mode] != "pairs":
        return NLL
    return Objective(lambda model, b: preference.loss_sums(model, b, settings),
                     lambda b: preference.loss_counts(b, settings), preference.REPORTED)
