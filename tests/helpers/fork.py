"""Ranks and runs in forked children of a warm process: importing torch is what a process costs."""

from __future__ import annotations

import os
import runpy
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def child(action: Callable[[], object], said: Path, **env: str) -> int:
    """The id of a child that does this and exits with what it returns; its words go to a file."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(said, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as at a terminal, even where
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves run in the background
        sys.stdout = os.fdopen(1, "w")
        sys.stderr = os.fdopen(2, "w", buffering=1)
        os.environ.update(env)
        code = action() or 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def quiet_child(action: Callable[[], object]) -> int:
    """The id of a child that does this and exits with 0, or with 99 after a traceback."""
    pid = os.fork()
    if pid:
        return pid
    try:
        action()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(99)


def train(*words: str) -> Callable[[], object]:
    """What a child does that is train.py with these words, from its first line."""

    def act() -> None:
        sys.argv = ["train.py", *words]
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")

    return act


def together(world: int, action: Callable[[], object], said: Path, **env: str) -> list[int]:
    """The ids of children that are the ranks of one run, as torchrun would start them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": str(port), **env} if world > 1 else env
    ranks = [{"RANK": str(i), "LOCAL_RANK": str(i)} if world > 1 else {} for i in range(world)]
    return [child(action, said.with_name(f"{said.name}-{i}"), **env, **rank)
            for i, rank in enumerate(ranks)]


def ends(pids: list[int], within: float = 120.0) -> list[int]:
    """How children end: exit codes, or minus the signals that killed them."""
    deadline, codes = time.monotonic() + within, {}
    try:
        while len(codes) < len(pids):
            for pid in pids:
                if pid not in codes and (exited := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[pid] = os.waitstatus_to_exitcode(exited[1])
            assert time.monotonic() < deadline, f"still running after {within} s"
            time.sleep(0.002)
    finally:
        for pid in pids:
            if pid not in codes:
                os.kill(pid, 9)
                os.waitpid(pid, 0)
    return [codes[pid] for pid in pids]
