"""--rows auto: the largest micro-batch that fits into memory."""

from __future__ import annotations

from collections.abc import Callable

import torch

from data import Batch, Loader
from model import Llama
from runtime.console import FLAGS, UserError, info
from runtime.device import (
    GiB,
    is_out_of_memory,
    memory_limit_gb,
    peak_memory_gb,
    reset_peak_memory,
)
from runtime.distributed import Distributed, is_dtensor, local_shard
from training import optimizer as optim
from training.memory_estimate import checkpoint_bytes
from training.objective import Objective
from training.settings import Settings


class MemoryTrial:
    """Runs micro-batches of more and more rows, and checks that the optimizer would still fit."""

    def __init__(self, model: Llama, objective: Objective, ranks: Distributed, optimizer: str,
                 limit_gb: float | None = None,
                 measure: Callable[[torch.device], float] = peak_memory_gb):
        self.model, self.objective, self.ranks = model, objective, ranks
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.trained = list(named.values())
        reserved = sum(optim.bytes_held(n, local_shard(p)[1], optimizer) for n, p in named.items())
        if ranks.device.type == "cpu":  # the copy that a checkpoint writes while training goes on
            reserved += checkpoint_bytes(model, optimizer, ranks.world_size)
            if ranks.ddp is not None:  # DDP's buckets, not yet touched
                reserved += sum(p.nbytes for p in self.trained if not is_dtensor(p))
        limit_gb = limit_gb or memory_limit_gb(ranks.device)
        self.limit = 0.92 * limit_gb - reserved / GiB
        self.measure = measure
        self.peaks = [(0, measure(ranks.device))]  # rows of each trial, and the peak memory in GiB

    def fits(self, rows: int, passes: int, next_batch: Callable[[], Batch]) -> bool:
        """Whether forward and backward passes over so many rows fit, on every rank.

        With two passes the gradients of the first are held during the second. A number of rows is
        not tried if the last two trials predict too much memory, because on a CPU the process would
        be killed. Ranks do not communicate during a trial, so that a rank that runs out of memory
        does not leave the others waiting; FSDP cannot compute without.
        """
        is_too_much = self._predict(rows) > self.limit
        try:
            if not self._any_rank(is_too_much):
                for is_last in (False, True)[-passes:]:
                    self.ranks.set_gradient_sync(is_last and bool(self.ranks.fsdp_modules))
                    batch = next_batch().to(self.ranks.device)
                    self.objective.sums(self.model, batch).sum().backward()
                peak = self.measure(self.ranks.device)
                self.peaks.append((rows, peak))
                is_too_much = peak > self.limit
        except (MemoryError, RuntimeError) as e:
            if not is_out_of_memory(e):
                raise
            is_too_much = True
        for p in self.trained:
            p.grad = None
        return not self._any_rank(is_too_much)

    def _predict(self, rows: int) -> float:
        """The peak memory of so many rows, on a line through the last two trials."""
        if len(self.peaks) == 1:
            return self.peaks[0][1]
        (rows_1, peak_1), (rows_2, peak_2) = self.peaks[-2:]
        return peak_2 + (peak_2 - peak_1) / max(1, rows_2 - rows_1) * (rows - rows_2)

    def _any_rank(self, flag: bool) -> bool:
        return bool(self.ranks.all_reduce_max(int(flag))[0])


def find_rows(s: Settings, model: Llama, objective: Objective, ranks: Distributed,
              make_loader: Callable[[int], Loader]) -> int:
    """The rows per device of --rows auto; 1 if one row on every rank does not divide a step."""
    if not s.tokens_per_step:
        raise UserError("--rows auto: give --tokens-per-step too; the rows must divide it", FLAGS)
    rows_per_rank, remainder = divmod(s.tokens_per_step, s.seq_len * ranks.world_size)
    if remainder:
        return 1  # refused later, with advice
    reset_peak_memory(ranks.device)  # what the preparation of data held is not part of a step
    trial = MemoryTrial(model, objective, ranks, s.optimizer)

    def fits(rows: int) -> bool:
        info(f"--rows auto: trying {rows} x {s.seq_len} tokens")
        return trial.fits(rows, min(2, rows_per_rank // rows), make_loader(rows).next)

    rows = largest_fitting(rows_per_rank, fits)
    reset_peak_memory(ranks.device)  # no step of the run had these peaks
    return rows


def largest_fitting(total: int, fits: Callable[[int], bool]) -> int:
    """The largest divisor of `total` that fits.

    Small ones are tried first, so only the last trial can fail. UserError (FLAGS) if one row does
    not fit.
    """
    largest = 0
    for rows in range(1, total + 1):
        if total % rows:
            continue
        if not fits(rows):
            break
        largest = rows
    if not largest:
        raise UserError("--rows auto: not even one row fits into memory; use --recompute full, "
                        "--tune lora or qlora, or a shorter --seq-len", FLAGS)
    return largest
