"""Estimate the memory of a training step from config.json, before any weight is read.

The model's own blocks, adapters and loss run once on fake tensors, which have a shape and a dtype
but no memory. Meanwhile the bytes that they would hold are counted. Everything that the code keeps
for the backward pass is therefore counted, for every family, dtype and adapter, without formulas
that would have to follow the code.

FSDP is modelled by `FsdpMemory`, because the blocks run unsharded here. torch's own FSDPMemTracker
would need a process group of the planned size, and it refuses steps of several micro-batches.

On a CPU the copy that a checkpoint writes in the background is counted too, because the next steps
run while it is held.

Not counted: memory inside a kernel, fragmentation of the allocator (on a CPU glibc's heap holds up
to a third more than it gives out), the process and the CUDA context. Compiled blocks hold less than
estimated.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
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
from runtime.device import GiB, memory_in_use_gb, memory_limit_gb
from runtime.distributed import (
    Distributed,
    choose_strategy,
    is_dtensor,
    is_replicated,
    local_shard,
    needs_sync_every_microbatch,
)
from training import optimizer as optim
from training.preference import cpo, document_logp, dpo
from training.settings import Settings

CATEGORIES = ("weights", "optimizer", "gradients", "activations", "logits")  # of a step
NOT_COUNTED = "not counted"  # a further category
MIN_CHUNK = 64  # tokens of a chunk of logits, at least: smaller chunks would only cost time here
CPU_BACKENDS = ("cpu", "cpu_documents")
MAX_CPU_PARAMETERS = 1e9  # a larger model is trained on a CPU only with --device cpu


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the moment when a step holds the most, by category.

    `checkpoint`: a copy of the trained parameters and of the optimizer's moments in host memory,
    until it is written. On a GPU it takes no memory of the device and is 0.
    """

    weights: int
    optimizer: int
    gradients: int
    activations: int
    logits: int
    checkpoint: int = 0

    @property
    def step(self) -> int:
        """Bytes of a step while no checkpoint is written."""
        return sum(getattr(self, category) for category in CATEGORIES)

    @property
    def total(self) -> int:
        """Bytes of a step while a checkpoint is written."""
        return self.step + self.checkpoint

    def __str__(self) -> str:
        """GB (2^30 bytes) of each category."""
        categories = [*CATEGORIES, "checkpoint"] if self.checkpoint else CATEGORIES
        return ", ".join(f"{category} {getattr(self, category) / GiB:.2f}"
                         for category in categories)


def estimate(config: ModelConfig, s: Settings, dtype: torch.dtype, micro_batches: int = 1,
             adapter: Path | None = None, backend: Backend = "cpu", world_size: int = 1,
             gpu_gb: float = math.inf, sizes: ChunkSizes | None = None) -> MemoryEstimate:
    """The most that one of `world_size` ranks holds during a step with settings `s`.

    `dtype`: the compute dtype. `adapter`: the folder of an adapter that is trained further.
    `backend`: attention's backend: cpu, varlen_flash (the GPU kernel) or sdpa_mask (a GPU without
    it). `gpu_gb`: the memory of a GPU, from which --shard auto chooses. `sizes`: of the chunks of
    logits; None: as on this machine.

    A row holds two documents of different lengths, as packed rows hold several.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    model, device = meta_model(config, s, dtype, adapter), torch.device("cpu")
    strategy = s.shard
    if s.shard == "auto" or world_size == 1:
        strategy = choose_strategy(model, world_size, gpu_gb)
    sizes = sizes or chunk_sizes("cpu" if backend in CPU_BACKENDS else "cuda", *model.head.shape)
    B, T = s.rows, s.seq_len
    doc = (torch.arange(T, device=device) > T // 2).long().expand(B, T)  # (B,T)
    pos = torch.arange(T, device=device).expand(B, T)
    shared = _shared_inputs(model, doc, pos, backend)
    with FakeTensorMode(allow_non_fake_inputs=True), TensorTracker() as tracker:
        tracker.category = "weights"
        _materialise(model, device)
        for base_value in lora.base_values(model).values():
            tracker.track(base_value, "weights")
        fsdp = None
        if strategy == "fsdp":
            fsdp = FsdpMemory(model, world_size, dtype, tracker,
                              copies_messages=backend in CPU_BACKENDS,
                              sync_every_microbatch=needs_sync_every_microbatch(model, gpu_gb))
        shards = fsdp.shards if fsdp else {}
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        tracker.category = "optimizer"
        moments = [torch.empty(optim.bytes_held(name, shards.get(p, p), s.optimizer),
                               dtype=torch.uint8) for name, p in trained]
        checkpoint = 0
        if backend in CPU_BACKENDS:
            checkpoint = checkpoint_bytes(model, s.optimizer, world_size, shards)
        tracker.category = "gradients"
        ddp_buckets = []
        if world_size > 1:
            ddp_buckets = [torch.empty_like(p) for _, p in trained if p not in shards]
        tracker.category = "activations"
        for x in _batch_tensors(shared):
            tracker.track(x, "activations")
        tracker.peak = dict(tracker.bytes)
        step = MicroBatch(model, s, tracker, doc, pos, shared,
                          replace(sizes, float32=max(sizes.float32, MIN_CHUNK)), fsdp,
                          _reference_in_step(model, s, strategy, adapter))
        if micro_batches > 1:  # all micro-batches but the last hold the same
            step.run(is_last=False, into_buckets=False)
        step.run(is_last=True, into_buckets=world_size > 1)
        for p in model.parameters():
            p.grad = None
        del moments, ddp_buckets
    return MemoryEstimate(**{category: tracker.peak[category] for category in CATEGORIES},
                          checkpoint=checkpoint)


def estimate_on(ranks: Distributed, config: ModelConfig, s: Settings, dtype: torch.dtype,
                micro_batches: int, adapter: Path | None = None) -> MemoryEstimate:
    """The estimate for one of these ranks."""
    backend = attention_backend(ranks.device, dtype, config.head_dim)
    gpu_gb = memory_limit_gb(ranks.device) if ranks.device.type == "cuda" else math.inf
    return estimate(config, s, dtype, micro_batches, adapter, backend, ranks.world_size, gpu_gb)


def check_memory(config: ModelConfig, s: Settings, dtype: torch.dtype, ranks: Distributed,
                 micro_batches: int, adapter: Path | None = None,
                 limit_gb: float | None = None) -> None:
    """UserError (FLAGS) if a step with settings `s` does not fit into `limit_gb`, by default the
    memory of a rank's device; on a CPU without what this process holds already (libraries,
    tokenizer). Called before a weight is read.

    Most models pass by an upper bound that is quick to compute. `--rows auto` is not refused,
    because the rows are chosen later.
    """
    if s.ignore_memory or s.rows == "auto":
        return
    B, T, L = s.rows, s.seq_len, config.num_hidden_layers
    width = config.hidden_size + config.intermediate_size
    if limit_gb is None:
        limit_gb = memory_limit_gb(ranks.device)
        if ranks.device.type == "cpu":
            limit_gb -= memory_in_use_gb()
    upper_bound = (44 * count_parameters(config) + 64 * B * T * L * width
                   + 8192 * config.vocab_size)
    if upper_bound < limit_gb * GiB:
        return
    needed = estimate_on(ranks, config, s, dtype, micro_batches, adapter)
    if needed.total > limit_gb * GiB:
        where = f" on each of {ranks.world_size} ranks" if ranks.world_size > 1 else ""
        raise UserError(
            f"--rows {B} x --seq-len {T}, --tune {s.tune}: a step needs {needed.total / GiB:.1f} GB"
            f"{where} ({needed}), {ranks.device} has {limit_gb:.1f}; use fewer --rows, "
            "--recompute full, --tune qlora, --optimizer adamw8bit or adamw-bf16, or try it with "
            "--ignore-memory", FLAGS)


def check_cpu_is_intended(config: ModelConfig, s: Settings, ranks: Distributed) -> None:
    """UserError (FLAGS) if a large model would be trained on a CPU that --device did not name."""
    n = count_parameters(config)
    if s.device == "auto" and ranks.device.type == "cpu" and n > MAX_CPU_PARAMETERS:
        raise UserError(f"--device auto: found no GPU that this torch can use, and training "
                        f"{n / 1e9:.1f}B parameters on a CPU is slow; give --device cpu to train "
                        "on the CPU, or install a CUDA build of torch", FLAGS)


def checkpoint_bytes(model: nn.Module, optimizer: str, world_size: int,
                     shards: dict[nn.Parameter, Tensor] | None = None) -> int:
    """Bytes that one rank copies for a checkpoint: trained parameters and their moments. They are
    its shards, and its part of what is replicated.

    `shards`: this rank's shards of a model that is not sharded yet.
    """
    shards = shards or {}
    sharded = replicated = 0
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        own = shards[p] if p in shards else local_shard(p.detach())[1]
        size = own.nbytes + optim.bytes_held(name, own, optimizer)
        if p in shards or is_dtensor(p):
            sharded += size
        else:
            replicated += size
    return sharded + -(-replicated // world_size)


def count_parameters(config: ModelConfig) -> int:
    """The number of parameters of a model."""
    with torch.device("meta"):
        return sum(p.numel() for p in Llama(config).parameters())


def meta_model(config: ModelConfig, s: Settings, dtype: torch.dtype,
               adapter: Path | None = None) -> Llama:
    """The model that settings `s` would train, on the meta device; `dtype`: the compute dtype.

    An adapter that is trained further has the shape of its own folder.
    """
    with torch.device("meta"):
        model = Llama(config, dtype, s.recompute, s.neftune)
        trained_dtype = torch.bfloat16 if s.optimizer == "adamw-bf16" else torch.float32
        model.to(trained_dtype if s.tune == "full" and not s.train_layers else dtype)
        if s.tune == "qlora":
            for name, module in list(model.named_modules()):
                if nf4.fits(name, module):
                    quantised = nf4.NF4Linear(module.weight, module.bias, s.double_quant)
                    model.set_submodule(name, quantised)
        extra_modules = lora.extra_modules(model, s.train_embeddings, s.train_norms)
        if s.tune != "full" and adapter:
            load_adapter(model, adapter)
        elif s.tune != "full":
            lora.add_lora(model, s.lora_rank, s.lora_alpha, s.lora_dropout, s.lora_targets,
                          s.rslora, s.dora, lora.layer_indices(s.lora_layers, "lora-layers"),
                          extra_modules)
        if s.train_layers:
            layers = lora.layer_indices(s.train_layers, "train-layers")
            lora.train_layers(model, layers, extra_modules)
    if s.dtype == "fp8":
        fp8.convert_to_fp8(model)
    return model.train()


class TensorTracker(TorchDispatchMode):
    """Counts the bytes of all tensors from their creation until they are freed.

    A new tensor is counted in `category`. `bytes`: held now, by category; `peak`: when the
    categories together held the most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.category = "activations"
        self.bytes = dict.fromkeys((*CATEGORIES, NOT_COUNTED), 0)
        self.peak = dict(self.bytes)
        self._categories: dict[int, str] = {}  # of each storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.track(x, self.category)
        return out

    def track(self, x: Tensor, category: str) -> None:
        """Count a tensor's storage, unless it is counted already."""
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._categories:
            return
        self._categories[key] = category
        self.bytes[category] += size
        weakref.finalize(storage, self._release, key, size)
        if self._counted(self.bytes) > self._counted(self.peak):
            self.peak = dict(self.bytes)

    def move(self, x: Tensor, category: str) -> None:
        """Count a tensor's storage in another category from now on."""
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._categories:
            self.track(x, category)
            return
        self.bytes[self._categories[key]] -= size
        self.bytes[category] += size
        self._categories[key] = category

    def _release(self, key: int, size: int) -> None:
        self.bytes[self._categories.pop(key)] -= size

    @staticmethod
    def _counted(sizes: dict[str, int]) -> int:
        return sum(sizes[category] for category in CATEGORIES)


class FsdpMemory:
    """What one rank holds of a model that torch's fully_shard shards over `world_size` ranks.

    - A shard of each matrix. Norms, biases and adapters are replicated.
    - Two unsharded blocks at a time, in the compute dtype: the one in use and the next one.
      Embeddings and head are unsharded from the first product to the last, as they are kept.
    - The gradients of one block in float32 while they are reduced, in a buffer that is kept until
      the next block.
    - If micro-batches are not reduced one by one (`sync_every_microbatch`), unsharded gradients in
      float32.

    `copies_messages`: gloo, which is used between CPUs, sends copies.
    """

    def __init__(self, model: nn.Module, world_size: int, dtype: torch.dtype,
                 tracker: TensorTracker, copies_messages: bool, sync_every_microbatch: bool):
        self.tracker, self.sync_every_microbatch = tracker, sync_every_microbatch
        self.copies = 2 if copies_messages else 1
        self.shards: dict[nn.Parameter, Tensor] = {}
        self.groups: dict[nn.Parameter, list[nn.Parameter]] = {}  # of one block, or of no block
        by_layer: dict[int, list[nn.Parameter]] = {}  # -1: embeddings and head
        for name, p in model.named_parameters():
            if is_replicated(name, p):
                continue
            self.shards[p] = p.new_empty(-(-len(p) // world_size), *p.shape[1:])
            layer = lora.layer_of(name)
            if layer >= 0:  # counted as `unsharded` below
                p.data = p.data.to(dtype)
                tracker.move(p.data, NOT_COUNTED)
            group = by_layer.setdefault(layer, [])
            group.append(p)
            self.groups[p] = group
        # QLoRA has no block with sharded matrices
        largest_block = max((sum(p.numel() for p in group)
                             for layer, group in by_layer.items() if layer >= 0), default=0)
        self.unsharded = torch.empty((1 + self.copies) * largest_block, dtype=dtype)
        self.reduce_buffer: Tensor | None = None
        self.unsharded_gradients: dict[nn.Parameter, Tensor] = {}
        self.sharded_gradients: dict[nn.Parameter, Tensor] = {}

    def gradient_is_ready(self, p: nn.Parameter, is_last: bool) -> None:
        """Account for the gradient of a sharded parameter. When all gradients of its block are
        there they are reduced, in the last micro-batch or in every one."""
        category, self.tracker.category = self.tracker.category, "gradients"
        trained = [x for x in self.groups[p] if x.requires_grad]
        if not (is_last or self.sync_every_microbatch):
            if p not in self.unsharded_gradients:
                self.unsharded_gradients[p] = torch.empty_like(p, dtype=torch.float32)
            p.grad = None
        elif all(x.grad is not None for x in trained):
            self._reduce(trained)
        self.tracker.category = category

    def _reduce(self, trained: Sequence[nn.Parameter]) -> None:
        self.reduce_buffer = None  # that of the block before is freed first
        numel = sum(x.numel() for x in trained)
        self.reduce_buffer = torch.empty(self.copies * numel, dtype=torch.float32)
        for x in trained:
            x.grad = None
            self.unsharded_gradients.pop(x, None)
            self.sharded_gradients[x] = torch.empty_like(self.shards[x])


@dataclass
class MicroBatch:
    """Forward and backward of one micro-batch on fake tensors. Every token is trained; with
    preference pairs a row is one pair.

    `reference_in_step`: whether the step computes DPO's reference too.
    """

    model: Llama
    settings: Settings
    tracker: TensorTracker
    doc: Tensor  # (B,T), also used as ids and labels: only shapes matter
    pos: Tensor  # (B,T)
    shared: SharedInputs
    sizes: ChunkSizes
    fsdp: FsdpMemory | None
    reference_in_step: bool

    def run(self, is_last: bool, into_buckets: bool) -> None:
        """Compute the loss and its gradients. `into_buckets`: DDP moves the gradients into its
        buckets."""
        def gradient_is_ready(p: nn.Parameter) -> None:
            if self.fsdp and p in self.fsdp.shards:
                self.fsdp.gradient_is_ready(p, is_last)
                return
            self.tracker.move(p.grad, "gradients")
            if into_buckets:
                p.grad = None

        hooks = [p.register_post_accumulate_grad_hook(gradient_is_ready)
                 for p in self.model.parameters() if p.requires_grad]
        self._loss().backward()
        for hook in hooks:
            hook.remove()

    def _loss(self) -> Tensor:
        s = self.settings
        if s.mode not in ("dpo", "cpo"):
            return self._nll("sum")
        reference = None
        if self.reference_in_step:
            with torch.no_grad(), lora.disabled(self.model):
                reference = self._nll("none")
        logp = document_logp(self._nll("none"), self.doc, 2)  # (B,2)
        if s.mode == "cpo":
            losses, _ = cpo(logp, logp.detach(), s.beta, s.arpo)
            return losses.sum() - s.nll_weight * logp[:, 0].sum()
        reference_logp = logp.detach()
        if reference is not None:
            reference_logp = document_logp(reference, self.doc, 2)
        losses, _ = dpo(logp, reference_logp, s.beta)
        return losses.sum()

    def _nll(self, reduction: Literal["none", "sum"]) -> Tensor:
        h = self.model.model(self.doc, self.doc, self.pos, shared=self.shared)  # (B,T,C)
        self.tracker.category = "logits"
        loss = LinearCrossEntropy(self.model.config.logit_cap, sizes=self.sizes)
        nll = loss(h, self.model.head, self.doc, reduction, trained=self.doc.flatten())
        self.tracker.category = "activations"
        return nll


def _reference_in_step(model: Llama, s: Settings, strategy: str, adapter: Path | None) -> bool:
    """Whether DPO's reference is computed in the step, by the model with its adapter off, and not
    before the run."""
    if s.mode != "dpo" or s.tune == "full" or adapter:
        return False
    return not (strategy == "fsdp" and lora.base_values(model))


def _shared_inputs(model: Llama, doc: Tensor, pos: Tensor, backend: Backend) -> SharedInputs:
    """What all layers share of a batch. It is made of real tensors, because the attention metadata
    reads the numbers of `doc`."""
    config = model.config
    documents = RowDocuments.of(doc, pos)
    shared = model.model.shared_inputs(doc, pos, documents=documents)
    return shared._replace(attention={
        window: _attention_metadata(backend, documents, window, bool(config.attention_cap))
        for window in set(config.windows) or {0}})


def _attention_metadata(backend: Backend, documents: RowDocuments, window: int,
                        softcap: bool) -> AttentionMetadata:
    """A batch's attention metadata for a backend. On a GPU capped scores need the dense mask."""
    B, T = documents.doc.shape
    if backend in CPU_BACKENDS:
        return attention_metadata(documents.doc, documents.lengths, backend, window, softcap)
    if backend == "varlen_flash" and not softcap:
        return VarlenFlash(torch.zeros(4 * B, dtype=torch.int32), window)
    return DenseMask(torch.ones(B, 1, T, T, dtype=torch.bool))


def _batch_tensors(shared: SharedInputs) -> list[Tensor]:
    """The tensors of a batch that all layers share."""
    tensors = [*shared.rope, *shared.local_rope]
    for metadata in shared.attention.values():
        tensors += metadata.tensors
    return tensors


def _materialise(model: nn.Module, device: torch.device) -> None:
    """Create the parameters and buffers of a meta model as (fake) tensors of a device."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(
                    torch.empty(p.shape, dtype=p.dtype, device=device), p.requires_grad)
        for name, x in [*module._buffers.items(), *vars(module).items()]:
            if isinstance(x, Tensor):
                setattr(module, name, torch.empty(x.shape, dtype=x.dtype, device=device))
    base_values = lora.base_values(model)
    if base_values:
        model.set_base_values({name: torch.empty(x.shape, dtype=x.dtype, device=device)
                               for name, x in base_values.items()})
