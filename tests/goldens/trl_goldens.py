"""Makes tests/goldens/trl.json: losses and gradients of TRL 1.16's own DPO and CPO trainers.

    python tests/goldens/trl_goldens.py    needs trl 1.16; takes about a minute

The models are random (tests/helpers/tiny.py), and so are the ids of the pairs. Each trainer gets
the pairs padded by its own collator, and its own `compute_loss` gives the loss. Of each gradient,
the norm and a few values are written.
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
BETA, NLL_WEIGHT, RANK, ALPHA, PAIRS, VALUES = 0.3, 0.7, 4, 8, 9, 6
CASES = [(mode, tune) for mode in ("dpo", "cpo") for tune in ("full", "lora")]


def pairs() -> list[tuple[list[int], list[int], list[int]]]:
    """Prompts, chosen and rejected answers of uneven lengths, as ids."""
    rng = np.random.default_rng(0)

    def ids(limit: int) -> list[int]:
        return rng.integers(3, tiny.V, rng.integers(1, limit)).tolist()

    return [(ids(8), ids(12), ids(12)) for _ in range(PAIRS)]


def drawn(name: str, shape: torch.Size) -> torch.Tensor:
    """A random matrix of an adapter; its seed is its name in a PEFT file."""
    return 0.3 * tiny.drawn(*shape, seed=zlib.crc32(name.encode()))


def gradient_values(gradient: torch.Tensor, name: str) -> list[float]:
    """The norm of a gradient, and some of its values, whose places depend on its name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    places = rng.integers(0, gradient.numel(), VALUES)
    return [gradient.norm().item(), *gradient.flatten()[places].tolist()]


def trainer(mode: str, tune: str, folder: Path) -> Any:
    """TRL's trainer of a tiny model. The data set is required but not used."""
    import transformers
    from datasets import Dataset
    from peft import LoraConfig

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    settings = {"output_dir": str(folder / "out"), "use_cpu": True, "bf16": False, "beta": BETA,
                "gradient_checkpointing": False, "report_to": "none", "max_length": 64,
                "per_device_train_batch_size": PAIRS}
    arguments = {"model": tiny.peer("llama3", seed=1), "processing_class": tokenizer,
                 "train_dataset": Dataset.from_dict({"prompt": ["a"], "chosen": ["b"],
                                                     "rejected": ["c"]})}
    if tune == "lora":
        arguments["peft_config"] = LoraConfig(r=RANK, lora_alpha=ALPHA, task_type="CAUSAL_LM",
                                              target_modules="all-linear")
    if mode == "cpo":
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        return CPOTrainer(**arguments, args=CPOConfig(**settings, cpo_alpha=NLL_WEIGHT))
    from trl import DPOConfig, DPOTrainer

    reference = tiny.peer("llama3", seed=2) if tune == "full" else None
    return DPOTrainer(**arguments, ref_model=reference, args=DPOConfig(**settings))


def inputs(mode: str, trainer: Any) -> dict[str, torch.Tensor]:
    """The pairs as the trainer's collator pads them."""
    rows = []
    for prompt, chosen, rejected in pairs():
        if mode == "dpo":
            rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
            continue
        row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side, answer in (("chosen", chosen), ("rejected", rejected)):
            row |= {f"{side}_input_ids": prompt + answer,
                    f"{side}_attention_mask": [1] * (len(prompt) + len(answer)),
                    f"{side}_labels": [-100] * len(prompt) + answer}
        rows.append(row)
    return trainer.data_collator(rows)


def make() -> dict[str, Any]:
    """Compute all goldens; needs trl."""
    import trl

    assert trl.__version__.startswith(VERSION), f"made with {VERSION}, this is {trl.__version__}"
    goldens: dict[str, Any] = {"trl": trl.__version__}
    with tempfile.TemporaryDirectory() as folder:
        tiny.folder(Path(folder), "llama3")
        for mode, tune in CASES:
            peer = trainer(mode, tune, Path(folder))
            model = peer.model.train()
            trained = {name.replace(".default", ""): p for name, p in model.named_parameters()
                       if p.requires_grad}
            if tune == "lora":
                with torch.no_grad():
                    for name, p in trained.items():
                        p.copy_(drawn(name, p.shape))
            loss = peer.compute_loss(model, inputs(mode, peer))
            loss.backward()
            goldens[f"{mode}-{tune}"] = {"loss": loss.item(), "gradients": {
                name: gradient_values(p.grad, name) for name, p in trained.items()}}
    return goldens


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(make(), indent=0) + "\n", encoding="utf-8")
