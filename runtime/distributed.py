"""The ranks of a run: process group, collectives, and how the model is shared among them.

torchrun starts the processes and describes them in the environment. A single process is rank 0 of 1
and every method here costs nothing. A training step is a sum over all ranks, divided once by a
count. Therefore gradients are always summed here, never averaged.

- `ddp`: every rank holds the whole model. torch's DistributedDataParallel sums gradients while the
  backward pass still runs.
- `fsdp`: torch's fully_shard (FSDP2). Each rank holds 1/N of every matrix, of its gradient and of
  its optimizer state, and gathers a block only while it computes it. Small parameters and those
  that are used in float32 (norms, biases, adapters) are replicated, and summed as with `ddp`.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from runtime.console import FLAGS, UserError
from runtime.device import GiB, choose_device, device_name, memory_limit_gb

# How gradients are summed, as checkpoints record it. Commit 53f4a60 and earlier recorded nothing:
# with more than two ranks their own buckets added in another order.
GRADIENT_SUM = "torch DDP"


class _ModelCall(nn.Module):
    """The module that DistributedDataParallel wraps: its forward calls any function of the model.

    DDP allows one forward pass per backward pass. A loss may need several of the model (preference
    pairs do); they all run inside this one.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        return function(self.model, *args)


@dataclass
class Distributed:
    """This process among the ranks that train together."""

    rank: int
    world_size: int
    device: torch.device
    trained_dtype: torch.dtype = torch.float32  # of trained parameters
    strategy: str = "none"  # none (one rank), ddp, fsdp
    ddp: DistributedDataParallel | None = None
    fsdp_modules: list[nn.Module] = field(default_factory=list)  # modules wrapped by fully_shard
    sync_every_microbatch: bool = False  # fsdp: reduce gradients after every micro-batch

    @classmethod
    def start(cls, device: str, timeout: float = 600.0) -> Distributed:
        """Join the process group if torchrun started this process; `device` is auto, cpu or cuda.

        A rank that waits longer than `timeout` seconds for the others gives up. UserError (FLAGS)
        if the environment is not that of a rank.
        """
        rank, world_size, local_rank = _read_environment()
        chosen = choose_device(device, local_rank)
        if world_size > 1 and not dist.is_initialized():
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            limit = datetime.timedelta(seconds=timeout)
            backend = "nccl" if chosen.type == "cuda" else "gloo"
            try:
                dist.init_process_group(backend, timeout=limit, rank=rank, world_size=world_size,
                                        store=_rendezvous_store(rank, world_size, limit))
            except (RuntimeError, ValueError) as e:  # DistNetworkError is a RuntimeError
                reason = " ".join(str(e).split())[:200]
                raise UserError(f"rank {rank} of {world_size} cannot connect to the others at "
                                f"{address} ({reason}); on one machine, torchrun --standalone "
                                "finds a free port", FLAGS) from None
        return cls(rank, world_size, chosen)

    def __str__(self) -> str:
        """The number of ranks and the device, for people."""
        name = device_name(self.device)
        return name if self.world_size == 1 else f"{self.world_size} x {name}"

    # -- sharing the model -------------------------------------------------------------------------

    def wrap_model(self, model: nn.Module, strategy: str, compute_dtype: torch.dtype,
                   trained_dtype: torch.dtype = torch.float32) -> None:
        """Move a model, whole on the CPU or the device, to its device and share it among the ranks.

        `strategy`: auto, none, ddp or fsdp. The model itself stays a plain module with its own
        parameter names; `forward` runs it through DistributedDataParallel.
        """
        self.trained_dtype = trained_dtype
        gpu_memory_gb = math.inf
        if self.device.type == "cuda":  # of the smallest GPU, because all ranks must choose alike
            limit = int(memory_limit_gb(self.device) * GiB)
            gpu_memory_gb = -self.all_reduce_max(-limit)[0] / GiB
        if strategy == "auto":
            strategy = choose_strategy(model, self.world_size, gpu_memory_gb)
        if strategy == "none" and self.world_size > 1:
            raise UserError(f"--shard none: cannot be used with {self.world_size} processes; use "
                            "--shard ddp or --shard fsdp", FLAGS)
        if strategy != "none" and self.world_size == 1:
            raise UserError(f"--shard {strategy}: there is one process; start several with "
                            "torchrun --nproc-per-node, or remove the flag", FLAGS)
        self.strategy = strategy
        if strategy == "fsdp":
            self.sync_every_microbatch = needs_sync_every_microbatch(model, gpu_memory_gb)
            self._fully_shard(model, compute_dtype)
        self._move_to_device(model)
        if self.world_size > 1:
            self._wrap_ddp(model)

    def _move_to_device(self, module: nn.Module) -> None:
        """Move everything that is not sharded to the device, and trained parameters to their
        dtype."""
        for p in module.parameters():
            if not is_dtensor(p):
                p.data = p.data.to(self.device, self.trained_dtype if p.requires_grad else p.dtype)
        for m in module.modules():
            for name, x in [*m._buffers.items(), *vars(m).items()]:
                if isinstance(x, Tensor) and x.device.type != self.device.type:
                    setattr(m, name, x.to(self.device))  # DoRA's squared norms, NF4's blocks

    def _fully_shard(self, model: nn.Module, compute_dtype: torch.dtype) -> None:
        """Apply fully_shard to each block, then to the rest (embeddings and head).

        Blocks are gathered in the compute dtype, to which their matrices are cast in use anyway.
        Embeddings and head are gathered as they are stored, because the gradient of a look-up is
        summed in the table's dtype. So nothing is rounded that one rank would not round. The head
        is used inside the root's forward pass, where it is gathered.
        """
        from torch.distributed import device_mesh, fsdp

        # the NLL is a view, and nothing writes into it
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        mesh = device_mesh.init_device_mesh(self.device.type, (self.world_size,))
        replicated = {p for name, p in model.named_parameters() if is_replicated(name, p)}
        # inputs are not cast: the rotary angles among them are float32
        block_policy = fsdp.MixedPrecisionPolicy(
            param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        root_policy = fsdp.MixedPrecisionPolicy(reduce_dtype=torch.float32)
        for block in model.model.layers:
            self._move_to_device(block)  # one block at a time is whole on the device
            fsdp.fully_shard(block, mesh=mesh, mp_policy=block_policy, ignored_params=replicated)
        self._move_to_device(model)
        fsdp.fully_shard(model, mesh=mesh, mp_policy=root_policy, ignored_params=replicated)
        fsdp.register_fsdp_forward_method(model, "states")  # also called without forward
        self.fsdp_modules = [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]
        for m in self.fsdp_modules:
            m.set_force_sum_reduction_for_comms(True)
            m.set_gradient_divide_factor(1.0)  # sum, where FSDP would average
            m.unshard()  # allocates its buffers now, not in the inference mode of an evaluation
            m.reshard()

    def _wrap_ddp(self, model: nn.Module) -> None:
        """Wrap the model in DistributedDataParallel, for the parameters that FSDP does not shard.

        All ranks read the same files, so parameters are not broadcast. With
        `find_unused_parameters` torch keeps its first buckets: the order of a sum does not depend
        on the step, and a resumed run repeats it.
        """
        call = _ModelCall(model)
        sharded = [name for name, p in call.named_parameters() if is_dtensor(p)]
        replicated = [p for p in model.parameters() if p.requires_grad and not is_dtensor(p)]
        if not replicated:
            return
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(call, sharded)
        # blocks are compiled one by one: there is no graph to split at the buckets
        torch._dynamo.config.optimize_ddp = False
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            self.ddp = DistributedDataParallel(
                call, broadcast_buffers=False, init_sync=False, find_unused_parameters=True,
                gradient_as_bucket_view=True)
        self.ddp.register_comm_hook(None, _sum_gradients)

    # -- a step ------------------------------------------------------------------------------------

    def forward(self, function: Callable[..., Tensor], model: nn.Module, *args: Any) -> Tensor:
        """`function(model, *args)`, through DistributedDataParallel if there are several ranks."""
        if self.ddp is None:
            return function(model, *args)
        return self.ddp(function, *args)

    def set_gradient_sync(self, last: bool) -> None:
        """Say before a forward pass whether its micro-batch is the step's last, after which
        gradients are summed over the ranks."""
        if self.ddp is not None:
            self.ddp.require_backward_grad_sync = last
        for m in self.fsdp_modules:
            m.set_requires_gradient_sync(last or self.sync_every_microbatch, recurse=False)

    def changed_gradient_sum(self, recorded: str | None) -> str:
        """A line for a person if a run to be resumed summed its gradients in another order, which
        changes the last bits of a sum of more than two ranks; else an empty text."""
        if recorded == GRADIENT_SUM or self.world_size <= 2:
            return ""
        return ("--resume: this run began with commit 53f4a60 or earlier, which summed the "
                f"gradients of {self.world_size} ranks in another order; from here on the numbers "
                "may differ in their last bits (53f4a60 resumes it bit for bit)")

    def reduce_loss_and_norm(self, sums: Tensor,
                             gradients: Iterable[Tensor]) -> tuple[list[float], float]:
        """Sums (k,) over all ranks, and the norm of the whole gradient.

        This is all that a step reads from the device, in one wait.
        """
        replicated = [g for g in gradients if not is_dtensor(g)]
        shards = [g.to_local() for g in gradients if is_dtensor(g)]
        norms = [torch.nn.utils.get_total_norm(x).to(self.device, torch.float64, non_blocking=True)
                 for x in (replicated, shards)]
        squares = torch.stack(norms).square()  # (2,)
        local = torch.cat([sums.double(), squares[1:]])  # what differs between the ranks
        if self.world_size > 1:
            dist.all_reduce(local)
        *totals, sharded, whole = torch.cat([local, squares[:1]]).tolist()
        return totals, math.sqrt(whole + sharded)

    # -- collectives -------------------------------------------------------------------------------

    def all_reduce_sum(self, *xs: float) -> list[float]:
        """The sum of each number over all ranks."""
        return self._all_reduce(torch.tensor(xs, dtype=torch.float64), dist.ReduceOp.SUM)

    def all_reduce_max(self, *xs: int) -> list[int]:
        """The largest of each number over all ranks."""
        return self._all_reduce(torch.tensor(xs), dist.ReduceOp.MAX)

    def _all_reduce(self, xs: Tensor, op: dist.ReduceOp.RedOpType) -> list:
        if self.world_size > 1:
            xs = xs.to(self.device)
            dist.all_reduce(xs, op)
        return xs.tolist()

    def all_gather_text(self, text: str) -> list[str]:
        """The texts of all ranks, by rank."""
        if self.world_size == 1:
            return [text]
        data = text.encode()
        data = data.ljust(self.all_reduce_max(len(data))[0], b"\0")
        local = torch.tensor(list(data), dtype=torch.uint8, device=self.device)
        gathered = [torch.empty_like(local) for _ in range(self.world_size)]
        dist.all_gather(gathered, local)
        return [bytes(x.tolist()).rstrip(b"\0").decode() for x in gathered]

    def assert_same_on_all_ranks(self, facts: dict[str, str]) -> None:
        """Raise a UserError (FLAGS) if a rank was started with other facts than rank 0.

        Such ranks would train different runs, or wait for each other forever.
        """
        by_rank = [json.loads(x) for x in self.all_gather_text(json.dumps(facts))]
        for rank, theirs in enumerate(by_rank):
            for name, expected in by_rank[0].items():
                if theirs.get(name) != expected:
                    raise UserError(f"rank {rank} was started with another {name}: "
                                    f"{theirs.get(name)}, rank 0 with {expected}; start all with "
                                    "the same command, code and data", FLAGS)

    def barrier(self) -> None:
        """Wait until all ranks have come to this call."""
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group."""
        self.ddp = None
        if dist.is_initialized():
            dist.destroy_process_group()


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The gradients that this rank holds; of a sharded parameter, a DTensor."""
    return [p.grad for p in parameters if p.grad is not None]


def _sum_gradients(_, bucket):
    """Sum a bucket of gradients over the ranks, where DDP would average (a DDP comm hook).

    Without annotations: DDP compares them with types, and here they would be strings.
    """
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def _read_environment() -> tuple[int, int, int]:
    """Rank, number of ranks, rank on this machine, from torchrun's environment.

    UserError (FLAGS) if it is incomplete or contradictory.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    numbers = [given.get(name, default) for name, default in defaults.items()]
    rank, world_size, local_rank = (int(x) if x.isdecimal() else -1 for x in numbers)
    if not 0 <= rank < world_size or local_rank < 0:
        listed = ", ".join(f"{k}={v}" for k, v in given.items())
        raise UserError(f"environment: {listed} do not describe a rank; start with torchrun, or "
                        "unset them", FLAGS)
    missing = [name for name in names if name not in given]
    if world_size > 1 and missing:
        raise UserError(f"environment: WORLD_SIZE={world_size}, but {', '.join(missing)} are not "
                        "set; start with torchrun, or unset WORLD_SIZE", FLAGS)
    return rank, world_size, local_rank


def _rendezvous_store(rank: int, world_size: int, limit: datetime.timedelta) -> dist.Store | None:
    """The store in which the ranks of this attempt exchange addresses; None: torch opens one.

    torchrun keeps one store for all attempts, in which the addresses of dead ranks remain. Each
    torchrun counts attempts for itself, so no number identifies an attempt on all machines.
    Therefore rank 0 opens a new store, and sends its port to each rank that asks for it under a
    name that was never used before.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, name = os.environ["MASTER_ADDR"], uuid.uuid4().hex
    torchrun_store = dist.TCPStore(host, int(os.environ["MASTER_PORT"]), timeout=limit)
    torchrun_store.set(f"rank {rank}", name)
    port = int(torchrun_store.get(name)) if rank else 0
    store = dist.TCPStore(host, port, is_master=rank == 0, timeout=limit)
    store.add("connected", 1)
    deadline = time.monotonic() + limit.total_seconds()
    while rank == 0 and (connected := store.add("connected", 0)) < world_size:
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"{connected} of {world_size} came within {limit.total_seconds():g} s")
        for other in range(1, world_size):  # the first names may be those of dead ranks
            torchrun_store.set(torchrun_store.get(f"rank {other}").decode(), str(store.port))
        time.sleep(0.02)
    return store


def choose_strategy(model: nn.Module, world_size: int, gpu_memory_gb: float) -> str:
    """The strategy of --shard auto: none for one rank; fsdp if weights, gradients and optimizer
    state would fill half of a GPU of that memory (GiB); else ddp."""
    if world_size == 1:
        return "none"
    n_bytes = sum(p.numel() * (16 if p.requires_grad else p.element_size())
                  for p in model.parameters())
    return "fsdp" if n_bytes > gpu_memory_gb * GiB / 2 else "ddp"


def needs_sync_every_microbatch(model: nn.Module, gpu_memory_gb: float) -> bool:
    """Whether fsdp reduces gradients after every micro-batch, and not after the last one only:
    if whole gradients in float32 would fill a tenth of a GPU of that memory (GiB)."""
    numbers = sum(p.numel() for name, p in model.named_parameters()
                  if p.requires_grad and not is_replicated(name, p))
    return 4 * numbers > gpu_memory_gb * GiB / 10


def is_replicated(name: str, p: nn.Parameter) -> bool:
    """Whether fsdp replicates a parameter: small ones, and those that are used in float32."""
    return p.dim() < 2 or ".lora_" in name


def is_dtensor(x: Tensor) -> bool:
    """Whether a tensor is sharded among the ranks."""
    return hasattr(x, "to_local")


def full_tensor(x: Tensor) -> Tensor:
    """The whole of a tensor; if it is sharded, all ranks must call this together."""
    return x.full_tensor() if is_dtensor(x) else x


def local_shard(x: Tensor) -> tuple[int, Tensor]:
    """What this rank holds of a tensor: the index of its first row, and its rows."""
    if not is_dtensor(x):
        return 0, x
    rows_per_rank = -(-x.shape[0] // x.device_mesh.size())  # as torch.chunk splits it
    return min(x.device_mesh.get_local_rank() * rows_per_rank, x.shape[0]), x.to_local()


def to_dtensor(local: Tensor, like: Tensor) -> Tensor:
    """This rank's rows as a shard of a tensor with the layout of `like`."""
    if not is_dtensor(like):
        return local
    return type(like).from_local(local, like.device_mesh, like.placements, run_check=False,
                                 shape=like.shape, stride=like.stride())
