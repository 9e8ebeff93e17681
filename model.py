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
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import RowDocuments
from layers import nf4
from layers.attention_metadata import (
    AttentionMetadata,
    Backend,
    attention_backend,
    attention_metadata,
    cache_metadata,
)
from layers.config import ModelConfig
from layers.cross_entropy import LinearCrossEntropy, softcap
from layers.functional import Embedding, Linear, RMSNorm, apply_rotary_emb, rope_cos_sin, swiglu
from layers.recompute import Recompute, with_recompute


class KVCache:
    """Keys and values of the tokens read so far: k, v (L,B,S,K,D).

    `lengths` (B,) says how many tokens each row holds, `cache_len` how many the longest row holds
    (a number of the host, so no device is asked). A token is stored at its own `pos`, so rows may
    differ in length. Padding on the right (doc -1) is overwritten before any token sees it.
    """

    exact = True  # a pass reads no key beyond the longest row

    def __init__(self, config: ModelConfig, rows: int, size: int, device: Any, dtype: torch.dtype):
        # a head's keys are contiguous in memory, because a head reads all of its keys and no others
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, size, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype).transpose(2, 3)  # (L,B,S,K,D)
        self.v = torch.zeros(shape, device=device, dtype=dtype).transpose(2, 3)
        self.set_lengths(torch.zeros(rows, dtype=torch.long, device=device), 0)

    def set_lengths(self, lengths: Tensor, cache_len: int) -> None:
        """State how many tokens each row holds, (B,), and the largest of these numbers."""
        self.lengths, self.cache_len = lengths, cache_len

    def begin_pass(self, T: int) -> int | None:
        """Add T tokens to each row; how many keys S they read. None: only keys of the same pass."""
        self.cache_len += T
        return self.cache_len

    def update(self, layer: int, k: Tensor, v: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B,T,K,D) of a layer at pos (B,T); return the keys and values to read,
        (B,S,K,D)."""
        rows = torch.arange(len(pos), device=pos.device)[:, None]
        self.k[layer][rows, pos], self.v[layer][rows, pos] = k, v
        return self.k[layer][:, : self.cache_len], self.v[layer][:, : self.cache_len]

    def end_pass(self, doc: Tensor, pos: Tensor) -> None:
        """Count the tokens of a pass, doc, pos (B,T), that are not padding."""
        self.lengths = torch.maximum(self.lengths, torch.where(doc >= 0, pos + 1, 0).amax(1))

    def select(self, rows: slice) -> KVCache:
        """Some of the rows as a cache of their own, in the same memory."""
        view = copy.copy(self)
        view.k, view.v, view.lengths = self.k[:, rows], self.v[:, rows], self.lengths[rows]
        return view


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

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None,
                attention: AttentionMetadata, pos: Tensor,
                cache: KVCache | None, layer: int) -> Tensor:
        B, T, _ = x.shape
        q, k = self.q_proj(x), self.k_proj(x)
        if self.normed == "width":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.view(B, T, -1, self.D), k.view(B, T, -1, self.D)  # (B,T,H,D), (B,T,K,D)
        if self.normed == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rotary_emb(q, *rope), apply_rotary_emb(k, *rope)
        v = self.v_proj(x).view(B, T, -1, self.D)  # (B,T,K,D)
        if cache is not None:
            k, v = cache.update(layer, k, v, pos)
        y = attention.attend(q, k, v, self.scale, self.cap)  # (B,T,H,D)
        return self.o_proj(y.flatten(2))  # (B,T,C)


class MLP(nn.Module):
    """A gated MLP (Shazeer 2020): down(act(gate x) * up x)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, M = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(C, M, bias=config.mlp_bias)
        self.up_proj = Linear(C, M, bias=config.mlp_bias)
        self.down_proj = Linear(M, C, bias=config.mlp_bias)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), self.activation))


class Block(nn.Module):
    """One layer: attention and MLP, each added to what came in; normed before, after, or both.

    The norms have HF's names, in which `post_attention_layernorm` is the one *before* the MLP
    where there is none after attention.
    """

    def __init__(self, config: ModelConfig, recompute: Recompute = "none"):
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
        self.recompute = recompute

    def norm(self, which: int, x: Tensor) -> Tensor:
        return getattr(self, self.names[which])(x) if self.names[which] else x

    def forward(self, x: Tensor, *shared: Any) -> Tensor:
        """x (B,T,C) and what all layers share -> (B,T,C)."""
        return with_recompute(self._forward, self.recompute, x, *shared)

    def _forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None,
                 attention: AttentionMetadata, pos: Tensor,
                 cache: KVCache | None = None, layer: int = 0) -> Tensor:
        seen = self.self_attn(self.norm(0, x), rope, attention, pos, cache, layer)
        x = x + self.norm(1, seen)
        return x + self.norm(3, self.mlp(self.norm(2, x)))  # (B,T,C)


def neftune_noise(x: Tensor, doc: Tensor, alpha: float) -> Tensor:
    """Uniform noise within alpha / sqrt(n C) for each document of n tokens in a row: (B,T,C).

    NEFTune (Jain et al. 2024, algorithm 1), whose rows hold one example each. x (B,T,C), doc (B,T).
    """
    index = doc + 1  # (B,T); 0 is the unused tail of a row
    counts = F.pad(torch.zeros_like(doc), (0, 1)).scatter_add_(1, index, torch.ones_like(doc))
    n = counts.gather(1, index)  # (B,T): tokens of each token's document
    bound = alpha / (n * x.shape[-1]).sqrt()[..., None]  # (B,T,1)
    return (torch.empty_like(x).uniform_(-1, 1) * bound).to(x.dtype)


class SharedInputs(NamedTuple):
    """What all layers read: attention's metadata by window, and cos and sin (B,T,1,D/2) of the
    rotary angles, for layers that see everything and for those with a window."""

    attention: dict[int, AttentionMetadata]
    rope: tuple[Tensor, Tensor]
    local_rope: tuple[Tensor, Tensor]


class Decoder(nn.Module):
    """Embeddings, L blocks and the last norm: tokens, doc, pos (B,T) -> (B,T,C)."""

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype, recompute: Recompute,
                 neftune_alpha: float, backend: Backend):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, recompute)
                                    for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config)
        self.compute_dtype = compute_dtype
        self.neftune_alpha = neftune_alpha
        self.attention_backend = backend

    def shared_inputs(self, doc: Tensor, pos: Tensor, cache: KVCache | None = None,
                      documents: RowDocuments | None = None) -> SharedInputs:
        """What all layers read, for rows doc, pos (B,T). `documents` describes them on the host;
        without it a GPU is waited for."""
        c = self.config
        windows = set(c.windows) or {0}
        cache_len = None if cache is None else cache.begin_pass(doc.shape[1])
        if cache_len is None:
            documents = documents or RowDocuments.of(doc.cpu(), pos.cpu())
            backend = self.attention_backend
            if backend == "auto":
                backend = attention_backend(doc.device, self.compute_dtype, c.head_dim)
            attention = {w: attention_metadata(doc, documents.lengths, backend, w,
                                               bool(c.attention_cap)) for w in windows}
        else:
            attention = {w: cache_metadata(pos, cache_len, cache.exact, w) for w in windows}
        longest = documents.longest if documents else None
        rope = rope_cos_sin(c.rope, c.head_dim, doc, pos, longest)
        local = rope
        if c.local_rope:
            local = rope_cos_sin(c.local_rope, c.head_dim, doc, pos, longest)
        return SharedInputs(attention, rope, local)

    def forward(self, tokens: Tensor, doc: Tensor, pos: Tensor, cache: KVCache | None = None,
                documents: RowDocuments | None = None,
                shared: SharedInputs | None = None) -> Tensor:
        c = self.config
        x = self.embed_tokens(tokens).to(self.compute_dtype)  # (B,T,C)
        if self.training and self.neftune_alpha:
            x = x + neftune_noise(x, doc, self.neftune_alpha)
        if c.scale_embeddings:  # rounded to the compute dtype, as the published models were
            x = x * torch.tensor(c.hidden_size**0.5, dtype=x.dtype)
        if shared is None:
            shared = self.shared_inputs(doc, pos, cache, documents)
        windows = c.windows or (0,) * len(self.layers)
        for i, (block, window) in enumerate(zip(self.layers, windows, strict=True)):
            rope = shared.local_rope if window else shared.rope
            if i in c.no_rope:
                rope = None
            # without a cache all layers get the number 0: one that varies would recompile
            layer = 0 if cache is None else i
            x = block(x, rope, shared.attention[window], pos, cache, layer)
        if cache is not None:
            cache.end_pass(doc, pos)
        return self.norm(x)


class Llama(nn.Module):
    """A causal language model of the LLaMA family; `state_dict()` has the names and shapes of HF's
    file."""

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32,
                 recompute: Recompute = "none", neftune_alpha: float = 0.0,
                 attention_backend: Backend = "auto"):
        """`compute_dtype` is that of matrix products and of activations; `recompute`: see
        layers/recompute.py; `neftune_alpha`: noise on the embeddings in training, 0: none;
        `attention_backend`: see layers/attention_metadata.py, auto: by device and dtype."""
        super().__init__()
        self.config = config
        self.model = Decoder(config, compute_dtype, recompute, neftune_alpha, attention_backend)
        self.lm_head = None if config.tie_word_embeddings else \
            Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss = LinearCrossEntropy(config.logit_cap)
        self.base_values: dict[str, Tensor] = {}

    def set_lm_head(self, lm_head: nn.Module) -> None:
        """Replace the output layer; a model with tied embeddings then has one of its own."""
        self.lm_head = lm_head

    def set_base_values(self, values: dict[str, Tensor]) -> None:
        """Keep the frozen values of parameters that are trained in addition to an adapter, by name
        (lora.py). They are neither parameters nor buffers."""
        self.base_values = values

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
                cache: KVCache | None = None, reduction: Literal["none", "sum"] = "none",
                documents: RowDocuments | None = None, trained: Tensor | None = None) -> Tensor:
        """With targets their NLL, 0 where ignored: (B,T) float32, or () for `reduction="sum"`.

        Without targets the logits of the token that follows each row's last token with doc >= 0:
        (B,V) float32. tokens, doc, pos, targets (B,T). `documents` and `trained` (n,), the places
        of the targets that are not ignored, are what a Batch knows of them on the host.
        """
        h = self.model(tokens, doc, pos, cache, documents)  # (B,T,C)
        if targets is not None:
            return self.loss(h, self.head, targets, reduction, trained)
        last = ((doc >= 0) * torch.arange(1, doc.shape[1] + 1, device=doc.device)).argmax(1)  # (B,)
        h = h[torch.arange(len(h), device=h.device), last]  # (B,C)
        return self.logits(h)

    def states(self, tokens: Tensor, doc: Tensor, pos: Tensor,
               cache: KVCache | None = None) -> Tensor:
        """Hidden states of each token, (B,T) x3 -> (B,T,C): for who asks for logits of his own."""
        return self.model(tokens, doc, pos, cache)

    def logits(self, h: Tensor) -> Tensor:
        """Logits of what follows hidden states (...,C): (...,V) float32."""
        y = F.linear(h, self.head.to(h.dtype)) if self.lm_head is None else self.lm_head(h)
        return softcap(y.float(), self.config.logit_cap)

    def flops_per_token(self, T: int, gradient: bool = True) -> float:
        """Products to train one token in documents of T: 2 a weight for y, 2 for dx, 2 for dW where
        it trains; without a `gradient` those for y alone.

        Attention adds 2 T H D a layer (its causal half counted), and twice as many for gradients.
        The embedding is a look-up and costs none.
        """
        c = self.config
        matrices = [m.weight for m in self.modules() if isinstance(m, nn.Linear)]
        matrices += [self.head] if self.lm_head is None else []
        frozen, trains, passes = (4, 6, 3) if gradient else (2, 2, 1)
        attention = 2 * passes * T * c.num_attention_heads * c.head_dim * c.num_hidden_layers
        quantised = frozen * sum(m.numel for m in nf4.found(self))
        return sum((trains if W.requires_grad else frozen) * W.numel() for W in matrices) \
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
