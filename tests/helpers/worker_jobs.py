"""Jobs for worker processes, in a module that is quick to import."""

from __future__ import annotations

import os
import time


def process_id(chunk: int) -> int:
    """Return the number of this process, after a while, so that every worker gets a chunk."""
    time.sleep(0.2)
    return os.getpid()
