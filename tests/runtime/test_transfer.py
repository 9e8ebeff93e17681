"""A step waits for the device once, and batches are copied in advance; counted without a GPU."""

from __future__ import annotations

import math
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora
import train
from data import IGNORE, Batch
from helpers import tiny
from layers import attention, attention_metadata
from layers import cross_entropy as loss
from layers.attention import causal_mask
from runtime import transfer
from runtime.distributed import Distributed
from training import monitor, preference
from training import optimizer as optim
from training.objective import NLL, Objective, objective_of, trained_tokens
from training.settings import Settings

ALONE = Distributed(0, 1, torch.device("cpu"))
aten = torch.ops.aten
ASK = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
       aten.repeat_interleave.Tensor, aten._unique2.default, aten.unique_dim.default}


def batch(seed: int, rows: int = 2, T: int = 32) -> Batch:
    """Rows of pairs of documents with uneven masks, and an unused tail."""
    draw = np.random.default_rng(seed)
    arrays = []
    for _ in range(rows):
        row = np.full((4, T), [[0], [IGNORE], [-1], [0]], np.int64)
        ends = np.sort(draw.choice(np.arange(2, T - 1), 3, replace=False))
        for doc, (a, b) in enumerate(zip((0, *ends), (*ends, T - 1), strict=True)):
            row[0, a:b], row[1, a:b] = (draw.integers(3, tiny.V, b - a) for _ in range(2))
            row[2, a:b], row[3, a:b] = doc, np.arange(b - a)
            row[1, a : b - 1][draw.random(b - 1 - a) < 0.5] = IGNORE
        arrays.append(row)
    return Batch.of(arrays, [draw.random(T).astype(np.float32) for _ in range(rows)])


class Waits(TorchDispatchMode):
    """Takes what was sent for something on a device, and all that is computed of it; notes each
    time that the host asks for one of its numbers, or for a shape that depends on them."""

    def __init__(self):
        super().__init__()
        self.there: set[int] = set()  # storages
        self.asked: list[str] = []

    def keep(self, x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in self.there:
            self.there.add(storage._cdata)
            weakref.finalize(storage, self.there.discard, storage._cdata)
        return x

    def to_device_async(self, x: torch.Tensor, device: object) -> torch.Tensor:
        return self.keep(x.clone())

    def is_there(self, x: object) -> bool:
        return isinstance(x, torch.Tensor) and x.untyped_storage()._cdata in self.there

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs))
        is_on_device = any(map(self.is_there, leaves))
        masks = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1]))
        if is_on_device and (func in ASK or masks):
            self.asked.append(str(func))
        out = func(*args, **(kwargs or {}))
        leaves = tree_leaves(out) if is_on_device else []
        for x in leaves:
            if isinstance(x, torch.Tensor):
                self.keep(x)
        return out


class Read(TorchFunctionMode):
    """The same for what reads memory itself, and is no operation."""

    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu) \
                and self.waits.is_there(args[0]):
            self.waits.asked.append(func.__name__)
        return func(*args, **(kwargs or {}))


def kernel(q, k, v, at, at_k, longest, longest_k, *, scale, window_size, enable_gqa=False):
    """In place of the GPU's: a mask of all pairs, made without asking for a number."""
    doc = (torch.arange(len(q))[:, None] >= at).sum(1)
    mask = (doc[:, None] == doc) & causal_mask(len(q), window_size[0] + 1, None)
    return torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), mask, scale=scale,
        enable_gqa=enable_gqa)[0].transpose(0, 1)


def tensors(b: Batch) -> list[torch.Tensor]:
    """A batch's tensors that are sent."""
    return [x for x in vars(b).values() if isinstance(x, torch.Tensor)]


def counted(monkeypatch, model, objective, batches) -> tuple[list[str], float]:
    """What a step, as it is on a GPU, asks of the device; and its loss."""
    waits = Waits()
    for module in (transfer, attention_metadata, loss, preference, train):
        monkeypatch.setattr(module, "to_device_async", waits.to_device_async)
    for x in (*model.parameters(), *model.buffers()):
        waits.keep(x.data)
    optimizer = optim.adamw(model, 1e-2, (0.9, 0.95), 0.1)
    result = None
    for _ in range(2):  # the first makes the moments
        waits.asked.clear()
        with waits, Read(waits):
            result, norm = train.train_step(model, objective, batches, optimizer, ALONE, clip=1.0)
        assert math.isfinite(norm)
    return waits.asked, result


@pytest.mark.parametrize("shape, path", [
    ("llama32", "mask"), ("llama32", "flash"), ("gemma2", "mask"), ("smollm3-window", "flash"),
    ("dynamic", "mask")])
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_step_asks_the_device_once(monkeypatch, shape, path, tune):
    backend = "varlen_flash" if path == "flash" else "sdpa_mask"
    model = tiny.ours(tiny.peer(shape), shape, attention_backend=backend).train()
    if tune == "lora":
        lora.add_lora(model, 4, 8, 0.0, ["all-linear"])
    monkeypatch.setattr(attention, "varlen_attn", kernel)  # torch's: a CPU has none
    n_syncs, _ = counted(monkeypatch, model, NLL, [batch(1), batch(2), batch(3)])
    assert n_syncs == ["tolist"]


@pytest.mark.parametrize("mode", ["dpo", "cpo"])
def test_a_step_of_preference_pairs_asks_once_too(monkeypatch, mode):
    model = tiny.ours(tiny.peer("llama3"), "llama3", attention_backend="sdpa_mask").train()
    objective = objective_of(Settings(mode=mode))
    n_syncs, _ = counted(monkeypatch, model, objective, [batch(1), batch(2)])
    assert n_syncs == ["tolist"]


def test_what_the_host_is_asked_instead_changes_nothing(monkeypatch):
    """The batch's fields on the host, or the device's tensors where they are not given."""
    asking = Objective(
        lambda m, b: m(b.tokens, b.doc, b.pos, b.targets, reduction="sum"), trained_tokens)
    results = []
    for objective in (NLL, asking):
        with monkeypatch.context() as patched:
            model = tiny.ours(tiny.peer("llama3"), "llama3", attention_backend="sdpa_mask").train()
            n_syncs, value = counted(patched, model, objective, [batch(1), batch(2)])
            results.append((value, *model.parameters()))
        assert (len(n_syncs) == 1) == (objective is NLL), "what counts can count more than one"
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b))
               for a, b in zip(*results, strict=True))


def test_one_wait_tells_what_was_not_finite_and_in_which_micro_batch():
    model = tiny.ours(tiny.peer("llama3"), "llama3").train()
    optimizer = optim.adamw(model, 1e-2, (0.9, 0.95), 0.1)
    batches, weights = [batch(1), batch(2), batch(3)], [p.clone() for p in model.parameters()]
    odd = Objective(
        lambda m, b: NLL.sums(m, b) * (
            math.inf if b.tokens is batches[1].tokens else 1),
        trained_tokens)
    with pytest.raises(monitor.NotFinite) as fault:
        train.train_step(model, odd, batches, optimizer, ALONE, clip=1.0)
    assert fault.value.micro_batches == [1] and not optimizer.state
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


class Noted:
    """A batch that notes when it is sent."""

    def __init__(self, number: int, said: list[str]):
        self.number, self.said = number, said

    def to(self, device: torch.device) -> Noted:
        self.said.append(f"send {self.number}")
        return self


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_batch_is_copied_before_the_batch_before_it_is_computed(n):
    events: list[str] = []
    for x in transfer.prefetch([Noted(i, events) for i in range(n)], torch.device("cpu")):
        events.append(f"compute {x.number}")
    wanted = ["send 0"]
    for i in range(n):
        wanted += [f"send {i + 1}"] * (i + 1 < n) + [f"compute {i}"]
    assert events == wanted


def test_on_a_cpu_nothing_is_copied():
    source = batch(1)
    (copied,) = transfer.prefetch([source], torch.device("cpu"))
    for name, x in vars(source).items():
        assert getattr(copied, name) is x


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_prefetched_batches_arrive_whole_and_the_host_does_not_wait():
    gpu, batches = torch.device("cuda"), [batch(i, 4, 4096) for i in range(8)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        arrived = []
        for copied in transfer.prefetch(batches, gpu):
            arrived.append([x * 1 for x in tensors(copied)])  # read in the other queue
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for source, copied in zip(batches, arrived, strict=True):
        assert all(torch.equal(a, b.cpu()) for a, b in zip(tensors(source), copied, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("mode", ["cpt", "dpo"])
def test_a_gpu_is_waited_for_once_a_step(mode):
    model = tiny.ours(tiny.peer("llama3"), "llama3", torch.bfloat16).train().cuda()
    gpu, objective = Distributed.start("cuda"), objective_of(Settings(mode=mode))
    optimizer = optim.adamw(model, 1e-3, (0.9, 0.95), 0.1)
    step = lambda: train.train_step(  # noqa: E731
        model, objective, [batch(1), batch(2)], optimizer, gpu, 1.0)
    step()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum("called a synchronizing" in str(x.message) for x in caught) == 1
