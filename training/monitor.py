"""What goes wrong in a run, and with which documents: steps that are not finite, losses that jump,
memory that ends, ranks that are lost.

One idea: the order of data is a function of the seed and the step, so nothing need be remembered
of a step until it turns out odd; then its documents are looked up and named in odd_steps.jsonl.
"""

from __future__ import annotations

import copy
import errno
import os
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from data import Batch, Loader, Stream, Whole
from model import Llama
from runtime import console
from runtime.console import BAD_INPUT, FLAGS, REFUSALS, STORAGE, UserError
from runtime.device import GiB, is_out_of_memory, memory_limit_gb, peak_memory_gb
from runtime.distributed import Distributed, is_dtensor, local_shard
from training import optimizer as optim
from training.objective import Objective
from training.settings import Settings

LOSSES, SPIKE = 50, 6.0  # a loss that many deviations above the mean of the last so many is a spike
LOST = ("closed by peer", "reset by peer", "timed out", "timeout", "connection refused",
        "remote process exited", "broken pipe", "socket error")


class NotFinite(FloatingPointError):
    """A step's loss or gradient is NaN or infinite; nothing was moved.

    `batches`: this rank's micro-batches whose own loss is so. `narrow`: only the range of fp16 was
    left, and the loss's scale has given way.
    """

    def __init__(self, message: str, batches: Sequence[int], narrow: bool):
        super().__init__(message)
        self.batches, self.narrow = list(batches), narrow


@dataclass
class Past:
    """What a watch remembers of the steps so far; it goes with a resume point."""

    losses: deque[float] = field(default_factory=lambda: deque(maxlen=LOSSES))
    failures: int = 0  # steps in a row that were not finite


class Watch:
    """Looks at every step's outcome; all ranks see the same and do the same."""

    def __init__(self, out: Path, loader: Loader, ranks: Distributed, step: int, past: Past):
        self.loader, self.ranks, self.past = loader, ranks, past
        self.path, self.step = out / "odd_steps.jsonl", step
        # only a run that was odd has the file
        self.file = console.Metrics(self.path, step) if self.path.exists() else None

    def bad(self, step: int, fault: NotFinite, served: Sequence[int], rows: int) -> bool:
        """A step that was skipped, its `rows` rows those after `served`; whether it is the third in
        a row."""
        said = self.ranks.all_gather_text(" ".join(map(str, fault.batches)))
        each = self.loader.rows  # a rank's rows in a micro-batch
        mine = [(int(batch) * self.ranks.world_size + rank) * each + i
                for rank, x in enumerate(said) for batch in x.split() for i in range(each)]
        self._write(step, "not finite", str(fault), served, sorted(mine) or range(rows))
        console.info(f"step {step}: {fault}")
        self.past.failures += not fault.narrow
        return self.past.failures >= 3

    def good(self, step: int, loss: float, served: Sequence[int], rows: int) -> None:
        """A step that was taken; a loss far above the last ones is said and written down."""
        losses, self.past.failures = self.past.losses, 0
        if len(losses) >= LOSSES // 2:
            mean, spread = statistics.fmean(losses), statistics.pstdev(losses)
            if loss > mean + SPIKE * max(spread, 0.01 * mean):
                console.info(
                    f"step {step}: loss {loss:.4f} is far above the last ones ({mean:.4f}); "
                    f"its documents are in {self.path}"
                )
                self._write(step, "spike", f"loss {loss!r}", served, range(rows))
        losses.append(loss)

    def _write(self, step: int, what: str, why: str, served: Sequence[int],
               rows: Sequence[int]) -> None:
        """One line: documents are their numbers in each source's bin."""
        found: dict[str, list[int]] = {}
        ahead = copy.copy(self.loader)
        ahead.seek(served)
        turns = [ahead.turn() for _ in range(max(rows) + 1)]
        for stream, i in (turns[row] for row in rows):
            found.setdefault(stream.source.name, []).extend(documents_of(stream, i))
        self.file = self.file or console.Metrics(self.path, self.step)
        self.file.write(step, what=what, why=why,
                        documents={name: sorted(set(x)) for name, x in found.items()})


def documents_of(stream: Stream | Whole, i: int) -> list[int]:
    """Which documents of its bin are in a source's row i."""
    stream.row(i)  # lays out its epoch
    turn = i % stream.rows
    if isinstance(stream, Whole):
        return stream.packed[stream.shuffled[turn]].ravel().tolist()
    at = int(stream.shuffled[turn]) * stream.T
    first, last = np.searchsorted(stream.ends, (at, at + stream.T - 1), side="right")
    return stream.documents[stream.order[first : last + 1]].tolist()


@contextmanager
def explained(cost: str, step: Callable[[], int], out: Path) -> Iterator[None]:
    """Within it memory that ends, ranks that are lost and disks that refuse are a person's one
    line, not a traceback.

    `cost` says what a micro-batch is, in the words of the flags; `step` which one is being taken;
    `out` is the run's folder, where all is written.
    """
    rank = os.environ.get("RANK", "0")
    try:
        yield
    except OSError as e:
        if e.errno not in REFUSALS:
            raise
        if e.errno in (errno.EACCES, errno.EIO) and e.filename \
                and not Path(e.filename).is_relative_to(out):
            raise UserError(f"{e.filename}: cannot be used ({e.strerror}); "
                            "mend that, or name another", BAD_INPUT) from None
        raise UserError(f"step {step()}: {e.filename or 'a file of the run'} cannot be written "
                        f"({e.strerror}); what is saved stands; mend that and --resume",
                        STORAGE) from None
    except (MemoryError, RuntimeError) as e:
        why = " ".join(str(e).split())
        if is_out_of_memory(e):
            raise UserError(
                f"step {step()}, rank {rank}: out of memory with {cost} ({why[:120]}); "
                "lower --rows (the result stays the same), or take --recompute full, --tune lora "
                "or qlora, --shard fsdp over more ranks, a shorter --seq-len; what is saved stands",
                FLAGS) from None
        if "RANK" in os.environ and any(x in why.lower() for x in LOST):
            raise UserError(
                f"step {step()}, rank {rank}: another rank does not answer ({why[:120]}); "
                "see what it said last; the newest checkpoint stands, --resume goes on",
                FLAGS) from None
        raise


@contextmanager
def memory_ends(hint: str) -> Iterator[None]:
    """Within it memory that ends is a line that says what helps, not a traceback."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        raise UserError(f"out of memory ({' '.join(str(e).split())[:120]}); {hint}",
                        FLAGS) from None


class Memory:
    """Tries micro-batches of more and more rows, and whether the optimizer would still fit."""

    def __init__(self, model: Llama, objective: Objective, ranks: Distributed, kind: str,
                 limit_gb: float | None = None,
                 measure: Callable[[torch.device], float] = peak_memory_gb):
        self.model, self.objective, self.ranks = model, objective, ranks
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.trained = list(named.values())
        reserved = sum(optim.bytes_held(n, local_shard(p)[1], kind) for n, p in named.items())
        if ranks.ddp is not None and ranks.device.type == "cpu":  # DDP's buckets, not yet touched
            reserved += sum(p.nbytes for p in self.trained if not is_dtensor(p))
        limit_gb = limit_gb or memory_limit_gb(ranks.device)
        self.limit = 0.92 * limit_gb - reserved / GiB
        self.measure = measure
        self.seen = [(0, measure(ranks.device))]  # rows, and the most memory held

    def fits(self, rows: int, passes: int, draw: Callable[[], Batch]) -> bool:
        """Whether forward and backward passes over so many rows fit, on every rank: one, or two,
        where the first one's gradients stand beside all that the second holds.

        What the last two sizes let expect is not tried if it is too much: a CPU's process would be
        killed, not refused. Nothing is sent that a rank whose memory ends would leave the others
        waiting for, but by fsdp, which cannot compute without.
        """
        (n, before), (m, last) = [*self.seen, *self.seen][-2:]
        expected = last + (last - before) / max(1, m - n) * (rows - m)
        fault = int(expected > self.limit)
        try:
            if not self.ranks.all_reduce_max(fault)[0]:
                for last in (False, True)[-passes:]:
                    self.ranks.set_gradient_sync(last and bool(self.ranks.fsdp_modules))
                    batch = draw().to(self.ranks.device)
                    self.objective.sums(self.model, batch).sum().backward()
                self.seen.append((rows, self.measure(self.ranks.device)))
                fault = int(self.seen[-1][1] > self.limit)
        except (MemoryError, RuntimeError) as e:
            if not is_out_of_memory(e):
                raise
            fault = 1
        for p in self.trained:
            p.grad = None
        return not self.ranks.all_reduce_max(fault)[0]


def rows_that_fit(s: Settings, model: Llama, objective: Objective, ranks: Distributed,
                  load: Callable[[int], Loader]) -> int:
    """What --rows auto is for settings `s`, of a step whose tokens they divide; 1 where one row on
    every rank does not."""
    if not s.tokens_per_step:
        raise UserError("--rows auto: give --tokens-per-step too, which it divides", FLAGS)
    total, left = divmod(s.tokens_per_step, s.seq_len * ranks.world_size)
    tries = Memory(model, objective, ranks, s.optimizer)
    found = 1 if left else most_rows(
        total, lambda n: tries.fits(n, min(2, total // n), load(n).next))
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ranks.device)  # of the tries: no step of the run
    return found


def most_rows(total: int, fits: Callable[[int], bool]) -> int:
    """The largest micro-batch that fits and divides the `total` rows of a rank's step; tried from
    below, so that only the last one tried can fail. UserError (FLAGS) if not even one row does."""
    found = 0
    for rows in (n for n in range(1, total + 1) if total % n == 0):
        if not fits(rows):
            break
        found = rows
    if not found:
        raise UserError("--rows auto: not even one row fits into memory; take --recompute full, "
                        "--tune lora or qlora, or a shorter --seq-len", FLAGS)
    return found
