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

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from runtime import console as log
from runtime import flags as config
from runtime.console import BAD_INPUT, FLAGS, NON_FINITE, UserError


@dataclass
class Settings:
    """Train a LLaMA on token bins, with all weights or LoRA."""

    mode: Literal["cpt", "sft", "mt", "dpo", "cpo"] = "cpt"
    """What is trained: cpt, continued pretraining on text; sft, answers in conversations; mt,
    translations; dpo and cpo, preference pairs. The first three may be mixed in --data."""
    model: str = "demo"
    """A Hugging Face folder, a hub id (org/name@revision), a PEFT adapter folder, or `demo`."""
    data: list[str] = field(default_factory=list)
    """Sources, each SPEC[:WEIGHT]: a bin, or a file or glob, prepared as --mode says. Weights are
    shares of the tokens; without any, each source weighs what it holds."""
    max_epochs_per_source: float = 0.0
    """With --steps: no source is served more often, and what it cannot give the others give by
    their weights (with equal ones: UniMax); 0: no limit."""
    val: list[str] = field(default_factory=list)
    """Held-out text, each NAME=SPEC. Without any, `--hold-out` of each source is kept back."""
    out: str = "out/run"
    """The run's folder."""
    resume: bool = False
    """Go on from the newest checkpoint in --out, with the run's own settings."""

    tune: Literal["full", "lora", "qlora"] = "full"
    """Train all weights, or LoRA beside frozen ones, or beside ones kept in four bits (QLoRA)."""
    double_quant: bool = False
    """With --tune qlora: keep the four bits' scales in eight bits too (0.37 bits a weight less)."""
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of linear layers, such as q_proj v_proj, or all-linear."""
    lora_layers: list[str] = field(default_factory=list)
    """Layers that get an adapter, such as 0-7 30; without any, all."""
    rslora: bool = False
    """Scale the adapter by alpha / sqrt(rank), not alpha / rank: for high ranks."""
    dora: bool = False
    """Train the lengths of the weights' rows too (DoRA)."""
    lora_plus: float = 1.0
    """B's learning rate as a multiple of A's (LoRA+); its authors advise about 16."""
    train_embeddings: bool = False
    """Train embed_tokens and lm_head as they are, beside an adapter or --train-layers."""
    train_norms: bool = False
    """Train all norms as they are, beside an adapter or --train-layers."""
    embedding_lr: float = 0.0
    """Learning rate of embed_tokens and lm_head where they train; 0: --lr."""
    train_layers: list[str] = field(default_factory=list)
    """With --tune full: train only these layers, such as 0-7 37-39; without any, everything."""

    seq_len: int = 1024
    """Tokens in a row."""
    rows: int | Literal["auto"] = 4
    """Rows per device and micro-batch: lower it if memory runs out, the result stays the same.
    auto: as many as fit, dividing --tokens-per-step."""
    tokens_per_step: int = 0
    """Tokens in a whole step, over micro-batches and ranks; 0: one micro-batch on each rank."""
    steps: int = 0
    """Steps; 0: by --epochs."""
    epochs: float = 1.0
    """Times through the data: a mixture ends when its first source was served so often."""

    lr: float = 2e-5
    schedule: Literal["cosine", "linear", "inverse-sqrt", "wsd", "constant"] = "cosine"
    warmup: float = 0.03
    """Steps of warm-up; below 1, a share of all steps."""
    min_lr_ratio: float = 0.1
    """Where the schedule ends, as a share of --lr."""
    weight_decay: float = 0.1
    beta: float = 0.1
    """dpo and cpo: how strongly a preference counts."""
    nll_weight: float = 1.0
    """cpo: the weight of the NLL of the chosen answers' tokens."""
    arpo: bool = False
    """cpo: a rejected answer counts less where it is nearly as likely as the chosen (X-ALMA)."""

    beta1: float = 0.9
    beta2: float = 0.95
    optimizer: Literal["adamw", "adamw8bit", "adamw-bf16"] = "adamw"
    """adamw8bit keeps moments in 8 bits (bitsandbytes); adamw-bf16 keeps weights, moments and (over
    micro-batches too) gradients in bf16, for all weights: 16, 10 and 8 bytes a trained number."""
    clip: float = 1.0
    """The largest norm of a step's gradient."""
    neftune: float = 0.0
    """cpt, sft, mt: noise on the embeddings, so strong (NEFTune; its authors take 5 to 15)."""
    label_smoothing: float = 0.0
    """cpt, sft, mt: this share of each target is spread over all tokens; in training alone."""
    ema: float = 0.0
    """Average the weights over steps, with this decay such as 0.999; the average is evaluated and
    saved. 0: the weights as they are."""

    dtype: Literal["auto", "bf16", "fp16", "fp32", "fp8"] = "auto"
    """dtype of products (fp8: of blocks', with --tune full). What trains is kept in float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = False
    """torch.compile each block as training computes it, and the loss; evaluations are not."""
    recompute: bool = False
    """Activation checkpointing: less memory for about a third more products, half beside LoRA."""
    recompute_light: bool = False
    """Of activations, only norms' and gates' are made again, and no product (selective)."""
    shard: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """With several ranks: ddp, each holds the model; fsdp, each holds a part. auto: ddp where a GPU
    holds it twice."""
    rank_timeout: float = 600.0
    """Seconds a rank waits for the others before it gives up."""

    ignore_memory: bool = False
    """Start even where --plan says that a step needs more memory than the device has."""

    eval_every: int = 0
    """Steps between evaluations; 0: ten in a run. Step 0 and the last are always evaluated."""
    eval_tokens: int = 50_000
    """Tokens evaluated of each held-out text, from its beginning."""
    best: str = ""
    """A held-out text: the model saved is the one with its lowest bits per byte, not the last."""
    hold_out: float = 0.01
    """Share of each source's documents kept back when no --val is given."""
    suites: list[str] = field(default_factory=list)
    """Suites measured at evaluations too, named as for eval.py: a part of each, with one prompt."""
    suite_data: str = ""
    """The folder that holds the suites' data."""
    suite_items: int = 100
    """Items of each suite, spread over it; 0: all."""
    stop_if: list[str] = field(default_factory=list)
    """Guards: the run ends after an evaluation that finds, say, 'eng>+5%' (bits per byte of a text,
    against step 0) or 'sib200.acc<0.2'."""
    prompts: list[str] = field(default_factory=list)
    """Beginnings continued at evaluations into samples.txt; without any, the first words of
    held-out texts."""
    save_every: int = 0
    """Steps between checkpoints; 0: five in a run."""
    keep: int = 2
    """Checkpoints kept."""
    track: Literal["none", "tensorboard"] = "none"
    seed: int = 1
    deterministic: bool = False
    """Refuse GPU kernels whose results vary from run to run."""
    plan: bool = False
    """Print what would be done, what it costs, and the first batch; then stop."""
    plan_for: str = ""
    """Print memory, time and cost on GPUs such as h100 or 8xa100, from --model's config.json alone,
    without weights or data; then stop. Needs --steps."""
    plan_share: float = 0.35
    """--plan-for: the share of a GPU's peak that is assumed to be reached."""
    plan_price: float = 0.0
    """--plan-for: what a GPU costs an hour."""


# What a resumed run may change: FREE changes nothing in the result, WARNED a little in its numbers,
# and that is said; all else must be as it was.
FREE = {"out", "resume", "plan", "plan_for", "plan_share", "plan_price", "rows", "rank_timeout",
        "eval_every", "save_every", "keep", "track", "ignore_memory", "stop_if"}
WARNED = {"device", "compile", "recompute", "recompute_light", "shard", "eval_tokens", "prompts",
          "suites", "suite_data", "suite_items"}


def read_settings(argv: list[str]) -> tuple[Settings, dict[str, str]]:
    """Settings and their origins; with --resume, or if torchrun starts us again (with the flags of
    the first time), the run's own settings are the first recipe."""
    settings, origins = config.read(Settings, argv, "train.py")
    kept = Path(settings.out) / "settings.toml"
    if kept.exists() and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        argv, settings.resume = ["--out", settings.out, "--resume"], True
    if settings.resume and not kept.exists():
        raise UserError(f"--resume: {kept} is not there, so {settings.out} holds no run; "
                        "check --out", BAD_INPUT)
    return config.go_on(Settings, argv, "train.py", kept, FREE | WARNED) if settings.resume \
        else (settings, origins)


if __name__ == "__main__":  # before torch is loaded, so that --help and a wrong flag answer at once
    SETTINGS, ORIGINS = log.run(lambda: read_settings(sys.argv[1:]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from checkpoints import resume_point as checkpoint  # noqa: E402
from data import IGNORE, Batch  # noqa: E402
from model import Llama  # noqa: E402
from runtime.distributed import Ranks  # noqa: E402
from runtime.transfer import ahead, sent  # noqa: E402
from training import optimizer as optim  # noqa: E402
from training import plan, preference  # noqa: E402
from training import settings as flags  # noqa: E402
from training.monitor import NotFinite, Watch, explained  # noqa: E402
from training.run import Run  # noqa: E402


@dataclass(frozen=True)
class Objective:
    """What a mode minimises: sums over a batch, each with the number of terms in it.

    The loss is the sum of the sums over their counts; the last sums are only `reported`, by name.
    """

    total: Callable[[Llama, Batch], Tensor]  # -> (), or (k,) for k sums
    count: Callable[[Batch], int | list[int]]
    reported: tuple[str, ...] = ()


def trained(b: Batch) -> int:
    """How many tokens of a batch are trained."""
    return int((b.targets != IGNORE).sum())


NLL = Objective(lambda model, b: model(b.tokens, b.doc, b.pos, b.targets).sum(), trained)


def pairs(s: Settings) -> Objective:
    """DPO or CPO of preference pairs."""
    return Objective(lambda model, b: preference.total(model, b, s),
                     lambda b: preference.count(b, s), preference.REPORTED)


# mode: (kind of bins, objective); the kinds of the modes that minimise NLL may be mixed
MODES: dict[str, tuple[str, Callable[[Settings], Objective]]] = {
    "cpt": ("text", lambda s: NLL), "sft": ("chat", lambda s: NLL), "mt": ("mt", lambda s: NLL),
    "dpo": ("pairs", pairs), "cpo": ("pairs", pairs)}


def train_step(model: Llama, objective: Objective, batches: Sequence[Batch],
               optimizer: torch.optim.Optimizer, ranks: Ranks, clip: float,
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
    counts = [max(1, x) for x in ranks.totals(*counts.tolist())]  # no terms: no gradient
    count = sent(torch.tensor(counts), ranks.device)
    minimised = len(counts) - len(objective.reported)
    parts = []
    for i, batch in enumerate(ahead(batches, ranks.device)):
        ranks.meet(last=i == len(batches) - 1)
        part = objective.total(model, batch).reshape(-1) / count  # (k,)
        (part[:minimised].sum() * scale.value).backward()
        parts.append(part.detach())
    gradients, squares = ranks.gradients([p for p in model.parameters() if p.requires_grad])
    found, norm = ranks.read(sum(parts), squares)
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
    objective = MODES[s.mode][1](s)
    metrics = log.Metrics(run.out / "metrics.jsonl", run.step, s.track)
    eval_every = s.eval_every or max(1, run.steps // 10)
    warmup = int(s.warmup * run.steps if s.warmup < 1 else s.warmup)
    peak, needed = ranks.peak_flops(), plan.needed(run)
    watch = Watch(run.out, run.loader, ranks, run.step, run.past)
    stop, looks = 0, run.held or run.guards.suites or s.prompts
    run.model.train()
    if run.step == 0 and looks:
        metrics.write(step=0, **run.look())
    with log.listening() as asked, log.progress("training", run.steps, run.step) as move:
        while run.step < run.steps and not stop and not run.guards.stopped:
            run.seed()
            begun = time.perf_counter()
            lr = optim.learning_rate(run.step + 1, run.steps, s.lr, s.schedule, warmup,
                                     s.min_lr_ratio)
            for group in run.optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            served, rows = run.loader.served.copy(), s.rows * ranks.world * run.micro_batches
            batches = [run.loader.next() for _ in range(run.micro_batches)]
            reported: dict[str, float] = {}
            try:
                loss, norm = train_step(run.model, objective, batches, run.optimizer, ranks, s.clip,
                                        run.scale, reported)
                run.average.update(run.step + 1)
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

            counts = ranks.totals(
                *np.sum([(trained(b), *plan.inside(b)) for b in batches], axis=0).tolist())
            run.step, run.tokens = run.step + 1, run.tokens + int(counts[0])
            seconds = time.perf_counter() - begun
            speed = counts[0] / seconds
            served = dict(zip(run.data, run.loader.tokens, strict=True))
            metrics.write(
                step=run.step, tokens=run.tokens, loss=loss, lr=lr, grad_norm=norm, **reported,
                skipped=run.skipped, tokens_per_second=round(speed, 1),
                mfu=peak and float(np.dot(counts, needed)) / (seconds * peak * ranks.world),
                memory_gb=round(ranks.memory_gb(), 3),
                share={name: n / sum(served.values()) for name, n in served.items()})
            note = f"loss {loss if loss is not None else float('nan'):.4f}  {speed:,.0f} tokens/s"
            move(1, note)
            if run.step % max(1, run.steps // 20) == 0:
                log.say(f"step {run.step}/{run.steps}  {note}  lr {lr:.2e}")

            stop, save, busy = ranks.highest(asked.stop, asked.save, run.saver.busy)
            last = run.step == run.steps
            if looks and (run.step % eval_every == 0 or last):
                metrics.write(step=run.step, **run.look())
                last |= bool(run.guards.stopped)
            if not busy:
                run.saver.advance()
            if run.step % run.save_every == 0 or run.step == 1 or save or last or stop:
                asked.save = 0  # the first only tries the disk
                metrics.flush()
                run.save()
        run.saver.finish(must=True)
    return stop if run.step < run.steps else 0


def train(s: Settings, origins: dict[str, str]) -> int:
    """One run, from settings to the saved result; 0 done, 130 or 143 interrupted and saved."""
    flags.check(s, MODES[s.mode][0])
    if s.plan_for:
        plan.foretell(s)
        return 0
    out = checkpoint.claim(Path(s.out))
    s = replace(s, out=str(out))
    if log.speaking() and (out / "metrics.jsonl").exists() and not (s.resume or s.plan):
        raise UserError(f"--out {out}: holds a run; go on with --resume, or name another folder",
                        FLAGS)
    run = None
    with checkpoint.lock(out) if log.speaking() else nullcontext(), \
         explained(f"--rows {s.rows} x --seq-len {s.seq_len}", lambda: run.step + 1 if run else 0,
                   out):
        kind, objective = MODES[s.mode]
        run = Run.start(s, kind, objective(s))
        if s.plan:
            plan.show(run, origins, objective(s))
            return 0
        if s.resume:
            run.resume(FREE, WARNED)
            if (run.step >= run.steps or run.guards.stopped) and run.finished:
                log.say(f"{out} {run.end}: nothing to do")
                return 0
        plan.room(run)
        if run.ranks.rank == 0:
            run.begin()
        n = run.parameters
        log.say(f"{run.ranks}, products in {run.products}; {n['total']:,} parameters, "
                f"{n['trained']:,} trained; {run.steps} steps of {run.tokens_per_step:,} tokens")
        try:
            stop = loop(run)
        finally:
            run.saver.awaited.set()  # what is under way is written now, not at its leisure
        if stop:
            log.say(f"stopped and saved at step {run.step}; go on with: "
                    f"python train.py --resume --out {out}")
        else:
            run.finish()
        run.ranks.leave()
        return stop


def main(s: Settings, origins: dict[str, str]) -> int:
    """One run; or the demo, which is two: a tiny base on English, then that base on Kinyarwanda."""
    own = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", -1))  # each machine counts for itself
    if own >= 0 and (most := Ranks.start(s.device, s.rank_timeout).highest(own)[0]) != own:
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(most)
        s, origins = read_settings(sys.argv[1:])
    if s.model == "demo" and not s.plan_for:
        from training import demo

        return demo.run(s, origins, train)
    return train(s, origins)


if __name__ == "__main__":
    sys.exit(log.run(lambda: main(SETTINGS, ORIGINS)))
