"""Fixtures that every test may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from onerec._native import core

ROOT = Path(__file__).resolve().parent.parent

# A benchmark that a test starts is no worker of xdist's: those do not measure.
os.environ.pop("PYTEST_XDIST_WORKER", None)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets; skips without one."""
    given = os.environ.get("ONEREC_DATA")
    folder = Path(given) if given else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set ONEREC_DATA)")
    return folder


@pytest.fixture(params=core().isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test with each instruction set that the machine has."""
    before = core().isa()
    core().set_isa(request.param)
    yield request.param
    core().set_isa(before)


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills every floating-point `torch.empty` and `torch.empty_like` with NaN.

    An output that a kernel forgot to write then shows in the values.
    """

    def poisoned(make):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point() and tensor.device.type != "meta":
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        return call

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    return
