"""Tries the place of an output before the work that it is for.

What would be refused after hours is refused at once, in one line with exit code 5. Nothing is left
there but parent folders.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.console import STORAGE, UserError


@contextmanager
def refused_as_output(path: Path | str) -> Iterator[None]:
    """An OSError in the block becomes a UserError that names the output."""
    try:
        yield
    except OSError as e:
        raise UserError(f"--out {path}: cannot be written ({e.strerror}); name another",
                        STORAGE) from None


def real_path(path: Path | str) -> Path:
    """The path behind all links; it may not exist yet. UserError if links lead in a circle, or if
    a name is too long."""
    with refused_as_output(path):
        real = Path(os.path.realpath(path))
        if not real.exists() and os.path.lexists(real):
            real.stat()  # raises the error of the circle
    return real


def try_output_file(path: Path | str) -> None:
    """UserError unless a file can be written at this path. An existing file is not changed; a
    device or a FIFO is not opened."""
    file = real_path(path)
    if file.exists() and not (file.is_file() or file.is_dir()):
        return
    with refused_as_output(path):
        is_new = not file.exists()
        with open(file, "ab"):
            pass
        if is_new:
            file.unlink()


def try_output_folder(path: Path | str, files: Collection[str] = ()) -> Path:
    """The folder behind all links, which may not exist yet. UserError unless it can be made and
    `files` can be written into it."""
    folder = real_path(path)
    with refused_as_output(path):
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
    try:
        for name in files:
            try_output_file(folder / name)
    finally:
        if is_new:
            folder.rmdir()
    return folder
