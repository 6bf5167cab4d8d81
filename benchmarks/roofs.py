"""What the machine can do at most, measured: the floor that stands beside a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from onerec._native import core


@lru_cache
def roofs(dtype: torch.dtype, device: str) -> dict[str, float]:
    """GFLOP/s of a square product and GB/s of reading, measured; the best in a second.

    A CPU without bfloat16 arithmetic multiplies in float32.
    """
    if device == "cpu" and dtype == torch.bfloat16 and not core().isa().startswith("avx512"):
        dtype = torch.float32
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    # Many times the cache and, on CUDA, the time of a launch.
    size = 2**32 if device == "cuda" else 2**28
    big = torch.empty(size, dtype=torch.uint8, device=device).view(torch.int64).zero_()

    def best(call: Callable[[], Any]) -> float:
        times: list[float] = []
        while len(times) < 5 or sum(times) < 1.0:
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    return {
        "roof GFLOP/s": round(2 * n**3 / best(lambda: a @ a) / 1e9, 1),
        "roof GB/s": round(big.nbytes / best(lambda: big.sum()) / 1e9, 1),
    }
