"""Short training runs: a workspace of tiny models and bins, runs as processes or as forked ranks,
and what they leave behind."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jinja2  # noqa: F401  # what every child would else import
import matplotlib.pyplot  # noqa: F401
import pytest
import torch
import torch.distributed.fsdp
import tyro  # noqa: F401
from safetensors.torch import load_file

import train
from helpers import fork, tiny
from preparation.text import prepare_text
from runtime import console
from runtime import flags as config
from runtime.paths import ROOT
from training.settings import Settings, read_settings

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def make_workspace(root: Path) -> Path:
    """Make tiny models (`tied`, `untied`, `quantised`), two texts of unequal size, and their
    bins."""
    for name, shape in (("tied", "llama32"), ("untied", "biases")):
        tiny.folder(root / name, shape, max_position_embeddings=64)
    rng = random.Random(0)
    for name, n in (("kin", 60), ("eng", 30)):
        lines = [" ".join(rng.choice(tiny.SENTENCES) for _ in range(rng.randint(1, 4))) + f" {i}"
                 for i in range(n)]
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
        prepare_text([str(root / f"{name}.txt")], root / "tied", root / name)
    shutil.copytree(root / "tied", root / "quantised")
    raw_config = json.loads((root / "quantised/config.json").read_text())
    raw_config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (root / "quantised/config.json").write_text(json.dumps(raw_config))
    return root


# -- runs of train.py as processes -----------------------------------------------------------------


def train_command(workspace: Path, out: str, *flags: str) -> list[str]:
    """The words of a short run of train.py on the workspace's bins."""
    return [sys.executable, str(ROOT / "train.py"), "--model", str(workspace / "tied"), "--data",
            f"{workspace}/kin:3", f"{workspace}/eng:1", "--out", str(workspace / out),
            "--seq-len", "32", "--rows", "2", "--tokens-per-step", "128", "--lr", "1e-3",
            "--hold-out", "0.1", "--dtype", "fp32", "--device", "cpu", *flags]


def call(args: list[str], code: int = 0) -> str:
    """Run a command, check its exit code, and return what it wrote to stderr."""
    process = subprocess.run(args, capture_output=True, text=True, env=ENV, cwd=ROOT, timeout=120)
    assert process.returncode == code, process.stderr[-2000:]
    return process.stderr


# -- runs of one or several ranks in forked children -----------------------------------------------


def make_settings(workspace: Path, out: str, **changes) -> Settings:
    """Two sources, three micro-batches of one row a rank on two ranks, rows of cut documents."""
    return Settings(**{
        "model": str(workspace / "tied"), "data": [f"{workspace}/kin:3", f"{workspace}/eng:1"],
        "out": str(workspace / out), "seq_len": 32, "rows": 1, "tokens_per_step": 192, "lr": 1e-3,
        "hold_out": 0.05, "eval_tokens": 60, "prompts": ["Umwana"], "eval_every": 1000,
        "dtype": "fp32", "device": "cpu", "steps": 20, "rank_timeout": 60.0, **changes})


def write_recipe(settings: Settings) -> Path:
    """Write the settings beside their --out as a recipe."""
    file = Path(settings.out).with_name(f"{Path(settings.out).name}.toml")
    file.write_text(config.to_toml(settings))
    return file


def rank_action(settings: Settings, during: Callable[[train.Run], object] = id):
    """What a rank does: the run, as the command would, or going on with one. `during` is called as
    each step begins, with run.step steps done."""

    def run() -> int:
        original_seed = train.Run.seed_step

        def seed(self: train.Run) -> None:
            during(self)
            original_seed(self)

        train.Run.seed_step = seed  # in this child alone
        argv = ["--resume", "--out", settings.out]
        if settings.shard != "auto":
            argv += ["--shard", settings.shard]
        if settings.resume:
            return console.run(lambda: train.train(*read_settings(argv)))
        origins = dict.fromkeys((f.name for f in dataclasses.fields(settings)), "default")
        return console.run(lambda: train.train(settings, origins))

    return run


def run_ranks(settings: Settings, world: int = 1, codes: set[int] = frozenset({0}),
              during: Callable[[train.Run], object] = id, **env: str) -> str:
    """Train on so many ranks, check how they end, and return what they wrote."""
    output = Path(settings.out).with_name(f"said-{Path(settings.out).name}")
    ends = fork.ends(fork.together(world, rank_action(settings, during), output, **env))
    text = "".join(f.read_text() for f in sorted(output.parent.glob(f"{output.name}-*")))
    assert set(ends) <= codes, (ends, text[-3000:])
    return text


def send_signal_at(step: int, rank: int = 0,
                   number: int = signal.SIGTERM) -> Callable[[train.Run], None]:
    """Send one rank a signal while it takes that step; for `during`."""

    def during(run: train.Run) -> None:
        if run.step == step - 1 and run.ranks.rank == rank:
            os.kill(os.getpid(), number)

    return during


# -- what a run leaves behind ----------------------------------------------------------------------


def read_losses(out: Path) -> dict[int, float]:
    """The loss of each step in metrics.jsonl."""
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [x["step"] for x in lines if "loss" in x]
    assert steps == list(range(1, len(steps) + 1)), "each step stands once, in order"
    return {x["step"]: x["loss"] for x in lines if "loss" in x}


def load_result(out: Path) -> dict[str, torch.Tensor]:
    """The tensors of the model or adapter that a run wrote."""
    (file,) = (out / "model").glob("*.safetensors")
    return load_file(file)


def assert_same_run(one: Path, two: Path, steps: int = 20) -> None:
    """That two runs have the same losses at every step and end with the same weights, to 1e-5."""
    a, b = read_losses(one), read_losses(two)
    assert all(b[k] == pytest.approx(a[k], rel=1e-5) for k in a) and len(a) == len(b) == steps
    a, b = load_result(one), load_result(two)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-5)
