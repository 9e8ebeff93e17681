"""Writes a folder of a model or an adapter, atomically.

What a folder will hold besides numbers is decided first, as a `ModelFolder`: all small files are in
memory, and for each weights file the names and dtypes of its tensors are known. A run does this
before step 1, so at its end nothing is read any more and nothing can be refused.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoints.atomic_write import check_replaceable, replace_folder
from checkpoints.model_folder import MODEL_FILES
from runtime.console import NON_FINITE, STORAGE, UserError
from runtime.distributed import full_tensor
from runtime.paths import is_utf8
from runtime.temporary import temporary_path

REPLACEABLE = (*MODEL_FILES, "README.md")  # files of an older result, which may be replaced


@dataclass
class ModelFolder:
    """What `write_model_folder` writes: small files by name, and for each weights file the dtypes
    of its tensors by name. `metadata` goes into every weights file."""

    files: dict[str, bytes]
    shards: dict[str, dict[str, torch.dtype]]
    metadata: dict[str, str] = field(default_factory=lambda: {"format": "pt"})

    def tensor_bytes(self, state: Mapping[str, Tensor]) -> int:
        """Bytes of all tensors, in the dtypes in which they are written."""
        return sum(state[name].numel() * dtype.itemsize
                   for dtypes in self.shards.values() for name, dtype in dtypes.items())


def write_model_folder(contents: ModelFolder, state: Mapping[str, Tensor], folder: Path,
                       write: bool = True) -> None:
    """Write a folder; `state` has the tensors by name. The old folder is replaced when the new one
    is complete.

    If tensors are sharded among ranks, every rank calls this function, and one of them with
    `write`. UserError if the folder cannot be written, or if a number overflows in its dtype.
    """
    if not write:
        for dtypes in contents.shards.values():
            for name in dtypes:
                full_tensor(state[name])  # every rank takes part in gathering it
        return
    with replace_folder(folder, REPLACEABLE) as temporary:
        write_files(temporary, contents.files)
        for file, dtypes in contents.shards.items():
            tensors = {name: full_tensor(state[name]).detach().to("cpu", dtype).contiguous()
                       for name, dtype in dtypes.items()}
            for name, x in tensors.items():
                _check_overflow(name, state[name], x)
            save_file(tensors, temporary / file, metadata=contents.metadata)


def rehearse_model_folder(contents: ModelFolder, folder: Path) -> None:
    """Try to write a folder, before there are tensors to write.

    The small files and one weights file of each name, with one number, are written to a temporary
    folder next to `folder`, which is renamed and removed. UserError for every error that
    `write_model_folder` would meet there.
    """
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"{folder}: a link that leads nowhere; remove it", STORAGE)
    if folder.exists():
        if not folder.is_dir():
            raise UserError(f"{folder}: a file, where a folder will be written; move it away",
                            STORAGE)
        check_replaceable(folder, REPLACEABLE)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"{folder}: cannot be replaced (no permission to write)", STORAGE)
        if os.path.ismount(folder):
            raise UserError(f"{folder}: a mount point, which cannot be replaced; give a folder "
                            "below it", STORAGE)
    folder = folder.resolve()  # a link is followed, as when the folder is written
    if not is_utf8(str(folder)):
        raise UserError(f"{folder}: its path is not UTF-8, and safetensors cannot open it; give "
                        "another", STORAGE)
    hidden = temporary_path(folder.with_name("rehearsal"))
    try:
        with replace_folder(hidden, ("*",)) as temporary:
            write_files(temporary, contents.files)
            for file in contents.shards:
                save_file({"x": torch.zeros(1)}, temporary / file, metadata=contents.metadata)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write small files by name."""
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _check_overflow(name: str, x: Tensor, written: Tensor) -> None:
    """UserError if `written`, x in the dtype of the file, holds a NaN or an infinity."""
    if is_finite(written):
        return
    if written.dtype != x.dtype:
        raise UserError(f"{name}: a number is too large for {written.dtype}, the dtype of the "
                        "base's files; use a base in bf16 or fp32, or a lower --lr")
    raise UserError(f"{name} holds NaN or infinity after training; resume from an earlier "
                    "checkpoint with a lower --lr", NON_FINITE)


def is_finite(x: Tensor) -> bool:
    """Whether x holds no NaN and no infinity. Makes no copy.

    A sum shows both, and is the fastest pass over memory. If the sum itself overflows, the extremes
    decide.
    """
    x = x.detach()
    return bool(x.sum().isfinite() or torch.stack(torch.aminmax(x)).isfinite().all())


def check_finite(x: Tensor, what: str) -> None:
    """UserError if x, which was read from a file, holds a NaN or an infinity."""
    if not is_finite(x):
        raise UserError(f"{what} holds NaN or infinity in {x.dtype}; download it again, or use a "
                        "wider dtype")
