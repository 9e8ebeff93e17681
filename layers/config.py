"""What config.json says, as features: a family is a row of a table, and below this no line asks
which model it is.

Two things make a row: the features that all models of the family have, and the words that its
config.json may leave unsaid. What is not known by name (architecture, rope kind, activation,
quantisation) is refused: never load what would be computed wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from runtime.console import UserError

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
ROPE_WORDS = {  # kinds of rotary scaling, and the words each needs
    "default": (), "linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
LOCAL, GLOBAL = "sliding_attention", "full_attention"  # config.json's names of a layer's kind


@dataclass(frozen=True)
class Family:
    """A row: features, words that config.json may leave unsaid, and which layers see a window."""

    features: dict[str, Any] = field(default_factory=dict)
    words: dict[str, Any] = field(default_factory=dict)
    windowed: Callable[[dict[str, Any], int], bool] = lambda words, layer: False
    layer_types: bool = True  # whether config.json may name the kind of each layer


def _qwen(words: dict[str, Any], layer: int) -> bool:
    return layer >= _size(words, "max_window_layers", least=0)


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
        lambda words, layer: True, layer_types=False),
    "Qwen2ForCausalLM": Family({"attention_bias": True, "output_bias": False}, QWEN, _qwen),
    "Qwen3ForCausalLM": Family({"qk_norm": "head"}, {**QWEN, "head_dim": 128}, _qwen),
    "SmolLM3ForCausalLM": Family(
        {}, {"use_sliding_window": False, "no_rope_layer_interval": 4, "num_key_value_heads": 4,
             "max_position_embeddings": 32768, "rope_theta": 2e6, "tie_word_embeddings": True},
        lambda words, layer: layer in _without_rope(words)),
    "Gemma2ForCausalLM": Family(SANDWICH, GEMMA, lambda words, layer: layer % 2 == 0),
    "Gemma3ForCausalLM": Family(
        {**SANDWICH, "qk_norm": "head"}, GEMMA3,
        lambda words, layer: (layer + 1) % _size(words, "sliding_window_pattern") != 0),
    "Olmo2ForCausalLM": Family({"norms": "post", "qk_norm": "width"}, {"rms_norm_eps": 1e-5},
                               layer_types=False),
}
MODEL_TYPES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
               "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
               "smollm3": "SmolLM3ForCausalLM", "gemma2": "Gemma2ForCausalLM",
               "gemma3_text": "Gemma3ForCausalLM", "olmo2": "Olmo2ForCausalLM"}
TEXT_PART = {"Gemma3ForConditionalGeneration": "gemma3_text"}  # of models that also see pictures


@dataclass(frozen=True)
class Rope:
    """Rotary positions: the base, how it is stretched over a longer context, a factor on cos and
    sin."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original: int = 0  # the context before it was stretched, in tokens
    low: float = 1.0  # llama3: turns within the original context below which it is stretched
    high: float = 4.0  # and above which it is kept; yarn: beta_slow and beta_fast
    whole: bool = True  # yarn: its bounds are rounded to whole widths
    amplitude: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """A model's shape: sizes in config.json's own words, and the features of its family."""

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
    local_rope: Rope | None = None  # of layers that see a window, if it is another
    windows: tuple[int, ...] = ()  # tokens each layer sees back, its own included; 0: all
    no_rope: frozenset[int] = frozenset()  # layers that turn nothing
    norms: str = "pre"  # before attention and MLP, "post" after them, or "sandwich": both
    norm_offset: float = 0.0  # added to a norm's weight
    qk_norm: str = ""  # queries and keys normed by "head", or over all heads: "width"
    scale_embeddings: bool = False  # by sqrt(C)
    query_scalar: float = 0.0  # q k is divided by its root before softmax; 0: by that of D
    attention_cap: float = 0.0  # logits bounded by cap * tanh(x / cap); 0: not
    logit_cap: float = 0.0

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> ModelConfig:
        """Read config.json; UserError on anything that this model would compute wrongly."""
        words, family = known(raw)
        if raw.get("quantization_config"):
            raise UserError("config.json: the weights are quantised (quantization_config); take "
                            "the model in its original precision")
        if words.get("use_bidirectional_attention"):
            raise UserError("config.json: use_bidirectional_attention is true; a causal model is "
                            "needed")
        named = "hidden_activation" if "hidden_activation" in words else "hidden_act"
        activation = words.get(named) or family.words.get(named, "silu")
        if type(activation) is not str or activation not in ACTIVATIONS:
            raise UserError(f"config.json: activation {activation!r}, only "
                            f"{' and '.join(map(repr, ACTIVATIONS))} are supported")
        H, C = _size(words, "num_attention_heads"), _size(words, "hidden_size")
        K = _size(words, "num_key_value_heads", H)
        if words.get("head_dim") is None and C % H:
            raise UserError(f"config.json: hidden_size {C} is not a multiple of "
                            f"num_attention_heads {H}")
        D = _size(words, "head_dim", C // H)
        if H % K or D % 2:
            raise UserError(f"config.json: {H} heads over {K} key/value heads of width {D}: heads "
                            "must be a multiple of key/value heads, and the width even")
        rope, local = _ropes(words)
        biased = _flag(words, "attention_bias")
        fields = {
            "attention_bias": biased, "output_bias": biased, "mlp_bias": _flag(words, "mlp_bias"),
            "windows": _windows(words, family), "no_rope": _without_rope(words),
            "query_scalar": _number(words, "query_pre_attn_scalar", 0.0),
            "attention_cap": _number(words, "attn_logit_softcapping", 0.0),
            "logit_cap": _number(words, "final_logit_softcapping", 0.0), **family.features}
        return cls(
            vocab_size=_size(words, "vocab_size"), hidden_size=C,
            intermediate_size=_size(words, "intermediate_size"),
            num_hidden_layers=_layers(words),
            num_attention_heads=H, num_key_value_heads=K, head_dim=D,
            max_position_embeddings=_size(words, "max_position_embeddings", 2048),
            rms_norm_eps=_number(words, "rms_norm_eps", 1e-6),
            tie_word_embeddings=_flag(words, "tie_word_embeddings"),
            activation=ACTIVATIONS[activation], rope=rope, local_rope=local, **fields)

    def to_hf(self) -> dict[str, Any]:
        """config.json for a LLaMA of this shape, as transformers 4 and 5 both read it."""
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                 "num_attention_heads", "num_key_value_heads", "head_dim",
                 "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
                 "attention_bias", "mlp_bias")
        words = {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
                 "hidden_act": "silu", **{k: getattr(self, k) for k in sizes},
                 "rope_theta": self.rope.theta, "rope_scaling": None}
        if self.rope.kind != "default":
            words["rope_scaling"] = {"rope_type": self.rope.kind, "factor": self.rope.factor}
        if self.rope.kind == "llama3":
            words["rope_scaling"] |= {
                "low_freq_factor": self.rope.low, "high_freq_factor": self.rope.high,
                "original_max_position_embeddings": self.rope.original}
        if ModelConfig.from_hf(words) != self:
            raise UserError("config.json: only a plain LLaMA's can be written")
        return words


def text_words(raw: dict[str, Any]) -> dict[str, Any]:
    """config.json of the text part, for a model that also sees pictures; any other as it is."""
    named = raw.get("architectures")
    if type(named) is not list or not named or str(named[0]) not in TEXT_PART:
        return raw
    text = raw.get("text_config")
    if type(text) is not dict:
        raise UserError(f"config.json: text_config is {text!r}, expected an object")
    kind = TEXT_PART[named[0]]
    outer = {k: raw[k] for k in ("tie_word_embeddings", "dtype", "torch_dtype", "bos_token_id",
                                 "eos_token_id", "pad_token_id", "quantization_config")
             if k in raw}
    return {**outer, **text, "architectures": [MODEL_TYPES[kind]], "model_type": kind}


def text_name(name: str) -> str | None:
    """What a tensor of such a model is called in its text part; None if it belongs to the rest."""
    if name.startswith(("vision_tower.", "multi_modal_projector.", "model.vision_tower.",
                        "model.multi_modal_projector.")):
        return None
    for prefix, replacement in (("model.language_model.", "model."), ("language_model.", "")):
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name


def known(raw: dict[str, Any]) -> tuple[dict[str, Any], Family]:
    """config.json's words with its family's own filled in, and that family; refused by name."""
    raw = text_words(raw)
    named = raw.get("architectures") or [MODEL_TYPES.get(str(raw.get("model_type")),
                                                         raw.get("model_type"))]
    if type(named) is not list or type(named[0]) is not str or named[0] not in FAMILIES:
        raise UserError(f"config.json: architectures {named!r} is not supported; supported are "
                        f"{', '.join([*FAMILIES, *TEXT_PART])}")
    family = FAMILIES[named[0]]
    return {**family.words, **raw}, family


def _ropes(words: dict[str, Any]) -> tuple[Rope, Rope | None]:
    """Rotary positions of the layers that see all, and of those that see a window if others."""
    raw = words.get("rope_parameters") or words.get("rope_scaling") or {}
    if type(raw) is not dict:
        raise UserError(f"config.json: rope_scaling is {raw!r}, expected an object")
    if "rope_local_base_freq" not in words:
        return _rope(raw, words, "rope_theta"), None
    if raw and words.get("rope_parameters") and not raw.keys() & {LOCAL, GLOBAL}:
        raise UserError(f"config.json: rope_parameters name no {LOCAL} and {GLOBAL}")
    full = raw.get(GLOBAL) or {} if raw.keys() & {LOCAL, GLOBAL} else raw
    return (_rope(full, words, "rope_theta"),
            _rope(raw.get(LOCAL) or {}, words, "rope_local_base_freq"))


def _rope(raw: dict[str, Any], words: dict[str, Any], theta: str) -> Rope:
    """One kind of rotary positions, from the words under rope_parameters or rope_scaling."""
    if type(raw) is not dict:
        raise UserError(f"config.json: rope_parameters is {raw!r}, expected an object")
    kind = raw.get("rope_type", raw.get("type", "default"))
    if type(kind) is not str or kind not in ROPE_WORDS:
        raise UserError(f"config.json: rope kind {kind!r} is not supported; supported are "
                        f"{', '.join(ROPE_WORDS)}")
    if raw.get("partial_rotary_factor", words.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise UserError("config.json: partial_rotary_factor is not 1; heads that turn in part are "
                        "not supported")
    base = _number(raw, "rope_theta", _number(words, theta, 10000.0))
    if kind == "default":
        return Rope(base)
    context = _size(words, "max_position_embeddings", 2048)
    original = _size(raw, "original_max_position_embeddings",
                     _size(words, "original_max_position_embeddings", context))
    if kind == "yarn" and raw.get("factor") is None:
        raw = {**raw, "factor": context / original}
    factor, *others = (_number(raw, word) for word in ROPE_WORDS[kind])
    if kind == "llama3":
        return Rope(base, kind, factor, original, *others)
    if kind != "yarn":
        return Rope(base, kind, factor, context)
    mscale, all_dim = raw.get("mscale"), raw.get("mscale_all_dim")
    if mscale and all_dim:  # as DeepSeek has it
        amplitude = (_mscale(factor, _number(raw, "mscale"))
                     / _mscale(factor, _number(raw, "mscale_all_dim")))
    else:
        amplitude = _mscale(factor, 1.0)
    return Rope(base, kind, factor, original, _number(raw, "beta_slow", 1.0),
                _number(raw, "beta_fast", 32.0), _flag({"truncate": True, **raw}, "truncate"),
                _number(raw, "attention_factor", amplitude))


def _mscale(factor: float, weight: float) -> float:
    """YaRN's factor on cos and sin (Peng et al. 2023, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _windows(words: dict[str, Any], family: Family) -> tuple[int, ...]:
    """How far back each layer sees, in tokens, its own included; 0: all. () if no layer is bounded.
    """
    L = _layers(words)
    kinds = [LOCAL if family.windowed(words, i) else GLOBAL for i in range(L)]
    told = words.get("layer_types")
    if told is not None and (family.layer_types or told != kinds):
        good = type(told) is list and len(told) == L and all(x in (LOCAL, GLOBAL) for x in told)
        if not good or not family.layer_types:
            raise UserError(f"config.json: layer_types is {str(told)[:80]}, expected {L} of "
                            f"{LOCAL} and {GLOBAL}, as this family has them")
        kinds = told
    if not _flag({"use_sliding_window": True, **words}, "use_sliding_window") \
            or words.get("sliding_window") is None:
        return ()
    window = _size(words, "sliding_window")
    return tuple(window if x == LOCAL else 0 for x in kinds) if LOCAL in kinds else ()


def _without_rope(words: dict[str, Any]) -> frozenset[int]:
    """Layers that turn nothing: a 0 in no_rope_layers, else every so many of them."""
    if "no_rope_layer_interval" not in words:
        return frozenset()
    L = _layers(words)
    told = words.get("no_rope_layers")
    if told is None:
        every = _size(words, "no_rope_layer_interval")
        return frozenset(range(every - 1, L, every))
    if type(told) is not list or len(told) < L or any(x not in (0, 1) for x in told):
        raise UserError(f"config.json: no_rope_layers is {str(told)[:80]}, expected {L} of 0 and 1")
    return frozenset(i for i in range(L) if not told[i])


def _layers(words: dict[str, Any]) -> int:
    """How many layers there are: what no model has is refused before anything is built for it."""
    L = _size(words, "num_hidden_layers")
    if L > 4096:
        raise UserError(f"config.json: num_hidden_layers is {L}, expected at most 4096")
    return L


def _size(raw: dict, key: str, default: int | None = None, least: int = 1) -> int:
    """A whole number from `least` to 2^31 under a key of config.json."""
    x = default if raw.get(key) is None else raw[key]
    if type(x) is not int or not least <= x < 1 << 31:
        raise UserError(f"config.json: {key} is {x!r}, expected a whole number of at least {least}")
    return x


def _number(raw: dict, key: str, default: float | None = None) -> float:
    """A finite number above 0 under a key of config.json; a default may be 0."""
    if raw.get(key) is None and default is not None:
        return float(default)
    x = raw.get(key)
    if type(x) not in (int, float) or not math.isfinite(x) or x <= 0:
        raise UserError(f"config.json: {key} is {x!r}, expected a number above 0")
    return float(x)


def _flag(raw: dict, key: str) -> bool:
    x = raw.get(key) or False
    if type(x) is not bool:
        raise UserError(f"config.json: {key} is {x!r}, expected true or false")
    return x
