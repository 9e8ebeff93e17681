"""--plan: what a run would do and what it takes, printed before it starts.

The plan is computed from the model, the data and the settings that would run, and measured on one
micro-batch, which changes nothing. The answer comes first (does it fit, memory, time, disk, data),
then the settings that differ from the defaults, then the details.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import time
from dataclasses import dataclass

from checkpoints.model_folder import base_model_dir
from checkpoints.peft_adapter import adapter_state
from data import IGNORE, Batch
from runtime.console import STORAGE, UserError, coloured, is_rank_zero
from runtime.device import (
    GiB,
    memory_limit_gb,
    peak_memory_gb,
    reset_peak_memory,
    synchronize,
)
from runtime.distributed import local_shard
from training import memory_estimate
from training import optimizer as optim
from training.memory_estimate import MemoryEstimate
from training.objective import Objective
from training.settings import Settings
from training.state import Run


@dataclass(frozen=True)
class Measurement:
    """One micro-batch, forward and backward."""

    seconds: float
    memory_gb: float


def show(run: Run, origins: dict[str, str], objective: Objective) -> None:
    """Print the plan of a run. UserError if the run would be refused.

    With several ranks all of them measure, and rank 0 prints.
    """
    s = run.settings
    batch = run.loader.next()
    measured = _measure(run, objective, batch)
    base = base_model_dir(run.model_dir)
    estimate = memory_estimate.estimate_on(
        run.ranks, run.model.config, s, run.model.compute_dtype, run.micro_batches,
        run.model_dir if run.model_dir != base else None)
    if is_rank_zero():
        print(_answer(run, estimate, measured))
        print(_settings_lines(s, origins))
        print(_details(run))
        print("\nthe first row; trained tokens are in colour:")
        _print_row(run, batch)
    memory_estimate.check_cpu_is_intended(run.model.config, s, run.ranks)
    check_disk(run)


def _measure(run: Run, objective: Objective, batch: Batch) -> Measurement:
    reset_peak_memory(run.ranks.device)  # what the preparation of data held is not part of a step
    start = time.perf_counter()
    objective.sums(run.model, batch.to(run.ranks.device)).sum().backward()
    synchronize(run.ranks.device)
    return Measurement(time.perf_counter() - start, peak_memory_gb(run.ranks.device))


def _answer(run: Run, estimate: MemoryEstimate, measured: Measurement) -> str:
    """Does it fit; memory, time, disk, data and steps."""
    s = run.settings
    limit = memory_limit_gb(run.ranks.device)
    free = shutil.disk_usage(run.out).free
    obstacles = []
    later_gb = estimate.checkpoint / GiB + sum(
        optim.bytes_held(name, local_shard(p)[1], s.optimizer)
        for name, p in run.trained_tensors.items()) / GiB
    measured_gb = measured.memory_gb + later_gb
    if max(estimate.total / GiB, measured_gb) > limit:
        obstacles.append("memory")
    if free < disk_needed(run):
        obstacles.append("disk")
    verdict = f"does not fit: not enough {' and '.join(obstacles)}" if obstacles else "fits"
    of_what, later = "the whole process", "the optimizer and a checkpoint's copy"
    if run.ranks.device.type == "cuda":
        of_what, later = "the GPU's tensors", "the optimizer"
    minutes = measured.seconds * run.micro_batches * run.steps / 60
    files = f"{s.keep} checkpoints, one that is being written"
    if s.best:
        files += ", --best"
    return (
        f"plan         {verdict}\n"
        f"memory       {estimate.total / GiB:.2f} GB of tensors needed at most ({estimate}), of "
        f"{limit:.1f} GB here\n"
        f"             {measured_gb:.2f} GB measured on one micro-batch: of {of_what}, with "
        f"{later_gb:.2f} GB for {later}\n"
        f"time         {minutes:.1f} minutes for the steps, estimated from that micro-batch (the "
        "first is the slowest)\n"
        f"disk         {disk_space(run) / GiB:.2f} GB at the most for {files} and the result, of "
        f"{free / GiB:.1f} GB free here\n"
        f"data         {_shares(run)}\n"
        f"steps        {run.steps} of {run.tokens_per_step:,} tokens, "
        f"{run.steps * run.tokens_per_step:,} in all")


def _shares(run: Run) -> str:
    """Each source with its share of the run's tokens and its number of epochs."""
    total = run.steps * run.tokens_per_step
    sources = []
    for stream, share in zip(run.loader.streams, run.loader.shares, strict=True):
        sources.append(f"{stream.source.name} {share:.1%} ({stream.tokens:,} tokens an epoch; "
                       f"{share * total:,.0f} in this run, {share * total / stream.tokens:.2f} "
                       "epochs)")
    return ", ".join(sources)


def _settings_lines(s: Settings, origins: dict[str, str]) -> str:
    """The settings that differ from the defaults, with where each comes from."""
    default = Settings()
    lines = ["\nsettings that differ from the defaults:"]
    for f in dataclasses.fields(s):
        value, origin = getattr(s, f.name), origins[f.name]
        if f.name == "plan" or (value == getattr(default, f.name) and origin == "default"):
            continue
        if origin == "default":
            origin = f"chosen for --tune {s.tune} and this model"
        lines.append(f"  {f.name.replace('_', '-'):22} {value!s:40} {origin}")
    if len(lines) == 1:
        lines.append("  none")
    return "\n".join(lines)


def _details(run: Run) -> str:
    """Machine and parameters."""
    n = run.parameters
    return (f"\nmachine      {run.ranks}, products in {run.compute_dtype}\n"
            f"parameters   {n['total']:,}, trained {n['trained']:,}\n" + _parameter_groups(run))


def _parameter_groups(run: Run) -> str:
    """A line for each group of the optimizer: sizes, learning rate, weight decay, names."""
    s = run.settings
    tied = run.model.lm_head is None
    lines = []
    groups = optim.parameter_groups(run.model, s.weight_decay, s.embedding_lr / s.lr or 1.0,
                                    s.lora_plus)
    for group in groups:
        names = set()
        for name in group["names"]:
            note = " (also the head, which is tied)" if tied and name == optim.EMBEDDINGS[0] else ""
            names.add(re.sub(r"layers.[0-9]+.", "layers.*.", name) + note)
        numbers = sum(p.numel() for p in group["params"])
        lines.append(f"             {len(group['params'])} tensors, {numbers:,} numbers at "
                     f"{s.lr * group['scale']:.2e}, weight decay {group['weight_decay']}: "
                     f"{', '.join(sorted(names))}")
    return "\n".join(lines)


def _print_row(run: Run, batch: Batch) -> None:
    """The first row of a batch as text, with the trained tokens in colour."""
    tokens, targets, pos = (batch.tokens[0].tolist(), batch.targets[0].tolist(),
                            batch.pos[0].tolist())
    for i, (token, target) in enumerate(zip(tokens, targets, strict=True)):
        if pos[i] == 0:  # a document begins: its first token is nobody's target
            line_break = "\n" if i else ""
            print(line_break + coloured(run.tokenizer.piece(token), False), end="")
        following = None
        if target != IGNORE:
            following = target
        elif i + 1 < len(pos) and pos[i + 1] > 0:
            following = tokens[i + 1]
        if following is not None:
            print(coloured(run.tokenizer.piece(following), target != IGNORE), end="")
    print(flush=True)


def disk_space(run: Run) -> int:
    """Bytes that a run occupies at most: its checkpoints and those of --best, with one more of each
    that is being written; or at the end without these and with the result."""
    s = run.settings
    trained = sum(x.nbytes for x in run.trained_tensors.values())
    saves = 2 + run.steps // run.save_every
    best = trained if s.best else 0
    state = dict(run.model.named_parameters())
    if s.tune != "full":
        state = adapter_state(run.model)
    result = run.result.tensor_bytes(state)
    while_writing = min(s.keep + 1, saves) * checkpoint_bytes(run) + 3 * best
    at_the_end = min(s.keep, saves) * checkpoint_bytes(run) + 2 * best + result
    return max(while_writing, at_the_end)


def checkpoint_bytes(run: Run) -> int:
    """Bytes of a checkpoint over all ranks: the trained parameters and their optimizer state."""
    return sum(x.nbytes + optim.bytes_held(name, x, run.settings.optimizer)
               for name, x in run.trained_tensors.items())


def disk_needed(run: Run) -> int:
    """Bytes that a run will write in addition to what is there: at least one checkpoint, because
    old ones are removed only when a new one is complete."""
    existing = 0
    for name in ("checkpoints", "best", "model"):
        existing += sum(x.stat().st_size for x in (run.out / name).rglob("*") if x.is_file())
    return max(disk_space(run) - existing, checkpoint_bytes(run))


def check_disk(run: Run) -> None:
    """UserError (STORAGE) if the disk has no room for what a run will write."""
    needed, free = disk_needed(run), shutil.disk_usage(run.out).free
    if free < needed:
        raise UserError(f"--out {run.out}: {free:,} bytes are free, resume points of this run need "
                        f"{needed:,}, including its result; make room, lower --keep, or name "
                        "another disk", STORAGE)
