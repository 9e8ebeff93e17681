"""Hugging Face folders in and out: config.json, safetensors in one file or many, PEFT adapters.

One idea: the model must agree with its files, tensor for tensor. Every tensor is used exactly once,
or an error names it: nothing is left at random, nothing is ignored, nothing outside the folder is
opened. Formats that can run code when opened are not read at all.

Reading maps a file into memory and moves tensor by tensor to its device and dtype, so the peak is
the size of the result. On a CPU, in the file's own dtype, nothing is copied: a page is read when it
is used, and copied when it is written to, so training such a model never touches the file. Writing
lays tensors out as in the folder the model came from, aside, and renames when all is on the disk.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import lora
from checkpoints import peft_adapter
from checkpoints.atomic_write import aside
from checkpoints.model_folder import (
    ADAPTER,
    CARRIED,
    CONFIG,
    MODEL_FILES,
    base_of,
    carry,
    find,
    read_config,
    tensors,
)
from checkpoints.safetensors_header import (
    INDEX,
    SINGLE,
    Slot,
    five,
    inside,
)
from layers import config as families
from layers import int8, nf4
from layers.config import ModelConfig
from layers.int8 import Int8Linear
from layers.nf4 import NF4Linear
from model import Llama
from runtime.console import UserError
from runtime.distributed import whole
from runtime.dtypes import SAFETENSORS_FLOATS
from runtime.strict_json import read_json
from tokenization.tokenizer import Tokenizer


def load(name: str | Path, device: Any = "cpu", dtype: torch.dtype | None = torch.float32,
         tokenizer: bool = True, quant: str = "none",
         double: bool = False) -> tuple[Llama, Tokenizer | None]:
    """A folder's or hub's model in `dtype` (None: the files'), and its tokenizer if wanted.

    An adapter comes attached to its base, which is frozen. With `quant` "nf4" the layers' matrices
    are kept in NF4, with `double` their scales in eight bits; with "int8" they and the head's are
    in eight bits, an adapter merged before. UserError says what is wrong, and where.
    """
    folder = find(name)
    base = base_of(folder)
    merged = quant == "int8" and folder != base  # of the file's own numbers
    model = _read_model(base, torch.device(device), None if merged else dtype,
                        "none" if merged else quant, double)
    if folder != base:
        peft_adapter.check_base(folder, base)
        peft_adapter.load_adapter(model, folder)
        for k, x in peft_adapter.adapter_state(model).items():
            _check_finite(x, f"{folder / ADAPTER}: {k}")
    if quant == "int8":
        int8.use(model)
    if not tokenizer:
        return model, None
    own = any((folder / file).exists() for file in ("tokenizer.json", "tokenizer.model"))
    found = Tokenizer.open(folder if own else base)
    # a control token beyond the vocabulary (an unused <pad>) is common and harmless: no text is one
    given = (found.bos, found.eos, *found.byte_lengths.nonzero()[0][-1:])
    top = max(x for x in given if x is not None)
    if top >= model.config.vocab_size:
        raise UserError(f"{folder}: the tokenizer gives id {top}, the model's vocabulary ends at "
                        f"{model.config.vocab_size - 1}; they do not belong together")
    return model, found


def _read_model(folder: Path, device: torch.device, dtype: torch.dtype | None, quant: str = "none",
                double: bool = False) -> Llama:
    """The model of a folder, every tensor of its files used exactly once."""
    config, found = read_config(folder), tensors(folder)
    found = {k: slot for k, slot in found.items() if not k.endswith("rotary_emb.inv_freq")}
    layers = {m[1] for k in found if (m := re.match(r"model\.layers\.(\d+)\.", k))}
    if len(layers) != config.num_hidden_layers:  # said before a billion of them are built
        raise UserError(f"{folder}: num_hidden_layers is {config.num_hidden_layers} in "
                        f"config.json, the files hold {len(layers)} layers")
    try:
        with torch.device("meta"):  # shapes only: Llama computes no initial weights
            model = Llama(config)
    except RuntimeError:
        raise UserError(f"{folder / CONFIG}: sizes that no memory could hold") from None
    head = found.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    _compare(folder, config, dict(model.named_parameters()), found)
    shard = file = None
    for k, slot in found.items():
        if file != slot.file:
            shard, file = safe_open(slot.file, "pt"), slot.file
        x = shard.get_tensor(slot.name)
        parent, _, leaf = k.rpartition(".")
        module = model.get_submodule(parent)
        narrow = leaf == "weight" and (nf4.fits(parent, module) if quant == "nf4" else
                                       quant == "int8" and int8.fits(module))
        placed = x.to(device, x.dtype if narrow else dtype or x.dtype)
        _check_finite(placed, f"{file}: {k}")
        if narrow:  # of the file's own numbers, not of rounded ones
            model.set_submodule(parent, NF4Linear(placed, module.bias, double) if quant == "nf4"
                                else Int8Linear(placed, module.bias))
        else:
            setattr(module, leaf, nn.Parameter(placed))
        if narrow or placed is not x:
            shard = x = placed = file = None  # opened anew: the pages read so far can go
    if head is not None:
        x = safe_open(head.file, "pt").get_tensor(head.name)
        if not torch.equal(x.to(device, model.head.dtype), model.head):
            raise UserError(f"{folder}: tie_word_embeddings in config.json is true, but "
                            "lm_head.weight is not model.embed_tokens.weight; false would use both")
    return model


def _compare(folder: Path, config: ModelConfig, wanted: dict[str, Tensor],
             found: dict[str, Slot]) -> None:
    """UserError unless the files hold just the config's tensors, in its shapes, as real numbers."""
    if missing := [k for k in wanted if k not in found]:
        hint = ", or tie_word_embeddings should be true" if missing == ["lm_head.weight"] else ""
        raise UserError(f"{folder}: no {five(missing)} in the files; they are not complete{hint}")
    if extra := [k for k in found if k not in wanted]:
        raise UserError(f"{folder}: {five(extra)} in the files, but not in config.json's model")
    words = {n: k for k, n in reversed(vars(config).items()) if type(n) is int}
    for k, p in wanted.items():
        shape, slot = tuple(p.shape), found[k]
        if shape != slot.shape:
            odd = [n for n, m in zip(shape, slot.shape, strict=False) if n != m and n in words]
            by = f" by {words[odd[0]]}" if odd else ""
            raise UserError(f"{slot.file}: {k} is {slot.shape}, config.json expects {shape}{by}")
        if slot.dtype not in SAFETENSORS_FLOATS:
            raise UserError(f"{slot.file}: {k} is {slot.dtype}, expected "
                            f"{' '.join(SAFETENSORS_FLOATS)}; take the model in its original "
                            "precision")


def _check_finite(x: Tensor, what: str) -> None:
    """UserError if x holds a NaN or an infinity; no copy. A sum shows either and is the fastest
    pass over memory there is; where it overflows by itself, the extremes decide."""
    x = x.detach()
    if not x.sum().isfinite() and not torch.stack(torch.aminmax(x)).isfinite().all():
        raise UserError(f"{what} holds NaN or infinity in {x.dtype}; fetch it again or widen it")


def save(model: Llama, folder: Path | str, like: Path | str,
         dtype: torch.dtype | None = None, write: bool = True) -> None:
    """Write a model's folder as `like` is laid out: its shards, dtypes (or `dtype`), other files.

    A `like` that is only a shape, without weights, gives one file in the model's own dtype. A tied
    head is not written. If a model is cut among ranks, all call this, and one has `write`.
    UserError if an adapter is attached, or the folder cannot be written.
    """
    if lora.adapters(model):
        raise UserError(f"{folder}: the model has an adapter; merge it, or save the adapter alone")
    if any(isinstance(m, NF4Linear | Int8Linear) for m in model.modules()):
        raise UserError(f"{folder}: the model is in int8 or NF4, less than its files hold; not "
                        "written")
    like = base_of(find(like))
    index = read_json(inside(like, INDEX)) if (like / INDEX).exists() else None
    before = _laid_out(like)
    state = {k: p.detach() for k, p in model.named_parameters()}
    kinds = _kinds(model, before, dtype)
    shards: dict[str, list[str]] = {slot.file.name: [] for slot in before.values()} or {SINGLE: []}
    for k in state:  # what `like` does not have goes to the last shard
        shards[before[k].file.name if k in before else list(shards)[-1]].append(k)
    if not write:
        for k in (k for names in shards.values() for k in names):
            whole(state[k])
        return
    with aside(Path(folder), (*MODEL_FILES, "README.md")) as new:
        _write_config(new, like, model.config, dtype or (None if before else model.head.dtype))
        carry(like, new)
        for file, names in shards.items():
            part = {k: whole(state[k]).to("cpu", kinds[k]).contiguous() for k in names}
            for k, x in part.items():
                _check_finite(x, k)  # a narrower dtype overflows without a word
            save_file(part, new / file, metadata={"format": "pt"})
        if index:
            size = sum(x.numel() * kinds[k].itemsize for k, x in state.items())
            index["metadata"] = {**index.get("metadata", {}), "total_size": size}
            index["weight_map"] = {k: file for file, names in shards.items() for k in sorted(names)}
            (new / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def size(model: Llama, like: Path) -> int:
    """Bytes of the weights that `save` writes."""
    kinds = _kinds(model, _laid_out(base_of(like)))
    return sum(p.numel() * kinds[k].itemsize for k, p in model.named_parameters())


def _laid_out(like: Path) -> dict[str, Slot]:
    """Where a folder has its tensors; of one that is only a shape, nowhere."""
    return tensors(like) if (like / INDEX).exists() or (like / SINGLE).exists() else {}


def _kinds(model: Llama, before: dict[str, Slot],
           dtype: torch.dtype | None = None) -> dict[str, torch.dtype]:
    """The dtype in which each tensor is written: `dtype`, or that of its file, or the model's."""
    kept = {k: SAFETENSORS_FLOATS[slot.dtype] for k, slot in before.items()
            if slot.dtype in SAFETENSORS_FLOATS}
    return {k: dtype or kept.get(k, model.head.dtype) for k, _ in model.named_parameters()}


def fresh(config: ModelConfig, tokenizer: Tokenizer, folder: Path | str, seed: int) -> None:
    """Write the folder of a model that has learned nothing: float32 weights drawn from a seed."""
    model, folder = Llama(config), Path(folder)
    model.initialise(seed)
    tokenizer.save(folder)
    words = {**config.to_hf(), "dtype": "float32",
             "bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    (folder / CONFIG).write_text(json.dumps(words, indent=2) + "\n", encoding="utf-8")
    words = {k: words[k] for k in ("bos_token_id", "eos_token_id")}
    (folder / CARRIED[0]).write_text(json.dumps(words, indent=2) + "\n", encoding="utf-8")
    save(model, folder, like=folder)


def _write_config(new: Path, like: Path, config: ModelConfig, dtype: torch.dtype | None) -> None:
    """config.json as in `like`, with only what changed: the vocabulary's size, the weights' dtype.

    Byte for byte if nothing did; the text part alone, of a model that also sees pictures.
    """
    raw = read_json(inside(like, CONFIG))
    words = families.text_words(raw)
    changed: dict[str, Any] = {}
    if config != ModelConfig.from_hf(words):
        changed["vocab_size"] = config.vocab_size
        assert config == ModelConfig.from_hf({**words, **changed}), "another model than `like`"
    key = "dtype" if "dtype" in words else "torch_dtype"  # transformers 5's word, and 4's
    if dtype is not None and words.get(key) != str(dtype)[6:]:
        changed[key] = str(dtype)[6:]
    if changed or words is not raw:
        text = json.dumps({**words, **changed}, indent=2, ensure_ascii=False) + "\n"
        (new / CONFIG).write_text(text, encoding="utf-8")
    else:
        shutil.copyfile(like / CONFIG, new / CONFIG)


