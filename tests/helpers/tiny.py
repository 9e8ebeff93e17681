"""Tiny random models and tokenizers for tests, made by the peers and not by us.

A shape is a config.json in the words of the published ones; the weights are drawn by transformers
and written by its `save_pretrained`; the tokenizer is learned by sentencepiece. What our code reads
here is therefore what it will meet, only smaller.
"""

from __future__ import annotations

import copy
import functools
import io
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from layers.attention_metadata import Backend
from layers.cross_entropy import softcap
from layers.recompute import Recompute
from model import Llama, ModelConfig

V = 320  # ids: 3 control tokens, 256 bytes, 61 pieces

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

SHAPES: dict[str, dict[str, Any]] = {
    "llama1": {},
    "llama2": {"rms_norm_eps": 1e-5, "max_position_embeddings": 128},
    "llama3": {"num_key_value_heads": 2, "rope_theta": 500000.0, "rms_norm_eps": 1e-5},
    "llama31": {"num_key_value_heads": 2, "rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE},
    "llama32": {"num_key_value_heads": 2, "rope_theta": 500000.0, "tie_word_embeddings": True,
                "head_dim": 16, "rope_scaling": {**LLAMA3_ROPE, "factor": 32.0}},
    "tinyllama": {"num_attention_heads": 8, "num_key_value_heads": 1, "rms_norm_eps": 1e-5},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                              "original_max_position_embeddings": 32}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
}
LLAMAS = list(SHAPES)

WINDOW = 12  # of every shape that has one: shorter than the rows of the tests
SANDWICH = {"hidden_activation": "gelu_pytorch_tanh", "num_hidden_layers": 4, "head_dim": 16,
            "num_key_value_heads": 2, "sliding_window": WINDOW, "query_pre_attn_scalar": 12,
            "tie_word_embeddings": True}
SHAPES |= {
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral",
                "num_key_value_heads": 2, "sliding_window": WINDOW, "rope_theta": 1e6},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_theta": 1e6,
              "num_key_value_heads": 2, "tie_word_embeddings": True, "sliding_window": WINDOW,
              "use_sliding_window": False, "max_window_layers": 2},
    "qwen2-window": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
                     "num_key_value_heads": 2, "num_hidden_layers": 3, "sliding_window": WINDOW,
                     "use_sliding_window": True, "max_window_layers": 1,
                     "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                                      "original_max_position_embeddings": 64}},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16,
              "num_key_value_heads": 2, "use_sliding_window": False, "rope_theta": 1e6},
    "smollm3": {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3",
                "num_hidden_layers": 4, "num_key_value_heads": 2, "no_rope_layer_interval": 2,
                "tie_word_embeddings": True, "rope_theta": 5e6, "pad_token_id": 0},
    "smollm3-window": {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3",
                       "num_hidden_layers": 3, "num_key_value_heads": 2, "pad_token_id": 0,
                       "no_rope_layers": [1, 0, 1], "use_sliding_window": True,
                       "sliding_window": WINDOW},
    "gemma2": {**SANDWICH, "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2",
               "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3": {**SANDWICH, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text",
               "sliding_window_pattern": 3, "rope_theta": 1e6, "rope_local_base_freq": 1e3,
               "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "olmo2": {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "rope_theta": 5e5,
              "num_key_value_heads": 2},
}

SENTENCES = """\
Umugore arateka ibishyimbo mu nkono nini.
Abana babiri bagiye ku ishuri mu gitondo.
Ejo nzajya i Kigali kureba umuvandimwe wanjye.
Inka zacu zirya ubwatsi ku musozi.
Amazi y'umugezi ni meza kandi arakonje.
The woman is cooking beans in a big pot.
Two children went to school in the morning.
Tomorrow I will go to Kigali to see my brother.
Our cows eat grass on the hill.
The water of the river is good and cold.
""".splitlines()


def config(shape: str = "llama2", **changes: Any) -> dict[str, Any]:
    """config.json of a shape, in the words the published models use; `changes` go over it."""
    values = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
             "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
             "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
             "tie_word_embeddings": False}
    return {**values, **SHAPES[shape], **changes}


def peer(shape: str = "llama2", seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    """transformers' random model of a shape; a mistake anywhere shows in its strong logits."""
    values = copy.deepcopy(config(shape, **changes))  # transformers writes into what it reads
    theirs = transformers.AutoConfig.for_model(**values)
    model = transformers.AutoModelForCausalLM.from_config(
        theirs, attn_implementation="eager", dtype=torch.float32)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            one = 0.0 if shape.startswith("gemma") else 1.0  # Gemma adds 1 to a norm's weight
            p.normal_(one if "norm" in name else 0.0, 0.2, generator=draw)
    return model.eval()


@torch.no_grad()
def rounded(peer: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """A copy of the model, each row of its linear layers in whole steps of a 127th of its largest
    weight; an embedding that its head was tied to stays as it is."""
    peer = copy.deepcopy(peer)
    if peer.config.tie_word_embeddings:
        peer.lm_head.weight = torch.nn.Parameter(peer.lm_head.weight.clone())
    for m in peer.modules():
        if isinstance(m, torch.nn.Linear):
            step = m.weight.abs().amax(1, keepdim=True) / 127
            m.weight.copy_((m.weight / step).round() * step)
    return peer


def ours(peer: transformers.PreTrainedModel, shape: str = "llama2",
         compute_dtype: torch.dtype = torch.float32, recompute: Recompute = "none",
         neftune_alpha: float = 0.0, attention_backend: Backend = "auto",
         **changes: Any) -> Llama:
    """Our model with the same weights; its config is read from the published keys, with `changes`.
    """
    model = Llama(ModelConfig.from_hf(config(shape, **changes)), compute_dtype, recompute,
                  neftune_alpha, attention_backend)
    state = peer.state_dict()
    if model.lm_head is None:
        del state["lm_head.weight"]
    model.load_state_dict(state)
    return model.eval()


def folder(path: Path, shape: str = "llama2", seed: int = 0, sharded: bool = False,
           tokenizer: bool = True, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A model's folder as transformers writes it: one safetensors file, or several and an index."""
    model = peer(shape, seed, **changes).to(dtype)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=1, eos_token_id=2, max_length=64)
    model.save_pretrained(path, max_shard_size="40KB" if sharded else "1GB")
    if tokenizer:
        write_tokenizer(path)
    return Path(path)


def write_tokenizer(path: Path) -> None:
    """A SentencePiece tokenizer of V ids, as LLaMA's."""
    Path(path).mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.model").write_bytes(pieces())
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
             "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


@functools.cache
def pieces() -> bytes:
    """tokenizer.model, learned from SENTENCES."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=out, vocab_size=V, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", hard_vocab_limit=False,
        minloglevel=2)
    return out.getvalue()


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random ids, (rows, length), no control token among them."""
    return torch.randint(3, V, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Llama, ids: Tensor, doc: Tensor | None = None,
           pos: Tensor | None = None) -> Tensor:
    """Our logits at every token, (B,T) -> (B,T,V); by default a row is one document."""
    doc = torch.zeros_like(ids) if doc is None else doc
    pos = torch.arange(ids.shape[1]).expand_as(ids) if pos is None else pos
    return softcap(model.model(ids, doc, pos) @ model.head.T, model.config.logit_cap)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers, the same for a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def apart(x: torch.Tensor, y: torch.Tensor) -> float:
    """The length of x - y over that of y; where y is nothing, that of x."""
    return ((x - y).norm() / y.norm() if y.any() else x.norm()).item()


def bytewise_folder(path: Path, special: list[str]) -> Path:
    """A tiny model whose tokenizer.json has bytes for pieces, and these control tokens."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=V, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(SENTENCES, trainer)
    folder(path, tokenizer=False)
    tokenizer.save(str(path / "tokenizer.json"))
    return path
