"""A training step here against a plain transformers (+ peft) loop, on this machine's CPU.

    python -m bench.train_step [--quick] [--rounds 2] [--steps 5] [--md FILE]

The same random LLaMA, written once by transformers, is loaded by both sides; both take the same
tokens, dtype, fused AdamW and clipping. Each measurement is a process of its own, in turn, so that
a slow minute is slow for both. Where the two losses of step 0 differ, not the same was measured.
The parent stays small: a child inherits its parent's peak of memory.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

SIZES = {  # hidden_size, intermediate_size, layers, heads, kv heads, vocabulary, rows, row length
    "full": (768, 2048, 12, 12, 4, 32000, 4, 512),
    "quick": (64, 128, 2, 4, 2, 512, 2, 32)}
CASES = {"bf16": "all weights, bf16 products", "lora": "LoRA r 16, bf16",
         "fp32": "all weights, fp32"}
RANK, ALPHA, LR, BETAS, DECAY, CLIP = 16, 32, 1e-4, (0.9, 0.95), 0.1, 1.0


def draw(size: str, folder: str) -> int:
    """Write the random model, as transformers draws and saves it; the number of its parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    C, M, L, H, K, V, _, T = SIZES[size]
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=V, hidden_size=C, intermediate_size=M, num_hidden_layers=L,
        num_attention_heads=H, num_key_value_heads=K, max_position_embeddings=T))
    model.save_pretrained(folder)
    return model.num_parameters()


def tokens_of(size: str) -> Any:
    """Token ids (B,T), the same in every process."""
    import torch

    *_, V, B, T = SIZES[size]
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))


def ours(case: str, size: str, folder: str) -> Callable[[], float]:
    """One step of train.py; it gives the loss."""
    import torch

    import lora
    import optim
    import train
    import weights
    from data import IGNORE, Batch
    from ranks import Ranks

    kept = torch.bfloat16 if case == "lora" else torch.float32
    model, _ = weights.load(folder, dtype=kept, tokenizer=False)
    model.model.compute_dtype = torch.float32 if case == "fp32" else torch.bfloat16
    if case == "lora":
        lora.attach(model, RANK, ALPHA, 0.0, ["all-linear"])
    model.train()
    optimizer = optim.adamw(model, LR, BETAS, DECAY)
    tokens = tokens_of(size)
    targets = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=IGNORE)
    doc, pos = torch.zeros_like(tokens), torch.arange(tokens.shape[1]).expand_as(tokens)
    batch = Batch(tokens, targets, doc, pos)
    cpu = Ranks(0, 1, torch.device("cpu"))
    return lambda: train.train_step(model, train.NLL, [batch], optimizer, cpu, CLIP)[0]


def peer(case: str, size: str, folder: str) -> Callable[[], float]:
    """One step as transformers' users write it; it gives the loss."""
    import torch
    from transformers import LlamaForCausalLM

    kept = torch.bfloat16 if case == "lora" else torch.float32
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=kept)
    if case == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, LR, BETAS, weight_decay=DECAY, fused=True)
    tokens = tokens_of(size)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=case == "bf16"):
            loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def measure(side: str, case: str, size: str, folder: str, steps: str) -> dict[str, Any]:
    """The first step's loss, seconds of each later one, and the peak in GB of 2^30."""
    step = {"ours": ours, "peer": peer}[side](case, size, folder)
    loss, seconds = step(), []
    for _ in range(int(steps)):
        begun = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begun)
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return {"loss": loss, "seconds": seconds, "gb": getrusage(RUSAGE_SELF).ru_maxrss / unit}


def matmul(case: str, size: str) -> tuple[float, int]:
    """GFLOP/s of the product an MLP is made of, (BT,C) by (C,M), best of 20; and threads."""
    import torch

    C, M, *_, B, T = SIZES[size]
    dtype = torch.float32 if case == "fp32" else torch.bfloat16
    a, b, best = torch.randn(B * T, C, dtype=dtype), torch.randn(M, C, dtype=dtype), 1e9
    for _ in range(20):
        begun = time.perf_counter()
        a @ b.T
        best = min(best, time.perf_counter() - begun)
    return 2 * B * T * C * M / best / 1e9, torch.get_num_threads()


CHILDREN: dict[str, Callable[..., Any]] = {"draw": draw, "measure": measure, "matmul": matmul}


def child(name: str, *args: object) -> Any:
    """What a function of CHILDREN gives in a new process."""
    command = [sys.executable, "-m", "bench.train_step", "--child", name, *map(str, args)]
    said = subprocess.check_output(command, cwd=Path(__file__).parents[1])
    return json.loads(said.splitlines()[-1])


def compare(case: str, size: str, folder: str, rounds: int, steps: int) -> list[str]:
    """The two lines of a case, and what follows from them."""
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    speeds, lines, medians, gbs, (*_, B, T) = [], [], [], [], SIZES[size]
    for _ in range(rounds):
        speeds.append(child("matmul", case, size)[0])
        for side, done in runs.items():
            done.append(child("measure", side, case, size, folder, steps))
    for side, done in runs.items():
        seconds = sorted(x for run in done for x in run["seconds"])
        medians.append(statistics.median(seconds))
        gbs.append(max(run["gb"] for run in done))
        lines.append(f"| {CASES[case]} | {side} | {medians[-1]:.3f} | {seconds[0]:.3f} to "
                     f"{seconds[-1]:.3f} | {B * T / medians[-1]:,.0f} | {gbs[-1]:.2f} | "
                     f"{done[0]['loss']:.5f} |")
    apart = abs(runs["ours"][0]["loss"] - runs["peer"][0]["loss"])
    return [*lines, f"- {CASES[case]}: {medians[1] / medians[0]:.2f} times the peer's speed in "
                    f"{gbs[0] / gbs[1]:.2f} of its memory; step 0's losses are {apart:.1e} apart; "
                    f"the machine multiplies at {max(speeds):,.0f} GFLOP/s."]


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return print(json.dumps(CHILDREN[sys.argv[2]](*sys.argv[3:])))
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run?")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=2, help="processes a side")
    parser.add_argument("--steps", type=int, help="measured in each process")
    parser.add_argument("--md", help="append the table to this file")
    s = parser.parse_args()
    size, steps = "quick" if s.quick else "full", s.steps or (2 if s.quick else 5)
    C, M, L, H, K, V, B, T = SIZES[size]
    with tempfile.TemporaryDirectory() as folder:
        n = child("draw", size, folder)
        found = [compare(case, size, folder, s.rounds, steps) for case in s.cases]
    versions = ", ".join(f"{x} {version(x)}" for x in ("torch", "transformers", "peft"))
    text = "\n".join([
        f"{n / 1e6:.1f}M parameters: {L} layers, C {C}, M {M}, {H} heads over {K}, V {V}. "
        f"{B} x {T} tokens. Median of {s.rounds} x {steps} steps after a first. "
        f"{platform.machine()}, {child('matmul', 'fp32', 'quick')[1]} threads; {versions}.", "",
        "| | | seconds a step | range | tokens/s | peak GB | loss of step 0 |",
        "|---|---|---:|---:|---:|---:|---:|", *(x for f in found for x in f[:2]), "",
        *(f[2] for f in found)]) + "\n"
    print(text)
    if s.md:
        with open(s.md, "a") as file:
            print(text, file=file)


if __name__ == "__main__":
    main()
