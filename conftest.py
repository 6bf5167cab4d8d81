"""Shared by tests/ and benchmarks/."""

import pytest
import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what is marked `gpu` where there is no CUDA device."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
