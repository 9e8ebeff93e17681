"""Makes tests/goldens/trl.json: losses and gradients of TRL 1.16's own DPO and CPO trainers.

    python tests/goldens_trl.py        where trl 1.16 is installed; about a minute

The models are random (tests/tiny.py), and so are the pairs, as ids: each trainer gets them separate
and padded, as its own collator lays them out, and its own `compute_loss` says what it minimises. Of
a gradient, its norm and a few of its numbers are kept.
"""

from __future__ import annotations

import json
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

import numpy as np  # noqa: E402
import torch  # noqa: E402

from helpers import tiny  # noqa: E402

FILE = HERE / "trl.json"
VERSION = "1.16"
BETA, NLL_WEIGHT, RANK, ALPHA, PAIRS, SEEN = 0.3, 0.7, 4, 8, 9, 6
CASES = [(mode, tune) for mode in ("dpo", "cpo") for tune in ("full", "lora")]


def pairs() -> list[tuple[list[int], list[int], list[int]]]:
    """Prompts, chosen and rejected answers of uneven lengths, as ids."""
    draw = np.random.default_rng(0)

    def ids(most: int) -> list[int]:
        return draw.integers(3, tiny.V, draw.integers(1, most)).tolist()

    return [(ids(8), ids(12), ids(12)) for _ in range(PAIRS)]


def drawn(name: str, shape: torch.Size) -> torch.Tensor:
    """An adapter's matrix, by its name in a PEFT file."""
    return 0.3 * tiny.drawn(*shape, seed=zlib.crc32(name.encode()))


def kept(gradient: torch.Tensor, name: str) -> list[float]:
    """A gradient's norm, and some of its numbers, chosen by its name."""
    at = np.random.default_rng(zlib.crc32(name.encode())).integers(0, gradient.numel(), SEEN)
    return [gradient.norm().item(), *gradient.flatten()[at].tolist()]


def trainer(mode: str, tune: str, folder: Path) -> Any:
    """TRL's trainer of a tiny model; its data set is a formality."""
    import transformers
    from datasets import Dataset
    from peft import LoraConfig

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    words = {"output_dir": str(folder / "out"), "use_cpu": True, "bf16": False, "beta": BETA,
             "gradient_checkpointing": False, "report_to": "none", "max_length": 64,
             "per_device_train_batch_size": PAIRS}
    named = {"model": tiny.peer("llama3", seed=1),
             "train_dataset": Dataset.from_dict({"prompt": ["a"], "chosen": ["b"],
                                                 "rejected": ["c"]}),
             "processing_class": tokenizer,
             "peft_config": LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear",
                                       task_type="CAUSAL_LM") if tune == "lora" else None}
    if mode == "cpo":
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        return CPOTrainer(**named, args=CPOConfig(**words, cpo_alpha=NLL_WEIGHT))
    from trl import DPOConfig, DPOTrainer

    reference = tiny.peer("llama3", seed=2) if tune == "full" else None
    return DPOTrainer(**named, ref_model=reference, args=DPOConfig(**words))


def inputs(mode: str, found: Any) -> dict[str, torch.Tensor]:
    """The pairs as a trainer's collator pads them."""
    rows = []
    for prompt, chosen, rejected in pairs():
        if mode == "dpo":
            rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
            continue
        row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side, answer in (("chosen", chosen), ("rejected", rejected)):
            row |= {f"{side}_input_ids": prompt + answer,
                    f"{side}_attention_mask": [1] * len(prompt + answer),
                    f"{side}_labels": [-100] * len(prompt) + answer}
        rows.append(row)
    return found.data_collator(rows)


def make() -> dict[str, Any]:
    """All goldens; needs trl."""
    import trl

    assert trl.__version__.startswith(VERSION), f"made with {VERSION}, this is {trl.__version__}"
    made: dict[str, Any] = {"trl": trl.__version__}
    with tempfile.TemporaryDirectory() as folder:
        tiny.folder(Path(folder), "llama3")
        for mode, tune in CASES:
            one = trainer(mode, tune, Path(folder))
            model = one.model.train()
            named = {n.replace(".default", ""): p for n, p in model.named_parameters()
                     if p.requires_grad}
            with torch.no_grad():
                for name, p in named.items() if tune == "lora" else ():
                    p.copy_(drawn(name, p.shape))
            loss = one.compute_loss(model, inputs(mode, one))
            loss.backward()
            made[f"{mode}-{tune}"] = {"loss": loss.item(), "gradients": {
                name: kept(p.grad, name) for name, p in named.items()}}
    return made


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(make(), indent=0) + "\n", encoding="utf-8")
