"""The device of this process: which one, its compute dtype, its peak speed, its memory."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
from pathlib import Path

import torch

from runtime.console import FLAGS, UserError, info
from runtime.dtypes import FLAG_DTYPES

GiB = 2**30
# Peak of dense bf16 (T4: fp16) matrix products in FLOP/s, from the makers' data sheets; for MFU.
PEAK_FLOPS = {"T4": 65e12, "L4": 121e12, "A10G": 70e12, "A100": 312e12, "H100": 989e12,
              "H200": 989e12, "4090": 165e12}


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device for --device auto, cpu or cuda, and for this rank of the machine.

    On a CPU the allocator is told to keep freed memory. UserError (FLAGS) if there is no such GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        keep_freed_memory()
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU that this torch can use; use --device cpu, or "
                        "install a CUDA build of torch", FLAGS)
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"LOCAL_RANK {local_rank}: this machine has {torch.cuda.device_count()} "
                        "GPUs; give torchrun at most that number with --nproc-per-node", FLAGS)
    device = torch.device(f"cuda:{local_rank}")
    torch.cuda.set_device(device)
    return device


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's architecture and number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def compute_dtype(device: torch.device, name: str) -> torch.dtype:
    """The dtype of matrix products for --dtype.

    auto: bf16 where the device multiplies it natively; else fp16 on a GPU (before Ampere) and fp32
    on a CPU. A GPU without native bf16 is reported.
    """
    gpu = device.type == "cuda"
    if gpu:
        native_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native_bf16 = torch.cpu._is_avx512_bf16_supported()
    if gpu and not native_bf16:
        if name == "auto":
            info("this GPU has no bf16: matrix products are in fp16")
        elif name == "bf16":
            info("this GPU has no bf16: --dtype bf16 is slow on it; use --dtype fp16")
    if name == "auto":
        if native_bf16:
            return torch.bfloat16
        return torch.float16 if gpu else torch.float32
    if name == "fp8":
        return torch.bfloat16  # of everything around the fp8 products
    return FLAG_DTYPES[name]


def peak_flops(device: torch.device) -> float | None:
    """The GPU's peak in FLOP/s; None if it is not in the table."""
    words = device_name(device).replace("-", " ").split()  # an L40 is not an L4
    return next((peak for name, peak in PEAK_FLOPS.items() if name in words), None)


def peak_memory_gb(device: torch.device) -> float:
    """The peak of memory in GiB, so far or since `reset_peak_memory`: of the GPU's tensors, or of
    the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GiB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GiB


def reset_peak_memory(device: torch.device) -> None:
    """Let the peak of memory start again from what is held now.

    On a CPU with Linux, memory that the process has freed is given back to the system first:
    the heap keeps it otherwise (`keep_freed_memory`), and it would count as held. Elsewhere on a
    CPU the peak stays as it is.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    clear_refs = Path("/proc/self/clear_refs")
    if os.access(clear_refs, os.W_OK):
        clear_refs.write_text("5", encoding="ascii")  # 5: the peak of resident memory, proc(5)


def memory_in_use_gb() -> float:
    """The memory that this process holds now, in GiB; its peak where there is no /proc."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return peak_memory_gb(torch.device("cpu"))
    pages = int(statm.read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / GiB


def memory_limit_gb(device: torch.device) -> float:
    """The memory that this rank may use in GiB: its GPU's, or its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GiB
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit_file = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit_file.exists():
        limit = limit_file.read_text().strip()
        if limit.isdigit():
            size = min(size, int(limit))
    return size / int(os.environ.get("LOCAL_WORLD_SIZE", 1)) / GiB


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on a GPU or for the CPU's allocator."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step, unless the environment says otherwise.

    Memory that goes back to the system returns as pages that must be zeroed: a twentieth of the
    time of a LoRA step. Blocks above 32 MB, the largest threshold that every glibc accepts, still
    go back. If those above 1 MB did, a LoRA step would use a fifth less memory (heap
    fragmentation) and take 1.7 times as long. Only Linux with glibc is affected.
    """
    if any(x.startswith("MALLOC_") or x == "GLIBC_TUNABLES" for x in os.environ):
        return
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: larger blocks are mapped on their own
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the free end of the heap is kept
