"""Damaged headers and configs, 20,000 of each in the long version: each is refused in one line, or
means what it says."""

from __future__ import annotations

import json
import random
import struct
import time

import numpy as np
import pytest
from safetensors import safe_open

from checkpoints.safetensors_header import read_header
from helpers import tiny
from helpers.mutations import mutate
from layers.config import ModelConfig
from runtime.console import UserError

N, N_LONG = 1_000, 20_000  # damaged headers, and damaged configs
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8", "I64": "<i8", "I32": "<i4",
          "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?", "U16": "<u2", "U32": "<u4",
          "U64": "<u8"}


def four_tensors() -> tuple[dict, bytes]:
    """A header and the data it describes: four tensors of different shapes and dtypes."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    draw = random.Random(0)
    for name, dtype, shape in (("a", "F32", [4, 3]), ("b.c", "BF16", [8]), ("d", "F16", [2, 2, 2]),
                               ("e", "F32", [5])):
        n = int(np.prod(shape)) * np.dtype(DTYPES[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + n]}
        data += bytes(draw.randrange(60) for _ in range(n))  # small bytes: finite in every dtype
    return header, data


def written(header: dict, data: bytes, draw: random.Random) -> bytes:
    """The file of a header, sometimes with its bytes or its length damaged too."""
    try:
        text = bytearray(json.dumps(header).encode())
    except ValueError:
        text = bytearray(b"{}")
    if draw.random() < 0.4:
        for _ in range(draw.randrange(1, 4)):
            at = draw.randrange(len(text))
            kind = draw.randrange(3)
            if kind == 0:
                text[at] = draw.choice(b'{}[]:,"0123456789-. eE\x00\xff')
            elif kind == 1:
                del text[at]
            else:
                part = text[at : at + draw.randrange(1, 60)]
                text[at:at] = part  # keys may now stand twice
            text = text or bytearray(b" ")
    n = len(text) + (draw.choice((-1, 1, 8, -8, 2**40, 2**63 - 1)) if draw.random() < 0.1 else 0)
    cut = len(data) - draw.choice((0, 0, 0, 1))
    return struct.pack("<Q", max(0, n)) + bytes(text) + data[:cut]


@pytest.mark.parametrize("n_headers", [N, pytest.param(N_LONG, marks=pytest.mark.slow)])
def test_no_damaged_header_is_read_as_something_it_does_not_say(tmp_path, n_headers):
    draw, (header, data), file = random.Random(1), four_tensors(), tmp_path / "x.safetensors"
    accepted = 0
    for i in range(n_headers):
        raw = written(mutate(header, draw), data, draw)
        if i == 0:  # as it is
            raw = struct.pack("<Q", len(json.dumps(header))) + json.dumps(header).encode() + data
        file.write_bytes(raw)
        begun = time.perf_counter()
        try:
            found = read_header(file)
        except UserError as e:
            assert "\n" not in str(e) and str(file) in str(e)
            continue
        finally:
            assert time.perf_counter() - begun < 2
        accepted += 1
        n = int.from_bytes(raw[:8], "little")
        told = json.loads(raw[8 : 8 + n])
        told.pop("__metadata__", None)
        assert found.keys() == told.keys()
        with safe_open(file, "np") as shard:
            for name, slot in found.items():
                begin, end = told[name]["data_offsets"]
                assert slot.shape == tuple(told[name]["shape"])
                assert slot.dtype == told[name]["dtype"]
                assert list(shard.get_slice(name).get_shape()) == list(slot.shape)
                width = np.dtype(DTYPES[slot.dtype]).itemsize
                size = int(np.prod(slot.shape, dtype=object)) * width
                assert end - begin == size and 8 + n + end <= len(raw)
                if slot.dtype != "BF16":
                    assert shard.get_tensor(name).tobytes() == raw[8 + n + begin : 8 + n + end]
    assert n_headers / 100 < accepted < n_headers / 2, accepted  # both sides were tried


@pytest.mark.parametrize("n_configs", [N, pytest.param(N_LONG, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", ["llama31", "qwen2-window", "smollm3-window", "gemma2", "gemma3"])
def test_no_damaged_config_crashes_or_hangs(shape, n_configs):
    draw = random.Random(f"2/{shape}")
    accepted = 0
    for _ in range(n_configs // 5):
        words = mutate(tiny.config(shape), draw)
        begun = time.perf_counter()
        try:
            ModelConfig.from_hf(words)
            accepted += 1
        except UserError as e:
            assert str(e).startswith("config.json: ")
        assert time.perf_counter() - begun < 2
    assert 0 < accepted < n_configs // 5
