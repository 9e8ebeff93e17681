"""Headers of safetensors files: one file, or several shards with an index.

A file is accepted only if its header, its size and the index agree, if its name stays inside the
model folder, and if each tensor is stored once. Lengths, names, shapes and offsets are bounded and
checked here, before the library reads them. No tensor is read here, except by
`weights_fingerprint`, which reads a few rows of each.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from runtime.console import UserError
from runtime.model_files import (
    check_file_name,
    check_model_file,
    has_model_file,
    open_model_file,
    read_model_json,
)
from runtime.strict_json import shorten, strict_json

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
UNSAFE_FILES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.gguf")  # never opened
MAX_HEADER = 16 << 20  # bytes: 130,000 tensors; a published file has at most some 10,000
MAX_TENSORS = 1 << 17  # in a file
MAX_DIMENSIONS = 8
MAX_TENSOR_NAME = 512  # characters
DTYPE_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2,
               "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8,
               "F64": 8, "C64": 8}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is stored, with the dtype and shape that the header of its file gives."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    name: str  # its name in the file


def open_safetensors(file: Path) -> Any:
    """Map a safetensors file of a model's folder into memory; the reader of the library."""
    try:
        return safe_open(check_model_file(file.parent, file.name), "pt")
    except (SafetensorError, OSError) as e:
        raise UserError(f"{file}: its header is damaged ({e}); download it again") from None


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, from its header. UserError if the file is truncated,
    damaged or not a safetensors file."""
    with open_model_file(file.parent, file.name) as f:
        size = f.seek(0, 2)
        f.seek(0)
        header_size = int.from_bytes(f.read(8), "little")
        if size < 8 or header_size > MAX_HEADER:
            raise UserError(f"{file}: not a safetensors file ({size} bytes); download it again")
        data_start = 8 + header_size
        if size < data_start:
            raise UserError(f"{file}: {size} bytes, expected {data_start} for its header alone; "
                            "the file is truncated, download it again")
        header = strict_json(f.read(header_size), f"{file}, header")
    header.pop("__metadata__", None)  # the library checks it
    if len(header) > MAX_TENSORS:
        raise UserError(f"{file}: {len(header):,} tensors, expected at most {MAX_TENSORS:,}; "
                        "download it again")
    infos: dict[str, TensorInfo] = {}
    offsets = []
    for name, entry in header.items():
        fault = _entry_fault(name, entry)
        if fault:
            raise UserError(f"{file}: its header is damaged at {shorten(name)}: {fault}; download "
                            "it again")
        infos[name] = TensorInfo(file, entry["dtype"], tuple(entry["shape"]), name)
        offsets.append((*entry["data_offsets"], name))
    data_end = max((end for _, end, _ in offsets), default=0)
    expected = data_start + data_end
    if size != expected:
        change = "truncated" if size < expected else "longer than its header says"
        raise UserError(f"{file}: {size} bytes, expected {expected}; the file is {change}, "
                        "download it again")
    _check_offsets(file, offsets)
    open_safetensors(file)  # the library agrees
    return infos


def _entry_fault(name: str, entry: Any) -> str | None:
    """What is wrong with a tensor's entry in a header; None if its name, dtype, shape and number
    of bytes agree."""
    if not re.fullmatch(r"[!-~]+", name) or len(name) > MAX_TENSOR_NAME:
        return (f"a name of {len(name):,} characters, expected 1 to {MAX_TENSOR_NAME}, letters and "
                "signs of ASCII")
    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return f"{shorten(entry)}, expected dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPE_BYTES:
        return f"dtype is {shorten(dtype)}, expected one of {', '.join(DTYPE_BYTES)}"
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        return f"shape is {shorten(shape)}, expected up to {MAX_DIMENSIONS} sizes"
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"data_offsets is {shorten(offsets)}, expected where its bytes begin and end"
    n_bytes = math.prod(shape) * DTYPE_BYTES[dtype]  # an int of Python does not overflow
    if offsets[1] - offsets[0] != n_bytes:
        return f"{offsets[1] - offsets[0]} bytes, expected {n_bytes} for {dtype} {shape}"
    return None


def _are_sizes(x: Any) -> bool:
    """Whether x is a list of whole numbers from 0 to 2^63."""
    return type(x) is list and all(type(i) is int and 0 <= i < 1 << 63 for i in x)


def _check_offsets(file: Path, offsets: list[tuple[int, int, str]]) -> None:
    """UserError if two tensors share bytes, or if bytes belong to no tensor."""
    position = 0
    for begin, end, name in sorted(offsets):
        if begin != position:
            fault = "overlaps another tensor" if begin < position else "follows unused bytes"
            raise UserError(f"{file}: its header is damaged at {name!r}: it begins at byte "
                            f"{begin}, expected {position}, so it {fault}; download it again")
        position = end


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a model folder. UserError if the index and the shards disagree."""
    weight_map = _weight_map(folder)
    files = sorted(set(weight_map.values())) if weight_map else [WEIGHTS_FILE]
    if WEIGHTS_FILE not in files and has_model_file(folder, WEIGHTS_FILE):
        raise UserError(f"{folder}: contains both {WEIGHTS_FILE} and the shards of {INDEX_FILE}; "
                        "remove the one that you do not want")
    infos: dict[str, TensorInfo] = {}
    for file in files:
        shard = read_header(check_model_file(folder, file))
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
    if has_model_file(folder, INDEX_FILE):
        return read_index(folder)["weight_map"]
    if not has_model_file(folder, WEIGHTS_FILE):
        raise UserError(f"{folder}: no {WEIGHTS_FILE} and no {INDEX_FILE} here, "
                        f"{_why_no_weights(folder)}")
    return {}


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a sharded model. UserError unless it names plain .safetensors files."""
    index = read_model_json(folder, INDEX_FILE)
    weight_map, metadata = index.get("weight_map"), index.setdefault("metadata", {})
    if type(weight_map) is not dict or not weight_map:
        raise UserError(f"{folder / INDEX_FILE}: weight_map is missing or empty; download it "
                        "again")
    if type(metadata) is not dict:
        raise UserError(f"{folder / INDEX_FILE}: metadata is {shorten(metadata)}, expected an "
                        "object; download it again")
    for file in weight_map.values():
        if type(file) is not str or not file.endswith(".safetensors"):
            raise UserError(f"{folder / INDEX_FILE}: names {shorten(file)}, expected .safetensors "
                            "files; download the model again")
    for file in set(weight_map.values()):
        check_file_name(folder, file)
    return index


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
        tensor = open_safetensors(info.file).get_slice(info.name)
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
    text = ", ".join(name if len(name) <= 80 else name[:77] + "..." for name in names[:5])
    if len(names) > 5:
        text += f" and {len(names) - 5} more"
    return text
