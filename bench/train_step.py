"""A training step on a CPU, compared with a plain loop over transformers (and peft) and litgpt.

    python -m bench.train_step [--quick] [--cases full lora large fp32] [--rounds 10] [--write]

All sides load the same random LLaMA, which transformers writes once. They use the same tokens,
dtype, initial LoRA weights, fused AdamW, gradient clipping, and the allocator's settings of
train.py (runtime.device.keep_freed_memory). Peers are measured eager and compiled. All sides of a
case exist at the same time, which needs 17 GB, and step in turn, so that compared steps are seconds
apart.

The losses of the first and of a later step must agree; if they do not, the program fails. A peer
with a bf16 adapter, as litgpt's, rounds each update to eight bits, so its later loss may differ
more, but by less than the effect of training the adapter. litgpt is left out if it is not
installed. It is not compiled, because with torch 2.13 on a CPU its loss is then NaN.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from bench import Settings, Spread, alternate, child, installed, limits, main, ratio, std, table

HERE = "bench.train_step"
MODELS = {  # hidden_size, intermediate_size, layers, heads, kv heads, vocabulary, rows, row length
    "110M": (768, 2048, 12, 12, 4, 32000, 4, 512),
    "30M": (512, 1376, 8, 8, 4, 8000, 2, 512),
    "10M": (256, 704, 6, 8, 4, 8000, 2, 256),
    "1.1B": (2048, 5632, 22, 32, 4, 32000, 1, 512),
    "tiny": (64, 128, 2, 4, 2, 512, 2, 32),
    "110M, one layer": (768, 2048, 1, 12, 4, 32000, 4, 512),
    "30M, one layer": (512, 1376, 1, 8, 4, 8000, 2, 512),
    "tiny, one layer": (64, 128, 1, 4, 2, 512, 2, 32)}
ROUNDED = "bf16 adapter"  # peft with an adapter in bf16, so that each update is rounded
CASES = {  # what is trained, the model, and the sides; "+" separates a side from its options
    "full": ("all weights, bf16 products", "110M",
             ["ours", "transformers", "ours + compile", "transformers + compile"]),
    "lora": ("LoRA r 16, bf16", "110M",
             ["ours", "peft", f"peft + {ROUNDED}", "litgpt", "ours + compile", "peft + compile",
              f"peft + {ROUNDED} + compile"]),
    "large": ("LoRA r 16, bf16", "1.1B", ["ours", "peft", f"peft + {ROUNDED}", "litgpt"]),
    "fp32": ("all weights, float32", "110M", ["ours", "transformers"])}
QUICK = {"full": ["ours", "transformers"], "lora": ["ours", "peft", "litgpt"]}  # not compiled
RANK, ALPHA, LR, BETAS, DECAY, CLIP = 16, 32, 3e-4, (0.9, 0.95), 0.1, 1.0
APART = {"full": 1e-3, "lora": 1e-3, "large": 1e-3, "fp32": 1e-4}  # relative, of a loss
OWN = 5e-3  # the same, for the later loss with a bf16 adapter
WARM, LATER = 2, 5  # warm-up steps; the turn whose loss is compared


def draw(model: str, folder: str, dtype: str) -> int:
    """Write the random model with transformers; return the number of its parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    C, M, L, H, K, V, _, T = MODELS[model]
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    lm = LlamaForCausalLM(LlamaConfig(
        vocab_size=V, hidden_size=C, intermediate_size=M, num_hidden_layers=L,
        num_attention_heads=H, num_key_value_heads=K, max_position_embeddings=T,
        initializer_range=std(C)))
    lm.save_pretrained(folder)
    return lm.num_parameters()


def tokens_of(model: str) -> Any:
    """Return token ids (B,T), the same in every process."""
    import torch

    *_, V, B, T = MODELS[model]
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))


def same_start(model: Any) -> None:
    """Fill every LoRA A with the same numbers on all sides. B is zero on all sides."""
    fill({n[n.index("layers."):].replace(".default", ""): p
          for n, p in model.named_parameters() if ".lora_A." in n})


def fill(matrices: dict[str, Any]) -> None:
    """Fill each A (R,in) with random numbers, in the order of peft's names."""
    import torch

    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, p in sorted(matrices.items()):
            p.copy_(torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5)


def ours(case: str, name: str, folder: str, options: list[str]) -> tuple[Callable, Any, Callable]:
    """Return a step of train.py that returns its loss, the model, and a function of the loss that
    returns its exact value."""
    import torch

    import lora
    from checkpoints.huggingface import load_model
    from runtime.distributed import Distributed
    from training import optimizer as optim
    from training.compile_model import compile_model

    adapted = case in ("lora", "large")
    cpu = Distributed.start("cpu")
    model, _ = load_model(folder, dtype=torch.bfloat16 if adapted else torch.float32,
                          tokenizer=False,
                          compute_dtype=torch.float32 if case == "fp32" else torch.bfloat16)
    if adapted:
        lora.add_lora(model, RANK, ALPHA, 0.0, ["all-linear"])
    same_start(model)
    model.train()
    if "compile" in options:
        compile_model(model)
    return our_step(model, name, optim.adamw(model, LR, BETAS, DECAY), cpu), model, float


def our_step(model: Any, name: str, optimizer: Any, ranks: Any) -> Callable[[], float]:
    """Return a step of train.py on the model's tokens; the step returns its loss."""
    import torch

    import train
    from data import IGNORE, Batch
    from training.objective import NLL

    tokens = tokens_of(name)
    targets = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=IGNORE)
    doc, pos = torch.zeros_like(tokens), torch.arange(tokens.shape[1]).expand_as(tokens)
    batch = Batch(tokens, targets, doc, pos)
    return lambda: train.train_step(model, NLL, [batch], optimizer, ranks, CLIP)[0]


def peer(case: str, name: str, folder: str, options: list[str]) -> tuple[Callable, Any, Callable]:
    """Return the same as `ours`, written as users of transformers write it."""
    import torch
    from transformers import LlamaForCausalLM

    from runtime.device import keep_freed_memory

    keep_freed_memory()  # as Distributed.start does for ours
    adapted = case in ("lora", "large")
    model: Any = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16 if adapted else torch.float32)
    if adapted:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear",
                              task_type="CAUSAL_LM"),
            autocast_adapter_dtype=ROUNDED not in options)  # peft's default, True, is float32
    same_start(model)
    if "compile" in options:
        model.compile()
    return plain_step(model, plain_loss(model, name, autocast=case == "full")), model, float


def plain_loss(model: Any, name: str, autocast: bool) -> Callable[[], Any]:
    """Return a function that computes transformers' loss of the model's tokens."""
    import torch

    tokens = tokens_of(name)

    def loss() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    return loss


def plain_step(model: Any, loss_of: Callable[[], Any]) -> Callable[[], float]:
    """Return a step as users of a peer write it; the step returns its loss."""
    import torch

    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, LR, BETAS, weight_decay=DECAY, fused=True)

    def step() -> float:
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def lit(case: str, name: str, folder: str, options: list[str]) -> tuple[Callable, Any, Callable]:
    """Return the same as `ours`, by litgpt with LoRA."""
    model = litgpt(name, folder)
    loss_of = LitLoss(model, name)
    return plain_step(model, loss_of), model, loss_of.exact


def litgpt(name: str, folder: str) -> Any:
    """Return litgpt's LLaMA with LoRA in bf16, set up as by `litgpt finetune lora`. Its weights are
    the same (by litgpt's own conversion), and so are the initial LoRA weights."""
    import torch
    from lightning.fabric import Fabric
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from safetensors.torch import load_file

    from runtime.device import keep_freed_memory

    keep_freed_memory()
    C, M, L, H, K, V, _, T = MODELS[name]
    config = Config(
        name=name, block_size=T, vocab_size=V, padded_vocab_size=V, n_layer=L, n_head=H,
        n_query_groups=K, n_embd=C, rotary_percentage=1.0, parallel_residual=False, bias=False,
        norm_class_name="RMSNorm", norm_eps=1e-6, mlp_class_name="LLaMAMLP", intermediate_size=M,
        lora_r=RANK, lora_alpha=ALPHA, lora_query=True, lora_key=True, lora_value=True,
        lora_projection=True, lora_mlp=True)
    with Fabric(accelerator="cpu", precision="bf16-true").init_module(empty_init=True):
        model = GPT(config)
    mark_only_lora_as_trainable(model)
    state: dict[str, Any] = {}
    copy_weights_hf_llama(config, {}, state, load_file(f"{folder}/model.safetensors"),
                          dtype=torch.bfloat16)
    model.load_state_dict(state, strict=False, assign=True)
    starts = {}
    for i, block in enumerate(model.transformer.h):
        to, attn, mlp = f"layers.{i}.self_attn.", block.attn, block.mlp
        starts |= {f"{to}{x}_proj.lora_A.weight": A.detach()
                   for x, A in zip("qkv", attn.qkv.lora_A.split(RANK), strict=True)}
        starts[f"{to}o_proj.lora_A.weight"] = attn.proj.lora_A
        starts |= {f"layers.{i}.mlp.{x}_proj.lora_A.weight": m.lora_A for x, m in
                   (("gate", mlp.fc_1), ("up", mlp.fc_2), ("down", mlp.proj))}
    fill(starts)
    for n, p in model.named_parameters():
        if n.endswith("lora_B"):
            p.detach().zero_()
    return model


class LitLoss:
    """litgpt's loss, computed in chunks and rounded to bf16. `exact` computes the loss of the same
    logits in float32; it is called outside the measured time."""

    def __init__(self, model: Any, name: str):
        self.model, self.tokens = model, tokens_of(name)

    def __call__(self) -> Any:
        from litgpt.utils import chunked_cross_entropy

        self.parts = self.model(self.tokens, lm_head_chunk_size=128)  # [(B,128,V)]
        self.parts[-1] = self.parts[-1][..., :-1, :]
        return chunked_cross_entropy(self.parts, self.tokens[..., 1:])

    def exact(self, _: float) -> float:
        from torch.nn.functional import cross_entropy

        targets = self.tokens[..., 1:].split(128, dim=1)
        total = sum(cross_entropy(x.detach().float().flatten(0, 1), y.flatten(), reduction="sum")
                    for x, y in zip(self.parts, targets, strict=True))
        del self.parts
        return float(total) / self.tokens[..., 1:].numel()


def measure(side: str, case: str, name: str, folder: str) -> Iterator[dict]:
    """Yield the losses of the warm-up, the number of trained parameters and the FLOP of a step;
    then the seconds and the loss of each step."""
    who, *options = side.split(" + ")
    start = {"ours": ours, "litgpt": lit}.get(who, peer)
    step, model, exact = start(case, name, folder, options)
    *_, B, T = MODELS[name]
    yield {"losses": [exact(step()) for _ in range(WARM)],
           "flops": model.flops_per_token(T) * B * T if who == "ours" else None,
           "trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    while True:
        start_time = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - start_time
        yield {"seconds": seconds, "loss": exact(loss)}


def rounds(side: str) -> bool:
    """Return whether a side keeps its adapter in bf16."""
    return ROUNDED in side or side.startswith("litgpt")


def compare(case: str, s: Settings, folder: str, peaks: dict) -> tuple[list, str]:
    """Run all sides of a case in turn; return the rows of the table, and a line that compares ours
    with the peers."""
    label, name, sides = CASES[case]
    name = {"full": name, "quick": "30M", "tiny": "tiny"}[s.size]
    if s.size == "quick":
        sides = QUICK.get(case, sides)
    sides = [x for x in sides if not x.startswith("litgpt") or installed("litgpt")]
    *_, B, T = MODELS[name]
    draw_as = "bfloat16" if name == "1.1B" else "float32"
    n = child(HERE, "draw", name, folder, draw_as)
    measured = alternate(HERE, s.rounds, {side: ("measure", [side, case, name, folder])
                                          for side in sides})
    rows, speeds, ends = [], {}, {}
    flops = measured["ours"][0]["flops"]
    peak = peaks["float32" if case == "fp32" else "bfloat16"] * 1e9
    for side, (first, steps) in measured.items():
        seconds, gb = [x["seconds"] for x in steps], first["gb"]
        took = Spread.of(seconds)
        ends[side], speeds[side] = (first["losses"][0], steps[:LATER][-1]["loss"]), (seconds, gb)
        rows.append([f"{label}, {n / 1e6:,.0f}M, {B} x {T}", side, f"{took.median:.3f}",
                     f"{took.low:.3f} to {took.high:.3f}", f"{B * T / took.median:,.0f}",
                     f"{flops / took.median / peak:.0%}", f"{gb:.2f}",
                     *(f"{x:.5f}" for x in ends[side])])
    apart, apart_rounded = (max((abs(x / y - 1) for side in ends
                       for i, (x, y) in enumerate(zip(ends[side], ends["ours"], strict=True))
                       if (i == 1 and rounds(side)) == rounded), default=0.0)
                  for rounded in (False, True))
    n_trained = {setup["trained"] for setup, _ in measured.values()}
    if apart > APART[case] or apart_rounded > OWN or len(n_trained) > 1:
        s.faults.append(f"{case}: losses {apart:.1e} apart (later losses of a {ROUNDED}: "
                        f"{apart_rounded:.1e}), or other numbers of trained parameters")
    summary = f"Losses at most {apart:.0e} apart"
    summary += f", the later with a {ROUNDED} {apart_rounded:.0e}" if apart_rounded else ""
    return rows, f"- {label}, {n / 1e6:,.0f}M: {ratios(speeds)}. {summary}."


def ratios(measured: dict[str, tuple[list[float], float]]) -> str:
    """Compare speed and memory of ours with each peer, the fastest first: eager with eager,
    compiled with compiled. `measured` is {side: (seconds of each step, GB)}."""
    lines = []
    for kind in ("eager", "compiled"):
        alike = {k: v for k, v in measured.items() if ("compile" in k) == (kind == "compiled")}
        mine = next((k for k in alike if k.startswith("ours")), None)
        if mine is None:
            continue
        seconds, gb = alike.pop(mine)
        for side, (took, its_gb) in sorted(alike.items(),
                                           key=lambda x: statistics.median(x[1][0])):
            lines.append(f"{kind} {ratio(took, seconds, ' times')} the speed of {side}, in "
                         f"{gb / its_gb:.2f} of its memory")
    return "; ".join(lines)


def job(s: Settings) -> str:
    """Run all cases; return the table and the comparisons."""
    cases = s.cases or list(QUICK if s.size == "quick" else CASES)
    peaks, rows, summaries = limits.measured(s.size), [], []
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            case_rows, line = compare(case, s, folder, peaks)
        rows += case_rows
        summaries.append(line)
    head = ["", "", "seconds a step", "range", "tokens/s", "of the product peak", "peak GB",
            "loss of step 1", f"of step {WARM + min(LATER, s.rounds)}"]
    return (f"All sides start from the same weights, take the same tokens and step in turn, "
            f"{s.rounds} times after {WARM}; a ratio is the median of the turns' ratios. The "
            f"differences of their losses are given below. peft keeps its adapter in float32, as "
            f"we do; with \"{ROUNDED}\", and in litgpt, it is in bf16, so each update is rounded. "
            f"All sides use the same settings of the allocator.\n\n{table(head, rows)}\n\n"
            + "\n".join(summaries) + "\n\n"
            + limits.description(peaks, "transformers", "peft", "litgpt"))


CHILDREN: dict[str, Callable[..., Any]] = {"draw": draw, "measure": measure}

if __name__ == "__main__":
    sys.exit(main(HERE, "A training step, on a CPU", CHILDREN, job, list(CASES),
                  rounds=10, quick=3, unit="steps"))
