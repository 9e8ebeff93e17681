"""Optimizers: parameter groups, AdamW in three precisions, the scale of an fp16 loss, and the
optimizer's state by parameter name.

AdamW in float32 holds 16 bytes for each trained parameter: weight, gradient and two moments. Two
variants hold less:

- `adamw8bit` (Dettmers et al. 2022, by bitsandbytes) holds the moments of matrices in 8 bits: 10
  bytes. The moments of embeddings stay in float32, as its authors advise, because most rows of an
  embedding are seldom updated.
- `adamw-bf16` holds all four in bf16: 8 bytes, so that 7B parameters fit an 80 GB card. bf16 has 8
  significant bits, so nearest rounding would lose every small update. Stochastic rounding keeps
  them on average (Gupta et al. 2015).
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

CHUNK = 1 << 24  # elements that are in float32 at once during a step of adamw-bf16
EPS = 1e-8
# bitsandbytes' tables of the values that the 8-bit codes stand for; not saved in checkpoints
QUANTISATION_TABLES = {"qmap1": "dynamic", "qmap2": "udynamic"}
MIN_LOSS_SCALE = 2.0  # of an fp16 loss; 1 means no scaling
MIN_8BIT_NUMEL = 4096  # bitsandbytes holds the moments of smaller tensors in float32
GROWTH_INTERVAL = 2000  # steps without an overflow after which the loss scale is doubled
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def parameter_groups(model: nn.Module, weight_decay: float, embedding_scale: float = 1.0,
                     lora_B_scale: float = 1.0) -> list[dict]:
    """The trained parameters by weight decay and by `scale`, their share of the learning rate.

    Matrices decay; vectors (norms, biases, DoRA's magnitudes) do not. `embedding_scale`: of
    embed_tokens and lm_head. `lora_B_scale`: of LoRA's B (LoRA+, Hayou et al. 2024).
    """
    groups: dict[tuple, dict] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        scale = lora_B_scale if ".lora_B." in name else 1.0
        if name in EMBEDDINGS:
            scale = embedding_scale
        decay = weight_decay if p.dim() >= 2 else 0.0
        # one fused kernel cannot update sharded (FSDP) and replicated tensors together
        group = groups.setdefault((scale, decay, type(p)), {
            "params": [], "names": [], "scale": scale, "weight_decay": decay})
        group["params"].append(p)
        group["names"].append(name)
    return list(groups.values())


def adamw(model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float,
          embedding_scale: float = 1.0, lora_B_scale: float = 1.0, kind: str = "adamw",
          seed: int = 0) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over the trained parameters. `kind`: adamw (one fused kernel
    for all tensors), adamw8bit, or adamw-bf16, whose rounding is seeded by `seed`."""
    groups = parameter_groups(model, weight_decay, embedding_scale, lora_B_scale)
    for group in groups:
        group["lr"] = lr * group["scale"]
    if kind == "adamw-bf16":
        return BF16AdamW(groups, {"lr": lr, "betas": betas, "seed": seed})
    for group in groups:
        del group["names"]
    if kind == "adamw8bit":
        return _adamw8bit(model, groups, lr, betas)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=EPS, fused=True)


def bytes_held(name: str, p: Tensor, kind: str) -> int:
    """Bytes of the optimizer's moments of a trained parameter."""
    if kind == "adamw8bit" and p.numel() >= MIN_8BIT_NUMEL and name not in EMBEDDINGS:
        return 2 * (p.numel() + 4 * -(p.numel() // -256))  # a float32 scale for every 256 codes
    return 2 * p.numel() * (2 if kind == "adamw-bf16" else 4)


def _adamw8bit(model: nn.Module, groups: list[dict], lr: float,
               betas: tuple[float, float]) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW; the moments of small tensors and of embeddings are in float32. UserError
    if it does not work on the model's device."""
    # it warns of missing kernels that are not needed here
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    probe = nn.Parameter(torch.ones(MIN_8BIT_NUMEL, device=next(model.parameters()).device))
    probe.grad = torch.ones_like(probe)
    try:
        from bitsandbytes.optim import AdamW

        AdamW([probe], lr=1.0, optim_bits=8).step()
    except (ImportError, OSError, RuntimeError, AttributeError) as e:  # no library, or no kernels
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(f"--optimizer adamw8bit: bitsandbytes does not work on {probe.device} here "
                        f"({reason}); pip install bitsandbytes, or use --optimizer adamw",
                        FLAGS) from None
    optimizer = AdamW(groups, lr=lr, betas=betas, eps=EPS, optim_bits=8,
                      min_8bit_size=MIN_8BIT_NUMEL)
    for name, p in model.named_parameters():
        if p.requires_grad and name in EMBEDDINGS:
            # bitsandbytes creates 8-bit moments only for a parameter without a state
            optimizer.state[p] = {"step": 0, "state1": torch.zeros_like(p, dtype=torch.float32),
                                  "state2": torch.zeros_like(p, dtype=torch.float32)}
    return optimizer


class BF16AdamW(torch.optim.Optimizer):
    """AdamW with weights and moments in bf16: computed in float32, then rounded stochastically.

    The random bits are a function of the seed, the step, the parameter's name and the element's
    index. So a resumed run rounds in the same way, and each rank of FSDP rounds its shard as one
    rank would. Gradients are in bf16 too, in which autograd sums micro-batches.
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
                offset = local_shard(p)[0] * math.prod(p.shape[1:])
                chunks = [local_shard(x)[1].view(-1).split(CHUNK)
                          for x in (p, p.grad, state["exp_avg"], state["exp_avg_sq"])]
                for chunk in zip(*chunks, strict=True):
                    _update(*chunk, group, state["step"], name, offset)
                    offset += CHUNK


def _update(w: Tensor, g: Tensor, m: Tensor, v: Tensor, group: dict, t: int, name: str,
            offset: int) -> None:
    """Step t of AdamW (Loshchilov & Hutter 2019, algorithm 2) on bf16 weights, gradients and
    moments, all (n,), in place; `offset`: the index of their first element in the parameter."""
    beta1, beta2 = group["betas"]
    g = g.float()
    m32 = m.float().lerp_(g, 1 - beta1)
    v32 = v.float().lerp_(g.square(), 1 - beta2)
    denominator = (v32 / (1 - beta2**t)).sqrt_().add_(EPS)
    w32 = w.float().mul_(1 - group["lr"] * group["weight_decay"])
    w32.addcdiv_(m32, denominator, value=-group["lr"] / (1 - beta1**t))
    for label, target, x in (("w", w, w32), ("m", m, m32), ("v", v, v32)):
        start = zlib.crc32(f"{group['seed']} {name} {label} {t}".encode()) + offset
        target.copy_(round_stochastically(x, random_bits(start, len(x), x.device)))


def random_bits(start: int, n: int, device: Any = "cpu") -> Tensor:
    """16 pseudo-random bits for each of start, start + 1, ...: (n,) int32.

    They are the upper bits of the hash lowbias32 (C. Wellons), without its last line, which changes
    only lower bits.
    """
    start = (start + 2**31) % 2**32 - 2**31  # wrap around as int32 does
    x = torch.arange(n, dtype=torch.int32, device=device).add_(start)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        x.bitwise_xor_((x >> shift) & (2 ** (32 - shift) - 1)).mul_(factor)
    return (x >> 16) & 0xFFFF


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """Round float32 to one of the two nearest bf16 values, at random so that the mean is x.

    bf16 is the upper half of the bits of a float32. 16 random bits are added to the lower half,
    which then carries into the upper half or is dropped.
    """
    return ((x.view(torch.int32) + bits) & -(1 << 16)).view(torch.float32).bfloat16()


@dataclass
class LossScale:
    """The factor of the loss in an fp16 backward pass, without which small gradients would be 0 in
    fp16 (Micikevicius et al. 2018, section 3.2). A value of 1 means no scaling and stays 1.

    The scale is halved when a gradient overflows, and doubled after GROWTH_INTERVAL steps without
    an overflow. It does not go below MIN_LOSS_SCALE: an overflow there has another cause.
    """

    value: float = 1.0
    good_steps: int = 0  # since the last change

    @property
    def can_shrink(self) -> bool:
        """Whether the scale can still be halved."""
        return self.value > MIN_LOSS_SCALE

    def update(self, finite: bool) -> None:
        """Adapt the scale to a step; `finite`: whether all its gradients were finite."""
        if self.value == 1.0:
            return
        if not finite:
            self.value, self.good_steps = max(MIN_LOSS_SCALE, self.value / 2), 0
            return
        self.good_steps += 1
        if self.good_steps == GROWTH_INTERVAL:
            self.value, self.good_steps = self.value * 2, 0


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state for a checkpoint, as tensors named `PARAMETER/KEY`; integers become
    tensors too."""
    tensors = {}
    for name, p in model.named_parameters():
        for key, x in optimizer.state.get(p, {}).items():
            if key not in QUANTISATION_TABLES:
                tensors[f"{name}/{key}"] = torch.tensor(x) if type(x) is int else x
    return tensors


def load_state(model: nn.Module, optimizer: torch.optim.Optimizer,
               tensors: dict[str, Tensor]) -> None:
    """Set the optimizer's state to that of `state_tensors`, on each parameter's device."""
    parameters = dict(model.named_parameters())
    for full_name, x in tensors.items():
        name, key = full_name.rsplit("/", 1)
        device = parameters[name].device
        state = optimizer.state[parameters[name]]
        state[key] = x.item() if x.dtype == torch.int64 else x.to(device)
        if key in ("absmax1", "absmax2"):  # 8-bit moments need bitsandbytes' tables too
            qmap = f"qmap{key[-1]}"
            state[qmap] = optimizer.name2qmap[QUANTISATION_TABLES[qmap]].to(device)
