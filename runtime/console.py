"""Output for people: lines, a progress bar, one-line errors, and metrics.jsonl.

Only rank 0 prints. An error that a person can fix is one line and not a traceback. Lines go to
stderr; what a command produces (a continuation, a score) goes to stdout.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from runtime.signals import Terminated, raise_on_sigterm
from runtime.temporary import write_text

T = TypeVar("T")

FLAGS, BAD_INPUT, NON_FINITE, STORAGE = 2, 3, 4, 5  # exit codes
INTERRUPTED, TERMINATED = 130, 143
# errors of the system for which the disk, its permissions or its limits are the reason
REFUSALS = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO,
            errno.EPERM, errno.EISDIR, errno.ENOTDIR}


class UserError(Exception):
    """An error that a person can fix.

    The message says what is wrong and where, what was expected and found, and what to do. `code` is
    the exit code: FLAGS (2), BAD_INPUT (3: model, tokenizer, data, checkpoint), NON_FINITE (4),
    STORAGE (5).
    """

    def __init__(self, message: str, code: int = BAD_INPUT):
        super().__init__(message)
        self.code = code


def is_rank_zero() -> bool:
    """Whether this process is rank 0, or was not started by torchrun."""
    return os.environ.get("RANK", "0") == "0"


def info(line: str) -> None:
    """Print a line to stderr, on rank 0."""
    if is_rank_zero():
        print(line, file=sys.stderr, flush=True)


def hide_cpp_warnings() -> None:
    """Hide the warnings of torch's C++ code if there are several ranks; call before importing it.

    DistributedDataParallel would warn on each rank that no parameter was unused, which is normal
    here. TORCH_CPP_LOG_LEVEL=WARNING shows these warnings.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def printable(text: str) -> str:
    """Text with control characters escaped: a model's output must not control the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def coloured(text: str, on: bool) -> str:
    """Text for stdout, in green if `on` and stdout is a terminal."""
    text = printable(text)
    return f"\x1b[32m{text}\x1b[0m" if on and sys.stdout.isatty() else text


def run(command: Callable[[], T]) -> T:
    """Run a command and return its result; a UserError becomes one line and an exit code.

    With DEBUG=1 in the environment it stays a traceback. A command reads its settings before it
    imports torch, so that --help is instant:

        if __name__ == "__main__":
            SETTINGS, ORIGINS = console.run(lambda: flags.read(Settings, sys.argv[1:], "train.py"))
        import torch
        ...
        if __name__ == "__main__":
            console.run(lambda: main(SETTINGS))
    """
    check_streams()
    if threading.current_thread() is threading.main_thread():
        raise_on_sigterm()
    try:
        result = command()
        sys.stdout.flush()  # a full disk is reported here, and not after this function
        return result
    except UserError as e:
        if os.environ.get("DEBUG"):
            raise
        prefix = ""
        if not is_rank_zero():  # rank 0 mostly prints the same, and then torchrun ends this process
            time.sleep(2)
            prefix = f"rank {os.environ['RANK']}: "
        leave(e.code, f"error: {prefix}{printable(' '.join(str(e).split()))}")
    except KeyboardInterrupt:
        leave(INTERRUPTED, "interrupted")
    except Terminated:
        leave(TERMINATED, "terminated")
    except BrokenPipeError:  # `sample.py ... | head`: the reader needs no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as e:
        if e.errno not in REFUSALS or os.environ.get("DEBUG"):
            raise
        leave(STORAGE, f"error: {e.filename or 'the output'}: refused by the system "
                       f"({e.strerror})")


def check_streams() -> None:
    """Exit with STORAGE if stdout or stderr is closed: notes would mix with the output, and the
    next file that is opened would get their number. Escape what a terminal cannot show."""
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        if stream is None:
            other = sys.stderr or sys.stdout
            if other is not None:
                print(f"error: {name}: is closed; redirect it to a file or to /dev/null",
                      file=other, flush=True)
            sys.exit(STORAGE)
        stream.reconfigure(errors="backslashreplace")


def leave(code: int, line: str) -> NoReturn:
    """Print a last line and exit. A stream that takes nothing more, on a full disk, is dropped with
    what is in its buffer; then the code is STORAGE."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        code = STORAGE
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as e:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if not isinstance(e, BrokenPipeError):
                code = STORAGE
    sys.exit(code)


class Metrics:
    """metrics.jsonl: one JSON object per line, each step once, also after interruptions."""

    def __init__(self, path: Path, after_step: int = -1, track: str = "none"):
        """Open the file for appending, after removing the lines of steps after `after_step`.

        Those steps were lost and are taken again. The evaluation at step 0 is repeated too.
        `track` "tensorboard" also writes the numbers to the folder tensorboard/ next to the file.
        """
        self.file = self.board = None
        if not is_rank_zero():
            return
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(True)
            lines = [x for x in lines if _step(x) <= (after_step or -1)]
            write_text(path, "".join(lines))
        self.file = open(path, "a", encoding="utf-8")
        if track == "tensorboard":
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError(
                    "--track tensorboard: not installed; pip install tensorboard", FLAGS) from None
            self.board = SummaryWriter(
                path.with_name("tensorboard"), purge_step=max(after_step, 0) + 1)

    def flush(self) -> None:
        """Write all lines to the disk: a checkpoint must not be ahead of metrics.jsonl."""
        if self.file:
            os.fsync(self.file.fileno())

    def write(self, step: int, **values: Any) -> None:
        """Append a line and flush it, so that a kill loses no line."""
        if self.file:
            self.file.write(json.dumps({"step": step, **values}, ensure_ascii=False) + "\n")
            self.file.flush()
        if self.board:
            for name, value in values.items():
                scalars = {name: value}
                if isinstance(value, dict):
                    scalars = {f"{name}/{key}": x for key, x in value.items()}
                for tag, x in scalars.items():
                    if isinstance(x, int | float):
                        self.board.add_scalar(tag, x, step)
            self.board.flush()


def _step(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for a damaged line."""
    step = read_metrics_line(line).get("step")
    return step if type(step) is int else float("inf")


def read_metrics_line(line: str) -> dict[str, Any]:
    """The entry in a line of metrics.jsonl; empty if a kill or a power cut damaged the line."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}


@contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
    """A progress bar on a terminal, nothing elsewhere; yields `advance(steps, note)`."""
    if not (is_rank_zero() and sys.stderr.isatty()):
        yield lambda by, note="": None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total, completed=done, note="")
        yield lambda by, note="": bar.update(task, advance=by, note=note)
