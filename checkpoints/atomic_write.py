"""Atomic writes: a kill or a full disk leaves the old file or folder, or the new one.

Data are written under a temporary name, flushed to the disk, and renamed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from checkpoints.safetensors_header import first_five
from runtime.console import STORAGE, UserError


def fsync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    fsync(temporary)
    temporary.replace(path)
    fsync(path.parent)


@contextmanager
def replace_folder(folder: Path, replaceable: Sequence[str]) -> Iterator[Path]:
    """A temporary folder to write into. It replaces `folder` when the block ends without an error.

    UserError if `folder` holds a file that no pattern in `replaceable` matches, because it would
    be lost, or if the disk refuses.
    """
    folder = folder.expanduser().resolve()  # a link is followed once, here
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    old = folder.with_name(f".del-{folder.name}-{os.getpid()}")
    try:
        if folder.exists():
            check_replaceable(folder, replaceable)
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            file.chmod(temporary.stat().st_mode & 0o666)  # follow the umask; safetensors uses 0600
            fsync(file)
        fsync(temporary)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        fsync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"{folder}: cannot be written ({reason})", STORAGE) from e
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(folder: Path, replaceable: Sequence[str]) -> None:
    """UserError (STORAGE) if a folder holds a file that no pattern in `replaceable` matches."""
    others = [f.name for f in folder.iterdir() if not any(f.match(p) for p in replaceable)]
    if others:
        raise UserError(f"{folder}: {first_five(others)} would be lost; name another folder",
                        STORAGE)
