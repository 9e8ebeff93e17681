"""Linear layers for decoding on a CPU compute what the plain ones do."""

import pytest
import torch

import lora
from helpers import tiny
from helpers.generation import with_adapter
from inference.cpu_linear import (
    GemvLinear,
    MkldnnPackedLinear,
    cast_adapters,
    optimize_for_inference,
    supports_packed_weights,
)
from inference.decode import DecodeStep, prefill
from model import KVCache, Llama


def read(model: Llama, rows: int) -> torch.Tensor:
    """Logits behind some prompts and one more id each."""
    prompts = [tiny.tokens(1, 9 + i, seed=i)[0].tolist() for i in range(rows)]
    with torch.inference_mode():
        cache = KVCache(model.config, rows, 40, "cpu", model.compute_dtype)
        prefill(model, prompts, cache)
        return DecodeStep(model)(torch.arange(5, 5 + rows), cache, cache)


@pytest.mark.parametrize("adapter", ["", "lora", "dora"])
@pytest.mark.parametrize("shape", ["llama32", "biases", "gemma2"])
@pytest.mark.parametrize("amx", [False, True])
def test_a_packed_model_computes_what_a_plain_one_does(shape, adapter, amx):
    """In float32 to rounding; in bf16 about as close to float32 as the plain model."""
    peer, logits = tiny.peer(shape).bfloat16().float(), {}
    for dtype in (torch.float32, torch.bfloat16):
        for packed in (False, True):
            model = with_adapter(tiny.ours(peer, shape, dtype), adapter)
            for m in model.modules():  # an adapter stays in float32
                if type(m) is not torch.nn.Linear:
                    for p in m.parameters(recurse=False):
                        p.data = p.data.to(dtype)
            if packed:
                optimize_for_inference(model, amx=amx)
                expected = GemvLinear if amx and dtype == torch.bfloat16 else MkldnnPackedLinear
                assert isinstance(model.lm_head, expected) == supports_packed_weights(model)
                factor_dtype = dtype if adapter == "lora" else torch.float32  # as DoRA's row norms
                dtypes = {m.lora_A.weight.dtype for m in lora.adapters(model).values()}
                assert dtypes <= {factor_dtype}
            logits[dtype, packed] = [read(model, rows) for rows in (1, 3, 20)]
    for i, exact in enumerate(logits[torch.float32, False]):
        torch.testing.assert_close(logits[torch.float32, True][i], exact, atol=2e-4, rtol=1e-4)
        plainly, packed = ((logits[torch.bfloat16, x][i] - exact).abs().mean() for x in (0, 1))
        assert 0 < packed < 1.3 * plainly


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_casting_an_adapter_once_gives_the_same_bits(adapter):
    model = tiny.ours(tiny.peer("llama32"), "llama32", torch.bfloat16).bfloat16()
    model = with_adapter(model, adapter)
    plain = read(model, 3)
    assert {m.lora_B.weight.dtype for m in lora.adapters(model).values()} == {torch.float32}
    cast_adapters(model)
    assert {m.lora_B.weight.dtype for m in lora.adapters(model).values()} == {
        torch.bfloat16 if adapter == "lora" else torch.float32}
    assert torch.equal(read(model, 3), plain)


@pytest.mark.parametrize("shape", ["llama32", "biases"])
def test_a_packed_model_that_keeps_its_head_gives_the_same_losses(shape):
    peer = tiny.peer(shape)
    plain, packed = tiny.ours(peer, shape), tiny.ours(peer, shape)
    optimize_for_inference(packed, keep_head_weight=True)
    ids = torch.randint(0, tiny.V, (2, 24), generator=torch.Generator().manual_seed(0))
    batch = ids, torch.zeros_like(ids), torch.arange(24).expand(2, 24), ids.roll(-1, 1)
    with torch.inference_mode():
        torch.testing.assert_close(packed(*batch), plain(*batch), atol=1e-5, rtol=1e-5)


def test_a_model_stays_unchanged_where_onednn_has_no_packed_product(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    model = tiny.ours(tiny.peer("llama3"), "llama3", torch.bfloat16).bfloat16()
    optimize_for_inference(model)
    assert not any(isinstance(m, MkldnnPackedLinear) for m in model.modules())
