"""Temporary files and folders, and the removal of those that a killed process left.

Every command writes a file or folder under the name `.tmp-NAME-PID-RANDOM` beside its target, and
renames it when it is complete. An old file or folder that it replaces has the name
`.del-NAME-PID-RANDOM` until it is removed. Before a command creates such a file or folder, it
removes what killed processes left in the same place.

A writer holds a lock (flock) on its file or folder for as long as it lives. The system releases the
lock when the process ends, however it ends, so neither a reused PID nor another PID namespace
matters. Not every shared disk passes locks on to other machines. Therefore the first four digits of
RANDOM are a hash of the machine's name: what another machine began is removed only if it has not
changed for a day. Where the disk has no locks, a leftover is one whose PID does not exist, or is
that of a process that started after the last write.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DAY = 24 * 3600.0
NAME = re.compile(r"\.(?P<kind>tmp|del)-(?P<target>.+)-(?P<pid>\d+)"
                  r"-(?P<host>[0-9a-f]{4})[0-9a-f]{8}", re.DOTALL)
# of earlier versions: files and folders of any command; bins, whose names had no PID; results.json
OLD_NAME = re.compile(r"\.(?P<kind>tmp|del)-(?P<target>.+)-(?P<pid>\d{1,7})", re.DOTALL)
OLD_BIN = re.compile(r"\.(?P<kind>tmp)-(?P<target>.+)-[0-9a-f]{8}", re.DOTALL)
OLD_RESULTS = re.compile(r"(?P<target>results)\.tmp(?P<pid>\d{1,7})")
PATTERNS = (NAME, OLD_NAME, OLD_BIN, OLD_RESULTS)
LONGEST_NAME = 200  # bytes of the target's name in a temporary name; the system's limit is 255


def fsync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def temporary_path(target: Path, kind: str = "tmp") -> Path:
    """A new temporary name beside `target`."""
    name = os.fsencode(target.name)[:LONGEST_NAME].decode(errors="ignore")
    return target.with_name(f".{kind}-{name}-{os.getpid()}-{_host()}{os.urandom(4).hex()}")


class Temporary:
    """A temporary file or folder that this process has created and locked.

    `path` is its path. As a context manager it is removed at the end, if it is still there.
    """

    def __init__(self, target: Path, folder: bool = False, path: Path | None = None):
        """Create it beside `target`, whose folder must exist, after removing leftovers there.

        `path` is a name from `temporary_path`, if other processes must know it beforehand; the
        caller then removes leftovers. OSError if the disk refuses.
        """
        self.target = target
        if path is None:
            remove_leftovers(target.parent)
        self.path = path or temporary_path(target)
        self.lock: int | None = None
        while not self._create(folder):  # until no other process took it for a leftover
            self.path = path or temporary_path(target)

    def __enter__(self) -> Temporary:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _create(self, folder: bool) -> bool:
        """Create and lock it. False if another process removed it before it was locked."""
        if folder:
            self.path.mkdir()
        else:
            self.path.touch(exist_ok=False)
        try:
            self.lock = _lock(self.path, wait=True)
            return self.path.exists()
        except FileNotFoundError:
            return False

    def replace(self) -> None:
        """Give a file or a folder its target's name. A file that has this name is replaced; a
        folder that has it must be empty."""
        self.path.rename(self.target)
        self.release()
        fsync(self.target.parent)

    def remove(self) -> None:
        """Remove it, if it is still there, and release its lock."""
        remove(self.path)
        self.release()

    def release(self) -> None:
        """Release the lock. The path stays."""
        if self.lock is not None:
            os.close(self.lock)
        self.lock = None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: a kill or a full disk leaves the old file or the new one."""
    with Temporary(path) as temporary:
        temporary.path.write_text(text, encoding="utf-8")
        fsync(temporary.path)
        temporary.replace()


@contextmanager
def set_aside(path: Path) -> Iterator[Path]:
    """Rename a file or folder to a temporary name, and remove it when the block ends.

    If nothing has its name at the end, because what should replace it could not be renamed, it
    gets its name back. A kill in the block leaves it to `remove_leftovers`, which does the same.
    """
    aside = temporary_path(path, "del")
    lock = None
    with suppress(OSError):  # a link, or a file that this user may rename but not read
        lock = _lock(path, wait=False)
    try:
        path.rename(aside)
        try:
            yield aside
        finally:
            if not os.path.lexists(path):
                aside.rename(path)
            remove(aside)
    finally:
        if lock is not None:
            os.close(lock)


def remove_renamed(path: Path) -> None:
    """Take a folder's name away, then remove it: half of it must not look like the whole."""
    aside = temporary_path(path, "del")
    path.rename(aside)
    remove(aside)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there. What cannot be removed stays."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()  # the link itself, never what it points to


def remove_leftovers(folder: Path, restore: bool = True) -> None:
    """Remove what killed processes left in a folder, if the folder exists.

    With `restore`, a file or folder that was set aside gets its name back if nothing else has it.
    """
    with suppress(OSError):  # a folder that cannot be listed cannot be written either
        for entry in list(os.scandir(folder)):
            match = next(filter(None, (x.fullmatch(entry.name) for x in PATTERNS)), None)
            if match and not entry.is_symlink():
                _remove_if_leftover(Path(entry.path), match.groupdict(), restore)


def _remove_if_leftover(path: Path, parts: dict[str, str], restore: bool) -> None:
    try:
        lock = _lock(path, wait=False)
    except OSError:  # its writer lives, or it is another user's
        return
    try:
        if not _is_leftover(path, parts, lock is not None):
            return
        target = path.with_name(parts["target"])
        if restore and parts.get("kind") == "del" and not os.path.lexists(target):
            path.rename(target)
        else:
            remove(path)
    except FileNotFoundError:
        return  # another process was faster
    finally:
        if lock is not None:
            os.close(lock)


def _is_leftover(path: Path, parts: dict[str, str], locked: bool) -> bool:
    """Whether the process that made it has ended. `locked`: this process got its lock."""
    last_write = max(x.lstat().st_mtime for x in (path, *path.glob("*")))
    if "pid" not in parts or parts.get("host", _host()) != _host():
        return time.time() - last_write > DAY
    if "host" in parts and locked:
        return True
    pid = int(parts["pid"])
    return pid == os.getpid() or not _is_running_since(pid, last_write)


def _is_running_since(pid: int, moment: float) -> bool:
    """Whether a process exists that has this id and had it at a moment (seconds since 1970)."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # a process of another user
    start = _start_time(pid)
    return start is None or start < moment + 60  # the clock of a shared disk may differ


def _start_time(pid: int) -> float | None:
    """When a process started, in seconds since 1970; None where /proc does not say it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        ticks = int(fields.rpartition(")")[2].split()[19])  # proc(5): field 22, after "(name)"
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) \
            + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):
        return None


def _host() -> str:
    """Four digits that stand for this machine."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:4]


def _lock(path: Path, wait: bool) -> int | None:
    """Lock a file or folder -> the open descriptor that holds the lock; None if the disk has no
    locks. BlockingIOError if another process holds it, unless `wait`."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        os.close(fd)
        if e.errno in (errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL):
            return None  # EBADF: NFS locks only what is open for writing
        raise
    return fd
