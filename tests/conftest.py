"""One thread for each test process, no network, and nothing left over from one test to the next."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1")  # before torch is imported: two workers share two cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

# The same examples every time, so that a change is judged by itself; --hypothesis-profile=default
# draws new ones.
hypothesis.settings.register_profile("same", derandomize=True, database=None)
hypothesis.settings.load_profile("same")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """Tiny models, two texts and their bins, in which a module's runs are made."""
    from helpers.train_runs import make_workspace

    return make_workspace(tmp_path_factory.mktemp("runs"))


@pytest.fixture(autouse=True)
def as_new():
    """Every test begins with the same random state and ends with torch as it was."""
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU say so where there is none."""
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
