"""Errors of torch and of the system that a person can fix, as one line in place of a traceback."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.console import BAD_INPUT, FLAGS, REFUSALS, STORAGE, UserError
from runtime.device import is_out_of_memory

# Parts of torch's messages where another rank has ended or does not answer.
LOST_RANK = ("closed by peer", "reset by peer", "timed out", "timeout", "connection refused",
             "remote process exited", "broken pipe", "socket error")


@contextmanager
def explain_errors(micro_batch: str, step: Callable[[], int], out: Path) -> Iterator[None]:
    """Turn out-of-memory, lost ranks and a full disk into a UserError.

    `micro_batch` describes it in flags ("--rows 4 x --seq-len 1024"); `step` returns the step that
    is running; `out` is the run's folder.
    """
    try:
        yield
    except OSError as e:
        if e.errno not in REFUSALS:
            raise
        is_other_file = e.filename and not Path(e.filename).is_relative_to(out)
        if e.errno in (errno.EACCES, errno.EIO) and is_other_file:
            raise UserError(f"{e.filename}: cannot be used ({e.strerror}); correct that, or give "
                            "another file", BAD_INPUT) from None
        file = e.filename or "a file of the run"
        raise UserError(f"step {step()}: {file} cannot be written ({e.strerror}); the saved "
                        "checkpoints are intact; make room and continue with --resume",
                        STORAGE) from None
    except (MemoryError, RuntimeError) as e:
        where = f"step {step()}, rank {os.environ.get('RANK', '0')}"
        reason = " ".join(str(e).split())
        if is_out_of_memory(e):
            raise UserError(
                f"{where}: out of memory with {micro_batch} ({reason[:120]}); lower --rows (the "
                "result stays the same), or use --recompute full, --tune lora or qlora, --shard "
                "fsdp over more ranks, or a shorter --seq-len; the saved checkpoints are intact",
                FLAGS) from None
        if "RANK" in os.environ and any(x in reason.lower() for x in LOST_RANK):
            raise UserError(
                f"{where}: another rank does not answer ({reason[:120]}); see its last message; "
                "continue from the newest checkpoint with --resume", FLAGS) from None
        raise


@contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """Turn out-of-memory into a UserError that ends with the advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        raise UserError(f"out of memory ({' '.join(str(e).split())[:120]}); {advice}",
                        FLAGS) from None
