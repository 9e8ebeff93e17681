"""The peak memory of a training step (all weights, LoRA, QLoRA): ours, the peers', the estimate.

    python -m bench.memory [--quick] [--cases full lora qlora] [--write]

Each side runs in its own process, which loads the same random LLaMA and takes three steps on the
same tokens. Before that the process trains and frees a model of one layer. What it holds then
(libraries and their kernels) is subtracted from the peak, because the estimate, which is made from
config.json alone, counts tensors only. On all sides glibc returns blocks above 1 MB to the system
at once, unless MALLOC_MMAP_THRESHOLD_ is set. With glibc's default its heap keeps gaps between
blocks, about 0.3 GB here.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import Settings, child, in_turn, installed, limits, main, peak_gb, table
from bench.train_step import (
    ALPHA,
    BETAS,
    DECAY,
    LR,
    MODELS,
    RANK,
    LitLoss,
    draw,
    litgpt,
    our_step,
    plain_loss,
    plain_step,
    same_start,
)

HERE = "bench.memory"
CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {  # title, settings, peers
    "full": ("all weights", {"tune": "full"}, ["transformers"]),
    "full-recompute": ("all weights, recompute", {"tune": "full", "recompute": "full"},
                       ["transformers"]),
    "full-selective": ("all weights, selective recompute",
                       {"tune": "full", "recompute": "selective"}, []),
    "bf16": ("all weights, adamw-bf16", {"tune": "full", "optimizer": "adamw-bf16"}, []),
    "lora": ("LoRA", {"tune": "lora"}, ["peft", "peft + bf16 adapter", "litgpt"]),
    "lora-recompute": ("LoRA, recompute", {"tune": "lora", "recompute": "full"}, ["peft"]),
    "qlora": ("QLoRA", {"tune": "qlora"}, ["peft"]),
    "qlora-recompute": ("QLoRA, recompute", {"tune": "qlora", "recompute": "full"}, ["peft"])}


def draws(name: str, folder: str) -> int:
    """Write the random model and one of one layer; returns the parameters of the first."""
    return [draw(x, f"{folder}/{x}", "float32") for x in (f"{name}, one layer", name)][-1]


def settings(case: str, name: str) -> Any:
    """Settings of a case."""
    from training.settings import Settings

    *_, B, T = MODELS[name]
    return Settings(rows=B, seq_len=T, lora_rank=RANK, lora_alpha=ALPHA, dtype="bf16",
                          **CASES[case][1])


def predict(case: str, name: str, folder: str) -> dict[str, float]:
    """The estimate from config.json alone: GB (2^30 bytes) of each category and of a step."""
    import torch

    from checkpoints.model_folder import read_config
    from training import memory_estimate as memory

    estimate = memory.estimate(read_config(Path(folder, name)), settings(case, name),
                       torch.bfloat16)
    return {category: getattr(estimate, category) / 2**30
            for category in (*memory.CATEGORIES, "step")}


def measured(take_steps: Callable[[str], float], name: str) -> dict[str, float]:
    """GB of this process before the steps of a model, its peak, and the last loss.

    A model of one layer of the same widths is trained first and freed. What the libraries load and
    compile for their first products of a shape, and keep, is therefore not counted as the model's.
    """
    take_steps(f"{name}, one layer")
    gc.collect()
    before_gb = held_gb()
    loss = take_steps(name)
    return {"before": before_gb, "peak": peak_gb(), "loss": loss}


def held_gb() -> float:
    """The memory of this process now, in GB of 2^30 bytes; on Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def ours(case: str, name: str, folder: str) -> dict[str, float]:
    """Three steps of train.py."""
    import torch

    import lora
    from checkpoints.huggingface import load_model
    from runtime.distributed import Distributed
    from training import optimizer as optim

    cpu = Distributed.start("cpu")

    def take_steps(name: str) -> float:
        s = settings(case, name)
        narrow = s.optimizer == "adamw-bf16" or s.tune != "full"
        model, _ = load_model(Path(folder, name), tokenizer=False,
                              dtype=torch.bfloat16 if narrow else torch.float32,
                              quant="nf4" if s.tune == "qlora" else "none",
                              compute_dtype=torch.bfloat16, recompute=s.recompute)
        if s.tune != "full":
            lora.add_lora(model, RANK, ALPHA, 0.0, ["all-linear"])
        same_start(model)
        optimizer = optim.adamw(model.train(), LR, BETAS, DECAY, kind=s.optimizer)
        step = our_step(model, name, optimizer, cpu)
        return [step() for _ in range(3)][-1]

    return measured(take_steps, name)


def peer(side: str, case: str, name: str, folder: str) -> dict[str, float]:
    """Three steps as the peers' users write them."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    options = CASES[case][1]
    narrow, recompute = options["tune"] != "full", "recompute" in options
    quantised = options["tune"] == "qlora"
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)

    def take_steps(name: str) -> float:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            Path(folder, name), dtype=torch.bfloat16 if narrow else torch.float32,
            quantization_config=config if quantised else None)
        if quantised:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=recompute)
        elif recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if narrow:
            model = get_peft_model(
                model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear",
                                  task_type="CAUSAL_LM"),
                autocast_adapter_dtype=side != "peft + bf16 adapter")
        same_start(model)
        step = plain_step(model, plain_loss(model, name, autocast=not narrow or quantised))
        return [step() for _ in range(3)][-1]

    return measured(take_steps, name)


def lit(name: str, folder: str) -> dict[str, float]:
    """Three steps of litgpt's LoRA."""

    def take_steps(name: str) -> float:
        model = litgpt(name, f"{folder}/{name}")
        loss_of = LitLoss(model, name)
        step = plain_step(model, loss_of)
        return [loss_of.exact(step()) for _ in range(3)][-1]

    return measured(take_steps, name)


def compare(case: str, s: Settings, name: str, folder: str) -> tuple[list[list[str]], str]:
    """The rows of a case, one for each side, and a line that compares them."""
    title, options, peers = CASES[case]
    predicted = child(HERE, "predict", case, name, folder)
    sides = {"ours": ("ours", [case, name, folder])}
    if installed("peft") and installed("transformers"):
        chosen = peers[:1] if s.size == "quick" else peers
        sides |= {x: ("peer", [x, case, name, folder]) for x in chosen if x != "litgpt"}
        if "litgpt" in chosen and installed("litgpt"):
            sides["litgpt"] = "lit", [name, folder]
    rows, added, losses = [], {}, {}
    for side, runs in in_turn(HERE, s.rounds, sides).items():
        peak, base = (statistics.median(x[k] for x in runs) for k in ("peak", "before"))
        added[side], losses[side] = peak - base, runs[0]["loss"]
        rows.append([title, side, f"{peak:.2f}", f"{added[side]:.2f}",
                     f"{predicted['step']:.2f}" if side == "ours" else "", f"{losses[side]:.4f}"])
    difference = max(abs(x / losses["ours"] - 1) for x in losses.values())
    # peft's QLoRA converts the embeddings to float32
    tolerance = 0.02 if options["tune"] == "qlora" else 2e-3
    if difference > tolerance:
        s.faults.append(f"{case}: losses differ by {difference:.1e}: the sides did different work")
    ratios = "".join(f", {added['ours'] / x:.2f} of {side}'s" for side, x in added.items()
                     if side != "ours")
    parts = ", ".join(f"{k} {x:.2f}" for k, x in predicted.items() if k != "step")
    return rows, (f"- {title}: predicted {predicted['step']:.2f} GB ({parts}), "
                  f"{predicted['step'] / added['ours'] - 1:+.0%} of what was added{ratios}.")


def job(s: Settings) -> str:
    peaks = limits.measured(s.size)  # before the allocator is configured
    threshold = os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 20))  # of the children
    name = {"full": "110M", "quick": "30M", "tiny": "tiny"}[s.size]
    cases = s.cases or (["lora"] if s.size == "quick" else list(CASES))
    *_, B, T = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        n = child(HERE, "draws", name, folder)
        results = [compare(case, s, name, folder) for case in cases]
    head = ["", "", "peak GB", "added GB", "predicted", "last loss"]
    return (f"{n / 1e6:.0f}M parameters, {B} x {T} tokens, products in bf16, LoRA r {RANK} on all "
            f"linear layers, three steps a process. Peak: the whole process; added: above what it "
            f"holds once a model of one layer of the same widths has come and gone. "
            f"MALLOC_MMAP_THRESHOLD_={threshold} on all sides.\n\n"
            f"{table(head, [row for rows, _ in results for row in rows])}\n\n"
            + "\n".join(line for _, line in results)
            + "\n\n" + limits.description(peaks, "transformers", "peft", "litgpt", "bitsandbytes"))


CHILDREN = {"draws": draws, "predict": predict, "ours": ours, "peer": peer, "lit": lit}

if __name__ == "__main__":
    sys.exit(main(HERE, "The memory of a training step, on a CPU", CHILDREN, job, list(CASES)))
