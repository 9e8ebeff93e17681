"""What is foretold of GPUs that are not here: the work of a real step, over a peak and a share."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lora
from helpers import tiny
from layers.config import ModelConfig
from runtime.console import UserError
from runtime.device import PEAK_FLOPS, GiB, memory_limit_gb
from training import memory_estimate as memory
from training.flops import flops_per_token
from training.plan_for import plan_for, target_of
from training.settings import Settings

WIDE = {"hidden_size": 256, "intermediate_size": 512}


@pytest.fixture
def folder(tmp_path):
    """A model's folder that holds its config.json and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(tiny.config("llama32", **WIDE)))
    return tmp_path


def settings(folder, **words):
    return Settings(**{"model": str(folder), "rows": 2, "seq_len": 32, "steps": 1000,
                             "lora_rank": 8, "plan_for": "h100", **words})


@pytest.mark.parametrize("words", [{}, {"recompute": "full"}, {"tune": "lora"},
                                   {"tune": "lora", "recompute": "full"},
                                   {"tune": "lora", "recompute": "selective"}], ids=str)
def test_the_work_foretold_is_what_a_real_step_multiplies(folder, words):
    s = settings(folder, **words)
    model = tiny.ours(tiny.peer("llama32", **WIDE), "llama32", torch.bfloat16, s.recompute,
                      **WIDE).train()
    if s.tune == "lora":
        lora.add_lora(model, s.lora_rank, s.lora_alpha, 0.0, ["all-linear"])
    ids = tiny.tokens(s.rows, s.seq_len)
    doc, pos = torch.zeros_like(ids), torch.arange(s.seq_len).expand_as(ids)
    with FlopCounterMode(display=False) as counted:
        model(ids, doc, pos, ids).sum().backward()
    per_token = counted.get_total_flops() / ids.numel()
    assert flops_per_token(model, s) == pytest.approx(per_token, rel=0.05)


def said(s, capsys, target=None) -> tuple[str, dict[str, float]]:
    plan_for(s, target)
    text = capsys.readouterr().out
    numbers = {"hours": r"time +([\d,.]+) hours", "gb": r"memory +([\d,.]+) GB",
               "tokens": r"([\d,]+) in all", "rows": r"rows (\d+)", "cost": r"cost +([\d,.]+) at"}
    found = {k: re.search(x, text) for k, x in numbers.items()}
    return text, {k: float(m[1].replace(",", "")) for k, m in found.items() if m}


def test_hours_and_cost_are_the_work_over_a_share_of_the_peak(folder, capsys):
    s = settings(folder, steps=2_000_000, plan_share=0.5, plan_price=2.0)
    text, found = said(s, capsys)
    config = ModelConfig.from_hf(tiny.config("llama32", **WIDE))
    work = flops_per_token(memory.meta_model(config, s, torch.bfloat16), s) * found["tokens"]
    assert found["tokens"] == 2 * 32 * 2_000_000
    assert found["hours"] == pytest.approx(work / (PEAK_FLOPS["H100"] * 0.5) / 3600, abs=0.06)
    assert found["cost"] == pytest.approx(2 * work / (PEAK_FLOPS["H100"] * 0.5) / 3600, abs=0.01)
    assert "50% of the peak, which is assumed" in text and " fits:" in text


def test_rows_are_as_many_as_the_card_holds_and_what_does_not_fit_is_said(
        folder, capsys):
    s = settings(folder, rows="auto", tokens_per_step=32 * 64, plan_for="t4")
    config = ModelConfig.from_hf(tiny.config("llama32", **WIDE))
    sizes = [memory.estimate(config, settings(folder, rows=n), torch.float16, 2,
                         backend="sdpa_mask").total
             for n in (8, 16)]
    between = replace(target_of(s), usable_gb=sum(sizes) / 2 / GiB)
    assert said(s, capsys, between)[1]["rows"] == 8
    tiny_gpu = replace(target_of(s), usable_gb=1e-3)
    assert "does not fit" in said(settings(folder), capsys, tiny_gpu)[0]
    with pytest.raises(UserError, match="not even one row fits"):
        plan_for(s, tiny_gpu)


def test_for_a_cpu_the_memory_is_this_machines_and_the_speed_is_measured(folder, capsys):
    s = settings(folder, plan_for="cpu", plan_share=0.5)
    target = target_of(s)
    assert target.memory_gb == target.usable_gb == memory_limit_gb(torch.device("cpu"))
    assert 1e8 < target.peak_flops < 1e15
    slow = replace(target, peak_flops=1e6)
    text, found = said(s, capsys, slow)
    config = ModelConfig.from_hf(tiny.config("llama32", **WIDE))
    work = flops_per_token(memory.meta_model(config, s, slow.dtype), s) * found["tokens"]
    assert found["hours"] == pytest.approx(work / (1e6 * 0.5) / 3600, rel=0.01)
    assert "measured here" in text and "50% of the peak, which is assumed" in text
    assert found["gb"] == pytest.approx(
        memory.estimate(config, s, slow.dtype, 1, backend="cpu").total / GiB, abs=0.006)


@pytest.mark.parametrize("words, match", [
    ({"plan_for": "b17"}, "expected one of t4, l4"), ({"plan_for": "0xh100"}, "several as in"),
    ({"plan_for": "2xcpu"}, "cpu for this machine"),
    ({"steps": 0}, "needs --steps"), ({"plan_for": "t4", "dtype": "bf16"}, "that of float16"),
    ({"seq_len": 1 << 20}, "the model's context is"),
    ({"tokens_per_step": 100}, "not a multiple of rows 2 x seq-len 32"),
    ({"rows": "auto"}, "not a multiple")])
def test_what_cannot_be_foretold_is_refused_in_one_line(folder, words, match):
    with pytest.raises(UserError, match=match) as e:
        plan_for(settings(folder, **words))
    assert e.value.code == 2 and "\n" not in str(e.value)
