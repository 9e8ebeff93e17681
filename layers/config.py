"""config.json as a ModelConfig: a model family is a row of a table of features.

No code below this module asks which family a model belongs to. A row holds the features that all
models of the family share, and the family's defaults for keys that config.json may leave out.
Refused by name: an unknown architecture, rotary scaling or activation, quantized weights, and a
number outside the range in which models of this kind exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from runtime.console import UserError
from runtime.strict_json import shorten

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
ROPE_KEYS = {  # kinds of rotary scaling, and the keys that each needs
    "default": (), "linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
LOCAL, GLOBAL = "sliding_attention", "full_attention"  # config.json's names of a layer's kind
# The largest value of each size. Published models have at most a tenth of it, mostly a hundredth.
MAX_SIZES = {
    "vocab_size": 1 << 22, "hidden_size": 1 << 18, "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 12, "num_attention_heads": 1 << 12, "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12}
MAX_SIZE = (1 << 31) - 1  # of any other size: a number of tokens, or of layers
# The smallest and the largest value of each number. All are normal numbers in float32.
NUMBER_RANGES = {
    "rms_norm_eps": (1e-15, 1.0), "query_pre_attn_scalar": (1e-3, 1e6),
    "attn_logit_softcapping": (1e-2, 1e6), "final_logit_softcapping": (1e-2, 1e6),
    "rope_theta": (1.1, 1e15), "rope_local_base_freq": (1.1, 1e15), "factor": (1e-2, 1e5),
    "low_freq_factor": (1e-3, 1e5), "high_freq_factor": (1e-3, 1e5), "beta_slow": (1e-3, 1e5),
    "beta_fast": (1e-3, 1e5), "mscale": (1e-3, 1e3), "mscale_all_dim": (1e-3, 1e3),
    "attention_factor": (1e-3, 1e3)}


@dataclass(frozen=True)
class Family:
    """The features of a family, its defaults for keys of config.json, and which of its layers use
    a sliding window."""

    features: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    is_windowed: Callable[[dict[str, Any], int], bool] = lambda config, layer: False
    layer_types: bool = True  # whether config.json may name the kind of each layer


def _is_windowed_qwen(config: dict[str, Any], layer: int) -> bool:
    return layer >= _size(config, "max_window_layers", least=0)


QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
        "max_position_embeddings": 32768}
GEMMA = {"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216,
         "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
         "head_dim": 256, "max_position_embeddings": 8192, "query_pre_attn_scalar": 256,
         "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096,
         "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
         "tie_word_embeddings": True}
GEMMA3 = {**GEMMA, "vocab_size": 262208, "max_position_embeddings": 131072, "rope_theta": 1e6,
          "rope_local_base_freq": 1e4, "sliding_window_pattern": 6,
          "final_logit_softcapping": None, "attn_logit_softcapping": None}
SANDWICH = {"norms": "sandwich", "norm_offset": 1.0, "scale_embeddings": True}

FAMILIES = {
    "LlamaForCausalLM": Family(layer_types=False),
    "MistralForCausalLM": Family(
        {"attention_bias": False, "output_bias": False},
        {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072},
        lambda config, layer: True, layer_types=False),
    "Qwen2ForCausalLM": Family({"attention_bias": True, "output_bias": False}, QWEN,
                               _is_windowed_qwen),
    "Qwen3ForCausalLM": Family({"qk_norm": "head"}, {**QWEN, "head_dim": 128},
                               _is_windowed_qwen),
    "SmolLM3ForCausalLM": Family(
        {}, {"use_sliding_window": False, "no_rope_layer_interval": 4, "num_key_value_heads": 4,
             "max_position_embeddings": 32768, "rope_theta": 2e6, "tie_word_embeddings": True},
        lambda config, layer: layer in _layers_without_rope(config)),
    "Gemma2ForCausalLM": Family(SANDWICH, GEMMA, lambda config, layer: layer % 2 == 0),
    "Gemma3ForCausalLM": Family(
        {**SANDWICH, "qk_norm": "head"}, GEMMA3,
        lambda config, layer: (layer + 1) % _size(config, "sliding_window_pattern") != 0),
    "Olmo2ForCausalLM": Family({"norms": "post", "qk_norm": "width"}, {"rms_norm_eps": 1e-5},
                               layer_types=False),
}
MODEL_TYPES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
               "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
               "smollm3": "SmolLM3ForCausalLM", "gemma2": "Gemma2ForCausalLM",
               "gemma3_text": "Gemma3ForCausalLM", "olmo2": "Olmo2ForCausalLM"}
# architectures that also read images -> the model type of their text part
TEXT_PART = {"Gemma3ForConditionalGeneration": "gemma3_text"}


@dataclass(frozen=True)
class Rope:
    """Rotary position embeddings: the base, how it is scaled for a longer context, and a factor on
    cos and sin (`amplitude`)."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original: int = 0  # the context before scaling, in tokens
    # llama3: frequencies of fewer rotations within the original context than `low` are scaled, of
    # more than `high` are not. yarn: beta_slow and beta_fast
    low: float = 1.0
    high: float = 4.0
    whole: bool = True  # yarn: its bounds are rounded to whole indices
    amplitude: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """A model's sizes under config.json's own names, and the features of its family."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # of q, k and v
    output_bias: bool = False  # of attention's output
    mlp_bias: bool = False
    activation: str = "silu"  # or gelu_tanh
    rope: Rope = Rope()
    local_rope: Rope | None = None  # of layers with a sliding window, if theirs differs
    windows: tuple[int, ...] = ()  # sliding window of each layer in tokens, itself included; 0: no
    no_rope: frozenset[int] = frozenset()  # layers without rotary embeddings
    norms: str = "pre"  # before attention and MLP, "post": after them, or "sandwich": both
    norm_offset: float = 0.0  # added to a norm's weight
    qk_norm: str = ""  # queries and keys are normed per "head", or over all heads: "width"
    scale_embeddings: bool = False  # by sqrt(C)
    query_scalar: float = 0.0  # attention scores are divided by its root; 0: by the root of D
    attention_cap: float = 0.0  # softcap of attention scores: cap * tanh(x / cap); 0: none
    logit_cap: float = 0.0  # softcap of logits

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> ModelConfig:
        """Read config.json; UserError for anything that this model would compute wrongly."""
        config, family = with_defaults(raw)
        if raw.get("quantization_config"):
            raise UserError("config.json: the weights are quantised (quantization_config); use "
                            "the model in its original precision")
        if config.get("use_bidirectional_attention"):
            raise UserError("config.json: use_bidirectional_attention is true; a causal model is "
                            "needed")
        n_heads, n_kv_heads, head_dim = _head_sizes(config)
        rope, local_rope = _ropes(config)
        for scaled in (rope, local_rope):
            if scaled and scaled.kind == "dynamic" and head_dim < 4:
                raise UserError(f"config.json: head_dim is {head_dim}, expected at least 4 for "
                                "rope kind dynamic")
        has_bias = _flag(config, "attention_bias")
        features = {
            "attention_bias": has_bias, "output_bias": has_bias,
            "mlp_bias": _flag(config, "mlp_bias"), "windows": _windows(config, family),
            "no_rope": _layers_without_rope(config),
            "query_scalar": _number(config, "query_pre_attn_scalar", 0.0),
            "attention_cap": _number(config, "attn_logit_softcapping", 0.0),
            "logit_cap": _number(config, "final_logit_softcapping", 0.0), **family.features}
        return cls(
            vocab_size=_size(config, "vocab_size"), hidden_size=_size(config, "hidden_size"),
            intermediate_size=_size(config, "intermediate_size"),
            num_hidden_layers=_size(config, "num_hidden_layers"),
            num_attention_heads=n_heads, num_key_value_heads=n_kv_heads, head_dim=head_dim,
            max_position_embeddings=_size(config, "max_position_embeddings", 2048),
            rms_norm_eps=_number(config, "rms_norm_eps", 1e-6),
            tie_word_embeddings=_flag(config, "tie_word_embeddings"),
            activation=_activation(config, family), rope=rope, local_rope=local_rope, **features)

    def to_hf(self) -> dict[str, Any]:
        """config.json for a LLaMA of this shape, as transformers 4 and 5 both read it."""
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                 "num_attention_heads", "num_key_value_heads", "head_dim",
                 "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
                 "attention_bias", "mlp_bias")
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
                  "hidden_act": "silu", **{k: getattr(self, k) for k in sizes},
                  "rope_theta": self.rope.theta, "rope_scaling": None}
        if self.rope.kind != "default":
            config["rope_scaling"] = {"rope_type": self.rope.kind, "factor": self.rope.factor}
        if self.rope.kind == "llama3":
            config["rope_scaling"] |= {
                "low_freq_factor": self.rope.low, "high_freq_factor": self.rope.high,
                "original_max_position_embeddings": self.rope.original}
        if ModelConfig.from_hf(config) != self:
            raise UserError("config.json: only the config of a plain LLaMA can be written")
        return config


def text_config(raw: dict[str, Any]) -> dict[str, Any]:
    """The text part of config.json if the model also reads images; else config.json itself."""
    architectures = raw.get("architectures")
    if type(architectures) is not list or not architectures \
            or str(architectures[0]) not in TEXT_PART:
        return raw
    text = raw.get("text_config")
    if type(text) is not dict:
        raise UserError(f"config.json: text_config is {shorten(text)}, expected an object")
    model_type = TEXT_PART[architectures[0]]
    shared = {k: raw[k] for k in ("tie_word_embeddings", "dtype", "torch_dtype", "bos_token_id",
                                  "eos_token_id", "pad_token_id", "quantization_config")
              if k in raw}
    return {**shared, **text, "architectures": [MODEL_TYPES[model_type]], "model_type": model_type}


def text_tensor_name(name: str) -> str | None:
    """The name in the text part of a tensor of a model that also reads images; None if the tensor
    does not belong to the text part."""
    if name.startswith(("vision_tower.", "multi_modal_projector.", "model.vision_tower.",
                        "model.multi_modal_projector.")):
        return None
    for prefix, text_prefix in (("model.language_model.", "model."), ("language_model.", "")):
        if name.startswith(prefix):
            return text_prefix + name.removeprefix(prefix)
    return name


def with_defaults(raw: dict[str, Any]) -> tuple[dict[str, Any], Family]:
    """config.json with its family's defaults for missing keys, and that family. UserError if the
    family is not supported."""
    raw = text_config(raw)
    architectures = raw.get("architectures")
    if not architectures:
        model_type = raw.get("model_type")
        architectures = [MODEL_TYPES.get(str(model_type), model_type)]
    if type(architectures) is not list or type(architectures[0]) is not str \
            or architectures[0] not in FAMILIES:
        raise UserError(f"config.json: architectures {shorten(architectures)} is not supported; "
                        f"supported are {', '.join([*FAMILIES, *TEXT_PART])}")
    family = FAMILIES[architectures[0]]
    return {**family.defaults, **raw}, family


def _activation(config: dict[str, Any], family: Family) -> str:
    key = "hidden_activation" if "hidden_activation" in config else "hidden_act"
    activation = config.get(key) or family.defaults.get(key, "silu")
    if type(activation) is not str or activation not in ACTIVATIONS:
        raise UserError(f"config.json: activation {shorten(activation)}, only "
                        f"{' and '.join(map(repr, ACTIVATIONS))} are supported")
    return ACTIVATIONS[activation]


def _head_sizes(config: dict[str, Any]) -> tuple[int, int, int]:
    """Number of heads, number of key/value heads, width of a head."""
    H, C = _size(config, "num_attention_heads"), _size(config, "hidden_size")
    K = _size(config, "num_key_value_heads", H)
    if config.get("head_dim") is None and C % H:
        raise UserError(f"config.json: hidden_size {C} is not a multiple of num_attention_heads "
                        f"{H}")
    D = _size(config, "head_dim", C // H)
    if H % K or D % 2:
        raise UserError(f"config.json: {H} heads over {K} key/value heads of width {D}: heads "
                        "must be a multiple of key/value heads, and the width even")
    return H, K, D


def _ropes(config: dict[str, Any]) -> tuple[Rope, Rope | None]:
    """Rotary embeddings of layers with full attention, and of layers with a sliding window if
    these have others."""
    raw = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if type(raw) is not dict:
        raise UserError(f"config.json: rope_scaling is {shorten(raw)}, expected an object")
    if "rope_local_base_freq" not in config:
        return _rope(raw, config, "rope_theta"), None
    by_kind = raw.keys() & {LOCAL, GLOBAL}
    if raw and config.get("rope_parameters") and not by_kind:
        raise UserError(f"config.json: rope_parameters does not name {LOCAL} and {GLOBAL}")
    raw_global = (raw.get(GLOBAL) or {}) if by_kind else raw
    return (_rope(raw_global, config, "rope_theta"),
            _rope(raw.get(LOCAL) or {}, config, "rope_local_base_freq"))


def _rope(raw: dict[str, Any], config: dict[str, Any], theta_key: str) -> Rope:
    """One kind of rotary embeddings, from the object under rope_parameters or rope_scaling."""
    if type(raw) is not dict:
        raise UserError(f"config.json: rope_parameters is {shorten(raw)}, expected an object")
    kind = raw.get("rope_type", raw.get("type", "default"))
    if type(kind) is not str or kind not in ROPE_KEYS:
        raise UserError(f"config.json: rope kind {shorten(kind)} is not supported; supported are "
                        f"{', '.join(ROPE_KEYS)}")
    partial = raw.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise UserError("config.json: partial_rotary_factor is not 1; heads that are rotated in "
                        "part are not supported")
    theta = _number(raw, "rope_theta", _number(config, theta_key, 10000.0))
    if kind == "default":
        return Rope(theta)
    context = _size(config, "max_position_embeddings", 2048)
    original = _size(raw, "original_max_position_embeddings",
                     _size(config, "original_max_position_embeddings", context))
    if kind == "yarn" and raw.get("factor") is None:
        raw = {**raw, "factor": context / original}
    factor, *bounds = (_number(raw, key) for key in ROPE_KEYS[kind])
    if kind == "yarn":
        return _yarn(raw, theta, factor, original)
    if kind == "llama3":
        _check_order("low_freq_factor", bounds[0], "high_freq_factor", bounds[1])
        return Rope(theta, kind, factor, original, *bounds)
    return Rope(theta, kind, factor, context)


def _yarn(raw: dict[str, Any], theta: float, factor: float, original: int) -> Rope:
    """YaRN (Peng et al. 2023), with the factor on cos and sin that the config gives or implies."""
    if raw.get("mscale") and raw.get("mscale_all_dim"):  # as in DeepSeek's configs
        amplitude = (_mscale(factor, _number(raw, "mscale"))
                     / _mscale(factor, _number(raw, "mscale_all_dim")))
    else:
        amplitude = _mscale(factor, 1.0)
    slow, fast = _number(raw, "beta_slow", 1.0), _number(raw, "beta_fast", 32.0)
    if slow != fast:
        _check_order("beta_slow", slow, "beta_fast", fast)
    return Rope(theta, "yarn", factor, original, slow, fast,
                _flag({"truncate": True, **raw}, "truncate"),
                _number(raw, "attention_factor", amplitude))


def _check_order(low_key: str, low: float, high_key: str, high: float) -> None:
    if low >= high:
        raise UserError(f"config.json: {low_key} is {low:g} and {high_key} is {high:g}, expected "
                        f"a {high_key} above {low_key}")


def _mscale(factor: float, weight: float) -> float:
    """YaRN's factor on cos and sin (Peng et al. 2023, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _windows(config: dict[str, Any], family: Family) -> tuple[int, ...]:
    """The sliding window of each layer in tokens, the token itself included; 0: none. () if no
    layer has one."""
    L = _size(config, "num_hidden_layers")
    kinds = [LOCAL if family.is_windowed(config, i) else GLOBAL for i in range(L)]
    layer_types = config.get("layer_types")
    if layer_types is not None and (family.layer_types or layer_types != kinds):
        valid = type(layer_types) is list and len(layer_types) == L \
            and all(x in (LOCAL, GLOBAL) for x in layer_types)
        if not valid or not family.layer_types:
            raise UserError(f"config.json: layer_types is {shorten(layer_types)}, expected {L} of "
                            f"{LOCAL} and {GLOBAL}, as this family has them")
        kinds = layer_types
    if not _flag({"use_sliding_window": True, **config}, "use_sliding_window") \
            or config.get("sliding_window") is None or LOCAL not in kinds:
        return ()
    window = _size(config, "sliding_window")
    return tuple(window if x == LOCAL else 0 for x in kinds)


def _layers_without_rope(config: dict[str, Any]) -> frozenset[int]:
    """Layers without rotary embeddings: those with a 0 in no_rope_layers, or else every n-th."""
    if "no_rope_layer_interval" not in config:
        return frozenset()
    L = _size(config, "num_hidden_layers")
    uses_rope = config.get("no_rope_layers")
    if uses_rope is None:
        interval = _size(config, "no_rope_layer_interval")
        return frozenset(range(interval - 1, L, interval))
    if type(uses_rope) is not list or len(uses_rope) < L or any(x not in (0, 1) for x in uses_rope):
        raise UserError(f"config.json: no_rope_layers is {shorten(uses_rope)}, expected {L} of 0 "
                        "and 1")
    return frozenset(i for i in range(L) if not uses_rope[i])


def _size(config: dict[str, Any], key: str, default: int | None = None, least: int = 1) -> int:
    """A whole number from `least` to the largest of its kind, under a key of config.json."""
    value = default if config.get(key) is None else config[key]
    limit = MAX_SIZES.get(key, MAX_SIZE)
    if type(value) is not int or not least <= value <= limit:
        raise UserError(f"config.json: {key} is {shorten(value)}, expected a whole number from "
                        f"{least} to {limit:,}")
    return value


def _number(config: dict[str, Any], key: str, default: float | None = None) -> float:
    """A number within its range under a key of config.json; `default` if it is null or missing."""
    value = config.get(key)
    if value is None and default is not None:
        return float(default)
    low, high = NUMBER_RANGES[key]
    if type(value) not in (int, float) or not low <= value <= high:
        raise UserError(f"config.json: {key} is {shorten(value)}, expected a number from {low:g} "
                        f"to {high:g}")
    return float(value)


def _flag(config: dict[str, Any], key: str) -> bool:
    value = config.get(key) or False
    if type(value) is not bool:
        raise UserError(f"config.json: {key} is {shorten(value)}, expected true or false")
    return value
