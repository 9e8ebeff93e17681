"""Writing so that a kill leaves the old or the new, never half of one: aside, flushed, renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from checkpoints.safetensors_header import five
from runtime.console import STORAGE, UserError


@contextmanager
def aside(folder: Path, known: Sequence[str]) -> Iterator[Path]:
    """A folder to write into: it takes `folder`'s place if all goes well, else it goes."""
    folder = folder.expanduser().resolve()  # a link is followed here, once
    temporary, old = (folder.with_name(f".{x}-{folder.name}-{os.getpid()}") for x in ("tmp", "del"))
    try:
        if folder.exists():
            if lost := [f.name for f in folder.iterdir() if not any(f.match(p) for p in known)]:
                raise UserError(f"{folder}: {five(lost)} would be lost; name another", STORAGE)
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            file.chmod(temporary.stat().st_mode & 0o666)  # the umask's; safetensors writes 0600
            flush(file)
        flush(temporary)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        flush(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as e:
        why = getattr(e, "strerror", None) or e
        raise UserError(f"{folder}: cannot be written ({why})", STORAGE) from e
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(temporary, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
