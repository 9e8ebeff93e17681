"""What we say to people: plain lines, a progress bar, one-line errors, and metrics.jsonl.

One idea: everything a run has to say leaves through here, so that only rank 0 speaks, a person's
mistake is one line and not a traceback, and the numbers a person sees are the numbers in the file.

Lines go to stderr; what a command *produces* (a continuation, a score) goes to stdout.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

FLAGS, BAD_INPUT, NON_FINITE, STORAGE, INTERRUPTED = 2, 3, 4, 5, 130  # exit codes; 143: terminated
REFUSALS = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO}


class UserError(Exception):
    """Something a person can mend; the message says what, where, expected against found, what to
    do.

    `code` is the exit code: FLAGS (2), BAD_INPUT (3: model, tokenizer, data, checkpoint),
    NON_FINITE (4), STORAGE (5).
    """

    def __init__(self, message: str, code: int = BAD_INPUT):
        super().__init__(message)
        self.code = code


def speaking() -> bool:
    """Whether this process is the one that talks: rank 0, or a process that torchrun did not
    start."""
    return os.environ.get("RANK", "0") == "0"


def say(line: str) -> None:
    """One line to the person."""
    if speaking():
        print(line, file=sys.stderr, flush=True)


def hide_cpp_warnings() -> None:
    """Hide the warnings of torch's C++ code if there are several ranks; call before importing it.

    DistributedDataParallel would warn on each rank that no parameter was unused, which is normal
    here. TORCH_CPP_LOG_LEVEL=WARNING shows these warnings.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def printable(text: str) -> str:
    """Text with control characters made visible: a model's output must not steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def coloured(text: str, on: bool) -> str:
    """A piece of text for stdout, in colour where it is trained; plain where stdout is no
    terminal."""
    text = printable(text)
    return f"\x1b[32m{text}\x1b[0m" if on and sys.stdout.isatty() else text


@dataclass
class Asked:
    """What signals have asked for since they were last looked at."""

    stop: int = 0  # the exit code to leave with: 128 + the signal's number
    save: int = 0  # 1: save, and go on


@contextmanager
def listening() -> Iterator[Asked]:
    """Within it SIGTERM, SIGINT and SIGHUP only ask to stop, and SIGUSR1 to save.

    The loop looks between steps, so that no work is done in a handler. A second signal to stop ends
    the process at once; within a second of the first it is the same one, passed on by a launcher.
    """
    asked = Asked()
    first = 0.0

    def ask(number: int, _: Any) -> None:
        nonlocal first
        if number == signal.SIGUSR1:
            asked.save = 1
        elif not asked.stop:
            asked.stop, first = 128 + number, time.monotonic()
        elif time.monotonic() - first > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {n: signal.getsignal(n) for n in numbers}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # nohup
            signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(command: Callable[[], T]) -> T:
    """Run a command and give what it gives; a UserError becomes one line and an exit code (DEBUG=1:
    a traceback).

    A command file reads its settings before it imports torch, so that --help answers at once:

        if __name__ == "__main__":
            SETTINGS, ORIGINS = log.run(lambda: config.read(Settings, sys.argv[1:], "train.py"))
        import torch
        ...
        if __name__ == "__main__":
            log.run(lambda: main(SETTINGS))
    """
    for stream in (sys.stdout, sys.stderr):  # what a terminal cannot show is no reason to end
        stream.reconfigure(errors="backslashreplace")
    try:
        given = command()
        sys.stdout.flush()  # a disk that is full says so here, not behind us
        return given
    except UserError as e:
        if os.environ.get("DEBUG"):
            raise
        who = ""
        if not speaking():  # rank 0 mostly says the same, and torchrun ends us before we repeat it
            time.sleep(2)
            who = f"rank {os.environ['RANK']}: "
        print(f"error: {who}{printable(' '.join(str(e).split()))}", file=sys.stderr, flush=True)
        sys.exit(e.code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # `sample.py ... | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as e:
        if e.errno not in REFUSALS or os.environ.get("DEBUG"):
            raise
        print(f"error: {e.filename or 'the output'}: refused by the system ({e.strerror})",
              file=sys.stderr, flush=True)
        try:
            sys.stdout.flush()
        except OSError:  # it is stdout that takes no more: what it holds goes
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(STORAGE)


class Metrics:
    """metrics.jsonl: one JSON object a line, each step once, however often a run was cut and
    resumed."""

    def __init__(self, path: Path, after_step: int = -1, track: str = "none"):
        """Open for appending; lines of later steps than `after_step` belong to work that was lost
        and go. Step 0, before training, is not lost work: it is looked at again.

        `track` "tensorboard" writes the same numbers beside the file, in a folder of that name.
        """
        self.file = self.board = None
        if not speaking():
            return
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(True)
            kept = [x for x in lines if _step(x) <= (after_step or -1)]
            aside = path.with_suffix(".tmp")
            with open(aside, "w", encoding="utf-8") as file:
                file.write("".join(kept))
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
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
        """Have the disk hold all lines: a resume point never knows of steps that are not there."""
        if self.file:
            os.fsync(self.file.fileno())

    def write(self, step: int, **values: Any) -> None:
        """Append one line; it is flushed, so that a kill loses none."""
        if self.file:
            self.file.write(json.dumps({"step": step, **values}, ensure_ascii=False) + "\n")
            self.file.flush()
        if self.board:
            for name, value in values.items():
                for part, x in value.items() if isinstance(value, dict) else [("", value)]:
                    if isinstance(x, int | float):
                        self.board.add_scalar(f"{name}/{part}" if part else name, x, step)
            self.board.flush()


def _step(line: str) -> float:
    """A metrics line's step; infinite for a line cut short by a kill, which therefore goes."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")


@contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
    """A progress bar with time left on a terminal, silent elsewhere; yields `move(by, note)`."""
    if not (speaking() and sys.stderr.isatty()):
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
