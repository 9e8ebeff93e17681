"""What is unusual in a run: steps that are not finite, and spikes of the loss.

Both are written to odd_steps.jsonl with the documents of the step. The order of data is a function
of the seed and the step, so the documents of a step can be looked up after it turned out odd.
"""

from __future__ import annotations

import copy
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data import Loader
from runtime import console
from runtime.distributed import Distributed

WINDOW = 50  # the losses that a new one is compared with
SPIKE = 6.0  # standard deviations above their mean
MAX_FAILURES = 3  # steps in a row that are not finite


class NotFinite(FloatingPointError):
    """The loss or the gradient of a step is NaN or infinite; nothing was updated.

    `micro_batches` are those of this rank whose own loss is not finite. `can_retry`: the step
    overflowed fp16 only, and the loss scale was lowered.
    """

    def __init__(self, message: str, micro_batches: Sequence[int], can_retry: bool):
        super().__init__(message)
        self.micro_batches, self.can_retry = list(micro_batches), can_retry


@dataclass
class MonitorState:
    """What the monitor remembers of earlier steps; it is part of a checkpoint."""

    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    failures: int = 0  # steps in a row that were not finite


class TrainingMonitor:
    """Checks the outcome of every step. All ranks see the same values and decide the same."""

    def __init__(self, out: Path, loader: Loader, ranks: Distributed, step: int,
                 state: MonitorState):
        self.loader, self.ranks, self.state = loader, ranks, state
        self.path, self.first_step = out / "odd_steps.jsonl", step
        self.log: console.Metrics | None = None  # the file is made for the first odd step
        if self.path.exists():
            self.log = console.Metrics(self.path, step)

    def on_step(self, step: int, loss: float, served: Sequence[int], rows: int) -> None:
        """After an update. Reports a loss far above the last ones.

        The step's rows are the `rows` ones after the loader position `served`.
        """
        losses, self.state.failures = self.state.losses, 0
        if len(losses) >= WINDOW // 2:
            mean, deviation = statistics.fmean(losses), statistics.pstdev(losses)
            if loss > mean + SPIKE * max(deviation, 0.01 * mean):
                console.info(f"step {step}: loss {loss:.4f} is far above the last ones "
                            f"({mean:.4f}); its documents are in {self.path}")
                self._write(step, "spike", f"loss {loss!r}", served, range(rows))
        losses.append(loss)

    def on_nonfinite(self, step: int, error: NotFinite, served: Sequence[int], rows: int) -> bool:
        """After a step that was skipped -> whether the run should end: the third in a row."""
        per_rank = self.ranks.all_gather_text(" ".join(map(str, error.micro_batches)))
        rows_per_rank = self.loader.rows  # in a micro-batch
        odd_rows = []
        for rank, text in enumerate(per_rank):
            for micro_batch in map(int, text.split()):
                first = (micro_batch * self.ranks.world_size + rank) * rows_per_rank
                odd_rows += range(first, first + rows_per_rank)
        self._write(step, "not finite", str(error), served, sorted(odd_rows) or range(rows))
        console.info(f"step {step}: {error}")
        if not error.can_retry:
            self.state.failures += 1
        return self.state.failures >= MAX_FAILURES

    def _write(self, step: int, what: str, why: str, served: Sequence[int],
               rows: Sequence[int]) -> None:
        """Write one line; documents are their numbers in each source's bin."""
        loader = copy.copy(self.loader)
        loader.seek(served)
        consumed = [loader.next_row() for _ in range(max(rows) + 1)]
        documents: dict[str, list[int]] = {}
        for row in rows:
            source, i = consumed[row]
            stream = loader.streams[source]
            documents.setdefault(stream.source.name, []).extend(stream.documents_in(i))
        if self.log is None:
            self.log = console.Metrics(self.path, self.first_step)
        self.log.write(step, what=what, why=why,
                       documents={name: sorted(set(x)) for name, x in documents.items()})
