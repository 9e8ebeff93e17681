"""What train.py's settings must be, and which of them say nothing beside the others.

One idea: a flag that would be read and ignored is a mistake of the one who gave it (LoRA's rank
without --tune lora trains all weights), so it is refused before anything is opened.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from runtime.console import FLAGS, UserError

LORA = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "lora_plus")
PART = ("lora_layers", "rslora", "dora", "double_quant", "train_layers", "train_embeddings",
        "train_norms")  # with LORA, all that only a run of a part of the weights is told


def check(s: Any, kind: str) -> None:
    """UserError (FLAGS) on a setting of train.Settings that is out of range, or that says nothing
    where bins are of this `kind`."""
    fit = {"seq-len": s.seq_len >= 2, "warmup": s.warmup >= 0, "plan-price": s.plan_price >= 0,
           "keep": s.keep >= 2, "steps": s.steps >= 0, "embedding-lr": s.embedding_lr >= 0,
           "hold-out": 0 <= s.hold_out < 1, "clip": s.clip > 0, "lora-plus": s.lora_plus > 0,
           "rows": s.rows == "auto" or s.rows >= 1, "plan-share": 0 < s.plan_share < 1,
           "rank-timeout": s.rank_timeout > 0, "lr": s.lr > 0, "suite-items": s.suite_items >= 0,
           "tokens-per-step": s.tokens_per_step >= 0, "beta": s.beta > 0, "ema": 0 <= s.ema < 1,
           "epochs": s.epochs > 0, "max-epochs-per-source": s.max_epochs_per_source >= 0,
           "eval-tokens": s.eval_tokens > 0, "nll-weight": s.nll_weight >= 0,
           "neftune": s.neftune >= 0, "label-smoothing": 0 <= s.label_smoothing < 1,
           "beta1": 0 <= s.beta1 < 1, "beta2": 0 <= s.beta2 < 1, "seed": s.seed >= 0,
           "lora-dropout": 0 <= s.lora_dropout < 1, "eval-every": s.eval_every >= 0,
           "save-every": s.save_every >= 0}
    if not s.resume:  # a run that began with a value before it was refused goes on, here and below
        fit |= {"min-lr-ratio": 0 <= s.min_lr_ratio <= 1, "weight-decay": s.weight_decay >= 0,
                "lora-rank": s.lora_rank >= 1, "lora-alpha": s.lora_alpha > 0}
        fit |= {k.replace("_", "-"): False for k, x in vars(s).items()
                if x == math.inf and k != "clip"}  # which then cuts nothing
    for name in (x for x, good in fit.items() if not good):
        raise UserError(f"--{name} {getattr(s, name.replace('-', '_'))}: out of range; seq-len and "
                        "keep are at least 2, hold-out, plan-share, ema, label-smoothing, "
                        "lora-dropout, beta1 and beta2 below 1, min-lr-ratio at most 1, the others "
                        "above 0, and none is infinite but clip", FLAGS)
    if s.mode != "cpo" and (s.arpo or s.nll_weight != 1):
        raise UserError("--arpo and --nll-weight: say something with --mode cpo alone", FLAGS)
    if s.max_epochs_per_source and not s.steps:
        raise UserError("--max-epochs-per-source: says nothing without --steps; give them", FLAGS)
    if s.optimizer == "adamw-bf16" and (s.tune != "full" or s.train_layers or s.ema):
        raise UserError("--optimizer adamw-bf16: is for all weights; a part that trains, and an "
                        "average, are kept in float32: take adamw or adamw8bit", FLAGS)
    idle = ("lora_layers", "rslora", "dora") if s.tune == "full" else ("train_layers",)
    idle += ("double_quant",) * (s.tune != "qlora") + ("recompute_light",) * s.recompute
    idle += ("neftune", "label_smoothing") if kind == "pairs" else ()
    if not s.resume:
        idle += LORA if s.tune == "full" else ()
        idle += ("beta",) if kind != "pairs" else ()
        if s.embedding_lr and not s.train_embeddings and (s.tune != "full" or s.train_layers):
            raise UserError("--embedding-lr: is of what --train-embeddings trains; give that too, "
                            "or leave it out", FLAGS)
    if s.tune == "full" and not s.train_layers:
        idle += ("train_embeddings", "train_norms")  # they do
    if given := changed(s, idle):
        raise UserError(f"--{given[0].replace('_', '-')}: says nothing here, with --mode {s.mode} "
                        f"and --tune {s.tune}{' and --recompute' * s.recompute}; leave it out",
                        FLAGS)


def changed(s: Any, names: Iterable[str]) -> list[str]:
    """Which of these settings are not as they are where nothing is said."""
    usual = type(s)()
    return [x for x in names if getattr(s, x) != getattr(usual, x)]


def check_adapter(s: Any, words: dict[str, Any]) -> None:
    """UserError (FLAGS) where a setting would give another shape than the adapter of --model has,
    whose adapter_config.json holds `words`."""
    own = {"lora_rank": words["r"], "lora_alpha": words["lora_alpha"],
           "lora_dropout": words["lora_dropout"], "rslora": words["use_rslora"],
           "dora": words["use_dora"], "lora_layers": None, "lora_targets": None,
           "train_embeddings": any("embed_tokens" in x for x in words.get("modules_to_save", [])),
           "train_norms": any("norm" in x for x in words.get("modules_to_save", []))}
    for name in changed(s, tuple(own)):
        if getattr(s, name) != own[name]:
            has = "its own" if own[name] is None else own[name]
            raise UserError(f"--{name.replace('_', '-')}: --model {s.model} is an adapter, which "
                            f"goes on as it is ({has}); leave it out, or give its base for a new "
                            "one", FLAGS)
