"""Speed and memory on a GPU, after the tests marked `gpu` have passed, in under ten minutes.

    python -m bench.gpu [--quick] [--cases full lora qlora stream ...] [--write]

Training: random models of real sizes, the same ids on all sides, one row a step. All weights of a
1B model in rows of 8,192 tokens, with products in bf16 and in fp8 (its share is of the bf16 peak);
LoRA and QLoRA of an 8B model in rows of 4,096. The peers (transformers, peft, bitsandbytes) run in
their fastest form: the whole model compiled with its loss, or Liger's kernels. They recompute
activations where ours does. A row is one document on all sides. In `packed` our rows hold documents
of 1,024 tokens, which the peers do not separate. All sides start from the same weights, and the
losses of the first step must agree. Memory is the peak of the device's allocator after two steps.
The estimate for ours is of the case's flags without compilation; for fp8 it is that of bf16.

Generation (cases given by name): the 1B model in bf16, one stream, eight at once, 200 prompts of
different lengths, eager and compiled (sample.py --compile). The peer is transformers' generate with
prompts of similar lengths padded on the left, and with its static cache, which it compiles. The
logit of each first id of ours must be at most two bf16 steps below the largest logit of the peer.

Without --cases these run, because more do not fit into ten minutes with the tests: `full`,
`packed`, `lora-recompute`, `qlora` (495 s on an H200, with `fp8`).
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from bench import ROOT, Settings, child, installed, main, std, table, versions

HERE = "bench.gpu"
DEVICE = "cuda"
SHAPES = {  # hidden_size, intermediate_size, layers, heads, kv heads, vocabulary
    "1B": (2048, 8192, 16, 32, 8, 128256), "8B": (4096, 14336, 32, 32, 8, 128256),
    "tiny": (64, 128, 2, 4, 2, 512)}


class Case(NamedTuple):
    """A model, what is trained, and the lengths of rows and documents."""

    shape: str
    tune: str
    T: int  # tokens in a row
    document: int  # tokens in a document
    options: str = ""  # other flags of train.py
    peers: tuple[str, ...] = ()


CASES = {
    "full": Case("1B", "full", 8192, 8192, "", ("compiled", "liger")),
    "packed": Case("1B", "full", 8192, 1024),
    "light": Case("1B", "full", 8192, 8192, "--recompute selective"),
    "fp8": Case("1B", "full", 8192, 8192, "--dtype fp8"),
    "lora": Case("8B", "lora", 4096, 4096, "", ("compiled",)),
    "lora-recompute": Case("8B", "lora", 4096, 4096, "--recompute full", ("compiled", "liger")),
    "qlora": Case("8B", "qlora", 4096, 4096, "--recompute full", ("compiled",))}
USUAL = ["full", "packed", "lora-recompute", "qlora"]  # without --cases
APART = 2e-3  # largest relative difference of the first losses, which bf16 rounds
ANSWERS = {  # prompts, shortest and longest prompt, rows, new ids, the peer's caches
    "stream": (1, 128, 128, 1, 128, ("dynamic", "static")),
    "eight": (8, 128, 128, 8, 128, ("dynamic", "static")),
    "ragged": (200, 16, 256, 32, 64, ("dynamic",))}


def hf_config(case: Case) -> dict[str, Any]:
    """Return config.json of a LLaMA of this shape."""
    C, M, L, H, K, V = SHAPES[case.shape]
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": V,
            "hidden_size": C, "intermediate_size": M, "num_hidden_layers": L,
            "num_attention_heads": H, "num_key_value_heads": K, "head_dim": C // H,
            "rms_norm_eps": 1e-5, "max_position_embeddings": case.T, "hidden_act": "silu",
            "tie_word_embeddings": False}


def ids_of(case: Case) -> Any:
    """Return token ids (1,T), the same in every process."""
    import torch

    V = SHAPES[case.shape][-1]
    return torch.randint(0, V, (1, case.T), generator=torch.Generator().manual_seed(1))


def about() -> dict[str, Any]:
    """Return the GPU's name, its peak of bf16 products in TFLOP/s, its copy speed in GB/s (10^9,
    read and written) and its memory in GB. Empty if there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        return {}

    def shortest(run: Any) -> float:
        seconds = []
        for _ in range(10):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    return {"name": torch.cuda.get_device_name(),
            "peak": 2 * 8192**3 / shortest(lambda: a @ a) / 1e12,
            "copy": 4 * x.numel() / shortest(lambda: y.copy_(x)) / 1e9,
            "memory": torch.cuda.get_device_properties(0).total_memory / 2**30,
            "fp8": torch.cuda.get_device_capability() >= (8, 9)}


def settings(case: Case) -> Any:
    """Return the settings of a case, read from its flags as train.py reads them."""
    from training.settings import read_settings

    flags = ["--tune", case.tune, "--seq-len", str(case.T), "--rows", "1", *case.options.split()]
    if case.tune == "qlora":
        flags.append("--double-quant")
    return read_settings(flags)[0]


def predict(name: str) -> dict[str, float]:
    """Return the memory estimate of our side in GB."""
    import torch

    from layers.config import ModelConfig
    from training import memory_estimate as memory

    case = CASES[name]
    estimate = memory.estimate(ModelConfig.from_hf(hf_config(case)), settings(case), torch.bfloat16,
                               backend="varlen_flash")
    return {"total": estimate.total / 2**30}


def drawn(case: Case, **options: Any) -> Any:
    """Return our model of a case on the device, with the random weights that all sides start from.
    `options` are those of `Llama`."""
    import torch

    from layers.config import ModelConfig
    from model import Llama

    with torch.device(DEVICE):
        torch.set_default_dtype(torch.float32 if case.tune == "full" else torch.bfloat16)
        model = Llama(ModelConfig.from_hf(hf_config(case)), **options)
        torch.set_default_dtype(torch.float32)
    model.initialise(0, std(SHAPES[case.shape][0]))
    return model


def ours(name: str, steps: int) -> dict[str, Any]:
    """Measure steps of train.py with compiled blocks and loss; also return the FLOP of a step."""
    import torch

    import lora
    import train
    from bench.train_step import same_start
    from data import Batch
    from layers import fp8, nf4
    from runtime.distributed import Distributed
    from training import optimizer as optim
    from training.compile_model import compile_model
    from training.objective import NLL

    case = CASES[name]
    s, gpu = settings(case), Distributed.start(DEVICE)
    model = drawn(case, compute_dtype=torch.bfloat16, recompute=s.recompute)
    if s.dtype == "fp8":
        fp8.convert_to_fp8(model)
    if s.tune == "qlora":
        for path, m in list(model.named_modules()):
            if nf4.fits(path, m):
                model.set_submodule(path, nf4.NF4Linear(m.weight.data, m.bias, s.double_quant))
    if s.tune != "full":
        lora.add_lora(model, s.lora_rank, s.lora_alpha, 0.0, s.lora_targets)
    same_start(model)
    model.train()
    compile_model(model)
    optimizer = optim.adamw(model, 1e-4, (0.9, 0.95), 0.1)
    ids, positions = ids_of(case), torch.arange(case.T)[None]
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    batch = Batch(ids, targets, positions // case.document, positions % case.document)
    return timed(lambda: train.train_step(model, NLL, [batch], optimizer, gpu, 1.0)[0],
                 steps) | {"flops": model.flops_per_token(case.document) * case.T}


def peer(name: str, how: str, steps: int) -> dict[str, Any]:
    """Measure the same steps by transformers (with peft, bitsandbytes). `how` is `compiled` (the
    whole model) or `liger` (Liger's kernels)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from bench.train_step import same_start

    case = CASES[name]
    s = settings(case)
    if how == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    config = LlamaConfig(**{k: v for k, v in hf_config(case).items() if k != "architectures"})
    torch.set_default_dtype(torch.float32 if case.tune == "full" else torch.bfloat16)
    with torch.device(DEVICE):
        model: Any = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.load_state_dict(drawn(case).state_dict())  # parameters have the same names
    if case.tune == "qlora":
        import bitsandbytes

        for path, m in list(model.model.named_modules()):
            if isinstance(m, torch.nn.Linear):
                quantized = bitsandbytes.nn.Linear4bit(
                    m.in_features, m.out_features, bias=False, compute_dtype=torch.bfloat16,
                    quant_type="nf4", compress_statistics=True, device="meta")
                quantized.weight = bitsandbytes.nn.Params4bit(
                    m.weight.data.cpu(), requires_grad=False, quant_type="nf4",
                    compress_statistics=True)
                model.model.set_submodule(path, quantized.to(DEVICE))
    if s.recompute == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if case.tune != "full":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(
            r=s.lora_rank, lora_alpha=s.lora_alpha, task_type="CAUSAL_LM",
            target_modules="all-linear"))
    same_start(model)
    model.train()
    if how == "compiled":
        torch._dynamo.config.recompile_limit = 32  # as ours; beyond it layers run eagerly
        model.compile()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4, (0.9, 0.95), weight_decay=0.1, fused=True)
    ids = ids_of(case).to(DEVICE)

    def step() -> float:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return timed(step, steps)


def answers(name: str, cache: str) -> dict[str, Any]:
    """Return the seconds to answer all prompts, after a warm-up, and the first id of each answer.

    `cache` is a cache of the peer, `ours` or `ours, compiled`. The peer also returns the ids that
    are accepted as first ids (`may`)."""
    import torch

    n, shortest, longest, rows, new, _ = ANSWERS[name]
    case, generator = CASES["full"]._replace(T=4096), random.Random(1)
    V = SHAPES[case.shape][-1]
    prompts = sorted(([generator.randrange(3, V)
                       for _ in range(generator.randint(shortest, longest))]
                      for _ in range(n)), key=len)
    peer = peer_of(case)
    results: dict[str, Any] = {}
    if cache.startswith("ours"):
        run = answers_of_ours(case, peer.state_dict(), prompts, rows, cache != "ours", results)
        del peer
    else:
        run = answers_of_peer(peer, prompts, rows, cache, results)
    run(new if cache == "static" else 4)  # warm-up; a static cache is compiled for this length
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        results["first"] = run(new)  # a list, so all kernels have ended
        seconds.append(time.perf_counter() - start)
    return results | {"seconds": min(seconds),
                      "device": torch.cuda.max_memory_allocated() / 2**30}


def peer_of(case: Case) -> Any:
    """Return transformers' model of a case, in bf16, with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(LlamaConfig(
            **{k: v for k, v in hf_config(case).items() if k != "architectures"})).eval()
    torch.set_default_dtype(torch.float32)
    return model


def answers_of_ours(case: Case, weights: dict[str, Any], prompts: list[list[int]], rows: int,
                    compiled: bool, results: dict[str, Any]) -> Callable[[int], list[int]]:
    """Return a function that generates `new` ids for each prompt by our model with these weights,
    and returns the first id of each. All ids are stored in `results`."""
    import torch

    from inference.decode import compiled_decode_step
    from inference.generate import completions
    from inference.sampling import SamplingParams
    from layers.config import ModelConfig
    from model import Llama

    with torch.device("meta"):
        model = Llama(ModelConfig.from_hf(hf_config(case)), compute_dtype=torch.bfloat16)
    model.load_state_dict(weights, assign=True)
    model.eval()
    decode_step = compiled_decode_step(model) if compiled else None

    def run(new: int) -> list[int]:
        results["ids"] = [x.ids for x in completions(model, prompts, SamplingParams(new, 0.0),
                                                     rows=rows, decode_step=decode_step)]
        return [ids[0] for ids in results["ids"]]

    return run


def answers_of_peer(model: Any, prompts: list[list[int]], rows: int, cache: str,
                    results: dict[str, Any]) -> Callable[[int], list[int]]:
    """Return a function that generates `new` ids for each prompt by the peer, and returns the first
    id of each. `may` of `results` gets the accepted first ids: those whose logits are at most two
    bf16 steps below the largest."""
    import torch

    def padded(batch: list[list[int]]) -> dict[str, Any]:
        T = max(map(len, batch))
        return {"input_ids": torch.tensor([[0] * (T - len(x)) + x for x in batch], device=DEVICE),
                "attention_mask": torch.tensor([[0] * (T - len(x)) + [1] * len(x) for x in batch],
                                               device=DEVICE)}

    def run(new: int) -> list[int]:
        first = []
        for start in range(0, len(prompts), rows):
            batch = padded(prompts[start : start + rows])
            options = {"cache_implementation": cache} if cache == "static" else {}
            ids = model.generate(**batch, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                                 pad_token_id=0, eos_token_id=2, **options)
            first += ids[:, batch["input_ids"].shape[1]].tolist()
        return first

    with torch.inference_mode():
        logits = torch.cat([model(**padded([ids]), logits_to_keep=1).logits[:, -1].float()
                            for ids in prompts])  # (n,V)
    top = logits.amax(1, keepdim=True)
    results["may"] = [x.nonzero()[:, 0].tolist() for x in logits >= top - top.abs() / 64]
    return run


def timed(step: Any, steps: int) -> dict[str, Any]:
    """Return the losses, the seconds of each step after two (with all kernels ended), and the peak
    of the device's memory in GB."""
    import torch

    losses, seconds = [step(), step()], []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        losses.append(step())
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"losses": losses, "seconds": seconds,
            "device": torch.cuda.max_memory_allocated() / 2**30}


def side(s: Settings, function: str, name: str, *args: Any) -> dict[str, Any]:
    """Return the result of a side of a case. If the side fails, for example because memory is
    short, record a fault and return an empty dict: the results of the other sides stay valid."""
    try:
        return child(HERE, function, name, *args)
    except SystemExit as e:
        s.faults.append(f"{name}: {e}")
        return {}


def compare(name: str, gpu: dict[str, Any], s: Settings) -> list[list[str]]:
    """Return the rows of the table for a case."""
    case, steps = CASES[name], {"full": 8, "quick": 4, "tiny": 1}[s.size]
    runs = {"ours": side(s, "ours", name, steps)}
    if not runs["ours"]:
        return []
    for how in case.peers:
        if installed("transformers") and (how != "liger" or installed("liger_kernel")):
            runs[how] = side(s, "peer", name, how, steps)
    runs = {who: run for who, run in runs.items() if run}
    medians = {who: statistics.median(x["seconds"]) for who, x in runs.items()}
    rows = []
    first = [x["losses"][0] for x in runs.values()]
    if max(first) / min(first) - 1 > APART:
        s.faults.append(f"{name}: the first losses differ: {first}")
    predicted_gb = f"{child(HERE, 'predict', name)['total']:.1f}"
    library = "transformers" if case.tune == "full" else "peft"
    for who, run in runs.items():
        share = f"{runs['ours']['flops'] / medians[who] / gpu['peak'] / 1e12:.0%}"
        label = f"{name}: {case.shape}, {case.tune}, 1 x {case.T:,} {case.options}".strip()
        rows.append([label, who if who == "ours" else f"{library}, {who}",
                     f"{case.T / medians[who]:,.0f}",
                     f"{min(run['seconds']):.3f} to {max(run['seconds']):.3f}", share,
                     f"{medians[who] / medians['ours']:.2f}", f"{run['device']:.1f}",
                     predicted_gb if who == "ours" else "-"])
    return rows


def answered(name: str, gpu: dict[str, Any], s: Settings) -> list[list[str]]:
    """Return the rows of the second table for a case, one for each side."""
    n, shortest, longest, width, new, caches = ANSWERS[name]
    runs = {who: side(s, "answers", name, who) for who in ("ours", "ours, compiled")}
    if not all(runs.values()):
        return []
    if installed("transformers"):
        for cache in caches:
            runs[f"transformers, {cache} cache"] = side(s, "answers", name, cache)
    runs = {who: run for who, run in runs.items() if run}
    firsts = [run["first"] for who, run in runs.items() if who.startswith("ours")]
    for accepted in [run["may"] for run in runs.values() if "may" in run]:
        if not all(x in ids for first in firsts for x, ids in zip(first, accepted, strict=True)):
            s.faults.append(f"{name}: the logit of a first id of ours is below the peer's largest")
    C, M, L, H, K, V = SHAPES["1B"]
    read = 2 * (V * C + L * (2 * C * C + 2 * C * C * K // H + 3 * C * M))  # bytes of the matrices
    rows = []
    for who, run in runs.items():
        share = f"{read * new / run['seconds'] / 1e9 / gpu['copy']:.0%}" if n <= width else "-"
        rows.append([f"{name}: {n} of {shortest} to {longest} ids, {width} rows, {new} new", who,
                     f"{n * new / run['seconds']:,.0f}",
                     f"{run['seconds'] / runs['ours']['seconds']:.2f}", share,
                     f"{run['device']:.1f}"])
    equal = sum(a == b for a, b in zip(runs["ours"]["ids"], runs["ours, compiled"]["ids"],
                                       strict=True))
    # In bf16 not all are equal: a rounding difference changes the rest of an answer.
    rows[1][0] += f"; answers equal to those without compilation: {equal}"
    return rows


def job(s: Settings) -> str:
    """Run the tests marked `gpu` and all cases; return both tables."""
    gpu = child(HERE, "about")
    if "name" not in gpu:
        s.faults.append("no GPU that this torch can use: nothing is measured")
        return "Not measured: no GPU here."
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "gpu", "tests"],
                           cwd=ROOT, capture_output=True, text=True)
    if tests.returncode:
        s.faults.append(f"the tests marked gpu fail, so nothing is measured:\n{tests.stdout}")
        return tests.stdout[-2000:]
    rows, generation_rows = [], []
    for name in s.cases or USUAL:
        if name in ANSWERS:
            generation_rows += answered(name, gpu, s)
            continue
        if name == "fp8" and not gpu["fp8"]:
            rows.append(["fp8", "this GPU has no fp8 products", *["-"] * 6])
            continue
        rows += compare(name, gpu, s)
        print("\n".join(map(str, rows[-3:])), file=sys.stderr, flush=True)
    head = ["", "", "tokens/s", "seconds a step", "of the product peak", "times ours' seconds",
            "GB on the device", "predicted"]
    return (f"{gpu['name']}, {gpu['memory']:.0f} GB. Measured in the same run: {gpu['peak']:,.0f} "
            f"TFLOP/s of a product in bf16, {gpu['copy']:,.0f} GB/s copied. Tests marked gpu: "
            f"{tests.stdout.strip().splitlines()[-1]}.\n\n{table(head, rows)}\n\nThe share of the "
            "peak counts the products that a step needs, without recomputed ones.\n\n"
            + table(["", "", "ids/s", "times ours' seconds", "of the time to copy the weights",
                     "GB on the device"], generation_rows) + "\n\n"
            + versions("torch", "transformers", "peft", "bitsandbytes", "liger_kernel") + ".")


if __name__ == "__main__":
    sys.exit(main(HERE, "On a GPU", {"about": about, "predict": predict, "ours": ours,
                                     "peer": peer, "answers": answers}, job,
                  [*CASES, *ANSWERS], 0))
