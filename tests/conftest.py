"""Settings that must hold before torch is imported, and what is skipped where."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# Each pytest-xdist worker is a process: more threads than cores would only make them wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing may be fetched: a test that would need a model hub fails at once instead of waiting for the network.
os.environ["HF_HUB_OFFLINE"] = "1"

# Hypothesis' deadline is a bound on wall time, which a busy machine breaks without a fault in the code.
settings.register_profile("sdxl-training", deadline=None)
settings.load_profile("sdxl-training")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where there is no CUDA device."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch  # only where needed: a run of the configuration tests alone stays fast

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
