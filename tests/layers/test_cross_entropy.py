"""The loss in chunks against torch's own, and what it never holds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from data import IGNORE
from helpers import tiny
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


@pytest.fixture(autouse=True)
def small(request, monkeypatch):
    """Parts as small as they get, so that a test's few words go through several."""
    if "V" not in request.fixturenames:
        monkeypatch.setitem(loss.LOGITS, "cpu", 1 << 12)
        monkeypatch.setattr(loss, "CACHED", 1 << 9)
        monkeypatch.setattr(loss, "ROWS", 16)


def plain(h, W, targets, cap=0.0, smoothing=0.0):
    logits = loss.capped(F.linear(h.float(), W), cap)
    return F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none",
        label_smoothing=smoothing).view(targets.shape)


@pytest.mark.parametrize("n", [1, 7, loss.CHUNK, loss.GROUP // 2 + 3, loss.GROUP + loss.CHUNK + 5])
@pytest.mark.parametrize("kept", ["all", "some", "none"])
@pytest.mark.parametrize("factor", ["sum", "each its own"])
def test_values_and_gradients_equal_cross_entropy(n, kept, factor):
    h, W, targets = setting(n, kept)
    w = (torch.randn(targets.shape, generator=torch.Generator().manual_seed(1))
         if factor != "sum"
         else None)
    results = []
    for nll in (loss.token_nll(h, W, targets, each=w is not None), plain(h, W, targets)):
        total = nll.sum() / 7 if w is None else (nll * w).sum()
        results.append((nll.detach(), *torch.autograd.grad(total, (h, W))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("n", [7, loss.GROUP + loss.CHUNK + 5])
@pytest.mark.parametrize("factor", ["sum", "each its own"])
@pytest.mark.parametrize("head", ["trained", "frozen"])
@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_smoothed_targets_give_torchs_values_and_gradients(n, factor, head, cap):
    h, W, targets = setting(n, "some")
    W = W if head == "trained" else W.detach()
    wanted = (h, W) if head == "trained" else (h,)
    w = torch.randn(targets.shape, generator=torch.Generator().manual_seed(1))
    results = []
    for nll in (loss.token_nll(h, W, targets, cap, 0.1), plain(h, W, targets, cap, 0.1)):
        total = nll.sum() / 7 if factor == "sum" else (nll * w).sum()
        results.append((nll.detach(), *torch.autograd.grad(total, wanted)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_targets_are_smoothed_in_training_and_never_in_evaluation():
    model = tiny.ours(tiny.peer())
    ids = tiny.tokens(2, 16)
    batch = ids, torch.zeros_like(ids), torch.arange(16).expand(2, 16), ids.roll(-1, 1)
    before = model(*batch)
    model.smoothing = 0.1
    assert torch.equal(model(*batch), before)
    logits = tiny.logits(model, ids).flatten(0, 1)
    wanted = F.cross_entropy(logits, batch[3].flatten(), reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(model.train()(*batch).flatten(), wanted, atol=1e-5, rtol=1e-5)


def test_a_frozen_head_gets_no_gradient_and_changes_nothing_else():
    h, W, targets = setting(300, "some")
    grad, = torch.autograd.grad(loss.token_nll(h, W, targets).sum(), h)
    frozen, = torch.autograd.grad(loss.token_nll(h, W.detach(), targets).sum(), h)
    torch.testing.assert_close(grad, frozen, atol=1e-6, rtol=1e-6)


def test_going_backward_twice_gives_the_same_gradient():
    h, W, targets = setting(300, "all")
    total = loss.token_nll(h, W, targets).sum() * 0.5
    first = torch.autograd.grad(total, (h, W), retain_graph=True)
    second = torch.autograd.grad(total, (h, W))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_bfloat16_products_are_close_and_the_nll_is_float32():
    h, W, targets = setting(100, "all", dtype=torch.bfloat16)
    nll = loss.token_nll(h, W, targets)
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll, plain(h, W.bfloat16().float(), targets), atol=0.1, rtol=0.02)


class Largest(TorchDispatchMode):
    """The most numbers that any result of any operation had."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel())
        return out


@pytest.mark.parametrize("factor", ["sum", "each its own"])
def test_the_logits_of_a_whole_batch_never_stand_in_memory(factor):
    h, W, targets = setting(4 * loss.GROUP, "all", V=100, C=8)
    with Largest() as seen:
        nll = loss.token_nll(h, W, targets)
        (nll.sum() if factor == "sum" else (nll * nll.detach()).sum()).backward()
    assert seen.numbers <= loss.GROUP * 100 < targets.numel() * 100


class Products(TorchDispatchMode):
    """How many products were made."""

    made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.made += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.matmul)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_where_no_gradient_is_asked_for_none_is_made(without):
    """A custom function is told that a parameter needs one even there."""
    h, W, targets = setting(7, "all")
    with Products() as seen:
        wanted = loss.token_nll(h, W, targets).detach()
    assert W.requires_grad and seen.made == 3  # logits, and two gradients
    with without(), Products() as seen:
        nll = loss.token_nll(h, W, targets)
    assert seen.made == 1 and torch.equal(nll, wanted)


@pytest.mark.parametrize("each, made", [(False, 4), (True, 3)])
def test_where_each_loss_has_a_factor_the_heads_gradient_is_made_once(each, made):
    """Forward: logits, the gradient of h, and, of a sum, that of the head; then backward."""
    h, W, targets = setting(7, "all")
    with Products() as seen:
        nll = loss.token_nll(h, W, targets, each=each)
        found = torch.autograd.grad((nll * nll.detach()).sum(), (h, W))
    assert seen.made == made + 1  # logits once more
    wanted = plain(h, W, targets)
    wanted = torch.autograd.grad((wanted * wanted.detach()).sum(), (h, W))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype, factor", [(torch.bfloat16, 1 / 1431), (torch.float16, 65536.0)])
def test_what_a_mean_or_a_scale_multiplies_by_is_not_rounded_first(dtype, factor):
    """1/1431 in bf16 is 0.1 % less than it is, for all alike, and 65536 in fp16 is infinite."""
    h, W, targets = setting(1022, "all", dtype=dtype)
    alone, = torch.autograd.grad(loss.token_nll(h, W, targets).sum(), h)
    found, = torch.autograd.grad(loss.token_nll(h, W, targets).sum() * factor, h)
    wanted = alone.double() * factor
    some = (wanted.abs() < 6e4) & (wanted.abs() > 1e-4 * factor)
    assert some.float().mean() > 0.9
    assert float((found.double()[some] / wanted[some]).mean()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("frozen, cap, dtype", [
    *((frozen, cap, torch.float32) for frozen in (False, True) for cap in (0.0, 3.0)),
    (False, 0.0, torch.bfloat16)])
def test_compiled_it_finds_the_same(frozen, cap, dtype):
    """Of products in bf16 too: NLLs stay float32, and gradients of logits are rounded once."""
    torch._dynamo.reset()
    h, W, targets = setting(loss.GROUP + loss.CHUNK + 5, "some", V=100, C=8, dtype=dtype)
    found = []
    for compiled in (False, True):
        a, b = h.detach().requires_grad_(), W.detach().requires_grad_(not frozen)
        nll = loss.token_nll(a, b, targets, cap, 0.1, compiled)
        nll.sum().backward()
        found.append((nll, a.grad, *([] if frozen else [b.grad])))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("V", [1_000, 32_000, 128_256, 262_144])
def test_a_gpu_makes_more_logits_at_once_and_not_too_many(V):
    some, many, near = loss.at_once("cuda", V, 2048)
    assert some * V <= loss.LOGITS["cuda"] < 2 * some * V and many % some == 0
    assert many >= some == near and many * V * 2 <= max(V * 2048 * 4, some * V * 2)
    least, most, _ = loss.at_once("cpu", V, 2048)
    assert least == loss.CHUNK and most % least == 0
    assert loss.GROUP <= most and (most == loss.GROUP or most * V <= 1 << 26)


@pytest.mark.parametrize("V", [320, 32_000, 128_256, 262_144, 300_000])
@pytest.mark.parametrize("threads", [1, 2, 12, 96])
def test_each_thread_of_a_cpu_has_rows_of_its_own_as_many_as_its_cache_holds(
        threads, V, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    some, _, near = loss.at_once("cpu", V, 2048)
    each = near / threads
    assert 1 <= each and (each == 1 or each * V <= loss.CACHED == 1 << 18)
    assert near == some or (each == int(each) and (each + 1) * V > loss.CACHED)
