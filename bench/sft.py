"""Speed of SFT compared with TRL's SFTTrainer, on real conversations of different lengths.

    python -m bench.sft [--quick] [--cases lora full] [--rounds 2] [--write]

Both sides train on the same ids and the same mask, in one epoch. The ids are written once, as a bin
and as a list, so tokenizers and templates are not measured. A step has about the same number of
real tokens on each side: our rows, TRL's packed rows, or as many padded conversations as fill these
rows.

Every process has the allocator's settings that train.py uses on a CPU
(runtime.device.keep_freed_memory); they make the peers faster too. TRL's loss does not hold all
logits either (in TRL 1.16 `chunked_nll` is a name of the default).

A *trained* token is a target with a loss, counted in the batches of each side after its own shift.
A *real* token is a token of a conversation. Padding is neither. The program fails if the sides
train different numbers of tokens, or if the mean of the loss over all tokens differs. The learning
rate is small, so that the order of batches does not change this mean. The loss of a random model
does not show attention between packed neighbours; tests/ check that.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from bench import (
    ROOT,
    Settings,
    Spread,
    child,
    in_turn,
    installed,
    limits,
    main,
    peak_gb,
    ratio,
    table,
)

HERE = "bench.sft"
SHARED = ROOT.parent / "shared/data"
TEXT, TOKENIZER = SHARED / "sft/eng_instructions_rasbt.json", SHARED / "tokenizers/llama2"
SHAPES = {  # hidden_size, intermediate_size, layers, heads, kv heads
    "110M": (768, 2048, 12, 12, 4), "25M": (256, 1024, 8, 8, 4), "tiny": (32, 64, 2, 4, 2)}
SIZES = {  # model, conversations, rows, row length
    "full": ("110M", 300, 4, 512), "quick": ("25M", 100, 4, 512), "tiny": ("tiny", 16, 2, 256)}
CASES = {"lora": "LoRA r 16, bf16", "full": "all weights, bf16 products"}
PEERS = {  # what is changed in SFTConfig; it recomputes activations unless told not to
    "TRL padded, as it comes": {},
    "TRL padded": {"gradient_checkpointing": False},
    "TRL padded, by length": {"gradient_checkpointing": False,
                              "train_sampling_strategy": "group_by_length"},
    "TRL packing": {"gradient_checkpointing": False, "packing": True}}
QUICK = ["TRL padded, by length", "TRL packing"]  # its best of each kind
RANK, ALPHA, LR, BETAS, DECAY, CLIP = 16, 32, 1e-6, (0.9, 0.95), 0.1, 1.0
APART = 2e-3  # of the mean loss, at most


def draw(size: str, folder: str) -> dict:
    """Write the random model, a tokenizer, and the conversations as a bin and as a list; return how
    many tokens these hold."""
    import shutil
    from pathlib import Path

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from preparation.bin_writer import BinWriter
    from tokenization.chat_template import ChatTemplate, encode_rendered
    from tokenization.tokenizer import Tokenizer

    name, n_rows, _, T = SIZES[size]
    C, M, L, H, K = SHAPES[name]
    tokenizer = Tokenizer.open(TOKENIZER)
    V = len(tokenizer.pieces)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=V, hidden_size=C, intermediate_size=M, num_hidden_layers=L,
        num_attention_heads=H, num_key_value_heads=K, max_position_embeddings=T))
    model.save_pretrained(folder)
    shutil.copy(TOKENIZER / "tokenizer.model", folder)
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
             "unk_token": "<unk>"}
    Path(folder, "tokenizer_config.json").write_text(json.dumps(config))

    template, examples, n_long = ChatTemplate.plain(tokenizer), [], 0
    writer = BinWriter(Path(folder, "bin"), "none", V, "chat")
    for x in json.loads(TEXT.read_text(encoding="utf-8"))[:n_rows]:
        prompt = "\n\n".join(filter(None, [x["instruction"], x["input"]]))
        [document] = encode_rendered(tokenizer, [template.render_with_mask([
            {"role": "user", "content": prompt}, {"role": "assistant", "content": x["output"]}])])
        if len(document.ids) > T:
            n_long += 1
            continue
        writer.add(document)
        mask = [False, *list(document.mask)[1:]]
        examples.append({"input_ids": [int(i) for i in document.ids],
                     "labels": [int(i) if on else -100
                                for i, on in zip(document.ids, mask, strict=True)]})
    writer.close({}, [])
    Path(folder, "list.json").write_text(json.dumps(examples))
    lengths = [len(x["input_ids"]) for x in examples]
    return {"parameters": model.num_parameters(), "real": sum(lengths), "long": n_long,
            "conversations": len(examples), "median": statistics.median(lengths),
            "most": max(lengths)}


def ours(case: str, folder: str, B: int, T: int, _: int) -> dict:
    """One epoch of train.py's steps over rows that hold whole conversations."""
    import numpy as np
    import torch

    import lora
    import train
    from checkpoints.huggingface import load_model
    from data import Batch, Bin, PackedExamples, Source
    from runtime.distributed import Distributed
    from training import optimizer as optim
    from training.objective import NLL, trained_tokens

    imports, cpu = peak_gb(), Distributed.start("cpu")
    model, _ = load_model(folder, dtype=torch.bfloat16 if case == "lora" else torch.float32,
                          tokenizer=False, compute_dtype=torch.bfloat16)
    if case == "lora":
        lora.add_lora(model, RANK, ALPHA, 0.0, ["all-linear"])
    model.train()
    optimizer = optim.adamw(model, LR, BETAS, DECAY)
    opened = Bin(f"{folder}/bin")
    rows = PackedExamples(Source("sft", opened, np.arange(len(opened)), 1.0), T, (1, 0))
    total = trained = slots = 0
    begun = time.perf_counter()
    for i in range(0, rows.rows, B):
        batch = Batch.of([rows.row(k) for k in range(i, min(i + B, rows.rows))], [])
        loss, _ = train.train_step(model, NLL, [batch], optimizer, cpu, CLIP)
        total, trained = total + loss * trained_tokens(batch), trained + trained_tokens(batch)
        slots += batch.tokens.numel()
    return {"seconds": time.perf_counter() - begun, "loss": total / trained, "trained": trained,
            "slots": slots, "steps": -(-rows.rows // B), "imports": imports}


def theirs(side: str, case: str, folder: str, B: int, T: int, padded: int) -> dict:
    """One epoch of SFTTrainer over the same ids; its own set-up is not timed."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from runtime.device import keep_freed_memory

    keep_freed_memory()  # as Distributed.start does for ours
    imports = peak_gb()
    counts: dict[str, Any] = {"loss": 0.0, "trained": 0, "slots": 0, "steps": 0}

    class Counted(SFTTrainer):
        def compute_loss(self, model: Any, inputs: dict, *args: Any, **kwargs: Any) -> Any:
            n = int((inputs["labels"][..., 1:] != -100).sum())
            counts["slots"] += inputs["input_ids"].numel()
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            counts["loss"] += loss.item() * n
            counts["trained"], counts["steps"] = counts["trained"] + n, counts["steps"] + 1
            return loss

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            counts.setdefault("begun", time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            counts["ended"] = time.perf_counter()

    options = PEERS[side]
    peft = None
    if case == "lora":
        from peft import LoraConfig

        peft = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear",
                          task_type="CAUSAL_LM")
    model: Any = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16 if case == "lora" else torch.float32)
    with open(f"{folder}/list.json") as f:
        data = Dataset.from_list(json.load(f))
    trainer = Counted(model=model, train_dataset=data, peft_config=peft, callbacks=[Clock()],
                      processing_class=AutoTokenizer.from_pretrained(folder), args=SFTConfig(
        output_dir=f"{folder}/trl", use_cpu=True, max_length=T, num_train_epochs=1,
        per_device_train_batch_size=B if options.get("packing") else padded, learning_rate=LR,
        lr_scheduler_type="constant", adam_beta1=BETAS[0], adam_beta2=BETAS[1],
        weight_decay=DECAY, max_grad_norm=CLIP, seed=1, save_strategy="no",
        logging_strategy="no", report_to="none", disable_tqdm=True, **options))
    trainer.train()
    return {"seconds": counts["ended"] - counts["begun"],
            "loss": counts["loss"] / counts["trained"], "imports": imports,
            **{key: counts[key] for key in ("trained", "slots", "steps")}}


def compare(case: str, s: Settings, folder: str, info: dict) -> tuple[list, str]:
    """Run all sides of a case in turn; return the table's rows and a line that compares them."""
    _, _, B, T = SIZES[s.size]
    padded = max(1, B * T * info["conversations"] // info["real"])  # as many tokens as B rows hold
    sides = {"ours": ("ours", [case, folder, B, T, padded])}
    if installed("trl"):
        peers = QUICK if s.size == "quick" else PEERS
        sides |= {peer: ("theirs", [peer, case, folder, B, T, padded]) for peer in peers}
    runs = in_turn(HERE, s.rounds, sides)
    rows, measured = [], {}
    for side, results in runs.items():
        took = Spread.of([x["seconds"] for x in results])
        one, gb = results[0], statistics.median(x["gb"] for x in results)
        measured[side] = [x["seconds"] for x in results], gb
        rows.append([
            CASES[case], side, f"{one['trained'] / took.median:,.0f}",
            f"{info['real'] / took.median:,.0f}", f"{took.median:.1f}",
            f"{took.low:.1f} to {took.high:.1f}", one["steps"],
            f"{info['real'] / one['slots']:.0%}", f"{gb:.2f}",
            f"{statistics.median(x['gb'] - x['imports'] for x in results):.2f}",
            f"{one['loss']:.4f}"])
    counts = {side: results[0]["trained"] for side, results in runs.items()}
    losses = [x["loss"] for results in runs.values() for x in results]
    if len(set(counts.values())) > 1:
        s.faults.append(f"{case}: the sides train other numbers of tokens: {counts}")
    if (apart := max(losses) / min(losses) - 1) > APART:
        s.faults.append(f"{case}: mean losses {apart:.1e} apart, so not the same was measured")
    seconds, our_gb = measured.pop("ours")
    lines = [f"{ratio(took, seconds, ' times')} the speed of {side}, in {our_gb / gb:.2f} of its "
            "memory"
            for side, (took, gb) in measured.items()]
    return rows, (f"- {CASES[case]}: {'; '.join(lines) or 'no peer was measured'}. "
                  f"Mean losses at most {apart:.0e} apart.")


def job(s: Settings) -> str:
    for needed in (TEXT, TOKENIZER / "tokenizer.model"):
        if not needed.exists():
            print(f"{HERE}: skipped, {needed} is not there", file=sys.stderr)
            sys.exit(0)  # nothing was measured, so nothing is written
    if not installed("trl"):
        print(f"{HERE}: trl is not installed, so its rows are left out", file=sys.stderr)
    rows, summaries = [], []
    peaks = limits.measured(s.size)
    for case in s.cases or list(CASES)[: 1 if s.size == "quick" else None]:
        with tempfile.TemporaryDirectory() as folder:
            info = child(HERE, "draw", s.size, folder)
            case_rows, line = compare(case, s, folder, info)
        rows += case_rows
        summaries.append(line)
    _, _, B, T = SIZES[s.size]
    head = ["", "", "trained tokens/s", "real tokens/s", "seconds an epoch", "range", "steps",
            "real of all slots", "peak GB", "above imports", "mean loss"]
    long = f" ({info['long']} longer than a row were left out)" if info["long"] else ""
    return (
        f"{info['conversations']:,} instructions with answers{long}, {info['real']:,} tokens, "
        f"{info['median']:.0f} in the median and {info['most']} at most; a random LLaMA of "
        f"{info['parameters'] / 1e6:.0f}M; {s.rounds} process{'es' if s.rounds > 1 else ''} a "
        f"side, one epoch each, first step included. Rows of {T}, {B} a step; TRL's padded steps "
        f"hold as many conversations as hold these tokens. Trained tokens are the targets that "
        f"have a loss, counted in each side's own batches: equal, or the program fails. \"As it "
        f"comes\", TRL recomputes activations; its other rows do not, as we do not; \"by length\", "
        f"a step's conversations are about as long as each other. One allocator's settings for "
        f"all.\n\n"
        f"{table(head, rows)}\n\n" + "\n".join(summaries)
        + f"\n\n{limits.description(peaks, 'transformers', 'peft', 'trl')}")


CHILDREN: dict[str, Callable[..., Any]] = {"draw": draw, "ours": ours, "theirs": theirs}

if __name__ == "__main__":
    sys.exit(main(HERE, "Instructions with answers, beside TRL", CHILDREN, job, list(CASES)))
