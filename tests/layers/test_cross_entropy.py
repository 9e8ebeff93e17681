"""The loss in chunks against torch's own, and what it never holds."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from data import IGNORE
from layers import cross_entropy as loss


def setting(n: int, kept: str, V: int = 50, C: int = 16, dtype=torch.float32):
    g = torch.Generator().manual_seed(n)
    h = torch.randn(2, n, C, generator=g).to(dtype).requires_grad_()
    W = (torch.randn(V, C, generator=g) * 0.5).requires_grad_()
    targets = torch.randint(0, V, (2, n), generator=g)
    if kept == "some":
        targets[torch.rand(2, n, generator=g) < 0.4] = IGNORE
    elif kept == "none":
        targets[:] = IGNORE
    return h, W, targets


def small(V: int = 50) -> loss.ChunkSizes:
    """Chunks as small as they get, so that a test's few tokens go through several."""
    sizes = loss.chunk_sizes("cpu", V, 16, numel=1 << 12, cached_numel=1 << 9)
    return dataclasses.replace(sizes, head_rows=16)


CHUNK, GROUP = small().logits, small().gradients  # tokens


def nll_of(h, W, targets, softcap=0.0, sizes=None):
    """token_nll in small chunks."""
    return loss.token_nll(h, W, targets, softcap, sizes or small(len(W)))


def sum_of(h, W, targets, softcap=0.0, sizes=None):
    """summed_nll in small chunks."""
    return loss.summed_nll(h, W, targets, softcap, sizes or small(len(W)))


def plain(h, W, targets, cap=0.0):
    logits = loss.softcap(F.linear(h.float(), W), cap)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE,
                           reduction="none").view(targets.shape)


@pytest.mark.parametrize("n", [1, 7, CHUNK, GROUP // 2 + 3, GROUP + CHUNK + 5])
@pytest.mark.parametrize("kept", ["all", "some", "none"])
@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("head", ["trained", "frozen"])
def test_values_and_gradients_equal_cross_entropy(n, kept, cap, head):
    h, W, targets = setting(n, kept)
    W = W if head == "trained" else W.detach()
    wanted = (h, W) if head == "trained" else (h,)
    weights = torch.randn(targets.shape, generator=torch.Generator().manual_seed(1))
    exact = plain(h, W, targets, cap)
    mine = nll_of(h, W, targets, cap)
    pairs = [(mine, exact), (sum_of(h, W, targets, cap), exact.sum()),
             *zip(torch.autograd.grad((mine * weights).sum(), wanted),
                  torch.autograd.grad((exact * weights).sum(), wanted, retain_graph=True),
                  strict=True),
             *zip(torch.autograd.grad(sum_of(h, W, targets, cap) / 7, wanted),
                  torch.autograd.grad(exact.sum() / 7, wanted), strict=True)]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_the_sum_is_that_of_the_tokens_to_the_bit():
    h, W, targets = setting(300, "some")
    assert torch.equal(sum_of(h, W, targets), nll_of(h, W, targets).sum())


def test_a_frozen_head_gets_no_gradient_and_changes_nothing_else():
    h, W, targets = setting(300, "some")
    grad, = torch.autograd.grad(sum_of(h, W, targets), h)
    frozen, = torch.autograd.grad(sum_of(h, W.detach(), targets), h)
    torch.testing.assert_close(grad, frozen, atol=1e-6, rtol=1e-6)


def test_going_backward_twice_gives_the_same_gradient():
    h, W, targets = setting(300, "all")
    total = sum_of(h, W, targets) * 0.5
    first = torch.autograd.grad(total, (h, W), retain_graph=True)
    second = torch.autograd.grad(total, (h, W))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_bfloat16_products_are_close_and_the_nll_is_float32():
    h, W, targets = setting(100, "all", dtype=torch.bfloat16)
    nll = nll_of(h, W, targets)
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll, plain(h, W.bfloat16().float(), targets), atol=0.1, rtol=0.02)


class Largest(TorchDispatchMode):
    """The most numbers that any result of any operation had."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, tuple | list) else [out]
        for x in tensors:
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel())
        return out


@pytest.mark.parametrize("factor", ["sum", "each its own"])
def test_the_logits_of_a_whole_batch_never_stand_in_memory(factor):
    h, W, targets = setting(4 * GROUP, "all", V=100, C=8)
    sizes = small(100)
    with Largest() as largest:
        if factor == "sum":
            loss.summed_nll(h, W, targets, sizes=sizes).backward()
        else:
            nll = loss.token_nll(h, W, targets, sizes=sizes)
            (nll * nll.detach()).sum().backward()
    assert largest.numbers <= GROUP * 100 < targets.numel() * 100


class Products(TorchDispatchMode):
    """How many products were made."""

    made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.made += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.matmul)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("function, made", [(sum_of, 3), (nll_of, 2)])
def test_where_no_gradient_is_asked_for_none_is_made(function, made, without):
    """A custom function is told that a parameter needs one even there."""
    h, W, targets = setting(7, "all")
    with Products() as products:
        wanted = function(h, W, targets).detach()
    assert W.requires_grad and products.made == made  # logits, dh, and of a sum also dW
    with without(), Products() as products:
        nll = function(h, W, targets)
    assert products.made == 1 and torch.equal(nll, wanted)


@pytest.mark.parametrize("function, made", [(sum_of, 3), (nll_of, 4)])
def test_only_token_nll_computes_logits_again_in_the_backward_pass(function, made):
    h, W, targets = setting(7, "all")
    with Products() as products:
        nll = function(h, W, targets)
        mine = torch.autograd.grad((nll * nll.detach()).sum(), (h, W))
    assert products.made == made
    wanted = plain(h, W, targets)
    wanted = wanted.sum() if function is sum_of else wanted
    wanted = torch.autograd.grad((wanted * wanted.detach()).sum(), (h, W))
    for a, b in zip(mine, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype, factor", [(torch.bfloat16, 1 / 1431), (torch.float16, 65536.0)])
def test_what_a_mean_or_a_scale_multiplies_by_is_not_rounded_first(dtype, factor):
    """1/1431 in bf16 is 0.1 % less than it is, for all alike, and 65536 in fp16 is infinite."""
    h, W, targets = setting(1022, "all", dtype=dtype)
    alone, = torch.autograd.grad(sum_of(h, W, targets), h)
    gradient, = torch.autograd.grad(sum_of(h, W, targets) * factor, h)
    wanted = alone.double() * factor
    is_normal = (wanted.abs() < 6e4) & (wanted.abs() > 1e-4 * factor)
    assert is_normal.float().mean() > 0.9
    ratios = gradient.double()[is_normal] / wanted[is_normal]
    assert float(ratios.mean()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("frozen, cap, dtype", [
    *((frozen, cap, torch.float32) for frozen in (False, True) for cap in (0.0, 3.0)),
    (False, 0.0, torch.bfloat16)])
def test_compiled_it_finds_the_same(frozen, cap, dtype):
    """Of products in bf16 too: NLLs stay float32, and gradients of logits are rounded once."""
    torch._dynamo.reset()
    h, W, targets = setting(GROUP + CHUNK + 5, "some", V=100, C=8, dtype=dtype)
    results = []
    for compiled in (False, True):
        a, b = h.detach().requires_grad_(), W.detach().requires_grad_(not frozen)
        function = loss.LinearCrossEntropy(cap, sizes=small(100))
        if compiled:
            function.compile()
        nll = function(a, b, targets)
        nll.sum().backward()
        total = function(a, b, targets, "sum")
        total.backward()
        results.append((nll, total, a.grad, *([] if frozen else [b.grad])))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("V", [1_000, 32_000, 128_256, 262_144])
def test_a_gpu_makes_more_logits_at_once_and_not_too_many(V):
    gpu = loss.chunk_sizes("cuda", V, 2048)
    assert gpu.logits * V <= 1 << 27 < 2 * gpu.logits * V and gpu.gradients % gpu.logits == 0
    assert gpu.gradients >= gpu.logits == gpu.float32
    assert gpu.gradients * V * 2 <= max(V * 2048 * 4, gpu.logits * V * 2)
    cpu = loss.chunk_sizes("cpu", V, 2048)
    assert cpu.logits == 256 and cpu.gradients % cpu.logits == 0
    assert cpu.gradients >= 1024
    assert cpu.gradients == 1024 or cpu.gradients * V <= 1 << 26


@pytest.mark.parametrize("V", [320, 32_000, 128_256, 262_144, 300_000])
@pytest.mark.parametrize("threads", [1, 2, 12, 96])
def test_each_thread_of_a_cpu_has_rows_of_its_own_as_many_as_its_cache_holds(
        threads, V, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    sizes = loss.chunk_sizes("cpu", V, 2048)
    each = sizes.float32 / threads
    assert 1 <= each and (each == 1 or each * V <= 1 << 18)
    assert sizes.float32 == sizes.logits or (each == int(each) and (each + 1) * V > 1 << 18)
