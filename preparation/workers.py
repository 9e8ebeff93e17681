"""A pool of worker processes that maps chunks in order.

The pool is started only when one process alone has worked for `serial_seconds`: most files are
done before a pool would have started. The results are the same for any number of processes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from runtime.console import UserError

Kept = TypeVar("Kept")
Input = TypeVar("Input")
Output = TypeVar("Output")

_job: Callable[[Any], Any]  # of a worker process; set once, by _start_worker


@dataclass(frozen=True)
class Workers:
    """How chunks are shared among processes: how many processes, the seconds that the first one
    works alone, and the bytes of text in a chunk."""

    processes: int = 1
    serial_seconds: float = 3.0
    chunk_bytes: int = 1 << 20

    def map(self, job: Callable[[Input], Output],
            chunks: Iterable[tuple[Kept, Input]]) -> Iterator[tuple[Kept, Output]]:
        """For each chunk (kept, input): (kept, job(input)), in the order of the chunks. `kept`
        stays in this process.

        Each worker receives the job once. At most two chunks per process are in flight, so memory
        is bounded. A UserError of `chunks` is raised after the results of all earlier chunks.
        """
        chunks, start = iter(chunks), time.monotonic()
        for parent_data, job_input in chunks:
            yield parent_data, job(job_input)
            if self.processes > 1 and time.monotonic() - start >= self.serial_seconds:
                break
        else:
            return
        yield from self._map_in_pool(job, chunks)

    def _map_in_pool(self, job: Callable[[Input], Output],
                     chunks: Iterator[tuple[Kept, Input]]) -> Iterator[tuple[Kept, Output]]:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.processes, context, _start_worker, (job,)) as pool:
            try:
                yield from _map_in_order(pool, chunks, 2 * self.processes)
            except BaseException:  # Ctrl-C or SIGTERM too: the chunks that wait are not needed
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _map_in_order(pool: ProcessPoolExecutor, chunks: Iterator[tuple[Kept, Input]],
                  in_flight: int) -> Iterator[tuple[Kept, Output]]:
    """The results of the chunks, in order, while at most `in_flight` more are computed."""
    pending: deque[tuple[Kept, Future]] = deque()
    error = None
    while True:
        try:
            parent_data, job_input = next(chunks)
        except StopIteration:
            break
        except UserError as e:
            error = e
            break
        while len(pending) > in_flight:
            yield _first_result(pending)
        pending.append((parent_data, pool.submit(_run_job, job_input)))
    while pending:
        yield _first_result(pending)
    if error:
        raise error


def _first_result(pending: deque[tuple[Any, Future]]) -> tuple[Any, Any]:
    parent_data, future = pending.popleft()
    return parent_data, future.result()


def _start_worker(job: Callable[[Any], Any]) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End this worker when its parent ends: a worker that waits for work would not notice."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _run_job(job_input: Any) -> Any:
    return _job(job_input)
