"""The table of dtypes: torch's dtype, the name in our flags, the name in safetensors files.

Everything else that translates between these names is derived from `TABLE`.
"""

import torch

# (torch's dtype, the value of --dtype or None, the name in a safetensors header)
TABLE = (
    (torch.float64, None, "F64"),
    (torch.float32, "fp32", "F32"),
    (torch.float16, "fp16", "F16"),
    (torch.bfloat16, "bf16", "BF16"),
    (torch.int64, None, "I64"),
    (torch.int32, None, "I32"),
    (torch.int16, None, "I16"),
    (torch.int8, None, "I8"),
    (torch.uint8, None, "U8"),
    (torch.bool, None, "BOOL"),
)

FLAG_NAMES = {dtype: flag for dtype, flag, _ in TABLE if flag}
FLAG_DTYPES = {flag: dtype for dtype, flag, _ in TABLE if flag}
SAFETENSORS_NAMES = {dtype: name for dtype, _, name in TABLE}
# the dtypes that a model's weights may have in a file
SAFETENSORS_FLOATS = {name: dtype for dtype, _, name in TABLE if dtype.is_floating_point}
