"""Loading a model on a CPU, compared with transformers' from_pretrained.

    python -m bench.load [--quick] [--rounds 3] [--write]

A random LLaMA of TinyLlama's shape (1.1 billion parameters, bf16; 0.1 billion with --quick) is
written once, in shards. Its files are in the disk cache. Both sides load it in the file's dtype and
in float32, and then compute the logits of one token, because a file that is only mapped is not
loaded yet. Memory is the peak of the process minus its peak after the imports. The likeliest next
token of both sides must be the same.
"""

from __future__ import annotations

import sys
import tempfile
import time
from typing import Any

from bench import Settings, Spread, child, in_turn, limits, main, peak_gb, table

HERE = "bench.load"
SIZES = {  # hidden_size, intermediate_size, layers, heads, kv heads, vocabulary
    "full": (2048, 5632, 22, 32, 4, 32000), "quick": (768, 2048, 12, 12, 4, 32000),
    "tiny": (64, 128, 2, 4, 2, 512)}


def draw(size: str, folder: str) -> int:
    """Write the random model in bf16; return the bytes of its weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    C, M, L, H, K, V = SIZES[size]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=V, hidden_size=C, intermediate_size=M, num_hidden_layers=L,
        num_attention_heads=H, num_key_value_heads=K))
    model.save_pretrained(folder, max_shard_size="1GB")
    return 2 * model.num_parameters()


def measure(side: str, dtype: str, folder: str) -> dict[str, Any]:
    """Return the seconds to load, the seconds until the logits of a token, the peak memory in GB
    above the imports, and the likeliest next id."""
    import torch
    from transformers import LlamaForCausalLM

    from checkpoints.huggingface import load_model

    torch_dtype = getattr(torch, dtype)
    ids = torch.tensor([[7]])
    imports_gb, start = peak_gb(), time.perf_counter()
    if side == "ours":
        model, _ = load_model(folder, dtype=torch_dtype, tokenizer=False)
    else:
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch_dtype)
    loaded = time.perf_counter()
    with torch.inference_mode():
        if side == "ours":
            logits = model(ids, torch.zeros_like(ids), torch.zeros_like(ids))[0]
        else:
            logits = model(ids).logits[0, -1]
    return {"load": loaded - start, "ready": time.perf_counter() - start,
            "above": peak_gb() - imports_gb, "top": int(logits.argmax())}


def job(s: Settings) -> str:
    """Run both sides in both dtypes; return the table."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        size = child(HERE, "draw", s.size, folder)
        child(HERE, "measure", "ours", "bfloat16", folder)  # now the files are in the disk cache
        for dtype, weights_gb in (("bfloat16", size / 2**30), ("float32", 2 * size / 2**30)):
            runs = in_turn(HERE, s.rounds, {
                side: ("measure", [side, dtype, folder]) for side in ("ours", "transformers")})
            for side, results in runs.items():
                load, ready = (Spread.of([x[k] for x in results]) for k in ("load", "ready"))
                gb = max(x["above"] for x in results)
                rows.append([dtype, side, f"{load.median:.2f}", f"{ready.median:.2f}",
                             f"{ready.low:.2f} to {ready.high:.2f}", f"{gb:.2f}",
                             f"{gb / weights_gb:.2f}"])
            if len({x["top"] for results in runs.values() for x in results}) > 1:
                s.faults.append(f"{dtype}: the sides give different next tokens")
    head = ["kept as", "", "seconds to load", "to the first token", "range",
            "peak GB above imports", "of the weights"]
    return (f"{size / 2e9:.2f}B parameters, {size / 2**30:.2f} GB in bf16. A file that is only "
            f"mapped is not loaded yet, so each side also computes the logits of one token. Our "
            f"side also checks every tensor for NaN and infinity.\n\n{table(head, rows)}\n\n"
            + limits.description(limits.measured(s.size), "transformers"))


if __name__ == "__main__":
    sys.exit(main(HERE, "Loading a model", {"draw": draw, "measure": measure}, job, rounds=3))
