"""The resume point: written aside, flushed, named, verified, by all ranks, while training goes on.

    checkpoints/step-000200/  {model,optimizer}-{rank}.safetensors  state.json  manifest.json

A checkpoint exists when its folder has its name: everything is written into `.tmp-...`, flushed to
the disk, and renamed, so a kill at any moment leaves the ones before. safetensors has no checksum
and a torn write leaves a file of the right length, so the manifest holds each file's sha256 and
`newest` believes nothing else.

No rank ever holds the whole: each writes what it has, tensors that are cut as their rows from
`NAME@ROW` on, whole ones dealt out among the ranks; and each reads the rows it needs, whoever wrote
them. Training waits only for the copy to host memory. Where the cores that write are the cores that
train, writing takes what is left of them, a fortieth of one at most, until somebody waits for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data import sha256
from runtime import distributed as shares
from runtime.console import FLAGS, STORAGE, UserError, say
from runtime.distributed import Ranks
from runtime.dtypes import SAFETENSORS_NAMES

FORMAT = 2  # 1: one file a part, whole tensors under their names
NAME = re.compile(r"step-(\d{6,})")
ASIDE = re.compile(r"\.(?:tmp|del)-(.+)-(\d+)")  # with the process that made it
MANIFEST = "manifest.json"
CHUNK = 4 << 20  # bytes written and hashed at a time
RESTS = 39  # on a CPU: seconds that a second's writing is followed by

Parts = dict[str, dict[str, Tensor]]


class Saver:
    """Writes one run's resume points in the background, on all ranks alike.

    `save` copies and returns. A checkpoint has its name when every rank has written its files, and
    only the loop knows that: it calls `advance` between steps when no rank is `busy`, and `finish`
    where it must wait. These three are called by all ranks at once.
    """

    def __init__(self, root: Path, keep: int, ranks: Ranks | None = None, later: bool = True):
        if keep < 2:
            raise UserError(f"--keep {keep}: at least 2, as the last may be half written", FLAGS)
        self.root, self.keep, self.later = root, keep, later  # whether later steps may stay
        self.ranks = ranks or Ranks(0, 1, torch.device("cpu"))
        self.owner = int(self.ranks.gather(str(os.getpid()))[0])  # one aside for all, rank 0's
        self.pool = ThreadPoolExecutor(1, "saver")
        # does the pool's work at its leisure: most people may not raise a thread they have lowered
        self.idle = ThreadPoolExecutor(1, "saver-idle", _lower)
        self.awaited = threading.Event()  # somebody waits for what is written: no more leisure
        self.work: Future | None = None  # this rank's part of what is under way
        self.naming = False  # all is written; rank 0 gives the name
        self.saved = self.failures = 0  # whole ones so far; refusals in a row
        self.must = False

    @property
    def busy(self) -> bool:
        """Whether this rank is still at work."""
        return self.work is not None and not self.work.done()

    def save(self, step: int, parts: Parts, state: dict[str, Any]) -> None:
        """Begin to write root/step-NNNNNN; the tensors may change as soon as this returns."""
        self.finish()
        if os.path.islink(self.root):
            raise UserError(f"{self.root}: is a link, and a run writes nowhere but in its folder",
                            STORAGE)
        self.folder = self.root / f"step-{step:06}"
        self.aside = self.root / f".tmp-{self.folder.name}-{self.owner}"
        self.step = step
        self.state = json.dumps({"format": FORMAT, **state})  # now: the run goes on changing it
        self.need = sum(x.numel() * x.element_size() for t in parts.values() for x in t.values())
        pieces = {part: self._copied(tensors) for part, tensors in parts.items()}
        with suppress(OSError):  # which _write meets too, and tells the other ranks
            if self.ranks.rank == 0:
                self.root.mkdir(parents=True, exist_ok=True)
                sweep(self.root)
        self.ranks.barrier()
        self.work = self.pool.submit(self._write, pieces)

    def _copied(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this rank writes of a part, in host memory, by name and first row."""
        found = {}
        for i, (name, x) in enumerate(tensors.items()):
            first, rows = shares.rows(x.detach())
            mine = rows.numel() > 0 if shares.is_cut(x) else i % self.ranks.world == self.ranks.rank
            if mine:
                found[f"{name}@{first}"] = rows.to("cpu", copy=True).contiguous()
        return found

    def _write(self, pieces: Parts) -> dict[str, list]:
        """This rank's files, flushed: {name: [bytes, sha256]}."""
        self.aside.mkdir(parents=True, exist_ok=True)
        return {(name := f"{part}-{self.ranks.rank}.safetensors"):
                write_tensors(self.aside / name, tensors, self._at_leisure)
                for part, tensors in pieces.items()}

    def _at_leisure(self, work: Callable[[], object]) -> None:
        """Do a piece of work; beside training on a CPU, in what that leaves of it, then rest."""
        if self.ranks.device.type != "cpu" or self.awaited.is_set():
            work()
        else:
            self.awaited.wait(RESTS * self.idle.submit(_timed, work).result())

    def advance(self) -> None:
        """One stage further, now that no rank is at work; UserError (STORAGE) where a disk refuses:
        at the first save of a run, or for the third time in a row. Else that is said."""
        if self.work is None:
            return
        files, fault = {}, ""
        try:
            files = self.work.result() or {}
        except OSError as e:  # of any kind, for the other ranks wait for what this one says
            fault = str(e) or repr(e)
        said = [json.loads(x) for x in self.ranks.gather(json.dumps([files, fault]))]
        fault = next((f"rank {i}: {x}" if self.ranks.world > 1 else x
                      for i, (_, x) in enumerate(said) if x), "")
        self.work = None
        if fault:
            self.naming = False
            self._give_up(fault)
        elif not self.naming:
            self.naming = True
            files = {name: x for part, _ in said for name, x in part.items()}
            self.work = self.pool.submit(self._name, files) if self.ranks.rank == 0 \
                else self.pool.submit(dict)
        else:
            self.naming, self.failures, self.saved = False, 0, self.saved + 1

    def finish(self, must: bool = False) -> None:
        """Wait until what was begun is there; with `must`, any refusal is a UserError."""
        self.must = must
        self.awaited.set()
        while self.work is not None:
            wait([self.work])
            self.advance()
        self.awaited.clear()

    def _give_up(self, fault: str) -> None:
        if self.ranks.rank == 0:
            shutil.rmtree(self.aside, ignore_errors=True)
        self.failures += 1
        there = next(x for x in (self.root, *self.root.absolute().parents)
                     if os.path.exists(x))
        line = (f"{self.folder}: cannot be written: needs {self.need:,} bytes, "
                f"{shutil.disk_usage(there).free:,} are free ({fault}); earlier checkpoints "
                "are whole. Make room")
        if self.failures == 3 or self.must or not self.saved:
            raise UserError(f"{line} and --resume", STORAGE)
        say(f"{line}; going on, the next save tries again")

    def _name(self, files: dict[str, list]) -> None:
        """Describe what all ranks wrote, give it its name, and let the oldest go. The newest `keep`
        up to this step stay."""
        (self.aside / "state.json").write_text(self.state, encoding="utf-8")
        state = self.aside / "state.json"
        files = {**files, "state.json": [state.stat().st_size, sha256(state)]}
        (self.aside / MANIFEST).write_text(json.dumps(files, indent=1), encoding="utf-8")
        for path in (state, self.aside / MANIFEST, self.aside):
            _flush(path)
        replaced = _put_aside(self.folder) if os.path.lexists(self.folder) else None
        try:
            self.aside.rename(self.folder)
        except OSError:
            if replaced:
                replaced.rename(self.folder)
            raise
        _flush(self.root)
        if replaced:
            _remove(replaced)
        steps = _steps(self.root)  # later ones are damaged, or of lost work: they push nothing out
        before = [x for x in steps if _step(x) <= self.step]
        for old in before[:-self.keep] + ([] if self.later else steps[len(before):]):
            _remove(_put_aside(old))


def save(root: Path, step: int, parts: Parts, state: dict[str, Any], keep: int) -> Path:
    """Write root/step-NNNNNN by this process alone, and wait for it.

    UserError: FLAGS if `keep` is below 2, STORAGE if the disk refuses; what was there before is
    then as it was.
    """
    saver = Saver(root, keep)
    saver.save(step, parts, state)
    saver.finish()
    return saver.folder


def write_tensors(path: Path, tensors: dict[str, Tensor],
                  do: Callable[[Callable[[], object]], object] = lambda work: work()) -> list:
    """Write CPU tensors as a new safetensors file, flushed: [its bytes, its sha256].

    The format is a length, a JSON header and the bytes; written here so that the hash is taken on
    the way, and so that Python's lock is free meanwhile: training goes on. `do` does a piece of the
    work, as it is called.
    """
    header, at = {}, 0
    tensors = dict(sorted(tensors.items(), key=lambda x: -x[1].element_size()))  # keeps alignment
    for name, x in tensors.items():
        end = at + x.numel() * x.element_size()
        header[name] = {"dtype": SAFETENSORS_NAMES[x.dtype], "shape": list(x.shape),
                        "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()

    def put(chunk: bytes | memoryview) -> None:
        file.write(chunk)
        digest.update(chunk)

    with open(path, "xb") as file:
        try:
            for block in (len(text).to_bytes(8, "little"), text, *(
                    x.reshape(-1).view(torch.uint8).numpy().data for x in tensors.values())):
                for start in range(0, len(block), CHUNK):
                    do(partial(put, block[start : start + CHUNK]))
            file.flush()
            do(partial(os.fsync, file.fileno()))  # the system's work for all that was written
        except OSError:
            path.unlink(missing_ok=True)  # the room it took is needed for a line of metrics.jsonl
            raise
    return [8 + len(text) + at, digest.hexdigest()]


def _lower() -> None:
    """Let a thread have of the cores what others leave."""
    with suppress(OSError):  # a courtesy: a container may refuse it
        if sys.platform == "linux":  # where a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _timed(work: Callable[[], object]) -> float:
    """Seconds that a piece of work took of a core."""
    begun = time.thread_time()
    work()
    return time.thread_time() - begun


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
        if left and NAME.fullmatch(left[1]) and not path.is_symlink() and _fault(path) is None:
            folder = root / left[1]
            if not os.path.lexists(folder):
                path.rename(folder)
                return folder
    return None


class Saved:
    """A checkpoint, open for reading: its state, and any rows of its tensors."""

    def __init__(self, folder: Path):
        from safetensors import safe_open

        self.folder, self.files = folder, ExitStack()
        self.state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if (found := self.state.get("format", 1)) > FORMAT:
            raise UserError(f"{folder}: written by a newer version of this program (format {found},"
                            f" this one reads up to {FORMAT}); update, or resume with that version")
        self.pieces: dict[str, dict[str, list]] = {}  # part -> tensor -> [(first row, slice)]
        for name in json.loads((folder / MANIFEST).read_text(encoding="utf-8")):
            if name.endswith(".safetensors"):
                file = self.files.enter_context(safe_open(folder / name, "pt"))
                part = self.pieces.setdefault(re.split(r"[-.]", name)[0], {})
                for key in file.keys():
                    tensor, _, row = key.rpartition("@") if "@" in key else (key, "", 0)
                    part.setdefault(tensor, []).append((int(row), file.get_slice(key)))

    def __enter__(self) -> Saved:
        return self

    def __exit__(self, *_: object) -> None:
        self.files.close()

    def rows(self, part: str, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """Rows of a tensor from `first` on, `count` of them or all."""
        pieces = sorted(self.pieces[part][name], key=lambda x: x[0])
        if not pieces[0][1].get_shape():
            return pieces[0][1][...]
        last = pieces[-1][0] + pieces[-1][1].get_shape()[0] if count is None else first + count
        found = []
        for start, piece in pieces:
            a, b = max(first, start), min(last, start + piece.get_shape()[0])
            if a < b or not found:
                found.append(piece[a - start : b - start] if a < b else piece[0:0])
        return found[0] if len(found) == 1 else torch.cat(found)

    def like(self, part: str, name: str, like: Tensor) -> Tensor:
        """A tensor for one that stands here: of one that is cut among ranks, the same rows."""
        if not shares.is_cut(like):
            return self.rows(part, name)
        first, local = shares.rows(like)
        x = self.rows(part, name, first, len(local))
        return shares.as_cut(x.to(local), like) if x.dim() else x  # AdamW's count of steps


def read(folder: Path) -> tuple[Parts, dict[str, Any]]:
    """A checkpoint's parts (whole tensors, on the CPU) and state."""
    with Saved(folder) as saved:
        return ({part: {name: saved.rows(part, name) for name in tensors}
                 for part, tensors in saved.pieces.items()}, saved.state)


def claim(out: Path) -> Path:
    """A run's folder, made where there is none; links to it are followed here and then no more.
    UserError (FLAGS) if it, or resume points in it, cannot be written, or it holds a link."""
    written = out
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in out.iterdir():
            if path.is_symlink():
                raise UserError(f"{path}: is a link, and a run writes nowhere but in its folder; "
                                "put the real thing there, or name another folder", FLAGS)
        (out / ".lock").touch()
        for written in (out / "checkpoints", out / "best"):  # perhaps on disks of their own
            if written.exists():
                tempfile.TemporaryFile(dir=written).close()
    except OSError as e:
        raise UserError(f"--out {written}: cannot be written ({e.strerror}); name another folder",
                        FLAGS) from None
    real = out.resolve()
    return out if real == out.absolute() else real


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Hold OUT/.lock: one run at a time writes a folder. The system lets go of it however the
    process ends. UserError (FLAGS) if another holds it."""
    with open(out / ".lock", "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {out}: another run is writing there; wait, or name another "
                            "folder", FLAGS) from None
        yield


def _steps(root: Path) -> list[Path]:
    """Checkpoints by step, oldest first; links are not ours."""
    found = [Path(x.path) for x in os.scandir(root) if NAME.fullmatch(x.name)
             and x.is_dir(follow_symlinks=False)] if root.is_dir() else []
    return sorted(found, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if every file is what the manifest says."""
    try:
        written = (folder / MANIFEST).read_bytes()
        manifest = json.loads(written)
        if written != json.dumps(manifest, indent=1).encode():  # nor is another blank its own
            return f"{MANIFEST} is not as it was written"
        for name, (size, digest) in manifest.items():
            path = folder / name
            if path.parent != folder or path.is_symlink() or not path.is_file():
                return f"{name} is no file of its own"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, expected {size}"
            if sha256(path) != digest:
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


def sweep(root: Path) -> None:
    """Remove what killed processes left behind in a folder, if there is one."""
    for path in root.iterdir() if root.is_dir() else ():
        left = ASIDE.fullmatch(path.name)
        if left and not path.is_symlink() and not _others(int(left[2])):
            _remove(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file as a checkpoint is written: whenever a kill comes, the old one is there or
    the new one."""
    aside = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    _flush(aside)
    aside.replace(path)
    _flush(path.parent)


def _others(pid: int) -> bool:
    """Whether another process lives by this id."""
    try:
        os.kill(pid, 0)
    except OSError as e:
        return isinstance(e, PermissionError)  # another user's
    return pid != os.getpid()


def _flush(path: Path) -> None:
    """Make the disk hold what was written: a file's bytes, or a folder's names."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
