"""The LLaMA family in plain PyTorch, with Hugging Face's own names.

Modules are named so that `state_dict()` *is* the checkpoint: there is no converter, so none can be
wrong. A family is a row of flags: `ModelConfig.from_hf` reads config.json once, and below it no
line asks which model this is. What it does not know by name (architecture, rope kind, activation,
quantisation) it refuses: never load what would be computed wrongly.

The alphabet, here and everywhere. Capitals are sizes, small letters tensors:
    B rows   T tokens in a row   S keys   C width   M MLP width   V vocabulary
    H heads   K key/value heads   D head width   L layers   R LoRA rank   N documents

Rows are packed: `doc` (B,T) says which document a token belongs to (-1: none), `pos` (B,T) where in
it the token stands. Attention never crosses documents, so a packed row computes what its documents
would alone.

dtype in one sentence: weights stay in the dtype they are kept in, products run in `compute_dtype`,
and softmax, norms, rotary and loss run in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from log import UserError
from loss import token_nll

ARCHITECTURES = ("LlamaForCausalLM",)
ROPE_KINDS = ("default", "linear", "llama3")
ONE_BY_ONE = ("cpu",)  # where packed documents are attended one after the other, not by a mask


@dataclass(frozen=True)
class ModelConfig:
    """A model's shape, in config.json's own words. Sizes are counts, `rope_theta` a base, eps a
    number."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # {"rope_type": linear | llama3, "factor": ...}
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> ModelConfig:
        """Read config.json; UserError on anything that this model would compute wrongly."""
        architecture = raw.get("architectures") or [raw.get("model_type")]
        if type(architecture) is not list or architecture[0] not in (*ARCHITECTURES, "llama"):
            raise UserError(
                f"config.json: architectures {architecture!r} is not supported; supported are "
                f"{', '.join(ARCHITECTURES)}")
        if raw.get("hidden_act", "silu") != "silu":
            raise UserError(f"config.json: activation {raw['hidden_act']!r}, only 'silu' is "
                            "supported")
        if raw.get("quantization_config"):
            raise UserError(
                "config.json: the weights are quantised (quantization_config); take the model "
                "in its original precision")
        H, C = _size(raw, "num_attention_heads"), _size(raw, "hidden_size")
        K = _size(raw, "num_key_value_heads", H)
        if raw.get("head_dim") is None and C % H:
            raise UserError(f"config.json: hidden_size {C} is not a multiple of "
                            f"num_attention_heads {H}")
        D = _size(raw, "head_dim", C // H)
        if H % K or D % 2:
            raise UserError(
                f"config.json: {H} heads over {K} key/value heads of width {D}: heads must be a "
                "multiple of key/value heads, and the width even")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if type(rope) is not dict:
            raise UserError(f"config.json: rope_scaling is {rope!r}, expected an object")
        rope = dict(rope)
        rope["rope_type"] = rope.get("rope_type", rope.pop("type", "default"))
        if rope["rope_type"] not in ROPE_KINDS:
            raise UserError(
                f"config.json: rope kind {rope['rope_type']!r} is not supported; supported are "
                f"{', '.join(ROPE_KINDS)}")
        wanted = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                                                    "original_max_position_embeddings")}
        scaling = {k: _number(rope, k) for k in wanted.get(rope["rope_type"], ())}
        return cls(vocab_size=_size(raw, "vocab_size"), hidden_size=C,
                   intermediate_size=_size(raw, "intermediate_size"),
                   num_hidden_layers=_size(raw, "num_hidden_layers"),
                   num_attention_heads=H, num_key_value_heads=K, head_dim=D,
                   max_position_embeddings=_size(raw, "max_position_embeddings", 2048),
                   rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
                   rope_theta=_number(rope, "rope_theta", _number(raw, "rope_theta", 10000.0)),
                   rope_scaling={"rope_type": rope["rope_type"], **scaling} if scaling else None,
                   tie_word_embeddings=_flag(raw, "tie_word_embeddings"),
                   attention_bias=_flag(raw, "attention_bias"), mlp_bias=_flag(raw, "mlp_bias"))

    def to_hf(self) -> dict[str, Any]:
        """config.json's words for this shape, as transformers 4 and 5 both read them."""
        words = dict(vars(self))
        return {"architectures": [ARCHITECTURES[0]], "model_type": "llama", "hidden_act": "silu",
                **words}


def _size(raw: dict, key: str, default: int | None = None) -> int:
    """A whole number from 1 to 2^31 under a key of config.json."""
    x = default if raw.get(key) is None else raw[key]
    if type(x) is not int or not 0 < x < 1 << 31:
        raise UserError(f"config.json: {key} is {x!r}, expected a whole number above 0")
    return x


def _number(raw: dict, key: str, default: float | None = None) -> float:
    """A finite number above 0 under a key of config.json."""
    x = default if raw.get(key) is None else raw[key]
    if type(x) not in (int, float) or not math.isfinite(x) or x <= 0:
        raise UserError(f"config.json: {key} is {x!r}, expected a number above 0")
    return float(x)


def _flag(raw: dict, key: str) -> bool:
    x = raw.get(key) or False
    if type(x) is not bool:
        raise UserError(f"config.json: {key} is {x!r}, expected true or false")
    return x


class Linear(nn.Linear):
    """y = W x + b in x's dtype, whatever W is kept in. Construction computes nothing: weights come
    from a file."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Embedding(nn.Embedding):
    """A row of the table for each id. Construction computes nothing: weights come from a file."""

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the width, in float32 (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def rotary_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Radians per position for each pair of a head's widths, (D/2,) float32 (RoFormer, section
    3.2.2)."""
    D, scaling = config.head_dim, config.rope_scaling or {"rope_type": "default"}
    f = 1.0 / config.rope_theta ** (torch.arange(0, D, 2, device=device).float() / D)  # (D/2,)
    if scaling["rope_type"] == "linear":
        return f / scaling["factor"]
    if scaling["rope_type"] == "llama3":  # slow turns are stretched, fast ones kept, others blended
        turns = scaling["original_max_position_embeddings"] * f / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return f * (keep + (1 - keep) / scaling["factor"])
    return f


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + D/2) of x (B,T,H,D) by its angle; cos, sin (B,T,1,D/2). The half-split
    kind."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class KVCache:
    """Keys and values of what was read so far: k, v (L,B,S,K,D); `length` (B,) tokens held in each
    row.

    A token is kept at its own `pos`, so rows may differ in length; what a shorter prompt's padding
    (doc -1, on the right) leaves behind is overwritten before it can be seen.
    """

    def __init__(self, config: ModelConfig, rows: int, size: int, device: Any, dtype: torch.dtype):
        shape = (config.num_hidden_layers, rows, size, config.num_key_value_heads, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length = torch.zeros(rows, dtype=torch.long, device=device)
        self.extent = 0  # no row has a token at or beyond it; known without asking the device

    def put(self, layer: int, k: Tensor, v: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """Keep k, v (B,T,K,D) at pos (B,T); return all keys and values up to the extent,
        (B,S,K,D)."""
        rows = torch.arange(len(pos), device=pos.device)[:, None]
        self.k[layer][rows, pos], self.v[layer][rows, pos] = k, v
        return self.k[layer][:, : self.extent], self.v[layer][:, : self.extent]


@dataclass
class Layout:
    """Who sees whom in this batch, found once and used by all layers.

    `lengths`: documents end to end over all rows, attended one by one (fast on a CPU: half of
    nothing is computed). `mask` (B,1,T,S): True where a key is seen. Neither: each row is one
    document, plain causal.
    """

    lengths: list[int] | None = None
    mask: Tensor | None = None

    @classmethod
    def of(cls, doc: Tensor, pos: Tensor, cache: KVCache | None) -> Layout:
        """From doc, pos (B,T) and the cache that is read, if any."""
        B, T = doc.shape
        if cache is not None:
            if B == 1 and (T == 1 or cache.extent == T):
                return cls()  # the next token sees all keys; the first ones are plain causal
            keys = torch.arange(cache.extent, device=pos.device)
            return cls(mask=(keys <= pos[..., None])[:, None])
        first = torch.ones_like(doc, dtype=torch.bool)
        first[:, 1:] = doc[:, 1:] != doc[:, :-1]
        starts = first.flatten().nonzero().squeeze(-1)
        if len(starts) == B:
            return cls()
        if doc.device.type in ONE_BY_ONE:
            return cls(lengths=torch.diff(starts, append=starts.new_tensor([B * T])).tolist())
        causal = torch.ones(T, T, dtype=torch.bool, device=doc.device).tril()
        return cls(mask=((doc[:, :, None] == doc[:, None, :]) & causal)[:, None])


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Softmax attention: q (B,T,H,D) over k, v (B,S,K,D) -> (B,T,H,D), each query head with its
    group's keys."""
    T, H = q.shape[1:3]
    if layout.lengths is not None:
        return attend_documents(q, k, v, layout)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B,H,T,D), (B,K,S,D)
    if k.shape[1] != H:
        k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))  # (B,H,S,D)
    causal = layout.mask is None and T > 1
    return F.scaled_dot_product_attention(q, k, v, layout.mask, is_causal=causal).transpose(1, 2)


@torch.compiler.disable  # lengths differ in every batch: compiled, each would be a new graph
def attend_documents(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """`attend`, document by document; split and cat, because their backward passes copy nothing
    twice."""
    parts = (x.flatten(0, 1)[None].split(layout.lengths, dim=1) for x in (q, k, v))
    done = [attend(*part, Layout()) for part in zip(*parts, strict=True)]
    return torch.cat(done, dim=1).view(q.shape)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023): H query heads share K keys and values."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        H, K, D, C = (config.num_attention_heads, config.num_key_value_heads, config.head_dim,
                      config.hidden_size)
        self.q_proj = Linear(C, H * D, bias=config.attention_bias)
        self.k_proj = Linear(C, K * D, bias=config.attention_bias)
        self.v_proj = Linear(C, K * D, bias=config.attention_bias)
        self.o_proj = Linear(H * D, C, bias=config.attention_bias)
        self.D = D

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, pos: Tensor,
                cache: KVCache | None, layer: int) -> Tensor:
        B, T, _ = x.shape
        q = rotate(self.q_proj(x).view(B, T, -1, self.D), cos, sin)  # (B,T,H,D)
        k = rotate(self.k_proj(x).view(B, T, -1, self.D), cos, sin)  # (B,T,K,D)
        v = self.v_proj(x).view(B, T, -1, self.D)  # (B,T,K,D)
        if cache is not None:
            k, v = cache.put(layer, k, v, pos)
        return self.o_proj(attend(q, k, v, layout).flatten(2))  # (B,T,C)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate x) * up x)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, M = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(C, M, bias=config.mlp_bias)
        self.up_proj = Linear(C, M, bias=config.mlp_bias)
        self.down_proj = Linear(M, C, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (B,T,M) inside


class Block(nn.Module):
    """One layer: attention and MLP, each after a norm and added to what came in."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, pos: Tensor,
                cache: KVCache | None = None, layer: int = 0) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layout, pos, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))  # (B,T,C)


class Decoder(nn.Module):
    """Embeddings, L blocks and the last norm: tokens, doc, pos (B,T) -> (B,T,C)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.compute_dtype = torch.float32  # of products and of what flows between them
        self.recompute = False

    def forward(self, tokens: Tensor, doc: Tensor, pos: Tensor,
                cache: KVCache | None = None) -> Tensor:
        x = self.embed_tokens(tokens).to(self.compute_dtype)  # (B,T,C)
        angles = pos[..., None].float() * rotary_frequencies(self.config, x.device)  # (B,T,D/2)
        cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]  # (B,T,1,D/2)
        if cache is not None:
            cache.extent += tokens.shape[1]
        layout = Layout.of(doc, pos, cache)
        for i, block in enumerate(self.layers):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, layout, pos, use_reentrant=False)
            else:
                x = block(
                    x, cos, sin, layout, pos, cache, 0 if cache is None else i
                )  # a number that varies recompiles
        if cache is not None:
            cache.length = torch.maximum(cache.length, torch.where(doc >= 0, pos + 1, 0).amax(1))
        return self.norm(x)


class Llama(nn.Module):
    """A causal language model of the LLaMA family; `state_dict()` has the names and shapes of HF's
    file."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None if config.tie_word_embeddings else \
            Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """What turns hidden states into logits, (V,C): its own weights, or the embedding's if
        tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.model.compute_dtype

    def forward(self, tokens: Tensor, doc: Tensor, pos: Tensor, targets: Tensor | None = None,
                cache: KVCache | None = None) -> Tensor:
        """NLL of each target, (B,T) float32, 0 where IGNORE; without targets each row's next
        logits, (B,V) float32.

        tokens, doc, pos, targets (B,T). The next logits are those of a row's last token with doc >=
        0.
        """
        h = self.model(tokens, doc, pos, cache)  # (B,T,C)
        if targets is not None:
            return token_nll(h, self.head, targets)
        last = ((doc >= 0) * torch.arange(1, doc.shape[1] + 1, device=doc.device)).argmax(1)  # (B,)
        h = h[torch.arange(len(h), device=h.device), last]  # (B,C)
        return F.linear(h, self.head.to(h.dtype)).float()  # (B,V)

    def flops_per_token(self, T: int) -> float:
        """Products to train one token in rows of T: 2 a weight for y, 2 for dx, 2 for dW where it
        trains.

        Attention adds 6 T H D a layer (its causal half counted). The embedding is a look-up and
        costs none.
        """
        c = self.config
        matrices = [m.weight for m in self.modules() if isinstance(m, nn.Linear)]
        matrices += [self.head] if self.lm_head is None else []
        attention = 6 * T * c.num_attention_heads * c.head_dim * c.num_hidden_layers
        return sum((6 if W.requires_grad else 4) * W.numel() for W in matrices) + attention

    @torch.no_grad()
    def initialise(self, seed: int, std: float = 0.02) -> None:
        """Random weights for a model that starts from nothing (GPT-2's rule: outputs to the
        residual smaller)."""
        g = torch.Generator(device=self.device).manual_seed(seed)
        for name, p in self.named_parameters():
            if "norm" in name:
                p.fill_(1.0)
            elif name.endswith("bias"):
                p.zero_()
            else:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                p.normal_(
                    0, std / math.sqrt(2 * self.config.num_hidden_layers) if into_residual else std,
                    generator=g)
