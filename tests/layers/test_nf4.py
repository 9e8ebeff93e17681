"""NF4 against bitsandbytes: the same codes and scales; a product as a dequantised model's."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from safetensors.torch import load_file

import lora
from checkpoints.huggingface import load_model, save_model
from checkpoints.peft_adapter import adapter_state, save_adapter
from helpers import tiny
from layers import nf4
from layers.nf4 import NF4Linear
from runtime.console import UserError

bnb = pytest.importorskip("bitsandbytes.functional")
cextension = pytest.importorskip("bitsandbytes.cextension")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

IDS = tiny.tokens(2, 24)
DOC, POS = torch.zeros_like(IDS), torch.arange(24).repeat(2, 1)
TARGETS = IDS.roll(-1, 1)
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # rows of whole blocks, as real ones are
REAL = [(2048, 2048), (512, 2048), (8192, 2048)]  # Llama 3.2 1B: q_proj, k_proj, gate_proj


def portable_scales(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bitsandbytes' quantize_blockwise in torch, which takes the nearest value as its GPU kernel
    does; its CPU kernel looks near a boundary in a coarse table."""
    op = torch.ops.bitsandbytes.quantize_blockwise.default
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    return op.redispatch(keys, x, bnb.create_dynamic_map(), nf4.SCALES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 64), (48, 128), (3, 1024 * 64 + 64), *REAL])
def test_codes_and_scales_are_those_of_bitsandbytes_bit_for_bit(shape, dtype):
    W = (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.02).to(dtype)
    W.view(-1)[:64] = 0  # a block of nothing
    theirs, state = bnb.quantize_4bit(W, blocksize=64, quant_type="nf4")
    codes, scales = nf4.quantise(W)
    assert torch.equal(codes, theirs.flatten()) and torch.equal(scales, state.absmax)
    for out in (torch.float32, torch.bfloat16, torch.float16):
        state.dtype = out
        assert torch.equal(nf4.dequantise(codes, scales, *shape, out),
                           bnb.dequantize_4bit(theirs, state))


@pytest.mark.parametrize("shape", [(64, 64), (48, 128), (100, 1024), *REAL])
def test_double_quantisation_is_bitsandbytes_too(shape):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(4)) * 0.02
    theirs, state = bnb.quantize_4bit(W, quant_type="nf4", compress_statistics=True)
    codes, scales = nf4.quantise(W)
    assert torch.equal(codes, theirs.flatten())
    codes8, largest, mean = nf4.quantise_scales(scales)
    again, absmax = portable_scales(scales - scales.mean())
    assert torch.equal(codes8, again) and torch.equal(largest, absmax)
    assert torch.equal(largest, state.state2.absmax) and torch.equal(mean[0], state.offset)
    odd = codes8 != state.absmax  # by the coarse table of its CPU kernel
    x = nf4.scaled(nf4.F.pad(scales - mean, (0, -len(scales) % 256)).view(-1, 256))[0]
    far = [(nf4.DYNAMIC[c.int()] - x.flatten()[: len(c)]).abs()
           for c in (codes8, state.absmax)]
    assert odd.float().mean() < 0.005 and (far[0] <= far[1]).all(), "ours is the nearer one"
    assert (far[1] - far[0]).max() < 1e-4, "by a hair"
    restored = nf4.dequantise_scales(state.absmax, largest, mean)
    assert torch.equal(
        restored, bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset)


def test_the_sixteen_values_are_the_papers_quantiles_and_scales_have_bitsandbytes_values():
    normal = torch.distributions.Normal(0.0, 1.0).icdf
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
    up = normal(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    down = -normal(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat((up, down, torch.zeros(1))).sort().values
    torch.testing.assert_close(
        torch.tensor(nf4.NF4_VALUES, dtype=torch.float64), values / values.max(),
        atol=1e-6, rtol=1e-6)
    assert torch.equal(nf4.DYNAMIC, bnb.create_dynamic_map())


def test_nearest_is_the_nearest():
    x = torch.linspace(-1, 1, 4001)
    table = nf4.VALUES
    far = (x[:, None] - table).abs()
    assert torch.equal(far.gather(1, nf4.nearest(x, table).long()[:, None])[:, 0], far.amin(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tied model with biases and rows of whole blocks."""
    return tiny.folder(tmp_path_factory.mktemp("nf4") / "base", "llama32", attention_bias=True,
                       **WIDE)


def dequantised(folder, dtype=torch.float32, double=False):
    """The model whose matrices are what the codes say, as plain linear layers."""
    model, _ = load_model(folder, dtype=dtype)
    for name, m in list(model.named_modules()):
        if nf4.fits(name, m):
            m.weight.data = NF4Linear(m.weight.data, None, double).dense(dtype)
    return model


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", [{}, {"dora": True}, {"rslora": True, "dropout": 0.3},
                                  {"dora": True, "dropout": 0.3}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_qlora_computes_what_lora_does_on_the_dequantised_model(folder, dtype, kind, double):
    """The same loss and gradients: the matrices are equal, and so are the products with them."""
    quantised, _ = load_model(folder, dtype=dtype, quant="nf4", double=double)
    plain, _ = load_model(folder, dtype=torch.float32, compute_dtype=dtype)
    for name, m in list(plain.named_modules()):
        if nf4.fits(name, m):
            m.weight.data = NF4Linear(m.weight.data, None, double).dense(torch.float32)
    plain.to(dtype)
    results = []
    for model in (quantised, plain):
        torch.manual_seed(0)
        lora.add_lora(model, 4, 8.0, kind.get("dropout", 0.0), ["all-linear"],
                      kind.get("rslora", False), kind.get("dora", False),
                      modules_to_save=["embed_tokens"])
        with torch.no_grad():
            for m in lora.adapters(model).values():
                m.lora_B.weight.normal_(0, 0.1)
        model.train()
        torch.manual_seed(1)
        loss = model(IDS, DOC, POS, TARGETS).mean()
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()
                                      if p.grad is not None}))
    (loss, grads), (wanted, wanted_grads) = results
    assert grads.keys() == wanted_grads.keys()
    # the same products of the same numbers; DoRA's lengths come from W before bf16 rounded it
    close = 1e-6 if dtype == torch.float32 or not kind.get("dora") else 0.05
    torch.testing.assert_close(loss, wanted, rtol=close, atol=close)
    for name, g in grads.items():
        apart = (g - wanted_grads[name]).norm() / wanted_grads[name].norm()
        assert apart <= close, name


def test_step_zero_is_the_dequantised_base_and_only_matrices_of_blocks_are_quantised(folder):
    model, _ = load_model(folder, quant="nf4")
    with torch.no_grad():
        logits = model(IDS, DOC, POS)
        torch.testing.assert_close(logits, dequantised(folder)(IDS, DOC, POS))
        lora.add_lora(model, 4, 8.0, 0.0, ["all-linear"])
        assert torch.equal(model(IDS, DOC, POS), logits)
        for m in lora.adapters(model).values():
            m.lora_B.weight.normal_()
        with lora.disabled(model):
            assert torch.equal(model(IDS, DOC, POS), logits)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert {n.rsplit(".", 1)[-1] for n in frozen} == {"weight", "bias"}
    assert all("norm" in n or "embed" in n or n.endswith("bias") for n in frozen)
    assert len(nf4.nf4_layers(model)) == 14
    assert not any("codes" in n or "scales" in n for n, _ in model.named_parameters())


def test_no_cast_of_the_model_touches_codes_or_scales(folder):
    model, _ = load_model(folder, quant="nf4", double=True)
    expected = [m.dense(torch.float32) for m in nf4.nf4_layers(model)]
    model.to(torch.bfloat16).half()
    after = [m.dense(torch.float32) for m in nf4.nf4_layers(model)]
    assert all(torch.equal(a, b) for a, b in zip(expected, after, strict=True))


def test_a_product_keeps_no_matrix_for_its_gradient():
    """What autograd holds between forward and backward: the codes, and nothing as large as W."""
    linear = NF4Linear(torch.randn(256, 512), None, False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        y = linear(torch.randn(3, 512, requires_grad=True))
    assert sum(x.nbytes for x in saved) == 256 * 512 * 4.5 / 8
    x = torch.randn(3, 512, requires_grad=True, dtype=torch.bfloat16)
    linear(x).sum().backward()
    wanted = linear.dense(torch.bfloat16).sum(0).expand(3, -1)
    torch.testing.assert_close(x.grad, wanted, atol=0.5, rtol=0.02)
    assert y.requires_grad


def test_bits_a_weight():
    for double, bits in ((False, 4.5), (True, 4.127)):
        n_bytes = sum(x.nbytes for x in NF4Linear(torch.randn(1024, 1024), None, double).buffers())
        assert n_bytes * 8 / 2**20 == pytest.approx(bits, abs=0.001)


def test_an_adapter_trained_on_nf4_is_a_plain_one_and_opens_in_peft_and_here(folder, tmp_path):
    peft = pytest.importorskip("peft")
    import transformers

    model, _ = load_model(folder, quant="nf4")
    lora.add_lora(model, 4, 8.0, 0.0, ["all-linear"])
    with torch.no_grad():
        for m in lora.adapters(model).values():
            m.lora_B.weight.normal_(0, 0.1)
    save_adapter(model, tmp_path / "adapter", str(folder), folder)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert "quantization_config" not in config and config["peft_type"] == "LORA"
    assert set(load_file(tmp_path / "adapter/adapter_model.safetensors")) == set(
        adapter_state(model))
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    peer = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    reopened, _ = load_model(tmp_path / "adapter")
    narrow, _ = load_model(tmp_path / "adapter", quant="nf4")
    with torch.no_grad():
        torch.testing.assert_close(
            reopened(IDS, DOC, POS), peer(IDS).logits[:, -1], atol=1e-4, rtol=1e-4)
        assert torch.equal(narrow(IDS, DOC, POS), model(IDS, DOC, POS))


def test_a_quantised_base_is_neither_merged_into_nor_written(folder, tmp_path):
    model, _ = load_model(folder, quant="nf4")
    with pytest.raises(UserError, match="NF4, with less precision than its files"):
        save_model(model, tmp_path / "out", folder)
    lora.add_lora(model, 4, 8.0, 0.0, ["all-linear"])
    with pytest.raises(UserError,
                       match=r"lose most of what was learned; merge into the base's own files"):
        lora.merge(model)
    assert not (tmp_path / "out").exists() and lora.adapters(model)


def test_a_matrix_of_no_whole_blocks_is_refused():
    with pytest.raises(UserError,
                       match="3 x 5 numbers cannot be kept in NF4: expected a multiple of 64"):
        NF4Linear(torch.ones(3, 5), None, False)


def test_quality_of_what_is_kept_is_that_of_nf4():
    """The error of normal weights is the paper's kind: a tenth of their size."""
    W = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    error = (NF4Linear(W, None, False).dense(torch.float32) - W).norm() / W.norm()
    assert 0.08 < error < 0.1 and math.isfinite(error)


def test_a_library_without_kernels_for_this_cuda_is_not_asked(monkeypatch):
    """Which it says only when one is called."""
    library = cextension.ErrorHandlerMockBNBNativeLibrary("No compatible CUDA binary found")
    monkeypatch.setattr(cextension, "lib", library)
    with pytest.raises(RuntimeError, match="not available"):
        library.cdequantize_blockwise_bf16_nf4(None)
    nf4.has_cuda_kernels.cache_clear()
    assert not nf4.has_cuda_kernels()
    nf4.has_cuda_kernels.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_the_kernel_and_the_table_agree(dtype, monkeypatch):
    W = torch.randn(512, 2048, device="cuda")
    codes, scales = nf4.quantise(W)
    theirs, state = bnb.quantize_4bit(W, blocksize=64, quant_type="nf4")
    assert torch.equal(codes, theirs.flatten()) and torch.equal(scales, state.absmax)
    assert nf4.has_cuda_kernels()
    by_kernel = nf4.dequantise(codes, scales, 512, 2048, dtype)
    monkeypatch.setattr(nf4, "has_cuda_kernels", lambda: False)
    assert torch.equal(by_kernel, nf4.dequantise(codes, scales, 512, 2048, dtype))
