"""Set up a run: everything that can be wrong is found here, before step 1."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import replace
from pathlib import Path

import torch

import lora
from checkpoints.huggingface import load_model
from checkpoints.model_folder import (
    base_model_dir,
    read_config,
    resolve_model_dir,
    stop_ids,
    tensor_infos,
)
from checkpoints.peft_adapter import adapter_config
from checkpoints.resume_point import AsyncCheckpointer
from checkpoints.safetensors_header import weights_fingerprint
from data import Loader, Source
from evaluation.suites import Suite
from layers import fp8
from layers.config import ModelConfig
from model import Llama
from runtime import console
from runtime.console import FLAGS, UserError
from runtime.device import compute_dtype
from runtime.distributed import Distributed
from runtime.dtypes import FLAG_NAMES
from runtime.paths import code_sha256
from runtime.temporary import remove_leftovers
from tokenization.tokenizer import Tokenizer
from training import memory_estimate, preference, validation
from training import optimizer as optim
from training.batch_size import find_rows
from training.compile_model import compile_model, uncompiled
from training.datasets import ValidationSets, open_data
from training.early_stopping import EarlyStopping
from training.mixture import limit_epochs
from training.objective import Objective
from training.result import prepare_result
from training.settings import Settings, check_adapter, flag, resolve_auto
from training.state import Run


def set_up(s: Settings, objective: Objective) -> Run:
    """Load, check and build everything that a run needs."""
    out, ranks = Path(s.out), Distributed.start(s.device, s.rank_timeout)
    clean_up(out, ranks)
    check_ranks_agree(s, ranks)
    torch.manual_seed(s.seed)
    torch.use_deterministic_algorithms(s.deterministic)
    dtype = compute_dtype(ranks.device, s.dtype)
    suites, early_stopping = load_suites_and_conditions(s)

    model_dir = resolve_model_dir(s.model)
    s = choose_auto_settings(s, model_dir)
    check_memory(s, model_dir, dtype, ranks)
    model, tokenizer = load_weights(s, model_dir, dtype, ranks)
    new_adapter, saved_modules = choose_trained(s, model)
    check_seq_len(s, model.config)
    if s.dtype == "fp8":
        fp8.check(model, ranks.device, s.seq_len)
        fp8.convert_to_fp8(model)

    sources, val_sets = open_data(s, model_dir, tokenizer, model.config.vocab_size, out, ranks)
    suites = validation.clean_suites(suites, sources, model_dir)
    check_stop_conditions(early_stopping, suites, list(val_sets))
    check_best(s, val_sets)
    ranks.assert_same_on_all_ranks({f"sha256 of {x.name}": x.sha for x in sources}
                | {"model": f"{model.config}", "tokenizer": tokenizer.fingerprint})
    result = prepare_result(model, model_dir, sources, tokenizer, out, ranks.rank == 0)
    ranks.wrap_model(model, s.shard, dtype, trained_dtype(s))

    s = choose_rows(s, model, objective, sources, ranks)
    if s.compile:  # after the choice of rows, because it compiles for their shape
        compile_model(model)
    s, micro_batches = choose_tokens_per_step(s, ranks, dtype)
    if s.max_epochs_per_source:
        limit_epochs(sources, s.steps * s.tokens_per_step, s.max_epochs_per_source)
    loader = make_loader(s, sources, s.rows, ranks)
    steps = s.steps or steps_of_epochs(s, loader)
    optimizer = build_optimizer(s, model, ranks)
    loss_scale = optim.LossScale(65536.0 if dtype == torch.float16 else 1.0)
    if s.mode == "dpo" and not s.plan:
        keep_reference(s, model, loader, model_dir, ranks, new_adapter, saved_modules)
    return Run(
        settings=s, out=out, ranks=ranks, model=model, model_dir=model_dir, tokenizer=tokenizer,
        weights_fingerprint=weights_fingerprint(tensor_infos(base_model_dir(model_dir))),
        stop_ids=stop_ids(model_dir, tokenizer) if suites else set(), result=result,
        loader=loader, val_sets=val_sets, suites=suites,
        early_stopping=early_stopping, optimizer=optimizer, loss_scale=loss_scale,
        checkpointer=AsyncCheckpointer(out / "checkpoints", s.keep, ranks),
        steps=steps, micro_batches=micro_batches)


# -- before the model is loaded --------------------------------------------------------------------


def clean_up(out: Path, ranks: Distributed) -> None:
    """Remove what an interrupted write left in the run's folder."""
    if ranks.rank == 0:
        remove_leftovers(out)
        remove_leftovers(out / "bins")


def check_ranks_agree(s: Settings, ranks: Distributed) -> None:
    """UserError if ranks were started with different settings, code, torch or --out folders."""
    settings = {flag(f.name): str(getattr(s, f.name))
                for f in dataclasses.fields(s) if f.name != "out"}  # may be a link on a machine
    ranks.assert_same_on_all_ranks(settings | {"code": code_sha256(), "torch": torch.__version__})
    if ranks.world_size == 1:
        return
    marker = Path(s.out) / ".ranks"  # several machines must see one folder
    if ranks.rank == 0:
        marker.write_text(str(time.time_ns()), encoding="utf-8")
    ranks.barrier()
    text = marker.read_text("utf-8") if marker.exists() else "none"
    ranks.assert_same_on_all_ranks({"folder at --out": text})


def choose_auto_settings(s: Settings, model_dir: Path) -> Settings:
    """Replace `auto` for --lr and --seq-len by numbers, and print them."""
    config = read_config(base_model_dir(model_dir))
    resolved = resolve_auto(s, config.max_position_embeddings)
    if s.lr == "auto":
        console.info(f"--lr auto: {resolved.lr:g} (--tune {s.tune})")
    if s.seq_len == "auto":
        console.info(f"--seq-len auto: {resolved.seq_len}")
    return resolved


def check_memory(s: Settings, model_dir: Path, dtype: torch.dtype, ranks: Distributed) -> None:
    """UserError if a step needs more memory than the device has, or if a large model would be
    trained on a CPU that nobody asked for."""
    base = base_model_dir(model_dir)
    config = read_config(base)
    if not s.plan:  # --plan prints its table first
        memory_estimate.check_cpu_is_intended(config, s, ranks)
    memory_estimate.check_memory(config, s, dtype, ranks,
                                 micro_batches=2 if s.tokens_per_step else 1,
                                 adapter=model_dir if base != model_dir else None)


def load_suites_and_conditions(s: Settings) -> tuple[list[Suite], EarlyStopping]:
    """Read --suites and --stop-if."""
    early_stopping = EarlyStopping.parse(s.stop_if)
    suites = validation.load_suites(s)
    if s.val:  # without --val the held-out texts get their names when the data are opened
        names = [item.partition("=")[0] for item in s.val]
        check_stop_conditions(early_stopping, suites, names)
    return suites, early_stopping


# -- the model -------------------------------------------------------------------------------------


def trained_dtype(s: Settings) -> torch.dtype:
    """The dtype in which trained parameters are kept."""
    return torch.bfloat16 if s.optimizer == "adamw-bf16" else torch.float32


def load_weights(s: Settings, model_dir: Path, dtype: torch.dtype,
                 ranks: Distributed) -> tuple[Llama, Tokenizer]:
    """Load the model and its tokenizer.

    Frozen weights are kept in the compute dtype `dtype` (or NF4), trained ones in `trained_dtype`.
    With several ranks each reads the files as they are, on the CPU, and keeps its part later.
    """
    if s.tune != "full":
        weights_dtype = dtype
    elif s.train_layers or ranks.world_size > 1:
        weights_dtype = None  # as in the files
    else:
        weights_dtype = trained_dtype(s)
    on_device = ranks.world_size == 1 or s.tune == "qlora"
    model, tokenizer = load_model(
        model_dir, ranks.device if on_device else torch.device("cpu"), weights_dtype,
        quant="nf4" if s.tune == "qlora" else "none", double=s.double_quant,
        compute_dtype=dtype, recompute=s.recompute, neftune_alpha=s.neftune)
    if s.tune == "full" and lora.adapters(model):
        raise UserError(f"--model {s.model}: is an adapter; continue its training with --tune lora",
                        FLAGS)
    return model, tokenizer


def choose_trained(s: Settings, model: Llama) -> tuple[bool, list[str]]:
    """Choose what is trained: all weights, some layers, or an adapter.

    Returns whether a new adapter was added, and the modules that are trained in full beside an
    adapter or some layers (embeddings, norms).
    """
    saved_modules = lora.extra_modules(model, s.train_embeddings, s.train_norms)
    new_adapter = s.tune != "full" and not lora.adapters(model)
    if new_adapter:
        lora.add_lora(model, s.lora_rank, s.lora_alpha, s.lora_dropout, s.lora_targets, s.rslora,
                    s.dora, lora.layer_indices(s.lora_layers, "lora-layers"), saved_modules)
    elif s.tune != "full":
        check_adapter(s, adapter_config(model, ""))
    if s.train_layers:
        lora.train_layers(model, lora.layer_indices(s.train_layers, "train-layers"), saved_modules)
    if model.lm_head is None and model.head.requires_grad:
        console.info("the head is tied to the embeddings: one tensor, trained and saved once")
    return new_adapter, saved_modules


def check_seq_len(s: Settings, config: ModelConfig) -> None:
    context = config.max_position_embeddings
    if s.seq_len > context:
        raise UserError(f"--seq-len {s.seq_len}: the model's context is {context}; give at most "
                        "that", FLAGS)


# -- data and steps --------------------------------------------------------------------------------


def check_stop_conditions(early_stopping: EarlyStopping, suites: list[Suite],
                          texts: list[str]) -> None:
    """UserError for a stop condition on something that is not measured."""
    early_stopping.check_metrics(texts, validation.metric_names(suites),
                                 validation.main_metrics(suites))


def check_best(s: Settings, val_sets: ValidationSets) -> None:
    if s.best and s.best not in val_sets:
        raise UserError(f"--best {s.best}: no held-out text of that name; there are "
                        f"{', '.join(val_sets) or 'none'}", FLAGS)


def make_loader(s: Settings, sources: list[Source], rows: int, ranks: Distributed) -> Loader:
    return Loader(sources, s.seq_len, rows, s.seed, ranks.rank, ranks.world_size)


def choose_rows(s: Settings, model: Llama, objective: Objective, sources: list[Source],
                ranks: Distributed) -> Settings:
    """With --rows auto: the largest micro-batch that fits into memory."""
    if s.rows != "auto":
        return s
    rows = find_rows(s, model, objective, ranks, lambda n: make_loader(s, sources, n, ranks))
    console.info(f"--rows auto: {rows}")
    return replace(s, rows=rows)


def choose_tokens_per_step(s: Settings, ranks: Distributed,
                           dtype: torch.dtype) -> tuple[Settings, int]:
    """Settings with what was chosen for this machine, and the number of micro-batches in a step.

    The choices become settings, so that a run that is resumed on another machine keeps them.
    """
    tokens_per_row = s.seq_len * ranks.world_size  # one row on every rank
    micro_batch = s.rows * tokens_per_row
    tokens_per_step = s.tokens_per_step or micro_batch
    if tokens_per_step % micro_batch:
        fitting = [n for n in range(1, tokens_per_step // tokens_per_row + 1)
                   if tokens_per_step % (n * tokens_per_row) == 0]
        if fitting:
            advice = f"use --rows {' or '.join(map(str, fitting[-8:]))}"
        else:
            advice = f"use a multiple of {tokens_per_row}"
        raise UserError(f"--tokens-per-step {tokens_per_step}: no multiple of {micro_batch} (rows "
                        f"{s.rows} x seq-len {s.seq_len} x ranks {ranks.world_size}); {advice}",
                        FLAGS)
    dtype_name = s.dtype if s.dtype == "fp8" else FLAG_NAMES[dtype]
    return (replace(s, tokens_per_step=tokens_per_step, dtype=dtype_name),
            tokens_per_step // micro_batch)


def steps_of_epochs(s: Settings, loader: Loader) -> int:
    """The steps until the first source has been read `epochs` times."""
    tokens = s.epochs * loader.streams[0].tokens / loader.shares[0]  # of all sources together
    return max(1, round(tokens / s.tokens_per_step))


def build_optimizer(s: Settings, model: Llama, ranks: Distributed) -> torch.optim.Optimizer:
    if ranks.strategy == "fsdp" and s.optimizer == "adamw8bit":
        raise UserError("--optimizer adamw8bit: does not work with --shard fsdp; use adamw or "
                        "adamw-bf16, whose state is sharded, or --shard ddp", FLAGS)
    return optim.adamw(model, s.lr, (s.beta1, s.beta2), s.weight_decay,
                       s.embedding_lr / s.lr or 1.0, s.lora_plus, s.optimizer, s.seed)


def keep_reference(s: Settings, model: Llama, loader: Loader, model_dir: Path, ranks: Distributed,
                   new_adapter: bool, saved_modules: list[str]) -> None:
    """Compute DPO's reference before step 1, where a step cannot compute it itself.

    With a new adapter a step computes the reference with the adapter off. That is not possible if
    all weights or an existing adapter are trained, or if FSDP shards modules that are trained in
    full: their frozen values cannot be put in place during a forward pass.
    """
    if new_adapter and not (ranks.strategy == "fsdp" and saved_modules):
        return
    with uncompiled():
        loader.set_references(preference.keep_reference(
            model, loader.streams, Path(s.out) / "reference", str(model_dir), s.rows, ranks))
