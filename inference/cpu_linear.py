"""Linear layers for decoding on a CPU, where reading the weights bounds the speed.

`optimize_for_inference` replaces the linear layers of a model by modules that multiply few rows
fast. Such a model generates text and computes losses; it cannot train or be saved. Without oneDNN's
kernels for the device and dtype, the layers stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layers.functional import Linear
from lora import LoRALinear, adapters
from model import Llama

PACKED_ROWS = 8  # the number of rows that a packed weight is laid out for; any number is allowed
GEMV_ROWS = 64  # for more rows, x W^T is faster than W x^T
AMX = torch.cpu._is_amx_tile_supported()


class MkldnnPackedLinear(nn.Module):
    """y = W x + b with W in the memory layout of oneDNN's matrix product.

    A plain linear layer brings W into that layout for every product. For few rows this costs more
    than the product itself.
    """

    def __init__(self, layer: Linear):
        super().__init__()
        weight = layer.weight.detach()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (...,in) -> (...,out)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class GemvLinear(Linear):
    """y = W x + b computed as W x^T, with W in its usual layout.

    In bf16 with AMX, oneDNN reads the left matrix of a product in place. This is faster than a
    packed matrix on the right (bench.generate).
    """

    def __init__(self, layer: Linear):
        nn.Module.__init__(self)  # shares the weight: nothing is allocated
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (...,in) -> (...,out)."""
        rows = x.flatten(0, -2)  # (n,in)
        if len(rows) > GEMV_ROWS:
            return super().forward(x)
        W, b = self.weight, self.bias
        if len(rows) == 1:
            y = torch.mv(W, rows[0]) if b is None else torch.addmv(b, W, rows[0])  # (out,)
        else:
            y = (W @ rows.T if b is None else torch.addmm(b[:, None], W, rows.T)).T  # (n,out)
        return y.reshape(*x.shape[:-1], -1)


def supports_packed_weights(model: Llama) -> bool:
    """Whether oneDNN has packed-weight products for the model's device and compute dtype."""
    if model.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if model.compute_dtype == torch.float32:
        return True
    if model.compute_dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def linear_names(model: Llama) -> list[str]:
    """Names of the plain linear layers whose weight is in the compute dtype.

    The base layer of a DoRA adapter is not among them: DoRA reads its weight as a matrix.
    """
    dora = {m.base_layer for m in model.modules()
            if isinstance(m, LoRALinear) and m.lora_magnitude_vector is not None}
    return [name for name, m in model.named_modules()
            if type(m) is Linear and m.weight.dtype == model.compute_dtype and m not in dora]


def untie_head(model: Llama) -> None:
    """Give a model with tied embeddings an lm_head module that shares the embedding's weight."""
    if model.lm_head is None:
        width, vocabulary = model.head.shape[::-1]
        head = Linear(width, vocabulary, bias=False, device="meta")
        head.weight = model.model.embed_tokens.weight
        model.set_lm_head(head)


def cast_adapters(model: Llama) -> None:
    """Convert LoRA factors to the compute dtype once, so that no product has to cast them.

    DoRA's factors stay in float32, because row norms are computed from them.
    """
    for adapter in adapters(model).values():
        if adapter.lora_magnitude_vector is None:
            adapter.lora_A.to(model.compute_dtype)
            adapter.lora_B.to(model.compute_dtype)


@torch.no_grad()
def optimize_for_inference(model: Llama, keep_head_weight: bool = False, amx: bool = AMX) -> None:
    """Replace the model's linear layers by the fastest ones for few rows, where there are such.

    `keep_head_weight` keeps the output weight in its usual layout as well: losses need it. `amx`
    says whether the CPU has AMX tiles.
    """
    cast_adapters(model)
    if not supports_packed_weights(model):
        return
    untie_head(model)
    gemv = amx and model.compute_dtype == torch.bfloat16
    for name in linear_names(model):
        layer = model.get_submodule(name)
        replacement = GemvLinear(layer) if gemv else MkldnnPackedLinear(layer)
        if name == "lm_head" and keep_head_weight and not gemv:
            replacement.register_parameter("weight", layer.weight)
        model.set_submodule(name, replacement)
    for p in model.parameters():  # frees the pages of the file; a memory-mapped matrix is slower
        p.data = p.data.clone()
