"""Activation checkpointing: gradients are equal, less is kept, no product is computed twice."""

from __future__ import annotations

import weakref
from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import lora
from helpers import tiny
from layers import fp8, nf4
from training.compile_model import compile_model

WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
TUNES = {"full": {}, "lora": {}, "dora": {"dora": True, "dropout": 0.1}, "qlora": {}, "fp8": {}}


def wide(shape: str, tune: str, dtype: torch.dtype, recompute: str = "none",
         backend: str = "auto"):
    """A model that trains with `tune`; LoRA's B is random, so that everything has a gradient."""
    model = tiny.ours(tiny.peer(shape, **WIDE), shape, dtype, recompute,
                      attention_backend=backend, **WIDE)
    if tune == "fp8":
        fp8.convert_to_fp8(model)
    if tune in ("full", "fp8"):
        return model.train()
    model.to(dtype)
    if tune == "qlora":
        for name, m in list(model.named_modules()):
            if nf4.fits(name, m):
                model.set_submodule(name, nf4.NF4Linear(m.weight, m.bias, double=True))
    torch.manual_seed(0)
    lora.add_lora(model, 4, 8, TUNES[tune].get("dropout", 0.0), ["all-linear"],
                  dora=TUNES[tune].get("dora", False),
                  modules_to_save=["norm"] if tune == "lora" else [])
    for m in lora.adapters(model).values():
        torch.nn.init.normal_(m.lora_B.weight, std=0.1)
    return model.train()


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations made and that are still alive."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        return out

    @property
    def total(self):
        return sum(self.sizes.values())


def products(counter: FlopCounterMode) -> int:
    """FLOP of matrix products; attention's batched ones apart."""
    counts = counter.get_flop_counts()["Global"]
    names = ("aten.mm", "aten.addmm", "aten._scaled_mm")
    return sum(n for op, n in counts.items() if str(op).startswith(names))


def step(model, count: bool = True):
    """Bytes kept for the backward pass, FLOP of products, gradients by name."""
    ids, doc = tiny.tokens(2, 40, seed=1), (torch.arange(40) >= 25).long().expand(2, 40)
    pos = torch.arange(40).expand(2, 40)
    torch.manual_seed(3)  # of dropout
    counter, live = FlopCounterMode(display=False), LiveBytes()
    with counter if count else nullcontext():
        with live if count else nullcontext():
            loss = model(ids, doc, pos, ids, reduction="sum")
        n_bytes = live.total
        loss.backward()
    return n_bytes, count and products(counter), {
        n: p.grad for n, p in model.named_parameters() if p.requires_grad}


CASES = [("llama3", "full"), ("llama3", "lora"), ("llama3", "dora"), ("llama3", "qlora"),
         ("llama3", "fp8"), ("gemma2", "full"), ("olmo2", "lora"), ("qwen3", "qlora"),
         ("biases", "full")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape, tune", CASES)
def test_gradients_are_equal_to_the_bit_and_less_is_kept(shape, tune, dtype):
    all_bytes, work, gradients = step(wide(shape, tune, dtype))
    for recompute in ("selective", "full"):
        fewer_bytes, work_again, same = step(wide(shape, tune, dtype, recompute))
        assert all(torch.equal(gradients[n], same[n]) for n in gradients), recompute
        assert fewer_bytes < all_bytes, recompute
        all_bytes = fewer_bytes  # full keeps less than selective
        if recompute == "selective":
            assert work_again == work, "no product is computed again"
        else:
            assert work_again > work


@pytest.mark.parametrize("tune", ["full", "lora", "fp8"])
def test_compiled_selective_blocks_keep_the_products_alone(tune):
    """Seen in how each graph is partitioned; it then runs as it is. Attention as on a GPU: on a CPU
    it runs outside of compiled code."""
    products: list[int] = []
    attended: list[int] = []

    def note(graph, inputs):
        names = [str(x.target) for x in graph.graph.nodes if x.op == "call_function"]
        products.append(sum("mm" in x for x in names))
        attended.append(sum("attention" in x for x in names))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=note, bw_compiler=note,
                           partition_fn=min_cut_rematerialization_partition)
    results, n_bytes = [], []
    for recompute, compiled in (("none", False), ("none", True), ("selective", True)):
        torch._dynamo.reset()
        model = wide("llama3", tune, torch.float32, recompute, "sdpa_mask")
        if compiled:
            for block in model.model.layers:
                block.compile(fullgraph=True, backend=backend)
        storages: dict[int, int] = {}  # by storage, so that none is counted twice

        def pack(x, storages=storages):
            storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            results.append(step(model, count=False)[2])
        weights = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
        n_bytes.append(sum(size for storage, size in storages.items() if storage not in weights))
    plain, _, same = results
    limit = 0.9 if tune == "fp8" else 0.8  # a compiler keeps less of fp8 by itself
    assert n_bytes[2] < limit * n_bytes[1] and len(products) % 4 == 0
    one, two = products[: len(products) // 2], products[len(products) // 2 :]
    assert one == two and (tune == "lora" or one == [7, 14])  # two in the backward pass for each
    half = len(attended) // 2
    assert attended[:half] == attended[half:] and sum(attended) > 0  # attention is not done twice
    for name, x in plain.items():
        assert tiny.apart(same[name], x) < 1e-5, name
    torch._dynamo.reset()


def test_on_a_cpu_selective_recompute_may_be_compiled_too():
    plain, selective = wide("llama3", "lora", torch.float32), wide("llama3", "lora", torch.float32,
                                                                   "selective")
    compile_model(selective)
    a, b = (step(model, count=False)[2] for model in (plain, selective))
    for name, x in a.items():
        assert tiny.apart(b[name], x) < 1e-5, name
    torch._dynamo.reset()
