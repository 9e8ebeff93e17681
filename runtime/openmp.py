"""How the threads of OpenMP wait for each other on a CPU.

A training step is thousands of short matrix products, with a barrier of all threads after each. By
default libgomp's threads spin for milliseconds before they sleep. That costs nothing on an idle
machine. If another program runs on the same cores, each thread waits for one that has no core
because others spin on it, and both programs become slow. A short spin is as fast on an idle
machine.
"""

import os

LIBGOMP_SPIN_COUNT = 300_000  # libgomp's default
SHORT_SPIN_COUNT = 1_000  # some tens of microseconds


def shorten_spin_wait() -> None:
    """Set GOMP_SPINCOUNT, unless the user has set it or OMP_WAIT_POLICY.

    libgomp reads it once, when torch is imported: call this before.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SHORT_SPIN_COUNT))
