"""What stands around the loop: a run is set up, looked at, saved, resumed, planned and finished
here.

train.py is the loop and nothing else, so that it can be read in one go; this is the rest of a run's
life. Its one idea: everything that can be wrong is found in `Run.start`, before step 1, and
everything that a run leaves behind is a file in its folder.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import checkpoint
import config
import corpus
import hub
import log
import lora
import optim
import report
import tasks
import weights
from data import IGNORE, Bin, Loader, Source, hold_out
from generate import Sampling, generate
from log import FLAGS, UserError
from loss import bits_per_byte
from model import Llama
from ranks import Ranks
from tokenizer import Tokenizer


@dataclass
class Run:
    """A run that is set up: its settings (train.Settings), its parts, and how far it has come."""

    s: Any
    out: Path
    ranks: Ranks
    model: Llama
    folder: Path  # the model's files: its tokenizer, and how to lay out the result
    tokenizer: Tokenizer
    loader: Loader
    held: dict[str, list[np.ndarray]]  # held-out documents by name, without BOS and EOS
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    steps: int
    micro_batches: int
    step: int = 0
    tokens: int = 0  # trained so far
    skipped: int = 0  # steps whose gradient was not finite

    @classmethod
    def start(cls, s: Any, kind: str) -> Run:
        """Load, wrap, open and check everything; `kind` is that of the bins. UserError on what is
        wrong."""
        out, ranks = Path(s.out), Ranks.start(s.device)
        torch.manual_seed(s.seed)
        torch.use_deterministic_algorithms(s.deterministic)
        dtype = ranks.compute_dtype(s.dtype)
        folder = weights.find(s.model)
        # what trains is float32; frozen weights are kept as products need them
        kept = dtype if s.tune == "lora" else None if s.train_layers else torch.float32
        model, tokenizer = weights.load(folder, ranks.device, kept)
        if s.tune == "full" and lora.adapters(model):
            raise UserError(
                f"--model {s.model}: an adapter; go on training it with --tune lora", FLAGS)
        whole = [x for x in lora.EMBEDDINGS if s.train_embeddings
                 and not (x == "lm_head" and model.lm_head is None)]
        whole += ["norm"] if s.train_norms else []
        if s.tune == "lora" and not lora.adapters(model):
            lora.attach(model, s.lora_rank, s.lora_alpha, s.lora_dropout, s.lora_targets, s.rslora,
                        s.dora, lora.indices(s.lora_layers, "lora-layers"), whole)
        if s.train_layers:
            lora.train_layers(model, lora.indices(s.train_layers, "train-layers"), whole)
        model.model.compute_dtype, model.model.recompute = dtype, s.recompute
        context, vocab = model.config.max_position_embeddings, model.config.vocab_size
        if s.seq_len > context:
            raise UserError(f"--seq-len {s.seq_len}: the model's context is {context}", FLAGS)
        sources, held = open_data(s, kind, folder, tokenizer, vocab, out, ranks)
        loader = Loader(sources, s.seq_len, s.rows, s.seed, ranks.rank, ranks.world)

        micro = s.rows * s.seq_len * ranks.world
        per_step = s.tokens_per_step or micro
        if per_step % micro:
            raise UserError(
                f"--tokens-per-step {per_step}: no multiple of {micro} (rows {s.rows} x seq-len "
                f"{s.seq_len} x ranks {ranks.world})", FLAGS)
        first = s.epochs * loader.streams[0].tokens / loader.shares[0]  # tokens of all sources
        steps = s.steps or max(1, round(first / per_step))
        optimizer = optim.adamw(model, s.lr, (s.beta1, s.beta2), s.weight_decay,
                                s.embedding_lr / s.lr or 1.0, s.lora_plus)
        scaler = torch.amp.GradScaler(ranks.device.type, enabled=dtype == torch.float16)
        if s.compile:
            for block in model.model.layers:
                block.compile()
        return cls(s, out, ranks, model, folder, tokenizer, loader, held, optimizer, scaler, steps,
                   per_step // micro)

    @property
    def tokens_per_step(self) -> int:
        return self.s.rows * self.s.seq_len * self.ranks.world * self.micro_batches

    @property
    def parameters(self) -> dict[str, int]:
        """How many numbers the model has, and how many of them train."""
        sizes = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        return {"total": sum(n for n, _ in sizes),
                "trained": sum(n for n, trained in sizes if trained)}

    @property
    def data(self) -> dict[str, str]:
        """What the run is trained on, by sha256."""
        return {s.name: s.sha for s in self.loader.sources}

    def evaluate(self) -> dict[str, float]:
        """Bits per byte of each held-out text, as eval.py measures them; NaN becomes None, as in
        JSON."""
        found = {}
        self.model.eval()
        for name, texts in self.held.items():
            nats = tasks.document_nats(self.model, texts, tasks.start_token(self.tokenizer))
            n_bytes = sum(self.tokenizer.count_bytes(ids) for ids in texts)
            found[name] = bits_per_byte(float(np.sum(nats)), n_bytes)
        self.model.train()
        return found

    def write_samples(self) -> None:
        """Continue the fixed prompts, greedily, into samples.txt."""
        tok = self.tokenizer
        prompts = self.s.prompts or \
            [tok.decode(ids[:8].tolist()) for texts in self.held.values() for ids in texts[:2]]
        start = [] if tok.bos is None else [tok.bos]
        read = [start + tok.encode(p) for p in prompts]
        new: list[list[int]] = [[] for _ in prompts]
        sampling = Sampling(
            min(40, self.model.config.max_position_embeddings // 2), temperature=0.0)
        self.model.eval()
        for i, token in generate(self.model, read, sampling, {tok.eos}, tok.bos):
            new[i].append(token)
        self.model.train()
        file, block = self.out / "samples.txt", f"== step {self.step}\n"
        for prompt, ids, more in zip(prompts, read, new, strict=True):
            continued = tok.decode(ids + more)[len(prompt):]
            block += f"-- {prompt}\n{log.printable(continued)}\n"
        before = file.read_text(encoding="utf-8") if file.exists() else ""
        for m in re.finditer(r"^== step (\d+)$", before, re.M):
            if int(m[1]) >= self.step:  # of work that was lost, and is done again
                before = before[: m.start()]
                break
        file.write_text(before + block, encoding="utf-8")

    def save(self) -> None:
        """The resume point: what trains, the optimizer, the random state, and where the data
        stand."""
        if self.ranks.rank == 0:
            trained = {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
            rng = {"cpu": torch.get_rng_state()}
            if self.ranks.device.type == "cuda":
                rng["cuda"] = torch.cuda.get_rng_state(self.ranks.device)
            parts = {"model": trained, "optimizer": optim.state(self.model, self.optimizer),
                     "rng": rng}
            state = {"step": self.step, "tokens": self.tokens, "skipped": self.skipped,
                     "served": self.loader.served, "data": self.data,
                     "scaler": self.scaler.state_dict()}
            checkpoint.save(self.out / "checkpoints", self.step, parts, state, self.s.keep)
        self.ranks.barrier()

    def resume(self) -> None:
        """Go on from the newest checkpoint that verifies."""
        newest = checkpoint.newest(self.out / "checkpoints")
        if newest is None:
            log.say("no checkpoint yet: starting from step 0")
            return
        parts, state = checkpoint.read(newest)
        if state["data"] != self.data:
            raise UserError(f"--resume: the data are not those of {newest} (sha256 of the bins "
                            "differ); start anew with another --out")
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if p.requires_grad:
                    p.copy_(parts["model"][name])
        optim.load_state(self.model, self.optimizer, parts["optimizer"])
        torch.set_rng_state(parts["rng"]["cpu"])
        if "cuda" in parts["rng"] and self.ranks.device.type == "cuda":
            torch.cuda.set_rng_state(parts["rng"]["cuda"], self.ranks.device)
        self.scaler.load_state_dict(state["scaler"])
        self.loader.seek(state["served"])
        self.step, self.tokens, self.skipped = state["step"], state["tokens"], state["skipped"]
        log.say(f"resumed from {newest}")

    def begin(self, origins: dict[str, str]) -> None:
        """Write down what is run: settings.toml feeds back into train.py, run.json says with
        what."""
        repo, commit = hub.source(self.folder)  # a resumed run is of this commit, wherever main is
        model = f"{repo}@{commit}" if commit else self.s.model
        s = dataclasses.replace(self.s, resume=False, plan=False, model=model)
        (self.out / "settings.toml").write_text(config.to_toml(s), encoding="utf-8")
        git = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
        about = {
            "command": shlex.join(["python", "train.py", *sys.argv[1:]]),
            "commit": git.stdout.strip() or None, "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "python": platform.python_version(), "torch": torch.__version__,
            "device": str(self.ranks), "ranks": self.ranks.world,
            "dtype": str(self.model.compute_dtype)[6:], "model": str(self.folder),
            "model_commit": commit,
            "tokenizer": self.tokenizer.fingerprint, "data": self.data, "steps": self.steps,
            "tokens_per_step": self.tokens_per_step, "parameters": self.parameters,
            "changed_settings": {k: getattr(s, k) for k, v in origins.items() if v != "default"}}
        text = json.dumps(about, indent=1, ensure_ascii=False)
        (self.out / "run.json").write_text(text + "\n", encoding="utf-8")

    def finish(self) -> None:
        """Write the result as an HF or PEFT folder, and the report; say what changed."""
        if lora.adapters(self.model):
            base = weights.base_of(self.folder)
            weights.save_adapter(self.model, self.out / "model", str(base), self.folder)
        else:
            weights.save(self.model, self.out / "model", self.folder)
        page = report.run_report(self.out)
        lines = (self.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        seen = [x["bits_per_byte"] for x in map(json.loads, lines) if "bits_per_byte" in x]
        for name in self.held:
            before, after = seen[0][name], seen[-1][name]
            log.say(f"{name}: {before:.4f} -> {after:.4f} bits per byte "
                    f"({after / before - 1:+.1%})")
        log.say(f"the model: {self.out / 'model'}   the report: {page}   "
                f"samples: {self.out / 'samples.txt'}")

    def show_plan(self, origins: dict[str, str], objective: Any) -> None:
        """What would be done and what it takes, measured on one micro-batch that changes
        nothing."""
        s, n = self.s, self.parameters
        for f in dataclasses.fields(s):
            print(f"{f.name.replace('_', '-'):16} {getattr(s, f.name)!s:40} {origins[f.name]}")
        batch = self.loader.next()
        begun = time.perf_counter()
        (objective.total(self.model, batch.to(self.ranks.device))
         / max(1, objective.count(batch))).backward()
        self.ranks.wait()
        minutes = (time.perf_counter() - begun) * self.micro_batches * self.steps / 60
        moments = 8 * n["trained"] / 2**30  # AdamW's two, float32
        result = 4 * n["trained"] / 2**30
        trained = "\n".join(
            f"             {len(x['params'])} tensors, {sum(p.numel() for p in x['params']):,} "
            f"numbers at {s.lr * x['scale']:.2e}, weight decay {x['weight_decay']}: "
            f"{', '.join(sorted({re.sub(r'layers.[0-9]+.', 'layers.*.', k) for k in x['names']}))}"
            for x in optim.groups(self.model, s.weight_decay, s.embedding_lr / s.lr or 1.0,
                                  s.lora_plus))
        shares = ", ".join(
            f"{x.source.name} {share:.1%} ({x.tokens:,} tokens an epoch)"
            for x, share in zip(self.loader.streams, self.loader.shares, strict=True))
        print(
            f"\nmachine      {self.ranks}, products in {str(self.model.compute_dtype)[6:]}\n"
            f"parameters   {n['total']:,}, trained {n['trained']:,}\n{trained}\n"
            f"data         {shares}\n"
            f"steps        {self.steps} of {self.tokens_per_step:,} tokens\n"
            f"memory       {self.ranks.memory_gb() + moments:.2f} GB: measured on one micro-batch, "
            f"with {moments:.2f} for AdamW's moments\n"
            f"time         {minutes:.1f} minutes of steps, from that micro-batch (the first is "
            "the slowest)\n"
            f"disk         {s.keep * (result + moments) + result:.2f} GB for {s.keep} checkpoints "
            "and the result\n"
            "\nthe first row; what is trained is in colour:")
        tokens, targets, pos = (batch.tokens[0].tolist(), batch.targets[0].tolist(),
                                batch.pos[0].tolist())
        for i, (token, target) in enumerate(zip(tokens, targets, strict=True)):
            if pos[i] == 0:
                print(
                    ("\n" if i else "") + log.coloured(self.tokenizer.piece(token), False), end="")
            following = (
                target if target != IGNORE else tokens[i + 1] if pos[i + 1 : i + 2] > [0] else None)
            if following is not None:
                print(log.coloured(self.tokenizer.piece(following), target != IGNORE), end="")
        print()


def open_data(s: Any, kind: str, folder: Path, tokenizer: Tokenizer, vocab: int, out: Path,
              ranks: Ranks) -> tuple[list[Source], dict[str, list[np.ndarray]]]:
    """The sources to train on, and held-out documents by name."""
    if not s.data:
        raise UserError("--data: name at least one bin or file of text", FLAGS)
    specs = [split_weight(x) for x in s.data]
    if len({weight is None for _, weight in specs}) > 1:
        raise UserError(
            "--data: give a weight to every source or to none, as in kin.txt:3 eng.txt:1", FLAGS)

    def opened(spec: str, as_is: bool) -> Bin:
        bin = open_bin(spec, folder, tokenizer, out, ranks, as_is)
        bin.check(tokenizer.fingerprint, vocab)
        if bin.meta["kind"] != kind:
            raise UserError(
                f"{bin.folder}: a bin of {bin.meta['kind']}, --mode {s.mode} trains on {kind}")
        return bin

    sources, held = [], {}
    for spec, weight in specs:
        bin = opened(spec, as_is=False)
        kept = hold_out(bin, 0.0 if s.val else s.hold_out)
        name = bin.folder.name
        if name in {x.name for x in sources}:
            raise UserError(
                f"--data: two sources are called {name}; give their files different names", FLAGS)
        if kept.any():
            held[name] = texts_of(bin, np.flatnonzero(kept), tokenizer, s.eval_tokens)
        elif not s.val and s.hold_out:
            log.say(
                f"{name}: one document, so none is held out; cut it into documents, or give --val")
        sources.append(
            Source(name, bin, np.flatnonzero(~kept), weight or float(bin.meta["trained"])))
    for item in s.val:
        name, _, spec = item.partition("=")
        if not spec:
            raise UserError(f"--val {item}: expected NAME=SPEC, as in kin=val.jsonl", FLAGS)
        bin = opened(spec, as_is=True)
        held[name] = texts_of(bin, range(len(bin)), tokenizer, s.eval_tokens)
    return sources, held


def open_bin(spec: str, folder: Path, tokenizer: Tokenizer, out: Path, ranks: Ranks,
             as_is: bool) -> Bin:
    """A prepared bin, or text prepared once under OUT/bins by prepare.py; held-out text is left as
    it is."""
    if (Path(spec) / "meta.json").exists():
        return Bin(spec)
    stem = ("".join(c if c.isalnum() or c in "-_" else "_" for c in Path(spec).name.split(".")[0])
            or "text")
    bin = out / "bins" / (f"{stem}-val" if as_is else stem)
    if ranks.rank == 0 and not is_fresh(bin, spec, tokenizer):
        words = ["text", spec, "--tokenizer", str(folder), "--out", str(bin)]
        words += ["--normalise", "none", "--keep-duplicates"] if as_is else []
        log.say("preparing: " + shlex.join(["python", "prepare.py", *words]))
        program = Path(__file__).with_name("prepare.py")
        code = subprocess.run([sys.executable, str(program), *words], stdout=sys.stderr).returncode
        if code:
            sys.exit(code)  # prepare.py has said what is wrong
    ranks.barrier()
    return Bin(bin)


def is_fresh(bin: Path, spec: str, tokenizer: Tokenizer) -> bool:
    """Whether a bin prepared earlier is what preparing `spec` again would give, by its sources'
    sizes."""
    if not (bin / "meta.json").exists():
        return False
    meta = Bin(bin).meta
    now = [(str(p), p.stat().st_size) for p in corpus.files([spec])]
    return meta["tokenizer"] == tokenizer.fingerprint and now == [
        (x["path"], x["bytes"]) for x in meta["sources"]]


def split_weight(spec: str) -> tuple[str, float | None]:
    """`SPEC[:WEIGHT]` -> (SPEC, WEIGHT or None)."""
    head, _, tail = spec.rpartition(":")
    try:
        weight = float(tail)
    except ValueError:
        return spec, None
    if not head:
        return spec, None
    if not 0 < weight < float("inf"):
        raise UserError(f"--data {spec}: the weight is {tail}, expected a number above 0", FLAGS)
    return head, weight


def texts_of(bin: Bin, documents: Sequence[int], tokenizer: Tokenizer,
             limit: int) -> list[np.ndarray]:
    """Documents without BOS and EOS, up to `limit` tokens in all; the last is cut there."""
    texts = []
    for i in documents:
        ids = bin.document(i)
        ids = ids[int(len(ids) and ids[0] == tokenizer.bos):]
        ids = ids[: len(ids) - int(len(ids) and ids[-1] == tokenizer.eos)][:limit]
        limit -= len(ids)
        texts += [np.array(ids)] if len(ids) else []
        if limit <= 0:
            break
    return texts
