"""What stands around the loop: a run is set up, looked at, saved, resumed and finished here.

train.py is the loop and nothing else, so that it can be read in one go; this is the rest of a run's
life. Its one idea: everything that can be wrong is found in `Run.start`, before step 1, and
everything that a run leaves behind is a file in its folder.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import platform
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lora
from checkpoints.atomic_write import write_text
from checkpoints.huggingface import load_model, save_model
from checkpoints.model_folder import (
    add_stop_id,
    base_model_dir,
    read_config,
    resolve_model_dir,
    stop_ids,
    tensor_infos,
)
from checkpoints.peft_adapter import adapter_config, adapter_state, save_adapter
from checkpoints.resume_point import (
    AsyncCheckpointer,
    CheckpointReader,
    find_newest,
    remove_leftovers,
)
from checkpoints.safetensors_header import weights_fingerprint
from data import Loader
from layers import fp8, nf4
from model import Llama
from reports.training_report import write_training_report
from runtime import console, distributed, flags, hub
from runtime.console import FLAGS, UserError
from runtime.device import compute_dtype
from runtime.distributed import GRADIENT_SUM, Distributed
from runtime.dtypes import FLAG_NAMES
from runtime.paths import code_sha256, git_commit
from tokenization.chat_template import ChatTemplate
from tokenization.tokenizer import Tokenizer
from training import datasets as sources
from training import memory_estimate as memory
from training import monitor as watch
from training import optimizer as optim
from training import preference
from training import validation as looks
from training.compile_model import compile_model, uncompiled
from training.early_stopping import Guards, evaluations, finite
from training.objective import Objective
from training.settings import (
    CAN_CHANGE_ON_RESUME,
    WARN_ON_RESUME,
    Settings,
    changed_settings,
    check_adapter,
    upgrade_settings,
)


@dataclass
class Run:
    """A run that is set up: its settings (train.Settings), its parts, and how far it has come."""

    s: Settings
    out: Path
    ranks: Distributed
    model: Llama
    folder: Path  # the model's files: its tokenizer, and how to lay out the result
    tokenizer: Tokenizer
    loader: Loader
    held: sources.Held  # held-out documents by name
    guards: Guards
    optimizer: torch.optim.Optimizer
    scale: optim.LossScale
    saver: AsyncCheckpointer
    steps: int
    micro_batches: int
    past: watch.Past = field(default_factory=watch.Past)
    step: int = 0
    tokens: int = 0  # trained so far
    skipped: int = 0  # steps whose gradient was not finite
    best: float = math.inf  # the lowest bits per byte of --best so far

    @classmethod
    def start(cls, s: Settings, kind: str, objective: Objective) -> Run:
        """Load, wrap, open and check everything; `kind` is that of the bins, `objective` what is
        minimised. UserError on what is wrong."""
        out, ranks = Path(s.out), Distributed.start(s.device, s.rank_timeout)
        for folder in (out, out / "bins") if ranks.rank == 0 else ():
            remove_leftovers(folder)
        ranks.assert_same_on_all_ranks({f"--{f.name.replace('_', '-')}": str(getattr(s, f.name))
                     for f in dataclasses.fields(s) if f.name != "out"}  # links, by machine
                    | {"code": code_sha256(), "torch": torch.__version__})
        if ranks.world_size > 1:  # several machines must see one folder
            if ranks.rank == 0:
                (out / ".ranks").write_text(str(time.time_ns()), encoding="utf-8")
            ranks.barrier()
            mark = out / ".ranks"
            ranks.assert_same_on_all_ranks(
                {"folder at --out": mark.read_text("utf-8") if mark.exists() else "none"}
            )
        torch.manual_seed(s.seed)
        torch.use_deterministic_algorithms(s.deterministic)
        dtype = compute_dtype(ranks.device, s.dtype)
        guards = Guards.start(s)
        folder = resolve_model_dir(s.model)
        base = base_model_dir(folder)
        shape = read_config(base)
        if not s.plan:  # which says so at its end
            memory.willing(shape, s, ranks)
        memory.check(shape, s, dtype, ranks, passes=2 if s.tokens_per_step else 1,
                     adapter=folder if base != folder else None)
        # what trains is float32; frozen weights are kept as products need them
        trained = torch.bfloat16 if s.optimizer == "adamw-bf16" else torch.float32
        kept = dtype if s.tune != "full" else None if s.train_layers else trained
        # of several ranks, each reads the files as they are and keeps its share
        at = ranks.device if ranks.world_size == 1 or s.tune == "qlora" else torch.device("cpu")
        kept = kept if ranks.world_size == 1 or s.tune != "full" else None
        model, tokenizer = load_model(
            folder, at, kept, quant="nf4" if s.tune == "qlora" else "none", double=s.double_quant,
            compute_dtype=dtype, recompute=s.recompute, neftune_alpha=s.neftune)
        if s.tune == "full" and lora.adapters(model):
            raise UserError(
                f"--model {s.model}: an adapter; go on training it with --tune lora", FLAGS)
        whole = lora.whole_parts(model, s.train_embeddings, s.train_norms)
        fresh = s.tune != "full" and not lora.adapters(model)
        if fresh:
            lora.attach(model, s.lora_rank, s.lora_alpha, s.lora_dropout, s.lora_targets, s.rslora,
                        s.dora, lora.indices(s.lora_layers, "lora-layers"), whole)
        elif s.tune != "full":
            check_adapter(s, adapter_config(model, ""))
        if s.train_layers:
            lora.train_layers(model, lora.indices(s.train_layers, "train-layers"), whole)
        if model.lm_head is None and model.head.requires_grad:
            console.info("the head is tied to the embeddings: one tensor, trained and saved once")
        if s.dtype == "fp8":
            fp8.check(model, ranks.device, s.seq_len)
            fp8.convert_to_fp8(model)
        context, vocab = model.config.max_position_embeddings, model.config.vocab_size
        if s.seq_len > context:
            raise UserError(f"--seq-len {s.seq_len}: the model's context is {context}", FLAGS)
        mixed, held = sources.open_data(s, kind, folder, tokenizer, vocab, out, ranks)
        guards.check(held)
        if s.best and s.best not in held:
            raise UserError(f"--best {s.best}: no held-out text of that name; there are "
                            f"{', '.join(held) or 'none'}", FLAGS)
        ranks.assert_same_on_all_ranks({f"sha256 of {x.name}": x.sha for x in mixed}
                    | {"model": f"{model.config}", "tokenizer": tokenizer.fingerprint})
        ranks.wrap_model(model, s.shard, dtype, trained)

        def load(rows: int) -> Loader:
            return Loader(mixed, s.seq_len, rows, s.seed, ranks.rank, ranks.world_size)

        each = s.seq_len * ranks.world_size  # tokens of a row on every rank
        if s.rows == "auto":
            s = dataclasses.replace(s, rows=watch.rows_that_fit(s, model, objective, ranks, load))
            console.info(f"--rows auto: {s.rows}")
        if s.compile:  # for these rows
            compile_model(model)
        micro = s.rows * each
        per_step = s.tokens_per_step or micro
        if per_step % micro:
            would = [n for n in range(1, per_step // each + 1) if per_step % (n * each) == 0][-8:]
            raise UserError(
                f"--tokens-per-step {per_step}: no multiple of {micro} (rows {s.rows} x seq-len "
                f"{s.seq_len} x ranks {ranks.world_size}); " + (
                    f"--rows {' or '.join(map(str, would))} would do" if would else
                    f"multiples of {each} can be divided among the ranks"), FLAGS)
        # a run that goes on elsewhere must not choose anew
        s = dataclasses.replace(s, tokens_per_step=per_step,
                                dtype=s.dtype if s.dtype == "fp8" else FLAG_NAMES[dtype])
        if s.max_epochs_per_source:
            sources.cap(mixed, s.steps * per_step, s.max_epochs_per_source)
        loader = load(s.rows)
        first = s.epochs * loader.streams[0].tokens / loader.shares[0]  # tokens of all sources
        steps = s.steps or max(1, round(first / per_step))
        if ranks.strategy == "fsdp" and s.optimizer == "adamw8bit":
            raise UserError("--optimizer adamw8bit: not with --shard fsdp; take adamw or "
                            "adamw-bf16, whose state is cut among the ranks, or --shard ddp", FLAGS)
        optimizer = optim.adamw(model, s.lr, (s.beta1, s.beta2), s.weight_decay,
                                s.embedding_lr / s.lr or 1.0, s.lora_plus, s.optimizer, s.seed)
        scale = optim.LossScale(65536.0 if dtype == torch.float16 else 1.0)
        saver = AsyncCheckpointer(out / "checkpoints", s.keep, ranks)
        # what trains as it is and is cut cannot be changed for its frozen values in a forward pass
        if s.mode == "dpo" and not s.plan and (not fresh or (ranks.strategy == "fsdp" and whole)):
            with uncompiled():
                preference.keep_reference(model, loader.streams, out / "reference", str(folder),
                                          s.rows, ranks)
        return cls(s, out, ranks, model, folder, tokenizer, loader, held, guards, optimizer,
                   scale, saver, steps, per_step // micro)

    @property
    def tokens_per_step(self) -> int:
        return self.s.rows * self.s.seq_len * self.ranks.world_size * self.micro_batches

    @property
    def save_every(self) -> int:
        """Steps between resume points; the first and the last have one too."""
        return self.s.save_every or max(1, self.steps // 5)

    @property
    def products(self) -> str:
        """The dtype of products, in torch's word."""
        return "float8" if self.s.dtype == "fp8" else str(self.model.compute_dtype)[6:]

    @property
    def parameters(self) -> dict[str, int]:
        """How many numbers the model has, and how many of them train."""
        sizes = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        return {"total": sum(n for n, _ in sizes) + sum(m.numel for m in nf4.found(self.model)),
                "trained": sum(n for n, trained in sizes if trained)}

    @functools.cached_property
    def mark(self) -> str:
        """By which the weights are known that the run begins with."""
        return weights_fingerprint(tensor_infos(base_model_dir(self.folder)))

    @property
    def data(self) -> dict[str, str]:
        """What the run is trained on, by sha256."""
        return {s.name: s.sha for s in self.loader.sources}

    def look(self) -> dict[str, Any]:
        """An evaluation: bits per byte, suites, samples; whether a guard ends the run with it. What
        metrics.jsonl keeps; of several ranks, what the first found."""
        with uncompiled():
            found = {"bits_per_byte": finite(looks.bits(self.model, self.held, self.tokenizer))}
            if self.guards.suites:
                self.model.eval()
                ends = stop_ids(self.folder, self.tokenizer)
                found["suites"] = finite(self.guards.measure(self.model, self.tokenizer,
                                                             self.ranks, ends))
                self.model.train()
            found = json.loads(self.ranks.all_gather_text(json.dumps(found))[0])
            block = looks.samples(self.model, self.held, self.tokenizer, self.s.prompts)
        if self.ranks.rank == 0:
            looks.add(self.out / "samples.txt", self.step, block)
        self.keep_best(found["bits_per_byte"])
        for m in self.ranks.fsdp_modules:
            m.reshard()  # an evaluation leaves the root module unsharded
        self.guards.look(self.step, {**found.get("suites", {}), **found["bits_per_byte"]})
        said = [f"{name} {x}" if x is None else f"{name} {x:.4f}"
                for name, x in found["bits_per_byte"].items()]
        console.info(f"step {self.step}: " + "; ".join(filter(None, (
            "bits per byte " * bool(said) + ", ".join(said),
            self.guards.words(found.get("suites", {}))))))
        return found | ({"stopped": self.guards.stopped} if self.guards.stopped else {})

    @property
    def end(self) -> str:
        """How the run ended, and what to do about it where a guard did."""
        if not self.guards.stopped:
            return "is finished"
        return (f"was stopped at step {self.step} of {self.steps} by --stop-if "
                f"{self.guards.stopped} (to go on: --resume --out {self.out} --stop-if, with other "
                "guards or none)")

    def seed(self) -> None:
        """Dropout of the coming step is a function of seed, step and rank: there is no random state
        to be saved."""
        words = [self.s.seed, self.step, self.ranks.rank]
        torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]))

    @property
    def trained(self) -> dict[str, torch.Tensor]:
        """What trains, by name."""
        return {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}

    def keep_best(self, found: dict[str, float | None]) -> None:
        """Keep the weights as they are, under OUT/best, if no evaluation before was as good."""
        value = found.get(self.s.best)
        if value is not None and value < self.best:
            self.best = value
            saver = AsyncCheckpointer(self.out / "best", 2, self.ranks, keep_later=False)
            saver.save(self.step, {"model": self.trained}, {"step": self.step, "best": value})
            saver.finish(must_succeed=True)

    def save(self) -> None:
        """Begin to write the resume point: what trains, the optimizer, and where the data stand."""
        parts = {"model": self.trained, "optimizer": optim.state(self.model, self.optimizer)}
        state = {"step": self.step, "tokens": self.tokens, "skipped": self.skipped,
                 "settings": dataclasses.asdict(self.s),
                 "served": self.loader.served, "data": self.data, "model": self.mark,
                 "ranks": self.ranks.world_size, "gradient_sum": GRADIENT_SUM,
                 "scale": dataclasses.astuple(self.scale),
                 "losses": list(self.past.losses), "failures": self.past.failures}
        self.saver.save(self.step, parts, state)

    def newest(self, name: str) -> Path | None:
        """The newest checkpoint under OUT/name that verifies; rank 0 looks, clears up what a kill
        left there, and all are told."""
        newest, root = None, self.out / name
        if self.ranks.rank == 0:
            newest = find_newest(root)
            remove_leftovers(root)
        newest = self.ranks.all_gather_text(str(newest or ""))[0]
        return Path(newest) if newest else None

    def resume(self) -> None:
        """Go on from the newest checkpoint that verifies; each rank reads what it needs.

        UserError where settings that must not change (CAN_CHANGE_ON_RESUME, WARN_ON_RESUME) differ
        from those it was written with, whether a flag or an editor changed them.
        """
        if self.s.best and (kept := self.newest("best")):
            with CheckpointReader(kept) as saved:
                self.best = saved.state["best"]
        newest = self.newest("checkpoints")
        if not newest:
            console.info("no checkpoint yet: starting from step 0")
            return
        with CheckpointReader(newest) as saved:
            state = saved.state
            may_change = CAN_CHANGE_ON_RESUME | WARN_ON_RESUME | {"model"}
            old = upgrade_settings(state.get("settings", {}))
            changed = flags.changed_settings(old, dataclasses.asdict(self.s))
            if refused := [x for name, x in changed if name not in may_change]:
                raise UserError(f"{self.out / 'settings.toml'}: not as {newest} was written with "
                                f"({'; '.join(refused)}); that is another run: put it back, or "
                                "start anew with another --out", FLAGS)
            if state["data"] != self.data:
                was, now = (", ".join(f"{k} {v[:12]}" for k, v in x.items())
                            for x in (state["data"], self.data))
                raise UserError(f"--resume: the data are not those of {newest} (sha256 of the bins "
                                f"was {was}, now {now}); start anew with another --out")
            if state.get("model", self.mark) != self.mark:  # older ones do not say
                raise UserError(f"--resume: {self.folder} holds other weights than those {newest} "
                                f"goes on from (their mark was {state['model'][:12]}, now "
                                f"{self.mark[:12]}); put those back, or start anew with another "
                                "--out")
            named = self.trained
            for name, x in named.items():
                x.copy_(saved.read_like("model", name, x))
            optim.load_state(self.model, self.optimizer, {
                key: saved.read_like("optimizer", key, named[key.rsplit("/", 1)[0]])
                for key in saved.names("optimizer")})
        self.scale = optim.LossScale(*state.get("scale", dataclasses.astuple(self.scale)))
        self.past.losses.extend(state.get("losses", []))
        self.past.failures = state.get("failures", 0)
        self.loader.seek(state["served"])
        self.step, self.tokens, self.skipped = state["step"], state["tokens"], state["skipped"]
        self.guards.resume(self.out / "metrics.jsonl", self.step)
        console.info(f"resumed from {newest}")
        if line := self.ranks.changed_gradient_sum(state.get("gradient_sum")):
            console.info(line)
        for x in (x for name, x in changed if name in WARN_ON_RESUME):
            console.info(
                f"--resume: {x}; from here on the numbers may differ from the run as it began"
            )

    def begin(self) -> None:
        """Write down what is run, and with what; settings.toml feeds back into train.py."""
        repo, commit = hub.source(self.folder)  # a resumed run is of this commit, wherever main is
        model = f"{repo}@{commit}" if commit else self.s.model
        s = dataclasses.replace(self.s, resume=False, plan=False, model=model)
        write_text(self.out / "settings.toml", flags.to_toml(s))
        about = {
            "command": shlex.join(["python", "train.py", *sys.argv[1:]]),
            "commit": git_commit(), "started": time.strftime("%F %T"),
            "python": platform.python_version(), "torch": torch.__version__,
            "device": str(self.ranks), "ranks": self.ranks.world_size,
            "dtype": self.products, "model": str(self.folder),
            "model_commit": commit,
            "tokenizer": self.tokenizer.fingerprint, "steps": self.steps,
            "data": {x.name: x.bin.meta["sha256"]["tokens.bin"] for x in self.loader.sources},
            "tokens_per_step": self.tokens_per_step, "parameters": self.parameters,
            "changed_settings": {k: getattr(s, k) for k in changed_settings(s, vars(s))}}
        self.describe(about)

    def describe(self, about: dict[str, Any]) -> None:
        """Write run.json."""
        text = json.dumps(about, indent=1, ensure_ascii=False)
        write_text(self.out / "run.json", text + "\n")

    @property
    def finished(self) -> bool:
        """Whether the result was written, to its last file."""
        about = self.out / "run.json"
        return about.exists() and "finished" in json.loads(about.read_text(encoding="utf-8")) \
            and (self.out / "model").exists()

    def write_prompt(self) -> None:
        """Beside the result, how it was asked while it was taught: prompt.json, the chat template,
        and what ends a turn among the stop ids."""
        before, result = self.folder / "prompt.json", self.out / "model"
        prompt = json.loads(before.read_text(encoding="utf-8")) if before.exists() else {}
        prompt |= sources.prompts_of(self.loader.sources)
        if prompt:
            text = json.dumps(prompt, indent=1, ensure_ascii=False)
            (result / "prompt.json").write_text(text + "\n", encoding="utf-8")
        if "chat" in prompt:
            (result / "chat_template.jinja").write_text(prompt["chat"], encoding="utf-8")
            if (end := ChatTemplate.from_folder(result, self.tokenizer).end_of_turn) is not None:
                add_stop_id(result, end)

    def finish(self) -> None:
        """Write the result: with --best the best evaluated weights, else the last."""
        if self.s.best and (kept := self.newest("best")):
            with CheckpointReader(kept) as saved:
                step = saved.state["step"]
                for name, x in self.trained.items():
                    x.copy_(saved.read_like("model", name, x))
            console.info(f"the model is that of step {step}, the best of {self.s.best}")
            self.write(step)
        else:
            self.write(self.step)

    def write(self, step: int) -> None:
        """Write the weights, which are those evaluated at a step, as an HF or PEFT folder, and the
        report; say what changed."""
        writes = self.ranks.rank == 0
        if not lora.adapters(self.model):
            save_model(self.model, self.out / "model", self.folder, write=writes)
        elif writes:
            base = base_model_dir(self.folder)
            save_adapter(self.model, self.out / "model", str(base), self.folder)
        else:
            for x in adapter_state(self.model).values():
                distributed.full_tensor(x)
        if not writes:
            return
        self.write_prompt()
        about = json.loads((self.out / "run.json").read_text(encoding="utf-8"))
        self.describe(about := {**about, "model_step": step})
        page = write_training_report(self.out)
        self.describe({**about, "finished": time.strftime("%F %T")})
        seen = evaluations(self.out / "metrics.jsonl")
        for name in self.held:
            before, after = (seen.get(k, {}).get(name) for k in (min(seen, default=0), step))
            if before and after:
                console.info(f"{name}: {before:.4f} -> {after:.4f} bits per byte "
                             f"({after / before - 1:+.1%})")
        if self.guards.stopped:
            console.info(f"{self.out} {self.end}")
        console.info(f"the model: {self.out / 'model'}   the report: {page}   "
                     f"samples: {self.out / 'samples.txt'}")
