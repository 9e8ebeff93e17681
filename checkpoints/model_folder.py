"""Model folders in Hugging Face's layout: finding them, and their files apart from the weights.

A model is a folder, a run's folder, or a hub id. An adapter's folder leads to its base model. Files
are only read inside the model's folder.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoints.safetensors_header import (
    INDEX_FILE,
    WEIGHTS_FILE,
    TensorInfo,
    read_header,
    read_headers,
    resolve_inside,
    weights_fingerprint,
)
from layers import config as families
from layers.config import ModelConfig
from runtime import hub
from runtime.console import UserError
from runtime.strict_json import read_json
from tokenization.tokenizer import Tokenizer

CONFIG_FILE = "config.json"
GENERATION_CONFIG = "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MERGE_RECORD = "merge.json"  # which adapters were merged into the model
COPIED_FILES = (  # files that are copied with a model, beside config and weights
    GENERATION_CONFIG, "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "prompt.json", MERGE_RECORD, "LICENSE*", "NOTICE*", "USE_POLICY*")
MODEL_FILES = (CONFIG_FILE, ADAPTER_CONFIG, WEIGHTS_FILE, INDEX_FILE, "model-*-of-*.safetensors",
               ADAPTER_WEIGHTS, *COPIED_FILES)


def resolve_model_dir(name: str | Path, files: Sequence[str] = MODEL_FILES) -> Path:
    """The folder of a model: a model's folder, a run's folder, or a hub id `org/name[@revision]`.

    Only `files` of a hub model are downloaded. A local folder never uses the network. UserError if
    there is no such model.
    """
    folder = Path(name).expanduser()
    if str(name) and folder.is_dir():
        for candidate in (folder, folder / "model"):
            if (candidate / CONFIG_FILE).exists() or (candidate / ADAPTER_CONFIG).exists():
                return candidate
        raise UserError(f"{folder}: no config.json here; name a folder in Hugging Face's layout")
    hub_id = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", str(name))
    if hub_id is None or folder.exists():
        raise UserError(f"model {str(name)!r}: no such folder, and not a hub id "
                        "(org/name@revision)")
    if hub_id[2] is None and folder.parent.is_dir():
        raise UserError(f"model {name!r}: not in {folder.parent}; to download it from the hub, "
                        f"write {name}@main")
    return hub.snapshot(hub_id[1], hub_id[2], files)


def base_model_dir(folder: Path, files: Sequence[str] = MODEL_FILES) -> Path:
    """The folder of an adapter's base model; a folder that is not an adapter is returned as it
    is."""
    if not (folder / ADAPTER_CONFIG).exists():
        return folder
    config = read_json(resolve_inside(folder, ADAPTER_CONFIG))
    name: str | Path = str(config.get("base_model_name_or_path") or "")
    revision = config.get("revision")
    if not Path(name).is_dir() and (folder / name).is_dir():
        name = folder / name
    elif type(revision) is str and not Path(name).is_dir():
        name = f"{name}@{revision}"
    try:
        base = resolve_model_dir(name, files)
    except UserError as e:
        raise UserError(f"{folder / ADAPTER_CONFIG}: base_model_name_or_path: {e}") from None
    if (base / ADAPTER_CONFIG).exists():
        raise UserError(f"{folder}: its base {base} is an adapter itself; merge that one first")
    return base


def weights_fingerprints(folder: Path) -> list[str]:
    """The fingerprint of the model's weights and, for an adapter, that of the adapter."""
    base = base_model_dir(folder)
    fingerprints = [weights_fingerprint(tensor_infos(base))]
    if folder != base:
        adapter = read_header(resolve_inside(folder, ADAPTER_WEIGHTS))
        fingerprints.append(weights_fingerprint(adapter))
    return fingerprints


def read_config(folder: Path) -> ModelConfig:
    """The ModelConfig of a folder. UserError if its model is not supported."""
    config = read_json(resolve_inside(folder, CONFIG_FILE))
    try:
        return ModelConfig.from_hf(config)
    except UserError as e:
        raise UserError(f"{folder}/{e}") from None


def tensor_infos(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a model, by our names; only the text part of a vision-language model."""
    infos = read_headers(folder)
    config = read_json(resolve_inside(folder, CONFIG_FILE))
    if families.text_words(config) is config:
        return infos
    by_our_name = {}
    for name, info in infos.items():
        ours = families.text_name(name)
        if ours is not None:
            by_our_name[ours] = info
    return by_our_name


def stop_ids(folder: Path, tokenizer: Tokenizer) -> set[int]:
    """Token ids that end an answer: the tokenizer's EOS, and those that the folder's files name."""
    ids, file = configured_stop_ids(folder)
    if bad := [x for x in ids if type(x) is not int or not 0 <= x < tokenizer.vocab_size]:
        raise UserError(f"{file}: eos_token_id {bad[0]!r} is not an id of the tokenizer, which has "
                        f"{tokenizer.vocab_size}; correct it there")
    stops = set(ids)
    if tokenizer.eos is not None:
        stops.add(tokenizer.eos)
    return stops


def configured_stop_ids(folder: Path) -> tuple[list[Any], Path | None]:
    """eos_token_id as a list, not yet checked, and the file that gives it: generation_config.json,
    or else config.json.

    A chat model often ends a turn with another id than a document. The files hold one id or a list.
    """
    base = base_model_dir(folder)
    for file in (folder / GENERATION_CONFIG, base / GENERATION_CONFIG, base / CONFIG_FILE):
        if file.exists():
            ids = read_json(resolve_inside(file.parent, file.name)).get("eos_token_id")
            if ids is not None:
                return (ids if type(ids) is list else [ids]), file
    return [], None


def add_stop_id(folder: Path, stop_id: int) -> None:
    """Add an id to eos_token_id in generation_config.json, so that other programs stop there too.
    """
    file = folder / GENERATION_CONFIG
    config = read_json(file) if file.exists() else {}
    stops, _ = configured_stop_ids(folder)
    if stop_id not in stops:
        text = json.dumps({**config, "eos_token_id": [*stops, stop_id]}, indent=2)
        file.write_text(text + "\n", encoding="utf-8")


def copy_model_files(source: Path, target: Path) -> None:
    """Copy the files that accompany a model's weights (COPIED_FILES)."""
    for pattern in COPIED_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(resolve_inside(source, file.name), target / file.name)
