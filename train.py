"""The loop: settings, model, data, steps, evaluation, saving. Read it top to bottom.

    python train.py --mode cpt                   # the demo: offline, two minutes on a CPU
    python train.py --mode cpt --model FOLDER_OR_HUB_ID --data kin.txt:3 eng.txt:1 --out out/kin
    python train.py --resume --out out/kin

It never sees text: all data are token bins (text is prepared by prepare.py first, in a process of
its own). Every trained token of a step weighs the same, in whichever row, micro-batch or rank it
lies. A step is the same for 8 rows at once, 2 x 4 rows accumulated, or 2 ranks; a run cut anywhere
goes on bit for bit.
"""

from __future__ import annotations

if __name__ == "__main__":  # before any import that needs this Python
    from runtime.python_version import require_python

    require_python()

import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from runtime import console, signals
from runtime.console import FLAGS, NON_FINITE, UserError
from training.settings import Settings, check_settings, read_settings, torchrun_restarts

if __name__ == "__main__":  # flags are read before torch is imported, so that --help is instant
    SETTINGS, ORIGINS = console.run(lambda: read_settings(sys.argv[1:], torchrun_restarts()))

import numpy as np
import torch

from checkpoints.resume_point import claim_run_folder, lock_run_folder
from data import Batch
from model import Llama
from runtime.device import peak_flops, peak_memory_gb
from runtime.distributed import Distributed, local_gradients
from runtime.transfer import prefetch, to_device_async
from training import optimizer as optim
from training import plan
from training.flops import flops_coefficients, token_counts
from training.monitor import NotFinite, Watch, explained
from training.objective import BIN_KINDS, Objective, objective_of, trained_tokens
from training.plan_for import plan_for
from training.run import Run


def train_step(model: Llama, objective: Objective, batches: Sequence[Batch],
               optimizer: torch.optim.Optimizer, ranks: Distributed, clip: float,
               scale: optim.LossScale | None = None,
               reported: dict[str, float] | None = None) -> tuple[float, float]:
    """One optimizer step over this rank's micro-batches -> (loss, gradient norm).

    Sums are divided by the count over all ranks: a mean of means would favour tokens in emptier
    rows. A loss or gradient that is not finite on any rank raises NotFinite on all, and moves
    nothing: so a step has to ask the device once, after its last backward pass and before anything
    moves. What the objective only reports is put into `reported`.
    """
    scale = scale or optim.LossScale()
    counts = np.sum([np.atleast_1d(objective.count(b)) for b in batches], axis=0)  # (k,)
    counts = [max(1, x) for x in ranks.all_reduce_sum(*counts.tolist())]  # no terms: no gradient
    count = to_device_async(torch.tensor(counts), ranks.device)
    minimised = len(counts) - len(objective.reported)
    parts = []
    for i, batch in enumerate(prefetch(batches, ranks.device)):
        ranks.set_gradient_sync(last=i == len(batches) - 1)
        part = ranks.forward(objective.sums, model, batch).reshape(-1) / count  # (k,)
        (part[:minimised].sum() * scale.value).backward()
        parts.append(part.detach())
    gradients = local_gradients(model.parameters())
    found, norm = ranks.reduce_loss_and_norm(sum(parts), gradients)
    loss, norm = sum(found[:minimised]), norm / scale.value
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        share = min(1.0, clip / (norm + 1e-6)) / scale.value
        for g in gradients if share != 1 else ():
            g.mul_(share)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    narrow = scale.yields and math.isfinite(loss)
    scale.update(finite)
    if not finite:
        raise NotFinite(f"loss {loss}, gradient norm {norm}: not finite; nothing was updated",
                        [i for i, x in enumerate(parts) if not x.isfinite().all()], narrow)
    if reported is not None:
        reported.update(zip(objective.reported, found[minimised:], strict=True))
    return loss, norm


def loop(run: Run) -> int:
    """Steps, and between them: evaluations, samples, checkpoints. 0, or the signal's exit code."""
    s, ranks = run.s, run.ranks
    objective = objective_of(s)
    metrics = console.Metrics(run.out / "metrics.jsonl", run.step, s.track)
    eval_every = s.eval_every or max(1, run.steps // 10)
    warmup = int(s.warmup * run.steps if s.warmup < 1 else s.warmup)
    peak = peak_flops(ranks.device)
    reference_in_step = s.mode == "dpo" and run.loader.sources[0].reference is None
    needed = flops_coefficients(run.model, reference_in_step)
    watch = Watch(run.out, run.loader, ranks, run.step, run.past)
    stop, looks = 0, run.held or run.guards.suites or s.prompts
    run.model.train()
    if run.step == 0 and looks:
        metrics.write(step=0, **run.look())
    with (
        signals.handle_signals() as asked,
        console.progress("training", run.steps, run.step) as move,
    ):
        while run.step < run.steps and not stop and not run.guards.stopped:
            run.seed()
            begun = time.perf_counter()
            lr = optim.learning_rate(run.step + 1, run.steps, s.lr, s.schedule, warmup,
                                     s.min_lr_ratio)
            for group in run.optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            served, rows = run.loader.served.copy(), s.rows * ranks.world_size * run.micro_batches
            batches = [run.loader.next() for _ in range(run.micro_batches)]
            reported: dict[str, float] = {}
            try:
                loss, norm = train_step(run.model, objective, batches, run.optimizer, ranks, s.clip,
                                        run.scale, reported)
                watch.good(run.step + 1, loss, served, rows)
            except NotFinite as fault:
                loss = norm = None  # JSON has no NaN
                run.skipped += 1
                if watch.bad(run.step + 1, fault, served, rows):
                    run.saver.finish()
                    narrow = ", or --dtype fp32" if run.scale.value != 1 else ""
                    raise UserError(f"step {run.step + 1}: three steps in a row were not finite, "
                                    f"{run.skipped} in all; what is saved stands; lower --lr"
                                    f"{narrow}, or look at the documents in {watch.path}",
                                    NON_FINITE) from None

            counts = ranks.all_reduce_sum(
                *np.sum([(trained_tokens(b), *token_counts(b)) for b in batches], axis=0).tolist())
            run.step, run.tokens = run.step + 1, run.tokens + int(counts[0])
            seconds = time.perf_counter() - begun
            speed = counts[0] / seconds
            served = dict(zip(run.data, run.loader.tokens, strict=True))
            metrics.write(
                step=run.step, tokens=run.tokens, loss=loss, lr=lr, grad_norm=norm, **reported,
                skipped=run.skipped, tokens_per_second=round(speed, 1),
                mfu=peak and float(np.dot(counts, needed)) / (seconds * peak * ranks.world_size),
                memory_gb=round(peak_memory_gb(ranks.device), 3),
                share={name: n / sum(served.values()) for name, n in served.items()})
            note = f"loss {loss if loss is not None else float('nan'):.4f}  {speed:,.0f} tokens/s"
            move(1, note)
            if run.step % max(1, run.steps // 20) == 0:
                console.info(f"step {run.step}/{run.steps}  {note}  lr {lr:.2e}")

            stop, save, busy = ranks.all_reduce_max(asked.stop, asked.save, run.saver.busy)
            last = run.step == run.steps
            if looks and (run.step % eval_every == 0 or last):
                metrics.write(step=run.step, **run.look())
                last |= bool(run.guards.stopped)
            if not busy:
                run.saver.poll()
            if run.step % run.save_every == 0 or run.step == 1 or save or last or stop:
                asked.save = 0  # the first only tries the disk
                metrics.flush()
                run.save()
        run.saver.finish(must_succeed=True)
    return stop if run.step < run.steps else 0


def train(s: Settings, origins: dict[str, str]) -> int:
    """One run, from settings to the saved result; 0 done, 130 or 143 interrupted and saved."""
    check_settings(s)
    if s.plan_for:
        plan_for(s)
        return 0
    out = claim_run_folder(Path(s.out))
    s = replace(s, out=str(out))
    if console.is_rank_zero() and (out / "metrics.jsonl").exists() and not (s.resume or s.plan):
        raise UserError(f"--out {out}: holds a run; go on with --resume, or name another folder",
                        FLAGS)
    run = None
    with lock_run_folder(out) if console.is_rank_zero() else nullcontext(), \
         explained(f"--rows {s.rows} x --seq-len {s.seq_len}", lambda: run.step + 1 if run else 0,
                   out):
        objective = objective_of(s)
        run = Run.start(s, BIN_KINDS[s.mode], objective)
        if s.plan:
            plan.show(run, origins, objective)
            return 0
        if s.resume:
            run.resume()
            if (run.step >= run.steps or run.guards.stopped) and run.finished:
                console.info(f"{out} {run.end}: nothing to do")
                return 0
        plan.check_disk(run)
        if run.ranks.rank == 0:
            run.begin()
        n = run.parameters
        console.info(f"{run.ranks}, products in {run.products}; {n['total']:,} parameters, "
                f"{n['trained']:,} trained; {run.steps} steps of {run.tokens_per_step:,} tokens")
        stop = loop(run)
        if stop:
            console.info(f"stopped and saved at step {run.step}; go on with: "
                         f"python train.py --resume --out {out}")
        else:
            run.finish()
        run.ranks.close()
        return stop


def main(s: Settings, origins: dict[str, str]) -> int:
    """One run; or the demo, which is two: a tiny base on English, then that base on Kinyarwanda."""
    if "TORCHELASTIC_RESTART_COUNT" in os.environ:  # each machine counts its own restarts
        own = torchrun_restarts()
        highest = Distributed.start(s.device, s.rank_timeout).all_reduce_max(own)[0]
        if highest != own:
            s, origins = read_settings(sys.argv[1:], highest)
    if s.model == "demo" and not s.plan_for:
        from training import demo

        return demo.run(s, origins, train)
    return train(s, origins)


if __name__ == "__main__":
    sys.exit(console.run(lambda: main(SETTINGS, ORIGINS)))
