"""int8 products on a CPU: the kernel of `--quant int8`, compared with other kernels.

`python -m bench.int8` prints milliseconds per product, x (rows,n) by W (n,n), for:

    int8pack_mm   torch._weight_int8pack_mm: codes in int8, x in bf16
    bf16          x @ W.T with W in bf16
    float32       the same in float32
    converted     codes converted to bf16 for each product: used for many rows

`ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI python -m bench.int8` measures the kernels of a CPU without
AMX. A figure is the median of `--repeat` timings; each timing runs products for about 5 ms.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

ROWS = (1, 8, 64)
SIZES = (512, 2048)


def cpu_name() -> str:
    """Return the processor's name on Linux, and whether oneDNN may use AMX."""
    import torch

    with open("/proc/cpuinfo", encoding="utf-8") as f:
        name = next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "AMX" if torch.cpu._is_amx_tile_supported()
                           else "no AMX")
    return f"{name}, {limit}"


def milliseconds(run: Callable[[], object], repeat: int) -> float:
    """Return the median time of one call, in milliseconds."""
    run()
    start = time.perf_counter()
    run()
    calls = max(1, round(0.005 / max(time.perf_counter() - start, 1e-7)))
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        times.append((time.perf_counter() - start) / calls)
    return 1000 * statistics.median(times)


def kernels(n: int, rows: int) -> dict[str, Callable[[], object]]:
    """Return {name: function that computes one product of x (rows,n) by W (n,n)}."""
    import torch

    from layers.int8 import quantize

    W, x = torch.randn(n, n), torch.randn(rows, n)
    codes, scales = quantize(W)
    W16, x16, scales16 = W.bfloat16(), x.bfloat16(), scales.bfloat16()
    return {"int8pack_mm": lambda: torch._weight_int8pack_mm(x16, codes, scales16),
            "bf16": lambda: x16 @ W16.T,
            "float32": lambda: x @ W.T,
            "converted": lambda: ((x16 @ codes.bfloat16().T) * scales).bfloat16()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="int8 products on a CPU beside bf16 and float32")
    parser.add_argument("--repeat", type=int, default=9)
    repeat = parser.parse_args().repeat
    import torch

    print(f"{cpu_name()}; torch {torch.__version__}; ms a product, median of {repeat}\n")
    names = list(kernels(64, 1))
    print("| W | rows | threads | " + " | ".join(names) + " |")
    print("|---|--:|--:|" + "".join("--:|" for _ in names))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for n in SIZES:
            for rows in ROWS:
                times = [milliseconds(run, repeat) for run in kernels(n, rows).values()]
                print(f"| {n} x {n} | {rows} | {threads} | "
                      + " | ".join(f"{x:.3f}" for x in times) + " |")


if __name__ == "__main__":
    main()
