"""The most memory of a training step: all weights, LoRA, QLoRA; ours, the peers', and predicted.

    python -m bench.memory [--quick] [--cases full lora qlora] [--write]

Each side is a process of its own that loads the same random LLaMA and takes three steps on the same
tokens. What a process holds once its libraries are imported is told apart from what the model and
its steps add to that; the prediction, of config.json alone, is of what is added. On all sides glibc
gives blocks above 1 MB back at once: what its heap keeps for later is half a GB here, and noise.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import Settings, child, in_turn, installed, main, peak_gb, table, versions
from bench.train_step import (
    ALPHA,
    BETAS,
    CLIP,
    DECAY,
    LR,
    MODELS,
    RANK,
    draw,
    same_start,
    tokens_of,
)

HERE = "bench.memory"
CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {  # words of train.Settings, and peers
    "full": ("all weights", {"tune": "full"}, ["transformers"]),
    "full-recompute": ("all weights, recompute", {"tune": "full", "recompute": True},
                       ["transformers"]),
    "bf16": ("all weights, adamw-bf16", {"tune": "full", "optimizer": "adamw-bf16"}, []),
    "lora": ("LoRA", {"tune": "lora"}, ["peft", "peft + bf16 adapter"]),
    "lora-recompute": ("LoRA, recompute", {"tune": "lora", "recompute": True}, ["peft"]),
    "qlora": ("QLoRA", {"tune": "qlora"}, ["peft"]),
    "qlora-recompute": ("QLoRA, recompute", {"tune": "qlora", "recompute": True}, ["peft"])}


def settings(case: str, name: str) -> Any:
    """train.Settings of a case."""
    import train

    *_, B, T = MODELS[name]
    return train.Settings(rows=B, seq_len=T, lora_rank=RANK, lora_alpha=ALPHA, dtype="bf16",
                          **CASES[case][1])


def predict(case: str, name: str, folder: str) -> dict[str, float]:
    """GB of 2^30 by part, of config.json alone."""
    import torch

    import memory
    import weights

    need = memory.need(weights.read_config(Path(folder)), settings(case, name), torch.bfloat16)
    return {part: getattr(need, part) / 2**30 for part in (*memory.PARTS, "total")}


def ours(case: str, name: str, folder: str) -> dict[str, float]:
    """Three steps of train.py: GB once all is imported, and at most; the last loss."""
    import torch

    import lora
    import optim
    import train
    import weights
    from data import IGNORE, Batch
    from ranks import Ranks

    s, cpu = settings(case, name), Ranks.start("cpu")
    before = peak_gb()
    narrow = s.optimizer == "adamw-bf16" or s.tune != "full"
    model, _ = weights.load(folder, dtype=torch.bfloat16 if narrow else torch.float32,
                            tokenizer=False, quant="nf4" if s.tune == "qlora" else "none")
    model.model.compute_dtype, model.model.recompute = torch.bfloat16, s.recompute
    if s.tune != "full":
        lora.attach(model, RANK, ALPHA, 0.0, ["all-linear"])
    same_start(model)
    optimizer = optim.adamw(model.train(), LR, BETAS, DECAY, kind=s.optimizer)
    tokens = tokens_of(name)
    targets = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=IGNORE)
    doc, pos = torch.zeros_like(tokens), torch.arange(tokens.shape[1]).expand_as(tokens)
    batch = Batch(tokens, targets, doc, pos)
    losses = [train.train_step(model, train.NLL, [batch], optimizer, cpu, CLIP)[0]
              for _ in range(3)]
    return {"before": before, "peak": peak_gb(), "loss": losses[-1]}


def peer(side: str, case: str, name: str, folder: str) -> dict[str, float]:
    """Three steps as the peers' users write them."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    words = CASES[case][1]
    narrow = words["tune"] != "full"
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    if words["tune"] == "qlora":
        import bitsandbytes  # noqa: F401
    before = peak_gb()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16 if narrow else torch.float32,
        quantization_config=config if words["tune"] == "qlora" else None)
    recompute = words.get("recompute", False)
    if words["tune"] == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=recompute)
    elif recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if narrow:
        model = get_peft_model(
            model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear",
                              task_type="CAUSAL_LM"),
            autocast_adapter_dtype=side != "peft + bf16 adapter")
    same_start(model)
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, LR, BETAS, weight_decay=DECAY, fused=True)
    tokens = tokens_of(name)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=not narrow or words["tune"] == "qlora"):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return {"before": before, "peak": peak_gb(), "loss": loss.item()}


def compare(case: str, s: Settings, name: str, folder: str) -> tuple[list[list[str]], str]:
    """A row of the table for each side of a case, and a line that compares them."""
    what, words, peers = CASES[case]
    said = child(HERE, "predict", case, name, folder)
    sides = {"ours": ("ours", [case, name, folder])}
    if installed("peft") and installed("transformers"):
        sides |= {x: ("peer", [x, case, name, folder]) for x in peers}
    rows, added, losses = [], {}, {}
    for side, done in in_turn(HERE, s.rounds, sides).items():
        peak, before = (statistics.median(x[k] for x in done) for k in ("peak", "before"))
        added[side], losses[side] = peak - before, done[0]["loss"]
        rows.append([what, side, f"{peak:.2f}", f"{added[side]:.2f}",
                     f"{said['total']:.2f}" if side == "ours" else "", f"{losses[side]:.4f}"])
    apart = max(abs(x / losses["ours"] - 1) for x in losses.values())
    if apart > (0.02 if words["tune"] == "qlora" else 2e-3):  # peft's QLoRA widens what ours keeps
        s.faults.append(f"{case}: losses {apart:.1e} apart, so not the same was measured")
    ratios = "".join(f", {added['ours'] / x:.2f} of {side}'s" for side, x in added.items()
                     if side != "ours")
    parts = ", ".join(f"{k} {x:.2f}" for k, x in said.items() if k not in ("total", "gb"))
    return rows, (f"- {what}: predicted {said['total']:.2f} GB ({parts}), "
                  f"{said['total'] / added['ours'] - 1:+.0%} of what was added{ratios}.")


def job(s: Settings) -> str:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)  # of the children
    name = "tiny" if s.size == "tiny" else "110M"
    cases = s.cases or (["full", "lora", "qlora"] if s.size == "quick" else list(CASES))
    *_, B, T = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        n = child(HERE, "draw", name, folder, "float32")
        found = [compare(case, s, name, folder) for case in cases]
    head = ["", "", "peak GB", "added GB", "predicted", "last loss"]
    return (f"{n / 1e6:.0f}M parameters, {B} x {T} tokens, products in bf16, LoRA r {RANK} on all "
            f"linear layers, three steps a process. Peak: the whole process; added: above what it "
            f"held once its libraries were imported.\n\n"
            f"{table(head, [row for rows, _ in found for row in rows])}\n\n"
            + "\n".join(line for _, line in found)
            + f"\n\n{versions('torch', 'transformers', 'peft', 'bitsandbytes')}.")


CHILDREN = {"draw": draw, "predict": predict, "ours": ours, "peer": peer}

if __name__ == "__main__":
    sys.exit(main(HERE, "The memory of a training step, on a CPU", CHILDREN, job, list(CASES)))
