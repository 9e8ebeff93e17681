"""How time and memory of a training step grow: with sequence, rows, vocabulary, width, LoRA rank.

    python -m bench.growth [--quick] [--cases sequence packed rows ...] [--write]

One small model, one thing of it changed at a time. Memory is what a step takes above the model and
its optimizer's moments, so that what grows is seen. The exponent k of y = c x^k is fitted to each
curve: 1 is linear. A sequence's is fitted twice, for attention to all that stands before is
quadratic in time (not in memory): one document a row, and documents of 512 tokens packed into it.
Each point is one process and the shorter of two steps, so that a curve has no spread: what counts
is its exponent over all points, not one of them.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from bench import Settings, child, exponent, limits, main, peak_gb, plot, table

HERE = "bench.growth"
BASE = {"T": 512, "B": 1, "V": 8192, "C": 256, "R": 0, "document": 0}  # R 0: all weights train
AXES: dict[str, tuple[str, dict[str, Any], dict[str, list[int]]]] = {
    "sequence": ("T", {"R": 16}, {"full": [512, 1024, 2048, 4096, 8192, 16384, 32768],
                                  "quick": [512, 1024, 2048], "tiny": [32, 64]}),
    "packed": ("T", {"R": 16, "document": 512},
               {"full": [512, 1024, 2048, 4096, 8192, 16384, 32768],
                "quick": [512, 2048], "tiny": [32, 64]}),
    "rows": ("B", {"R": 16}, {"full": [1, 2, 4, 8, 16], "quick": [1, 4], "tiny": [1, 2]}),
    "vocabulary": ("V", {}, {"full": [32768, 65536, 131072, 262144],
                             "quick": [8192, 32768], "tiny": [512, 1024]}),
    "width": ("C", {}, {"full": [256, 512, 1024], "quick": [256, 512], "tiny": [64, 128]}),
    "rank": ("R", {}, {"full": [8, 32, 128, 256], "quick": [8, 64], "tiny": [2, 4]})}
LABELS = {"T": "tokens in a row", "B": "rows", "V": "vocabulary", "C": "width", "R": "LoRA rank"}


def measure(T: int, B: int, V: int, C: int, R: int, document: int) -> dict[str, float]:
    """Seconds of a step, the least of two after one, and the GB it took above what stood before."""
    import torch

    import lora
    import optim
    import train
    from bench.memory import held_gb
    from data import Batch
    from families import ModelConfig
    from model import Llama
    from ranks import Ranks

    model = Llama(ModelConfig.from_hf({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": V,
        "hidden_size": C, "intermediate_size": C * 11 // 4, "num_hidden_layers": 4,
        "num_attention_heads": C // 64, "num_key_value_heads": C // 64, "rms_norm_eps": 1e-5,
        "max_position_embeddings": T, "hidden_act": "silu", "tie_word_embeddings": False}))
    model.initialise(0)
    model.model.compute_dtype = torch.bfloat16
    if R:
        model.to(torch.bfloat16)
        lora.attach(model, R, 2.0 * R, 0.0, ["all-linear"])
    model.train()
    optimizer = optim.adamw(model, 1e-3, (0.9, 0.95), 0.1)
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))
    at = torch.arange(T).expand(B, T)
    size = document or T
    batch = Batch(ids, ids, at // size, at % size)
    cpu = Ranks.start("cpu")
    moments = sum(8 * p.numel() for p in model.parameters() if p.requires_grad) / 2**30
    before, seconds = held_gb() + moments, []
    for _ in range(3):
        begun = time.perf_counter()
        train.train_step(model, train.NLL, [batch], optimizer, cpu, 1.0)
        seconds.append(time.perf_counter() - begun)
    return {"seconds": min(seconds[1:]), "above": peak_gb() - before}


def job(s: Settings) -> str:
    rows, pictures = [], []
    curves: dict[str, dict[str, tuple[list[float], list[float]]]] = {"seconds": {}, "above": {}}
    for axis in s.cases or list(AXES)[: 3 if s.size == "quick" else None]:
        name, fixed, values = AXES[axis]
        x = values[s.size]
        words = BASE | fixed | ({"V": 512, "C": 64, "T": 64} if s.size == "tiny" else {})
        done = [child(HERE, "measure", *(words | {name: v}).values()) for v in x]
        for what in curves:
            y = [max(d[what], 1e-3) for d in done]
            curves[what][axis] = ([v / x[0] for v in x], y)
        k = [exponent(x, curves[what][axis][1]) for what in curves]
        rows.append([axis, LABELS[name], f"{x[0]:,} to {x[-1]:,}",
                     f"{done[0]['seconds']:.3f} to {done[-1]['seconds']:.3f}", f"{k[0]:.2f}",
                     f"{done[0]['above']:.3f} to {done[-1]['above']:.3f}", f"{k[1]:.2f}"])
        print(f"{HERE}: {axis} done", file=sys.stderr, flush=True)
    if s.write:
        across = "times the smallest"
        pictures = [plot("growth-time", curves["seconds"], across, "seconds a step"),
                    plot("growth-memory", curves["above"], across, "GB above model and optimizer")]
    head = ["axis", "what changes", "from, to", "seconds a step", "exponent of time",
            "GB above model and optimizer", "exponent of memory"]
    note = ("Four layers, width 256, 8,192 ids, bf16 products; LoRA (r 16) for sequence, rows, "
            "packed and rank, else all weights; one document a row, `packed`: documents of 512 "
            "tokens. Seconds: the shorter of two steps of one process. An exponent of 1 is linear.")
    parts = [note, table(head, rows), *pictures, limits.words(limits.measured(s.size))]
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main(HERE, "How a training step grows", {"measure": measure}, job, list(AXES), 0))
