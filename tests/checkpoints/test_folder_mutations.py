"""A model's folder from a stranger: each of its files is damaged, or replaced by something that is
not a file. Whatever is done to it, it is opened or refused in one line, at once."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch

import lora
from checkpoints.huggingface import load_model
from checkpoints.model_folder import (
    base_model_dir,
    read_accompanying_files,
    stop_ids,
    weights_fingerprints,
)
from checkpoints.peft_adapter import save_adapter
from helpers import tiny
from helpers.mutations import ODD, damage_bytes, damage_json
from inference.prompt_format import PromptFormat
from reports.model_card import read_card, read_merge_record
from runtime.console import UserError

SECONDS = 5  # that opening a tiny folder may take
MEGABYTES = 600  # that opening all damaged folders may add to the peak memory
N_LONG = 300  # mutations of each file
VALUES = [*ODD, "../base", "/etc", "~nobody/x", "a" * 5000, "a\0b", "a/b", "a/b@c", "(a+)+$",
          "(?!x)a", ".*", ".*q_proj", "all-linear", "[", -0.0, 1e30, 1e-30, 1e-320, 3e38, 10**9,
          ["q_proj", "embed_tokens"], ["x"] * 1000, {"a": 1}, ["../x.safetensors"],
          "../x.safetensors", "/dev/zero", "model.safetensors", "yarn", "dynamic", "linear",
          {"rope_type": "yarn", "factor": 1e30}, {"rope_type": "llama3", "factor": 8,
                                                  "low_freq_factor": 4, "high_freq_factor": 4},
          {"type": "dynamic", "factor": 1e-9}, "{text}", "<s>", "</s>", [0, 1, 2], [1e9]]


def make_folders(root: Path) -> dict[str, Path]:
    """A sharded model with every side file, one with a tokenizer.json, and an adapter on the
    first."""
    base = tiny.folder(root / "base", "llama31", sharded=True)
    json_base = tiny.bytewise_folder(root / "json", ["<s>", "</s>", "<unk>"])
    for folder in (base, json_base):
        (folder / "special_tokens_map.json").write_text(json.dumps(
            {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}))
        (folder / "chat_template.jinja").write_text(
            "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}")
        (folder / "prompt.json").write_text(json.dumps(
            {"translate": [{"name": "a", "text": "{source} {target} {text}", "as_chat": False,
                            "languages": {"eng": "English", "kin": "Kinyarwanda"}}],
             "template_kwargs": {"enable_thinking": False}}))
        (folder / "merge.json").write_text(json.dumps({"merges": [{"merged_adapter": "a"}]}))
        (folder / "README.md").write_text("---\nlicense: mit\n---\n")
        (folder / "LICENSE").write_text("MIT License")
    (json_base / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "<s>", "eos_token": "</s>", "model_max_length": 10**30}))
    model, _ = load_model(base)
    lora.add_lora(model, 2, 4.0, 0.0, ["q_proj", "down_proj"])
    save_adapter(model, root / "adapter", base=base, source=base)
    config_file = root / "adapter" / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "base_model_name_or_path": "../base",
                                       "layers_to_transform": [0, 1], "modules_to_save": None}))
    return {"base": base, "json": json_base, "adapter": root / "adapter"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("folders"))


def open_everything(folder: Path) -> None:
    """Open and use every file of a model's folder."""
    model, tokenizer = load_model(folder)
    with torch.no_grad():
        tiny.logits(model, tiny.tokens(1, 8) % model.config.vocab_size)
    stop_ids(folder, tokenizer)
    weights_fingerprints(folder)
    places = [folder, base_model_dir(folder)]
    PromptFormat.load_all(places, tokenizer)
    PromptFormat.load(places, tokenizer, "eng-kin").translation.fill("a", "eng-kin")
    read_merge_record(folder)
    read_card(folder)
    read_accompanying_files(folder)
    text = "Amazi y'umugezi 🦒 </s>\n"
    tokenizer.decode(tokenizer.document(text))


def is_opened(folder: Path) -> bool:
    """Whether a folder is opened (True) or refused in one line (False), within SECONDS."""
    begin = time.perf_counter()
    try:
        open_everything(folder)
        return True
    except UserError as e:
        assert "\n" not in str(e) and len(str(e)) < 1000, str(e)
        return False
    finally:
        assert time.perf_counter() - begin < SECONDS


FILES = {
    "base": ["config.json", "generation_config.json", "model.safetensors.index.json",
             "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "prompt.json",
             "merge.json", "chat_template.jinja", "README.md", "LICENSE"],
    "json": ["tokenizer.json"],
    "adapter": ["adapter_config.json", "adapter_model.safetensors"]}
CASES = [(folder, file) for folder, files in FILES.items() for file in files]


@pytest.mark.parametrize("n", [8, pytest.param(N_LONG, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name, file", CASES, ids=[file for _, file in CASES])
def test_a_damaged_file_is_used_or_refused_in_one_line(folders, tmp_path, name, file, n):
    for folder in (folders["base"], folders[name]):
        shutil.copytree(folder, tmp_path / folder.name, dirs_exist_ok=True)
    content = (folders[name] / file).read_bytes()
    draw = random.Random(f"{file} {n}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(n):
        if file.endswith(".json"):
            damaged = damage_json(content, draw, VALUES)
        else:
            damaged = damage_bytes(content, draw)
        (tmp_path / name / file).write_bytes(damaged)
        is_opened(tmp_path / name)
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    assert added < MEGABYTES


def put_entry(path: Path, kind: str) -> None:
    """Put something that is not a regular file of the folder at `path`."""
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(path.name)  # a socket's path has at most 108 bytes
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(kind)


@pytest.mark.parametrize("kind", ["FIFO", "socket", "folder", "/dev/zero", "/dev/stdin",
                                  "/proc/self/mem", "nowhere"])
def test_what_is_not_a_file_is_refused_at_once_in_every_place(folders, tmp_path, monkeypatch, kind):
    for folder in folders.values():
        shutil.copytree(folder, tmp_path / folder.name)
    shard = min(folders["base"].glob("model-*.safetensors")).name
    for name, file in [*CASES, ("base", shard), ("json", "model.safetensors")]:
        path = tmp_path / name / file
        path.unlink()
        monkeypatch.chdir(path.parent)
        put_entry(path, kind)
        is_ignored = kind == "folder" and file == "LICENSE"  # a folder of licences is common
        assert is_opened(tmp_path / name) == is_ignored, file
        path.rmdir() if kind == "folder" else path.unlink()
        shutil.copyfile(folders[name] / file, path)

    assert is_opened(tmp_path / "base")


def test_entries_that_are_not_needed_are_ignored_whatever_they_are(folders, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(folders["base"], tmp_path / "base"))
    monkeypatch.chdir(folder)
    for kind in ("FIFO", "socket", "folder", "/dev/zero"):
        put_entry(folder / f"other-{kind.strip('/').replace('/', '-')}.json", kind)
    assert is_opened(folder)


def test_side_files_with_links_within_the_folder_are_used(folders, tmp_path):
    folder = Path(shutil.copytree(folders["base"], tmp_path / "base"))
    for file in ("tokenizer.model", "LICENSE", "config.json", "prompt.json"):
        (folder / file).rename(folder / f"real-{file}")
        (folder / file).symlink_to(f"real-{file}")
    assert is_opened(folder)
