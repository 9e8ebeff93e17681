"""Every piece with a gradient of its own, beside autograd's, in each dtype; it keeps less."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora
from helpers import tiny
from layers import functional as layers
from layers.config import ModelConfig

DTYPES = [torch.float32, torch.bfloat16]
CONFIG = ModelConfig.from_hf(tiny.config())


def both(ours, plain, *inputs):
    """Result and gradients of both; each gets inputs of its own."""
    results = []
    for function in (ours, plain):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        y = function(*leaves)
        torch.manual_seed(1)
        y.backward(torch.randn_like(y))
        results.append([y.detach(), *(x.grad for x in leaves)])
    return zip(*results, strict=True)


def near(pairs, dtype):
    """Equal to rounding; in 16 bits a value may be rounded at other places on the way."""
    for mine, theirs in pairs:
        assert mine.dtype == theirs.dtype
        loose = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(mine, theirs, rtol=loose, atol=loose)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_has_the_gradient_of_its_formula(dtype):
    x, weight = tiny.drawn(2, 5, 48).to(dtype), tiny.drawn(48)
    near(both(lambda x, w: layers._RMSNorm.apply(x, w, 1e-5),
              lambda x, w: F.rms_norm(x.float(), w.shape, w, 1e-5).to(x.dtype), x, weight), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_turn_has_the_gradient_of_its_formula(dtype):
    angles = tiny.drawn(2, 5, 1, 4)
    cos, sin = angles.cos() * 1.3, angles.sin() * 1.3  # yarn's amplitude: no plain rotation

    def plain(x):
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    x = tiny.drawn(2, 5, 3, 8).to(dtype)
    near(both(lambda x: layers.apply_rotary_emb(x, cos, sin), plain, x), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", layers.ACTIVATIONS)
def test_a_gate_has_the_gradient_of_its_formula(name, dtype):
    act = layers.ACTIVATIONS[name][0]
    near(both(lambda a, b: layers.swiglu(a, b, name), lambda a, b: act(a) * b,
              tiny.drawn(2, 5, 16).to(dtype), tiny.drawn(2, 5, 16, seed=1).to(dtype)), dtype)


@pytest.mark.parametrize("biased", [False, True])
def test_a_product_in_another_dtype_has_the_gradient_of_a_cast(biased):
    x, W, b = tiny.drawn(2, 5, 16).bfloat16(), tiny.drawn(8, 16), tiny.drawn(8)

    def ours(x, W, b):
        return layers._CastLinear.apply(x, W, b if biased else None) + 0 * b.sum().bfloat16()

    def plain(x, W, b):
        return F.linear(x, W.bfloat16(), b.bfloat16() if biased else None) \
            + 0 * b.sum().bfloat16()

    near(both(ours, plain, x, W, b), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_an_adapter_in_one_piece_has_the_gradient_of_its_formula(dtype, biased):
    base = nn.Linear(16, 8, bias=biased, dtype=dtype).requires_grad_(False)
    wrapped = lora.LoRALinear(base, 4, 8.0, 0.0, False, False)

    def ours(x, A, B):
        return lora._LoRAFunction.apply(x, A, B, base.bias, wrapped.scale, None, base.weight)

    def plain(x, A, B):
        return base(x) + F.linear(F.linear(x, A.to(dtype)) * wrapped.scale, B.to(dtype))

    near(both(ours, plain, tiny.drawn(2, 5, 16).to(dtype), tiny.drawn(4, 16), tiny.drawn(8, 4)),
         dtype)


def test_a_block_keeps_less_for_its_backward_pass_than_autograd_would():
    def kept(function, *inputs):
        sizes = {}

        def note(x):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            y = function(*inputs)
        mine = {x.untyped_storage().data_ptr() for x in inputs}
        return sum(n for address, n in sizes.items() if address not in mine), y

    x = tiny.drawn(2, 64, 256).bfloat16().requires_grad_()
    w = tiny.drawn(256).requires_grad_()
    few, _ = kept(lambda x, w: layers._RMSNorm.apply(x, w, 1e-5), x, w)
    many, _ = kept(lambda x, w: F.rms_norm(x.float(), w.shape, w, 1e-5).to(x.dtype), x, w)
    assert few < many / 50
    gate = tiny.drawn(2, 64, 256).bfloat16().requires_grad_()
    assert kept(lambda a, b: layers.swiglu(a, b, "silu"), gate, x)[0] == 0
