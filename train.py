"""The training loop. Read it from top to bottom.

    python train.py --mode cpt                   # the demo: offline, two minutes on a CPU
    python train.py --mode cpt --model FOLDER_OR_HUB_ID --data kin.txt:3 eng.txt:1 --out out/kin
    python train.py --resume --out out/kin

Training reads token bins, never text. Every trained token of a step has the same weight, in
whichever row, micro-batch or rank it is. So a step gives the same result with 8 rows at once, with
2 x 4 rows accumulated, or on 2 ranks. A run that is interrupted at any step resumes bit for bit.
"""

from __future__ import annotations

if __name__ == "__main__":  # before any import that needs this Python
    import os
    import sys

    if getattr(sys.flags, "safe_path", False):  # python -P does not search this folder
        sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
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
from training import finish, plan
from training.errors import explain_errors
from training.flops import flops_coefficients, token_counts
from training.monitor import NotFinite, TrainingMonitor
from training.objective import Objective, objective_of, trained_tokens
from training.optimizer import LossScale
from training.plan_for import plan_for
from training.run_folder import continuation_command, is_finished
from training.schedule import learning_rate, warmup_steps
from training.setup import set_up
from training.state import Run
from training.validation import evaluate


def train_step(model: Llama, objective: Objective, batches: Sequence[Batch],
               optimizer: torch.optim.Optimizer, ranks: Distributed, clip: float,
               loss_scale: LossScale | None = None,
               reported: dict[str, float] | None = None) -> tuple[float, float]:
    """One optimizer step over this rank's micro-batches -> (loss, gradient norm).

    Sums are divided by their counts over all ranks, because a mean of means would give tokens in
    emptier rows more weight. If the loss or the gradient is not finite on any rank, NotFinite is
    raised on all ranks and nothing is updated. `reported` receives what the objective only reports.
    """
    loss_scale = loss_scale or LossScale()
    counts = np.sum([np.atleast_1d(objective.count(b)) for b in batches], axis=0)  # (k,)
    counts = [max(1, n) for n in ranks.all_reduce_sum(*counts.tolist())]
    divisors = to_device_async(torch.tensor(counts), ranks.device)
    n_minimised = len(counts) - len(objective.reported)
    micro_batch_losses = []
    for i, batch in enumerate(prefetch(batches, ranks.device)):
        ranks.set_gradient_sync(last=i == len(batches) - 1)
        losses = ranks.forward(objective.sums, model, batch).reshape(-1) / divisors  # (k,)
        (losses[:n_minimised].sum() * loss_scale.value).backward()
        micro_batch_losses.append(losses.detach())
    gradients = local_gradients(model.parameters())
    # the only wait for the device in a step: after its last backward pass, before the update
    sums, norm = ranks.reduce_loss_and_norm(sum(micro_batch_losses), gradients)
    loss, norm = sum(sums[:n_minimised]), norm / loss_scale.value
    is_finite = math.isfinite(loss) and math.isfinite(norm)
    if is_finite:
        factor = min(1.0, clip / (norm + 1e-6)) / loss_scale.value
        if factor != 1:
            for gradient in gradients:
                gradient.mul_(factor)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    can_retry = loss_scale.can_shrink and math.isfinite(loss)
    loss_scale.update(is_finite)
    if not is_finite:
        odd = [i for i, x in enumerate(micro_batch_losses) if not x.isfinite().all()]
        raise NotFinite(f"loss {loss}, gradient norm {norm}: not finite; nothing was updated",
                        odd, can_retry)
    if reported is not None:
        reported.update(zip(objective.reported, sums[n_minimised:], strict=True))
    return loss, norm


def train_loop(run: Run) -> int:
    """Steps, and between them evaluations and checkpoints -> 0, or the exit code of a signal."""
    s, ranks = run.settings, run.ranks
    metrics = console.Metrics(run.out / "metrics.jsonl", run.step, s.track)
    monitor = TrainingMonitor(run.out, run.loader, ranks, run.step, run.monitor_state)
    eval_every = s.eval_every or max(1, run.steps // 10)
    has_evaluations = bool(run.val_sets or run.suites or s.prompts)
    exit_code = 0
    run.model.train()
    if run.step == 0 and has_evaluations:
        metrics.write(step=0, **evaluate(run))
    with signals.handle_signals() as requests, \
         console.progress("training", run.steps, run.step) as move_bar:
        while run.step < run.steps and not exit_code and not run.early_stopping.stop_reason:
            entry = take_step(run, monitor)
            metrics.write(**entry)
            loss = math.nan if entry["loss"] is None else entry["loss"]
            note = f"loss {loss:.4f}  {entry['tokens_per_second']:,.0f} tokens/s"
            move_bar(1, note)
            if run.step % max(1, run.steps // 20) == 0:
                console.info(f"step {run.step}/{run.steps}  {note}  lr {entry['lr']:.2e}")

            exit_code, save_now, is_writing = ranks.all_reduce_max(
                requests.stop, requests.save, run.checkpointer.busy)
            is_last = run.step == run.steps
            if has_evaluations and (run.step % eval_every == 0 or is_last):
                metrics.write(step=run.step, **evaluate(run))
                is_last |= bool(run.early_stopping.stop_reason)
            if not is_writing:
                run.checkpointer.poll()
            # step 1 is saved too, to find out at once whether the disk accepts a checkpoint
            if run.step % run.save_every == 0 or run.step == 1 or save_now or is_last or exit_code:
                requests.save = 0
                metrics.flush()
                run.save()
        run.checkpointer.finish(must_succeed=True)
    return exit_code if run.step < run.steps else 0


def take_step(run: Run, monitor: TrainingMonitor) -> dict:
    """One step of the run -> its entry in metrics.jsonl."""
    s, ranks = run.settings, run.ranks
    run.seed_step()
    start = time.perf_counter()
    lr = learning_rate(run.step + 1, run.steps, s.lr, s.schedule, warmup_steps(s.warmup, run.steps),
                       s.min_lr_ratio)
    for group in run.optimizer.param_groups:
        group["lr"] = lr * group["scale"]
    position = run.loader.rows_consumed.copy()
    rows = s.rows * ranks.world_size * run.micro_batches
    batches = [run.loader.next() for _ in range(run.micro_batches)]
    reported: dict[str, float] = {}
    try:
        loss, norm = train_step(run.model, objective_of(s), batches, run.optimizer, ranks, s.clip,
                                run.loss_scale, reported)
        monitor.on_step(run.step + 1, loss, position, rows)
    except NotFinite as error:
        loss = norm = None  # JSON has no NaN
        run.skipped += 1
        if monitor.on_nonfinite(run.step + 1, error, position, rows):
            run.checkpointer.finish()
            wider = ", or use --dtype fp32" if run.loss_scale.value != 1 else ""
            raise UserError(f"step {run.step + 1}: three steps in a row were not finite, "
                            f"{run.skipped} in all; the saved checkpoints are intact; lower --lr"
                            f"{wider}, or look at the documents in {monitor.path}",
                            NON_FINITE) from None

    counts = np.sum([(trained_tokens(b), *token_counts(b)) for b in batches], axis=0)
    counts = ranks.all_reduce_sum(*counts.tolist())
    run.step += 1
    run.tokens += int(counts[0])
    seconds = time.perf_counter() - start
    peak = peak_flops(ranks.device)
    mfu = None
    if peak:
        reference_in_step = s.mode == "dpo" and not run.loader.references
        flops = np.dot(counts, flops_coefficients(run.model, reference_in_step))
        mfu = float(flops) / (seconds * peak * ranks.world_size)
    tokens_read = dict(zip(run.data, run.loader.tokens, strict=True))
    all_read = sum(tokens_read.values())
    return {"step": run.step, "tokens": run.tokens, "loss": loss, "lr": lr, "grad_norm": norm,
            **reported, "skipped": run.skipped,
            "tokens_per_second": round(counts[0] / seconds, 1), "mfu": mfu,
            "memory_gb": round(peak_memory_gb(ranks.device), 3),
            "share": {name: n / all_read for name, n in tokens_read.items()}}


def train(s: Settings, origins: dict[str, str]) -> int:
    """One run, from settings to the saved model -> 0, or 130 or 143: interrupted and saved."""
    check_settings(s)
    if s.plan_for:
        plan_for(s)
        return 0
    out = claim_run_folder(Path(s.out))
    s = replace(s, out=str(out))
    is_rank_zero = console.is_rank_zero()
    if is_rank_zero and (out / "metrics.jsonl").exists() and not (s.resume or s.plan):
        advice = "continue it with --resume, or give another folder"
        if is_finished(out):
            advice = ("give another folder; to train its model further: "
                      f"{continuation_command(out)}")
        raise UserError(f"--out {out}: holds a run; {advice}", FLAGS)
    run: Run | None = None
    micro_batch = f"--rows {s.rows} x --seq-len {s.seq_len}"
    with lock_run_folder(out) if is_rank_zero else nullcontext(), \
         explain_errors(micro_batch, lambda: run.step + 1 if run else 0, out):
        objective = objective_of(s)
        run = set_up(s, objective)
        if s.plan:
            plan.show(run, origins, objective)
            return 0
        if s.resume:
            run.resume()
            has_ended = run.step >= run.steps or run.early_stopping.stop_reason
            if has_ended and is_finished(out):
                console.info(f"{out} {finish.describe_end(run)}: nothing to do")
                return 0
        plan.check_disk(run)
        if run.ranks.rank == 0:
            finish.write_start(run)
        parameters = run.parameters
        console.info(f"{run.ranks}, products in {run.compute_dtype}; {parameters['total']:,} "
                    f"parameters, {parameters['trained']:,} trained; {run.steps} steps of "
                    f"{run.tokens_per_step:,} tokens")
        exit_code = train_loop(run)
        if exit_code:
            console.info(f"stopped and saved at step {run.step}; continue with: "
                        f"python train.py --resume --out {out}")
        else:
            finish.write_result(run)
        run.ranks.close()
        return exit_code


def main(s: Settings, origins: dict[str, str]) -> int:
    """One run; or the demo, which is two: a tiny base on English, then that base on Kinyarwanda."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun may be killed before it can end its ranks
        signals.end_with_parent()
    if "TORCHELASTIC_RESTART_COUNT" in os.environ:  # each machine counts its own restarts
        own_restarts = torchrun_restarts()
        highest = Distributed.start(s.device, s.rank_timeout).all_reduce_max(own_restarts)[0]
        if highest != own_restarts:
            s, origins = read_settings(sys.argv[1:], highest)
    if s.model == "demo" and not s.plan_for:
        from training import demo

        check_settings(s)
        return demo.run(s, origins, train)
    return train(s, origins)


if __name__ == "__main__":
    sys.exit(console.run(lambda: main(SETTINGS, ORIGINS)))
