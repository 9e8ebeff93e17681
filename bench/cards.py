"""Which model can be trained on which GPU: the memory estimate for published shapes, as a table.

    python -m bench.cards [--seq-len 2048] [--rows 1]

Nothing is measured here. Each figure is the estimate of `--plan` for a step with the sizes of the
published config.json, --recompute full, products in bf16 and a GPU's flash attention. A tenth of a
GPU's memory and 0.5 GB are left for fragmentation of the allocator and for the CUDA context.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
SHAPES: dict[str, dict[str, Any]] = {  # as in the published config.json of Llama 3.2 and 3.1
    "1B": {**LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "head_dim": 64, "tie_word_embeddings": True},
    "3B": {**LLAMA, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
           "num_attention_heads": 24, "head_dim": 128, "tie_word_embeddings": True},
    "8B": {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "head_dim": 128}}
HIGH = {"lora_rank": 64, "train_embeddings": True, "rslora": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "full, adamw": {"tune": "full"},
    "full, adamw8bit": {"tune": "full", "optimizer": "adamw8bit"},
    "full, adamw-bf16": {"tune": "full", "optimizer": "adamw-bf16"},
    "lora, rank 64, embeddings trained": {"tune": "lora", **HIGH},
    "lora, rank 16": {"tune": "lora"},
    "qlora, rank 64, embeddings trained": {"tune": "qlora", **HIGH},
    "qlora, rank 16": {"tune": "qlora"}}
CARDS = (16, 24, 48, 80)  # GB


def gb(shape: dict[str, Any], options: dict[str, Any], seq_len: int, rows: int) -> float:
    """The peak memory of a step in GB (2^30 bytes)."""
    import torch

    from layers.config import ModelConfig
    from training import memory_estimate as memory
    from training.settings import Settings

    config = ModelConfig(**shape)
    s = dataclasses.replace(Settings(), recompute="full", seq_len=seq_len, rows=rows, **options)
    return memory.estimate(config, s, torch.bfloat16, backend="varlen_flash").total / 2**30


def smallest(x: float) -> str:
    """The smallest GPU whose memory is enough for `x` GB."""
    from training.plan_for import usable_gb

    return next((f"{card} GB" for card in CARDS if x <= usable_gb(card)), "none")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cards", description=__doc__)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=1)
    flags = parser.parse_args()
    print("| trained weights | " + " | ".join(SHAPES) + " |\n|---|" + "--:|" * len(SHAPES))
    for name, options in SETTINGS.items():
        needs = [gb(shape, options, flags.seq_len, flags.rows) for shape in SHAPES.values()]
        print(f"| {name} | " + " | ".join(f"{x:.1f}: {smallest(x)}" for x in needs) + " |",
              flush=True)


if __name__ == "__main__":
    main()
