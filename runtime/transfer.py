"""Asynchronous copies of batches to a GPU.

A GPU works off a queue that the host fills. When the host reads a value from the GPU it waits until
that queue is empty, and then the GPU waits for the host. A training step has one such wait
(train.train_step). Therefore a batch keeps on the host what shapes depend on (data.RowDocuments),
and it is copied from pinned memory, on a stream of its own, while the batch before it is computed.
On a CPU everything is returned as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor


def to_device_async(x: Tensor, device: Any) -> Tensor:
    """Copy x to a device; a copy from the CPU to a GPU is only started."""
    device = torch.device(device)
    if x.device.type != "cpu" or device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)  # pinned memory lives until it is read


@cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The CUDA stream of copies. There is one per device, because memory is kept for each."""
    return torch.cuda.Stream(device)


def prefetch(batches: Sequence[Any], device: torch.device) -> Iterator[Any]:
    """Yield each batch on the device, after starting the copy of the next one.

    A batch has the method `to`; its attributes that are tensors on the GPU are protected from
    reuse of their memory until the compute stream has read them.
    """
    stream = copy_stream(device) if device.type == "cuda" else None

    def start_copy(batch: Any) -> Any:
        if stream is None:
            return batch.to(device)
        with torch.cuda.stream(stream):
            return batch.to(device)

    following = start_copy(batches[0])
    for batch in (*batches[1:], None):
        current = following
        if stream is not None:
            compute_stream = torch.cuda.current_stream(device)
            compute_stream.wait_stream(stream)  # the GPU's queue waits, not the host
            for x in vars(current).values():
                if isinstance(x, torch.Tensor) and x.device.type == "cuda":
                    x.record_stream(compute_stream)  # it was allocated on the other stream
        if batch is not None:
            following = start_copy(batch)
        yield current
