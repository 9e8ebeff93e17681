"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from checkpoints.atomic_write import aside
from checkpoints.model_folder import ADAPTER, ADAPTER_CONFIG, MODEL_FILES, carry, find, tensors
from checkpoints.safetensors_header import header, inside, mark
from lora import EMBEDDINGS, Base, LoRALinear, adapters, attach, layer_of, trained_whole
from model import Llama
from runtime import hub
from runtime.console import UserError
from runtime.distributed import whole

PREFIX = "base_model.model."  # what PEFT puts before the names of the model it wraps
PLAIN = {  # what adapter_config.json may say besides nothing: all else changes what is computed
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
    """The trained tensors under PEFT's names: what adapter_model.safetensors holds."""
    state = {f"{PREFIX}{name}.lora_{x}.weight": getattr(m, f"lora_{x}").weight.detach()
             for name, m in adapters(model).items() for x in "AB"}
    state |= {f"{PREFIX}{name}.lora_magnitude_vector": m.lora_magnitude_vector.detach()
              for name, m in adapters(model).items() if m.lora_magnitude_vector is not None}
    state |= {PREFIX + name: model.get_parameter(name).detach() for name in trained_whole(model)}
    if (tied := f"{PREFIX}model.embed_tokens.weight") in state and model.lm_head is None:
        state[f"{PREFIX}lm_head.weight"] = state[tied].clone()  # PEFT wants the tied head too
    return state


def adapter_config(model: nn.Module, base: str) -> dict[str, Any]:
    """adapter_config.json for the attached adapter, on the base of that name or path."""
    found, whole = adapters(model), trained_whole(model)
    one = next(iter(found.values()))
    everywhere = {layer_of(name) for name, m in model.named_modules() if layer_of(name) >= 0}
    layers = sorted({layer_of(name) for name in found})
    words = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
             "r": one.rank, "lora_alpha": one.alpha, "lora_dropout": one.dropout, "bias": "none",
             "use_rslora": one.rslora, "use_dora": one.lora_magnitude_vector is not None,
             "inference_mode": True}
    ends = {name.rpartition(".")[2] for name in found}
    meant = {name for name, m in model.named_modules() if isinstance(m, Base | LoRALinear)
             and name.rpartition(".")[2] in ends and layer_of(name) in layers}
    words["target_modules"] = sorted(ends if meant == set(found) else found)
    if len(layers) < len(everywhere) and meant == set(found):
        words["layers_to_transform"] = layers
    if whole:
        modules = {name.rpartition(".")[0] for name in whole}
        names = {name.rpartition(".")[2] for name in modules}
        meant = {name for name, _ in model.named_modules() if name.endswith(tuple(names))}
        words["modules_to_save"] = sorted(names if meant == modules else modules)
        # a tied head is the embedding: PEFT must be told, or it keeps the frozen one
        words["ensure_weight_tying"] = "embed_tokens" in names and "lm_head" not in names \
            and model.lm_head is None
    return words


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Attach the PEFT adapter in a folder, with its weights; UserError on what would be computed
    otherwise."""

    where = folder / "adapter_config.json"
    words = json.loads(where.read_text(encoding="utf-8"))
    odd = [f"{k} {words[k]!r}" for k, plain in PLAIN.items()
           if words.get(k) and words[k] not in plain]
    if words.get("peft_type") != "LORA" or odd:
        raise UserError(f"{where}: {', '.join(odd) or words.get('peft_type')} is not supported; "
                        "LoRA, rsLoRA and DoRA are")
    r, alpha, dropout = words.get("r"), words.get("lora_alpha"), words.get("lora_dropout", 0.0)
    targets, layers = words.get("target_modules"), words.get("layers_to_transform") or []
    whole = words.get("modules_to_save") or []
    targets = [targets] if isinstance(targets, str) else targets
    layers = [layers] if type(layers) is int else layers
    if (type(r) is not int or r < 1 or type(alpha) not in (int, float)
            or not _list_of(str, targets) or not _list_of(int, layers) or not _list_of(str, whole)
            or type(dropout) not in (int, float) or not 0 <= dropout < 1):
        raise UserError(f"{where}: r {r!r}, lora_alpha {alpha!r}, lora_dropout {dropout!r}, "
                        f"target_modules {targets!r}, layers_to_transform {layers!r}, "
                        f"modules_to_save {whole!r} do not describe an adapter; fetch it again")
    if odd := [x for x in targets if x in EMBEDDINGS]:
        raise UserError(f"{where}: {odd[0]} has an adapter, which is not supported; the linear "
                        "layers' are, and modules_to_save")
    if getattr(model, "lm_head", None) is None and "lm_head" in whole:
        if "embed_tokens" not in whole or not words.get("ensure_weight_tying"):
            raise UserError(f"{where}: modules_to_save has lm_head of its own, but the base's is "
                            "tied to its embeddings; untie the base first")
        whole = [x for x in whole if x != "lm_head"]
    try:
        attach(model, r, alpha, dropout, targets, bool(words.get("use_rslora")),
               bool(words.get("use_dora")), layers, whole)
    except UserError as e:
        said = str(e).replace("--lora-", "")
        raise UserError(f"{where}: {said}; the adapter belongs to another base") from None
    try:
        found = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, RuntimeError) as e:
        raise UserError(f"{folder}/adapter_model.safetensors: cannot be read ({e})") from None
    fill(model, found, str(folder))


def _list_of(kind: type, x: Any) -> bool:
    return isinstance(x, list) and all(type(i) is kind for i in x)


@torch.no_grad()
def fill(model: nn.Module, found: dict[str, Tensor], where: str) -> None:
    """Copy tensors under PEFT's names into the attached adapter; each exactly once, of the right
    shape."""
    wanted = adapter_state(model)
    for name in sorted(wanted.keys() ^ found.keys()):
        raise UserError(f"{where}: tensor {name} is "
                        f"{'missing' if name in wanted else 'not one of this model'}; the "
                        "adapter belongs to another base")
    for name, tensor in wanted.items():
        if tensor.shape != found[name].shape:
            raise UserError(
                f"{where}: {name} is {tuple(found[name].shape)}, expected {tuple(tensor.shape)}; "
                f"the "
                "adapter belongs to another base")
        tensor.copy_(found[name])


def check_base(folder: Path, base: Path) -> None:
    """UserError if an adapter's file is damaged, or says that it was trained on other weights."""
    header(inside(folder, ADAPTER))
    told = (safe_open(folder / ADAPTER, "pt").metadata() or {}).get("base")
    if told is not None and told != mark(tensors(base)):
        raise UserError(f"{folder}: was trained on other weights than those of {base}, which have "
                        f"the same shapes; name its base in {ADAPTER_CONFIG}")


def save_adapter(model: Llama, folder: Path | str, base: str | Path, like: Path | str) -> None:
    """Write the attached adapter as a PEFT folder, with the tokenizer of `like`; it goes on `base`.

    A base in the hub's cache is named by its id and commit, another folder by its whole path; its
    mark goes with the adapter, so that other weights of that shape are not taken for it.
    """
    words, about = adapter_config(model, str(base)), {"format": "pt"}
    if (there := Path(base).expanduser().resolve()).is_dir():
        repo, commit = hub.source(there)
        words["base_model_name_or_path"] = repo or str(there)
        words |= {"revision": commit} if commit else {}
        about["base"] = mark(tensors(there))
    with aside(Path(folder), (*MODEL_FILES, "README.md")) as new:
        (new / ADAPTER_CONFIG).write_text(json.dumps(words, indent=2) + "\n", encoding="utf-8")
        carry(find(like), new)
        state = {k: whole(x).cpu().contiguous() for k, x in adapter_state(model).items()}
        save_file(state, new / ADAPTER, metadata=about)
