"""Atomic replacement of a folder: a kill or a full disk leaves the old folder or the new one.

Files are written into a temporary folder (runtime/temporary.py), flushed to the disk, and the
folder is renamed. A kill between two renames leaves the old folder set aside; the next command that
writes there gives it its name back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import SafetensorError

from checkpoints.safetensors_header import first_five
from runtime.console import STORAGE, UserError
from runtime.temporary import Temporary, fsync, remove_leftovers, set_aside


@contextmanager
def replace_folder(folder: Path, replaceable: Sequence[str]) -> Iterator[Path]:
    """A temporary folder to write into. It replaces `folder` when the block ends without an error.

    UserError if `folder` holds a file that no pattern in `replaceable` matches, because it would
    be lost, or if the disk refuses.
    """
    folder = folder.expanduser().resolve()  # a link is followed once, here
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder.parent)  # may give an older folder its name back
        if folder.exists():
            check_replaceable(folder, replaceable)
        with Temporary(folder, folder=True) as temporary:
            new = temporary.path
            yield new
            for file in new.iterdir():
                file.chmod(new.stat().st_mode & 0o666)  # follow the umask; safetensors uses 0600
                fsync(file)
            fsync(new)
            with ExitStack() as old:
                if folder.exists():
                    old.enter_context(set_aside(folder))
                temporary.replace()
    except (OSError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"{folder}: cannot be written ({reason})", STORAGE) from e


def check_replaceable(folder: Path, replaceable: Sequence[str]) -> None:
    """UserError (STORAGE) if a folder holds a file that no pattern in `replaceable` matches."""
    others = [f.name for f in folder.iterdir() if not any(f.match(p) for p in replaceable)]
    if others:
        raise UserError(f"{folder}: {first_five(others)} would be lost; name another folder",
                        STORAGE)
