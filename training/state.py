"""The state of a run: its parts, its progress, and how both are saved and resumed.

A run can be killed at any step and resumed bit for bit. Therefore everything that changes during
training is either in a checkpoint, or a function of the seed and the step (data order, dropout).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoints.model_writer import ModelFolder
from checkpoints.resume_point import (
    AsyncCheckpointer,
    CheckpointReader,
    find_newest,
)
from data import Loader
from evaluation.suites import Suite
from layers import nf4
from model import Llama
from runtime import console, flags
from runtime.console import FLAGS, UserError
from runtime.distributed import GRADIENT_SUM, Distributed
from runtime.temporary import remove_leftovers
from tokenization.tokenizer import Tokenizer
from training import optimizer as optim
from training.datasets import ValidationSets
from training.early_stopping import EarlyStopping
from training.monitor import MonitorState
from training.settings import (
    CAN_CHANGE_ON_RESUME,
    WARN_ON_RESUME,
    Settings,
    upgrade_settings,
)


@dataclass
class Run:
    """A run after set-up: its settings, its parts, and its progress."""

    settings: Settings
    out: Path
    ranks: Distributed
    model: Llama
    model_dir: Path  # the folder of --model: its tokenizer, and the layout of the result
    tokenizer: Tokenizer
    weights_fingerprint: str  # of the weights that the run starts from
    stop_ids: set[int]  # ids that end an answer
    result: ModelFolder  # what OUT/model will hold besides its numbers
    loader: Loader
    val_sets: ValidationSets
    suites: list[Suite]
    early_stopping: EarlyStopping
    optimizer: torch.optim.Optimizer
    loss_scale: optim.LossScale
    checkpointer: AsyncCheckpointer
    steps: int
    micro_batches: int
    monitor_state: MonitorState = field(default_factory=MonitorState)
    step: int = 0
    tokens: int = 0  # trained so far
    skipped: int = 0  # steps whose loss or gradient was not finite
    best: float = math.inf  # the lowest bits per byte of --best so far

    @property
    def tokens_per_step(self) -> int:
        s = self.settings
        return s.rows * s.seq_len * self.ranks.world_size * self.micro_batches

    @property
    def save_every(self) -> int:
        """Steps between checkpoints. The first and the last step are always saved."""
        return self.settings.save_every or max(1, self.steps // 5)

    @property
    def compute_dtype(self) -> str:
        """The name of the dtype of matrix products."""
        if self.settings.dtype == "fp8":
            return "float8"
        return str(self.model.compute_dtype).removeprefix("torch.")

    @property
    def parameters(self) -> dict[str, int]:
        """The number of parameters: all, and those that are trained."""
        parameters = list(self.model.parameters())
        total = sum(p.numel() for p in parameters)
        total += sum(m.numel for m in nf4.nf4_layers(self.model))
        return {"total": total, "trained": sum(p.numel() for p in parameters if p.requires_grad)}

    @property
    def trained_tensors(self) -> dict[str, Tensor]:
        """The trained parameters by name, without their autograd history."""
        return {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}

    @property
    def data(self) -> dict[str, str]:
        """The sha256 of each source's bin, by name."""
        return {source.name: source.sha for source in self.loader.sources}

    def seed_step(self) -> None:
        """Seed torch for the next step from the seed, the step and the rank.

        So dropout needs no random state in a checkpoint.
        """
        entropy = [self.settings.seed, self.step, self.ranks.rank]
        seed = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(seed))

    # -- saving ------------------------------------------------------------------------------------

    def save(self) -> None:
        """Start to write a checkpoint: trained parameters, optimizer state, and data position."""
        parts = {"model": self.trained_tensors,
                 "optimizer": optim.state_tensors(self.model, self.optimizer)}
        state = {"step": self.step, "tokens": self.tokens, "skipped": self.skipped,
                 "settings": dataclasses.asdict(self.settings),
                 "served": self.loader.rows_consumed, "data": self.data,
                 "model": self.weights_fingerprint, "ranks": self.ranks.world_size,
                 "gradient_sum": GRADIENT_SUM,
                 "scale": dataclasses.astuple(self.loss_scale),
                 "losses": list(self.monitor_state.losses),
                 "failures": self.monitor_state.failures}
        self.checkpointer.save(self.step, parts, state)

    def save_if_best(self, bits_per_byte: dict[str, float | None]) -> None:
        """Save the trained parameters to OUT/best if the text of --best was never predicted better.
        """
        value = bits_per_byte.get(self.settings.best)
        if value is None or value >= self.best:
            return
        self.best = value
        checkpointer = AsyncCheckpointer(self.out / "best", 2, self.ranks, keep_later=False)
        checkpointer.save(self.step, {"model": self.trained_tensors},
                          {"step": self.step, "best": value})
        checkpointer.finish(must_succeed=True)

    # -- resuming ----------------------------------------------------------------------------------

    def newest_checkpoint(self, name: str) -> Path | None:
        """The newest valid checkpoint under OUT/name.

        Rank 0 searches, removes what an interrupted write left there, and tells the other ranks.
        """
        newest, root = None, self.out / name
        if self.ranks.rank == 0:
            newest = find_newest(root)
            remove_leftovers(root, restore=False)
        newest = self.ranks.all_gather_text(str(newest or ""))[0]
        return Path(newest) if newest else None

    def resume(self) -> None:
        """Continue from the newest valid checkpoint; each rank reads only its part.

        UserError if settings, data or the starting weights are not those of the checkpoint.
        """
        if self.settings.best:
            best = self.newest_checkpoint("best")
            if best:
                with CheckpointReader(best) as checkpoint:
                    self.best = checkpoint.state["best"]
        newest = self.newest_checkpoint("checkpoints")
        if newest is None:
            console.info("no checkpoint yet: starting from step 0")
            return
        with CheckpointReader(newest) as checkpoint:
            state = checkpoint.state
            warnings = self._check_same_run(newest, state)
            self._load_tensors(checkpoint)
        self.loss_scale = optim.LossScale(*state.get("scale", dataclasses.astuple(self.loss_scale)))
        self.monitor_state.losses.extend(state.get("losses", []))
        self.monitor_state.failures = state.get("failures", 0)
        self.loader.seek(state["served"])
        self.step, self.tokens, self.skipped = state["step"], state["tokens"], state["skipped"]
        self.early_stopping.resume(self.out / "metrics.jsonl", self.step)
        console.info(f"resumed from {newest}")
        if line := self.ranks.changed_gradient_sum(state.get("gradient_sum")):
            console.info(line)
        for change in warnings:
            console.info(f"--resume: {change}; from here on the numbers may differ from those of "
                        "the run as it began")

    def load_best(self) -> int | None:
        """Load the parameters under OUT/best -> their step; None if there are none."""
        best = self.newest_checkpoint("best")
        if best is None:
            return None
        with CheckpointReader(best) as checkpoint:
            for name, x in self.trained_tensors.items():
                x.copy_(checkpoint.read_like("model", name, x))
            return checkpoint.state["step"]

    def _check_same_run(self, newest: Path, state: dict[str, Any]) -> list[str]:
        """UserError if a checkpoint is of another run -> the changes that deserve a warning.

        The settings are compared again here, because settings.toml may have been edited by hand.
        """
        saved = upgrade_settings(state.get("settings", {}))
        changes = flags.changed_settings(saved, dataclasses.asdict(self.settings))
        may_change = CAN_CHANGE_ON_RESUME | WARN_ON_RESUME | {"model"}
        refused = [text for name, text in changes if name not in may_change]
        if refused:
            raise UserError(f"{self.out / 'settings.toml'}: differs from the settings of {newest} "
                            f"({'; '.join(refused)}); that is another run: restore the file, or "
                            "start a new run with another --out", FLAGS)
        if state["data"] != self.data:
            old, new = (", ".join(f"{name} {sha[:12]}" for name, sha in data.items())
                        for data in (state["data"], self.data))
            raise UserError(f"--resume: the data are not those of {newest} (sha256 of the bins "
                            f"was {old}, now {new}); start a new run with another --out")
        fingerprint = state.get("model", self.weights_fingerprint)  # old checkpoints have none
        if fingerprint != self.weights_fingerprint:
            raise UserError(f"--resume: {self.model_dir} holds other weights than those that "
                            f"{newest} continues from (their fingerprint was {fingerprint[:12]}, "
                            f"now {self.weights_fingerprint[:12]}); restore them, or start a new "
                            "run with another --out")
        return [text for name, text in changes if name in WARN_ON_RESUME]

    def _load_tensors(self, checkpoint: CheckpointReader) -> None:
        """Load the trained parameters and the optimizer state."""
        trained = self.trained_tensors
        for name, x in trained.items():
            x.copy_(checkpoint.read_like("model", name, x))
        optimizer_state = {}
        for key in checkpoint.names("optimizer"):
            parameter = trained[key.rsplit("/", 1)[0]]
            optimizer_state[key] = checkpoint.read_like("optimizer", key, parameter)
        optim.load_state(self.model, self.optimizer, optimizer_state)
