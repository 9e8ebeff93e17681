"""What a run would do and what it takes, said before it does it.

One idea: a plan is read off the very model, data and settings that would run, not off a table of
them. Only a GPU that is not here (`foretell`) is a row of a table, and what it would reach is an
assumption that is printed beside the result.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import time

import torch

from checkpoints.huggingface import saved_bytes
from checkpoints.model_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG_FILE,
    base_model_dir,
    read_config,
    resolve_model_dir,
)
from data import IGNORE, Batch
from layers import nf4
from model import Llama
from runtime import console
from runtime.console import FLAGS, STORAGE, UserError
from runtime.device import (
    PEAK_FLOPS,
    GiB,
    memory_limit_gb,
    peak_memory_gb,
    synchronize,
)
from training import memory_estimate as memory
from training import monitor as watch
from training import optimizer as optim
from training.objective import Objective
from training.run import Run
from training.settings import Settings

CARDS = {  # as --plan-for has them: the name in PEAK_FLOPS, and GB as sold
    "t4": ("T4", 16), "l4": ("L4", 24), "a10g": ("A10G", 24), "4090": ("4090", 24),
    "a100-40": ("A100", 40), "a100": ("A100", 80), "h100": ("H100", 80), "h200": ("H200", 141)}


def show(run: Run, origins: dict[str, str], objective: Objective) -> None:
    """Print what would be done and what it takes; UserError if the run would be refused."""
    _show(run, origins, objective)
    memory.willing(run.model.config, run.s, run.ranks)
    room(run)


def disk(run: Run) -> int:
    """Bytes that a run comes to at the most: its resume points and --best's with one more of each
    that is being written, or in the end without those and with the result."""
    s = run.s
    trained = sum(x.nbytes for x in run.trained.values())
    saves, best = 2 + run.steps // run.save_every, trained if s.best else 0
    result = saved_bytes(run.model, run.folder) if s.tune == "full" else trained
    return max(min(s.keep + 1, saves) * point(run) + 3 * best,
               min(s.keep, saves) * point(run) + 2 * best + result)


def point(run: Run) -> int:
    """Bytes of a resume point, all ranks' parts: what trains and its moments."""
    return sum(x.nbytes + optim.bytes_held(name, x, run.s.optimizer)
               for name, x in run.trained.items())


def room(run: Run) -> None:
    """UserError (STORAGE) if the disk has no room for what a run will write, beside what it wrote
    before: for one resume point at least, since old ones go only once it is written."""
    there = sum(x.stat().st_size for name in ("checkpoints", "best", "model")
                for x in (run.out / name).rglob("*") if x.is_file())
    need, free = max(disk(run) - there, point(run)), shutil.disk_usage(run.out).free
    if free < need:
        raise UserError(f"--out {run.out}: {free:,} bytes are free, resume points of this run need "
                        f"{need:,}, its result among them; make room, lower --keep, or name "
                        "another disk", STORAGE)


def _show(run: Run, origins: dict[str, str], objective: Objective) -> None:
    """What would be done and what it takes, measured on one micro-batch that changes nothing."""
    s, n = run.s, run.parameters
    for f in dataclasses.fields(s) if console.is_rank_zero() else ():
        print(f"{f.name.replace('_', '-'):16} {getattr(s, f.name)!s:40} {origins[f.name]}")
    batch = run.loader.next()
    begun = time.perf_counter()
    objective.sums(run.model, batch.to(run.ranks.device)).sum().backward()
    synchronize(run.ranks.device)
    held = peak_memory_gb(run.ranks.device)
    whole = "GPU's tensors" if run.ranks.device.type == "cuda" else "whole process"
    minutes = (time.perf_counter() - begun) * run.micro_batches * run.steps / 60
    moving = [(name, p) for name, p in run.model.named_parameters() if p.requires_grad]
    moments = sum(optim.bytes_held(name, p, s.optimizer) for name, p in moving) / GiB
    base = base_model_dir(run.folder)
    said = memory.on(run.ranks, run.model.config, s, run.model.compute_dtype,
                     run.micro_batches, run.folder if run.folder != base else None)
    tied = {optim.EMBEDDINGS[0]: " (the head too, tied)"} if run.model.lm_head is None else {}
    trained = "\n".join(
        f"             {len(x['params'])} tensors, {sum(p.numel() for p in x['params']):,} "
        f"numbers at {s.lr * x['scale']:.2e}, weight decay {x['weight_decay']}: "
        + ", ".join(sorted({re.sub(r"layers.[0-9]+.", "layers.*.", k) + tied.get(k, "")
                            for k in x["names"]}))
        for x in optim.groups(run.model, s.weight_decay, s.embedding_lr / s.lr or 1.0,
                              s.lora_plus))
    read = run.steps * run.tokens_per_step
    shares = ", ".join(
        f"{x.source.name} {share:.1%} ({x.tokens:,} tokens an epoch; {share * read:,.0f} in this "
        f"run, {share * read / x.tokens:.2f} times)"
        for x, share in zip(run.loader.streams, run.loader.shares, strict=True))
    if (
        not console.is_rank_zero()
    ):  # of several ranks all measure, and one says what it has measured
        return
    print(
        f"\nmachine      {run.ranks}, products in {run.products}\n"
        f"parameters   {n['total']:,}, trained {n['trained']:,}\n{trained}\n"
        f"data         {shares}\n"
        f"steps        {run.steps} of {run.tokens_per_step:,} tokens\n"
        f"memory       {said.total / GiB:.2f} GB of tensors predicted at the most ({said}), of "
        f"{memory_limit_gb(run.ranks.device):.1f} GB here\n"
        f"             {held + moments:.2f} GB measured on one micro-batch, of the {whole}, with "
        f"{moments:.2f} for the optimizer\n"
        f"time         {minutes:.1f} minutes of steps, from that micro-batch (the first is "
        "the slowest)\n"
        f"disk         {disk(run) / GiB:.2f} GB at the most for {s.keep} checkpoints, one that is "
        f"being written{', --best' * bool(s.best)} and the result, of "
        f"{shutil.disk_usage(run.out).free / GiB:.1f} GB free here\n"
        "\nthe first row; what is trained is in colour:")
    tokens, targets, pos = (batch.tokens[0].tolist(), batch.targets[0].tolist(),
                            batch.pos[0].tolist())
    for i, (token, target) in enumerate(zip(tokens, targets, strict=True)):
        if pos[i] == 0:
            print(
                ("\n" if i else "") + console.coloured(run.tokenizer.piece(token), False), end="")
        following = (
            target if target != IGNORE else tokens[i + 1] if pos[i + 1 : i + 2] > [0] else None)
        if following is not None:
            print(console.coloured(run.tokenizer.piece(following), target != IGNORE), end="")
    print(flush=True)  # before what is said of it


def usable(gb: float) -> float:
    """GB that a step's tensors may take of a GPU sold with so many: a tenth is left to what its
    allocator cannot use, half a GB to its context."""
    return 0.9 * gb - 0.5


def flops(model: Llama, s: Settings) -> float:
    """Products for a token of a run, those that --recompute full and a reference (DPO) repeat
    included."""
    forward = model.flops_per_token(s.seq_len, gradient=False)
    blocks = forward - 2 * model.head.numel()
    flops = model.flops_per_token(s.seq_len)
    if s.recompute == "full":
        flops += blocks
    if s.mode == "dpo":
        flops += forward
    return flops


def needed(run: Run) -> tuple[float, float, float]:
    """FLOP of the products that a step needs for each trained token, which alone has logits; for
    each token of a document; and for each 1 of the sum of its documents' squared lengths, which is
    attention.

    DPO's reference is counted where a step computes it; a row's unused tail is not, nor what
    --recompute full makes again. Attention is counted as if no window cut it.
    """
    model = run.model
    reference = run.s.mode == "dpo" and run.loader.sources[0].reference is None
    none, one = (model.flops_per_token(n) + reference * model.flops_per_token(n, gradient=False)
                 for n in (0, 1))
    head = (2 * reference + (6 if model.head.requires_grad else 4)) * model.head.numel()
    return head, none - head, one - none


def inside(b: Batch) -> tuple[int, int]:
    """How many tokens of a batch (B,T) lie in documents, and the sum of the squares of these'
    lengths."""
    seen = b.doc >= 0  # (B,T)
    return int(seen.sum()), int((seen * (2 * b.pos + 1)).sum())  # 1 + 3 + 5 ... = n^2


def foretell(s: Settings) -> None:
    """What settings would take on GPUs that are not here, from the model's config.json alone."""
    found = re.fullmatch(r"(?:(\d{1,4})x)?(.+)", s.plan_for.lower())
    if not found or found[2] not in CARDS or found[1] == "0":
        raise UserError(f"--plan-for {s.plan_for}: expected one of {', '.join(CARDS)}, or several "
                        "as in 8xh100", FLAGS)
    if not s.steps:
        raise UserError("--plan-for: give --steps; without data, epochs say nothing", FLAGS)
    world, (name, gb) = int(found[1] or 1), CARDS[found[2]]
    dtype = torch.float16 if name == "T4" else torch.bfloat16
    if s.dtype not in ("auto", "fp16" if name == "T4" else "bf16"):
        raise UserError(f"--dtype {s.dtype}: the peak known of a {name} is that of "
                        f"{str(dtype)[6:]}; leave the flag out", FLAGS)
    files = (CONFIG_FILE, ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    folder = resolve_model_dir(s.model, files)
    base = base_model_dir(folder, files)
    config, adapter = read_config(base), folder if folder != base else None
    if s.seq_len > config.max_position_embeddings:
        raise UserError(f"--seq-len {s.seq_len}: the model's context is "
                        f"{config.max_position_embeddings}", FLAGS)
    backend = "sdpa_mask" if name == "T4" else "varlen_flash"  # the kernel needs an Ampere GPU

    def need(rows: int) -> memory.Need:
        return memory.need(config, dataclasses.replace(s, rows=rows), dtype,
                           2 if tokens > rows * each else 1, adapter, backend, world, gb)

    each = s.seq_len * world  # tokens of a row on every rank
    tokens = s.tokens_per_step or (0 if s.rows == "auto" else s.rows * each)
    if not tokens or tokens % (each * (1 if s.rows == "auto" else s.rows)):
        raise UserError(f"--tokens-per-step {tokens}: no multiple of rows {s.rows} x seq-len "
                        f"{s.seq_len} x GPUs {world}", FLAGS)
    rows = s.rows if s.rows != "auto" else watch.most_rows(
        tokens // each, lambda n: need(n).total <= usable(gb) * GiB)
    said = need(rows)
    fits = said.total <= usable(gb) * GiB
    model = memory.shaped(config, s, dtype, adapter)
    numbers = sum(p.numel() for p in model.parameters()) + sum(m.numel for m in nf4.found(model))
    moving = sum(p.numel() for p in model.parameters() if p.requires_grad)
    speed = PEAK_FLOPS[name] * s.plan_share * world / flops(model, s)  # tokens a second
    hours = tokens * s.steps / speed / 3600
    cost = f"{hours * world * s.plan_price:,.2f} at {s.plan_price:g} an hour and GPU" \
        if s.plan_price else "unknown; give what a GPU costs an hour by --plan-price"
    print(
        f"parameters   {numbers:,}, trained {moving:,}\n"
        f"GPUs         {world} x {name}, {gb} GB, {PEAK_FLOPS[name] / 1e12:.0f} TFLOP/s of "
        f"{str(dtype)[6:]} products on its data sheet\n"
        f"memory       {said.total / GiB:.2f} GB predicted at the most ({said}); "
        f"{'fits' if fits else 'does not fit'}: {usable(gb):.1f} GB are counted on\n"
        f"steps        {s.steps:,} of {tokens:,} tokens, {tokens * s.steps:,} in all; rows {rows}\n"
        f"time         {hours:,.1f} hours, {speed:,.0f} tokens/s: {flops(model, s) / 1e9:,.1f} "
        f"GFLOP a token at {s.plan_share:.0%} of the peak, which is assumed (--plan-share)\n"
        f"cost         {cost}\n"
        "not counted  loading, evaluation, saving, messages among GPUs"
        f"{', unpacking four bits' if s.tune == 'qlora' else ''}")
