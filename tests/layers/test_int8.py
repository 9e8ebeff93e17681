"""Matrices in eight bits: the plain formula's numbers, and transformers' answers with them."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers

import lora
from checkpoints.huggingface import load_model, save_model
from checkpoints.peft_adapter import save_adapter
from helpers import tiny
from inference.cpu_linear import optimize_for_inference
from inference.generate import completions
from inference.sampling import SamplingParams
from layers.int8 import Int8Linear
from runtime.console import UserError

ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-12}  # half a step
IDS = tiny.tokens(2, 24)
DOC, POS = torch.zeros_like(IDS), torch.arange(24).repeat(2, 1)
MANY = tiny.tokens(16, 24), torch.zeros(16, 24, dtype=torch.long), torch.arange(24).repeat(16, 1)
KERNEL = pytest.mark.parametrize("kernel_rows", [32, 0], ids=["kernel", "converted"])


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def formula(W):
    """W with each row in whole steps of a 127th of its largest, float64."""
    step = W.float().abs().amax(1, keepdim=True) / 127
    return (W.float() / step).round().double() * step


@pytest.mark.parametrize("shape", [(48, 32), (30, 52), (7, 13), (256, 2048)])
def test_the_matrix_is_the_plain_formulas_and_as_near_as_steps_of_that_size_are(shape):
    W = drawn(*shape)
    result, step = Int8Linear(W, None).dense(torch.float32), W.abs().amax(1, keepdim=True) / 127
    torch.testing.assert_close(result.double(), formula(W), rtol=1e-6, atol=0)
    assert ((result - W).abs() <= 0.5001 * step).all()
    uniform = ((result - W) / step).square().mean().sqrt() * 12**0.5  # 1, of an even error
    assert abs(uniform - 1) < (0.01 if W.numel() > 1e5 else 0.2)
    W[1] = 0
    assert not Int8Linear(W, None).dense(torch.float32)[1].any()


@KERNEL
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("shape", [(48, 32), (30, 52), (7, 13), (300, 2048)])
@pytest.mark.parametrize("rows", [1, 2, 600])
def test_a_product_is_the_plain_formulas_to_rounding(rows, shape, dtype, kernel_rows):
    """Also where one number of a row is a thousand times the others, as in real models."""
    W, bias = drawn(*shape).to(dtype), drawn(shape[0], seed=1).to(dtype)
    x = drawn(rows, shape[1], seed=2)
    x[:, 3] *= 1000
    x = x.to(dtype)
    result = Int8Linear(W, bias, kernel_rows)(x.view(rows, 1, -1))
    assert result.dtype == dtype and result.shape == (rows, 1, shape[0])
    exact, squares = x.double() @ formula(W).T + bias.double(), formula(W).square()
    # each weight is rounded to the dtype; in float32, each sum
    steps = shape[1] ** 0.5 if dtype == torch.float32 else 1
    spread = steps * ROUNDING[dtype] * (x.double().square() @ squares.T).sqrt()
    bound = 2 * ROUNDING[dtype] * exact.abs() + 4 * spread  # seven deviations of an even error
    assert ((result[:, 0].double() - exact).abs() <= bound).all()


def test_quality_is_that_of_rounded_weights():
    """Relative error to the float product: that of the rounded weights, 0.0086, and little more.
    Until commit 53f4a60 products were those of the rounded weights to the last bit but one."""
    W, x = drawn(2048, 2048), drawn(8, 2048, seed=2).bfloat16()
    exact = x.double() @ W.double().T
    former = (x.double() @ formula(W).T).bfloat16().double()
    for kernel_rows in (32, 0):
        result = Int8Linear(W, None, kernel_rows)(x).double()
        assert (result - exact).norm() < 1.03 * (former - exact).norm() < 0.009 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_no_row_knows_of_another(dtype):
    q, x = Int8Linear(drawn(300, 64), drawn(300), 300), drawn(300, 64, seed=2).to(dtype)
    x[7], x[8, 3], x[9, 3] = 0, float("nan"), float("inf")
    together = q(x)
    assert not together[8:10].isfinite().any() and together[10:].isfinite().all()
    assert torch.equal(together[7], q.bias.to(dtype))
    for i in (0, 7, 11, 299):
        assert torch.equal(together[i], q(x[i]))


@pytest.mark.parametrize("shape", ["biases", "llama32", "gemma2"])  # the last two: a tied head
def test_many_prompts_are_answered_as_by_transformers_with_those_weights(shape, tmp_path):
    """Of unlike lengths, two side by side, each place taken again."""
    peer = tiny.rounded(transformers.AutoModelForCausalLM.from_pretrained(
        tiny.folder(tmp_path, shape), dtype=torch.float32, attn_implementation="eager"))
    model, _ = load_model(tmp_path, quant="int8")
    optimize_for_inference(model.eval())
    prompts = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (30, 3, 17, 9, 1)]
    answers = completions(model, prompts, SamplingParams(12, temperature=0), rows=2)
    for prompt, mine in zip(prompts, answers, strict=True):
        out = peer.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False,
                            pad_token_id=0, eos_token_id=[],
                            attention_mask=torch.ones(1, len(prompt), dtype=torch.long))
        assert mine.ids == out[0, len(prompt):].tolist()
    with torch.inference_mode():
        torch.testing.assert_close(tiny.logits(model, IDS), peer(IDS).logits, atol=1e-3, rtol=1e-3)
    plain, _ = load_model(tmp_path)  # that the test can tell: the rounding is far above that
    with torch.inference_mode():
        assert (tiny.logits(plain, IDS) - peer(IDS).logits).abs().max() > 0.02


def test_all_matrices_are_in_eight_bits_from_the_files_own_numbers(tmp_path):
    """Whatever the dtype of products; embeddings are as without, a tied head is made of them."""
    folder = tiny.folder(tmp_path, "llama32")  # float32, tied
    plain, _ = load_model(folder)
    model, _ = load_model(folder, dtype=torch.bfloat16, quant="int8")
    assert not any(isinstance(m, torch.nn.Linear) for m in model.modules())
    quantized = {k: m for k, m in model.named_modules() if isinstance(m, Int8Linear)}
    assert len(quantized) == 7 * model.config.num_hidden_layers + 1
    for name, m in quantized.items():
        W = model.model.embed_tokens.weight if name == "lm_head" else \
            plain.get_submodule(name).weight
        torch.testing.assert_close(m.weight.double(), formula(W), rtol=1e-6, atol=0)
    table = model.model.embed_tokens.weight
    assert torch.equal(table, plain.model.embed_tokens.weight.bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_sixteen_bits_a_model_is_as_near_to_float32_as_one_of_plain_weights(dtype, tmp_path):
    """Products are rounded once more, by scales or weights in sixteen bits."""
    folder, distances = tiny.folder(tmp_path, "llama3", dtype=torch.bfloat16), []
    for quant in ("none", "int8"):
        exact, _ = load_model(folder, quant=quant)
        model, _ = load_model(folder, dtype=dtype, quant=quant)
        with torch.inference_mode():
            apart = model(*MANY) - exact(*MANY)
        distances.append(apart.square().mean().sqrt())
    assert 0 < distances[1] < 1.5 * distances[0]


@pytest.mark.parametrize("kind", [
    {}, {"dora": True}, {"modules_to_save": ["embed_tokens", "lm_head"]}], ids=str)
def test_an_adapter_is_merged_before_its_base_is_rounded(kind, tmp_path):
    base = tiny.folder(tmp_path / "base", "biases")
    model, _ = load_model(base)
    lora.add_lora(model, 4, 8.0, 0.0, ["all-linear"], **kind)
    with torch.no_grad():
        for m in lora.adapters(model).values():
            m.lora_B.weight.normal_(0, 0.1)
        for name in lora.base_values(model):
            model.get_parameter(name).mul_(1.1)
    save_adapter(model, tmp_path / "adapter", str(base), base)
    peer = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peer = peft.PeftModel.from_pretrained(peer, tmp_path / "adapter").eval().merge_and_unload()
    merged, _ = load_model(tmp_path / "adapter", quant="int8")
    assert not lora.adapters(merged) and not lora.base_values(merged)
    with torch.inference_mode():
        torch.testing.assert_close(merged(IDS, DOC, POS), tiny.rounded(peer)(IDS).logits[:, -1],
                                   atol=1e-3, rtol=1e-3)


def test_a_model_in_eight_bits_is_not_written(tmp_path):
    folder = tiny.folder(tmp_path / "model")
    model, _ = load_model(folder, quant="int8")
    with pytest.raises(UserError, match="is in int8 or NF4, with less precision than its files"):
        save_model(model, tmp_path / "out", folder)
    assert not (tmp_path / "out").exists()
