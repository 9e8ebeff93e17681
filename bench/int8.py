"""int8 products on a CPU: what `--quant int8` computes, beside other ways to the same numbers.

`python -m bench.int8` prints a table of milliseconds a product, x (rows,n) by W (n,n), for:

    int8pack_mm   torch._weight_int8pack_mm: codes in int8, x in bf16
    bf16          x @ W.T with W in bf16
    float32       the same in float32
    converted     the codes in bf16, made for each product: what many rows take

`ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI python -m bench.int8` is what a CPU without AMX does. Each
figure is the median of `--repeat` timings, of so many products each that they last 5 ms.
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
    """The processor as Linux names it, and the vector instructions that oneDNN may use."""
    import torch

    with open("/proc/cpuinfo", encoding="utf-8") as f:
        name = next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "AMX" if torch.cpu._is_amx_tile_supported()
                           else "no AMX")
    return f"{name}, {limit}"


def milliseconds(run: Callable[[], object], repeat: int) -> float:
    """The median time of one call."""
    run()
    begin = time.perf_counter()
    run()
    calls = max(1, round(0.005 / max(time.perf_counter() - begin, 1e-7)))
    times = []
    for _ in range(repeat):
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        times.append((time.perf_counter() - begin) / calls)
    return 1000 * statistics.median(times)


def ways(n: int, rows: int) -> dict[str, Callable[[], object]]:
    """Each way as a function that computes one product."""
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
    parser = argparse.ArgumentParser(description="int8 products on a CPU beside bf16 and float32")
    parser.add_argument("--repeat", type=int, default=9)
    repeat = parser.parse_args().repeat
    import torch

    print(f"{cpu_name()}; torch {torch.__version__}; ms a product, median of {repeat}\n")
    names = list(ways(64, 1))
    print("| W | rows | threads | " + " | ".join(names) + " |")
    print("|---|--:|--:|" + "--:|" * len(names))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for n in SIZES:
            for rows in ROWS:
                times = [milliseconds(run, repeat) for run in ways(n, rows).values()]
                print(f"| {n} x {n} | {rows} | {threads} | "
                      + " | ".join(f"{x:.3f}" for x in times) + " |")


if __name__ == "__main__":
    main()
