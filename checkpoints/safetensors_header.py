"""Headers of safetensors files: one file, or several shards with an index.

A file is accepted only if its header, its size and the index agree, if its name stays inside the
model folder, and if each tensor is stored once. No tensor is read here, except by
`weights_fingerprint`, which reads a few rows of each.
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

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
UNSAFE_FILES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.gguf")  # never opened
MAX_HEADER = 100 << 20  # bytes; the limit of the safetensors library


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is stored, with the dtype and shape that the header of its file gives."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    name: str  # its name in the file


def resolve_inside(folder: Path, name: Any) -> Path:
    """The path of a file in a folder. UserError if the name leaves the folder, or if there is no
    such file.

    Links of the hub's cache, from a snapshot to the blobs of the same model, are allowed.
    """
    if type(name) is not str or not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise UserError(f"{folder}: the file name {name!r} leads outside the model folder; it is "
                        "not opened. Download the model again")
    root, file = folder.resolve(), (folder / name).resolve()
    roots = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        roots.append(root.parent.parent / "blobs")
    if not any(file.is_relative_to(r) for r in roots):
        raise UserError(f"{folder / name}: a link that leads outside the model folder; copy the "
                        "file into the folder")
    if not file.is_file():
        raise UserError(f"{folder / name}: no such file; the model is incomplete, download it "
                        "again")
    return folder / name


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, from its header. UserError if the file is truncated,
    damaged or not a safetensors file."""
    size = file.stat().st_size
    with open(file, "rb") as f:
        header_size = int.from_bytes(f.read(8), "little")
        if size < 8 or header_size > MAX_HEADER:
            raise UserError(f"{file}: not a safetensors file ({size} bytes); download it again")
        data_start = 8 + header_size
        if size < data_start:
            raise UserError(f"{file}: {size} bytes, expected {data_start} for its header alone; "
                            "the file is truncated, download it again")
        header = strict_json(f.read(header_size), f"{file}, header")
    infos: dict[str, TensorInfo] = {}
    data_end = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            shape = tuple(map(int, entry["shape"]))
            _, end = map(int, entry["data_offsets"])
            infos[name] = TensorInfo(file, str(entry["dtype"]), shape, name)
        except (KeyError, TypeError, ValueError, OverflowError):
            raise UserError(f"{file}: its header is damaged at {name!r}; download it again"
                            ) from None
        data_end = max(data_end, end)
    expected = data_start + data_end
    if size != expected:
        change = "truncated" if size < expected else "longer than its header says"
        raise UserError(f"{file}: {size} bytes, expected {expected}; the file is {change}, "
                        "download it again")
    try:
        safe_open(file, "pt")  # the library checks gaps, overlaps, and sizes against shapes
    except (SafetensorError, OSError) as e:
        raise UserError(f"{file}: its header is damaged ({e}); download it again") from None
    return infos


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a model folder. UserError if the index and the shards disagree."""
    weight_map = _weight_map(folder)
    files = sorted(set(weight_map.values())) if weight_map else [WEIGHTS_FILE]
    if WEIGHTS_FILE not in files and os.path.lexists(folder / WEIGHTS_FILE):
        raise UserError(f"{folder}: contains both {WEIGHTS_FILE} and the shards of {INDEX_FILE}; "
                        "remove the one that you do not want")
    infos: dict[str, TensorInfo] = {}
    for file in files:
        shard = read_header(resolve_inside(folder, file))
        if twice := [k for k in shard if k in infos]:
            raise UserError(f"{folder}: {first_five(twice)} in {infos[twice[0]].file.name} and "
                            f"again in {file}; download the model again")
        infos |= shard
    if weight_map:
        stored = {k: info.file.name for k, info in infos.items()}
        names = {**weight_map, **stored}
        if differ := [k for k in names if weight_map.get(k) != stored.get(k)]:
            raise UserError(f"{folder}: {INDEX_FILE} and the shards disagree about "
                            f"{first_five(differ)}; download the model again")
    return infos


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> shard file, from the index; empty for a model in one file."""
    if not os.path.lexists(folder / INDEX_FILE):
        if not os.path.lexists(folder / WEIGHTS_FILE):
            raise UserError(f"{folder}: no {WEIGHTS_FILE} and no {INDEX_FILE} here, "
                            f"{_why_no_weights(folder)}")
        return {}
    weight_map = read_json(resolve_inside(folder, INDEX_FILE)).get("weight_map")
    if type(weight_map) is not dict or not weight_map:
        raise UserError(f"{folder / INDEX_FILE}: weight_map is missing or empty; download it "
                        "again")
    for file in weight_map.values():
        if type(file) is not str or not file.endswith(".safetensors"):
            raise UserError(f"{folder / INDEX_FILE}: names {file!r}, expected .safetensors files; "
                            "download the model again")
    return weight_map


def _why_no_weights(folder: Path) -> str:
    """What a folder holds in place of safetensors files, and what to do about it."""
    unsafe = sorted(f.name for pattern in UNSAFE_FILES for f in folder.glob(pattern))
    if unsafe:
        return (f"only {first_five(unsafe)}. Such files can run code when they are opened, or are "
                "quantized, so they are not read; convert them with transformers: "
                "AutoModelForCausalLM.from_pretrained(A).save_pretrained(B)")
    return ("and no other weights; download the model again. If its repository has only .bin "
            "files, convert them with transformers")


def weights_fingerprint(infos: Mapping[str, TensorInfo]) -> str:
    """A sha256 of a model's weights: of the first, middle and last row of every tensor, in bf16.

    It does not depend on the files' dtype or layout, nor on a stored copy of a tied head.
    """
    digest = hashlib.sha256()
    for name in sorted(infos):
        info = infos[name]
        if name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight" or not info.shape:
            continue
        tensor = safe_open(info.file, "pt").get_slice(info.name)
        rows: list[int | slice] = [slice(None)]
        if len(info.shape) > 1:
            rows = sorted({0, info.shape[0] // 2, info.shape[0] - 1})
        digest.update(f"{name} {info.shape}".encode())
        for row in rows:
            x = tensor[row].to(torch.bfloat16).contiguous()
            digest.update(x.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def first_five(names: Iterable[str]) -> str:
    """Up to five names, and the number of the others."""
    names = list(names)
    text = ", ".join(names[:5])
    if len(names) > 5:
        text += f" and {len(names) - 5} more"
    return text
