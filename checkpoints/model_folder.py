"""Model folders in Hugging Face's layout: finding them, and their files apart from the weights.

A model is a folder, a run's folder, or a hub id. An adapter's folder leads to its base model. Files
are only read inside the model's folder.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoints.safetensors_header import (
    INDEX_FILE,
    WEIGHTS_FILE,
    TensorInfo,
    read_header,
    read_headers,
    weights_fingerprint,
)
from layers.config import ModelConfig, text_config, text_tensor_name
from runtime import hub
from runtime.console import UserError
from runtime.model_files import (
    has_model_file,
    read_model_file,
    read_model_json,
    read_model_json_if_present,
)
from runtime.strict_json import shorten
from tokenization.tokenizer import Tokenizer

CONFIG_FILE = "config.json"
GENERATION_CONFIG = "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MAX_NAME_CHARS = 4096  # of a base model: the longest path of a file system
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
    folder = Path(os.path.expanduser(name))
    if str(name) and os.path.isdir(folder):
        for candidate in (folder, folder / "model"):
            if has_model_file(candidate, CONFIG_FILE) or has_model_file(candidate, ADAPTER_CONFIG):
                return candidate
        raise UserError(f"{folder}: no config.json here; name a folder in Hugging Face's layout")
    hub_id = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", str(name))
    if hub_id is None or os.path.lexists(folder):
        raise UserError(f"model {shorten(str(name))}: no such folder, and not a hub id "
                        "(org/name@revision)")
    if hub_id[2] is None and os.path.isdir(folder.parent):
        raise UserError(f"model {name!r}: not in {folder.parent}; to download it from the hub, "
                        f"write {name}@main")
    return hub.snapshot(hub_id[1], hub_id[2], files)


def base_model_dir(folder: Path, files: Sequence[str] = MODEL_FILES) -> Path:
    """The folder of an adapter's base model; a folder that is not an adapter is returned as it
    is."""
    if not has_model_file(folder, ADAPTER_CONFIG):
        return folder
    config = read_model_json(folder, ADAPTER_CONFIG)
    name: str | Path = _text_of(config, "base_model_name_or_path", folder)
    revision = _text_of(config, "revision", folder)
    if name and not os.path.isdir(name) and os.path.isdir(folder / name):
        name = folder / name
    elif revision and not os.path.isdir(name):
        name = f"{name}@{revision}"
    try:
        base = resolve_model_dir(name, files)
    except UserError as e:
        raise UserError(f"{folder / ADAPTER_CONFIG}: base_model_name_or_path: {e}") from None
    if has_model_file(base, ADAPTER_CONFIG):
        raise UserError(f"{folder}: its base {base} is an adapter itself; merge that one first")
    return base


def _text_of(config: dict[str, Any], key: str, folder: Path) -> str:
    """The text under a key of adapter_config.json, on one line; "" if it is null or missing."""
    value = config.get(key)
    if value is None:
        return ""
    if type(value) is not str or not value.isprintable() or len(value) > MAX_NAME_CHARS:
        raise UserError(f"{folder / ADAPTER_CONFIG}: {key} is {shorten(value)}, expected a name of "
                        f"at most {MAX_NAME_CHARS} characters")
    return value


def weights_fingerprints(folder: Path) -> list[str]:
    """The fingerprint of the model's weights and, for an adapter, that of the adapter."""
    base = base_model_dir(folder)
    fingerprints = [weights_fingerprint(tensor_infos(base))]
    if folder != base:
        adapter = read_header(folder / ADAPTER_WEIGHTS)
        fingerprints.append(weights_fingerprint(adapter))
    return fingerprints


def read_config(folder: Path) -> ModelConfig:
    """The ModelConfig of a folder. UserError if its model is not supported."""
    config = read_model_json(folder, CONFIG_FILE)
    try:
        return ModelConfig.from_hf(config)
    except UserError as e:
        raise UserError(f"{folder}/{e}") from None


def tensor_infos(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a model, by our names; only the text part of a vision-language model."""
    infos = read_headers(folder)
    config = read_model_json(folder, CONFIG_FILE)
    if text_config(config) is config:
        return infos
    by_our_name = {}
    for name, info in infos.items():
        ours = text_tensor_name(name)
        if ours is not None:
            by_our_name[ours] = info
    return by_our_name


def stop_ids(folder: Path, tokenizer: Tokenizer) -> set[int]:
    """Token ids that end an answer: the tokenizer's EOS, and those that the folder's files name."""
    ids, file = configured_stop_ids(folder)
    if bad := [x for x in ids if type(x) is not int or not 0 <= x < tokenizer.vocab_size]:
        raise UserError(f"{file}: eos_token_id {shorten(bad[0])} is not an id of the tokenizer, "
                        f"which has {tokenizer.vocab_size}; correct it there")
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
    for place, file in ((folder, GENERATION_CONFIG), (base, GENERATION_CONFIG),
                        (base, CONFIG_FILE)):
        ids = read_model_json_if_present(place, file).get("eos_token_id")
        if ids is not None:
            return (ids if type(ids) is list else [ids]), place / file
    return [], None


def add_stop_id(folder: Path, stop_id: int) -> None:
    """Add an id to eos_token_id in generation_config.json, so that other programs stop there too.
    """
    config = read_model_json_if_present(folder, GENERATION_CONFIG)
    stops, _ = configured_stop_ids(folder)
    if stop_id not in stops:
        text = json.dumps({**config, "eos_token_id": [*stops, stop_id]}, indent=2)
        (folder / GENERATION_CONFIG).write_text(text + "\n", encoding="utf-8")


def read_accompanying_files(folder: Path) -> dict[str, bytes]:
    """The files that accompany a model's weights (COPIED_FILES), by name. A link becomes the
    content of its file; a folder whose name matches, such as LICENSES, is left out."""
    files = {}
    for pattern in COPIED_FILES:
        for file in sorted(folder.glob(pattern)):
            if "*" not in pattern or not file.is_dir():
                files[file.name] = read_model_file(folder, file.name)
    return files
