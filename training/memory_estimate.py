"""What a training step holds, said from config.json alone: nothing is read, nothing multiplied.

One idea: the real blocks, adapters and loss run once over tensors that have a shape, a dtype and no
memory (torch's fake tensors), while the bytes they would hold are counted as they come and go. So
whatever the code keeps for a gradient is counted, in whichever family, dtype or adapter, and no
formula of it has to be kept true.

Of a model that is cut among ranks (`Cut`) the blocks compute as ever, and what fully_shard holds
for them is counted beside it.

Not seen: what a kernel uses within itself, an allocator's holes (on a CPU glibc's heap keeps a
third beside what it gives out), what the process or a CUDA context holds before; compiled blocks,
which hold less.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora
from checkpoints.peft_adapter import load_adapter
from data import RowDocuments
from layers import fp8, nf4
from layers.attention_metadata import (
    AttentionMetadata,
    Backend,
    DenseMask,
    VarlenFlash,
    attention_backend,
    attention_metadata,
)
from layers.config import ModelConfig
from layers.cross_entropy import ChunkSizes, LinearCrossEntropy, chunk_sizes
from model import Llama, SharedInputs
from runtime.console import FLAGS, UserError
from runtime.device import GiB, memory_limit_gb
from runtime.distributed import (
    Distributed,
    choose_strategy,
    is_replicated,
    needs_sync_every_microbatch,
)
from training import optimizer as optim
from training.preference import cpo, document_logp, dpo
from training.settings import Settings

PARTS = ("weights", "optimizer", "gradients", "activations", "logits")
APART = "apart"  # what is not counted
NEAR = 64  # tokens at least whose logits are walked at once: real steps take fewer, and longer
CPU_BACKENDS = ("cpu", "cpu_documents")
SMALL = 1e9  # parameters that a CPU trains without being asked to


@dataclass(frozen=True)
class Need:
    """Bytes at the moment when a step holds the most, by what they are for."""

    weights: int
    optimizer: int
    gradients: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(getattr(self, part) for part in PARTS)

    def __str__(self) -> str:
        """GB of 2^30, by part."""
        return ", ".join(f"{part} {getattr(self, part) / GiB:.2f}" for part in PARTS)


def shaped(config: ModelConfig, s: Settings, dtype: torch.dtype,
           adapter: Path | None = None) -> Llama:
    """The model that settings `s` (train.Settings) would train, without its numbers; products are
    in `dtype`. An adapter that is trained further is of its own folder's shape."""
    with torch.device("meta"):
        model = Llama(config, dtype, s.recompute, s.neftune)
        kept = torch.bfloat16 if s.optimizer == "adamw-bf16" else torch.float32
        model.to(kept if s.tune == "full" and not s.train_layers else dtype)
        if s.tune == "qlora":
            for name, m in list(model.named_modules()):
                if nf4.fits(name, m):
                    model.set_submodule(name, nf4.NF4Linear(m.weight, m.bias, s.double_quant))
        whole = lora.extra_modules(model, s.train_embeddings, s.train_norms)
        if s.tune != "full" and adapter:
            load_adapter(model, adapter)
        elif s.tune != "full":
            lora.add_lora(model, s.lora_rank, s.lora_alpha, s.lora_dropout, s.lora_targets,
                          s.rslora, s.dora, lora.layer_indices(s.lora_layers, "lora-layers"), whole)
        if s.train_layers:
            lora.train_layers(model, lora.layer_indices(s.train_layers, "train-layers"), whole)
    if s.dtype == "fp8":
        fp8.convert_to_fp8(model)
    return model.train()


class _Held(TorchDispatchMode):
    """Counts the bytes of every tensor that is born, until it is gone, by what they are for."""

    def __init__(self) -> None:
        super().__init__()
        self.what = "activations"
        self.kinds: dict[int, str] = {}
        self.bytes = dict.fromkeys((*PARTS, APART), 0)
        self.most = dict(self.bytes)

    @property
    def total(self) -> int:
        return sum(self.bytes[part] for part in PARTS)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.see(x, self.what)
        return out

    def see(self, x: Tensor, what: str, again: bool = False) -> None:
        """Count a tensor's storage, once; `again`: it is now for something else."""
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.kinds:
            if again:
                self.bytes[self.kinds[key]] -= size
                self.bytes[what] += size
                self.kinds[key] = what
            return
        self.kinds[key] = what
        self.bytes[what] += size
        weakref.finalize(storage, self.gone, key, size)
        if self.total > sum(self.most[part] for part in PARTS):
            self.most = dict(self.bytes)

    def gone(self, key: int, size: int) -> None:
        self.bytes[self.kinds.pop(key)] -= size


class Cut:
    """What torch's fully_shard holds for a model that is cut among ranks, on one of them.

    Of each matrix a part; of blocks two at a time whole, in the dtype of products: one in use and
    one on its way; embeddings and head whole as they are kept, from the first product to the last.
    A block's gradients are summed in float32, a buffer that stands until the next block's.
    Micro-batches that do not meet leave whole gradients in float32, unless they are too much to
    keep (`often`). `copied`: gloo, between CPUs, sends copies.
    """

    def __init__(self, model: nn.Module, world: int, dtype: torch.dtype, held: _Held, copied: bool,
                 often: bool):
        self.held, self.summed, self.copies, self.often = held, None, 2 if copied else 1, often
        self.parts: dict[nn.Parameter, Tensor] = {}
        self.groups: dict[int, list[nn.Parameter]] = {}  # by layer; -1: embeddings and head
        for name, p in model.named_parameters():
            if is_replicated(name, p):
                continue
            self.parts[p] = p.new_empty(-(-len(p) // world), *p.shape[1:])
            layer = lora.layer_of(name)
            if layer >= 0:
                p.data = p.data.to(dtype)
                held.see(p.data, APART, again=True)
            self.groups.setdefault(layer, []).append(p)
        self.group = {p: group for group in self.groups.values() for p in group}
        most = max((sum(p.numel() for p in x) for i, x in self.groups.items() if i >= 0),
                   default=0)  # QLoRA's blocks are cut by none of theirs
        self.gathered = torch.empty((1 + self.copies) * most, dtype=dtype)
        self.whole: dict[nn.Parameter, Tensor] = {}
        self.gradients: dict[nn.Parameter, Tensor] = {}

    def arrived(self, p: nn.Parameter, last: bool) -> None:
        """A gradient is there, whole; where they meet, a block's are summed and cut."""
        before, self.held.what = self.held.what, "gradients"
        group = self.group[p]
        if not (last or self.often):
            if p not in self.whole:
                self.whole[p] = torch.empty_like(p, dtype=torch.float32)
            p.grad = None
        elif all(x.grad is not None for x in group if x.requires_grad):
            self.summed = None
            numbers = sum(x.numel() for x in group if x.requires_grad)
            self.summed = torch.empty(self.copies * numbers, dtype=torch.float32)
            for x in group:
                if x.requires_grad:
                    x.grad = None
                    self.whole.pop(x, None)
                    self.gradients[x] = torch.empty_like(self.parts[x])
        self.held.what = before


def need(config: ModelConfig, s: Settings, dtype: torch.dtype, passes: int = 1,
         adapter: Path | None = None, backend: Backend = "cpu", world: int = 1,
         gb: float = math.inf, sizes: ChunkSizes | None = None) -> Need:
    """The most that one of `world` ranks holds in a step of settings `s`, of so many micro-batches.

    Rows are two documents of unlike lengths, as packed rows are several. `backend` is attention's:
    cpu, varlen_flash (a GPU's kernel) or sdpa_mask (a GPU without). `gb`: of a GPU, for --shard
    auto.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    model, device = shaped(config, s, dtype, adapter), torch.device("cpu")
    how = choose_strategy(model, world, gb) if s.shard == "auto" or world == 1 else s.shard
    whole = bool(lora.base_values(model))
    beside = s.mode == "dpo" and s.tune != "full" and not adapter and not (how == "fsdp" and whole)
    sizes = sizes or chunk_sizes("cpu" if backend in CPU_BACKENDS else "cuda", *model.head.shape)
    sizes = replace(sizes, float32=max(sizes.float32, NEAR))
    B, T = s.rows, s.seq_len
    doc = (torch.arange(T, device=device) > T // 2).long().expand(B, T)  # (B,T)
    pos = torch.arange(T, device=device).expand(B, T)
    documents = RowDocuments.of(doc, pos)
    shared = model.model.shared_inputs(doc, pos, documents=documents)
    shared = shared._replace(attention={  # made here, because fake tensors have no numbers
        w: _attention(backend, documents, w, bool(config.attention_cap))
        for w in set(config.windows) or {0}})
    with FakeTensorMode(allow_non_fake_inputs=True), _Held() as held:
        held.what = "weights"
        _place(model, device)
        for x in lora.base_values(model).values():
            held.see(x, "weights")
        cut = None
        if how == "fsdp":
            often = needs_sync_every_microbatch(model, gb)
            cut = Cut(model, world, dtype, held, backend in CPU_BACKENDS, often)
        held.what = "optimizer"
        parts = cut.parts if cut else {}
        moving = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        kept = [torch.empty(optim.bytes_held(name, parts.get(p, p), s.optimizer),
                            dtype=torch.uint8) for name, p in moving]
        held.what = "gradients"
        buckets = [torch.empty_like(p) for _, p in moving if world > 1 and p not in parts]  # DDP's
        held.what = "activations"
        for x in (*shared.rope, *shared.local_rope,
                  *(x for each in shared.attention.values() for x in each.tensors)):
            held.see(x, "activations")  # of the batch, for all layers
        held.most = dict(held.bytes)
        for i in range(min(passes, 2)):
            last = i == min(passes, 2) - 1
            _step(model, s, held, doc, pos, shared, sizes, cut, last, last and world > 1, beside)
        for p in model.parameters():
            p.grad = None
        del kept, buckets
    return Need(**{part: held.most[part] for part in PARTS})


def _attention(backend: Backend, documents: RowDocuments, window: int,
               softcap: bool) -> AttentionMetadata:
    """A batch's attention metadata by one of the backends; none of them computes capped scores on a
    GPU but the mask."""
    B, T = documents.doc.shape
    if backend in CPU_BACKENDS:
        return attention_metadata(documents.doc, documents.lengths, backend, window, softcap)
    if backend == "varlen_flash" and not softcap:
        return VarlenFlash(torch.zeros(4 * B, dtype=torch.int32), window)
    return DenseMask(torch.ones(B, 1, T, T, dtype=torch.bool))


def numbers(config: ModelConfig) -> int:
    """How many numbers a model has."""
    with torch.device("meta"):
        return sum(p.numel() for p in Llama(config).parameters())


def willing(config: ModelConfig, s: Settings, ranks: Distributed) -> None:
    """UserError (FLAGS) if nobody asked for the CPU that is to train a large model."""
    if s.device == "auto" and ranks.device.type == "cpu" and (n := numbers(config)) > SMALL:
        raise UserError(f"--device auto: no GPU that this torch can use, and {n / 1e9:.1f}B "
                        "parameters are slow on a CPU; take --device cpu if that is meant, or "
                        "install a CUDA build of torch", FLAGS)


def check(config: ModelConfig, s: Settings, dtype: torch.dtype, ranks: Distributed, passes: int,
          adapter: Path | None = None, limit_gb: float | None = None) -> None:
    """UserError (FLAGS) if a step of settings `s` does not fit into `limit_gb`, by default the
    memory of a rank's device. Called before a weight is read.

    An upper bound that is quick to compute lets most models pass. Rows that are still to be chosen
    (auto) are not refused.
    """
    if s.ignore_memory or s.rows == "auto":
        return
    B, T, L = s.rows, s.seq_len, config.num_hidden_layers
    wide = config.hidden_size + config.intermediate_size
    room = memory_limit_gb(ranks.device) if limit_gb is None else limit_gb
    if 32 * numbers(config) + 64 * B * T * L * wide + 8192 * config.vocab_size < room * GiB:
        return
    found = on(ranks, config, s, dtype, passes, adapter)
    if found.total > room * GiB:
        among = f" on each of {ranks.world_size} ranks" if ranks.world_size > 1 else ""
        raise UserError(
            f"--rows {B} x --seq-len {T}, --tune {s.tune}: a step needs {found.total / GiB:.1f} GB"
            f"{among} ({found}), {ranks.device} has {room:.1f}; take fewer --rows, "
            "--recompute full, --tune qlora, --optimizer adamw8bit or adamw-bf16, or try all the "
            "same with --ignore-memory", FLAGS)


def on(ranks: Distributed, config: ModelConfig, s: Settings, dtype: torch.dtype, passes: int,
       adapter: Path | None = None) -> Need:
    """The need of one of these ranks."""
    gpu = ranks.device.type == "cuda"
    backend = attention_backend(ranks.device, dtype, config.head_dim)
    return need(config, s, dtype, passes, adapter, backend, ranks.world_size,
                memory_limit_gb(ranks.device) if gpu else math.inf)


def _place(model: nn.Module, device: torch.device) -> None:
    """Give meta parameters and buffers a (fake) device: they are born, and counted."""
    for m in model.modules():
        for name, p in m._parameters.items():
            if p is not None:
                m._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype,
                                                               device=device), p.requires_grad)
        for name, x in [*m._buffers.items(), *vars(m).items()]:
            if isinstance(x, Tensor):
                setattr(m, name, torch.empty(x.shape, dtype=x.dtype, device=device))
    if whole := lora.base_values(model):
        model.set_base_values({name: torch.empty(x.shape, dtype=x.dtype, device=device)
                               for name, x in whole.items()})


def _step(model: Llama, s: Settings, held: _Held, doc: Tensor, pos: Tensor, shared: SharedInputs,
          sizes: ChunkSizes, cut: Cut | None, last: bool, meet: bool, beside: bool) -> None:
    """Forward and backward of one micro-batch, as they are; gradients of the `last` one `meet`: DDP
    copies them into its buckets.

    Every token is trained; in preference pairs a row is one pair. `beside`: DPO's reference is the
    model with its adapter off, in the same step.
    """
    moving = [p for p in model.parameters() if p.requires_grad]

    def arrived(p: nn.Parameter) -> None:
        if cut and p in cut.parts:
            cut.arrived(p, last)
            return
        held.see(p.grad, "gradients", True)
        if meet:
            p.grad = None

    each = s.mode in ("dpo", "cpo")

    loss_function = LinearCrossEntropy(model.config.logit_cap, sizes=sizes)
    trained = doc.flatten()  # all tokens: only the number is read

    def nll(reduction: Literal["none", "sum"]) -> Tensor:
        h = model.model(doc, doc, pos, shared=shared)  # (B,T,C)
        held.what = "logits"
        found = loss_function(h, model.head, doc, reduction, trained)
        held.what = "activations"
        return found

    hooks = [p.register_post_accumulate_grad_hook(arrived) for p in moving]
    if each:
        before = None
        if beside:
            with torch.no_grad(), lora.disabled(model):
                before = nll("none")
        logp = document_logp(nll("none"), doc, 2)  # (B,2)
        losses, _ = cpo(logp, logp.detach(), s.beta, s.arpo) if s.mode == "cpo" else \
            dpo(logp, logp.detach() if before is None else document_logp(before, doc, 2), s.beta)
        loss = losses.sum() - (s.nll_weight * logp[:, 0].sum() if s.mode == "cpo" else 0)
    else:
        loss = nll("sum")
    loss.backward()
    for hook in hooks:
        hook.remove()
