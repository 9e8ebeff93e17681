"""Signals: SIGTERM ends a command with exit code 143 and no leftovers; the training loop reads
requests to stop or to save between its steps."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

PR_SET_PDEATHSIG = 1  # prctl(2)
SAME_SIGNAL = 1.0  # seconds in which a second signal is the first one, forwarded by a launcher


class Terminated(BaseException):
    """SIGTERM. Not an Exception: only `finally` and `with` act on it, so they clean up."""


def raise_on_sigterm() -> None:
    """From here on, SIGTERM raises Terminated in the main thread, once. A second signal that comes
    later than SAME_SIGNAL ends the process at once."""
    first_time = 0.0

    def handler(number: int, _: Any) -> None:
        nonlocal first_time
        if not first_time:
            first_time = time.monotonic()
            raise Terminated
        if time.monotonic() - first_time > SAME_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, handler)


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent ends, however that ends. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass
class SignalState:
    """What signals have requested since it was last read."""

    stop: int = 0  # the exit code to leave with: 128 + the signal's number
    save: int = 0  # 1: save, and continue


@contextmanager
def handle_signals() -> Iterator[SignalState]:
    """Inside, SIGTERM, SIGINT and SIGHUP only request to stop, and SIGUSR1 to save.

    The loop reads the state between steps, so nothing is done in a handler. A second signal to stop
    ends the process at once. One that arrives within a second of the first counts as the same one,
    forwarded by a launcher.
    """
    state = SignalState()
    first_time = 0.0

    def handler(number: int, _: Any) -> None:
        nonlocal first_time
        if number == signal.SIGUSR1:
            state.save = 1
        elif not state.stop:
            state.stop, first_time = 128 + number, time.monotonic()
        elif time.monotonic() - first_time > SAME_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    previous = {number: signal.getsignal(number) for number in numbers}
    for number, old_handler in previous.items():
        if old_handler != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, handler)
    try:
        yield state
    finally:
        for number, old_handler in previous.items():
            signal.signal(number, old_handler)
