"""--plan-for: memory, time and cost of a run on a device, from config.json alone.

A GPU is a row of a table. `cpu` is this machine: its memory, and the measured speed of one large
matrix product. The share of the peak speed that training reaches is an assumption (--plan-share),
and it is printed with the result. No weights and no data are read.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from checkpoints.model_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG_FILE,
    base_model_dir,
    read_config,
    resolve_model_dir,
)
from layers import nf4
from layers.attention_metadata import Backend
from layers.config import ModelConfig
from runtime.console import FLAGS, UserError
from runtime.device import PEAK_FLOPS, GiB, compute_dtype, device_name, memory_limit_gb
from training import memory_estimate
from training.batch_size import largest_fitting
from training.flops import flops_per_token
from training.memory_estimate import MemoryEstimate
from training.settings import Settings, resolve_auto

GPUS = {  # name for --plan-for: (name in PEAK_FLOPS, GB as sold)
    "t4": ("T4", 16), "l4": ("L4", 24), "a10g": ("A10G", 24), "4090": ("4090", 24),
    "a100-40": ("A100", 40), "a100": ("A100", 80), "h100": ("H100", 80), "h200": ("H200", 141)}


@dataclass(frozen=True)
class Target:
    """The devices that a run is estimated for."""

    count: int
    kind: str  # "GPU" or "CPU"
    name: str
    memory_gb: float  # of one device
    usable_gb: float  # what the tensors of a step may take of it
    dtype: torch.dtype  # of matrix products
    peak_flops: float  # FLOP/s of one device
    peak_source: str
    attention_backend: Backend

    def __str__(self) -> str:
        return (f"{self.count} x {self.name}, {self.memory_gb:.0f} GB, "
                f"{self.peak_flops / 1e12:.3g} TFLOP/s of {str(self.dtype)[6:]} products "
                f"{self.peak_source}")


def usable_gb(gb: float) -> float:
    """GB of a GPU that the tensors of a step may take: 10 % are left for fragmentation of the
    allocator, and 0.5 GB for the CUDA context."""
    return 0.9 * gb - 0.5


def target_of(s: Settings) -> Target:
    """The devices that --plan-for names. UserError (FLAGS) if they are not known."""
    match = re.fullmatch(r"(?:(\d{1,4})x)?(.+)", s.plan_for.lower())
    if match and match[2] == "cpu" and match[1] in (None, "1"):
        return _this_cpu(s)
    if not match or match[2] not in GPUS or match[1] == "0":
        raise UserError(f"--plan-for {s.plan_for}: expected one of {', '.join(GPUS)}, or several "
                        "as in 8xh100, or cpu for this machine", FLAGS)
    name, gb = GPUS[match[2]]
    dtype, flag = torch.bfloat16, "bf16"
    backend: Backend = "varlen_flash"
    if name == "T4":  # no bf16, and no packed attention kernel before Ampere
        dtype, flag, backend = torch.float16, "fp16", "sdpa_mask"
    if s.dtype not in ("auto", flag):
        raise UserError(f"--dtype {s.dtype}: the known peak of a {name} is that of "
                        f"{str(dtype)[6:]}; remove the flag", FLAGS)
    return Target(int(match[1] or 1), "GPU", name, gb, usable_gb(gb), dtype, PEAK_FLOPS[name],
                  "by its data sheet", backend)


def _this_cpu(s: Settings) -> Target:
    device = torch.device("cpu")
    dtype = compute_dtype(device, s.dtype)
    gb = memory_limit_gb(device)
    return Target(1, "CPU", f"this {device_name(device)}", gb, gb, dtype, measure_flops(dtype),
                  "measured here", "cpu")


def measure_flops(dtype: torch.dtype, n: int = 1536, repeats: int = 3) -> float:
    """FLOP/s of one n x n x n matrix product on this CPU, the best of some repeats."""
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    a @ b  # the first product includes setting up the library
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


def plan_for(s: Settings, target: Target | None = None) -> None:
    """Print what settings take on the devices of --plan-for, or on `target`.

    UserError (FLAGS) if the settings do not say enough.
    """
    if not s.steps:
        raise UserError("--plan-for: needs --steps, because without data the number of epochs does "
                        "not give a number of steps", FLAGS)
    target = target or target_of(s)
    config, adapter = _read_shape(s)
    s = resolve_auto(s, config.max_position_embeddings)
    if s.seq_len > config.max_position_embeddings:
        raise UserError(f"--seq-len {s.seq_len}: the model's context is "
                        f"{config.max_position_embeddings}; lower --seq-len", FLAGS)
    tokens = _tokens_per_step(s, target)
    rows = _choose_rows(s, target, config, adapter, tokens)
    estimate = _estimate(s, target, config, adapter, tokens, rows)
    _print_plan(s, target, config, adapter, tokens, rows, estimate)


def _read_shape(s: Settings) -> tuple[ModelConfig, Path | None]:
    """The model's config, and the folder of the adapter if --model is one."""
    files = (CONFIG_FILE, ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    folder = resolve_model_dir(s.model, files)
    base = base_model_dir(folder, files)
    return read_config(base), folder if folder != base else None


def _tokens_per_step(s: Settings, target: Target) -> int:
    """Tokens of a step over all devices. UserError if they are not whole rows."""
    rows = 1 if s.rows == "auto" else s.rows
    micro_batch = rows * s.seq_len * target.count
    tokens = s.tokens_per_step
    if not tokens and s.rows != "auto":
        tokens = micro_batch
    if not tokens or tokens % micro_batch:
        raise UserError(f"--tokens-per-step {tokens}: not a multiple of rows {s.rows} x seq-len "
                        f"{s.seq_len} x {target.kind}s {target.count}", FLAGS)
    return tokens


def _estimate(s: Settings, target: Target, config: ModelConfig, adapter: Path | None, tokens: int,
          rows: int) -> MemoryEstimate:
    """Memory of a step on one device with so many rows."""
    passes = 2 if tokens > rows * s.seq_len * target.count else 1
    return memory_estimate.estimate(config, replace(s, rows=rows), target.dtype, passes, adapter,
                                target.attention_backend, target.count, target.memory_gb)


def _choose_rows(s: Settings, target: Target, config: ModelConfig, adapter: Path | None,
                 tokens: int) -> int:
    """--rows, or for auto as many as fit."""
    if s.rows != "auto":
        return s.rows
    limit = target.usable_gb * GiB
    return largest_fitting(tokens // (s.seq_len * target.count),
                     lambda n: _estimate(s, target, config, adapter, tokens, n).total <= limit)


def _print_plan(s: Settings, target: Target, config: ModelConfig, adapter: Path | None, tokens: int,
                rows: int, estimate: MemoryEstimate) -> None:
    model = memory_estimate.meta_model(config, s, target.dtype, adapter)
    parameters = sum(p.numel() for p in model.parameters())
    parameters += sum(m.numel for m in nf4.nf4_layers(model))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    flops = flops_per_token(model, s)
    tokens_per_second = target.peak_flops * s.plan_share * target.count / flops
    hours = tokens * s.steps / tokens_per_second / 3600
    fits = "fits" if estimate.total <= target.usable_gb * GiB else "does not fit"
    cost = f"unknown; --plan-price gives the price of a {target.kind} for one hour"
    if s.plan_price:
        cost = (f"{hours * target.count * s.plan_price:,.2f} at {s.plan_price:g} for an hour of "
                f"one {target.kind}")
    not_counted = "loading, evaluation, saving"
    if target.count > 1:
        not_counted += ", communication between GPUs"
    if s.tune == "qlora":
        not_counted += ", dequantizing NF4"
    print(
        f"memory       {estimate.total / GiB:.2f} GB needed at most ({estimate}); {fits}: "
        f"{target.usable_gb:.1f} GB are usable\n"
        f"time         {hours:,.1f} hours, {tokens_per_second:,.0f} tokens/s: "
        f"{flops / 1e9:,.1f} GFLOP for a token at {s.plan_share:.0%} of the peak, which is assumed "
        "(--plan-share)\n"
        f"cost         {cost}\n"
        f"steps        {s.steps:,} of {tokens:,} tokens, {tokens * s.steps:,} in all; rows {rows}\n"
        f"parameters   {parameters:,}, trained {trained:,}\n"
        f"{target.kind + 's':<13}{target}\n"
        f"not counted  {not_counted}")
