"""How time and memory of a training step grow with its sizes: sequence, rows, vocabulary, ranks.

    python -m bench.growth [--quick] [--cases sequence packed rows ...] [--write]

One size of a small model is changed at a time. Memory is what a step needs in addition to the model
and the optimizer's moments. The exponent k of y = c x^k is fitted to each curve: 1 is linear. For
the sequence there are two curves, because attention is quadratic in time (not in memory): one
document in a row, and documents of 512 tokens packed into a row. With several ranks FSDP shards the
model and the optimizer's state; each rank has its own rows and one thread. The ranks share the
cores of one machine, so their time does not predict that of several GPUs. Each point is the shorter
of two steps of one process (of each rank). Read the exponent over all points, not a single point.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from bench import Settings, child, exponent, limits, main, peak_gb, plot, table
from bench.scale import on_ranks

HERE = "bench.growth"
BASE = {"T": 512, "B": 1, "V": 8192, "C": 256, "L": 4, "R": 0,  # R 0: all weights train
        "document": 0, "W": 0}  # 0: a row's length; one process on all cores
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
    "layers": ("L", {}, {"full": [4, 8, 16, 32], "quick": [4, 8], "tiny": [1, 2]}),
    "rank": ("R", {}, {"full": [8, 32, 128, 256], "quick": [8, 64], "tiny": [2, 4]}),
    "ranks": ("W", {"C": 1024}, {"full": [1, 2, 4], "quick": [1, 2], "tiny": [1, 2]})}
LABELS = {"T": "tokens in a row", "B": "rows", "V": "vocabulary", "C": "width", "L": "layers",
          "R": "LoRA rank", "W": "ranks, by FSDP"}


def measure(T: int, B: int, V: int, C: int, L: int, R: int, document: int,
            W: int) -> dict[str, float]:
    """Seconds of a step, the shorter of two after a first one; GB of a rank's weights and moments;
    GB that a step needs in addition."""
    def take_steps() -> dict[str, float]:
        return steps(T, B, V, C, L, R, document)

    return on_ranks(W, 1, take_steps)[0] if W else take_steps()


def steps(T: int, B: int, V: int, C: int, L: int, R: int, document: int) -> dict[str, float]:
    """The same for this rank."""
    import torch

    import lora
    import train
    from bench.memory import held_gb
    from data import Batch
    from layers.config import ModelConfig
    from model import Llama
    from runtime.distributed import Distributed
    from training import optimizer as optim
    from training.objective import NLL

    ranks = Distributed.start("cpu")
    model = Llama(ModelConfig.from_hf({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": V,
        "hidden_size": C, "intermediate_size": C * 11 // 4, "num_hidden_layers": L,
        "num_attention_heads": C // 64, "num_key_value_heads": C // 64, "rms_norm_eps": 1e-5,
        "max_position_embeddings": T, "hidden_act": "silu", "tie_word_embeddings": False}),
        compute_dtype=torch.bfloat16)
    model.initialise(0)
    if R:
        model.to(torch.bfloat16)
        lora.add_lora(model, R, 2.0 * R, 0.0, ["all-linear"])
    model.train()
    if ranks.world_size > 1:
        ranks.wrap_model(model, "fsdp", torch.bfloat16)
    optimizer = optim.adamw(model, 1e-3, (0.9, 0.95), 0.1)
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))
    index = torch.arange(T).expand(B, T)
    size = document or T
    batch = Batch(ids, ids, index // size, index % size)
    shards = [(getattr(p, "_local_tensor", p), p.requires_grad) for p in model.parameters()]
    moments = sum(8 * shard.numel() for shard, trained in shards if trained) / 2**30
    model_gb = sum(shard.nbytes for shard, _ in shards) / 2**30 + moments
    base_gb, seconds = held_gb() + moments, []
    for _ in range(3):
        begun = time.perf_counter()
        train.train_step(model, NLL, [batch], optimizer, ranks, 1.0)
        seconds.append(time.perf_counter() - begun)
    return {"seconds": min(seconds[1:]), "kept": model_gb, "above": peak_gb() - base_gb}


def job(s: Settings) -> str:
    rows, pictures = [], []
    curves: dict[str, dict[str, tuple[list[float], list[float]]]] = {"seconds": {}, "above": {}}
    for axis in s.cases or list(AXES)[: 3 if s.size == "quick" else None]:
        name, fixed, values = AXES[axis]
        x = values[s.size]
        sizes = BASE | fixed | ({"V": 512, "C": 64, "T": 64} if s.size == "tiny" else {})
        points = [child(HERE, "measure", *(sizes | {name: v}).values()) for v in x]
        for what in curves:
            y = [max(d[what], 1e-3) for d in points]
            curves[what][axis] = ([v / x[0] for v in x], y)
        k = [exponent(x, curves[what][axis][1]) for what in curves]
        rows.append([axis, LABELS[name], f"{x[0]:,} to {x[-1]:,}",
                     f"{points[0]['seconds']:.3f} to {points[-1]['seconds']:.3f}", f"{k[0]:.2f}",
                     f"{points[0]['kept']:.3f} to {points[-1]['kept']:.3f}",
                     f"{points[0]['above']:.3f} to {points[-1]['above']:.3f}", f"{k[1]:.2f}"])
        print(f"{HERE}: {axis} done", file=sys.stderr, flush=True)
    if s.write:
        across = "times the smallest"
        pictures = [plot("growth-time", curves["seconds"], across, "seconds a step"),
                    plot("growth-memory", curves["above"], across, "GB above model and optimizer")]
    head = ["axis", "what changes", "from, to", "seconds a step", "exponent of time",
            "GB of model and optimizer", "GB above them", "its exponent"]
    note = ("Four layers, width 256, 8,192 ids, bf16 products; LoRA (r 16) for sequence, rows, "
            "packed and rank, else all weights; one document a row, `packed`: documents of 512 "
            "tokens. Distributed: width 1,024, a row and a thread each, on this machine's cores. "
            "Seconds: the shorter of two steps of one process. An exponent of 1 is linear.")
    parts = [note, table(head, rows), *pictures, limits.description(limits.measured(s.size))]
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main(HERE, "How a training step grows", {"measure": measure}, job, list(AXES), 0))
