"""How a CPU's threads wait for each other; imported before torch, whose libgomp reads it once.

A training step is thousands of short products, and after each one all threads meet. As it comes,
libgomp's threads spin for milliseconds before they sleep: alone that costs nothing, but beside
another program on the same cores each waits for a thread that has no core because others spin on
it, and both crawl. A short spin is as fast alone. What a user has set stands.
"""

import os

OWN = 300_000  # libgomp's, where nothing is said
SHORT = 1_000  # some tens of microseconds

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", str(SHORT))
