"""What moves the weights: parameter groups, AdamW, the scale of an fp16
loss, and the optimizer's state by name.

AdamW costs 16 bytes a trained number: weight, gradient and two moments in float32. Where that is
too much there are two more. `adamw8bit` (Dettmers et al. 2022, by bitsandbytes) keeps the moments
of matrices in eight bits: 10 bytes; those of embeddings stay in 32, as its authors advise, for most
of an embedding's rows are seldom moved. `adamw-bf16` keeps all four in bf16: 8 bytes, and 7 billion
weights fit an 80 GB card whole. bf16 has eight bits, so a small step would round away to nothing,
always; rounded at random, up as often as it is near, it arrives on average (Gupta et al. 2015).
"""

from __future__ import annotations

import logging
import math
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runtime.console import FLAGS, UserError
from runtime.distributed import local_shard

CHUNK = 1 << 24  # numbers that stand in float32 at once while bf16 ones are moved
EPS = 1e-8
TABLES = {"qmap1": "dynamic", "qmap2": "udynamic"}  # of bitsandbytes: the values eight bits name
LEAST = 2.0  # of an fp16 loss's scale; 1 is none
NARROW = 4096  # bitsandbytes keeps smaller tensors' moments in float32
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def groups(model: nn.Module, weight_decay: float, embeddings: float = 1.0,
           lora_B: float = 1.0) -> list[dict]:
    """What trains, by its weight decay and its share of the learning rate (`scale`).

    Matrices decay; norms, biases and lengths (one number a channel) do not. `embeddings` is the
    share of embed_tokens and lm_head, `lora_B` that of LoRA's B (LoRA+, Hayou et al. 2024).
    """
    found: dict[tuple, dict] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        scale = lora_B if ".lora_B." in name else 1.0
        if name in EMBEDDINGS:
            scale = embeddings
        decay = weight_decay if p.dim() >= 2 else 0.0
        # a tensor cut among ranks (FSDP) and a whole one cannot go through one fused kernel
        group = found.setdefault((scale, decay, type(p)), {"params": [], "names": [],
                                                           "scale": scale, "weight_decay": decay})
        group["params"].append(p)
        group["names"].append(name)
    return list(found.values())


def adamw(model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float,
          embeddings: float = 1.0, lora_B: float = 1.0, kind: str = "adamw",
          seed: int = 0) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over the trained parameters. `kind`: adamw, one fused
    kernel for all tensors; adamw8bit; adamw-bf16, whose rounding is seeded by `seed`."""
    parts = groups(model, weight_decay, embeddings, lora_B)
    for part in parts:
        part["lr"] = lr * part["scale"]
    if kind == "adamw-bf16":
        return BF16AdamW(parts, {"lr": lr, "betas": betas, "seed": seed})
    for part in parts:
        del part["names"]
    if kind == "adamw8bit":
        return _adamw8bit(model, parts, lr, betas)
    return torch.optim.AdamW(parts, lr=lr, betas=betas, eps=EPS, fused=True)


def bytes_held(name: str, p: Tensor, kind: str) -> int:
    """Bytes of the optimizer's moments of a trained tensor."""
    if kind == "adamw8bit" and p.numel() >= NARROW and name not in EMBEDDINGS:
        return 2 * (p.numel() + 4 * -(p.numel() // -256))  # a float32 for every 256
    return 2 * p.numel() * (2 if kind == "adamw-bf16" else 4)


def _adamw8bit(model: nn.Module, parts: list[dict], lr: float,
               betas: tuple[float, float]) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW; small tensors, and embeddings, keep float32 moments.
    UserError where it does not work."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of kernels that are not needed
    probe = nn.Parameter(torch.ones(NARROW, device=next(model.parameters()).device))
    probe.grad = torch.ones_like(probe)
    try:
        from bitsandbytes.optim import AdamW

        AdamW([probe], lr=1.0, optim_bits=8).step()
    except (ImportError, OSError, RuntimeError, AttributeError) as e:  # no library, or no kernels
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(f"--optimizer adamw8bit: bitsandbytes does not work on {probe.device} here "
                        f"({why}); pip install bitsandbytes, or take --optimizer adamw",
                        FLAGS) from None
    found = AdamW(parts, lr=lr, betas=betas, eps=EPS, optim_bits=8, min_8bit_size=NARROW)
    for name, p in model.named_parameters():
        if p.requires_grad and name in EMBEDDINGS:  # a state that is there is not made in 8 bits
            found.state[p] = {"step": 0, **{x: torch.zeros_like(p, dtype=torch.float32)
                                            for x in ("state1", "state2")}}
    return found


class BF16AdamW(torch.optim.Optimizer):
    """AdamW whose weights and moments are bf16, computed in float32 and rounded at random.

    The random numbers are a function of the seed, the step, the tensor's name and a number's place
    in it: a resumed run rounds alike, and so do ranks, each for the part that it holds. Gradients
    are bf16 too, as autograd adds them up over micro-batches.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is None
        for group in self.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}
                state["step"] += 1
                at = local_shard(p)[0] * math.prod(p.shape[1:])
                flat = [local_shard(x)[1].view(-1).split(CHUNK)
                        for x in (p, p.grad, state["exp_avg"], state["exp_avg_sq"])]
                for part in zip(*flat, strict=True):
                    _move(*part, group, state["step"], name, at)
                    at += CHUNK


def _move(w: Tensor, g: Tensor, m: Tensor, v: Tensor, group: dict, t: int, name: str,
          at: int) -> None:
    """Step t of AdamW on bf16 weights, gradient and moments, all (n,), in place (algorithm 2); they
    are a tensor's numbers from place `at` on."""
    beta1, beta2 = group["betas"]
    g = g.float()
    m32 = m.float().lerp_(g, 1 - beta1)
    v32 = v.float().lerp_(g.square(), 1 - beta2)
    length = (v32 / (1 - beta2**t)).sqrt_().add_(EPS)
    w32 = w.float().mul_(1 - group["lr"] * group["weight_decay"])
    w32.addcdiv_(m32, length, value=-group["lr"] / (1 - beta1**t))
    for what, kept, x in (("w", w, w32), ("m", m, m32), ("v", v, v32)):
        start = zlib.crc32(f"{group['seed']} {name} {what} {t}".encode()) + at
        kept.copy_(rounded(x, hashed(start, len(x), x.device)))


def hashed(start: int, n: int, device: Any = "cpu") -> Tensor:
    """16 bits of a hash of start, start + 1, ...: (n,) int32, as good as drawn.

    The hash is C. Wellons' lowbias32 without its last line, which changes the lower bits only.
    """
    start = (start + 2**31) % 2**32 - 2**31  # as an int32 wraps
    x = torch.arange(n, dtype=torch.int32, device=device).add_(start)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        x.bitwise_xor_((x >> shift) & (2 ** (32 - shift) - 1)).mul_(factor)
    return (x >> 16) & 0xFFFF


def rounded(x: Tensor, noise: Tensor) -> Tensor:
    """float32 -> a bf16 neighbour, up or down at random, so that the mean is x.

    bf16 is the upper half of a float32's bits; what the lower half and 16 random bits add up to
    carries over, or is cut off.
    """
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()


@dataclass
class LossScale:
    """What the loss is multiplied by before an fp16 backward pass, whose gradients would else fall
    below fp16's smallest number (Micikevicius et al. 2018, 3.2). Always 1: off.

    Halved when a gradient overflows, doubled after 2,000 steps in which none did. At 2 it has given
    way as far as it can: what overflows then is no fault of the scale.
    """

    value: float = 1.0
    good_steps: int = 0  # since the last change

    @property
    def can_shrink(self) -> bool:
        """Whether a smaller scale is left to try."""
        return self.value > LEAST

    def update(self, finite: bool) -> None:
        if self.value == 1.0:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite or self.good_steps == 2000:
            self.value, self.good_steps = max(LEAST, self.value * (2.0 if finite else 0.5)), 0


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors as `parameter name/what`, for a checkpoint; a count is a tensor too.
    """
    return {f"{name}/{what}": torch.tensor(x) if type(x) is int else x
            for name, p in model.named_parameters()
            for what, x in optimizer.state.get(p, {}).items() if what not in TABLES}


def load_state(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str,
               Tensor]) -> None:
    """Put a checkpoint's tensors back, on each parameter's device. AdamW's `step` counts stay where
    they were kept."""
    named = dict(model.named_parameters())
    for key, x in saved.items():
        name, what = key.rsplit("/", 1)
        kept = optimizer.state[named[name]]
        kept[what] = x.item() if x.dtype == torch.int64 else x.to(named[name].device)
        if what in ("absmax1", "absmax2"):  # eight bits' values, one table for all tensors
            table = TABLES[f"qmap{what[-1]}"]
            kept[f"qmap{what[-1]}"] = optimizer.name2qmap[table].to(named[name].device)
