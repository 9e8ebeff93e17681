"""What a run writes about itself: settings.toml and run.json when it starts, and at its end the
model folder, the report, and the closing lines. training/result.py prepares the model folder."""

from __future__ import annotations

import dataclasses
import json
import platform
import shlex
import sys
import time
from typing import Any

import torch

import lora
from checkpoints.model_writer import write_model_folder
from checkpoints.peft_adapter import adapter_state
from reports.training_report import check_training_report, write_training_report
from runtime import console, flags, hub
from runtime.output_paths import try_output_file, try_output_folder
from runtime.paths import git_commit
from runtime.temporary import write_text
from training.early_stopping import read_evaluations
from training.run_folder import continuation_command, read_run_json
from training.settings import changed_settings
from training.state import Run

RUN_FILES = ("settings.toml", "run.json", "metrics.jsonl", "samples.txt", "odd_steps.jsonl")
RUN_FOLDERS = ("checkpoints", "best")


def write_start(run: Run) -> None:
    """Write settings.toml, which train.py can read again, and run.json, which says what is run.

    UserError if a later output of the run cannot be written, or if its report cannot be made.
    """
    for name in RUN_FILES:
        try_output_file(run.out / name)
    for name in RUN_FOLDERS:
        try_output_folder(run.out / name)
    repo, commit = hub.source(run.model_dir)
    # the exact commit, so that a resumed run uses it even if the branch on the hub has moved
    model = f"{repo}@{commit}" if commit else run.settings.model
    settings = dataclasses.replace(run.settings, resume=False, plan=False, model=model)
    write_text(run.out / "settings.toml", flags.to_toml(settings))
    changed = {name: getattr(settings, name) for name in changed_settings(settings, vars(settings))}
    write_run_json(run, {
        "command": shlex.join(["python", "train.py", *sys.argv[1:]]),
        "commit": git_commit(), "started": time.strftime("%F %T"),
        "python": platform.python_version(), "torch": torch.__version__,
        "device": str(run.ranks), "ranks": run.ranks.world_size,
        "dtype": run.compute_dtype, "model": str(run.model_dir),
        "model_commit": commit,
        "tokenizer": run.tokenizer.fingerprint, "steps": run.steps,
        "data": {x.name: x.bin.meta["sha256"]["tokens.bin"] for x in run.loader.sources},
        "tokens_per_step": run.tokens_per_step, "parameters": run.parameters,
        "changed_settings": changed})
    check_training_report(run.out)


def write_run_json(run: Run, content: dict[str, Any]) -> None:
    """Write run.json."""
    write_text(run.out / "run.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def describe_end(run: Run) -> str:
    """How the run ended, and how to continue it if a stop condition ended it."""
    if not run.early_stopping.stop_reason:
        return f"is finished (to train its model further: {continuation_command(run.out)})"
    return (f"was stopped at step {run.step} of {run.steps} by --stop-if "
            f"{run.early_stopping.stop_reason} (to continue: --resume --out {run.out} --stop-if, "
            "with other conditions or none)")


def write_result(run: Run) -> None:
    """Write the model folder and the report: with --best the best weights, else the last."""
    step = run.load_best() if run.settings.best else None
    if step is None:
        step = run.step
    else:
        console.info(f"the model is that of step {step}, the best of {run.settings.best}")
    write_model(run)
    if run.ranks.rank != 0:
        return
    content = {**read_run_json(run.out), "model_step": step}
    write_run_json(run, content)
    finished = time.strftime("%F %T")
    page = write_training_report(run.out, finished)
    write_run_json(run, {**content, "finished": finished})
    print_changes(run, step)
    if run.early_stopping.stop_reason:
        console.info(f"{run.out} {describe_end(run)}")
    console.info(f"the model: {run.out / 'model'}   the report: {page}   "
                f"samples: {run.out / 'samples.txt'}")


def write_model(run: Run) -> None:
    """Write the weights as a Hugging Face folder, or the adapter as a PEFT folder.

    All ranks call this, because sharded tensors are gathered; rank 0 writes.
    """
    state = dict(run.model.named_parameters())
    if lora.adapters(run.model):
        state = adapter_state(run.model)
    write_model_folder(run.result, state, run.out / "model", write=run.ranks.rank == 0)


def print_changes(run: Run, step: int) -> None:
    """Print the bits per byte of each held-out text at the first evaluation and at `step`."""
    evaluations = read_evaluations(run.out / "metrics.jsonl")
    first = evaluations.get(min(evaluations, default=0), {})
    last = evaluations.get(step, {})
    for name in run.val_sets:
        before, after = first.get(name), last.get(name)
        if before and after:
            console.info(f"{name}: {before:.4f} -> {after:.4f} bits per byte "
                        f"({after / before - 1:+.1%})")
