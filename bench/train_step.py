"""A training step here against a plain transformers (+ peft) loop, on this machine's CPU.

    python -m bench.train_step [--quick] [--cases bf16 lora fp32] [--rounds 2] [--steps 5]
                               [--compile] [--md FILE] [--json FILE]

The same random LLaMA, written once by transformers, is loaded by all sides; all take the same
tokens, dtype, start of LoRA, fused AdamW and clipping. peft is measured in three forms and we are
compared with its fastest and with its smallest. The losses of the first and of the last step must
agree, or not the same was measured: that is an error.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import answer, child, peak_gb

HERE = "bench.train_step"
SIZES = {  # hidden_size, intermediate_size, layers, heads, kv heads, vocabulary, rows, row length
    "full": (768, 2048, 12, 12, 4, 32000, 4, 512),
    "quick": (64, 128, 2, 4, 2, 512, 2, 32)}
CASES = {  # what is trained, and by whom
    "bf16": ("all weights, bf16 products", ["ours", "transformers"]),
    "lora": ("LoRA r 16, bf16", ["ours", "peft", "peft, autocast", "peft, bf16 adapter"]),
    "fp32": ("all weights, fp32", ["ours", "transformers"])}
RANK, ALPHA, LR, BETAS, DECAY, CLIP = 16, 32, 3e-4, (0.9, 0.95), 0.1, 1.0
APART = {"bf16": 1e-3, "lora": 1e-3, "fp32": 1e-4}  # of the loss, at most


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


def same_start(model: Any) -> None:
    """Fill every A of LoRA with the same numbers on all sides; B is zero on all."""
    import torch

    found = {n[n.index("layers."):].replace(".default", ""): p
             for n, p in model.named_parameters() if ".lora_A." in n}
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, p in sorted(found.items()):
            p.copy_(torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5)


def ours(case: str, size: str, folder: str, compiled: bool) -> tuple[Callable[[], float], Any]:
    """One step of train.py, giving the loss; and the model."""
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
    same_start(model)
    model.train()
    if compiled:
        for block in model.model.layers:
            block.compile()
    optimizer = optim.adamw(model, LR, BETAS, DECAY)
    tokens = tokens_of(size)
    targets = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=IGNORE)
    doc, pos = torch.zeros_like(tokens), torch.arange(tokens.shape[1]).expand_as(tokens)
    batch = Batch(tokens, targets, doc, pos)
    cpu = Ranks(0, 1, torch.device("cpu"))
    return lambda: train.train_step(model, train.NLL, [batch], optimizer, cpu, CLIP)[0], model


def peer(side: str, case: str, size: str, folder: str, compiled: bool) -> tuple[Callable, Any]:
    """One step as transformers' users write it, giving the loss; and the model."""
    import torch
    from transformers import LlamaForCausalLM

    kept = torch.bfloat16 if case == "lora" else torch.float32
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=kept)
    if case == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear",
                              task_type="CAUSAL_LM"),
            autocast_adapter_dtype=side != "peft, bf16 adapter")  # True, peft's own: float32
    same_start(model)
    model.train()
    if compiled:
        model.compile()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, LR, BETAS, weight_decay=DECAY, fused=True)
    tokens = tokens_of(size)
    mixed = case == "bf16" or side == "peft, autocast"

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, model


def measure(side: str, case: str, size: str, folder: str, steps: str, compiled: str) -> dict:
    """Losses of all steps, seconds of those after the warm-up, the peak in GB of 2^30, parameters
    trained."""
    make = ours if side == "ours" else lambda *a: peer(side, *a)
    step, model = make(case, size, folder, compiled == "True")
    losses, seconds = [step(), step()], []
    for _ in range(int(steps)):
        begun = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - begun)
    return {"losses": losses, "seconds": seconds, "gb": peak_gb(),
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}


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


def compare(case: str, size: str, folder: str, s: argparse.Namespace) -> dict[str, Any]:
    """All sides of a case, `rounds` times in turn: what each took; ours beside the best peer."""
    what, sides = CASES[case]
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    gflops, (*_, B, T) = [], SIZES[size]
    for _ in range(s.rounds):
        gflops.append(child(HERE, "matmul", case, size)[0])
        for side in sides:
            runs[side].append(child(HERE, "measure", side, case, size, folder, s.steps, s.compile))
            middle = statistics.median(runs[side][-1]["seconds"])
            print(f"{what}, {side}: {middle:.3f} s a step", file=sys.stderr, flush=True)
    rows = []
    for side, done in runs.items():
        seconds = sorted(x for run in done for x in run["seconds"])
        middle, losses = statistics.median(seconds), done[0]["losses"]
        rows.append({"case": what, "side": side, "seconds": middle, "least": seconds[0],
                     "most": seconds[-1], "tokens_per_second": B * T / middle,
                     "gb": max(run["gb"] for run in done), "first_loss": losses[0],
                     "last_loss": losses[-1], "trained": done[0]["trained"]})
    us, *peers = rows
    fastest, smallest = min(peers, key=lambda r: r["seconds"]), min(peers, key=lambda r: r["gb"])
    apart = max(abs(us[k] / r[k] - 1) for r in peers for k in ("first_loss", "last_loss"))
    same = apart <= APART[case] and len({r["trained"] for r in rows}) == 1
    return {"rows": rows, "speed": fastest["seconds"] / us["seconds"], "fastest": fastest["side"],
            "memory": us["gb"] / smallest["gb"], "smallest": smallest["side"], "apart": apart,
            "same": same, "gflops": max(gflops)}


def table(found: list[dict[str, Any]]) -> str:
    """The measurements in Markdown, and a line for each case."""
    lines = ["| | | seconds a step | range | tokens/s | peak GB | first loss | last loss |",
             "|---|---|---:|---:|---:|---:|---:|---:|"]
    for r in (r for f in found for r in f["rows"]):
        lines.append(f"| {r['case']} | {r['side']} | {r['seconds']:.3f} | {r['least']:.3f} to "
                     f"{r['most']:.3f} | {r['tokens_per_second']:,.0f} | {r['gb']:.2f} | "
                     f"{r['first_loss']:.5f} | {r['last_loss']:.5f} |")
    lines.append("")
    for f in found:
        lines.append(
            f"- {f['rows'][0]['case']}: {f['speed']:.2f} times the speed of the fastest peer "
            f"({f['fastest']}), in {f['memory']:.2f} of the memory of the smallest "
            f"({f['smallest']}); losses at most {f['apart']:.1e} apart, relative"
            f"{'' if f['same'] else ': NOT THE SAME WAS MEASURED'}; the machine multiplies at "
            f"{f['gflops']:,.0f} GFLOP/s.")
    return "\n".join(lines)


def main() -> int:
    if answer(CHILDREN):
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run?")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=2, help="processes a side")
    parser.add_argument("--steps", type=int, help="measured in each process, after two")
    parser.add_argument("--compile", action="store_true", help="torch.compile on all sides")
    parser.add_argument("--md", help="append the table to this file")
    parser.add_argument("--json", help="write all numbers to this file")
    s = parser.parse_args()
    size, s.steps = "quick" if s.quick else "full", s.steps or (2 if s.quick else 5)
    C, M, L, H, K, V, B, T = SIZES[size]
    with tempfile.TemporaryDirectory() as folder:
        n = child(HERE, "draw", size, folder)
        found = [compare(case, size, folder, s) for case in s.cases]
    about = {"parameters": n, "machine": platform.machine(), "compile": s.compile,
             "threads": child(HERE, "matmul", "fp32", "quick")[1],
             "rounds": s.rounds, "steps": s.steps,
             "versions": {x: version(x) for x in ("torch", "transformers", "peft")}}
    text = (f"{n / 1e6:.1f}M parameters: {L} layers, C {C}, M {M}, {H} heads over {K}, V {V}. "
            f"{B} x {T} tokens. Median of {s.rounds} x {s.steps} steps after two"
            f"{', compiled' if s.compile else ''}. {about['machine']}, {about['threads']} threads; "
            f"{', '.join(f'{k} {v}' for k, v in about['versions'].items())}.\n\n{table(found)}\n")
    print(text)
    if s.md:
        with open(s.md, "a", encoding="utf-8") as file:
            print(text, file=file)
    if s.json:
        text = json.dumps({**about, "cases": found}, indent=1)
        Path(s.json).write_text(text + "\n", encoding="utf-8")
    return 0 if all(f["same"] for f in found) else 1


if __name__ == "__main__":
    sys.exit(main())
