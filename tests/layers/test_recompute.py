"""Selective activation checkpointing: norms and gates are made again to the bit, no product is."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.flop_counter import FlopCounterMode

import lora
from helpers import tiny
from layers import attention, fp8, nf4
from runtime.console import UserError

WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
WAYS = {"full": {}, "lora": {}, "dora": {"dora": True, "dropout": 0.1}, "qlora": {}, "fp8": {}}


def wide(shape: str, tune: str, dtype: torch.dtype):
    """A model that trains in that way; the adapter's B is drawn too, so that all has a gradient."""
    model = tiny.ours(tiny.peer(shape, **WIDE), shape, **WIDE)
    model.model.compute_dtype = dtype
    if tune == "fp8":
        fp8.use(model)
    if tune in ("full", "fp8"):
        return model.train()
    model.to(dtype)
    for name, m in list(model.named_modules()) if tune == "qlora" else ():
        if nf4.fits(name, m):
            model.set_submodule(name, nf4.NF4Linear(m.weight, m.bias, double=True))
    torch.manual_seed(0)
    lora.attach(model, 4, 8, WAYS[tune].get("dropout", 0.0), ["all-linear"],
                dora=WAYS[tune].get("dora", False), whole=["norm"] if tune == "lora" else [])
    for m in lora.adapters(model).values():
        torch.nn.init.normal_(m.lora_B.weight, std=0.1)
    return model.train()


def step(model, count: bool = True):
    """Bytes kept for the backward pass, FLOP of products, gradients by name."""
    ids, doc = tiny.tokens(2, 40, seed=1), (torch.arange(40) >= 25).long().expand(2, 40)
    pos = torch.arange(40).expand(2, 40)
    weights = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    held: dict[int, int] = {}

    def note(x):
        held[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    real = torch.autograd.graph.saved_tensors_hooks.__init__

    def init(self, pack, unpack):  # within Light its own hooks are asked, and these are not
        real(self, lambda x: note(y) if torch.is_tensor(y := pack(x)) else y, unpack)

    torch.manual_seed(3)  # of dropout
    work = FlopCounterMode(display=False)
    with pytest.MonkeyPatch.context() as patched, work if count else nullcontext():
        patched.setattr(torch.autograd.graph.saved_tensors_hooks, "__init__", init)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            loss = model(ids, doc, pos, ids).sum()
        loss.backward()
    kept = sum(size for key, size in held.items() if key not in weights)
    return kept, count and work.get_total_flops(), {
        n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape, tune", [
    ("llama3", "full"), ("llama3", "lora"), ("llama3", "dora"), ("llama3", "qlora"),
    ("llama3", "fp8"), ("gemma2", "full"), ("olmo2", "lora"), ("qwen3", "qlora"),
    ("biases", "full")])
def test_norms_and_gates_are_made_again_to_the_bit_and_no_product_is(shape, tune, dtype):
    plain, light = wide(shape, tune, dtype), wide(shape, tune, dtype)
    light.model.light = True
    kept, work, gradients = step(plain)
    less, as_much, same = step(light)
    assert as_much == work
    assert all(torch.equal(gradients[n], same[n]) for n in gradients)
    norms = {"gemma2": 2, "olmo2": 0}.get(shape, 2)  # a layer's whose results products read
    read = (norms * 64 + 128) * dtype.itemsize * 2 * 40 * len(plain.model.layers)
    read *= tune != "dora"  # with dropout they read what it left, which is kept
    assert kept - less == pytest.approx(read, rel=0.01)


@pytest.mark.parametrize("tune", ["full", "lora", "fp8"])
def test_a_compiler_is_told_to_keep_the_products_alone(monkeypatch, tune):
    """By how it parts each graph, which then runs as it is; attention as on a GPU: on a CPU it is
    no part of a compiled block."""
    model = wide("llama3", tune, torch.float32)
    model.model.light = True
    with pytest.raises(UserError, match="--recompute-light: not with --compile on a CPU") as e:
        model.model.compile_blocks(torch.device("cpu"))
    assert e.value.code == 2
    monkeypatch.setattr(attention, "ONE_BY_ONE", ())
    products: list[int] = []
    attended: list[int] = []

    def note(graph, inputs):
        names = [str(x.target) for x in graph.graph.nodes if x.op == "call_function"]
        products.append(sum("mm" in x for x in names))
        attended.append(sum("attention" in x for x in names))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=note, bw_compiler=note,
                           partition_fn=min_cut_rematerialization_partition)
    found = []
    for light in (None, False, True):
        torch._dynamo.reset()
        model = wide("llama3", tune, torch.float32)
        model.model.light = bool(light)
        if light is not None:
            model.model.compile_blocks(torch.device("cpu"), fullgraph=True, backend=backend)
        found.append(step(model, count=False))
    (_, _, plain), (kept, _, _), (less, _, same) = found
    most = 0.9 if tune == "fp8" else 0.8  # of which a compiler keeps less by itself
    assert less < most * kept and len(products) % 4 == 0
    one, two = products[: len(products) // 2], products[len(products) // 2 :]
    assert one == two and (tune == "lora" or one == [7, 14])  # two in the backward pass for each
    half = len(attended) // 2
    assert attended[:half] == attended[half:] and sum(attended) > 0  # nor is attention done twice
    for name, x in plain.items():
        assert tiny.apart(same[name], x) < 1e-5, name
    torch._dynamo.reset()
