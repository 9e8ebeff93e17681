"""Who and how many we are: this process's rank, its device, the dtype of products, and how what
trains is shared among ranks.

torchrun starts the processes and says in the environment which is which. Alone, a process is rank 0
of 1 and every method here costs nothing. With several, one idea: a step is a *sum* over all of
them, divided once by a count, so nothing here ever averages.

- `ddp`: every rank holds the whole model. Gradients are summed in buckets while the backward pass
  is still on its way to the first layer, as torch's DistributedDataParallel does it. Here it is a
  hook on each parameter and no wrapper around the model: names stay those of the files, and an
  objective may call the model as often and in whatever way it likes.
- `fsdp`: torch's fully_shard (FSDP2). Each rank keeps 1/N of every matrix, of its gradient and of
  its moments, and has a block whole only while it computes it. What is small or needs float32 in
  use (norms, biases, lengths, adapters) stays whole on each rank and goes the way of `ddp`.
"""

from __future__ import annotations

import ctypes
import datetime
import json
import math
import os
import platform
import resource
import sys
import time
import uuid
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime.console import FLAGS, UserError, say
from runtime.dtypes import FLAG_DTYPES

# bf16 (T4: fp16) tensor-core peaks without sparsity, FLOP/s, from the makers' data sheets: the
# limit of an MFU
PEAKS = {"T4": 65e12, "L4": 121e12, "A10G": 70e12, "A100": 312e12, "H100": 989e12, "H200": 989e12,
         "4090": 165e12}
BUCKET = 25 << 20  # bytes of gradients in one message; DDP's own default
GiB = 2**30


@dataclass
class Bucket:
    """Parameters whose gradients travel together."""

    parameters: list[nn.Parameter]
    missing: int = 0  # gradients still to come in this backward pass
    sum: Tensor | None = None  # (numbers,)
    work: dist.Work | None = None

    def send(self) -> None:
        """Begin to sum; a parameter without a gradient here may have one elsewhere: it adds 0. The
        gradients are parts of the sum from now on, so that they do not stand twice."""
        self.sum = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                              for p in self.parameters])
        for p, part in zip(self.parameters, self.sum.split([p.numel() for p in self.parameters]),
                           strict=True):
            p.grad = part.view_as(p)
        self.work = dist.all_reduce(self.sum, async_op=True)

    def receive(self) -> None:
        """Wait for the sum."""
        self.work.wait()
        self.sum = self.work = None


@dataclass
class Ranks:
    """This process among all that train together."""

    rank: int
    world: int
    device: torch.device
    trained: torch.dtype = torch.float32  # the dtype of what trains
    how: str = "none"  # the ranks share the work by: none (one rank), ddp, fsdp
    buckets: list[Bucket] = field(default_factory=list)  # in the order in which they are sent
    shards: list[nn.Module] = field(default_factory=list)  # modules that fully_shard has cut
    often: bool = False  # fsdp: gradients meet after every micro-batch
    sent: int = 0  # buckets of this step that are under way
    meeting: bool = False  # whether this backward pass is the step's last

    @classmethod
    def start(cls, device: str, timeout: float = 600.0) -> Ranks:
        """Join the others, if torchrun started us; `device` is auto, cpu or cuda.

        A rank that waits longer than `timeout` seconds for the others gives up. UserError (FLAGS)
        where the environment does not fit together.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: no GPU that this torch can use; take --device cpu or "
                            "install a CUDA build of torch", FLAGS)
        rank, world, local = _environment()
        if device == "cpu":
            keep_freed()
        else:
            if local >= torch.cuda.device_count():
                raise UserError(f"LOCAL_RANK {local}: this machine has {torch.cuda.device_count()} "
                                "GPUs; give torchrun at most so many with --nproc-per-node", FLAGS)
            device = f"cuda:{local}"
            torch.cuda.set_device(device)
        if world > 1 and not dist.is_initialized():
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            limit = datetime.timedelta(seconds=timeout)
            try:
                dist.init_process_group("nccl" if device.startswith("cuda") else "gloo",
                                        timeout=limit, store=_store(rank, world, limit),
                                        rank=rank, world_size=world)
            except (RuntimeError, ValueError) as e:  # DistNetworkError is a RuntimeError
                why = " ".join(str(e).split())[:200]
                raise UserError(f"rank {rank} of {world} cannot meet the others at {where} ({why});"
                                " on one machine, torchrun --standalone finds a free port",
                                FLAGS) from None
        return cls(rank, world, torch.device(device))

    def __str__(self) -> str:
        """The machine, in words."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" \
            else f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
        return name if self.world == 1 else f"{self.world} x {name}"

    # -- sharing the model ------------------------------------------------------------------------

    def share(self, model: nn.Module, how: str, dtype: torch.dtype,
              trained: torch.dtype = torch.float32) -> None:
        """Put a model that lies whole on the CPU or the device where it trains, and share it.

        `how`: auto, none, ddp, fsdp; `dtype` that of products, `trained` that of what trains.
        """
        self.trained = trained
        gb = math.inf
        if self.device.type == "cuda":  # of the smallest, for all must choose alike
            gb = -self.highest(-int(self.memory_limit_gb() * GiB))[0] / GiB
        if how == "auto":
            how = way(model, self.world, gb)
        if how == "none" and self.world > 1:
            raise UserError(f"--shard none: {self.world} ranks that do not share their gradients "
                            "are different runs; take ddp or fsdp", FLAGS)
        if how != "none" and self.world == 1:
            raise UserError(f"--shard {how}: there is one rank; start several with torchrun "
                            "--nproc-per-node, or leave the flag out", FLAGS)
        self.how = how
        if how == "fsdp":
            self.often = meets_often(model, gb)
            self._cut(model, dtype)
        self._place(model)
        if self.world > 1:
            self._bucket([p for p in model.parameters() if p.requires_grad and not is_cut(p)])

    def _place(self, module: nn.Module) -> None:
        """Move what is not cut to the device, and what trains to its dtype."""
        for p in module.parameters():
            if not is_cut(p):
                p.data = p.data.to(self.device, self.trained if p.requires_grad else p.dtype)
        for m in module.modules():
            for name, x in [*m._buffers.items(), *vars(m).items()]:
                if isinstance(x, Tensor) and x.device.type != self.device.type:
                    setattr(m, name, x.to(self.device))  # DoRA's squares, NF4's blocks

    def _cut(self, model: nn.Module, dtype: torch.dtype) -> None:
        """fully_shard each block, then the rest (embeddings and head).

        Blocks are gathered in the dtype of products, which is what their matrices are cast to in
        use anyway; embeddings and head as they are kept, for a look-up's gradient is summed in the
        table's dtype. So nothing is rounded that one rank would not round. The head is used inside
        the root's forward, where it is whole.
        """
        from torch.distributed import device_mesh, fsdp

        # the NLL is a view, and nobody writes into it
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        mesh = device_mesh.init_device_mesh(self.device.type, (self.world,))
        whole = {p for name, p in model.named_parameters() if stays_whole(name, p)}
        # inputs are left as they are: the rotary angles among them are float32
        narrow = fsdp.MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32,
                                           cast_forward_inputs=False)
        kept = fsdp.MixedPrecisionPolicy(reduce_dtype=torch.float32)
        for block in model.model.layers:
            self._place(block)  # one block at a time is whole on the device
            fsdp.fully_shard(block, mesh=mesh, mp_policy=narrow, ignored_params=whole)
        self._place(model)
        fsdp.fully_shard(model, mesh=mesh, mp_policy=kept, ignored_params=whole)
        fsdp.register_fsdp_forward_method(model, "states")  # a way in beside its forward
        self.shards = [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]
        for m in self.shards:
            m.set_force_sum_reduction_for_comms(True)
            m.set_gradient_divide_factor(1.0)  # a sum, where FSDP would average
            m.unshard()  # its buffers must not be born in an evaluation's inference mode
            m.reshard()

    def _bucket(self, parameters: Sequence[nn.Parameter]) -> None:
        """Deal parameters out to buckets, those of the last layers first, as gradients come."""
        size = 0
        for p in reversed(parameters):
            if not size or size + p.numel() * p.element_size() > BUCKET \
                    or p.dtype != self.buckets[-1].parameters[-1].dtype:
                self.buckets.append(Bucket([]))
                size = 0
            bucket = self.buckets[-1]
            bucket.parameters.append(p)
            size += p.numel() * p.element_size()
            p.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self._arrived(bucket))

    # -- a step -----------------------------------------------------------------------------------

    def meet(self, last: bool) -> None:
        """Say before a backward pass whether it is the step's last, in which gradients meet."""
        self.meeting, self.sent = last, 0
        for bucket in self.buckets:
            bucket.missing = len(bucket.parameters)
        for m in self.shards:
            m.set_requires_gradient_sync(last or self.often, recurse=False)

    def _arrived(self, bucket: Bucket) -> None:
        """A gradient is there. Buckets leave in one order, or ranks would sum what does not
        belong together."""
        bucket.missing -= 1
        while self.meeting and self.sent < len(self.buckets) \
                and self.buckets[self.sent].missing <= 0:
            self.buckets[self.sent].send()
            self.sent += 1

    def gradients(self, parameters: Iterable[nn.Parameter]) -> tuple[list[Tensor], Tensor]:
        """What this rank has of the step's summed gradients, and the squares of their norms, (2,)
        float64: of what all ranks have whole, and of its parts of the rest."""
        for bucket in self.buckets[self.sent:]:  # with parameters that this batch did not use
            bucket.send()
        for bucket in self.buckets:
            bucket.receive()
        found = [p.grad for p in parameters if p.grad is not None]
        whole = [g for g in found if not is_cut(g)]
        parts = [g.to_local() for g in found if is_cut(g)]
        norms = [torch.nn.utils.get_total_norm(x).to(self.device, torch.float64, non_blocking=True)
                 for x in (whole, parts)]
        return whole + parts, torch.stack(norms).square()

    def read(self, sums: Tensor, squares: Tensor) -> tuple[list[float], float]:
        """Sums (k,) over all ranks, and the norm of the gradients whose `squares` these are: all
        that a step asks of the device, in one wait."""
        own = torch.cat([sums.double(), squares[1:]])
        if self.world > 1:
            dist.all_reduce(own)
        *found, cut, whole = torch.cat([own, squares[:1]]).tolist()
        return found, math.sqrt(whole + cut)

    # -- numbers and words ------------------------------------------------------------------------

    def totals(self, *xs: float) -> list[float]:
        """The sum of each number over all ranks."""
        return self._reduced(torch.tensor(xs, dtype=torch.float64), dist.ReduceOp.SUM)

    def highest(self, *xs: int) -> list[int]:
        """The largest of each number over all ranks."""
        return self._reduced(torch.tensor(xs), dist.ReduceOp.MAX)

    def _reduced(self, xs: Tensor, how: dist.ReduceOp.RedOpType) -> list:
        if self.world > 1:
            xs = xs.to(self.device)
            dist.all_reduce(xs, how)
        return xs.tolist()

    def gather(self, text: str) -> list[str]:
        """What each rank says, by rank."""
        if self.world == 1:
            return [text]
        mine = text.encode()
        mine = mine.ljust(self.highest(len(mine))[0], b"\0")
        mine = torch.tensor(list(mine), dtype=torch.uint8, device=self.device)
        said = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(said, mine)
        return [bytes(x.tolist()).rstrip(b"\0").decode() for x in said]

    def agree(self, facts: dict[str, str]) -> None:
        """UserError (FLAGS) if a rank was started with other facts than rank 0: they would train
        different runs, or wait for each other for ever."""
        said = [json.loads(x) for x in self.gather(json.dumps(facts))]
        for rank, theirs in enumerate(said):
            for name, x in said[0].items():
                if theirs.get(name) != x:
                    raise UserError(f"rank {rank} was started with another {name}: "
                                    f"{theirs.get(name)}, rank 0 with {x}; start all with the "
                                    "same command, code and data", FLAGS)

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

    # -- the machine ------------------------------------------------------------------------------

    def compute_dtype(self, name: str) -> torch.dtype:
        """The dtype of products: as asked, or `auto`: bf16 where the machine multiplies it
        natively, else fp16 on a GPU (before Ampere), fp32 on a CPU; that a GPU has none is said."""
        gpu = self.device.type == "cuda"
        native = torch.cuda.get_device_capability(self.device) >= (8, 0) if gpu \
            else torch.cpu._is_avx512_bf16_supported()
        if gpu and not native and name in ("auto", "bf16"):
            say("this GPU has no bf16: " + ("products are in fp16" if name ==
                "auto" else "--dtype bf16 is slow on it; --dtype fp16 would not be"))
        if name == "auto":
            name = "bf16" if native else "fp16" if gpu else "fp32"
        return torch.bfloat16 if name == "fp8" else FLAG_DTYPES[name]  # fp8: between products

    def peak_flops(self) -> float | None:
        """What this GPU can multiply in a second at most; None where no data sheet says."""
        words = str(self).replace("-", " ").split()  # an L40 is no L4
        return next((peak for key, peak in PEAKS.items() if key in words), None)

    def memory_gb(self) -> float:
        """The most memory held so far, GB of 2^30: on the GPU, or of the whole process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / GiB
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GiB

    def memory_limit_gb(self) -> float:
        """The memory this rank may hold, GB of 2^30: its GPU's, or its share of the machine's."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory / GiB
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        fence = Path("/sys/fs/cgroup/memory.max")  # of a container
        if fence.exists() and (said := fence.read_text().strip()).isdigit():
            size = min(size, int(said))
        return size / int(os.environ.get("LOCAL_WORLD_SIZE", 1)) / GiB


def keep_freed() -> None:
    """Let glibc keep what a step frees for the next one, unless the environment says otherwise.

    A block that goes back to the system comes again as pages to be zeroed, a twentieth of a LoRA
    step's time. Blocks above 32 MB, the most that every glibc takes, still go back; if those above
    1 MB did, a LoRA step would hold a fifth less, the holes between them, and take 1.7 times as
    long. Elsewhere than on Linux with glibc nothing is done.
    """
    said = any(x.startswith("MALLOC_") or x == "GLIBC_TUNABLES" for x in os.environ)
    if said or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: from here on a block is the system's own
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: of the heap's free end, nothing goes back


def _environment() -> tuple[int, int, int]:
    """Rank, ranks in all, rank on this machine, as torchrun says; UserError if it says half."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    said = {name: os.environ[name] for name in names if os.environ.get(name)}
    rank, world, local = (int(x) if x.isdecimal() else -1 for x in (
        said.get("RANK", "0"), said.get("WORLD_SIZE", "1"), said.get("LOCAL_RANK", "0")))
    if not 0 <= rank < world or local < 0:
        shown = ", ".join(f"{k}={v}" for k, v in said.items())
        raise UserError(f"environment: {shown} are no rank among ranks; start with torchrun, or "
                        "unset them", FLAGS)
    if world > 1 and (missing := [name for name in names if name not in said]):
        raise UserError(f"environment: WORLD_SIZE={world}, but {', '.join(missing)} are not set; "
                        "start with torchrun, or unset WORLD_SIZE", FLAGS)
    return rank, world, local


def _store(rank: int, world: int, limit: datetime.timedelta) -> dist.Store | None:
    """Where the ranks of this attempt leave each other their addresses; None: torch opens one.

    torchrun keeps one store for all attempts, where those of the dead still stand, and each of its
    agents counts attempts for itself, so that no number names one on all machines. Here rank 0
    opens a store anew, and tells its port to each rank that asks under a name never used before.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, name = os.environ["MASTER_ADDR"], uuid.uuid4().hex
    lasting = dist.TCPStore(host, int(os.environ["MASTER_PORT"]), timeout=limit)
    lasting.set(f"rank {rank}", name)
    new = dist.TCPStore(host, int(lasting.get(name)) if rank else 0, is_master=rank == 0,
                        timeout=limit)
    new.add("here", 1)
    end = time.monotonic() + limit.total_seconds()
    while rank == 0 and (here := new.add("here", 0)) < world:
        if time.monotonic() > end:
            raise RuntimeError(f"{here} of {world} came within {limit.total_seconds():g} s")
        for other in range(1, world):  # until the living one has asked, the answer is to a dead
            lasting.set(lasting.get(f"rank {other}").decode(), str(new.port))
        time.sleep(0.02)
    return new


def way(model: nn.Module, world: int, gb: float) -> str:
    """How --shard auto shares a model: none; fsdp if the whole of weights, gradients and moments
    would fill half of a GPU of so many GB; ddp."""
    need = sum(p.numel() * (16 if p.requires_grad else p.element_size())
               for p in model.parameters())
    return "none" if world == 1 else "fsdp" if need > gb * GiB / 2 else "ddp"


def meets_often(model: nn.Module, gb: float) -> bool:
    """Whether fsdp sums gradients after every micro-batch and not after the last alone: where whole
    ones, in float32, would fill a tenth of a GPU of so many GB between them."""
    numbers = sum(p.numel() for name, p in model.named_parameters()
                  if p.requires_grad and not stays_whole(name, p))
    return 4 * numbers > gb * GiB / 10


def stays_whole(name: str, p: nn.Parameter) -> bool:
    """Whether fsdp leaves a parameter whole on each rank: if small, or needing float32 in use."""
    return p.dim() < 2 or ".lora_" in name


def is_cut(x: Tensor) -> bool:
    """Whether a tensor is one rank's part of a whole (a DTensor)."""
    return hasattr(x, "to_local")


def whole(x: Tensor) -> Tensor:
    """The whole of a tensor; of one that is cut, all ranks must ask at once."""
    return x.full_tensor() if is_cut(x) else x


def rows(x: Tensor) -> tuple[int, Tensor]:
    """What this rank holds of a tensor: its first row, and the rows themselves."""
    if not is_cut(x):
        return 0, x
    each = -(-x.shape[0] // x.device_mesh.size())  # as torch.chunk cuts it
    return min(x.device_mesh.get_local_rank() * each, x.shape[0]), x.to_local()


def as_cut(local: Tensor, like: Tensor) -> Tensor:
    """This rank's rows as a part of the same whole as `like`."""
    if not is_cut(like):
        return local
    return type(like).from_local(local, like.device_mesh, like.placements, run_check=False,
                                 shape=like.shape, stride=like.stride())
