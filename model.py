"""The LLaMA family and its kin in plain PyTorch, with Hugging Face's own names.

Modules are named so that `state_dict()` *is* the checkpoint: there is no converter, so none can be
wrong. A family is a row of features (families.py): no line here asks which model this is.

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

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nf4
from families import ModelConfig, Rope
from loss import capped, token_nll

ONE_BY_ONE = ("cpu",)  # where packed documents are attended one after the other, not by a mask


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

    def __init__(self, width: int, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.offset = config.rms_norm_eps, config.norm_offset

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float() + self.offset if self.offset else self.weight.float()
        return F.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)


def rotary_frequencies(rope: Rope, D: int, device: Any, length: Tensor | None = None) -> Tensor:
    """Radians per position for each pair of a head's widths, (D/2,) float32 (RoFormer, 3.2.2).

    `dynamic` frequencies depend on how long a token's document is: `length` (B,T,1) -> (B,T,D/2).
    """
    even = torch.arange(0, D, 2, device=device).float()
    theta: float | Tensor = rope.theta
    if rope.kind == "dynamic" and length is not None:  # NTK-aware: the base grows with the text
        over = length.clamp(min=rope.original) / rope.original
        theta = theta * (rope.factor * over - (rope.factor - 1)) ** (D / (D - 2))  # (B,T,1)
    f = 1.0 / theta ** (even / D)
    if rope.kind == "linear":
        return f / rope.factor
    if rope.kind == "llama3":  # slow turns are stretched, fast ones kept, others blended
        turns = rope.original * f / (2 * math.pi)  # within the original context
        keep = ((turns - rope.low) / (rope.high - rope.low)).clamp(0, 1)
    elif rope.kind == "yarn":  # the same, blended by the index of the pair (Peng et al. 2023, 3.2)
        low, high = (D * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(theta))
                     for turns in (rope.high, rope.low))
        low, high = (math.floor(low), math.ceil(high)) if rope.whole else (low, high)
        low, high = max(low, 0), min(high, D - 1)
        keep = 1 - ((even / 2 - low) / ((high - low) or 0.001)).clamp(0, 1)
    else:
        return f
    return f * (keep + (1 - keep) / rope.factor)


def turns(rope: Rope, D: int, doc: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every token's angles, (B,T,1,D/2) float32."""
    length = None
    if rope.kind == "dynamic" and pos.numel() and pos.max() >= rope.original:
        same = doc[:, :, None] == doc[:, None, :]  # (B,T,T)
        length = ((pos + 1)[:, None, :] * same).amax(-1, keepdim=True)  # (B,T,1)
    angles = pos[..., None].float() * rotary_frequencies(rope, D, pos.device, length)  # (B,T,D/2)
    return angles.cos()[:, :, None] * rope.amplitude, angles.sin()[:, :, None] * rope.amplitude


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

    def part(self, rows: slice) -> KVCache:
        """Some of the rows as a cache of their own, in the same memory."""
        part = copy.copy(self)
        part.k, part.v, part.length = self.k[:, rows], self.v[:, rows], self.length[rows]
        return part


@dataclass
class Layout:
    """Who sees whom in this batch, found once and used by all layers that see as far.

    `lengths`: documents end to end over all rows, attended one by one (fast on a CPU: half of
    nothing is computed). `mask` (B,1,T,S): True where a key is seen. Neither: each row is one
    document, plain causal. `window`: tokens seen back, the token itself included; 0: all.
    """

    lengths: list[int] | None = None
    mask: Tensor | None = None
    window: int = 0

    @classmethod
    def of(cls, doc: Tensor, pos: Tensor, cache: KVCache | None, window: int = 0) -> Layout:
        """From doc, pos (B,T) and the cache that is read, if any."""
        B, T = doc.shape
        if cache is not None:
            near = not window or cache.extent <= window
            if cache.extent == T or (B == 1 and T == 1 and near):
                return cls(window=window)  # first tokens: causal; the next one sees all keys
            keys = torch.arange(cache.extent, device=pos.device)
            mask = keys <= pos[..., None]  # (B,T,S)
            return cls(mask=(mask if near else mask & (keys > pos[..., None] - window))[:, None])
        first = torch.ones_like(doc, dtype=torch.bool)
        first[:, 1:] = doc[:, 1:] != doc[:, :-1]
        starts = first.flatten().nonzero().squeeze(-1)
        if len(starts) == B:
            return cls(window=window)
        if doc.device.type in ONE_BY_ONE:
            lengths = torch.diff(starts, append=starts.new_tensor([B * T])).tolist()
            return cls(lengths, window=window)
        seen = causal_mask(T, window, doc.device)
        return cls(mask=((doc[:, :, None] == doc[:, None, :]) & seen)[:, None])


def causal_mask(T: int, window: int, device: Any) -> Tensor:
    """True where a token sees another: not ahead, and within the window if there is one, (T,T)."""
    seen = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    return seen.triu(1 - window) if window else seen


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float,
           cap: float = 0.0) -> Tensor:
    """Softmax attention: q (B,T,H,D) over k, v (B,S,K,D) -> (B,T,H,D), each query head with its
    group's keys."""
    T, H = q.shape[1:3]
    if layout.lengths is not None:
        return attend_documents(q, k, v, layout, scale, cap)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B,H,T,D), (B,K,S,D)
    if k.shape[1] != H:
        k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))  # (B,H,S,D)
    mask, causal = layout.mask, layout.mask is None and T > 1
    if causal and (cap or 0 < layout.window < T):
        mask, causal = causal_mask(T, layout.window, q.device), False
    if not cap:
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)
        return y.transpose(1, 2)
    scores = cap * torch.tanh((q @ k.mT).float() * (scale / cap))  # (B,H,T,S): no fused kernel caps
    scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)


@torch.compiler.disable  # lengths differ in every batch: compiled, each would be a new graph
def attend_documents(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float,
                     cap: float) -> Tensor:
    """`attend`, document by document; split and cat, because their backward passes copy nothing
    twice."""
    parts = (x.flatten(0, 1)[None].split(layout.lengths, dim=1) for x in (q, k, v))
    alone = Layout(window=layout.window)
    done = [attend(*part, alone, scale, cap) for part in zip(*parts, strict=True)]
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
        self.o_proj = Linear(H * D, C, bias=config.output_bias)
        self.D, self.normed, self.cap = D, config.qk_norm, config.attention_cap
        self.scale = (config.query_scalar or D) ** -0.5
        if config.qk_norm:
            self.q_norm = RMSNorm(D if config.qk_norm == "head" else H * D, config)
            self.k_norm = RMSNorm(D if config.qk_norm == "head" else K * D, config)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None, layout: Layout, pos: Tensor,
                cache: KVCache | None, layer: int) -> Tensor:
        B, T, _ = x.shape
        q, k = self.q_proj(x), self.k_proj(x)
        if self.normed == "width":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.view(B, T, -1, self.D), k.view(B, T, -1, self.D)  # (B,T,H,D), (B,T,K,D)
        if self.normed == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        v = self.v_proj(x).view(B, T, -1, self.D)  # (B,T,K,D)
        if cache is not None:
            k, v = cache.put(layer, k, v, pos)
        return self.o_proj(attend(q, k, v, layout, self.scale, self.cap).flatten(2))  # (B,T,C)


class MLP(nn.Module):
    """A gated MLP (Shazeer 2020): down(act(gate x) * up x)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, M = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(C, M, bias=config.mlp_bias)
        self.up_proj = Linear(C, M, bias=config.mlp_bias)
        self.down_proj = Linear(M, C, bias=config.mlp_bias)
        self.activation = {"silu": F.silu, "gelu_tanh": gelu_tanh}[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


def gelu_tanh(x: Tensor) -> Tensor:
    """x times the normal distribution function, by tanh (Hendrycks & Gimpel 2016, section 2)."""
    return F.gelu(x, approximate="tanh")


class Block(nn.Module):
    """One layer: attention and MLP, each added to what came in; normed before, after, or both.

    The norms have HF's names, in which `post_attention_layernorm` is the one *before* the MLP
    where there is none after attention.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        names = {"pre": ("input_layernorm", "", "post_attention_layernorm", ""),
                 "post": ("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
                 "sandwich": ("input_layernorm", "post_attention_layernorm",
                              "pre_feedforward_layernorm", "post_feedforward_layernorm")}
        self.names = names[config.norms]  # before and after attention, before and after the MLP
        for name in filter(None, self.names):
            self.add_module(name, RMSNorm(config.hidden_size, config))

    def norm(self, which: int, x: Tensor) -> Tensor:
        return getattr(self, self.names[which])(x) if self.names[which] else x

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None, layout: Layout, pos: Tensor,
                cache: KVCache | None = None, layer: int = 0) -> Tensor:
        seen = self.self_attn(self.norm(0, x), turn, layout, pos, cache, layer)
        x = x + self.norm(1, seen)
        return x + self.norm(3, self.mlp(self.norm(2, x)))  # (B,T,C)


class Decoder(nn.Module):
    """Embeddings, L blocks and the last norm: tokens, doc, pos (B,T) -> (B,T,C)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config)
        self.compute_dtype = torch.float32  # of products and of what flows between them
        self.recompute = False

    def forward(self, tokens: Tensor, doc: Tensor, pos: Tensor,
                cache: KVCache | None = None) -> Tensor:
        c = self.config
        x = self.embed_tokens(tokens).to(self.compute_dtype)  # (B,T,C)
        if c.scale_embeddings:  # rounded to the dtype of products, as the published models were
            x = x * torch.tensor(c.hidden_size**0.5, dtype=x.dtype, device=x.device)
        if cache is not None:
            cache.extent += tokens.shape[1]
        windows = c.windows or (0,) * len(self.layers)
        layouts = {window: Layout.of(doc, pos, cache, window) for window in set(windows)}
        turn = turns(c.rope, c.head_dim, doc, pos)
        local = turns(c.local_rope, c.head_dim, doc, pos) if c.local_rope else turn
        for i, (block, window) in enumerate(zip(self.layers, windows, strict=True)):
            here = None if i in c.no_rope else local if window else turn
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, here, layouts[window], pos, use_reentrant=False)
            else:  # without a cache all layers get one number: one that varies recompiles
                x = block(x, here, layouts[window], pos, cache, 0 if cache is None else i)
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
            return token_nll(h, self.head, targets, self.config.logit_cap)
        last = ((doc >= 0) * torch.arange(1, doc.shape[1] + 1, device=doc.device)).argmax(1)  # (B,)
        h = h[torch.arange(len(h), device=h.device), last]  # (B,C)
        return self.logits(h)

    def logits(self, h: Tensor) -> Tensor:
        """Logits of what follows hidden states (...,C): (...,V) float32."""
        return capped(F.linear(h, self.head.to(h.dtype)).float(), self.config.logit_cap)

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
        quantised = 4 * sum(m.numel for m in nf4.found(self))  # frozen
        return sum((6 if W.requires_grad else 4) * W.numel() for W in matrices) \
            + quantised + attention

    @torch.no_grad()
    def initialise(self, seed: int, std: float = 0.02) -> None:
        """Random weights for a model that starts from nothing (GPT-2's rule: outputs to the
        residual smaller)."""
        g = torch.Generator(device=self.device).manual_seed(seed)
        for name, p in self.named_parameters():
            if "norm" in name:
                p.fill_(1.0 - self.config.norm_offset)
            elif name.endswith("bias"):
                p.zero_()
            else:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                p.normal_(
                    0, std / math.sqrt(2 * self.config.num_hidden_layers) if into_residual else std,
                    generator=g)
