"""Models in Hugging Face's format: load_model and save_model.

Every tensor of the files is used exactly once, or an error names it. Nothing is initialised at
random, nothing is ignored, no file outside the folder is opened, and no format that can run code is
read.

Loading maps a file into memory and moves one tensor at a time to its device and dtype, so the peak
memory is the size of the result. On a CPU, in the file's own dtype, nothing is copied: pages are
read when they are used, and copied when they are written to, so training never changes the file.
Saving uses the shards and dtypes of the folder that the model came from, and is atomic.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora
from checkpoints.model_folder import (
    ADAPTER_WEIGHTS,
    CONFIG_FILE,
    GENERATION_CONFIG,
    base_model_dir,
    read_accompanying_files,
    read_config,
    resolve_model_dir,
    tensor_infos,
)
from checkpoints.model_writer import ModelFolder, check_finite, write_model_folder
from checkpoints.peft_adapter import adapter_state, check_adapter_base, load_adapter
from checkpoints.safetensors_header import (
    INDEX_FILE,
    WEIGHTS_FILE,
    TensorInfo,
    first_five,
    open_safetensors,
    read_index,
)
from layers import int8, nf4
from layers.config import ModelConfig, text_config
from layers.int8 import Int8Linear
from layers.nf4 import NF4Linear
from layers.recompute import Recompute
from model import Llama
from runtime.console import UserError
from runtime.dtypes import SAFETENSORS_FLOATS
from runtime.model_files import has_model_file, read_model_file
from runtime.strict_json import strict_json
from tokenization.tokenizer import Tokenizer


def load_model(name: str | Path, device: Any = "cpu", dtype: torch.dtype | None = torch.float32,
               tokenizer: bool = True, quant: str = "none", double: bool = False,
               compute_dtype: torch.dtype | None = None, recompute: Recompute = "none",
               neftune_alpha: float = 0.0) -> tuple[Llama, Tokenizer | None]:
    """Load a model from a folder or the hub in `dtype` (None: that of the files), and its
    tokenizer if `tokenizer` is true.

    An adapter is attached to its base, which is frozen. `quant` "nf4" keeps the matrices of the
    layers in NF4, and with `double` their scales in 8 bits. "int8" keeps these matrices and that of
    the head in 8 bits; an adapter is merged first. `compute_dtype` (None: `dtype`, or float32),
    `recompute` and `neftune_alpha` are those of `Llama`. UserError names the file and the fault.
    """
    folder = resolve_model_dir(name)
    base = base_model_dir(folder)
    is_adapter = folder != base
    merge_first = quant == "int8" and is_adapter  # quantize the sum of the files' own numbers
    options = {"compute_dtype": compute_dtype or dtype or torch.float32, "recompute": recompute,
               "neftune_alpha": neftune_alpha}
    model = _read_model(base, torch.device(device), None if merge_first else dtype,
                        "none" if merge_first else quant, double, options)
    if is_adapter:
        check_adapter_base(folder, base)
        load_adapter(model, folder)
        for k, x in adapter_state(model).items():
            check_finite(x, f"{folder / ADAPTER_WEIGHTS}: {k}")
    if quant == "int8":
        # an adapter is merged in float32 before anything is rounded: one product in place of three
        for name, m in lora.adapters(model).items():
            model.set_submodule(name, Int8Linear(m.merged().detach(), m.base_layer.bias))
        model.set_base_values({})
        int8.convert_to_int8(model)
    if not tokenizer:
        return model, None
    return model, _load_tokenizer(folder, base, model.config.vocab_size)


def _load_tokenizer(folder: Path, base: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a folder, or of its base. UserError if it gives ids that the model has no
    embedding for."""
    has_own = any(has_model_file(folder, x) for x in ("tokenizer.json", "tokenizer.model"))
    tokenizer = Tokenizer.open(folder if has_own else base)
    # An unused control token beyond the vocabulary, such as <pad>, is common and harmless: no text
    # is encoded to it. So only the ids that text, BOS and EOS use are compared.
    used = (tokenizer.bos, tokenizer.eos, *tokenizer.byte_lengths.nonzero()[0][-1:])
    largest = max(x for x in used if x is not None)
    if largest >= vocab_size:
        raise UserError(f"{folder}: the tokenizer gives id {largest}, but the model's last id is "
                        f"{vocab_size - 1}; use the tokenizer that belongs to the model")
    return tokenizer


def _read_model(folder: Path, device: torch.device, dtype: torch.dtype | None, quant: str,
                double: bool, options: dict[str, Any]) -> Llama:
    """Load the model of a folder; every tensor of its files is used exactly once. `options` are
    those of `Llama`."""
    config = read_config(folder)
    infos = {k: info for k, info in tensor_infos(folder).items()
             if not k.endswith("rotary_emb.inv_freq")}
    _check_layer_count(folder, config, infos)
    try:
        with torch.device("meta"):  # shapes only, no initial weights
            model = Llama(config, **options)
    except RuntimeError:
        raise UserError(f"{folder / CONFIG_FILE}: its sizes are too large for any memory; correct "
                        "them, or download the model again") from None
    head = infos.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    check_tensors(folder, config, dict(model.named_parameters()), infos)
    shard = file = None
    for name, info in infos.items():
        if file != info.file:
            shard, file = open_safetensors(info.file), info.file
        x = shard.get_tensor(info.name)
        copied = _place_tensor(model, name, x, device, dtype, quant, double, file)
        if copied:
            shard = x = file = None  # open the file again, so that the pages read so far are freed
    if head is not None:
        _check_tied_head(folder, model, head, device)
    return model


def _check_layer_count(folder: Path, config: ModelConfig, infos: dict[str, TensorInfo]) -> None:
    """UserError unless the files hold num_hidden_layers layers; before the model is built."""
    layers = set()
    for name in infos:
        if match := re.match(r"model\.layers\.(\d+)\.", name):
            layers.add(match[1])
    if len(layers) != config.num_hidden_layers:
        raise UserError(f"{folder}: num_hidden_layers is {config.num_hidden_layers} in "
                        f"config.json, but the files hold {len(layers)} layers; download the model "
                        "again")


def _place_tensor(model: Llama, name: str, x: Tensor, device: torch.device,
                  dtype: torch.dtype | None, quant: str, double: bool, file: Path) -> bool:
    """Put a tensor of a file into the model, quantized if `quant` says so. Return whether it was
    copied, so that the mapped file is no longer needed for it."""
    module_name, _, parameter_name = name.rpartition(".")
    module = model.get_submodule(module_name)
    quantize = False
    if parameter_name == "weight" and quant == "nf4":
        quantize = nf4.fits(module_name, module)
    elif parameter_name == "weight" and quant == "int8":
        quantize = int8.fits(module)
    # quantize the file's own numbers, not numbers that were rounded to `dtype` first
    placed = x.to(device, x.dtype if quantize else dtype or x.dtype)
    check_finite(placed, f"{file}: {name}")
    if not quantize:
        setattr(module, parameter_name, nn.Parameter(placed))
        return placed is not x
    if quant == "nf4":
        model.set_submodule(module_name, NF4Linear(placed, module.bias, double))
    else:
        model.set_submodule(module_name, Int8Linear(placed, module.bias))
    return True


def _check_tied_head(folder: Path, model: Llama, head: TensorInfo, device: torch.device) -> None:
    """UserError if a tied head is stored too, with other numbers than the embeddings."""
    x = open_safetensors(head.file).get_tensor(head.name)
    if not torch.equal(x.to(device, model.head.dtype), model.head):
        raise UserError(f"{folder}: tie_word_embeddings in config.json is true, but lm_head.weight "
                        "is not equal to model.embed_tokens.weight; set it to false to use both")


def check_tensors(folder: Path, config: ModelConfig, wanted: dict[str, Tensor],
                  infos: dict[str, TensorInfo]) -> None:
    """UserError unless the files hold exactly the tensors of the config, with its shapes, in a
    floating-point dtype."""
    if missing := [k for k in wanted if k not in infos]:
        hint = ""
        if missing == ["lm_head.weight"]:
            hint = ", or set tie_word_embeddings to true"
        raise UserError(f"{folder}: no {first_five(missing)} in the files; download the model "
                        f"again{hint}")
    if unknown := [k for k in infos if k not in wanted]:
        raise UserError(f"{folder}: {first_five(unknown)} in the files, but not in the model that "
                        "config.json describes; check config.json")
    for name, parameter in wanted.items():
        shape, info = tuple(parameter.shape), infos[name]
        if shape != info.shape:
            raise UserError(f"{info.file}: {name} is {info.shape}, config.json expects {shape}"
                            f"{_explain_shape(config, shape, info.shape)}")
        if info.dtype not in SAFETENSORS_FLOATS:
            raise UserError(f"{info.file}: {name} is {info.dtype}, expected "
                            f"{' '.join(SAFETENSORS_FLOATS)}; use the model in its original "
                            "precision")


def _explain_shape(config: ModelConfig, expected: tuple[int, ...], found: tuple[int, ...]) -> str:
    """" by KEY": the key of the config that gives the first size that differs; empty if none."""
    keys: dict[int, str] = {}
    for key, value in vars(config).items():
        if type(value) is int:
            keys.setdefault(value, key)
    for size, other in zip(expected, found, strict=False):
        if size != other and size in keys:
            return f" by {keys[size]}"
    return ""


def save_model(model: Llama, folder: Path | str, source: Path | str,
               dtype: torch.dtype | None = None) -> None:
    """Write a model's folder with the shards, dtypes (or `dtype`) and other files of `source`.

    See `model_folder` and `write_model_folder`. A sharded model is not written here.
    """
    contents = model_folder(model, source, dtype)
    write_model_folder(contents, dict(model.named_parameters()), Path(folder))


def model_folder(model: Llama, source: Path | str, dtype: torch.dtype | None = None) -> ModelFolder:
    """The folder of a model, laid out as `source`: its shards, its dtypes (or `dtype`) and the
    other files. Nothing is written.

    If `source` has a config but no weights, it is one shard in the model's own dtype. A tied head
    is not written. UserError if an adapter is attached, if the model is quantized, or if a file of
    `source` cannot be read.
    """
    if lora.adapters(model):
        raise UserError("the model has an adapter, so it is not saved as a whole model; merge it, "
                        "or save the adapter alone")
    if any(isinstance(m, NF4Linear | Int8Linear) for m in model.modules()):
        raise UserError("the model is in int8 or NF4, with less precision than its files, so it is "
                        "not saved")
    source = base_model_dir(resolve_model_dir(source))
    infos = _stored_tensors(source)
    state = dict(model.named_parameters())
    dtypes = _dtypes_to_write(model, infos, dtype)
    shards = _names_by_shard(state, infos)
    config_dtype = dtype
    if dtype is None and not infos:
        config_dtype = model.head.dtype
    files = read_accompanying_files(source)
    files[CONFIG_FILE] = config_content(source, model.config, config_dtype)
    if has_model_file(source, INDEX_FILE):
        total = sum(x.numel() * dtypes[k].itemsize for k, x in state.items())
        files[INDEX_FILE] = index_content(read_index(source), shards, total)
    return ModelFolder(files, {file: {k: dtypes[k] for k in names}
                               for file, names in shards.items()})


def index_content(index: dict[str, Any], shards: dict[str, list[str]], total_size: int) -> bytes:
    """The index of a sharded model: that of its source, with these shards and bytes."""
    content = {**index, "metadata": {**index["metadata"], "total_size": total_size},
               "weight_map": {k: file for file, names in shards.items() for k in sorted(names)}}
    return (json.dumps(content, indent=2) + "\n").encode()


def _stored_tensors(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of a folder; empty if it has no weights."""
    if has_model_file(folder, INDEX_FILE) or has_model_file(folder, WEIGHTS_FILE):
        return tensor_infos(folder)
    return {}


def _names_by_shard(state: dict[str, Tensor], infos: dict[str, TensorInfo]) -> dict[str, list[str]]:
    """Shard file -> names of its tensors, as stored; new tensors go to the last shard."""
    shards: dict[str, list[str]] = {info.file.name: [] for info in infos.values()}
    if not shards:
        shards = {WEIGHTS_FILE: []}
    last = list(shards)[-1]
    for name in state:
        file = infos[name].file.name if name in infos else last
        shards[file].append(name)
    return shards


def _dtypes_to_write(model: Llama, infos: dict[str, TensorInfo],
                     dtype: torch.dtype | None = None) -> dict[str, torch.dtype]:
    """The dtype in which each tensor is written: `dtype`, or that of its file, or the model's."""
    dtypes = {}
    for name, _ in model.named_parameters():
        stored = infos[name].dtype if name in infos else None
        dtypes[name] = dtype or SAFETENSORS_FLOATS.get(stored, model.head.dtype)
    return dtypes


def init_from_config(config: ModelConfig, tokenizer: Tokenizer, folder: Path | str,
                     seed: int) -> None:
    """Write the folder of a new model, with float32 weights drawn from a seed."""
    model, folder = Llama(config), Path(folder)
    model.initialise(seed)
    tokenizer.save(folder)
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    for file, content in ((CONFIG_FILE, {**config.to_hf(), "dtype": "float32", **ids}),
                          (GENERATION_CONFIG, ids)):
        (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    save_model(model, folder, source=folder)


def config_content(source: Path, config: ModelConfig, dtype: torch.dtype | None) -> bytes:
    """config.json as in `source`, with a new vocabulary size or dtype if these changed.

    The content is that of the file, byte for byte, if nothing changed. Of a vision-language model
    only the text part is kept.
    """
    content = read_model_file(source, CONFIG_FILE)
    original = strict_json(content, source / CONFIG_FILE)
    hf_config = text_config(original)
    changed: dict[str, Any] = {}
    if config != ModelConfig.from_hf(hf_config):
        changed["vocab_size"] = config.vocab_size
        assert config == ModelConfig.from_hf({**hf_config, **changed}), "not the source's model"
    key = "dtype" if "dtype" in hf_config else "torch_dtype"  # transformers 5 and 4
    if dtype is not None and hf_config.get(key) != str(dtype)[6:]:
        changed[key] = str(dtype)[6:]
    if changed or hf_config is not original:
        text = json.dumps({**hf_config, **changed}, indent=2, ensure_ascii=False) + "\n"
        return text.encode()
    return content
