"""The table of dtypes: its names are those of safetensors and of --dtype."""

import torch
from safetensors.torch import load, save

from runtime import dtypes


def test_safetensors_itself_uses_the_names_of_the_table():
    for dtype, name in dtypes.SAFETENSORS_NAMES.items():
        data = save({"x": torch.zeros(3).to(dtype)})
        assert f'"dtype":"{name}"'.encode() in data and load(data)["x"].dtype == dtype


def test_names_of_flags_lead_to_their_dtypes_and_back():
    assert dtypes.FLAG_DTYPES == {
        "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    assert {name: dtype for dtype, name in dtypes.FLAG_NAMES.items()} == dtypes.FLAG_DTYPES
    assert set(dtypes.SAFETENSORS_FLOATS) == {"F64", "F32", "F16", "BF16"}
