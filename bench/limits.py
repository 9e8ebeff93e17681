"""The limits of this machine: the speed of matrix products and the memory bandwidth.

    python -m bench.limits

The limits are measured, not taken from a data sheet. Matrix products limit a training step;
reading the weights limits decoding. The share of its limit says how far a figure can still be
improved. Every benchmark measures both limits in its own run, because a shared machine changes
from hour to hour.
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
    """Return GFLOP/s of a large product in bf16 and float32, and the GB/s (10^9) that a sum over
    memory or a matrix-vector product reads. Each is the best of several measurements."""
    import torch

    def shortest(run: Any, repeats: int) -> float:
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    n, result = N[size], {"threads": torch.get_num_threads()}
    for name in ("bfloat16", "float32"):
        a = torch.randn(n // 2, n).to(getattr(torch, name))
        b = torch.randn(n, n).to(a.dtype)
        result[name] = n**3 / shortest(lambda a=a, b=b: a @ b.T, 6) / 1e9
    x = torch.ones((1 << 28) if size != "tiny" else 1 << 20)  # 1 GiB: more than any cache
    rows, v = x.view(-1, 4096), torch.ones(4096)
    result["read"] = x.numel() * 4 / min(shortest(x.sum, 4), shortest(lambda: rows @ v, 4)) / 1e9
    return result


def measured(size: str) -> dict[str, Any]:
    """Return the result of `peaks`, computed in a new process."""
    return child(HERE, "peaks", size)


def description(peaks: dict[str, Any], *libraries: str) -> str:
    """Return the last line of a section: the machine, its limits, the libraries' versions."""
    load = os.getloadavg()[0]
    return (f"{date.today()}. {processor()}, {peaks['threads']} threads, {memory()} of memory; "
            f"load {load:.1f} at the end. Limits measured in the same run: {peaks['bfloat16']:,.0f}"
            f" GFLOP/s in bf16, {peaks['float32']:,.0f} in float32, {peaks['read']:.1f} GB/s read. "
            f"Python {platform.python_version()}, {versions('torch', *libraries)}.")


def processor() -> str:
    """Return the processor's name on Linux; elsewhere its architecture."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    name = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")),
                platform.machine())
    return f"{name}, {os.cpu_count()} cores"


def memory() -> str:
    """Return the size of the machine's memory."""
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GB"


def job(s: Settings) -> str:
    """Measure the limits; return the table."""
    result = measured(s.size)
    rows = [("product, bf16", f"{result['bfloat16']:,.0f} GFLOP/s"),
            ("product, float32", f"{result['float32']:,.0f} GFLOP/s"),
            ("read", f"{result['read']:.1f} GB/s")]
    return table(["limit", "measured"], rows) + "\n\n" + description(result)


if __name__ == "__main__":
    sys.exit(main(HERE, "The machine's limits", {"peaks": peaks}, job, rounds=0))
