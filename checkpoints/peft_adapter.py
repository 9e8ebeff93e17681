"""Adapters in PEFT's file format: adapter_config.json and adapter_model.safetensors.

A parameter's name in the model is its name in the file, after `PEFT_PREFIX`. Refused: a value in
adapter_config.json that would change what is computed, a tensor that is missing, unknown or of
another shape, and a base model with other weights than those the adapter was trained on.

A pattern in adapter_config.json is a program from a stranger: Python's `re` needs hours for some.
Patterns are therefore matched by RE2, in time linear in the length of a name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.model_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    read_accompanying_files,
    resolve_model_dir,
    tensor_infos,
)
from checkpoints.model_writer import ModelFolder, write_model_folder
from checkpoints.safetensors_header import open_safetensors, read_header, weights_fingerprint
from lora import EMBEDDINGS, Base, LoRALinear, adapters, add_lora, base_values, layer_of
from model import Llama
from runtime import hub
from runtime.console import UserError
from runtime.model_files import read_model_json
from runtime.strict_json import shorten

MAX_ALPHA = 1_000_000
MAX_LIST = 10_000  # entries of a list in adapter_config.json
PLAIN_NAME = re.compile(r"[\w.-]{1,512}")  # of a module; anything else is a pattern
PEFT_PREFIX = "base_model.model."  # PEFT puts this before the names of the model that it wraps
SUPPORTED_VALUES = {  # values in adapter_config.json that are supported, besides empty ones
    "bias": ["none"],
    "task_type": ["CAUSAL_LM"],
    "init_lora_weights": [True, "gaussian", "orthogonal", "eva"],
    "use_dora": [True],
    "use_rslora": [True],
    "ensure_weight_tying": [True],
    "rank_pattern": [],
    "alpha_pattern": [],
    "layers_pattern": ["layers"],
    "fan_in_fan_out": [],
    "layer_replication": [],
    "lora_bias": [],
    "trainable_token_indices": [],
    "target_parameters": [],
    "exclude_modules": [],
    "alora_invocation_tokens": [],
    "use_qalora": [],
    "megatron_config": [],
}


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors of an adapter, by their names in adapter_model.safetensors."""
    state: dict[str, Tensor] = {}
    for name, layer in adapters(model).items():
        state[f"{PEFT_PREFIX}{name}.lora_A.weight"] = layer.lora_A.weight.detach()
        state[f"{PEFT_PREFIX}{name}.lora_B.weight"] = layer.lora_B.weight.detach()
        if layer.lora_magnitude_vector is not None:
            magnitude = layer.lora_magnitude_vector.detach()
            state[f"{PEFT_PREFIX}{name}.lora_magnitude_vector"] = magnitude
    for name in base_values(model):
        state[PEFT_PREFIX + name] = model.get_parameter(name).detach()
    embeddings = f"{PEFT_PREFIX}model.embed_tokens.weight"
    if embeddings in state and model.lm_head is None:
        state[f"{PEFT_PREFIX}lm_head.weight"] = state[embeddings].clone()  # PEFT stores both
    return state


def adapter_config(model: nn.Module, base: str) -> dict[str, Any]:
    """adapter_config.json of the attached adapter; `base` is the name or path of its base model."""
    layers = adapters(model)
    first = next(iter(layers.values()))
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
            "r": first.rank, "lora_alpha": first.alpha, "lora_dropout": first.dropout,
            "bias": "none", "use_rslora": first.rslora,
            "use_dora": first.lora_magnitude_vector is not None, "inference_mode": True,
            **_target_modules(model, layers), **_modules_to_save(model)}


def _target_modules(model: nn.Module, layers: dict[str, LoRALinear]) -> dict[str, Any]:
    """target_modules and layers_to_transform: short names if they select exactly these layers, or
    else the whole names."""
    short_names = {name.rpartition(".")[2] for name in layers}
    adapted_indices = {layer_of(name) for name in layers}
    all_indices = {layer_of(name) for name, _ in model.named_modules() if layer_of(name) >= 0}
    selected = {name for name, m in model.named_modules() if isinstance(m, Base | LoRALinear)
                and name.rpartition(".")[2] in short_names and layer_of(name) in adapted_indices}
    if selected != set(layers):
        return {"target_modules": sorted(layers)}
    config: dict[str, Any] = {"target_modules": sorted(short_names)}
    if len(adapted_indices) < len(all_indices):
        config["layers_to_transform"] = sorted(adapted_indices)
    return config


def _modules_to_save(model: nn.Module) -> dict[str, Any]:
    """modules_to_save, with short names if these select exactly the modules that are trained."""
    if not base_values(model):
        return {}
    modules = {name.rpartition(".")[0] for name in base_values(model)}
    short_names = {name.rpartition(".")[2] for name in modules}
    selected = {name for name, _ in model.named_modules() if name.endswith(tuple(short_names))}
    # PEFT must be told that a tied head is the embedding, or it keeps the frozen head
    tied = "embed_tokens" in short_names and "lm_head" not in short_names \
        and model.lm_head is None
    return {"modules_to_save": sorted(short_names if selected == modules else modules),
            "ensure_weight_tying": tied}


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Attach the adapter of a folder and load its weights. UserError if it is not supported."""
    file = folder / ADAPTER_CONFIG
    config = read_model_json(folder, ADAPTER_CONFIG)
    _check_supported(config, file)
    _check_values(config, file)
    targets = _read_targets(config, model, file)
    modules_to_save = config.get("modules_to_save") or []
    if getattr(model, "lm_head", None) is None and "lm_head" in modules_to_save:
        if "embed_tokens" not in modules_to_save or not config.get("ensure_weight_tying"):
            raise UserError(f"{file}: modules_to_save has its own lm_head, but the base's lm_head "
                            "is tied to the embeddings; untie the base first")
        modules_to_save = [x for x in modules_to_save if x != "lm_head"]
    layers = config.get("layers_to_transform")
    if layers is None:
        layers = []
    elif type(layers) is int:
        layers = [layers]
    try:
        add_lora(model, config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0), targets,
                 bool(config.get("use_rslora")), bool(config.get("use_dora")), layers,
                 modules_to_save)
    except UserError as e:
        reason = str(e).replace("--lora-", "")
        raise UserError(f"{file}: {reason}; the adapter belongs to another base") from None
    load_adapter_state(model, read_adapter_weights(folder), str(folder))


def read_adapter_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of adapter_model.safetensors by their names, as views of the mapped file.
    UserError if the file is damaged."""
    infos = read_header(folder / ADAPTER_WEIGHTS)
    weights = open_safetensors(folder / ADAPTER_WEIGHTS)
    return {name: weights.get_tensor(name) for name in infos}


def _check_supported(config: dict[str, Any], file: Path) -> None:
    """UserError if adapter_config.json asks for a computation that is not supported."""
    unsupported = [f"{key} {shorten(config[key])}" for key, values in SUPPORTED_VALUES.items()
                   if config.get(key) and not any(_is_same(config[key], x) for x in values)]
    if config.get("peft_type") != "LORA" or unsupported:
        reason = ", ".join(unsupported) or f"peft_type {shorten(config.get('peft_type'))}"
        raise UserError(f"{file}: {reason} is not supported; LoRA, rsLoRA and DoRA are")


def _is_same(x: Any, y: Any) -> bool:
    """Whether two values are equal and of one type: 1 is not true."""
    return type(x) is type(y) and x == y


def _check_values(config: dict[str, Any], file: Path) -> None:
    """UserError unless each value that describes the adapter has its type, and a sensible size."""
    r, alpha, dropout = (config.get("r"), config.get("lora_alpha"),
                         config.get("lora_dropout", 0.0))
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    modules_to_save = config.get("modules_to_save")
    is_alpha = type(alpha) in (int, float) and math.isfinite(alpha) and 0 <= alpha <= MAX_ALPHA
    is_layers = layers is None or type(layers) is int or _is_list_of(int, layers)
    for key, value, valid, expected in (
        ("r", r, type(r) is int and r >= 1, "a whole number of at least 1"),
        ("lora_alpha", alpha, is_alpha, f"a number from 0 to {MAX_ALPHA:,}"),
        ("lora_dropout", dropout, type(dropout) in (int, float) and 0 <= dropout < 1,
         "a number from 0 to below 1"),
        ("target_modules", targets, type(targets) is str or _is_list_of(str, targets),
         "a list of names, or a pattern"),
        ("layers_to_transform", layers, is_layers, "a list of layers"),
        ("modules_to_save", modules_to_save,
         modules_to_save is None or _is_list_of(str, modules_to_save), "a list of names")):
        if not valid:
            raise UserError(f"{file}: {key} is {shorten(value)}, expected {expected}; such values "
                            "do not describe an adapter, download it again")


def _is_list_of(kind: type, x: Any) -> bool:
    """Whether x is a list of `kind`, of at most MAX_LIST entries; a text must be a plain name."""
    if type(x) is not list or len(x) > MAX_LIST or any(type(i) is not kind for i in x):
        return False
    return kind is not str or all(PLAIN_NAME.fullmatch(name) for name in x)


def _read_targets(config: dict[str, Any], model: nn.Module, file: Path) -> list[str]:
    """target_modules as names. A pattern selects the modules whose whole name it matches."""
    targets = config["target_modules"]
    if type(targets) is str and targets != "all-linear" and not PLAIN_NAME.fullmatch(targets):
        if config.get("layers_to_transform") is not None:
            raise UserError(f"{file}: layers_to_transform cannot be used with a pattern in "
                            "target_modules; write the names of the modules as a list")
        modules = [name for name, m in model.named_modules()
                   if isinstance(m, Base | nn.Embedding) or name in EMBEDDINGS]
        targets = _match_names(targets, modules, file)
    elif type(targets) is str:
        targets = [targets]
    if embeddings := [x for x in targets if x.rpartition(".")[2] in EMBEDDINGS]:
        raise UserError(f"{file}: an adapter on {embeddings[0]} is not supported; adapters on "
                        "linear layers and modules_to_save are")
    return targets


def _match_names(pattern: str, names: Sequence[str], file: Path) -> list[str]:
    """The names that a pattern matches as a whole, in time linear in their length (RE2)."""
    import pyarrow
    from pyarrow.compute import match_substring_regex

    try:
        match_substring_regex(pyarrow.array([""]), pattern)  # "a)|(b" is not a pattern
        matched = match_substring_regex(pyarrow.array(names), f"^(?:{pattern})$").to_pylist()
    except pyarrow.ArrowInvalid as e:
        reason = " ".join(str(e).split())[:120]
        raise UserError(f"{file}: target_modules is {shorten(pattern)}, a pattern that cannot be "
                        f"used ({reason}); write the names of the modules as a list") from None
    selected = [name for name, is_match in zip(names, matched, strict=True) if is_match]
    if not selected:
        raise UserError(f"{file}: target_modules is {shorten(pattern)}, a pattern that matches no "
                        "module of the model; the adapter belongs to another base")
    return selected


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Copy tensors with PEFT's names into the attached adapter. UserError, which begins with
    `where`, unless the names and shapes are exactly those of the adapter."""
    wanted = adapter_state(model)
    for name in sorted(wanted.keys() ^ state.keys()):
        fault = "is missing" if name in wanted else "is not one of this model"
        raise UserError(f"{where}: tensor {name} {fault}; the adapter belongs to another base")
    for name, tensor in wanted.items():
        if tensor.shape != state[name].shape:
            raise UserError(f"{where}: {name} is {tuple(state[name].shape)}, expected "
                            f"{tuple(tensor.shape)}; the adapter belongs to another base")
        tensor.copy_(state[name])


def check_adapter_base(folder: Path, base: Path) -> None:
    """UserError if an adapter's file is damaged, or names the fingerprint of another base."""
    read_header(folder / ADAPTER_WEIGHTS)
    metadata = open_safetensors(folder / ADAPTER_WEIGHTS).metadata() or {}
    fingerprint = metadata.get("base")
    if fingerprint is not None and fingerprint != weights_fingerprint(tensor_infos(base)):
        raise UserError(f"{folder}: was trained on other weights than those of {base}, which have "
                        f"the same shapes; name its base in {ADAPTER_CONFIG}")


def save_adapter(model: Llama, folder: Path | str, base: str | Path, source: Path | str) -> None:
    """Write the attached adapter as a PEFT folder; see `adapter_folder`."""
    contents = adapter_folder(model, base, source)
    write_model_folder(contents, adapter_state(model), Path(folder))


def adapter_folder(model: Llama, base: str | Path, source: Path | str) -> ModelFolder:
    """The PEFT folder of the attached adapter, with the tokenizer and other files of `source`.
    Nothing is written.

    adapter_config.json names `base` by hub id and commit if it lies in the hub's cache, or else by
    its absolute path. The fingerprint of the base's weights is stored, so that other weights of the
    same shapes are refused.
    """
    config = adapter_config(model, str(base))
    metadata = {"format": "pt"}
    base_dir = Path(base).expanduser().resolve()
    if base_dir.is_dir():
        repo, commit = hub.source(base_dir)
        config["base_model_name_or_path"] = repo or str(base_dir)
        if commit:
            config["revision"] = commit
        metadata["base"] = weights_fingerprint(tensor_infos(base_dir))
    files = read_accompanying_files(resolve_model_dir(source))
    files[ADAPTER_CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
    dtypes = {name: x.dtype for name, x in adapter_state(model).items()}
    return ModelFolder(files, {ADAPTER_WEIGHTS: dtypes}, metadata)
