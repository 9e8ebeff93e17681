"""What is predicted from shapes is what real steps hold: tensor by tensor, and as the system sees
it."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lora
import train
from checkpoints.resume_point import read_checkpoint, save_checkpoint
from data import Batch
from helpers import fork, tiny
from layers import cross_entropy as loss
from layers import fp8, nf4
from layers.attention_metadata import Backend
from layers.config import ModelConfig
from runtime.console import UserError
from runtime.device import GiB, memory_in_use_gb, peak_memory_gb, reset_peak_memory
from runtime.distributed import Distributed
from runtime.paths import ROOT
from training import memory_estimate as memory
from training import optimizer as optim
from training.batch_size import MemoryTrial
from training.objective import NLL, objective_of
from training.settings import Settings

WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "max_position_embeddings": 512}
BIG = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 16,
       "max_position_embeddings": 512}
WAYS = {"all weights": {}, "recomputed": {"recompute": "full"}, "bf16": {"optimizer": "adamw-bf16"},
        "8 bits": {"optimizer": "adamw8bit"}, "LoRA": {"tune": "lora"},
        "LoRA, recomputed": {"tune": "lora", "recompute": "full"},
        "all weights, selective": {"recompute": "selective"},
        "QLoRA, selective": {"tune": "qlora", "recompute": "selective"},
        "eight bits": {"dtype": "fp8"},
        "QLoRA": {"tune": "qlora", "double_quant": True},
        "DoRA and embeddings": {"tune": "lora", "dora": True, "train_embeddings": True,
                                "lora_dropout": 0.1},
        "one layer": {"train_layers": ["1"]}, "NEFTune": {"neftune": 5.0},
        "DPO": {"mode": "dpo"}, "CPO": {"mode": "cpo"},
        "DPO, LoRA": {"mode": "dpo", "tune": "lora"},
        "DPO, LoRA, recomputed": {"mode": "dpo", "tune": "lora", "recompute": "full",
                                  "train_embeddings": True},
        "CPO, LoRA": {"mode": "cpo", "tune": "lora"}}


def settings(**words) -> Settings:
    return Settings(rows=4, seq_len=256, lora_rank=8, **words)


def really(shape: str, s: Settings, dtype: torch.dtype, passes: int,
           sizes: loss.ChunkSizes | None = None, backend: Backend = "auto") -> int:
    """The most bytes that tensors hold in the second step of a real model, from its weights on."""
    model = tiny.ours(tiny.peer(shape, **WIDE), shape, dtype, s.recompute, s.neftune, backend,
                      **WIDE)
    model.loss.sizes = sizes
    ids = torch.randint(3, tiny.V, (s.rows, s.seq_len))
    doc = (torch.arange(s.seq_len) > s.seq_len // 2).long().expand_as(ids)
    batch = Batch(ids, ids, doc, torch.arange(s.seq_len).expand_as(ids))
    if s.mode == "dpo" and s.tune == "full":
        batch.reference = torch.zeros(ids.shape)
    objective = objective_of(s)
    with memory.TensorTracker() as tracker, torch.no_grad():
        kept = torch.bfloat16 if s.optimizer == "adamw-bf16" else torch.float32
        kept = kept if s.tune == "full" and not s.train_layers else dtype
        for m in model.modules():  # made anew, so that all are seen
            for name, p in m._parameters.items():
                if p is not None:
                    m._parameters[name] = torch.nn.Parameter(p.to(kept).clone())
        for name, m in list(model.named_modules()):
            if s.tune == "qlora" and nf4.fits(name, m):
                model.set_submodule(name, nf4.NF4Linear(m.weight, m.bias, s.double_quant))
        whole = lora.extra_modules(model, s.train_embeddings, s.train_norms)
        if s.tune != "full":
            lora.add_lora(model, 8, 32.0, s.lora_dropout, ["all-linear"], False, s.dora, [], whole)
        if s.train_layers:
            lora.train_layers(model, [1], whole)
        if s.dtype == "fp8":
            fp8.convert_to_fp8(model)
        m = None  # a layer that was replaced must go
        optimizer = optim.adamw(model.train(), 1e-3, (0.9, 0.95), 0.1, kind=s.optimizer)
        for step in range(2):
            if step == 1:
                tracker.peak = dict(tracker.bytes)
            for _ in range(passes):
                with torch.enable_grad():
                    objective.sums(model, batch).reshape(-1)[: 1 + (s.mode == "cpo")].sum() \
                        .backward()
            optimizer.step()
            optimizer.zero_grad()
    return sum(tracker.peak.values())


@pytest.mark.parametrize("way", [*(x for x in WAYS if x != "eight bits"), pytest.param(
    "eight bits", marks=pytest.mark.slow)])  # which a CPU multiplies slowly
@pytest.mark.parametrize("shape", ["llama32", *(pytest.param(x, marks=pytest.mark.slow)
                                               for x in ("gemma3", "smollm3-window"))])
def test_the_prediction_is_what_a_real_steps_tensors_hold(shape, way):
    s = settings(**WAYS[way])
    config = ModelConfig.from_hf(tiny.config(shape, **WIDE))
    for dtype, passes in ((torch.float32, 1), (torch.bfloat16, 2)):
        said = memory.estimate(config, s, dtype, passes).step
        assert said == pytest.approx(really(shape, s, dtype, passes), rel=0.05), (dtype, passes)


def test_documents_one_after_the_other_are_predicted_too():
    s, config = settings(), ModelConfig.from_hf(tiny.config("llama32", **WIDE))
    predicted = memory.estimate(config, s, torch.bfloat16, backend="cpu_documents").step
    real = really("llama32", s, torch.bfloat16, 1, backend="cpu_documents")
    assert predicted == pytest.approx(real, rel=0.05)


def test_the_rows_of_many_threads_are_predicted_too(monkeypatch):
    s, config, found = settings(), ModelConfig.from_hf(tiny.config("llama32", **WIDE)), []
    for threads in (1, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        sizes = loss.chunk_sizes("cpu", tiny.V, WIDE["hidden_size"], cached_numel=1 << 12)
        said = memory.estimate(config, s, torch.bfloat16, sizes=sizes)
        real = really("llama32", s, torch.bfloat16, 1, sizes)
        assert said.step == pytest.approx(real, rel=0.01)
        found.append(said.logits)
    assert found[1] > 1.2 * found[0], "192 rows, where one thread's 12 count as NEAR"


def test_parts_are_exact_where_shapes_alone_decide():
    words = dict(WIDE, vocab_size=tiny.V)
    config = ModelConfig.from_hf(tiny.config("llama3", **words))
    n = sum(p.numel() for p in tiny.peer("llama3", **words).parameters())
    full = memory.estimate(config, settings(recompute="full"), torch.float32)
    assert (full.weights, full.optimizer) == (4 * n, 8 * n) and full.total > 12 * n
    narrow = memory.estimate(config, settings(optimizer="adamw-bf16"), torch.bfloat16)
    assert (narrow.weights, narrow.optimizer) == (2 * n, 4 * n)
    again = memory.estimate(config, settings(), torch.float32, micro_batches=2)
    assert again.total > memory.estimate(config, settings(), torch.float32).total, (
        "gradients stand while the next micro-batch is on its way")


def test_a_prediction_leaves_nothing_behind_that_has_no_numbers():
    """In a process of its own, where the prediction is the first to need NF4's tables."""
    work = """
import torch
from helpers import tiny
from layers import nf4
from layers.config import ModelConfig
from training import memory_estimate as memory
from training.settings import Settings
s = Settings(rows=1, seq_len=16, tune="qlora", double_quant=True)
memory.estimate(ModelConfig.from_hf(tiny.config("llama3")), s, torch.float32)
W = torch.randn(64, 64)
scales = nf4.quantise_scales(nf4.quantise(W)[1])
layer = nf4.NF4Linear(W, None, double=True)
assert [type(x) for x in (*scales, *layer.buffers(), layer(W))] == [torch.Tensor] * 8
assert (layer.dense(torch.float32) - W).abs().max() < 0.2 * W.abs().max()
"""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_model_of_eight_billion_is_planned_without_its_weights():
    config = ModelConfig.from_hf(tiny.config(
        "llama3", vocab_size=128256, hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=8192))
    s = Settings(rows=1, seq_len=1024, tune="qlora", recompute="full")
    before = peak_memory_gb(torch.device("cpu"))
    found = memory.estimate(config, s, torch.bfloat16)
    matrices, rest = 6_979_321_856, 2 * 128256 * 4096 + 65 * 4096
    small = 41_943_040 * 4  # LoRA of rank 16 on all linear layers, float32
    assert found.weights == matrices * 4.5 / 8 + rest * 2 + small
    assert found.optimizer == 2 * small and 5.5 < found.total / GiB < 8
    assert peak_memory_gb(torch.device("cpu")) - before < 0.3


def test_what_cannot_fit_is_refused_in_one_line_and_what_fits_is_not_measured():
    config = ModelConfig.from_hf(tiny.config("llama3", **WIDE))
    one = Distributed.start("cpu")
    memory.check_memory(config, settings(), torch.float32, one, 1)
    exact = memory.estimate(config, settings(), torch.float32).total
    less, more = exact / GiB * 0.99, exact / GiB * 1.01
    with pytest.raises(UserError, match=r"a step needs .*\(weights .*logits .*--recompute") as e:
        memory.check_memory(config, settings(), torch.float32, one, 1, limit_gb=less)
    assert e.value.code == 2 and "\n" not in str(e.value)
    for s in (settings(ignore_memory=True), dataclasses.replace(settings(), rows="auto")):
        memory.check_memory(config, s, torch.float32, one, 1, limit_gb=less)
    memory.check_memory(config, settings(), torch.float32, one, 1, limit_gb=more)


def test_what_cannot_fit_a_rank_is_refused_too():
    config = ModelConfig.from_hf(tiny.config("llama3", **BIG))
    two = Distributed(0, 2, torch.device("cpu"))
    s = Settings(rows=1, seq_len=64, shard="fsdp")
    exact = memory.estimate(config, s, torch.float32, world_size=2).total
    less, more = exact / GiB * 0.99, exact / GiB * 1.01
    with pytest.raises(UserError, match=r"a step needs [\d.]+ GB on each of 2 ranks \(weights"):
        memory.check_memory(config, s, torch.float32, two, 1, limit_gb=less)
    memory.check_memory(config, s, torch.float32, two, 1, limit_gb=more)
    with pytest.raises(UserError, match="ranks"):
        memory.check_memory(config, dataclasses.replace(s, shard="ddp"), torch.float32, two, 1,
                     limit_gb=more)


@pytest.mark.parametrize("embeddings", [False, True])
def test_of_qlora_a_rank_cuts_what_trains_whole_alone(embeddings):
    """Blocks in four bits have no matrix that is cut, and adapters stay whole."""
    config = ModelConfig.from_hf(tiny.config("llama3", **BIG))
    s = Settings(rows=1, seq_len=64, tune="qlora", shard="fsdp", train_embeddings=embeddings)
    one, two = (memory.estimate(config, s, torch.bfloat16, world_size=n).total for n in (1, 2))
    assert 0.5 * one < two < 1.2 * one
    if embeddings:  # apart from the adapters' buckets, in which DDP keeps their gradients
        with torch.device("meta"):
            model = memory.meta_model(config, s, torch.bfloat16)
        buckets = sum(p.nbytes for name, p in model.named_parameters() if ".lora_" in name)
        assert two - buckets < one


@pytest.mark.slow
@pytest.mark.parametrize("case", ["full", "full-recompute", "full-selective", "bf16", "lora",
                                  "lora-recompute", "qlora", "qlora-recompute"])
def test_the_prediction_is_within_a_tenth_of_what_the_system_counts(tmp_path_factory, case):
    """110M parameters in processes of their own, in which glibc gives blocks above 1 MB back at
    once; as it comes its heap keeps holes between them, and the system counts those too."""
    folder = str(tmp_path_factory.getbasetemp() / "models")

    def child(name, *args):
        done = subprocess.run(
            [sys.executable, "-m", "bench.memory", "--child", name, json.dumps(args)], cwd=ROOT,
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    if not Path(folder).exists():
        child("draws", "110M", folder)
    said, found = child("predict", case, "110M", folder), child("ours", case, "110M", folder)
    assert said["step"] == pytest.approx(found["peak"] - found["before"], rel=0.1)


def most_of(profile) -> list[int]:
    """The most that the CPU's allocator had given out in each step but the first, above what it had
    at the beginning."""
    now, most = 0, []
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda x: x.start_ns()):
        if event.name() == "a step":
            most.append(now)
        if event.name() == "[memory]":
            now += event.nbytes()
            most[-1:] = [max(x, now) for x in most[-1:]]
    return most[1:]


def of_a_rank(s: Settings, dtype: torch.dtype, passes: int, file: Path, often: bool = False):
    """What a rank does: some steps of a model that is shared, and what its allocator says."""

    def act() -> None:
        model = tiny.ours(tiny.peer("llama32", **BIG), "llama32", dtype, s.recompute, **BIG)
        ranks = Distributed.start("cpu")
        ids = torch.randint(3, tiny.V, (s.rows, s.seq_len))
        doc = (torch.arange(s.seq_len) >= s.seq_len // 2).long().expand_as(ids)
        batch = Batch(ids, ids, doc, torch.arange(s.seq_len).expand_as(ids))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                    profile_memory=True) as profile:
            kept = torch.bfloat16 if s.optimizer == "adamw-bf16" else torch.float32
            model = copy.deepcopy(model).to(kept if s.tune == "full" else dtype)
            if s.tune == "lora":
                lora.add_lora(model, s.lora_rank, s.lora_alpha, 0.0, ["all-linear"])
            ranks.wrap_model(model.train(), s.shard, dtype, kept)
            ranks.sync_every_microbatch |= often
            optimizer = optim.adamw(model, 1e-3, (0.9, 0.95), 0.1, kind=s.optimizer)
            for _ in range(STEPS):
                with torch.profiler.record_function("a step"):
                    train.train_step(model, NLL, [batch] * passes, optimizer, ranks, 1.0)
        file.write_text(json.dumps(most_of(profile)))
        ranks.close()

    return act


NARROW = torch.bfloat16
STEPS = 12  # on a busy machine one in which gloo was late is seen often


@pytest.mark.parametrize("shard, words, passes, dtype", [
    x if x in (("ddp", {}, 1, NARROW), ("fsdp", {}, 2, NARROW))
    else pytest.param(*x, marks=pytest.mark.slow)
    for x in itertools.product(("ddp", "fsdp"), ({}, {"recompute": "full"}, {"tune": "lora"},
                               {"optimizer": "adamw-bf16"}, {"recompute": "selective"}),
                               (1, 2), (NARROW, torch.float32))],
    ids=str)
def test_a_ranks_prediction_is_what_its_allocator_gives_out(tmp_path, shard, words, passes, dtype):
    """The least of some steps: gloo's threads let go of what they sent when they come to it."""
    s = Settings(rows=2, seq_len=128, lora_rank=8, shard=shard, **words)
    config = ModelConfig.from_hf(tiny.config("llama32", **BIG))
    said = memory.estimate(config, s, dtype, passes, world_size=2).step
    ends = fork.ends(fork.together(2, of_a_rank(s, dtype, passes, tmp_path / "found"),
                                   tmp_path / "said"))
    assert ends == [0, 0], (tmp_path / "said-0").read_text()[-2000:]
    found = min(json.loads((tmp_path / "found").read_text()))
    assert said == pytest.approx(found, rel=0.01 if shard == "ddp" else 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [NARROW, torch.float32], ids=str)
def test_a_ranks_prediction_holds_where_gradients_meet_after_every_micro_batch(
        tmp_path, dtype):
    s = Settings(rows=2, seq_len=128, shard="fsdp")
    config = ModelConfig.from_hf(tiny.config("llama32", **BIG))
    seldom = memory.estimate(config, s, dtype, 3, world_size=2)
    often = memory.estimate(config, s, dtype, 3, world_size=2, gpu_gb=1e-6)
    assert often.gradients < 0.75 * seldom.gradients and often.step < seldom.step
    ends = fork.ends(fork.together(2, of_a_rank(s, dtype, 3, tmp_path / "found", often=True),
                                   tmp_path / "said"))
    assert ends == [0, 0], (tmp_path / "said-0").read_text()[-2000:]
    assert often.step == pytest.approx(min(json.loads((tmp_path / "found").read_text())), rel=0.1)


def test_of_a_model_that_is_cut_a_rank_holds_its_part_and_what_is_whole():
    config = ModelConfig.from_hf(tiny.config("llama3", **BIG))
    s = Settings(rows=2, seq_len=128, shard="fsdp")
    one, *more = (memory.estimate(config, s, torch.bfloat16, 1, world_size=n) for n in (1, 2, 4, 8))
    norms = 128 * (2 * 16 + 1)
    for n, found in zip((2, 4, 8), more, strict=True):
        assert found.optimizer == (one.optimizer - 8 * norms) / n + 8 * norms
    assert one.total > more[0].total > more[1].total > more[2].total
    auto = dataclasses.replace(s, shard="auto")
    numbers = one.optimizer / 8
    for gb, how in ((33 * numbers / GiB, "ddp"), (31 * numbers / GiB, "fsdp")):
        chosen = memory.estimate(config, auto, torch.bfloat16, 1, world_size=2, gpu_gb=gb)
        assert chosen == memory.estimate(config, dataclasses.replace(s, shard=how), torch.bfloat16,
                                         1, world_size=2)


@pytest.mark.parametrize("words", [{}, {"optimizer": "adamw-bf16"}, {"tune": "lora"},
                                   {"train_layers": ["1"]}], ids=str)
def test_the_copy_of_a_checkpoint_is_predicted_exactly(tmp_path, words):
    s = settings(**words)
    config = ModelConfig.from_hf(tiny.config("llama32", **WIDE))
    kept = torch.bfloat16 if s.optimizer == "adamw-bf16" else torch.float32
    model = tiny.ours(tiny.peer("llama32", **WIDE), "llama32", torch.float32, **WIDE).to(kept)
    if s.tune == "lora":
        lora.add_lora(model, 8, 32.0, 0.0, ["all-linear"])
    if s.train_layers:
        lora.train_layers(model, [1], [])
    optimizer = optim.adamw(model.train(), 1e-3, (0.9, 0.95), 0.1, kind=s.optimizer)
    ids = torch.randint(3, tiny.V, (1, 16))
    batch = Batch(ids, ids, torch.zeros_like(ids), torch.arange(16)[None])
    NLL.sums(model, batch).backward()
    optimizer.step()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    parts = {"model": trained, "optimizer": optim.state_tensors(model, optimizer)}
    saved, _ = read_checkpoint(save_checkpoint(tmp_path, 1, parts, {"step": 1}, 2))
    n_bytes = sum(x.nbytes for tensors in saved.values() for x in tensors.values() if x.dim())
    estimate = memory.estimate(config, s, torch.float32)
    assert estimate.checkpoint == n_bytes == estimate.total - estimate.step > 0
    assert memory.checkpoint_bytes(model, s.optimizer, 1) == n_bytes
    gpu = memory.estimate(config, s, torch.float32, backend="sdpa_mask")
    assert gpu.checkpoint == 0 and "checkpoint" not in str(gpu)
    for shard in ("ddp", "fsdp"):
        two = memory.estimate(config, dataclasses.replace(s, shard=shard), torch.float32,
                              world_size=2)
        assert two.checkpoint == pytest.approx(n_bytes / 2, rel=0.02)


def test_rows_auto_leaves_memory_for_the_copy_of_a_checkpoint():
    model, cpu = torch.nn.Linear(512, 512), Distributed.start("cpu")
    trial = MemoryTrial(model, NLL, cpu, "adamw", 10 / 0.92, lambda device: 0.0)
    numel = 512 * 513
    assert trial.limit == pytest.approx(10 - (8 + 12) * numel / GiB)  # moments; copy of all


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only on Linux")
def test_memory_that_the_preparation_of_data_freed_does_not_count_as_the_peak_of_a_step():
    cpu = Distributed.start("cpu").device
    reset_peak_memory(cpu)
    start = memory_in_use_gb()
    blocks = [b"x" * (64 << 10) for _ in range(3200)]  # 200 MiB on the heap
    last = b"y" * (64 << 10)  # the heap cannot shrink below this block
    assert peak_memory_gb(cpu) > start + 0.15
    del blocks
    assert peak_memory_gb(cpu) > start + 0.15
    reset_peak_memory(cpu)
    assert peak_memory_gb(cpu) < start + 0.05 and len(last) == 64 << 10
