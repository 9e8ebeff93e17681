"""What this machine can do at most: products, and bytes read; measured, not read off a data sheet.

    python -m bench.limits

A training step is bound by matrix products, decoding by reading the weights; a figure beside its
limit says how much is left to win. Both are measured beside every figure, for a machine that others
use too is not the same an hour later.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

from bench import Settings, child, main, table, versions

HERE = "bench.limits"
N = {"full": 4096, "quick": 2048, "tiny": 128}  # a product of (N,N) by (N,N)


def peaks(size: str) -> dict[str, Any]:
    """GFLOP/s of a large product in bf16 and float32, GB/s (10^9) that a sum over memory or a
    product with a vector reads; best of several."""
    import torch

    def best(work: Any, times: int) -> float:
        seconds = []
        for _ in range(times):
            begun = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - begun)
        return min(seconds)

    n, result = N[size], {"threads": torch.get_num_threads()}
    for name in ("bfloat16", "float32"):
        a = torch.randn(n // 2, n).to(getattr(torch, name))
        b = torch.randn(n, n).to(a.dtype)
        result[name] = n**3 / best(lambda a=a, b=b: a @ b.T, 6) / 1e9
    x = torch.ones((1 << 28) if size != "tiny" else 1 << 20)  # 1 GiB: no cache holds it
    rows, v = x.view(-1, 4096), torch.ones(4096)
    result["read"] = x.numel() * 4 / min(best(x.sum, 4), best(lambda: rows @ v, 4)) / 1e9
    return result


def measured(size: str) -> dict[str, Any]:
    """`peaks`, in a process of its own."""
    return child(HERE, "peaks", size)


def words(found: dict[str, Any], *libraries: str) -> str:
    """The machine, its limits and the versions, as a section's last line."""
    load = os.getloadavg()[0]
    return (f"{date.today()}. {processor()}, {found['threads']} threads, {memory()} of memory; "
            f"load {load:.1f} at the end. Limits measured in the same run: {found['bfloat16']:,.0f}"
            f" GFLOP/s in bf16, {found['float32']:,.0f} in float32, {found['read']:.1f} GB/s read. "
            f"Python {platform.python_version()}, {versions('torch', *libraries)}.")


def processor() -> str:
    """The processor's name as Linux has it, else its kind."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    name = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")),
                platform.machine())
    return f"{name}, {os.cpu_count()} cores"


def memory() -> str:
    """How much memory the machine has."""
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GB"


def job(s: Settings) -> str:
    result = measured(s.size)
    rows = [("product, bf16", f"{result['bfloat16']:,.0f} GFLOP/s"),
            ("product, float32", f"{result['float32']:,.0f} GFLOP/s"),
            ("read", f"{result['read']:.1f} GB/s")]
    return table(["limit", "measured"], rows) + "\n\n" + words(result)


if __name__ == "__main__":
    sys.exit(main(HERE, "The machine's limits", {"peaks": peaks}, job, rounds=0))
