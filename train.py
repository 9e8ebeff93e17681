"""The loop: settings, model, data, steps, evaluation, saving. Read it top to bottom.

    python train.py --mode cpt                                          # the demo: offline, two minutes on a CPU
    python train.py --mode cpt --model FOLDER_OR_HUB_ID --data kin.txt:3 eng.txt:1 --out out/kin
    python train.py --resume --out out/kin

It never sees text: all data are token bins (text is prepared by prepare.py first, in a process of its own).
Every trained token of a step weighs the same, in whichever row, micro-batch or rank it lies. A step is the
same for 8 rows at once, 2 x 4 rows accumulated, or 2 ranks; a run cut anywhere goes on bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import config
import log
from log import BAD_INPUT, FLAGS, NON_FINITE, STORAGE, UserError


@dataclass
class Settings:
    """Continue the pretraining of a LLaMA on token bins, with all weights or LoRA."""

    mode: Literal["cpt"] = "cpt"
    """What is trained: cpt, continued pretraining on text."""
    model: str = "demo"
    """A Hugging Face folder, a hub id (org/name@revision), a PEFT adapter folder, or `demo`."""
    data: list[str] = field(default_factory=list)
    """Sources, each SPEC[:WEIGHT]: a bin, or a file or glob of text. Weights are shares of the trained tokens;
    without any, each source weighs what it holds."""
    val: list[str] = field(default_factory=list)
    """Held-out text, each NAME=SPEC. Without any, `--hold-out` of each source is kept back."""
    out: str = "out/run"
    """The run's folder."""
    resume: bool = False
    """Go on from the newest checkpoint in --out, with the run's own settings."""

    tune: Literal["full", "lora"] = "full"
    """Train all weights, or LoRA beside frozen ones."""
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of linear layers, such as q_proj v_proj, or all-linear."""

    seq_len: int = 1024
    """Tokens in a row."""
    rows: int = 4
    """Rows per device and micro-batch: lower it if memory runs out, the result stays the same."""
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
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    """The largest norm of a step's gradient."""

    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """dtype of products. What trains is kept in float32 whatever this is."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = False
    """torch.compile each block."""
    recompute: bool = False
    """Activation checkpointing: less memory for a third more time."""

    eval_every: int = 0
    """Steps between evaluations; 0: ten in a run. Step 0 and the last are always evaluated."""
    eval_tokens: int = 50_000
    """Tokens evaluated of each held-out text, from its beginning."""
    hold_out: float = 0.01
    """Share of each source's documents kept back when no --val is given."""
    prompts: list[str] = field(default_factory=list)
    """Beginnings continued at evaluations into samples.txt; without any, the first words of held-out texts."""
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


# What a resumed run may change, because the result stays the same run; all else must be as it was.
FREE = {"out", "resume", "rows", "device", "compile", "recompute", "eval_every", "eval_tokens", "prompts", "save_every",
        "keep", "track", "plan"}


def read_settings(argv: list[str]) -> tuple[Settings, dict[str, str]]:
    """Settings and their origins; with --resume, the run's own settings are the first recipe."""
    settings, origins = config.read(Settings, argv, "train.py")
    if settings.resume:
        kept = Path(settings.out) / "settings.toml"
        if not kept.exists():
            raise UserError(f"--resume: {kept} is not there, so {settings.out} holds no run; check --out", BAD_INPUT)
        before = config.read(Settings, [str(kept)], "train.py")[0]
        settings, origins = config.read(Settings, [str(kept), *argv], "train.py")
        for f in dataclasses.fields(Settings):
            old, new = getattr(before, f.name), getattr(settings, f.name)
            if old != new and f.name not in FREE:
                raise UserError(f"--resume: {f.name.replace('_', '-')} was {old!r}, now {new!r}; that is another run: "
                                "leave the flag out, or start anew with another --out", FLAGS)
    return settings, origins


if __name__ == "__main__":  # before torch is loaded, so that --help and a wrong flag answer at once
    SETTINGS, ORIGINS = log.run(lambda: read_settings(sys.argv[1:]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import checkpoint  # noqa: E402
import lora  # noqa: E402
import optim  # noqa: E402
import report  # noqa: E402
import tasks  # noqa: E402
import weights  # noqa: E402
from data import IGNORE, Batch, Bin, Loader, Source, hold_out  # noqa: E402
from generate import Sampling, generate  # noqa: E402
from loss import bits_per_byte  # noqa: E402
from model import Llama  # noqa: E402
from ranks import Ranks  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402


@dataclass(frozen=True)
class Objective:
    """What a mode minimises: the sum over a batch, and the number of terms in that sum."""

    total: Callable[[Llama, Batch], Tensor]  # -> ()
    count: Callable[[Batch], int]


NLL = Objective(total=lambda model, b: model(b.tokens, b.doc, b.pos, b.targets).sum(),
                count=lambda b: int((b.targets != IGNORE).sum()))

MODES = {"cpt": ("text", NLL)}  # mode: (kind of bins, objective)


def train_step(model: Llama, objective: Objective, batches: Sequence[Batch], optimizer: torch.optim.Optimizer,
               ranks: Ranks, clip: float, scaler: torch.amp.GradScaler | None = None) -> tuple[float, float]:
    """One optimizer step over this rank's micro-batches -> (loss, gradient norm).

    Sums are divided by the count over all ranks: a mean of means would favour tokens in emptier rows.
    A gradient that is not finite raises FloatingPointError and moves nothing.
    """
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    count = ranks.total(sum(objective.count(b) for b in batches))
    loss = torch.zeros((), device=ranks.device)
    for batch in batches:
        part = objective.total(model, batch.to(ranks.device)) / max(count, 1)  # a step of no terms is no gradient
        scaler.scale(part).backward()
        loss += part.detach()
    trained = [p for p in model.parameters() if p.requires_grad]
    ranks.add_gradients(trained)
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(trained, clip).item()
    finite = np.isfinite(norm)
    if finite or scaler.is_enabled():  # the scaler skips such a step itself, and lowers its scale
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if not finite:
        raise FloatingPointError(f"gradient norm is {norm}; nothing was updated")
    return ranks.total(loss.item()), norm


def open_bin(spec: str, model_folder: Path, tokenizer: Tokenizer, out: Path, ranks: Ranks, *, as_is: bool) -> Bin:
    """A prepared bin, or text prepared once under OUT/bins by prepare.py; held-out text stays as it is."""
    if (Path(spec) / "meta.json").exists():
        return Bin(spec)
    stem = "".join(c if c.isalnum() or c in "-_" else "_" for c in Path(spec).name.split(".")[0]) or "text"
    folder = out / "bins" / (f"{stem}-val" if as_is else stem)
    if ranks.rank == 0 and not _is_fresh(folder, tokenizer):
        command = [sys.executable, str(Path(__file__).with_name("prepare.py")), "text", spec,
                   "--tokenizer", str(model_folder), "--out", str(folder)]
        command += ["--normalise", "none", "--keep-duplicates"] if as_is else []
        log.say("preparing: python " + shlex.join(["prepare.py", *command[2:]]))
        code = subprocess.run(command).returncode
        if code:
            sys.exit(code)  # prepare.py has said what is wrong
    ranks.barrier()
    return Bin(folder)


def _is_fresh(folder: Path, tokenizer: Tokenizer) -> bool:
    """Whether a bin prepared earlier is still what preparing again would give."""
    if not (folder / "meta.json").exists():
        return False
    meta = Bin(folder).meta
    return meta["tokenizer"] == tokenizer.fingerprint and all(
        Path(s["path"]).exists() and Path(s["path"]).stat().st_size == s["bytes"] for s in meta["sources"])


def split_weight(spec: str) -> tuple[str, float | None]:
    """`SPEC[:WEIGHT]` -> (SPEC, WEIGHT or None)."""
    head, _, tail = spec.rpartition(":")
    try:
        weight = float(tail)
    except ValueError:
        return spec, None
    if not head:
        return spec, None
    if not (0 < weight < float("inf")):
        raise UserError(f"--data {spec}: the weight must be a number above 0", FLAGS)
    return head, weight


def open_data(s: Settings, folder: Path, tokenizer: Tokenizer, vocab: int, out: Path, ranks: Ranks
              ) -> tuple[list[Source], dict[str, list[np.ndarray]]]:
    """The sources to train on, and held-out documents by name, their ids without BOS and EOS."""
    if not s.data:
        raise UserError("--data: name at least one bin or file of text", FLAGS)
    specs = [split_weight(x) for x in s.data]
    if len({weight is None for _, weight in specs}) > 1:
        raise UserError("--data: give a weight to every source or to none, as in kin.txt:3 eng.txt:1", FLAGS)
    kind, _ = MODES[s.mode]
    sources, held = [], {}

    def opened(spec: str, as_is: bool) -> Bin:
        bin = open_bin(spec, folder, tokenizer, out, ranks, as_is=as_is)
        bin.check(tokenizer.fingerprint, vocab)
        if bin.meta["kind"] != kind:
            raise UserError(f"{bin.folder}: a bin of {bin.meta['kind']}, --mode {s.mode} trains on {kind}")
        return bin

    for spec, weight in specs:
        bin = opened(spec, as_is=False)
        kept = hold_out(bin, s.hold_out if not s.val else 0.0)
        name = bin.folder.name
        if kept.any():
            held[name] = _texts(bin, np.flatnonzero(kept), tokenizer, s.eval_tokens)
        elif not s.val and s.hold_out:
            log.say(f"{name}: one document, nothing is held out; cut it into documents, or give --val")
        sources.append(Source(name, bin, np.flatnonzero(~kept), weight or float(bin.meta["trained"])))
    for item in s.val:
        name, _, spec = item.partition("=")
        if not spec:
            raise UserError(f"--val {item}: expected NAME=SPEC, as in kin=val.jsonl", FLAGS)
        bin = opened(spec, as_is=True)
        held[name] = _texts(bin, range(len(bin)), tokenizer, s.eval_tokens)
    return sources, held


def _texts(bin: Bin, documents: Sequence[int], tokenizer: Tokenizer, limit: int) -> list[np.ndarray]:
    """Documents without BOS and EOS, up to `limit` tokens; the last is cut there."""
    texts = []
    for i in documents:
        ids = bin.document(i)
        ids = ids[int(len(ids) and ids[0] == tokenizer.bos) :]
        ids = ids[: len(ids) - int(len(ids) and ids[-1] == tokenizer.eos)][:limit]
        limit -= len(ids)
        texts += [np.array(ids)] if len(ids) else []
        if limit <= 0:
            break
    return texts


@dataclass
class Run:
    """Everything a step, an evaluation or a checkpoint needs, once it is set up."""

    s: Settings
    out: Path
    ranks: Ranks
    model: Llama
    folder: Path  # the model's files: tokenizer, and how to lay out the result
    tokenizer: Tokenizer
    loader: Loader
    held: dict[str, list[np.ndarray]]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    steps: int
    micro_batches: int
    step: int = 0
    tokens: int = 0  # trained so far
    skipped: int = 0  # steps whose gradient was not finite


def set_up(s: Settings) -> Run:
    """Load, wrap, open and check everything; whatever is wrong is found here, before step 1."""
    if s.seq_len < 2 or s.rows < 1 or s.keep < 2 or s.steps < 0 or not 0 <= s.hold_out < 1:
        raise UserError(f"--seq-len {s.seq_len} (at least 2), --rows {s.rows} (at least 1), --keep {s.keep} (at least 2), "
                        f"--steps {s.steps} (not negative), --hold-out {s.hold_out} (0 to 1): out of range", FLAGS)
    out = Path(s.out)
    ranks = Ranks.start(s.device)
    torch.manual_seed(s.seed)
    torch.use_deterministic_algorithms(s.deterministic)
    dtype = ranks.compute_dtype(s.dtype)

    folder = weights.find(s.model)
    kept = torch.float32 if s.tune == "full" else dtype  # what trains is float32; frozen weights as products need them
    model, tokenizer = weights.load(folder, ranks.device, kept)
    if s.tune == "lora" and not lora.adapters(model):
        lora.attach(model, s.lora_rank, s.lora_alpha, s.lora_dropout, s.lora_targets)
    model.model.compute_dtype, model.model.recompute = dtype, s.recompute
    if s.seq_len > model.config.max_position_embeddings:
        raise UserError(f"--seq-len {s.seq_len}: the model's context is {model.config.max_position_embeddings}", FLAGS)
    sources, held = open_data(s, folder, tokenizer, model.config.vocab_size, out, ranks)
    loader = Loader(sources, s.seq_len, s.rows, s.seed, ranks.rank, ranks.world)

    micro = s.rows * s.seq_len * ranks.world
    whole = s.tokens_per_step or micro
    if whole % micro:
        raise UserError(f"--tokens-per-step {whole} is no multiple of {micro} (rows {s.rows} x seq-len {s.seq_len} x "
                        f"ranks {ranks.world})", FLAGS)
    steps = s.steps or -(-int(s.epochs * loader.streams[0].tokens) // int(whole * loader.shares[0] or 1)) or 1
    optimizer = optim.adamw(model, s.lr, (s.beta1, s.beta2), s.weight_decay)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=dtype == torch.float16)
    if s.compile:
        for block in model.model.layers:
            block.compile()
    return Run(s, out, ranks, model, folder, tokenizer, loader, held, optimizer, scaler, steps, whole // micro)


def evaluate(run: Run) -> dict[str, float]:
    """Bits per byte of each held-out text, as eval.py measures them."""
    found = {}
    run.model.eval()
    for name, texts in run.held.items():
        nats = tasks.document_nats(run.model, texts, tasks.start_token(run.tokenizer))
        n_bytes = sum(run.tokenizer.count_bytes(ids) for ids in texts)
        found[name] = bits_per_byte(float(np.sum(nats)), n_bytes)
    run.model.train()
    return found


def write_samples(run: Run) -> None:
    """Continue the fixed prompts, greedily, into samples.txt."""
    tok = run.tokenizer
    prompts = run.s.prompts or [tok.decode(ids[:8].tolist()) for texts in run.held.values() for ids in texts[:2]]
    start = [] if tok.bos is None else [tok.bos]
    read = [start + tok.encode(p) for p in prompts]
    new: list[list[int]] = [[] for _ in prompts]
    run.model.eval()
    length = min(40, run.model.config.max_position_embeddings // 2)
    for i, token in generate(run.model, read, Sampling(length, temperature=0.0), {tok.eos}, tok.bos):
        new[i].append(token)
    run.model.train()
    with open(run.out / "samples.txt", "a") as f:
        f.write(f"== step {run.step}\n")
        for prompt, ids, more in zip(prompts, read, new, strict=True):
            f.write(f"-- {prompt}\n{tok.decode(ids + more)[len(prompt) :]}\n")


def save(run: Run) -> None:
    """The resume point: what trains, the optimizer, the random state, and where the data stand."""
    if run.ranks.rank == 0:
        trained = {n: p.detach() for n, p in run.model.named_parameters() if p.requires_grad}
        rng = {"cpu": torch.get_rng_state()}
        if run.ranks.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(run.ranks.device)
        state = {"step": run.step, "tokens": run.tokens, "skipped": run.skipped, "served": run.loader.served,
                 "data": _data(run), "scaler": run.scaler.state_dict()}
        parts = {"model": trained, "optimizer": optim.state(run.model, run.optimizer), "rng": rng}
        checkpoint.save(run.out / "checkpoints", run.step, parts, state, run.s.keep)
    run.ranks.barrier()


def restore(run: Run) -> None:
    """Go on from the newest checkpoint that verifies."""
    newest = checkpoint.newest(run.out / "checkpoints")
    if newest is None:
        log.say("no checkpoint yet: starting from step 0")
        return
    parts, state = checkpoint.read(newest)
    if state["data"] != _data(run):
        raise UserError(f"--resume: the data have changed since {newest.name} (sha256 of the bins differ); start anew "
                        "with another --out")
    with torch.no_grad():
        for name, p in run.model.named_parameters():
            if p.requires_grad:
                p.copy_(parts["model"][name])
    optim.load_state(run.model, run.optimizer, parts["optimizer"])
    torch.set_rng_state(parts["rng"]["cpu"])
    if "cuda" in parts["rng"] and run.ranks.device.type == "cuda":
        torch.cuda.set_rng_state(parts["rng"]["cuda"], run.ranks.device)
    run.scaler.load_state_dict(state["scaler"])
    run.loader.seek(state["served"])
    run.step, run.tokens, run.skipped = state["step"], state["tokens"], state["skipped"]
    log.say(f"resumed from {newest}")


def _data(run: Run) -> dict[str, str]:
    return {s.name: s.sha for s in run.loader.sources}


def begin(run: Run, origins: dict[str, str]) -> None:
    """Write down what is run: settings.toml feeds back into train.py, run.json says with what."""
    (run.out / "settings.toml").write_text(config.to_toml(dataclasses.replace(run.s, resume=False, plan=False)))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    about = {
        "command": shlex.join(["python", "train.py", *sys.argv[1:]]), "commit": commit.stdout.strip() or None,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"), "python": platform.python_version(), "torch": torch.__version__,
        "device": str(run.ranks), "ranks": run.ranks.world, "dtype": str(run.model.compute_dtype)[6:],
        "model": str(run.folder), "tokenizer": run.tokenizer.fingerprint, "data": _data(run), "steps": run.steps,
        "tokens_per_step": run.s.rows * run.s.seq_len * run.ranks.world * run.micro_batches,
        "parameters": parameters(run), "changed_settings": {k: v for k, v in origins.items() if v != "default"},
    }
    (run.out / "run.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")


def parameters(run: Run) -> dict[str, int]:
    """How many numbers the model has, and how many of them train."""
    sizes = [(p.numel(), p.requires_grad) for p in run.model.parameters()]
    return {"total": sum(n for n, _ in sizes), "trained": sum(n for n, trained in sizes if trained)}


def show_plan(run: Run, origins: dict[str, str]) -> None:
    """What would be done and what it takes, measured on one micro-batch that changes nothing."""
    s, n = run.s, parameters(run)
    for f in dataclasses.fields(Settings):
        print(f"{f.name.replace('_', '-'):16} {getattr(s, f.name)!s:40} {origins[f.name]}")
    batch = run.loader.next()
    begun = time.perf_counter()
    count = NLL.count(batch)
    (NLL.total(run.model, batch.to(run.ranks.device)) / max(count, 1)).backward()
    if run.ranks.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - begun) * run.micro_batches * run.steps
    state = 8 * n["trained"] / 2**30  # AdamW's two moments
    model = sum(p.numel() * p.element_size() for p in run.model.parameters()) / 2**30
    disk = run.s.keep * 12 * n["trained"] / 2**30 + (model if s.tune == "full" else 0)
    shares = ", ".join(f"{src.name} {share:.1%}" for src, share in zip(run.loader.sources, run.loader.shares, strict=True))
    print(f"\nparameters   {n['total']:,}, trained {n['trained']:,}\n"
          f"data         {shares}\n"
          f"steps        {run.steps} of {s.rows * s.seq_len * run.micro_batches * run.ranks.world:,} tokens\n"
          f"memory       {run.ranks.memory_gb() + state:.2f} GB: measured on one micro-batch, and AdamW's {state:.2f}\n"
          f"time         {seconds / 60:.1f} minutes of steps, from that micro-batch (the first is the slowest)\n"
          f"disk         {disk:.2f} GB for {s.keep} checkpoints and the result\n\nthe first row, trained tokens in colour:")
    green, plain = ("\x1b[32m", "\x1b[0m") if sys.stdout.isatty() else ("[", "]")
    row = batch.tokens[0].tolist()
    for i, (token, target) in enumerate(zip(row, batch.targets[0].tolist(), strict=True)):
        if i == 0 or batch.pos[0, i] == 0:
            print("\n" if i else "", log.printable(run.tokenizer.piece(token)), sep="", end="")
        if target != IGNORE:
            print(f"{green}{log.printable(run.tokenizer.piece(target))}{plain}", end="")
        elif i + 1 < len(row) and batch.pos[0, i + 1] > 0:
            print(log.printable(run.tokenizer.piece(row[i + 1])), end="")
    print()


@contextmanager
def stopping() -> Iterator[Callable[[], int]]:
    """Within it the first SIGTERM or SIGINT only sets what is yielded: the exit code to leave with, at first 0.

    The loop looks between steps, so work never happens in a handler. A second signal stops at once.
    """
    code = 0

    def ask(number: int, _: Any) -> None:
        nonlocal code
        code = 128 + number
        signal.signal(number, before[number])

    before = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(s: Settings, origins: dict[str, str]) -> int:
    """Train as the settings say; the exit code: 0 done, 130 or 143 interrupted and saved."""
    out = Path(s.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as e:
        raise UserError(f"--out {out}: cannot be written ({e.strerror}); name another folder", FLAGS) from None
    if (out / "metrics.jsonl").exists() and not (s.resume or s.plan):
        raise UserError(f"--out {out}: holds a run already; go on with --resume, or name another folder", FLAGS)
    with checkpoint.lock(out):
        run = set_up(s)
        if s.plan:
            show_plan(run, origins)
            return 0
        if s.resume:
            restore(run)
        return loop(run, origins)


def loop(run: Run, origins: dict[str, str]) -> int:
    """Steps, and between them: evaluations, samples, checkpoints."""
    s, ranks = run.s, run.ranks
    if run.step >= run.steps:
        log.say(f"{run.out} is finished: nothing to do")
        return 0
    if ranks.rank == 0:
        begin(run, origins)
    n = parameters(run)
    log.say(f"{ranks}, products in {str(run.model.compute_dtype)[6:]}; {n['total']:,} parameters, "
            f"{n['trained']:,} trained; {run.steps} steps of {s.rows * s.seq_len * ranks.world * run.micro_batches:,} tokens")
    metrics = log.Metrics(run.out / "metrics.jsonl", run.step, s.track)
    eval_every, save_every = s.eval_every or max(1, run.steps // 10), s.save_every or max(1, run.steps // 5)
    warmup = int(s.warmup * run.steps if s.warmup < 1 else s.warmup)
    peak, flops = ranks.peak_flops(), run.model.flops_per_token(s.seq_len)
    failures = 0
    run.model.train()

    def look() -> dict[str, float]:
        found = evaluate(run)
        write_samples(run) if ranks.rank == 0 else None
        metrics.write(step=run.step, bits_per_byte=found)
        log.say(f"step {run.step}: bits per byte " + ", ".join(f"{k} {v:.4f}" for k, v in found.items()))
        return found

    if run.step == 0 and run.held:
        look()
    with stopping() as code, log.progress("training", run.steps, run.step) as move:
        stopped = 0
        while run.step < run.steps and not stopped:
            begun = time.perf_counter()
            lr = optim.learning_rate(run.step + 1, run.steps, s.lr, s.schedule, warmup, s.min_lr_ratio)
            for group in run.optimizer.param_groups:
                group["lr"] = lr
            batches = [run.loader.next() for _ in range(run.micro_batches)]
            count = int(ranks.total(sum(NLL.count(b) for b in batches)))
            try:
                loss, norm = train_step(run.model, MODES[s.mode][1], batches, run.optimizer, ranks, s.clip, run.scaler)
                failures = 0
            except FloatingPointError as e:
                loss = norm = None  # JSON has no NaN
                run.skipped, failures = run.skipped + 1, failures + 1
                log.say(f"step {run.step + 1}: {e}")
                if failures == 3 and not run.scaler.is_enabled():
                    raise UserError(f"step {run.step + 1}: three steps in a row were not finite; the last checkpoint stands. "
                                    "Lower --lr, or look at the data", NON_FINITE) from None
            run.step, run.tokens = run.step + 1, run.tokens + count
            speed = count / (time.perf_counter() - begun)
            total = sum(run.loader.tokens)
            line = {"tokens": run.tokens, "loss": loss, "lr": lr, "grad_norm": norm, "tokens_per_second": round(speed, 1),
                    "mfu": speed * flops / peak / ranks.world if peak else None, "memory_gb": round(ranks.memory_gb(), 3),
                    "share": {x.name: t / total for x, t in zip(run.loader.sources, run.loader.tokens, strict=True)}}
            metrics.write(step=run.step, **line)
            note = f"loss {loss if loss is not None else float('nan'):.4f}  {speed:,.0f} tokens/s"
            move(1, note)
            if run.step % max(1, run.steps // 20) == 0:
                log.say(f"step {run.step}/{run.steps}  {note}  lr {lr:.2e}")
            if run.held and (run.step % eval_every == 0 or run.step == run.steps):
                look()
            stopped = ranks.highest(code())
            if run.step % save_every == 0 or run.step == run.steps or stopped:
                save(run)
    if run.step < run.steps:
        log.say(f"stopped after step {run.step}; go on with: python train.py --resume --out {run.out}")
        return stopped
    if ranks.rank == 0:
        finish(run)
    ranks.leave()
    return 0


def finish(run: Run) -> None:
    """Write the result as an HF or PEFT folder, and the report."""
    if lora.adapters(run.model):
        weights.save_adapter(run.model, run.out / "model", str(run.folder), run.folder)
    else:
        weights.save(run.model, run.out / "model", run.folder)
    page = report.run_report(run.out)
    seen = [json.loads(x) for x in (run.out / "metrics.jsonl").read_text().splitlines()]
    seen = [x["bits_per_byte"] for x in seen if "bits_per_byte" in x]
    for name in run.held:
        before, after = seen[0][name], seen[-1][name]
        log.say(f"{name}: {before:.4f} -> {after:.4f} bits per byte ({after / before - 1:+.1%})")
    log.say(f"the model: {run.out / 'model'}   the report: {page}   samples: {run.out / 'samples.txt'}")


def main(s: Settings, origins: dict[str, str]) -> int:
    """One run; or the demo, which is two: a tiny base on English, then that base on Kinyarwanda."""
    if s.model != "demo":
        return train(s, origins)
    from kinyarwanda import demo

    return demo.run(s, origins, train)


if __name__ == "__main__":
    sys.exit(log.run(lambda: main(SETTINGS, ORIGINS)))
