"""The benchmarks' comparisons can fail: a peer that computes something else is a fault."""

import json
import sys
from collections.abc import Iterator

import pytest
import torch

import bench
from bench import Settings, generate, gpu, train_step
from layers.config import ModelConfig
from training import memory_estimate as memory
from training.settings import read_settings

llama = pytest.importorskip("transformers.models.llama.modeling_llama")


@pytest.fixture
def here(monkeypatch):
    """A benchmark's children, in this process."""

    class Here:
        def __init__(self, module, name, *args):
            result = getattr(sys.modules[module], name)(*json.loads(json.dumps(args)))
            self.given = result if isinstance(result, Iterator) else iter([result])

        def turn(self):
            result = next(self.given)
            torch.set_default_dtype(torch.float32)
            return result

        def end(self):
            return 1.0

    monkeypatch.setattr(bench, "Child", Here)


def wrong(monkeypatch, fault):
    """Make the peer's LLaMA compute something else."""
    if fault == "rope":  # positions twice as far from each other
        turns = llama.LlamaRotaryEmbedding.forward
        monkeypatch.setattr(llama.LlamaRotaryEmbedding, "forward",
                            lambda self, x, position_ids: turns(self, x, 2 * position_ids))
    if fault == "mlp":  # none
        monkeypatch.setattr(llama.LlamaMLP, "forward", lambda self, x: 0 * x)


FAULTS = ["", "rope", "mlp"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("job, case", [
    (train_step.job, "fp32"), (train_step.job, "large"),
    (generate.job, "sixty-four"), (generate.job, "eight")])
def test_a_peer_that_computes_something_else_is_a_fault(here, monkeypatch, job, case, fault):
    """In its losses, or in its answers."""
    wrong(monkeypatch, fault)
    s = Settings("tiny", 1, [case])
    job(s)
    assert bool(s.faults) == bool(fault), s.faults


@pytest.mark.parametrize("fault", [*FAULTS, "a start of its own"])
def test_litgpt_that_computes_something_else_is_a_fault(here, monkeypatch, fault):
    """Its loss is read from its logits, for its own is rounded to eight bits."""
    lit = pytest.importorskip("litgpt.lora")
    if fault == "rope":
        turns = lit.litgpt.model.build_rope_cache
        monkeypatch.setattr(lit.litgpt.model, "build_rope_cache",
                            lambda *args, **more: turns(*args, **(more | {"condense_ratio": 2})))
    if fault == "mlp":
        monkeypatch.setattr(lit.LLaMAMLP, "forward", lambda self, x: 0 * x)
    if fault == "a start of its own":  # which the first loss cannot show, for B is zero
        monkeypatch.setattr(train_step, "same_start", lambda model: None)  # ours, then
    monkeypatch.setitem(train_step.CASES, "large", ("LoRA", "1.1B", ["ours", "litgpt"]))
    s = Settings("tiny", 1, ["large"])
    train_step.job(s)
    assert bool(s.faults) == bool(fault), s.faults


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_gpus_peer_that_computes_something_else_is_a_fault(here, monkeypatch, tune, fault):
    """On a CPU, with nothing compiled and no kernel waited for."""
    wrong(monkeypatch, fault)
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    monkeypatch.setattr(gpu, "timed", lambda step, steps: {
        "losses": [step() for _ in range(steps)], "seconds": [1.0], "device": 1.0})
    monkeypatch.setitem(gpu.CASES, "tiny", gpu.Case("tiny", tune, 32, 32, "", ("compiled",)))
    s = Settings("tiny", 1, [])
    gpu.compare("tiny", {"peak": 1.0}, s)
    assert bool(s.faults) == bool(fault), s.faults


def test_a_side_of_a_gpus_case_that_fails_is_a_fault_and_the_others_stand(monkeypatch):
    result = {"losses": [1.0], "seconds": [1.0], "device": 1.0, "flops": 1.0, "total": 1.0,
             "ids": [[1]], "first": [1]}

    def child(_, what, name, *more):
        if what == "peer" or "static" in more:
            sys.exit(f"{what} {name}: exit code 1\nout of memory")
        return result | ({"seconds": 1.0, "may": [[1]]} if what == "answers" else {})

    monkeypatch.setattr(gpu, "child", child)
    monkeypatch.setattr(gpu, "installed", lambda _: True)
    s = Settings("tiny", 1, [])
    assert [row[1] for row in gpu.compare("full", {"peak": 1.0}, s)] == ["ours"]
    assert len(s.faults) == 2 and "out of memory" in s.faults[0]
    assert [row[1] for row in gpu.answered("stream", {"copy": 1.0}, s)] == [
        "ours", "ours, compiled", "transformers, dynamic cache"]
    assert len(s.faults) == 3


@pytest.mark.parametrize("name, flags", [
    ("full", ["--tune", "full", "--seq-len", "8192"]),
    ("light", ["--tune", "full", "--seq-len", "8192", "--recompute", "selective"]),
    ("fp8", ["--tune", "full", "--seq-len", "8192", "--dtype", "fp8"]),
    ("lora-recompute", ["--tune", "lora", "--seq-len", "4096", "--recompute", "full"]),
    ("qlora", ["--tune", "qlora", "--seq-len", "4096", "--recompute", "full", "--double-quant"])])
def test_what_is_predicted_for_a_gpu_is_what_plan_says_of_these_flags(monkeypatch, name, flags):
    for shape in ("1B", "8B"):
        monkeypatch.setitem(gpu.SHAPES, shape, gpu.SHAPES["tiny"])
    s, _ = read_settings([*flags, "--rows", "1"])
    config = ModelConfig.from_hf(gpu.hf_config(gpu.CASES[name]))
    expected_gb = memory.estimate(config, s, torch.bfloat16, backend="varlen_flash").total / 2**30
    assert gpu.settings(gpu.CASES[name]) == s
    assert gpu.predict(name)["total"] == expected_gb
