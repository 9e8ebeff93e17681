"""Adapters in PEFT's file format: adapter_config.json and adapter_model.safetensors.

A parameter's name in the model is its name in the file, after `PEFT_PREFIX`. Refused: a value in
adapter_config.json that would change what is computed, a tensor that is missing, unknown or of
another shape, and a base model with other weights than those the adapter was trained on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from checkpoints.atomic_write import replace_folder
from checkpoints.model_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MODEL_FILES,
    copy_model_files,
    resolve_model_dir,
    tensor_infos,
)
from checkpoints.safetensors_header import read_header, resolve_inside, weights_fingerprint
from lora import EMBEDDINGS, Base, LoRALinear, adapters, add_lora, base_values, layer_of
from model import Llama
from runtime import hub
from runtime.console import UserError
from runtime.distributed import full_tensor

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
    config = json.loads(file.read_text(encoding="utf-8"))
    _check_supported(config, file)
    targets, layers, modules_to_save = _read_lists(config, file)
    if getattr(model, "lm_head", None) is None and "lm_head" in modules_to_save:
        if "embed_tokens" not in modules_to_save or not config.get("ensure_weight_tying"):
            raise UserError(f"{file}: modules_to_save has its own lm_head, but the base's lm_head "
                            "is tied to the embeddings; untie the base first")
        modules_to_save = [x for x in modules_to_save if x != "lm_head"]
    try:
        add_lora(model, config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0), targets,
               bool(config.get("use_rslora")), bool(config.get("use_dora")), layers,
               modules_to_save)
    except UserError as e:
        reason = str(e).replace("--lora-", "")
        raise UserError(f"{file}: {reason}; the adapter belongs to another base") from None
    try:
        state = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError, RuntimeError) as e:
        raise UserError(f"{folder / ADAPTER_WEIGHTS}: cannot be read ({e})") from None
    load_adapter_state(model, state, str(folder))


def _check_supported(config: dict[str, Any], file: Path) -> None:
    """UserError if adapter_config.json asks for a computation that is not supported."""
    unsupported = [f"{key} {config[key]!r}" for key, values in SUPPORTED_VALUES.items()
                   if config.get(key) and config[key] not in values]
    if config.get("peft_type") != "LORA" or unsupported:
        raise UserError(f"{file}: {', '.join(unsupported) or config.get('peft_type')} is not "
                        "supported; LoRA, rsLoRA and DoRA are")


def _read_lists(config: dict[str, Any], file: Path) -> tuple[list[str], list[int], list[str]]:
    """target_modules, layers_to_transform and modules_to_save, after all types are checked."""
    r, alpha, dropout = (config.get("r"), config.get("lora_alpha"),
                         config.get("lora_dropout", 0.0))
    targets, layers = config.get("target_modules"), config.get("layers_to_transform") or []
    modules_to_save = config.get("modules_to_save") or []
    if isinstance(targets, str):
        targets = [targets]
    if type(layers) is int:
        layers = [layers]
    valid = (type(r) is int and r >= 1 and type(alpha) in (int, float)
             and type(dropout) in (int, float) and 0 <= dropout < 1
             and _is_list_of(str, targets) and _is_list_of(int, layers)
             and _is_list_of(str, modules_to_save))
    if not valid:
        raise UserError(f"{file}: r {r!r}, lora_alpha {alpha!r}, lora_dropout {dropout!r}, "
                        f"target_modules {targets!r}, layers_to_transform {layers!r}, "
                        f"modules_to_save {modules_to_save!r} do not describe an adapter; "
                        "download it again")
    if embeddings := [x for x in targets if x in EMBEDDINGS]:
        raise UserError(f"{file}: an adapter on {embeddings[0]} is not supported; adapters on "
                        "linear layers and modules_to_save are")
    return targets, layers, modules_to_save


def _is_list_of(kind: type, x: Any) -> bool:
    return isinstance(x, list) and all(type(i) is kind for i in x)


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
    read_header(resolve_inside(folder, ADAPTER_WEIGHTS))
    metadata = safe_open(folder / ADAPTER_WEIGHTS, "pt").metadata() or {}
    fingerprint = metadata.get("base")
    if fingerprint is not None and fingerprint != weights_fingerprint(tensor_infos(base)):
        raise UserError(f"{folder}: was trained on other weights than those of {base}, which have "
                        f"the same shapes; name its base in {ADAPTER_CONFIG}")


def save_adapter(model: Llama, folder: Path | str, base: str | Path, source: Path | str) -> None:
    """Write the attached adapter as a PEFT folder, with the tokenizer and other files of `source`.

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
    with replace_folder(Path(folder), (*MODEL_FILES, "README.md")) as out:
        text = json.dumps(config, indent=2) + "\n"
        (out / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
        copy_model_files(resolve_model_dir(source), out)
        state = {k: full_tensor(x).cpu().contiguous() for k, x in adapter_state(model).items()}
        save_file(state, out / ADAPTER_WEIGHTS, metadata=metadata)
