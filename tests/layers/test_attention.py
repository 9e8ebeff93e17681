"""Every path of attention beside the plain one: a mask of all pairs, in float64."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora
from data import RowDocuments
from helpers import tiny
from layers import attention, attention_cpu
from layers.attention_metadata import (
    Causal,
    CpuBlocks,
    DenseMask,
    PerDocument,
    VarlenFlash,
    attention_backend,
    attention_metadata,
)
from training.compile_model import compile_model


def laid(lengths, rows=1):
    """doc, pos (rows, T) of documents end to end."""
    doc = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    pos = torch.cat([torch.arange(n) for n in lengths])
    return doc.view(rows, -1), pos.view(rows, -1)


def metadata(doc, pos, window=0, backend="cpu", softcap=False):
    """The metadata of documents, as the model builds it."""
    documents = RowDocuments.of(doc.cpu(), pos.cpu())
    return attention_metadata(doc, documents.lengths, backend, window, softcap)


def plain(q, k, v, doc, window, scale):
    """All pairs, in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    mask = attention.causal_mask(doc.shape[1], window, doc.device)
    mask = (mask & (doc[:, :, None] == doc[:, None, :]))[:, None]
    scores = (q @ k.mT * scale).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def run(function, inputs, g):
    """Result and gradients, in float64."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    y.backward(g.to(y.dtype))
    return [y.detach().double(), *(x.grad.double() for x in leaves)]


def drawn(B, T, H, K, D, dtype=torch.float32):
    return [tiny.drawn(B, T, n, D, seed=i).to(dtype) for i, n in enumerate((H, K, K))]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=9), st.sampled_from([0, 1, 7, 65, 200]),
       st.sampled_from([(4, 4), (6, 2), (3, 1)]))
def test_blocks_compute_what_a_mask_of_all_pairs_does(lengths, window, heads):
    doc, pos = laid(lengths)
    layout = metadata(doc, pos, window)
    assert isinstance(layout, CpuBlocks)
    covered = [i for b in layout.blocks for i in range(b.begin, b.end)]
    assert covered == list(range(sum(lengths) // layout.side))
    inputs, g = drawn(1, sum(lengths), *heads, 8), tiny.drawn(1, sum(lengths), heads[0], 8, seed=9)
    mine = run(lambda *x: layout.attend(*x, 0.3), inputs, g)
    theirs = run(lambda *x: plain(*x, doc, window, 0.3), inputs, g)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("rows, n, side", [(3, 40, 1), (3, 80, 3), (4, 64, 4), (10, 70, 2)])
def test_blocks_of_several_rows_do_not_look_into_the_row_before(rows, n, side):
    doc, pos = torch.zeros(rows, n, dtype=torch.long), torch.arange(n).expand(rows, n)
    inputs, g = drawn(rows, n, 4, 2, 8), tiny.drawn(rows, n, 4, 8, seed=9)
    layout = metadata(doc, pos)
    assert layout.side == side  # documents of one length go through one product
    for a, b in zip(run(lambda *x: layout.attend(*x, 0.3), inputs, g),
                    run(lambda *x: plain(*x, doc, 0, 0.3), inputs, g), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("lengths", [[512, 300, 37, 5, 170], [128] * 8])
@pytest.mark.parametrize("dtype, tiled", [(torch.bfloat16, False), (torch.bfloat16, True),
                                          (torch.float16, False)])
def test_blocks_are_as_exact_in_16_bits_as_torchs_fused_kernel(dtype, tiled, lengths):
    doc, pos = laid(lengths)
    inputs = drawn(1, sum(lengths), 6, 2, 64, dtype)
    inputs[0] = inputs[0] * 4  # scores of some size: where a coarse score would show
    g = tiny.drawn(1, sum(lengths), 6, 64, seed=9).to(dtype)
    exact = run(lambda *x: plain(*x, doc, 0, 0.125), inputs, g)
    blocks, alone = dataclasses.replace(metadata(doc, pos), has_amx=tiled), PerDocument(lengths)
    assert blocks.fused_forward(dtype) == tiled
    windowed = dataclasses.replace(metadata(doc, pos, 100), has_amx=True)
    assert not windowed.fused_forward(dtype)  # it would need a mask
    mine = run(lambda *x: blocks.attend(*x, 0.125), inputs, g)
    fused = run(lambda *x: alone.attend(*x, 0.125), inputs, g)
    for name, a, b, e in zip("y dq dk dv".split(), mine, fused, exact, strict=True):
        assert (a - e).norm() < 1.5 * (b - e).norm(), name


@pytest.mark.parametrize("lengths", [[70, 1, 33, 128], [48] * 4, [1] * 5, [90]])
@pytest.mark.parametrize("dtype, share", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("window", [0, 200])
@pytest.mark.parametrize("path", ["blocks", "documents", "tiled blocks"])
def test_a_cpus_paths_are_near_to_all_pairs(path, window, dtype, share, lengths):
    doc, pos = laid(lengths)
    inputs = drawn(1, sum(lengths), 6, 2, 16, dtype)
    g = tiny.drawn(1, sum(lengths), 6, 16, seed=9).to(dtype)
    layout = PerDocument(lengths, window)
    if path != "documents":
        layout = dataclasses.replace(metadata(doc, pos, window), has_amx=path == "tiled blocks")
    for name, a, b in zip("y dq dk dv".split(),
                          run(lambda *x: layout.attend(*x, 0.3), inputs, g),
                          run(lambda *x: plain(*x, doc, window, 0.3), inputs, g), strict=True):
        assert (a - b).norm() <= share * max(b.norm(), 1), name


def test_where_a_block_holds_many_documents_their_forward_pass_is_its_own():
    for n, fused in ((4, False), (44, True), (300, True)):
        layout = dataclasses.replace(metadata(*laid([n] * 16)), has_amx=True)
        assert layout.fused_forward(torch.bfloat16) == fused, n
        assert not layout.fused_forward(torch.float32)


def test_a_long_document_is_left_to_torchs_kernel():
    assert metadata(*laid([1025, 5])) == PerDocument([1025, 5])
    assert metadata(*laid([1025])) == Causal()


@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("D", [8, 20])
def test_offsets_tell_the_flash_kernel_the_documents_and_the_window(
        monkeypatch, window, D):
    """The kernel is a GPU's; here another stands in for it that reads the same arguments."""
    def kernel(q, k, v, at, at_k, longest, longest_k, *, scale, window_size, enable_gqa=False):
        assert at.dtype == torch.int32 and at is at_k and enable_gqa == (k.shape[1] != q.shape[1])
        assert q.shape[-1] % 8 == k.shape[-1] % 8 == v.shape[-1] % 8 == 0
        assert int(at.diff().max()) <= longest == longest_k and len(at) & (len(at) - 1) == 0
        doc = torch.repeat_interleave(torch.arange(len(at) - 1), at.diff())[None]
        assert window_size[1] == 0
        return plain(q[None], k[None], v[None], doc, window_size[0] + 1, scale)[0].to(q.dtype)

    monkeypatch.setattr(attention, "varlen_attn", kernel)  # torch's: a CPU has none
    doc, pos = laid([10, 20, 4, 6, 31, 9], rows=2)
    layout = metadata(doc, pos, window, "varlen_flash")
    assert layout.cu_seqlens[-1] == doc.numel()
    inputs, g = drawn(2, 40, 4, 2, D), tiny.drawn(2, 40, 4, D, seed=9)
    for a, b in zip(run(lambda *x: layout.attend(*x, 0.3), inputs, g),
                    run(lambda *x: plain(*x, doc, window, 0.3), inputs, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_row_that_is_one_document_needs_no_mask_for_its_window():
    """No kernel but the one over documents knows a window."""
    doc, pos = laid([40, 40], rows=2)
    flash = metadata(doc, pos, 9, "varlen_flash")
    assert flash.cu_seqlens.tolist() == [0, 40, 80, 80]
    for window in (0, 40):  # all is seen: torch's causal kernel
        assert metadata(doc, pos, window, "varlen_flash") == Causal(window)
    assert metadata(doc, pos, 9, "sdpa_mask") == Causal(9)
    assert metadata(doc, pos, 9, "varlen_flash", softcap=True) == Causal(9)


@pytest.mark.parametrize("capability, dtype, D, there", [
    ((8, 0), torch.bfloat16, 64, True), ((9, 0), torch.float16, 256, True),
    ((7, 5), torch.float16, 64, False), ((8, 0), torch.float32, 64, False),
    ((8, 0), torch.bfloat16, 320, False)])
def test_which_gpus_have_flash_kernels(monkeypatch, capability, dtype, D, there):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert attention.supports_flash(torch.device("cuda"), dtype, D) == there
    backend = "varlen_flash" if there else "sdpa_mask"
    assert attention_backend(torch.device("cuda"), dtype, D) == backend
    assert attention_backend(torch.device("cpu"), dtype, D) == "cpu"


def ampere():
    """Skip a test of bf16's fused kernels where the GPU is older than they are."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no flash kernels and no bf16")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("window, lengths, D", [
    (0, [512, 300, 37, 5, 170], 64), (100, [512, 300, 37, 5, 170], 64),
    (0, [512, 300, 37, 5, 170], 20), (100, [1024], 64)])
def test_the_flash_kernel_is_as_exact_as_the_mask(window, lengths, D):
    ampere()
    doc, pos = (x.cuda() for x in laid(lengths))
    inputs = [x.cuda() for x in drawn(1, sum(lengths), 8, 2, D, torch.bfloat16)]
    g = tiny.drawn(1, sum(lengths), 8, D, seed=9).bfloat16().cuda()
    exact = run(lambda *x: plain(*x, doc, window, 0.125), inputs, g)
    assert attention_backend(doc.device, torch.bfloat16, D) == "varlen_flash"
    fast = metadata(doc, pos, window, "varlen_flash")
    masked = metadata(doc, pos, window, "sdpa_mask")  # of one document each layer makes its own
    assert isinstance(fast, VarlenFlash) and isinstance(masked, DenseMask | Causal)
    mine = run(lambda *x: fast.attend(*x, 0.125), inputs, g)
    slow = run(lambda *x: masked.attend(*x, 0.125), inputs, g)
    for name, a, b, e in zip("y dq dk dv".split(), mine, slow, exact, strict=True):
        assert (a - e).norm() < 1.5 * (b - e).norm(), name


def test_no_block_is_left_uncompiled_because_there_are_too_many_kinds_of_passes(monkeypatch):
    """DPO with an adapter, windows, any number of documents: a whole graph or an error."""
    def kernel(q, k, v, at, _, longest, *more, scale, window_size, enable_gqa=False):
        doc = (at <= torch.arange(len(q))[:, None]).sum(1)[None]
        return plain(q[None], k[None], v[None], doc, window_size[0] + 1, scale)[0].to(q.dtype)

    monkeypatch.setattr(attention, "varlen_attn", kernel)  # torch's: a CPU has none
    torch._dynamo.reset()
    model = tiny.ours(tiny.peer("gemma3"), "gemma3", attention_backend="varlen_flash").train()
    lora.add_lora(model, 4, 8.0, 0.0, ["all-linear"])
    compile_model(model, fullgraph=True, backend="eager")
    graphs, n_graphs = torch._dynamo.utils.counters["stats"], []
    for lengths in ([30, 10], [40], [20, 1, 9, 10], [5] * 8, [25, 15], [40], [2] * 20):
        ids, (doc, pos) = tiny.tokens(1, 40), laid(lengths)
        with torch.no_grad(), lora.disabled(model):
            model(ids, doc, pos, ids)
        model(ids, doc, pos, ids).sum().backward()
        n_graphs.append(graphs["unique_graphs"])
    assert n_graphs[0] < n_graphs[2] == n_graphs[-1]
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [64, 80])  # the scale of 80 is not a power of two
def test_products_of_narrow_numbers_are_float32s_whatever_kernel_makes_them(dtype, D):
    """No factor is rounded, nor a sum; and the process stays as it was, whatever happens."""
    q, keys = (tiny.drawn(4, n, D, seed=n).to(dtype) for n in (128, 256))
    block = attention_cpu.cpu_blocks([256], 0)[-1]  # of 128 queries, one a head
    precision = torch.backends.mkldnn.matmul.fp32_precision
    with attention_cpu.bf16_factors(dtype) as narrow:
        result = attention_cpu.probabilities(4 * q.float(), keys.float(), block, D**-0.5, narrow)
        if narrow:
            assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    scores = 4 * D**-0.5 * q.double() @ keys.double().mT
    scores[..., 128:] += block.bias[:, 0]
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), scores.softmax(-1), rtol=1e-5, atol=1e-7)
    with pytest.raises(RuntimeError), attention_cpu.bf16_factors(dtype):
        torch.bmm(q, keys)
    assert torch.backends.mkldnn.matmul.fp32_precision == precision
