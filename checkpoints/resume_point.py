"""Resume points: checkpoints that all ranks write in the background while training goes on.

    checkpoints/step-000200/  {model,optimizer}-{rank}.safetensors  state.json  manifest.json

A checkpoint exists when its folder has its name: all files are written into `.tmp-...`, flushed to
the disk, and then the folder is renamed, so a kill at any moment leaves the earlier checkpoints. A
torn write can leave a file of the right length, and safetensors has no checksum, so the manifest
holds the sha256 of each file, and `find_newest` accepts only checkpoints that match it.

No rank holds the whole state: each writes its own shards, as rows that begin at `NAME@ROW`, and the
tensors that are not sharded are divided among the ranks. Each rank reads the rows that it needs
from the files of all ranks. Training waits only for the copy to host memory.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data import sha256
from runtime import distributed
from runtime.console import FLAGS, STORAGE, UserError, info
from runtime.distributed import Distributed
from runtime.dtypes import SAFETENSORS_NAMES
from runtime.temporary import (
    NAME,
    OLD_NAME,
    Temporary,
    fsync,
    remove_leftovers,
    remove_renamed,
    set_aside,
    temporary_path,
)

FORMAT = 2  # format 1 had one file for each state dict, with whole tensors under their names
MANIFEST = "manifest.json"
STEP_FOLDER = re.compile(r"step-(\d{6,})")
CHUNK = 4 << 20  # bytes that are written and hashed at a time
FAILURES_ALLOWED = 2  # saves that may fail one after the other

StateDicts = dict[str, dict[str, Tensor]]  # {"model": {name: tensor}, "optimizer": {...}}
FileRecord = list  # [bytes, sha256], as the manifest has it


class AsyncCheckpointer:
    """Writes the checkpoints of a run in a background thread, on all ranks alike.

    `save` copies the tensors and returns. A checkpoint gets its name when every rank has written
    its files, and only the training loop knows that: it calls `poll` between steps when no rank is
    `busy`, and `finish` where it must wait. All ranks call these three methods at the same step.
    """

    def __init__(
        self, root: Path, keep: int, ranks: Distributed | None = None, keep_later: bool = True
    ):
        """`keep` checkpoints stay under `root`. `keep_later`: checkpoints of later steps, which a
        resumed run left behind, stay too."""
        if keep < 2:
            raise UserError(f"--keep {keep}: must be at least 2, because the last checkpoint may "
                            "be incomplete", FLAGS)
        self.root, self.keep, self.keep_later = root, keep, keep_later
        self.ranks = ranks or Distributed(0, 1, torch.device("cpu"))
        self.temporary: Temporary | None = None  # of rank 0: the folder of the save under way
        self.pool = ThreadPoolExecutor(1, "checkpointer")
        self.pending: Future | None = None  # this rank's part of the stage that is under way
        self.publishing = False  # the second stage: all files are written, rank 0 renames
        self.saved = 0  # complete checkpoints so far
        self.failures = 0  # one after the other
        self.must_succeed = False

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self.pending is not None and not self.pending.done()

    def save(self, step: int, state_dicts: StateDicts, state: dict[str, Any]) -> None:
        """Begin to write root/step-NNNNNN. The tensors may change as soon as this returns."""
        self.finish()
        if os.path.islink(self.root):
            raise UserError(f"{self.root}: is a link, and a run writes only inside its own folder; "
                            "put a real folder there", STORAGE)
        self.step = step
        self.folder = self.root / f"step-{step:06}"
        self.state = json.dumps({"format": FORMAT, **state})  # the run goes on changing `state`
        self.size = sum(x.numel() * x.element_size()
                        for tensors in state_dicts.values() for x in tensors.values())
        copies = {part: self._copy_own_rows(tensors) for part, tensors in state_dicts.items()}
        path, self.temporary = temporary_path(self.folder), None
        with suppress(OSError):  # _write meets the same error and reports it to the other ranks
            if self.ranks.rank == 0:
                self.root.mkdir(parents=True, exist_ok=True)
                remove_leftovers(self.root, restore=False)
                self.temporary = Temporary(self.folder, folder=True, path=path)
        self.new_folder = Path(self.ranks.all_gather_text(str(path))[0])  # waits for rank 0
        self.pending = self.pool.submit(self._write, copies)

    def poll(self) -> None:
        """Go on to the next stage. To be called when no rank is `busy`.

        UserError (STORAGE) if the disk refuses at the first save of a run, or for the third time in
        a row. Other failures are printed, and the next save tries again.
        """
        if self.pending is None:
            return
        files: dict[str, FileRecord] = {}
        fault = ""
        try:
            files = self.pending.result() or {}
        except OSError as e:  # tell the other ranks, which wait for this one
            fault = str(e) or repr(e)
        reports = [json.loads(x) for x in self.ranks.all_gather_text(json.dumps([files, fault]))]
        self.pending = None
        fault = self._first_fault([fault for _, fault in reports])
        if fault:
            self.publishing = False
            self._on_failure(fault)
        elif not self.publishing:
            self.publishing = True
            all_files = {name: record for files, _ in reports for name, record in files.items()}
            if self.ranks.rank == 0:
                self.pending = self.pool.submit(self._publish, all_files)
            else:
                self.pending = self.pool.submit(dict)
        else:
            self.publishing = False
            self.failures = 0
            self.saved += 1

    def finish(self, must_succeed: bool = False) -> None:
        """Wait until the checkpoint that was begun is complete. With `must_succeed` every failure
        is a UserError."""
        self.must_succeed = must_succeed
        while self.pending is not None:
            wait([self.pending])
            self.poll()

    def _copy_own_rows(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this rank writes: copies in host memory, named NAME@FIRST_ROW."""
        copies = {}
        for i, (name, x) in enumerate(tensors.items()):
            first, rows = distributed.local_shard(x.detach())
            if distributed.is_dtensor(x):
                write = rows.numel() > 0
            else:
                write = i % self.ranks.world_size == self.ranks.rank
            if write:
                copies[f"{name}@{first}"] = rows.to("cpu", copy=True).contiguous()
        return copies

    def _write(self, state_dicts: StateDicts) -> dict[str, FileRecord]:
        """Write and flush this rank's files."""
        self.new_folder.parent.mkdir(parents=True, exist_ok=True)
        if self.ranks.rank == 0 and self.temporary is None:
            self.temporary = Temporary(self.folder, folder=True, path=self.new_folder)
        self.new_folder.mkdir(exist_ok=True)  # another machine may not see it yet
        records = {}
        for part, tensors in state_dicts.items():
            name = f"{part}-{self.ranks.rank}.safetensors"
            records[name] = write_safetensors(self.new_folder / name, tensors)
        return records

    def _publish(self, files: dict[str, FileRecord]) -> None:
        """Write state and manifest, rename the folder, and remove old checkpoints."""
        assert self.temporary is not None
        state = self.new_folder / "state.json"
        state.write_text(self.state, encoding="utf-8")
        files = {**files, "state.json": [state.stat().st_size, sha256(state)]}
        manifest = self.new_folder / MANIFEST
        manifest.write_text(json.dumps(files, indent=1), encoding="utf-8")
        for path in (state, manifest, self.new_folder):
            fsync(path)
        with ExitStack() as replaced:
            if os.path.lexists(self.folder):
                replaced.enter_context(set_aside(self.folder))
            self.temporary.replace()
        self._remove_old()

    def _remove_old(self) -> None:
        """Keep the newest `keep` checkpoints up to this step. Later ones are damaged, or belong to
        work that was lost, so they do not count."""
        folders = _step_folders(self.root)
        up_to_here = [x for x in folders if _step(x) <= self.step]
        surplus = up_to_here[:-self.keep]
        if not self.keep_later:
            surplus += folders[len(up_to_here):]
        for folder in surplus:
            remove_renamed(folder)

    def _first_fault(self, faults: list[str]) -> str:
        """The fault of the first rank that has one, with its number if there are several."""
        for rank, fault in enumerate(faults):
            if fault:
                return f"rank {rank}: {fault}" if self.ranks.world_size > 1 else fault
        return ""

    def _on_failure(self, fault: str) -> None:
        if self.temporary:
            self.temporary.remove()
        self.failures += 1
        existing = self.root.absolute()
        while not os.path.exists(existing):
            existing = existing.parent
        message = (f"{self.folder}: cannot be written: needs {self.size:,} bytes, "
                   f"{shutil.disk_usage(existing).free:,} are free ({fault}); earlier checkpoints "
                   "are complete. Make room")
        if self.failures > FAILURES_ALLOWED or self.must_succeed or not self.saved:
            raise UserError(f"{message} and --resume", STORAGE)
        info(f"{message}; training goes on, the next save tries again")


def save_checkpoint(root: Path, step: int, state_dicts: StateDicts, state: dict[str, Any],
                    keep: int) -> Path:
    """Write root/step-NNNNNN by this process alone, and wait until it is complete.

    UserError: FLAGS if `keep` is below 2, STORAGE if the disk refuses. Earlier checkpoints are then
    unchanged.
    """
    checkpointer = AsyncCheckpointer(root, keep)
    checkpointer.save(step, state_dicts, state)
    checkpointer.finish()
    return checkpointer.folder


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> FileRecord:
    """Write CPU tensors as a new safetensors file and flush it. Returns [bytes, sha256].

    The format is a length, a JSON header and the bytes. It is written here, and not by the library,
    so that the hash needs no second pass, and Python's lock is free while training goes on.
    """
    tensors = dict(sorted(tensors.items(), key=lambda x: -x[1].element_size()))  # keeps alignment
    header, end = {}, 0
    for name, x in tensors.items():
        start, end = end, end + x.numel() * x.element_size()
        header[name] = {"dtype": SAFETENSORS_NAMES[x.dtype], "shape": list(x.shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    blocks = [len(text).to_bytes(8, "little"), text]
    blocks += [x.reshape(-1).view(torch.uint8).numpy().data for x in tensors.values()]
    digest = hashlib.sha256()
    with open(path, "xb") as file:
        try:
            for block in blocks:
                for start in range(0, len(block), CHUNK):
                    chunk = block[start : start + CHUNK]
                    file.write(chunk)
                    digest.update(chunk)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            path.unlink(missing_ok=True)  # metrics.jsonl needs the room for its next line
            raise
    return [8 + len(text) + end, digest.hexdigest()]


def find_newest(root: Path) -> Path | None:
    """The newest checkpoint that matches its manifest. Damaged ones are named and passed over."""
    for folder in reversed(_step_folders(root)):
        fault = _find_fault(folder)
        if fault is None:
            return folder
        info(f"{folder}: {fault}; looking for an earlier one")
    return _restore_renamed(root)


def _restore_renamed(root: Path) -> Path | None:
    """A complete checkpoint under a temporary name, renamed back. Replacing the only checkpoint
    takes two renames, and a kill between them leaves it without its name."""
    if not root.is_dir():
        return None
    for path in sorted(root.iterdir()):
        match = NAME.fullmatch(path.name) or OLD_NAME.fullmatch(path.name)
        if match and STEP_FOLDER.fullmatch(match["target"]) and not path.is_symlink() \
                and _find_fault(path) is None:
            folder = root / match["target"]
            if not os.path.lexists(folder):
                path.rename(folder)
                return folder
    return None


class CheckpointReader:
    """An open checkpoint: its `state`, and any rows of its tensors."""

    def __init__(self, folder: Path):
        from safetensors import safe_open

        self.folder = folder
        self.files = ExitStack()
        self.state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        version = self.state.get("format", 1)
        if version > FORMAT:
            raise UserError(f"{folder}: written by a newer version of this program (format "
                            f"{version}, this version reads up to {FORMAT}); update, or resume "
                            "with that version")
        # state dict -> tensor -> [(its first row, the rows as a slice of the file)]
        self.pieces: dict[str, dict[str, list[tuple[int, Any]]]] = {}
        for name in json.loads((folder / MANIFEST).read_text(encoding="utf-8")):
            if name.endswith(".safetensors"):
                file = self.files.enter_context(safe_open(folder / name, "pt"))
                tensors = self.pieces.setdefault(re.split(r"[-.]", name)[0], {})
                for key in file.keys():
                    tensor, first = key, 0  # format 1
                    if "@" in key:
                        tensor, _, first = key.rpartition("@")
                    tensors.setdefault(tensor, []).append((int(first), file.get_slice(key)))

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.files.close()

    def names(self, part: str) -> list[str]:
        """The names of the tensors in a state dict."""
        return list(self.pieces.get(part, {}))

    def read_rows(self, part: str, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """Rows of a tensor from `first` on: `count` of them, or all."""
        pieces = sorted(self.pieces[part][name], key=lambda x: x[0])
        if not pieces[0][1].get_shape():
            return pieces[0][1][...]
        if count is None:
            last = pieces[-1][0] + pieces[-1][1].get_shape()[0]
        else:
            last = first + count
        rows = []
        for start, piece in pieces:
            begin, end = max(first, start), min(last, start + piece.get_shape()[0])
            if begin < end:
                rows.append(piece[begin - start : end - start])
        if not rows:
            return pieces[0][1][0:0]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def read_like(self, part: str, name: str, like: Tensor) -> Tensor:
        """A tensor, sharded among the ranks as `like` is."""
        if not distributed.is_dtensor(like):
            return self.read_rows(part, name)
        first, local = distributed.local_shard(like)
        x = self.read_rows(part, name, first, len(local))
        if x.dim() == 0:  # AdamW's count of steps
            return x
        return distributed.to_dtensor(x.to(local), like)


def read_checkpoint(folder: Path) -> tuple[StateDicts, dict[str, Any]]:
    """A checkpoint's state dicts (whole tensors, on the CPU) and its state."""
    with CheckpointReader(folder) as reader:
        state_dicts = {part: {name: reader.read_rows(part, name) for name in reader.names(part)}
                       for part in reader.pieces}
        return state_dicts, reader.state


def claim_run_folder(out: Path) -> Path:
    """Create a run's folder if it is missing, and return its real path.

    UserError (FLAGS) if the folder or its checkpoints cannot be written, or if it holds a link.
    """
    path = out
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file in out.iterdir():
            if file.is_symlink():
                raise UserError(f"{file}: is a link, and a run writes only inside its own folder; "
                                "put the real file there, or name another folder", FLAGS)
        (out / ".lock").touch()
        for path in (out / "checkpoints", out / "best"):  # these may be on other disks
            if path.exists():
                tempfile.TemporaryFile(dir=path).close()
    except OSError as e:
        raise UserError(f"--out {path}: cannot be written ({e.strerror}); name another folder",
                        FLAGS) from None
    real = out.resolve()
    return out if real == out.absolute() else real


@contextmanager
def lock_run_folder(out: Path) -> Iterator[None]:
    """Hold OUT/.lock, so that one run at a time writes the folder. The system releases the lock
    when the process ends, however it ends. UserError (FLAGS) if another process holds it."""
    with open(out / ".lock", "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {out}: another run is writing there; wait, or name another "
                            "folder", FLAGS) from None
        yield


def _step_folders(root: Path) -> list[Path]:
    """The folders of checkpoints by step, oldest first. Links are not ours."""
    if not root.is_dir():
        return []
    folders = [Path(x.path) for x in os.scandir(root)
               if STEP_FOLDER.fullmatch(x.name) and x.is_dir(follow_symlinks=False)]
    return sorted(folders, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _find_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if every file matches the manifest."""
    try:
        text = (folder / MANIFEST).read_bytes()
        manifest = json.loads(text)
        if text != json.dumps(manifest, indent=1).encode():  # a changed space is damage too
            return f"{MANIFEST} is not as it was written"
        for name, (size, digest) in manifest.items():
            path = folder / name
            if path.parent != folder or path.is_symlink() or not path.is_file():
                return f"{name} is not a file of its own"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, expected {size}"
            if sha256(path) != digest:
                return f"{name} is damaged (sha256)"
        return None if "state.json" in manifest else "its manifest is incomplete"
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as e:
        return f"incomplete ({e})"
