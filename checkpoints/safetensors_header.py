"""What safetensors files hold, by their headers alone: one file, or many and an index.

One idea: a file is believed only where it agrees with itself. Header, size and index must say the
same; a name leads to a file inside the folder or nowhere; a tensor stands in one place. No tensor
is read here but for `mark`, which samples each.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from runtime.console import UserError
from runtime.strict_json import read_json, strict_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NOT_READ = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.gguf")
MAX_HEADER = 100 << 20  # bytes: safetensors' own limit


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies and what it is there, as its file's header says."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    name: str  # its name in the file


def inside(folder: Path, name: Any) -> Path:
    """The file of that plain name in a folder; UserError if it lies elsewhere, or is no file.

    The hub's cache links a snapshot's files to the model's blobs; any other way out is refused.
    """
    if type(name) is not str or not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise UserError(f"{folder}: file name {name!r} leads outside the model folder; refused")
    root, file = folder.resolve(), (folder / name).resolve()
    roots = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        roots.append(root.parent.parent / "blobs")
    if not any(file.is_relative_to(r) for r in roots):
        raise UserError(f"{folder / name}: a link that leads outside the model folder; copy the "
                        "file into it")
    if not file.is_file():
        raise UserError(f"{folder / name}: no such file; the model is not complete, fetch it again")
    return folder / name


def header(file: Path) -> dict[str, Slot]:
    """What a safetensors file holds, by its header; UserError if cut short or of another kind."""
    size = file.stat().st_size
    with open(file, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        if size < 8 or n > MAX_HEADER:
            raise UserError(f"{file}: {size} bytes that are no safetensors file; fetch it again")
        if size < 8 + n:
            raise UserError(f"{file}: {size} bytes, expected {8 + n} for its header alone; it was "
                            "cut short, fetch it again")
        words = strict_json(f.read(n), f"{file}, header")
    found, end = {}, 0
    for name, x in words.items():
        if name != "__metadata__":
            try:
                shape, (_, stop) = tuple(map(int, x["shape"])), map(int, x["data_offsets"])
                found[name] = Slot(file, str(x["dtype"]), shape, name)
            except (KeyError, TypeError, ValueError, OverflowError):
                raise UserError(f"{file}: header damaged at {name!r}; fetch it again") from None
            end = max(end, stop)
    if size != 8 + n + end:
        how = "cut short" if size < 8 + n + end else "added to"
        raise UserError(f"{file}: {size} bytes, expected {8 + n + end}; {how}, fetch it again")
    try:
        safe_open(file, "pt")  # the library's own look at holes, overlaps, shapes against sizes
    except (SafetensorError, OSError) as e:
        raise UserError(f"{file}: header damaged ({e}); fetch it again") from None
    return found


def contents(folder: Path) -> dict[str, Slot]:
    """Every tensor of a folder's model, shard by shard; UserError if index and shards disagree."""
    if not os.path.lexists(folder / SINGLE) and not os.path.lexists(folder / INDEX):
        other = sorted(f.name for pattern in NOT_READ for f in folder.glob(pattern))
        why = f"only {five(other)}, not read because such files can run code when opened or are " \
              "quantised; convert with transformers: AutoModelForCausalLM.from_pretrained(A)" \
              ".save_pretrained(B)" if other else "no weights that are read; fetch the model " \
              "again, or, if its repository has only .bin files, convert those with transformers"
        raise UserError(f"{folder}: no {SINGLE} and no {INDEX} here, {why}")
    told, files = None, [SINGLE]
    if os.path.lexists(folder / INDEX):
        told = read_json(inside(folder, INDEX)).get("weight_map")
        if type(told) is not dict or not told:
            raise UserError(f"{folder / INDEX}: weight_map is missing or empty; fetch it again")
        for file in told.values():
            if type(file) is not str or not file.endswith(".safetensors"):
                raise UserError(f"{folder / INDEX}: names {file!r}, expected .safetensors files")
        files = sorted(set(told.values()))
        if SINGLE not in files and os.path.lexists(folder / SINGLE):
            raise UserError(f"{folder}: holds {SINGLE} and also the shards of {INDEX}; remove the "
                            "one that is not meant")
    found: dict[str, Slot] = {}
    for file in files:
        here = header(inside(folder, file))
        if twice := [k for k in here if k in found]:
            raise UserError(f"{folder}: {five(twice)} in {found[twice[0]].file.name} and again in "
                            f"{file}; which is meant cannot be known")
        found |= here
    if told is not None:
        where = {k: slot.file.name for k, slot in found.items()}
        if astray := [k for k in {**told, **where} if told.get(k) != where.get(k)]:
            raise UserError(f"{folder}: {INDEX} and the shards disagree about {five(astray)}; "
                            "fetch the model again")
    return found


def mark(found: Mapping[str, Slot]) -> str:
    """A sha256 by which a model is known again: of rows of every tensor, in bf16.

    The same numbers in another dtype, layout or with a copy of a tied head have the same mark.
    """
    sha = hashlib.sha256()
    for name in sorted(found):
        slot = found[name]
        if name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight" or not slot.shape:
            continue
        part = safe_open(slot.file, "pt").get_slice(slot.name)
        rows = sorted({0, slot.shape[0] // 2, slot.shape[0] - 1}) if len(slot.shape) > 1 else [
            slice(None)]
        sha.update(f"{name} {slot.shape}".encode())
        for row in rows:
            x = part[row].to(torch.bfloat16).contiguous()
            sha.update(x.view(torch.int16).numpy().tobytes())
    return sha.hexdigest()


def five(names: Iterable[str]) -> str:
    """Up to five names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
