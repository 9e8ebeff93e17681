"""Who and how many we are: this process's rank, its device, the dtype of products, sums over all
ranks.

torchrun starts the processes and says in the environment which is which. Alone, a process is rank 0
of 1 and every method here costs nothing. Several ranks hold the same weights and add their
gradients once a step.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from log import FLAGS, UserError

# bf16 (T4: fp16) tensor-core peaks without sparsity, FLOP/s, from the makers' data sheets: the
# limit of an MFU
PEAKS = {"T4": 65e12, "L4": 121e12, "A10G": 70e12, "A100": 312e12, "H100": 989e12, "H200": 989e12,
         "4090": 165e12}


@dataclass
class Ranks:
    """This process among all that train together."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def start(cls, device: str) -> Ranks:
        """Join the others, if torchrun started us; `device` is auto, cpu or cuda."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "--device cuda: no GPU that this torch can use; take --device cpu or install a "
                "CUDA build of torch", FLAGS)
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            torch.cuda.set_device(device)
        if world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        return cls(rank, world, torch.device(device))

    def __str__(self) -> str:
        """The machine, in words."""
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        else:
            name = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
        return name if self.world == 1 else f"{self.world} x {name}"

    def total(self, x: float) -> float:
        """The sum of a number over all ranks."""
        if self.world == 1:
            return x
        t = torch.tensor(x, dtype=torch.float64, device=self.device)
        dist.all_reduce(t)
        return t.item()

    def highest(self, x: int) -> int:
        """The largest of a number over all ranks."""
        if self.world == 1:
            return x
        t = torch.tensor(x, device=self.device)
        dist.all_reduce(t, dist.ReduceOp.MAX)
        return int(t)

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum gradients over all ranks, once a step, in one message per dtype."""
        if self.world == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for p in parameters:
            if p.grad is not None:
                by_dtype.setdefault(p.grad.dtype, []).append(p.grad)
        for grads in by_dtype.values():
            flat = torch.cat([g.flatten() for g in grads])
            dist.all_reduce(flat)
            for g, summed in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                g.copy_(summed.view_as(g))

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.world > 1:
            dist.barrier()

    def wait(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def leave(self) -> None:
        """Part from the others in order."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def compute_dtype(self, name: str) -> torch.dtype:
        """The dtype of products: as asked, or `auto`: bf16 where the machine multiplies it
        natively.

        A GPU without bf16 (before Ampere) takes fp16, a CPU without it fp32.
        """
        if name == "auto" and self.device.type == "cuda":
            name = "bf16" if torch.cuda.get_device_capability(self.device) >= (8, 0) else "fp16"
        elif name == "auto":
            name = "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]

    def peak_flops(self) -> float | None:
        """What this GPU can multiply in a second at most; None where no data sheet says."""
        return next((peak for key, peak in PEAKS.items() if key in str(self)), None)

    def memory_gb(self) -> float:
        """The most memory held so far, GB of 2^30: on the GPU, or of the whole process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
