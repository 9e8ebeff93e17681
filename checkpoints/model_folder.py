"""The folder of a model: where it is, what stands in it besides weights, which files go with it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoints.safetensors_header import INDEX, SINGLE, Slot, contents, header, inside, mark
from layers import config as families
from layers.config import ModelConfig
from runtime import hub
from runtime.console import UserError
from runtime.strict_json import read_json
from tokenization.tokenizer import Tokenizer

CONFIG = "config.json"
ADAPTER_CONFIG, ADAPTER, MERGED = "adapter_config.json", "adapter_model.safetensors", "merge.json"
CARRIED = ("generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
           "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
           "chat_template.json", "prompt.json", MERGED, "LICENSE*", "NOTICE*",
           "USE_POLICY*")  # go with a model
MODEL_FILES = (CONFIG, ADAPTER_CONFIG, SINGLE, INDEX, "model-*-of-*.safetensors", ADAPTER, *CARRIED)


def find(name: str | Path, files: Sequence[str] = MODEL_FILES) -> Path:
    """The folder of a model: a folder, a run's folder, or a hub id `org/name[@revision]`, of which
    `files` are fetched.

    A folder that is here never touches the network. UserError when there is no such model.
    """
    folder = Path(name).expanduser()
    if str(name) and folder.is_dir():
        for place in (folder, folder / "model"):
            if (place / CONFIG).exists() or (place / ADAPTER_CONFIG).exists():
                return place
        raise UserError(f"{folder}: no config.json here; name a folder in Hugging Face's layout")
    hub_id = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", str(name))
    if hub_id is None or folder.exists():
        raise UserError(f"model {str(name)!r}: no such folder, and no hub id (org/name@revision)")
    if hub_id[2] is None and folder.parent.is_dir():
        raise UserError(f"model {name!r}: not in {folder.parent}; for the hub's write {name}@main")
    return hub.snapshot(hub_id[1], hub_id[2], files)


def base_of(folder: Path, files: Sequence[str] = MODEL_FILES) -> Path:
    """The model's folder that an adapter's folder belongs on; any other folder is its own."""
    if not (folder / ADAPTER_CONFIG).exists():
        return folder
    words = read_json(inside(folder, ADAPTER_CONFIG))
    name, revision = str(words.get("base_model_name_or_path") or ""), words.get("revision")
    if not Path(name).is_dir() and (folder / name).is_dir():
        name = folder / name
    elif type(revision) is str and not Path(name).is_dir():
        name = f"{name}@{revision}"
    try:
        base = find(name, files)
    except UserError as e:
        raise UserError(f"{folder / ADAPTER_CONFIG}: base_model_name_or_path: {e}") from None
    if (base / ADAPTER_CONFIG).exists():
        raise UserError(f"{folder}: its base {base} is an adapter itself; merge that one first")
    return base


def marks(folder: Path) -> list[str]:
    """By which the weights of a folder are known again: the model's, and an adapter's."""
    base = base_of(folder)
    adapter = [header(inside(folder, ADAPTER))] if folder != base else []
    return list(map(mark, (tensors(base), *adapter)))


def read_config(folder: Path) -> ModelConfig:
    """The shape of the model in a folder; UserError on what would be computed wrongly."""
    words = read_json(inside(folder, CONFIG))
    try:
        return ModelConfig.from_hf(words)
    except UserError as e:
        raise UserError(f"{folder}/{e}") from None


def tensors(folder: Path) -> dict[str, Slot]:
    """`contents` under our names: of a model that also sees pictures, the text part alone."""
    found, words = contents(folder), read_json(inside(folder, CONFIG))
    if families.text_words(words) is words:
        return found
    return {own: slot for k, slot in found.items() if (own := families.text_name(k)) is not None}


def stop_ids(folder: Path, tokenizer: Tokenizer) -> set[int]:
    """Ids that end an answer: the tokenizer's EOS, and what the folder's files name besides."""
    named, file = named_stops(folder)
    if odd := [x for x in named if type(x) is not int or not 0 <= x < tokenizer.vocab_size]:
        raise UserError(f"{file}: eos_token_id {odd[0]!r} is no id of the tokenizer, "
                        f"which has {tokenizer.vocab_size}")
    return {*named} | ({tokenizer.eos} - {None})


def named_stops(folder: Path) -> tuple[list[Any], Path | None]:
    """eos_token_id, at which other programs stop, and the file that says it: config.json where
    generation_config.json does not.

    A chat model ends a turn with another id than a document; a file may name one, or a list.
    """
    base = base_of(folder)
    for place, name in ((folder, CARRIED[0]), (base, CARRIED[0]), (base, CONFIG)):
        if (place / name).exists():
            found = read_json(inside(place, name)).get("eos_token_id")
            if found is not None:
                return found if type(found) is list else [found], place / name
    return [], None


def add_stop_id(folder: Path, end: int) -> None:
    """Have other programs end an answer at `end` as well."""
    file = folder / CARRIED[0]
    words = read_json(file) if file.exists() else {}
    stops, _ = named_stops(folder)
    if end not in stops:
        text = json.dumps({**words, "eos_token_id": [*stops, end]}, indent=2)
        file.write_text(text + "\n", encoding="utf-8")


def carry(like: Path, aside: Path) -> None:
    """Copy what goes with a model besides its weights."""
    for file in [file for pattern in CARRIED for file in like.glob(pattern)]:
        shutil.copyfile(inside(like, file.name), aside / file.name)
