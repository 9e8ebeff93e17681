"""The settings of train.py: names, defaults, bounds, and which of them make no sense together.

This module does not import torch, so `--help` and a wrong flag answer at once. A setting that would
be read and then ignored (`--lora-rank` with `--tune full`) is refused, because the person who gave
it expects an effect.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from runtime import flags
from runtime.console import BAD_INPUT, FLAGS, STORAGE, UserError, info
from runtime.setting_metadata import Group, bounded
from runtime.temporary import write_text
from training import other_trainers
from training.run_folder import checkpointed_settings, continuation_command, is_finished

AUTO_LR = {"full": 2e-5, "lora": 2e-4, "qlora": 2e-4}
AUTO_SEQ_LEN = 1024

# The kind of bin that each mode reads. Bins of text, chat and mt may be mixed in one run.
BIN_KINDS = {"cpt": "text", "sft": "chat", "mt": "mt", "dpo": "pairs", "cpo": "pairs"}


def removed(name: str, idle: Any) -> Callable[[Any], dict[str, Any]]:
    """For `Settings.RENAMED`: refuse a removed setting, except with the value `idle`, at which it
    had no effect."""

    def read(value: Any) -> dict[str, Any]:
        if value != idle:
            raise UserError(f"{name} = {value}: this setting was removed; commit 53f4a60 is the "
                            "last one that can continue such a run", FLAGS)
        return {}

    return read


def recompute_mode(value: Any) -> dict[str, Any]:
    """For `Settings.RENAMED`: recompute was a flag."""
    if isinstance(value, bool):
        value = "full" if value else "none"
    return {"recompute": value}


def recompute_light_mode(value: Any) -> dict[str, Any]:
    """For `Settings.RENAMED`: recompute_light was a flag of its own, after recompute."""
    return {"recompute": "selective"} if value else {}


@dataclass
class Settings:
    """Train a LLaMA on token bins, with all weights or LoRA."""

    HINTS: ClassVar[dict[str, str]] = other_trainers.HINTS
    RENAMED: ClassVar[dict[str, Callable[[Any], dict[str, Any]]]] = {
        "ema": removed("ema", 0.0), "label_smoothing": removed("label_smoothing", 0.0),
        "recompute": recompute_mode, "recompute_light": recompute_light_mode}

    mode: Annotated[Literal["cpt", "sft", "mt", "dpo", "cpo"], Group("Most used")] = "cpt"
    """What to train on. cpt: text (continued pretraining). sft: conversations. mt: translations.
    dpo, cpo: preference pairs. Files of cpt, sft and mt may be mixed in --data."""
    model: str = "demo"
    """A Hugging Face folder, a hub id (org/name@revision), a PEFT adapter folder, or `demo`."""
    data: list[str] = field(default_factory=list)
    """Sources, each SPEC[:WEIGHT]. SPEC is a bin, a file or a glob; files are prepared as --mode
    says. Weights are shares of the trained tokens; the default weight is the size of the source."""
    val: list[str] = field(default_factory=list)
    """Validation texts, each NAME=SPEC. Without any, --hold-out of each source is set aside."""
    out: str = "out/run"
    """The folder of the run."""
    tune: Literal["full", "lora", "qlora"] = "full"
    """full: train all weights. lora: train an adapter, the base is frozen. qlora: the same with
    the base in 4 bits."""
    lr: float | Literal["auto"] = bounded("auto", above=0)
    """The peak learning rate. auto: 2e-5 with --tune full, 2e-4 with lora and qlora."""
    seq_len: int | Literal["auto"] = bounded("auto", at_least=2)
    """Tokens in a row. auto: 1024, or the model's context if that is shorter."""
    rows: int | Literal["auto"] = bounded(4, at_least=1, at_most=1 << 20)
    """Rows per device and micro-batch. Lower it if memory runs out; the result stays the same.
    auto: as many as fit, dividing --tokens-per-step."""
    tokens_per_step: int = bounded(0, at_least=0, at_most=1 << 30)
    """Tokens in a whole step, over micro-batches and ranks. 0: one micro-batch on each rank."""
    steps: int = bounded(0, at_least=0, at_most=10**9)
    """Number of steps. 0: as --epochs says."""
    epochs: float = bounded(1.0, above=0)
    """Number of passes over the data. A mixture ends when its first source has had so many."""
    resume: bool = False
    """Continue from the newest checkpoint in --out, with the settings of the run."""
    plan: bool = False
    """Print whether the run fits, what it costs, and the first batch; then stop."""

    lora_rank: Annotated[int, Group("What is trained")] = bounded(16, at_least=1)
    """Rank of the LoRA matrices A and B."""
    lora_alpha: float = bounded(32.0, above=0)
    """The adapter is scaled by alpha / rank."""
    lora_dropout: float = bounded(0.0, at_least=0, below=1)
    """Dropout on the input of the adapter, as a probability."""
    lora_targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Linear layers that get an adapter, such as q_proj v_proj; or all-linear."""
    lora_layers: list[str] = field(default_factory=list)
    """Blocks that get an adapter, such as 0-7 30. Default: all."""
    rslora: bool = False
    """Scale the adapter by alpha / sqrt(rank) instead of alpha / rank; for high ranks."""
    dora: bool = False
    """Train the norm of each weight row too (DoRA)."""
    lora_plus: float = bounded(1.0, above=0)
    """Learning rate of B as a multiple of that of A (LoRA+; its authors advise about 16)."""
    double_quant: bool = False
    """With --tune qlora: keep the scales of the 4-bit weights in 8 bits. This saves 0.37 bits a
    weight."""
    train_embeddings: bool = False
    """Also train embed_tokens and lm_head, with an adapter or --train-layers."""
    train_norms: bool = False
    """Also train all norms, with an adapter or --train-layers."""
    embedding_lr: float = bounded(0.0, at_least=0)
    """Learning rate of embed_tokens and lm_head, if they are trained. 0: --lr."""
    train_layers: list[str] = field(default_factory=list)
    """With --tune full: train only these blocks, such as 0-7 37-39. Default: everything."""

    schedule: Annotated[Literal["cosine", "linear", "inverse-sqrt", "wsd", "constant"],
                        Group("Optimizer and schedule")] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: float = bounded(0.03, at_least=0)
    """Steps of warm-up. A number below 1 is a share of all steps."""
    min_lr_ratio: float = bounded(0.1, at_least=0, at_most=1)
    """The last learning rate, as a share of --lr."""
    weight_decay: float = bounded(0.1, at_least=0)
    """Weight decay of matrices. Norms and biases have none."""
    optimizer: Literal["adamw", "adamw8bit", "adamw-bf16"] = "adamw"
    """adamw: 16 bytes a trained number. adamw8bit: moments in 8 bits (bitsandbytes), 10 bytes.
    adamw-bf16: weights, gradients and moments in bf16, 8 bytes; only when all weights train."""
    beta1: float = bounded(0.9, at_least=0, below=1)
    """AdamW: decay of the mean of gradients, per step."""
    beta2: float = bounded(0.95, at_least=0, below=1)
    """AdamW: decay of the mean of squared gradients, per step."""
    clip: float = bounded(1.0, above=0, may_be_infinite=True)
    """The largest norm of the gradient of a step; larger gradients are scaled down."""
    neftune: float = bounded(0.0, at_least=0)
    """cpt, sft, mt: strength of noise on the embeddings (NEFTune; its authors use 5 to 15)."""
    seed: int = bounded(1, at_least=0)
    """Seed of the data order, of new adapters and of dropout."""

    beta: Annotated[float, Group("Preferences (dpo, cpo)")] = bounded(0.1, above=0)
    """Strength of a preference."""
    nll_weight: float = bounded(1.0, at_least=0)
    """cpo: weight of the NLL of the chosen answers."""
    arpo: bool = False
    """cpo: a rejected answer counts less if it is nearly as likely as the chosen one (X-ALMA)."""

    max_epochs_per_source: Annotated[float, Group("Data")] = bounded(0.0, at_least=0)
    """With --steps: the most epochs of any source. Tokens that a small source cannot give are taken
    from the others in proportion to their weights (UniMax if the weights are equal). 0: no
    limit."""
    template_kwargs: list[str] = field(default_factory=list)
    """sft, dpo, cpo: variables of the chat template for files in --data, KEY=VALUE or a JSON
    object, as in enable_thinking=false. They are kept with the model. A date that the template
    writes is given by date_string=2024-07-26."""
    hold_out: float = bounded(0.01, at_least=0, below=1)
    """Share of each source's documents that is set aside for validation, if there is no --val."""

    dtype: Annotated[Literal["auto", "bf16", "fp16", "fp32", "fp8"],
                     Group("Speed and memory")] = "auto"
    """dtype of matrix products (fp8: of those in the blocks, with --tune full). Trained weights are
    kept in float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train. auto: on a GPU if there is one."""
    compile: bool = False
    """Compile each block and the loss with torch.compile for training, not for evaluations."""
    recompute: Literal["none", "full", "selective"] = "none"
    """Activation checkpointing. full: a block is computed again in the backward pass, the least
    memory for a third more products (half more with LoRA). selective: only what lies between the
    products is computed again."""
    shard: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """With several ranks. ddp: each holds the model. fsdp: each holds a part. auto: ddp if two
    copies of the model fit on a GPU."""
    rank_timeout: float = bounded(600.0, above=0)
    """Seconds that a rank waits for the others before it stops."""
    ignore_memory: bool = False
    """Start even if --plan says that a step needs more memory than the device has."""
    deterministic: bool = False
    """Refuse GPU kernels whose results vary from run to run."""

    eval_every: Annotated[int, Group("Evaluation during training")] = bounded(0, at_least=0)
    """Steps between evaluations. 0: ten evaluations in a run. The first and the last step are
    always evaluated."""
    eval_tokens: int = bounded(50_000, above=0)
    """Tokens of each validation text that are evaluated, from its beginning."""
    best: str = ""
    """The name of a validation text: save the model with its lowest bits per byte, not the last."""
    suites: list[str] = field(default_factory=list)
    """Suites to measure at evaluations too, named as for eval.py, with one prompt each."""
    suite_data: str = ""
    """The folder of the suites' data."""
    suite_items: int = bounded(100, at_least=0)
    """Items of each suite, spread over it. 0: all."""
    stop_if: list[str] = field(default_factory=list)
    """Stop conditions: the run ends after an evaluation that finds, for example, 'eng>+5%' (bits
    per byte of a text, against step 0) or 'sib200.acc<0.2'."""
    prompts: list[str] = field(default_factory=list)
    """Prompts that are continued at evaluations, into samples.txt. Default: the first tokens of the
    validation texts."""

    save_every: Annotated[int, Group("Checkpoints and logs")] = bounded(0, at_least=0)
    """Steps between checkpoints. 0: five checkpoints in a run."""
    keep: int = bounded(2, at_least=2)
    """Number of checkpoints kept."""
    track: Literal["none", "tensorboard"] = "none"
    """tensorboard: write the metrics for TensorBoard too, into OUT/tensorboard."""

    plan_for: Annotated[str, Group("Plan for other machines")] = ""
    """Print memory, time and cost on a GPU such as h100 or 8xa100, or on `cpu`, from --model's
    config.json alone; then stop. Needs --steps."""
    plan_share: float = bounded(0.35, above=0, below=1)
    """--plan-for: the share of the GPU's peak FLOP/s that is assumed."""
    plan_price: float = bounded(0.0, at_least=0)
    """--plan-for: price of a GPU per hour."""


# Settings that may change when a run is resumed. The first set does not change the result; the
# second changes the numbers slightly, and a line says so. Every other setting must stay as it was.
CAN_CHANGE_ON_RESUME = {
    "out", "resume", "plan", "plan_for", "plan_share", "plan_price", "rows", "rank_timeout",
    "eval_every", "save_every", "keep", "track", "ignore_memory", "stop_if"}
WARN_ON_RESUME = {
    "device", "compile", "recompute", "shard", "eval_tokens", "prompts",
    "suites", "suite_data", "suite_items"}

# These bounds came later than the settings: a run that began outside of them can still be resumed.
NOT_CHECKED_ON_RESUME = {"min_lr_ratio", "weight_decay", "lora_rank", "lora_alpha"}

# Settings of LoRA, and those of training a part of the weights in any way.
LORA = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "lora_plus")
PART = ("lora_layers", "rslora", "dora", "double_quant", "train_layers", "train_embeddings",
        "train_norms")


def upgrade_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Settings under today's names, from those that an earlier version wrote into a checkpoint."""
    upgraded = {}
    for name, value in values.items():
        renamed = Settings.RENAMED.get(name)
        upgraded |= renamed(value) if renamed else {name: value}
    return upgraded


def resolve_auto(s: Settings, context: int) -> Settings:
    """Settings with numbers in place of `auto` for --lr and --seq-len.

    `context` is the most tokens that the model can read. The numbers go into settings.toml, so a
    resumed run keeps them.
    """
    lr, seq_len = s.lr, s.seq_len
    if lr == "auto":
        lr = AUTO_LR[s.tune]
    if seq_len == "auto":
        seq_len = min(AUTO_SEQ_LEN, context)
    return replace(s, lr=lr, seq_len=seq_len)


def torchrun_restarts() -> int:
    """The number of times that torchrun has restarted this machine's processes."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def read_settings(argv: list[str], restarts: int = 0) -> tuple[Settings, dict[str, str]]:
    """Read recipes and flags -> (settings, where each value came from).

    With --resume the settings that the run began with are read first, like a recipe. The same holds
    where torchrun has restarted the processes (`restarts` times) with the flags of the first start.
    """
    settings, origins = flags.read(Settings, argv, "train.py", check=False)
    saved = Path(settings.out) / "settings.toml"
    if restarts and saved.exists():
        argv, settings.resume = ["--out", settings.out, "--resume"], True
    if not settings.resume:
        return settings, origins
    restore_settings(saved)
    check_not_longer(settings, origins, saved)
    return flags.read_resumed(
        Settings, argv, "train.py", saved, CAN_CHANGE_ON_RESUME | WARN_ON_RESUME)


def restore_settings(saved: Path) -> None:
    """Write a damaged or missing settings.toml again, from the newest checkpoint that holds the
    run's settings. UserError (BAD_INPUT) if there is none."""
    try:
        if "mode" in tomllib.loads(saved.read_text(encoding="utf-8")):
            return
        fault = "holds no settings of a run"
    except FileNotFoundError:
        fault = "does not exist"
    except (OSError, ValueError) as e:
        fault = f"cannot be read ({e})"
    for values in checkpointed_settings(saved.parent):
        known = {f.name for f in fields(Settings)}
        values = {name: x for name, x in upgrade_settings(values).items() if name in known}
        text = flags.to_toml(replace(Settings(**values), resume=False, plan=False))
        try:
            write_text(saved, text)
        except OSError as e:
            raise UserError(f"{saved}: {fault}, and cannot be written again ({e.strerror}); remove "
                            "it and --resume", STORAGE) from None
        info(f"{saved}: {fault}; written again from a checkpoint")
        return
    if not (saved.parent / "checkpoints").exists():
        raise UserError(f"--resume: {saved} {fault}, so {saved.parent} holds no run; check --out",
                        BAD_INPUT)
    raise UserError(f"--resume: {saved} {fault}, and no checkpoint in {saved.parent} holds the "
                    "settings; check --out, or restore the file", BAD_INPUT)


def check_not_longer(settings: Settings, origins: dict[str, str], saved: Path) -> None:
    """UserError (FLAGS) if --steps or --epochs asks a finished run for another length. Its learning
    rate has followed the schedule to the end, so more steps are a new run from its model."""
    out = Path(settings.out)
    if not is_finished(out):
        return
    original, _ = flags.read(Settings, [str(saved)], "train.py", check=False)
    for name in ("steps", "epochs"):
        value = getattr(settings, name)
        if origins[name] == "flag" and value != getattr(original, name):
            raise UserError(
                f"--resume: {out} is finished, and {flag(name)} was {getattr(original, name)}, now "
                f"{value}; to train its model further: {continuation_command(out)} {flag(name)} "
                f"{value}", FLAGS)


def check_settings(s: Settings) -> None:
    """UserError (FLAGS) for a value out of its bounds, and for a setting that has no effect."""
    skip = NOT_CHECKED_ON_RESUME if s.resume else ()
    flags.check_bounds(s, skip=skip, allow_infinite=s.resume)
    check_combinations(s)
    if s.template_kwargs:
        from tokenization.chat_template import read_template_kwargs

        read_template_kwargs(s.template_kwargs)
    for names, reason in without_effect(s):
        for name in changed_settings(s, names):
            raise UserError(f"{flag(name)}: has no effect {reason}; remove it", FLAGS)


def check_combinations(s: Settings) -> None:
    """UserError (FLAGS) for settings that need another one, or exclude each other."""
    if s.mode != "cpo" and (s.arpo or s.nll_weight != 1):
        raise UserError("--arpo and --nll-weight: have an effect with --mode cpo only; remove them",
                        FLAGS)
    if s.max_epochs_per_source and not s.steps:
        raise UserError("--max-epochs-per-source: has no effect without --steps; give --steps too",
                        FLAGS)
    if s.optimizer == "adamw-bf16" and (s.tune != "full" or s.train_layers):
        raise UserError("--optimizer adamw-bf16: works only where all weights are trained; "
                        "use adamw or adamw8bit", FLAGS)
    part = s.tune != "full" or bool(s.train_layers)
    if s.embedding_lr and part and not s.train_embeddings and not s.resume:
        raise UserError("--embedding-lr: has no effect without --train-embeddings; give that too, "
                        "or remove it", FLAGS)


def without_effect(s: Settings) -> Iterable[tuple[tuple[str, ...], str]]:
    """Settings that have no effect beside the others, each group with the reason."""
    preferences = BIN_KINDS[s.mode] == "pairs"
    if s.tune == "full":
        yield ("lora_layers", "rslora", "dora"), "with --tune full"
    else:
        yield ("train_layers",), f"with --tune {s.tune}"
    if s.tune != "qlora":
        yield ("double_quant",), f"with --tune {s.tune}"
    if s.mode in ("cpt", "mt"):
        yield ("template_kwargs",), f"with --mode {s.mode}"
    if preferences:
        yield ("neftune",), f"with --mode {s.mode}"
    if s.tune == "full" and not s.resume:
        yield LORA, "with --tune full"
    if not preferences and not s.resume:
        yield ("beta",), f"with --mode {s.mode}"
    if s.tune == "full" and not s.train_layers:
        yield ("train_embeddings", "train_norms"), "with --tune full, which trains all weights"


def flag(name: str) -> str:
    """A setting's name as a flag."""
    return f"--{name.replace('_', '-')}"


def changed_settings(s: Settings, names: Iterable[str]) -> list[str]:
    """Those of the named settings whose value is not the default."""
    default = Settings()
    return [name for name in names if getattr(s, name) != getattr(default, name)]


def check_adapter(s: Settings, adapter: dict[str, Any]) -> None:
    """UserError (FLAGS) for a setting that contradicts the adapter that --model names.

    `adapter` is the content of its adapter_config.json. Training goes on with that adapter, so its
    shape cannot be changed.
    """
    saved = adapter.get("modules_to_save", [])
    values = {"lora_rank": adapter["r"], "lora_alpha": adapter["lora_alpha"],
              "lora_dropout": adapter["lora_dropout"], "rslora": adapter["use_rslora"],
              "dora": adapter["use_dora"], "lora_layers": None, "lora_targets": None,
              "train_embeddings": any("embed_tokens" in x for x in saved),
              "train_norms": any("norm" in x for x in saved)}
    for name in changed_settings(s, values):
        if getattr(s, name) != values[name]:
            value = "its own" if values[name] is None else values[name]
            raise UserError(f"{flag(name)}: --model {s.model} is an adapter, which keeps its shape "
                            f"({value}); remove the flag, or give the adapter's base model to "
                            "train a new adapter", FLAGS)
