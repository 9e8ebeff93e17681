"""Products in eight bits beside float32 products of the same rounded factors, and a run beside
bf16's; this torch multiplies eight bits on a CPU too."""

from __future__ import annotations

import copy

import pytest
import torch

import lora
import train
from data import Batch
from helpers import tiny
from layers import fp8
from layers.functional import Linear
from runtime.console import UserError
from runtime.distributed import Distributed
from training import optimizer as optim
from training.objective import NLL

ALONE = Distributed(0, 1, torch.device("cpu"))
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What eight bits make of x, in float32."""
    scale = x.float().abs().max() / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype).float() * scale


def layer(bias: bool, out: int = 48, width: int = 32, **where) -> fp8.Fp8Linear:
    """A layer in float32 with drawn weights."""
    linear = Linear(width, out, bias=bias, **where)
    linear.weight.data = tiny.drawn(out, width, seed=1).to(linear.weight.device)
    if bias:
        linear.bias.data = tiny.drawn(out, seed=2).to(linear.bias.device)
    return fp8.Fp8Linear.from_linear(linear)


def both(linear: fp8.Fp8Linear, dtype: torch.dtype):
    """(ours, by formula) of y, dx, dW and, if there is one, db."""
    device = linear.weight.device
    x = tiny.drawn(2, 16, 32, seed=3).to(device, dtype).requires_grad_()
    g = (tiny.drawn(2, 16, 48, seed=4) * 1e-6).to(device, dtype)  # as small as gradients are
    y = linear(x)
    y.backward(g)
    W, flat = linear.weight.detach().to(dtype), x.detach().flatten(0, 1)
    g8, x8 = rounded(g.flatten(0, 1), fp8.E5M2), rounded(flat, fp8.E4M3)
    W8 = rounded(W, fp8.E4M3)
    bias = 0 if linear.bias is None else linear.bias.detach().to(dtype).float()
    mine = [y, x.grad, linear.weight.grad]
    formula = [(x8 @ W8.T + bias).view(2, 16, 48), (g8 @ W8).view(x.shape), g8.T @ x8]
    if linear.bias is not None:
        mine.append(linear.bias.grad)
        formula.append(g.flatten(0, 1).sum(0))
    return [(a.detach().float(), b.float()) for a, b in zip(mine, formula, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_products_and_both_gradients_are_those_of_the_rounded_factors(dtype, bias):
    linear = layer(bias)
    loose = {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]  # of a result's own rounding
    for i, (mine, formula) in enumerate(both(linear, dtype)):
        assert tiny.apart(mine, formula) < (loose if i != 2 else 1e-6)  # dW is as W is kept
    assert linear.weight.grad.dtype == torch.float32
    exact = tiny.drawn(2, 16, 32, seed=3) @ linear.weight.detach().T
    assert 1e-3 < tiny.apart(linear(tiny.drawn(2, 16, 32, seed=3)).detach()
                             - (linear.bias.detach() if bias else 0), exact) < 0.1


def test_zeros_stay_zeros_and_what_is_not_finite_is_seen():
    linear = layer(False)
    x = torch.zeros(4, 16, 32, requires_grad=True)
    y = linear(x)
    y.backward(torch.zeros_like(y))
    assert not y.any() and not x.grad.any() and not linear.weight.grad.any()
    x = tiny.drawn(1, 16, 32).requires_grad_()
    g = torch.ones(1, 16, 48)
    g[0, 3, 5] = float("inf")
    linear(x).backward(g)
    assert not linear.weight.grad.isfinite().any() and not x.grad.isfinite().any()


def test_the_blocks_linear_layers_alone_and_only_while_they_train():
    model = tiny.ours(tiny.peer("llama3"), "llama3")
    same, names = copy.deepcopy(model), [n for n, _ in model.named_parameters()]
    fp8.convert_to_fp8(model)
    eight = [n for n, m in model.named_modules() if isinstance(m, fp8.Fp8Linear)]
    assert len(eight) == 7 * 2 and all(".layers." in n for n in eight)
    assert [n for n, _ in model.named_parameters()] == names
    ids = tiny.tokens(2, 16)
    with torch.no_grad():
        assert torch.equal(tiny.logits(model, ids), tiny.logits(same, ids))
    assert not torch.equal(tiny.logits(model, ids), tiny.logits(same, ids))


def test_a_run_in_eight_bits_ends_near_the_loss_of_one_in_bf16():
    ends, begins = [], []
    for narrow in (False, True):
        model = tiny.ours(tiny.peer("llama3", **WIDE), "llama3", torch.bfloat16, **WIDE).train()
        model.initialise(0)
        if narrow:
            fp8.convert_to_fp8(model)
        optimizer = optim.adamw(model, 5e-3, (0.9, 0.95), 0.1)
        ids = tiny.tokens(2, 17, seed=5) % 40 + 3
        doc, pos = torch.zeros(2, 16, dtype=torch.long), torch.arange(16).expand(2, 16)
        batch = Batch(ids[:, :-1], ids[:, 1:], doc, pos)
        losses = [train.train_step(model, NLL, [batch], optimizer, ALONE, 1.0)[0]
                  for _ in range(20)]
        begins.append(losses[0])
        ends.append(losses[-1])
    assert ends[0] < begins[0] / 2, "it learns"
    assert begins[1] == pytest.approx(begins[0], rel=1e-3)
    assert ends[1] == pytest.approx(ends[0], rel=0.1) and ends[1] != ends[0]


def test_where_it_cannot_be_it_is_refused_in_one_line(monkeypatch):
    model = tiny.ours(tiny.peer("llama3"), "llama3")
    gpu = torch.device("cuda")
    with pytest.raises(UserError, match="--dtype fp8: needs a GPU that multiplies eight bits") as e:
        fp8.check(model, torch.device("cpu"), 32)
    assert e.value.code == 2 and "\n" not in str(e.value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(UserError, match="needs a GPU that multiplies eight bits"):
        fp8.check(model, gpu, 32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    fp8.check(model, gpu, 32)
    with pytest.raises(UserError, match="multiples of 16"):
        fp8.check(model, gpu, 40)
    lora.add_lora(model, 4, 8, 0.0, ["all-linear"])
    with pytest.raises(UserError, match="is for all weights"):
        fp8.check(model, gpu, 32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("bias", [False, True])
def test_a_gpus_products_are_those_of_the_rounded_factors(bias):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU multiplies no eight bits")
    for mine, formula in both(layer(bias, device="cuda"), torch.bfloat16):
        assert tiny.apart(mine, formula) < 1e-2
