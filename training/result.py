"""The model folder that a run will write, prepared and rehearsed before step 1.

A run may train for days, so everything that its last save needs is read, decided and tried first:
the files of the base model, prompt.json, the chat template, the index of the shards, names, links,
and the permission to write and rename. The small files stay in memory. What is refused is refused
before step 1, and the base model's folder is not read again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lora
from checkpoints.huggingface import model_folder
from checkpoints.model_folder import GENERATION_CONFIG, add_stop_id, base_model_dir
from checkpoints.model_writer import ModelFolder, rehearse_model_folder, write_files
from checkpoints.peft_adapter import adapter_folder
from data import Source
from model import Llama
from runtime.console import STORAGE, UserError
from runtime.strict_json import strict_json
from runtime.temporary import Temporary
from tokenization.chat_template import ChatTemplate
from tokenization.tokenizer import Tokenizer
from training.datasets import prompts_of

PROMPT_FILE = "prompt.json"
TEMPLATE_FILE = "chat_template.jinja"


def prepare_result(model: Llama, model_dir: Path, sources: Sequence[Source], tokenizer: Tokenizer,
                   out: Path, is_writer: bool) -> ModelFolder:
    """Everything that OUT/model will hold except the tensors. If `is_writer`, which one rank is,
    writing the folder is tried too. UserError for everything that would fail at the end."""
    if lora.adapters(model):
        contents = adapter_folder(model, str(base_model_dir(model_dir)), model_dir)
    else:
        contents = model_folder(model, model_dir)
    if GENERATION_CONFIG in contents.files:  # the result could not be asked without it
        strict_json(contents.files[GENERATION_CONFIG], model_dir / GENERATION_CONFIG)
    if is_writer:
        try:
            add_prompt(contents.files, prompts_of(sources), model_dir, tokenizer, out)
        except OSError as e:
            raise UserError(f"{out}: cannot be written ({e.strerror})", STORAGE) from None
        rehearse_model_folder(contents, out / "model")
    return contents


def add_prompt(files: dict[str, bytes], prompts: dict[str, Any], model_dir: Path,
               tokenizer: Tokenizer, out: Path) -> None:
    """Add to the files of a model how training wrote its prompts: prompt.json, the chat template,
    and the end of a turn as a stop id. `prompts`: what the data say, in place of the base's."""
    prompt: dict[str, Any] = {}
    if PROMPT_FILE in files:
        prompt = strict_json(files[PROMPT_FILE], model_dir / PROMPT_FILE)
    prompt |= prompts
    if not prompt.get("template_kwargs", True):  # empty: in place of those of the base
        del prompt["template_kwargs"]
    if prompt:
        files[PROMPT_FILE] = (json.dumps(prompt, indent=1, ensure_ascii=False) + "\n").encode()
    if "chat" not in prompt:
        return
    if not isinstance(prompt["chat"], str):
        raise UserError(f"{model_dir / PROMPT_FILE}: chat is {prompt['chat']!r:.80}, expected the "
                        "text of a chat template; remove the file, or download the model again")
    files[TEMPLATE_FILE] = prompt["chat"].encode()
    with Temporary(out / "result", folder=True) as temporary:
        folder = temporary.path
        write_files(folder, files)
        end_of_turn = ChatTemplate.from_folder(folder, tokenizer).end_of_turn
        if end_of_turn is not None:
            add_stop_id(folder, end_of_turn)
        if (folder / GENERATION_CONFIG).exists():
            files[GENERATION_CONFIG] = (folder / GENERATION_CONFIG).read_bytes()
