"""The resume point: written aside, flushed, named, verified.

    checkpoints/step-000200/  {model,optimizer,rng}.safetensors  state.json  manifest.json

A checkpoint exists when its folder has its name: everything is written into `.tmp-...`, flushed to
the disk, and renamed, so a kill at any moment leaves the ones before. safetensors has no checksum
and a torn write leaves a file of the right length, so the manifest holds each file's sha256 and
`newest` believes nothing else.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from log import FLAGS, STORAGE, UserError, say

NAME = re.compile(r"step-(\d{6,})")
ASIDE = re.compile(r"\.(?:tmp|del)-(step-\d+)-(\d+)")  # with the process that made it
MANIFEST = "manifest.json"
REFUSALS = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES}


def save(root: Path, step: int, parts: dict[str, dict[str, Tensor]], state: dict[str, Any],
         keep: int) -> Path:
    """Write root/step-NNNNNN: a safetensors file for each part, state.json and the manifest.

    The newest `keep` up to this step stay. UserError: FLAGS if `keep` is below 2, STORAGE if the
    disk refuses; what was there before is then as it was.
    """
    if keep < 2:
        raise UserError(f"--keep {keep}: at least 2, as the last may be half written", FLAGS)
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    root.mkdir(parents=True, exist_ok=True)
    _sweep(root)
    folder = root / f"step-{step:06}"
    aside = root / f".tmp-{folder.name}-{os.getpid()}"
    replaced = None
    try:
        aside.mkdir()
        for part, tensors in parts.items():
            save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()},
                      aside / f"{part}.safetensors")
        (aside / "state.json").write_text(json.dumps(state), encoding="utf-8")
        files = sorted(p for p in aside.iterdir())
        manifest = {p.name: [p.stat().st_size, _sha256(p)] for p in files}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        umask = os.umask(0)
        os.umask(umask)
        for path in [*files, aside / MANIFEST]:
            path.chmod(0o666 & ~umask)  # safetensors writes 0600
            _flush(path)
        _flush(aside)
        if os.path.lexists(folder):
            replaced = _put_aside(folder)
        aside.rename(folder)
        _flush(root)
    except (OSError, SafetensorError) as e:
        if replaced and not os.path.lexists(folder):
            replaced.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(e, OSError) and e.errno not in REFUSALS:
            raise
        need = sum(x.numel() * x.element_size() for part in parts.values() for x in part.values())
        raise UserError(
            f"{folder}: cannot be written: needs {need:,} bytes, "
            f"{shutil.disk_usage(root).free:,} are free ({e}); earlier checkpoints are whole. "
            "Make room and --resume", STORAGE) from None
    if replaced:
        _remove(replaced)
    # a later step is a damaged one that this run went back behind: it must not push good ones out
    for old in [x for x in _steps(root) if _step(x) <= step][:-keep]:
        _remove(_put_aside(old))
    return folder


def newest(root: Path) -> Path | None:
    """The newest checkpoint that is what its manifest says; damaged ones are named and passed
    over."""
    for folder in reversed(_steps(root)):
        fault = _fault(folder)
        if fault is None:
            return folder
        say(f"{folder}: {fault}; looking for an earlier one")
    # replacing the only one is two renames: a kill between them leaves it whole, without its name
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        left = ASIDE.fullmatch(path.name)
        if left and not path.is_symlink() and _fault(path) is None:
            folder = root / left[1]
            if not os.path.lexists(folder):
                path.rename(folder)
                return folder
    return None


def read(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """A checkpoint's parts (tensors on the CPU) and state."""
    from safetensors.torch import load_file

    files = [folder / name for name in json.loads((folder / MANIFEST).read_text(encoding="utf-8"))]
    parts = {path.stem: load_file(path) for path in files if path.suffix == ".safetensors"}
    return parts, json.loads((folder / "state.json").read_text(encoding="utf-8"))


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Hold OUT/.lock: one run at a time writes a folder. The system lets go of it however the
    process ends. UserError (FLAGS) if another holds it."""
    path = out / ".lock"
    if path.is_symlink():
        raise UserError(f"{path}: is a link, and a run writes nowhere but in its folder", FLAGS)
    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--out {out}: another run is writing there; wait, or name another folder", FLAGS
            ) from None
        yield


def _steps(root: Path) -> list[Path]:
    """Checkpoints by step, oldest first; links are not ours."""
    found = (
        [p for p in root.iterdir() if NAME.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]
        if root.is_dir()
        else [])
    return sorted(found, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if every file is what the manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, (size, digest) in manifest.items():
            path = folder / name
            if path.parent != folder or path.is_symlink() or not path.is_file():
                return f"{name} is no file of its own"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, expected {size}"
            if _sha256(path) != digest:
                return f"{name} is damaged (sha256)"
        return None if "state.json" in manifest else "its manifest is incomplete"
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as e:
        return f"incomplete ({e})"


def _put_aside(folder: Path) -> Path:
    """Take a checkpoint's name away before its files: half a removed one must not look like one."""
    gone = folder.with_name(f".del-{folder.name}-{os.getpid()}")
    folder.rename(gone)
    return gone


def _remove(gone: Path) -> None:
    if gone.is_dir() and not gone.is_symlink():
        shutil.rmtree(gone, ignore_errors=True)  # what stays goes with the next sweep
    else:
        gone.unlink()  # a link, or a file: what it names is not ours


def _sweep(root: Path) -> None:
    """Remove what killed processes left behind."""
    for path in root.iterdir():
        left = ASIDE.fullmatch(path.name)
        if (left and not path.is_symlink()
            and not (int(left[2]) != os.getpid() and _alive(int(left[2])))):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _flush(path: Path) -> None:
    """Make the disk hold what was written: a file's bytes, or a folder's names."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
