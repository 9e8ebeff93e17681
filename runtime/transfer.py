"""Copies to a GPU that nobody waits for, and what the host goes on knowing of them.

A GPU works off a queue that the host fills. Whoever asks it for a number waits until the queue is
empty, and then the GPU waits for the host. A step has one such wait (train.train_step). So what
shapes depend on, where documents begin and which tokens are trained, is asked of the host's own
copy of a batch (`host`); and a batch comes from pinned memory, in a queue beside, while the one
before it is computed (`ahead`). On a CPU all of this gives back what it was given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor


def to_device_async(x: Tensor, device: Any) -> Tensor:
    """x on a device; from the host to a GPU the copy is only begun, and `host` still gives x."""
    device = torch.device(device)
    if x.device.type != "cpu" or device.type != "cuda":
        return x.to(device)
    y = x.pin_memory().to(device, non_blocking=True)  # the allocator keeps what is still read
    y.host = x
    return y


def host(x: Tensor) -> Tensor:
    """What x was copied from, which answers at once; x itself where nothing was copied."""
    return getattr(x, "host", x)


@cache
def beside(device: torch.device) -> torch.cuda.Stream:
    """The queue of copies; one, for memory is kept for each."""
    return torch.cuda.Stream(device)


def ahead(batches: Sequence[Any], device: torch.device) -> Iterator[Any]:
    """Each batch (tensors or None, and `to`) on the device; when one is given, the copy of the next
    is on its way."""
    copies = beside(device) if device.type == "cuda" else None

    def send(batch: Any) -> Any:
        with torch.cuda.stream(copies) if copies else nullcontext():
            return batch.to(device)

    coming = send(batches[0])
    for following in (*batches[1:], None):
        here = coming
        if copies:
            now = torch.cuda.current_stream(device)
            now.wait_stream(copies)  # a wait of one queue for the other, not of the host
            for x in vars(here).values():
                if x is not None:
                    x.record_stream(now)  # its memory is used there, though it is of the other
        coming = following and send(following)
        yield here
