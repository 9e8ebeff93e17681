"""Opens the files of a folder that somebody else made: a model's, an adapter's, a tokenizer's.

`open_model_file` is the only way to open such a file. Refused, each in one line: a file that is not
a regular file (a FIFO, a device, a socket, a folder), a file that is larger than any published file
of its kind, a name that is not a plain file name, and a link out of the folder. The links of the
hub's cache, from a snapshot to the blobs of the same model, are followed.
"""

from __future__ import annotations

import os
import shutil
import stat
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

from runtime.console import UserError
from runtime.strict_json import strict_json

MiB = 1 << 20
MAX_NAME_BYTES = 255  # of a file name, in the usual file systems
# The largest size of each kind of file, in bytes; the first pattern that matches counts. In
# brackets the largest published files that we know.
SIZE_LIMITS: tuple[tuple[str, int | None], ...] = (
    ("*.safetensors", None),  # its header says how large it is
    ("*.safetensors.index.json", 64 * MiB),  # (9 MB: DeepSeek-V3)
    ("tokenizer_config.json", 16 * MiB),  # (1.2 MB: Gemma 3)
    ("chat_template*", MiB),  # (30 kB)
    ("config.json", 4 * MiB),  # (some 100 kB, where it lists modules)
    ("generation_config.json", 4 * MiB),
    ("adapter_config.json", 4 * MiB),
    ("special_tokens_map.json", 4 * MiB),
    ("added_tokens.json", 4 * MiB),
    ("prompt.json", 4 * MiB),
    ("merge.json", 4 * MiB),
    ("tokenizer*", 64 * MiB),  # (35 MB: Gemma 3)
    ("*.json", 64 * MiB),  # a tokenizer.json by another name
    ("*.model*", 64 * MiB),
    ("*", 4 * MiB),  # LICENSE, NOTICE, README.md
)
KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
         stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}


def has_model_file(folder: Path, name: str) -> bool:
    """Whether a folder has an entry of this name, of any kind; also a link that leads nowhere."""
    return os.path.lexists(folder / name)


def open_model_file(folder: Path, name: str) -> BinaryIO:
    """Open the file `name` of a model's folder for reading, in binary.

    UserError if there is no such file, or if its name, kind, place or size is refused (see the head
    of this module). Never waits: a FIFO and a device are refused without a read. All checks are
    made on the opened file, so a file that is exchanged meanwhile is refused too.
    """
    check_file_name(folder, name)
    path = folder / name
    target = os.path.realpath(path)
    if not any(Path(target).is_relative_to(root) for root in _allowed_roots(folder)):
        raise UserError(f"{path}: a link that leads outside the model folder, to {target}; copy "
                        "the file into the folder")
    try:
        _check_kind(path, os.stat(target))
        descriptor = os.open(target, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW)
    except OSError as e:
        raise _cannot_be_opened(path, e) from None
    file = os.fdopen(descriptor, "rb")
    try:
        status = os.fstat(descriptor)
        _check_kind(path, status)
        _check_size(path, status.st_size)
    except BaseException:
        file.close()
        raise
    return file


def check_model_file(folder: Path, name: str) -> Path:
    """Check a file as `open_model_file` does, and return its path, for a library that opens files
    by their path."""
    open_model_file(folder, name).close()
    return folder / name


def read_model_file(folder: Path, name: str) -> bytes:
    """The content of a file of a model's folder. UserError as for `open_model_file`."""
    limit = size_limit(name)
    with open_model_file(folder, name) as file:
        try:
            # a file may grow, and some files of the system say that their size is 0
            content = file.read() if limit is None else file.read(limit + 1)
        except OSError as e:
            raise _cannot_be_opened(folder / name, e) from None
    _check_size(folder / name, len(content))
    return content


def read_model_text(folder: Path, name: str) -> str:
    """The text of a file of a model's folder, which must be UTF-8."""
    try:
        return read_model_file(folder, name).decode()
    except UnicodeDecodeError as e:
        raise UserError(f"{folder / name}: not UTF-8 at byte {e.start}; download it again"
                        ) from None


def read_model_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of a model's folder, read strictly (see runtime/strict_json.py)."""
    return strict_json(read_model_file(folder, name), folder / name)


def read_model_json_if_present(folder: Path, name: str) -> dict[str, Any]:
    """As `read_model_json`, but empty if the folder has no entry of this name."""
    return read_model_json(folder, name) if has_model_file(folder, name) else {}


def copy_model_file(folder: Path, name: str, target: Path) -> None:
    """Copy the content of a file of a model's folder to the path `target`; a link becomes a file.

    UserError as for `open_model_file`. OSError if `target` cannot be written.
    """
    with open_model_file(folder, name) as source, open(target, "wb") as copy:
        shutil.copyfileobj(source, copy, MiB)


def check_file_name(folder: Path, name: Any) -> None:
    """UserError unless `name` is the plain name of a file: no path, no control characters."""
    plain = type(name) is str and name not in ("", ".", "..") and name.isprintable() \
        and not set(name) & set("/\\") and len(name.encode()) <= MAX_NAME_BYTES
    if not plain:
        raise UserError(f"{folder}: the file name {str(name)[:80]!r} leads outside the model "
                        "folder, or is not the plain name of a file; it is not opened. Download "
                        "the model again")


def size_limit(name: str) -> int | None:
    """The largest size of a file of this name, in bytes; None: no limit."""
    return next(limit for pattern, limit in SIZE_LIMITS if fnmatchcase(name, pattern))


def _allowed_roots(folder: Path) -> list[Path]:
    """The folders in which a file of `folder` may lie: itself and, for a snapshot in the hub's
    cache, the blobs of the same model."""
    root = Path(os.path.realpath(folder))
    roots = [root]
    for parent in root.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            roots.append(parent.parent / "blobs")
    return roots


def _check_kind(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "not a regular file")
        raise UserError(f"{path}: {kind}, expected a regular file; remove it, or download the "
                        "model again")


def _check_size(path: Path, size: int) -> None:
    limit = size_limit(path.name)
    if limit is not None and size > limit:
        raise UserError(f"{path}: {-(-size // MiB)} MB, expected at most {limit // MiB} MB for "
                        "such a file; download the model again")


def _cannot_be_opened(path: Path, error: OSError) -> UserError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return UserError(f"{path}: no such file; the model is incomplete, download it again")
    return UserError(f"{path}: cannot be read ({error.strerror}); check the file's permissions, or "
                     "download the model again")
