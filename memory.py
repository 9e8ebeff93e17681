"""What a training step holds, said from config.json alone: nothing is read, nothing multiplied.

One idea: the real blocks, adapters and loss run once over tensors that have a shape, a dtype and no
memory (torch's fake tensors), while the bytes they would hold are counted as they come and go. So
whatever the code keeps for a gradient is counted, in whichever family, dtype or adapter, and no
formula of it has to be kept true.

Not seen: what a kernel uses within itself, an allocator's fragments, what the process or a CUDA
context holds before; compiled blocks, which hold less.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import lora
import nf4
import optim
from attention import flash
from families import ModelConfig
from log import FLAGS, UserError
from loss import _TokenNLL
from model import Layout, Llama, turns
from ranks import GiB, Ranks

PARTS = ("weights", "optimizer", "gradients", "activations", "logits")


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


def shaped(config: ModelConfig, s: Any, dtype: torch.dtype, adapter: Path | None = None) -> Llama:
    """The model that settings `s` (train.Settings) would train, without its numbers; products are
    in `dtype`. An adapter that is trained further is of its own folder's shape."""
    with torch.device("meta"):
        model = Llama(config)
        kept = torch.bfloat16 if s.optimizer == "adamw-bf16" else torch.float32
        model.to(kept if s.tune == "full" and not s.train_layers else dtype)
        if s.tune == "qlora":
            for name, m in list(model.named_modules()):
                if nf4.fits(name, m):
                    model.set_submodule(name, nf4.NF4Linear(m.weight, m.bias, s.double_quant))
        whole = lora.whole_parts(model, s.train_embeddings, s.train_norms)
        if s.tune != "full" and adapter:
            lora.load_adapter(model, adapter)
        elif s.tune != "full":
            lora.attach(model, s.lora_rank, s.lora_alpha, s.lora_dropout, s.lora_targets, s.rslora,
                        s.dora, lora.indices(s.lora_layers, "lora-layers"), whole)
        if s.train_layers:
            lora.train_layers(model, lora.indices(s.train_layers, "train-layers"), whole)
    model.model.compute_dtype, model.model.recompute = dtype, s.recompute
    return model.train()


class _Held(TorchDispatchMode):
    """Counts the bytes of every tensor that is born, until it is gone, by what they are for."""

    def __init__(self) -> None:
        super().__init__()
        self.what = "activations"
        self.kinds: dict[int, str] = {}
        self.bytes = dict.fromkeys(PARTS, 0)
        self.most = dict(self.bytes)

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
        if sum(self.bytes.values()) > sum(self.most.values()):
            self.most = dict(self.bytes)

    def gone(self, key: int, size: int) -> None:
        self.bytes[self.kinds.pop(key)] -= size


def need(config: ModelConfig, s: Any, dtype: torch.dtype, passes: int = 1,
         adapter: Path | None = None, path: str = "blocks") -> Need:
    """The most that a step of settings `s` holds, of so many micro-batches.

    Rows are two documents each, as packed rows are several. `path` of attention.py: blocks (a CPU),
    offsets (a GPU's flash kernel) or mask (a GPU without it).
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    model, device = shaped(config, s, dtype, adapter), torch.device("cpu")
    B, T = s.rows, s.seq_len
    doc = (torch.arange(T, device=device) >= T // 2).long().expand(B, T)  # (B,T)
    pos = torch.arange(T, device=device).expand(B, T)
    layouts = {w: _layout(path, doc, pos, w, bool(config.attention_cap))
               for w in {*config.windows, 0}}
    turn = turns(config.rope, config.head_dim, doc, pos)
    with FakeTensorMode(allow_non_fake_inputs=True), _Held() as held:
        held.what = "weights"
        _place(model, device)
        for x in lora.trained_whole(model).values():
            held.see(x, "weights")
        held.what = "optimizer"
        kept = _moments(model, s, device)
        held.what = "activations"
        for x in (*turn, *(x for each in layouts.values() for x in each.tensors)):
            held.see(x, "activations")  # of the batch, for all layers
        for _ in range(min(passes, 2)):
            _step(model, held, doc, layouts, turn, pos)
        for p in model.parameters():
            p.grad = None
        del kept
    return Need(**held.most)


def _layout(path: str, doc: Tensor, pos: Tensor, window: int, plain: bool) -> Layout:
    """A batch's layout by one of attention.py's paths; there is no kernel for `plain` scores."""
    B, T = doc.shape
    if path == "blocks":
        return Layout.of(doc, pos, None, window, plain)
    if path == "offsets" and not plain:
        return Layout(offsets=torch.zeros(4 * B, dtype=torch.int32), window=window)
    return Layout(mask=torch.ones(B, 1, T, T, dtype=torch.bool), window=window)


def path_of(device: torch.device, dtype: torch.dtype, D: int) -> str:
    """The path that attention takes on a device."""
    if device.type == "cpu":
        return "blocks"
    return "offsets" if flash(device, dtype, D) else "mask"


def check(config: ModelConfig, s: Any, dtype: torch.dtype, ranks: Ranks, passes: int,
          adapter: Path | None = None) -> None:
    """UserError (FLAGS) if a step of settings `s` does not fit a rank's memory; before a weight is
    read. A bound that is never too low lets most models pass at once.

    What is not known beforehand is not refused: rows that are to be found, a model cut among ranks.
    """
    if s.ignore_memory or s.rows == "auto" or (ranks.world > 1 and s.shard in ("auto", "fsdp")):
        return
    B, T, L = s.rows, s.seq_len, config.num_hidden_layers
    with torch.device("meta"):
        numbers = sum(p.numel() for p in Llama(config).parameters())
    wide = config.hidden_size + config.intermediate_size
    room = ranks.memory_limit_gb() * GiB
    if 32 * numbers + 64 * B * T * L * wide + 8192 * config.vocab_size < room:
        return
    found = need(config, s, dtype, passes, adapter,
                 path_of(ranks.device, dtype, config.head_dim))
    if found.total > room:
        raise UserError(
            f"--rows {B} x --seq-len {T}, --tune {s.tune}: a step needs {found.total / GiB:.1f} GB "
            f"({found}), {ranks.device} has {room / GiB:.1f}; take fewer --rows, --recompute, "
            "--tune qlora, --optimizer adamw8bit or adamw-bf16, or try all the same with "
            "--ignore-memory", FLAGS)


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
    if whole := lora.trained_whole(model):
        model.whole = {k: torch.empty(x.shape, dtype=x.dtype, device=device)
                       for k, x in whole.items()}


def _moments(model: nn.Module, s: Any, device: torch.device) -> list[Tensor]:
    """What the optimizer holds for each number that trains, and its average."""
    return [torch.empty(optim.bytes_held(name, p, s.optimizer, s.ema), dtype=torch.uint8,
                        device=device)
            for name, p in model.named_parameters() if p.requires_grad]


def _step(model: Llama, held: _Held, doc: Tensor, layouts: dict[int, Layout], turn: Any,
          pos: Tensor) -> None:
    """Forward and backward of one micro-batch: Decoder's loop and the loss, as they are."""
    c, inner = model.config, model.model
    hooks = [p.register_post_accumulate_grad_hook(lambda p: held.see(p.grad, "gradients", True))
             for p in model.parameters() if p.requires_grad]
    x = inner.embed_tokens(doc).to(inner.compute_dtype)  # (B,T,C)
    windows: Sequence[int] = c.windows or (0,) * len(inner.layers)
    for block, window in zip(inner.layers, windows, strict=True):
        if inner.recompute:
            x = checkpoint(block, x, turn, layouts[window], pos, use_reentrant=False)
        else:
            x = block(x, turn, layouts[window], pos)
    h = inner.norm(x).flatten(0, 1)  # (B T,C)
    del x
    held.what = "logits"
    nll = _TokenNLL.apply(h, model.head, doc.flatten(), c.logit_cap)
    held.what = "activations"
    del h
    nll.sum().backward()
    for hook in hooks:
        hook.remove()
