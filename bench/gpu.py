"""The GPU's part: correctness first, by the tests marked gpu, then figures, in under ten minutes.

    python -m bench.gpu [--quick] [--cases full fp8 lora qlora] [--write]

The same random models as elsewhere, of real sizes: all weights of a 1B in rows of 8,192 tokens,
with products in bf16 and in eight bits (against bf16's peak; no peer does the same),
LoRA and QLoRA of an 8B in rows of 4,096; documents of 1,024 packed end to end on our side, which
the peers see as one. Beside each the product peak measured in the same process. Memory is what the
device's allocator held at most.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Any

from bench import ROOT, Settings, child, installed, main, table, versions

HERE = "bench.gpu"
SHAPES = {  # hidden_size, intermediate_size, layers, heads, kv heads, vocabulary
    "1B": (2048, 8192, 16, 32, 8, 128256), "8B": (4096, 14336, 32, 32, 8, 128256),
    "tiny": (64, 128, 2, 4, 2, 512)}
CASES = {  # model, tokens in a row, what our side does besides
    "full": ("1B", 8192, "--recompute-light"),
    "fp8": ("1B", 8192, "--recompute-light --dtype fp8"), "lora": ("8B", 4096, "--recompute"),
    "qlora": ("8B", 4096, "--recompute")}
FULL = ("full", "fp8")  # all weights train
DOCUMENT = 1024


def words(shape: str, T: int) -> dict[str, Any]:
    """config.json of a LLaMA of this shape."""
    C, M, L, H, K, V = SHAPES[shape]
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": V,
            "hidden_size": C, "intermediate_size": M, "num_hidden_layers": L,
            "num_attention_heads": H, "num_key_value_heads": K, "head_dim": C // H,
            "rms_norm_eps": 1e-5, "max_position_embeddings": T, "hidden_act": "silu",
            "tie_word_embeddings": False}


def about() -> dict[str, Any]:
    """The GPU's name, its bf16 product peak in TFLOP/s, its memory in GB; nothing without one."""
    import torch

    if not torch.cuda.is_available():
        return {}
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    best = 1e9
    for _ in range(10):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        a @ a
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return {"name": torch.cuda.get_device_name(), "peak": 2 * 8192**3 / best / 1e12,
            "memory": torch.cuda.get_device_properties(0).total_memory / 2**30,
            "eight bits": torch.cuda.get_device_capability() >= (8, 9)}


def ours(case: str, rows: int, steps: int) -> dict[str, Any]:
    """Seconds of steps of train.py after two, the device's peak in GB, FLOP a step."""
    import torch

    import fp8
    import lora
    import nf4
    import optim
    import train
    from data import Batch
    from families import ModelConfig
    from model import Llama
    from ranks import Ranks

    shape, T, options = CASES[case]
    gpu = Ranks.start("cuda")
    with torch.device("cuda"):
        torch.set_default_dtype(torch.float32 if case in FULL else torch.bfloat16)
        model = Llama(ModelConfig.from_hf(words(shape, T)))
        torch.set_default_dtype(torch.float32)
    model.initialise(0)
    model.model.compute_dtype = torch.bfloat16
    model.model.recompute = "--recompute" in options.split()
    model.model.light = "--recompute-light" in options
    if case == "fp8":
        fp8.use(model)
    if case == "qlora":
        for name, m in list(model.named_modules()):
            if nf4.fits(name, m):
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last,
                        nf4.NF4Linear(m.weight.data, m.bias, double=True))
    if case not in FULL:
        lora.attach(model, 16, 32.0, 0.0, ["all-linear"])
    model.train()
    model.model.compile_blocks(gpu.device)
    optimizer = optim.adamw(model, 1e-4, (0.9, 0.95), 0.1)
    ids = torch.randint(0, model.config.vocab_size, (rows, T))
    at = torch.arange(T).expand(rows, T)
    batch = Batch(ids, ids, at // DOCUMENT, at % DOCUMENT)
    torch.cuda.reset_peak_memory_stats()
    flops = model.flops_per_token(DOCUMENT) * rows * T
    return timed(lambda: train.train_step(model, train.NLL, [batch], optimizer, gpu, 1.0)[0],
                 steps) | {"flops": flops}


def peer(case: str, rows: int, steps: int) -> dict[str, Any]:
    """The same by transformers (+ peft, bitsandbytes), compiled, with its own checkpointing."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape, T, _ = CASES[case]
    config = LlamaConfig(**{k: v for k, v in words(shape, T).items() if k != "architectures"})
    torch.set_default_dtype(torch.float32 if case == "full" else torch.bfloat16)
    with torch.device("cuda"):
        model: Any = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if case == "qlora":
        import bitsandbytes

        for name, m in list(model.model.named_modules()):
            if isinstance(m, torch.nn.Linear):
                small = bitsandbytes.nn.Linear4bit(
                    m.in_features, m.out_features, bias=False, compute_dtype=torch.bfloat16,
                    quant_type="nf4", compress_statistics=True)
                small.weight = bitsandbytes.nn.Params4bit(
                    m.weight.data.cpu(), requires_grad=False, quant_type="nf4",
                    compress_statistics=True)
                parent, _, last = name.rpartition(".")
                setattr(model.model.get_submodule(parent), last, small.cuda())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if case != "full":
        from peft import LoraConfig, get_peft_model

        model.enable_input_require_grads()
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM",
                                                 target_modules="all-linear"))
    model.train()
    if case != "qlora":
        model.compile()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4, (0.9, 0.95), weight_decay=0.1, fused=True)
    ids = torch.randint(0, config.vocab_size, (rows, T), device="cuda")

    def step() -> float:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    torch.cuda.reset_peak_memory_stats()
    return timed(step, steps)


def timed(step: Any, steps: int) -> dict[str, Any]:
    """Seconds of each step after two, every kernel waited for; the device's peak in GB."""
    import torch

    seconds = []
    for _ in range(steps + 2):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return {"seconds": seconds[2:], "device": torch.cuda.max_memory_allocated() / 2**30}


def job(s: Settings) -> str:
    gpu = child(HERE, "about")
    if "name" not in gpu:
        s.faults.append("no GPU that this torch can use: nothing is measured")
        return "Not measured: no GPU here."
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "gpu", "tests"],
                           cwd=ROOT, capture_output=True, text=True)
    if tests.returncode:
        s.faults.append(f"the tests marked gpu fail, so no figure is worth it:\n{tests.stdout}")
        return tests.stdout[-2000:]
    rows, steps = [], {"full": 5, "quick": 2, "tiny": 1}[s.size]
    for case in s.cases or CASES:
        shape, T, options = CASES[case]
        if case == "fp8" and not gpu["eight bits"]:
            rows.append([case, "this GPU multiplies no eight bits", *"----"])
            continue
        for side in ("ours", *(["peer"] if installed("transformers") and case != "fp8" else [])):
            found = child(HERE, side, case, 1, steps)
            middle = statistics.median(found["seconds"])
            share = f"{found['flops'] / middle / gpu['peak'] / 1e12:.0%}" if side == "ours" else "-"
            theirs = "transformers" if case == "full" else "transformers, peft"
            rows.append([case, f"{shape}, 1 x {T}, {options}",
                         "ours" if side == "ours" else theirs, f"{T / middle:,.0f}", share,
                         f"{found['device']:.1f}"])
    return (f"{gpu['name']}, {gpu['memory']:.0f} GB; product peak measured {gpu['peak']:,.0f} "
            f"TFLOP/s in bf16. Tests marked gpu: {tests.stdout.strip().splitlines()[-1]}.\n\n"
            + table(["", "", "", "tokens/s", "of the product peak", "GB on the device"], rows)
            + "\n\nThe peers recompute whole blocks, which is all that their own checkpointing "
            "does. " + versions("torch", "transformers", "peft", "bitsandbytes") + ".")


if __name__ == "__main__":
    sys.exit(main(HERE, "On a GPU", {"about": about, "ours": ours, "peer": peer}, job, list(CASES),
                  1))
