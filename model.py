"""The LLaMA family in plain PyTorch, with Hugging Face's names.

The modules have the names of Hugging Face's, so `state_dict()` is the checkpoint and there is no
converter. A model family is a set of features in `ModelConfig` (layers/config.py); no line here
asks which family a model belongs to.

Sizes, here and in all other files:
    B rows   T tokens in a row   S keys   C width   M MLP width   V vocabulary
    H heads   K key/value heads   D head width   L layers   R LoRA rank   N documents

Rows are packed with several documents. `doc` (B,T) is the number of each token's document in its
row, -1 in the unused tail; `pos` (B,T) is the token's position in its document. Attention never
crosses documents, so every document has the logits that it would have alone.

Weights keep the dtype they are stored in. Matrix products run in `compute_dtype`; softmax, norms,
rotary embeddings and the loss run in float32.
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

    `lengths` (B,) is the number of tokens in each row, `cache_len` that of the longest row, kept on
    the host so that no GPU sync is needed. A token is stored at its own `pos`, so rows may differ
    in length. Padding on the right (doc -1) is overwritten before a token reads it.
    """

    exact = True  # a forward pass reads no keys beyond the longest row

    def __init__(self, config: ModelConfig, rows: int, size: int, device: Any, dtype: torch.dtype):
        # the keys of one head are contiguous in memory, because they are read together
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, size, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype).transpose(2, 3)  # (L,B,S,K,D)
        self.v = torch.zeros(shape, device=device, dtype=dtype).transpose(2, 3)
        self.set_lengths(torch.zeros(rows, dtype=torch.long, device=device), 0)

    def set_lengths(self, lengths: Tensor, cache_len: int) -> None:
        """Set the number of tokens in each row, (B,), and the largest of these numbers."""
        self.lengths, self.cache_len = lengths, cache_len

    def begin_pass(self, T: int) -> int | None:
        """Make room for T more tokens in each row -> S, the number of keys that they read; None if
        they read only the keys of the same pass."""
        self.cache_len += T
        return self.cache_len

    def update(self, layer: int, k: Tensor, v: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's k, v (B,T,K,D) at pos (B,T) -> the keys and values to read, (B,S,K,D)."""
        rows = torch.arange(len(pos), device=pos.device)[:, None]
        self.k[layer][rows, pos], self.v[layer][rows, pos] = k, v
        return self.k[layer][:, : self.cache_len], self.v[layer][:, : self.cache_len]

    def end_pass(self, doc: Tensor, pos: Tensor) -> None:
        """Add a pass's tokens, doc, pos (B,T), to `lengths`, padding excluded."""
        self.lengths = torch.maximum(self.lengths, torch.where(doc >= 0, pos + 1, 0).amax(1))

    def select(self, rows: slice) -> KVCache:
        """A cache of some of the rows, which shares its memory with this one."""
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
        self.D, self.qk_norm, self.softcap = D, config.qk_norm, config.attention_cap
        self.scale = (config.query_scalar or D) ** -0.5
        if config.qk_norm:
            self.q_norm = RMSNorm(D if config.qk_norm == "head" else H * D, config)
            self.k_norm = RMSNorm(D if config.qk_norm == "head" else K * D, config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None,
                attention: AttentionMetadata, pos: Tensor,
                cache: KVCache | None, layer: int) -> Tensor:
        B, T, _ = x.shape
        q, k = self.q_proj(x), self.k_proj(x)  # (B,T,H D), (B,T,K D)
        if self.qk_norm == "width":  # one norm over all heads (OLMo 2)
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.view(B, T, -1, self.D), k.view(B, T, -1, self.D)  # (B,T,H,D), (B,T,K,D)
        if self.qk_norm == "head":  # a norm of each head (Qwen3, Gemma 3)
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rotary_emb(q, *rope), apply_rotary_emb(k, *rope)
        v = self.v_proj(x).view(B, T, -1, self.D)  # (B,T,K,D)
        if cache is not None:
            k, v = cache.update(layer, k, v, pos)  # (B,S,K,D)
        y = attention.attend(q, k, v, self.scale, self.softcap)  # (B,T,H,D)
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
    """One layer: attention and MLP, each with a residual connection and a norm before it (LLaMA),
    after it (OLMo 2), or both (Gemma 2).

    The norms have HF's names. `post_attention_layernorm` is the norm before the MLP in LLaMA, but
    the norm after attention in the other two.
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
        """The norm before attention (0), after it (1), before the MLP (2) or after it (3)."""
        name = self.names[which]
        return getattr(self, name)(x) if name else x

    def forward(self, x: Tensor, *shared: Any) -> Tensor:
        """x (B,T,C) and the other arguments of `_forward` -> (B,T,C)."""
        return with_recompute(self._forward, self.recompute, x, *shared)

    def _forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None,
                 attention: AttentionMetadata, pos: Tensor,
                 cache: KVCache | None = None, layer: int = 0) -> Tensor:
        attended = self.self_attn(self.norm(0, x), rope, attention, pos, cache, layer)  # (B,T,C)
        x = x + self.norm(1, attended)
        return x + self.norm(3, self.mlp(self.norm(2, x)))  # (B,T,C)


def neftune_noise(x: Tensor, doc: Tensor, alpha: float) -> Tensor:
    """Uniform noise in +-alpha / sqrt(n C), where n is the number of tokens of a token's document:
    x (B,T,C), doc (B,T) -> (B,T,C). NEFTune (Jain et al. 2024, algorithm 1), by document, because a
    packed row holds several.
    """
    index = doc + 1  # (B,T); 0 is the unused tail of a row
    counts = F.pad(torch.zeros_like(doc), (0, 1)).scatter_add_(1, index, torch.ones_like(doc))
    n = counts.gather(1, index)  # (B,T): tokens of each token's document
    bound = alpha / (n * x.shape[-1]).sqrt()[..., None]  # (B,T,1)
    return (torch.empty_like(x).uniform_(-1, 1) * bound).to(x.dtype)


class SharedInputs(NamedTuple):
    """Inputs that all layers share: attention's metadata for each window, and cos and sin
    (B,T,1,D/2) of the rotary angles, for layers without and with a window."""

    attention: dict[int, AttentionMetadata]
    rope: tuple[Tensor, Tensor]
    local_rope: tuple[Tensor, Tensor]


class Decoder(nn.Module):
    """Embedding, L blocks and the last norm: tokens, doc, pos (B,T) -> hidden states (B,T,C)."""

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
        """The shared inputs for rows doc, pos (B,T). `documents` describes the rows on the host;
        without it doc and pos are copied from the device, which is a GPU sync."""
        c = self.config
        windows = set(c.windows) or {0}
        cache_len = None if cache is None else cache.begin_pass(doc.shape[1])
        if cache_len is None:
            documents = documents or RowDocuments.of(doc.cpu(), pos.cpu())
            backend = self.attention_backend
            if backend == "auto":
                backend = attention_backend(doc.device, self.compute_dtype, c.head_dim)
            has_softcap = bool(c.attention_cap)
            attention = {w: attention_metadata(doc, documents.lengths, backend, w, has_softcap)
                         for w in windows}
        else:
            attention = {w: cache_metadata(pos, cache_len, cache.exact, w) for w in windows}
        longest = documents.longest if documents else None
        rope = rope_cos_sin(c.rope, c.head_dim, doc, pos, longest)
        local_rope = rope
        if c.local_rope:
            local_rope = rope_cos_sin(c.local_rope, c.head_dim, doc, pos, longest)
        return SharedInputs(attention, rope, local_rope)

    def forward(self, tokens: Tensor, doc: Tensor, pos: Tensor, cache: KVCache | None = None,
                documents: RowDocuments | None = None,
                shared: SharedInputs | None = None) -> Tensor:
        c = self.config
        x = self.embed_tokens(tokens).to(self.compute_dtype)  # (B,T,C)
        if self.training and self.neftune_alpha:
            x = x + neftune_noise(x, doc, self.neftune_alpha)
        if c.scale_embeddings:  # a factor in the compute dtype, as in the published models
            x = x * torch.tensor(c.hidden_size**0.5, dtype=x.dtype)
        if shared is None:
            shared = self.shared_inputs(doc, pos, cache, documents)
        windows = c.windows or (0,) * len(self.layers)
        for i, (block, window) in enumerate(zip(self.layers, windows, strict=True)):
            rope = shared.local_rope if window else shared.rope
            if i in c.no_rope:
                rope = None
            # without a cache every layer gets 0, because other numbers would each be compiled
            layer = 0 if cache is None else i
            x = block(x, rope, shared.attention[window], pos, cache, layer)
        if cache is not None:
            cache.end_pass(doc, pos)
        return self.norm(x)


class Llama(nn.Module):
    """A causal language model: decoder, output embedding and loss. `state_dict()` has the names and
    shapes of HF's file."""

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32,
                 recompute: Recompute = "none", neftune_alpha: float = 0.0,
                 attention_backend: Backend = "auto"):
        """
        compute_dtype: the dtype of matrix products and activations.
        recompute: activation checkpointing, see layers/recompute.py.
        neftune_alpha: scale of the noise on embeddings in training; 0: none.
        attention_backend: see layers/attention_metadata.py; auto: chosen by device and dtype.
        """
        super().__init__()
        self.config = config
        self.model = Decoder(config, compute_dtype, recompute, neftune_alpha, attention_backend)
        self.lm_head: nn.Module | None = None  # None: tied to the embedding
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
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
        """The output embedding (V,C): lm_head's weight, or the input embedding if they are tied."""
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
        """tokens, doc, pos and targets (B,T) -> NLL of the targets in nats, 0 where they are
        ignored: (B,T) float32, or () with `reduction="sum"`.

        Without targets: the logits of the next token after each row's last token with doc >= 0,
        (B,V) float32. `documents` and `trained` (n,), the indices of the targets that are not
        ignored, are a Batch's fields; they spare a GPU sync.
        """
        h = self.model(tokens, doc, pos, cache, documents)  # (B,T,C)
        if targets is not None:
            return self.loss(h, self.head, targets, reduction, trained)
        last = ((doc >= 0) * torch.arange(1, doc.shape[1] + 1, device=doc.device)).argmax(1)  # (B,)
        h = h[torch.arange(len(h), device=h.device), last]  # (B,C)
        return self.logits(h)

    def states(self, tokens: Tensor, doc: Tensor, pos: Tensor,
               cache: KVCache | None = None) -> Tensor:
        """Hidden states: tokens, doc, pos (B,T) -> (B,T,C). `logits` turns them into logits."""
        return self.model(tokens, doc, pos, cache)

    def logits(self, h: Tensor) -> Tensor:
        """Logits of the next token: hidden states (...,C) -> (...,V) float32."""
        if self.lm_head is None:
            logits = F.linear(h, self.head.to(h.dtype))
        else:
            logits = self.lm_head(h)
        return softcap(logits.float(), self.config.logit_cap)

    def flops_per_token(self, T: int, gradient: bool = True) -> float:
        """FLOPs to train on one token of a document of T tokens; without `gradient`: to score it.

        A weight costs 2 FLOPs for y, 2 for dx, and 2 for dW if it is trained. Attention costs
        2 T H D for each layer (only the causal half is counted), and twice as many for its
        gradient. The input embedding is a look-up and costs none.
        """
        c = self.config
        matrices = [m.weight for m in self.modules() if isinstance(m, nn.Linear)]
        if self.lm_head is None:
            matrices.append(self.head)
        n_trained = sum(W.numel() for W in matrices if W.requires_grad)
        n_frozen = sum(W.numel() for W in matrices if not W.requires_grad)
        n_frozen += sum(m.numel for m in nf4.nf4_layers(self))
        attention = 2 * T * c.num_attention_heads * c.head_dim * c.num_hidden_layers
        if not gradient:
            return 2 * (n_trained + n_frozen) + attention
        return 6 * n_trained + 4 * n_frozen + 3 * attention

    @torch.no_grad()
    def initialise(self, seed: int, std: float = 0.02) -> None:
        """Draw random weights, for a model that is trained from scratch. As in GPT-2, the weights
        of the layers that add to the residual stream are smaller, by sqrt(2 L)."""
        generator = torch.Generator(device=self.device).manual_seed(seed)
        residual_std = std / math.sqrt(2 * self.config.num_hidden_layers)
        for name, p in self.named_parameters():
            if "norm" in name:
                p.fill_(1.0 - self.config.norm_offset)
            elif name.endswith("bias"):
                p.zero_()
            else:
                adds_to_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                p.normal_(0, residual_std if adds_to_residual else std, generator=generator)
